"""The frozen eyes of the world model: an image becomes N tokens of d numbers. One interface, one builder.

    encoder = build_encoder(name, img_size, weights)      .name, .num_patches (N), .dim (d), .img_size
    encoder.fit(frames)                                   for those that learn from our own frames, in clips
                                                          of .clip_frames in a row
    encoder(images (B, 3, h, w) in [0, 1]) -> (B, N, d)   resizes and normalises inside; never trains

    learned on our frames      pca  vae  vae_map  vjepa_tiny         no download
    scaled to our frames       patches                               no download
    pretrained, as they are    dinov2  dinov2_imagenet  dino_cls  dinov3  vjepa2  resnet18  resnet18_map  r3m
    pretrained, then learned   dino_tok  dino_tok_vq  vfm_vae        on DINOv2, the baseline's own backbone

Every image is resized whole (bilinear, antialias), never cropped: the border of a frame is part of the world. The
pretrained see pixels normalised as ImageNet's, but `dinov2` and `dino_cls` by DINO-WM's 0.5.

    python encoders.py                                      # the table: tokens, width, parameters, weights, frames/s
    python encoders.py --show pictures                      # three principal components of the tokens, as colours
    python encoders.py --show pictures --encoders dinov2,dinov3 --weights random
"""

import math
import re
from functools import partial
from pathlib import Path

import numpy as np
import timm  # here and not where it is used: it loads Triton, which crashes once a renderer has loaded Mesa's LLVM
import torch
import torch.nn.functional as F
from torch import nn

import data
import vjepa
from data import Dataset, Parser, UserError, Windows, make_env, positive, run_script, write_atomic
from vae_mdnrnn import VAE, fit, sample_z, to_tensor, train_vae
from weights import load_weights, resnet_names, vit_names, vjepa2_names

DINOV2, DINOV3 = "vit_{}_patch14_dinov2.lvd142m", "vit_{}_patch16_dinov3.lvd1689m"  # timm's names, but for the size
SIZES = {"small": 384, "base": 768, "large": 1024}  # and their widths
IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
DINO_WM = dict(mean=(0.5,) * 3, std=(0.5,) * 3)  # DINO-WM's own choice for DINOv2 (its datasets/img_transforms.py)


class FrozenEncoder(nn.Module):
    """What all encoders share: a name, an image size, N tokens of d numbers; no gradient, and eval mode whatever
    `train()` says. N is one, or with a `patch` size one a patch."""

    clip_frames = 1  # how many consecutive frames make a clip, for those whose `fit` learns from motion
    damping = 0.1  # of `standardise`: a number that hardly varies is not blown up

    def __init__(self, name, img_size, dim, patch=None):
        super().__init__()
        if img_size % (patch or 1):
            raise UserError(f"--encoder {name}: image size {img_size} is not a multiple of its patch size {patch}")
        self.name, self.img_size, self.dim = name, img_size, dim
        self.num_patches = (img_size // patch) ** 2 if patch else 1

    def freeze(self):
        return self.requires_grad_(False).eval()

    def train(self, mode=True):
        return super().train(False)

    def resize(self, images):
        """(B, 3, h, w) -> (B, 3, img_size, img_size), bilinear with antialias."""
        if images.shape[-2:] == (self.img_size, self.img_size):
            return images
        size = (self.img_size, self.img_size)
        return F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)

    def normalise(self, images, mean, std):
        """What a pretrained backbone sees: its pixels normalised, then resized (DINO-WM's order), (B, 3, s, s)."""
        mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (mean, std))
        return self.resize((images - mean) / std)

    def filtered(self, images):
        """L x L^T of images (B, 3, h, w) -> (B, 3, grid, grid), L being the buffer `lowpass`."""
        return self.lowpass @ self.resize(images) @ self.lowpass.T

    def standardise(self, latents):
        """Sets the buffers `mean` and `scale` from latents (S, d): scale_i = s_i + damping * max s."""
        std = latents.std(0)
        self.mean.copy_(latents.mean(0))
        self.scale.copy_(std + self.damping * std.max())


def chunks(frames, size=500):
    return (frames[i : i + size] for i in range(0, len(frames), size))


@torch.no_grad()
def see_all(see, frames, device, size=500):
    """`see`, a function of images (B, 3, h, w), of frames (S, h, w, 3), `size` at a time."""
    return torch.cat([see(to_tensor(some, device)) for some in chunks(frames, size)])


def gaussian_lowpass(samples, pixels, sigma):
    """The matrix L (samples, pixels) that filters a line of pixels and subsamples it; sigma in image widths."""
    sample, pixel = (torch.arange(samples) + 0.5) / samples, (torch.arange(pixels) + 0.5) / pixels
    weights = torch.exp(-((sample[:, None] - pixel) ** 2) / (2 * sigma**2))
    return weights / weights.sum(1, keepdim=True)


class PCAEncoder(FrozenEncoder):
    """Low-pass filtered frames on their first principal components: the eigenfaces of world models.

        y = L x L^T                              L: Gaussian low-pass and subsampling, one matrix
        token_i = v_i . (y - mean) / (s_i + c s_1)         v_i, s_i: principal axis, its standard deviation; c: damping

    Blurring makes the latent change smoothly as the ball moves, so distance in the latent grows with distance in the
    maze. Full whitening (c = 0) would make the last, noisy components as loud as the first.
    """

    damping = 0.05

    def __init__(self, img_size=64, dim=32, sigma=0.14, grid=16):
        super().__init__("pca", img_size, dim)
        self.register_buffer("lowpass", gaussian_lowpass(grid, img_size, sigma))
        self.register_buffer("mean", torch.zeros(3 * grid**2))
        self.register_buffer("axes", torch.zeros(3 * grid**2, dim))  # v_i / (s_i + c s_1)

    @torch.no_grad()
    def fit(self, frames, seed=0):
        """frames (S, H, W, 3) uint8. Exact, by the eigenvectors of the covariance."""
        y = see_all(self.filtered, frames, self.mean.device).flatten(1)  # (S, 3 * grid^2)
        self.mean.copy_(y.mean(0))
        variance, vectors = torch.linalg.eigh(torch.cov(y.T.double()))  # ascending
        std = variance.clamp(min=0).sqrt().flip(0)[: self.dim]
        self.axes.copy_(vectors.flip(1)[:, : self.dim] / (std + self.damping * std[0]))
        return self

    @torch.no_grad()
    def forward(self, images):
        return ((self.filtered(images).flatten(1) - self.mean) @ self.axes)[:, None]  # (B, 1, d)


class SpatialVAE(VAE):
    """V without its two linear layers: a 4x4 map of latents instead of one vector, z_dim numbers at each place."""

    def __init__(self, z_dim=16):
        super().__init__(z_dim)
        widths = (3, 32, 64, 128, 256)
        down = [(nn.Conv2d(i, o, 4, 2, 1), nn.ReLU()) for i, o in zip(widths, widths[1:], strict=False)]
        up = [(nn.ReLU(), nn.ConvTranspose2d(o, i, 4, 2, 1)) for i, o in zip(widths, widths[1:], strict=False)]
        self.encoder = nn.Sequential(*sum(down, ()))  # 64 -> 32 -> 16 -> 8 -> 4
        self.mu, self.logvar = nn.Conv2d(256, z_dim, 1), nn.Conv2d(256, z_dim, 1)
        self.decoder = nn.Sequential(nn.Conv2d(z_dim, 256, 1), *sum(reversed(up), ()), nn.Sigmoid())

    def encode(self, x):
        """(B, 3, 64, 64) -> mu, logvar, each (B, z_dim * 16)."""
        return tuple(latent.flatten(1) for latent in super().encode(x))

    def decode(self, z):
        return self.decoder(z.unflatten(1, (self.z_dim, 4, 4)))


class VAEEncoder(FrozenEncoder):
    """The V of World Models as an encoder: one token, the posterior mean, normalised as PCA's is; or the 16 tokens of
    its spatial variant.

        x' = 1/2 + gain * L (x - mean frame) L^T        what V sees and reconstructs, in [0, 1]
        token_i = (mu_i(x') - m_i) / (s_i + c max s)    m_i, s_i: mean and standard deviation of mu_i

    What V lacks on the plain frames, and what is done about it:
    - The ball is 2 % of the pixels, and V paints the background first: x' is without it, at full contrast.
    - With the KL term at full weight, saying where the ball is costs more nats than the frame gains: beta.
    - Dimensions that collapse even so are noise, which a division by their tiny deviation would blow up: c.
    - A sharp ball's latent says that two places differ, not how far apart they are; L makes neighbours overlap.
    """

    def __init__(self, name, img_size=64, spatial=False, sigma=0.1, beta=0.01):
        if img_size != 64:
            raise UserError(f"--encoder {name} sees 64 px, as the paper's V, not {img_size}")
        super().__init__(name, img_size, dim=16 if spatial else 32, patch=16 if spatial else None)
        self.vae = SpatialVAE(self.dim) if spatial else VAE(self.dim)
        self.beta = beta
        self.register_buffer("lowpass", gaussian_lowpass(64, 64, sigma))
        self.register_buffer("background", torch.zeros(3, 64, 64))
        self.register_buffer("gain", torch.ones(()))
        self.register_buffer("mean", torch.zeros(self.num_patches * self.dim))
        self.register_buffer("scale", torch.ones(self.num_patches * self.dim))

    def contrast(self, images):
        """x' (B, 3, 64, 64) of images (B, 3, h, w)."""
        return (0.5 + self.gain * (self.filtered(images) - self.background)).clamp(0, 1)

    @torch.no_grad()
    def posterior_mean(self, images):
        return self.vae.encode(self.contrast(images))[0]

    def fit(self, frames, seed=0, steps=2000):
        """frames (S, H, W, 3) uint8."""
        device = self.mean.device
        sample = see_all(self.filtered, frames[:: max(1, len(frames) // 4000)], device)
        if (sample == sample[0]).all():
            raise UserError(f"--encoder {self.name}: all frames are the same, there is nothing to learn from them")
        self.background.copy_(sample.mean(0))
        self.gain.copy_(0.5 / (sample - self.background).abs().amax())
        self.vae.requires_grad_(True)
        train_vae(self.vae, frames, steps, batch_size=32, beta=self.beta, kl_tolerance=0, seed=seed, see=self.contrast)
        self.freeze()
        self.standardise(see_all(self.posterior_mean, frames, device))
        return self

    def forward(self, images):
        latent = (self.posterior_mean(images) - self.mean) / self.scale  # (B, d * N)
        return latent.unflatten(1, (self.dim, self.num_patches)).mT  # (B, N, d)


def collapse_measures(tokens):
    """Of tokens (S, N, d): the mean over d of the standard deviation over the frames, and the effective rank (Roy &
    Vetterli, 2007), exp(entropy) of the covariance's normalised eigenvalues: between 1 and d."""
    x = (tokens - tokens.mean(0)).flatten(0, 1).double()
    share = torch.linalg.eigvalsh(x.T @ x).clamp(min=1e-12)
    share = share / share.sum()
    return x.std(0).mean().item(), (-share * share.log()).sum().exp().item()


class VJEPATinyEncoder(FrozenEncoder):
    """V-JEPA 2's pretraining (vjepa.py) on our own clips, small.

        token = LN(E'([x, x]))          as `vjepa2`: a frame twice makes a clip of one tubelet

    Not as in the release:
    - Each pixel is standardised over the frames: the ball is 2 % of them, and the tokens collapse towards the rest.
    - Blocks hide half of the clip, not all of it: where a ball is that is hidden throughout, nobody can say.
    - 1,500 steps of 16 clips, hence a faster average (0.998, not 0.99925); no weight decay, no augmentation.
    """

    clip_frames = 8

    def __init__(self, img_size=64, dim=64, patch=16, depth=3, heads=2):
        super().__init__("vjepa_tiny", img_size, dim, patch)
        self.grid = self.clip_frames // 2, img_size // patch, img_size // patch
        self.vit = vjepa.VideoViT(self.grid, patch, dim, depth, heads)
        self.register_buffer("mean", torch.zeros(3 * img_size**2))
        self.register_buffer("scale", torch.ones(3 * img_size**2))

    def see(self, images):
        """(B, 3, h, w) -> standardised, (B, 3, img_size, img_size)."""
        return (self.resize(images) - self.mean.view(3, self.img_size, -1)) / self.scale.view(3, self.img_size, -1)

    def fit(self, frames, seed=0, steps=1500, batch_size=16, momentum=0.998):
        """frames (S, H, W, 3) uint8, every `clip_frames` in a row a clip. UserError if the tokens collapse."""
        device, T = self.mean.device, self.clip_frames
        sample = frames[:: max(1, len(frames) // 4000)]
        self.standardise(see_all(self.resize, sample, device).flatten(1))

        def draw():
            first = T * torch.randint(len(frames) // T, (batch_size,)).sort().values
            rows = (first[:, None] + torch.arange(T)).flatten().numpy()
            return self.see(to_tensor(frames[rows], device)).unflatten(0, (-1, T))  # (B, T, 3, s, s)

        vjepa.pretrain(self.vit, draw, self.grid, steps, momentum, seed)
        self.freeze()
        std, rank = collapse_measures(see_all(self, sample, device))
        print(f"{self.name}: standard deviation {std:.2f} over the frames, effective rank {rank:.1f} of {self.dim}")
        if std < 0.05 or rank < 2:
            raise UserError(
                f"{self.name} has collapsed: its tokens hardly depend on the frame (standard deviation {std:.3f}, "
                f"effective rank {rank:.1f}): try another --seed, or frames in which more moves"
            )
        return self

    @torch.no_grad()
    def forward(self, images):
        clips = self.see(images)[:, None].expand(-1, 2, -1, -1, -1)  # (B, 2, 3, s, s)
        return F.layer_norm(self.vit(clips), (self.dim,))  # (B, N, d)


class PatchEncoder(FrozenEncoder):
    """Raw pixels in patches through a fixed random projection: does pretraining matter at all?

        token = P (x - m) / s        x: a 16x16 patch in [0, 1]; P (d, 768): normal, variance 1/d
                                     m: its mean over the frames; s, one number, makes the tokens' variance 1

    By Johnson and Lindenstrauss's lemma distances between tokens are, up to chance, those between patches.
    """

    def __init__(self, img_size=64, dim=64, patch=16):
        super().__init__("patches", img_size, dim, patch)
        self.patch = patch
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("projection", torch.randn(3 * patch**2, dim, generator=generator) / dim**0.5)
        self.register_buffer("mean", torch.zeros(self.num_patches, dim))
        self.register_buffer("scale", torch.ones(()))

    def fit(self, frames, seed=0):
        """frames (S, H, W, 3) uint8."""
        tokens = see_all(self, frames, self.mean.device)
        self.mean.copy_(tokens.mean(0))
        self.scale.copy_((tokens - self.mean).square().mean().sqrt())
        return self

    @torch.no_grad()
    def forward(self, images):
        patches = F.unfold(self.resize(images), self.patch, stride=self.patch)  # (B, 768, N)
        return (patches.mT @ self.projection - self.mean) / self.scale  # (B, N, d)


# ---------------------------------------------------------------------------------------------------------
# Pretrained backbones


class ViTEncoder(FrozenEncoder):
    """DINOv2 (Oquab et al., 2023, arXiv:2304.07193) and DINOv3 (Simeoni et al., 2025, arXiv:2508.10104): the patch
    tokens, or the class token, after the final norm. Class and register tokens are never among the patch tokens.

    Args:
        name: ours; model: timm's, with a place for the size; its weights are the Hugging Face repository timm/<model>.
        weights: in timm's, transformers' or the original repository's format.
        pixels: their mean and std. cls: the class token alone, (B, 1, d).
    """

    def __init__(self, name, img_size, size, weights, model, pixels, cls=False):
        model = model.format(size)
        patch = int(re.search(r"patch(\d+)", model)[1])
        super().__init__(name, img_size, SIZES[size], patch)
        # timm has DINOv3 with and without biases of q, k, v. Only with them does every original checkpoint fit.
        self.vit = timm.create_model(model.replace("dinov3.", "dinov3_qkvb."), img_size=img_size, num_classes=0)
        self.pixels, self.cls, self.repository = pixels, cls, f"timm/{model}"
        if cls:
            self.num_patches = 1
        load_weights(self.vit, weights, self.repository, partial(vit_names, self.vit))

    @torch.no_grad()
    def forward(self, images):
        x = self.vit.forward_features(self.normalise(images, **self.pixels))  # (B, prefix + N, d)
        return x[:, :1] if self.cls else x[:, self.vit.num_prefix_tokens :]

    @torch.no_grad()
    def layers(self, images, blocks):
        """Patch tokens (B, N, d) after each number of `blocks`; 0 is the patch embedding, -1 the normed output."""
        x = self.vit.norm_pre(self.vit._pos_embed(self.vit.patch_embed(self.normalise(images, **self.pixels))))
        outputs = {0: x}
        for i, block in enumerate(self.vit.blocks, start=1):
            outputs[i] = x = block(x)
        outputs[-1] = self.vit.norm(x)
        return [outputs[i][:, self.vit.num_prefix_tokens :] for i in blocks]


VJEPA2_SIZES = {
    "large": dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16),
    "huge": dict(hidden_size=1280, num_hidden_layers=32, num_attention_heads=16),
    "giant": dict(hidden_size=1408, num_hidden_layers=40, num_attention_heads=22, mlp_ratio=48 / 11),
}


class VJEPA2Encoder(FrozenEncoder):
    """V-JEPA 2 (Assran et al., 2025, arXiv:2506.09985): a frame twice makes a clip of one tubelet.

    As its authors encode images for control (`forward_target` in app/vjepa_droid/train.py): each frame by itself,
    doubled, and the tokens layer-normed once more, without weights.
    """

    def __init__(self, name, img_size, size, weights):
        from transformers import VJEPA2Config, VJEPA2Model  # takes seconds, and only this one needs it

        super().__init__(name, img_size, VJEPA2_SIZES[size]["hidden_size"], patch=16)
        config = VJEPA2Config(crop_size=img_size, pred_num_hidden_layers=1, **VJEPA2_SIZES[size])
        self.vit = VJEPA2Model(config).encoder
        self.repository = f"facebook/vjepa2-vit{size[0]}-fpc64-256"
        load_weights(self.vit, weights, self.repository, vjepa2_names)

    @torch.no_grad()
    def forward(self, images):
        clip = self.normalise(images, **IMAGENET)[:, None].expand(-1, 2, -1, -1, -1)  # (B, 2, 3, s, s)
        return F.layer_norm(self.vit(clip).last_hidden_state, (self.dim,))  # (B, N, d)


class ResNetEncoder(FrozenEncoder):
    """A ResNet-18: the mean of its last map as one token, or the map's places as tokens.

    ImageNet's (He et al., 2016; torchvision's weights, as in DINO-WM), or R3M's (Nair et al., 2022, arXiv:2203.12601),
    whose authors crop 224 of 256 px; here, as in DINO-WM, the whole image is 224 px.
    """

    def __init__(self, name, img_size, size, weights, repository="timm/resnet18.tv_in1k", spatial=False):
        super().__init__(name, img_size, 512, patch=32 if spatial else None)
        self.net, self.repository = timm.create_model("resnet18", num_classes=0), repository
        load_weights(self.net, weights, repository, resnet_names)

    @torch.no_grad()
    def forward(self, images):
        tokens = self.net.forward_features(self.normalise(images, **IMAGENET)).flatten(2).mT  # (B, 49, 512)
        return tokens.mean(1, keepdim=True) if self.num_patches == 1 else tokens


# ---------------------------------------------------------------------------------------------------------
# Tokenizers that learn on top of a frozen backbone


class DINOTok(FrozenEncoder):
    """DINO-Tok (Jia et al., 2025, arXiv:2511.20565): shallow features keep detail, deep ones meaning; joined, they are
    an "information-complete" latent, projected on a global PCA and, in the VQ form, quantised by two codebooks.

        z_b = V_b^T (f_b - m_b) / s_b       b = shallow, deep; V_b: the first k/2 principal axes over all frames
        token = [z_shallow, z_deep]         s_b: one number, so that both branches are equally loud
        token = [c_shallow, c_deep]         VQ: each half becomes the nearest of its codebook's centres

    No whitening: within a branch the leading components dominate every distance, which is what the paper's global PCA
    is for. The paper's code and weights are not released and it trains its codebooks and a decoder on ImageNet; here
    the axes are exact, the codebooks are k-means centres, both of our frames, and nothing is decoded. Ours, too: the
    shallow layer (after a third of the blocks), k, the size of the codebooks, and DINOv2 below: with ImageNet's pixels,
    so that `dinov2_imagenet` is what to compare with.
    """

    def __init__(self, name, img_size, size, weights, dim=64, codes=0):
        super().__init__(name, img_size, dim, patch=14)
        self.backbone = ViTEncoder(name, img_size, size, weights, DINOV2, IMAGENET)
        self.repository = self.backbone.repository
        self.register_buffer("mean", torch.zeros(2, 1, self.backbone.dim))
        self.register_buffer("axes", torch.zeros(2, self.backbone.dim, dim // 2))  # V_b / s_b
        self.register_buffer("codebooks", torch.zeros(2, codes, dim // 2))

    def branches(self, images):
        """(B, 3, h, w) -> shallow and deep features, (2, B * N, d)."""
        shallow = len(self.backbone.vit.blocks) // 3
        return torch.stack(self.backbone.layers(images, (shallow, -1))).flatten(1, 2)

    @torch.no_grad()
    def fit(self, frames, seed=0, max_frames=500):
        """frames (S, H, W, 3) uint8, of which `max_frames`, evenly spread, are used."""
        frames = frames[:: -(-len(frames) // max_frames)]
        f = torch.cat([self.branches(to_tensor(c, self.mean.device)) for c in chunks(frames, 50)], dim=1)
        self.mean.copy_(f.mean(1, keepdim=True))
        f -= self.mean
        variance, vectors = torch.linalg.eigh((f.mT @ f).double() / f.shape[1])  # ascending
        variance, vectors = variance.flip(1)[:, : self.dim // 2], vectors.flip(2)[..., : self.dim // 2]
        self.axes.copy_(vectors / variance.mean(1).sqrt()[:, None, None])
        if self.codebooks.numel():
            generator = torch.Generator().manual_seed(seed)
            for codebook, z in zip(self.codebooks, f @ self.axes, strict=True):
                codebook.copy_(kmeans(z, len(codebook), generator))
        return self

    @torch.no_grad()
    def forward(self, images):
        z = (self.branches(images) - self.mean) @ self.axes  # (2, B * N, d / 2)
        if self.codebooks.numel():
            nearest = torch.cdist(z, self.codebooks).argmin(-1, keepdim=True)
            z = self.codebooks.gather(1, nearest.expand_as(z))
        return z.unflatten(1, (len(images), self.num_patches)).movedim(0, 2).flatten(2)  # (B, N, d)


def kmeans(x, k, generator, steps=20):
    """Lloyd's algorithm on at most 50,000 of x (n, d) -> centres (k, d). One without points moves to a random one."""
    x = x[torch.randperm(len(x), generator=generator)[:50_000].to(x.device)]
    draw = lambda: x[torch.randint(len(x), (k,), generator=generator).to(x.device)]  # noqa: E731
    centres = draw()
    for _ in range(steps):
        nearest = torch.cdist(x, centres).argmin(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, x)
        counts = torch.bincount(nearest, minlength=k)[:, None]
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), draw())
    return centres


class VFMVAE(FrozenEncoder):
    """VFM-VAE (Bi et al., 2025, arXiv:2510.18457): a VAE whose encoder is a frozen vision foundation model.

        f_l = layer l of the backbone, l = patch embedding, middle, last           (B, N, d) each
        mu, logvar = W [W_1 f_1, W_2 f_2, W_3 f_3]                                 d -> 64 each, 192 -> 2 * 32
        z = mu + exp(logvar / 2) eps                                               14 x 14 x 32
        L = |x^ - x| + 0.1 sum_s |x^_s - x_s| + 1e-6 KL(q(z|x) || N(0, 1)) + 0.1 (1 - cos(W_z z, f_3))

    Layers, widths and the weights of L1, scales and KL are the release's (github.com/tianciB/VFM-VAE, f16d32), linear
    maps its `conv` variant. Smaller here: DINOv2 instead of SigLIP 2; the decoder below; a fixed weight and no distance
    matrix in the alignment with f_3; no equivariance term, LPIPS or discriminators, so its pictures are blurrier. A
    token is the posterior mean, each number standardised.
    """

    def __init__(self, name, img_size, size, weights, dim=32):
        super().__init__(name, img_size, dim, patch=14)
        self.backbone = ViTEncoder(name, img_size, size, weights, DINOV2, IMAGENET)
        self.repository, d = self.backbone.repository, self.backbone.dim
        self.levels = nn.ModuleList(nn.Linear(d, 64) for _ in range(3))
        self.to_latent, self.to_features = nn.Linear(3 * 64, 2 * dim), nn.Linear(dim, d)
        self.decoder = FusionDecoder(dim)
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))

    def features(self, images):
        return self.backbone.layers(images, (0, len(self.backbone.vit.blocks) // 2, -1))

    def posterior(self, features):
        """Three (B, N, d) -> mu, logvar, each (B, N, 32)."""
        levels = [level(f) for level, f in zip(self.levels, features, strict=True)]
        return self.to_latent(torch.cat(levels, -1)).chunk(2, -1)

    def loss(self, images):
        features = self.features(images)
        mu, logvar = self.posterior(features)
        z = sample_z(mu, logvar)
        side = math.isqrt(self.num_patches)
        *coarse, recon = self.decoder(z.mT.unflatten(2, (side, side)))
        error = [F.l1_loss(x, F.adaptive_avg_pool2d(images, x.shape[-2:])) for x in (*coarse, recon)]
        kl = -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum((1, 2)).mean()
        align = 1 - F.cosine_similarity(self.to_features(z), features[-1], dim=-1).mean()
        return {"loss": error[-1] + 0.1 * sum(error[:-1]) + 1e-6 * kl + 0.1 * align, "recon": error[-1]}

    def fit(self, frames, seed=0, steps=1000, batch_size=16):
        """frames (S, H, W, 3) uint8."""
        device = self.mean.device

        def loss():
            index = torch.randint(len(frames), (batch_size,)).sort().values.numpy()
            return self.loss(self.resize(to_tensor(frames[index], device)))

        learned = nn.ModuleList([self.levels, self.to_latent, self.to_features, self.decoder]).requires_grad_(True)
        fit(learned, loss, steps, 1e-3, seed, "train VFM-VAE")
        self.freeze()
        sample = frames[:: -(-len(frames) // 500)]
        mu = see_all(lambda images: self.posterior(self.features(images))[0], sample, device, 50)
        self.standardise(mu.flatten(0, 1))
        return self

    @torch.no_grad()
    def forward(self, images):
        return (self.posterior(self.features(images))[0] - self.mean) / self.scale  # (B, N, 32)


class FusionDecoder(nn.Module):
    """z (B, dim, s, s) -> images of s, 2s, 4s and 8s pixels: multi-scale latent fusion, progressive reconstruction.

    Each scale sees z anew (a convolution, its channels shuffled into pixels) beside what the scale below it made, and
    adds its own detail to the picture. Without the paper's modulation by the pooled z and its attention.
    """

    def __init__(self, dim, widths=(128, 64, 32, 16)):
        super().__init__()
        self.fuse, self.blocks, self.to_rgb = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for i, width in enumerate(widths):
            below = widths[i - 1] if i else 0
            self.fuse.append(nn.Sequential(nn.Conv2d(dim, width * 4**i, 3, padding=1), nn.PixelShuffle(2**i)))
            convs = nn.Conv2d(below + width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
            self.blocks.append(nn.Sequential(convs[0], nn.GELU(), convs[1], nn.GELU()))
            self.to_rgb.append(nn.Conv2d(width, 3, 1))

    def forward(self, z):
        x, picture, pictures = None, 0.5, []
        for fuse, block, to_rgb in zip(self.fuse, self.blocks, self.to_rgb, strict=True):
            if x is not None:
                x, picture = (F.interpolate(t, scale_factor=2, mode="bilinear") for t in (x, picture))
            x = block(fuse(z) if x is None else torch.cat([x, fuse(z)], 1))
            picture = picture + to_rgb(x)
            pictures.append(picture)
        return pictures


# ---------------------------------------------------------------------------------------------------------
# The builder

# name: how to build it from (name, img_size, size, weights), its image size, its sizes (the default first), and the
# licence of its weights, if it has any
ENCODERS = {
    "pca": (lambda name, img_size, *_: PCAEncoder(img_size), 64, (), None),
    "vae": (lambda name, img_size, *_: VAEEncoder(name, img_size), 64, (), None),
    "vae_map": (lambda name, img_size, *_: VAEEncoder(name, img_size, spatial=True), 64, (), None),
    "vjepa_tiny": (lambda name, img_size, *_: VJEPATinyEncoder(img_size), 64, (), None),
    "patches": (lambda name, img_size, *_: PatchEncoder(img_size), 64, (), None),
    "dinov2": (partial(ViTEncoder, model=DINOV2, pixels=DINO_WM), 196, SIZES, "Apache-2.0"),
    # DINOv2 with its authors' own normalisation, against DINO-WM's above
    "dinov2_imagenet": (partial(ViTEncoder, model=DINOV2, pixels=IMAGENET), 196, SIZES, "Apache-2.0"),
    "dino_cls": (partial(ViTEncoder, model=DINOV2, pixels=DINO_WM, cls=True), 196, SIZES, "Apache-2.0"),
    "dinov3": (partial(ViTEncoder, model=DINOV3, pixels=IMAGENET), 224, SIZES, "DINOv3 licence"),
    "vjepa2": (VJEPA2Encoder, 256, VJEPA2_SIZES, "MIT"),
    "resnet18": (ResNetEncoder, 224, (), "BSD-3-Clause"),
    "resnet18_map": (partial(ResNetEncoder, spatial=True), 224, (), "BSD-3-Clause"),
    "r3m": (partial(ResNetEncoder, repository=None), 224, (), "MIT"),
    "dino_tok": (DINOTok, 196, SIZES, "Apache-2.0"),
    "dino_tok_vq": (partial(DINOTok, codes=512), 196, SIZES, "Apache-2.0"),
    "vfm_vae": (VFMVAE, 196, SIZES, "Apache-2.0"),
}


def build_encoder(name, img_size=None, weights=None):
    """The frozen encoder called `name`, or `name-size`; `img_size` is the side it resizes images to (default: its own).

    weights: None for the pretrained ones, "random" for none, or what `load_weights` takes. UserError for what is
    unknown, not there, or does not fit.
    """
    base, _, size = name.partition("-")
    if base not in ENCODERS:
        raise UserError(f"unknown encoder '{base}'; known: {', '.join(ENCODERS)}")
    build, own_img_size, sizes, licence = ENCODERS[base]
    if size and size not in sizes:
        raise UserError(f"--encoder {base} has no size '{size}', but {', '.join(sizes) or 'one alone'}")
    if licence is None and weights not in (None, "random"):
        raise UserError(f"--encoder {base} learns from the collected frames: it takes no --weights")
    own_size = next(iter(sizes), None)
    name = f"{base}-{size}" if size and size != own_size else base
    return build(name, img_size or own_img_size, size or own_size, weights).freeze()


# ---------------------------------------------------------------------------------------------------------
# The table, and the picture


def print_table(names, batch_size):
    import huggingface_hub as hub

    print(f"{'encoder':15} {'image':>5} {'tokens':>6} {'width':>5} {'M params':>8} {'frames/s':>8}  weights (licence)")
    for name in names:
        encoder, licence = build_encoder(name, weights="random"), ENCODERS[name.partition("-")[0]][3]
        images = torch.rand(batch_size, 3, encoder.img_size, encoder.img_size)
        rate = batch_size * data.per_second(lambda: encoder(images))  # noqa: B023
        size = sum(p.numel() for p in encoder.parameters()) / 1e6
        weights = "fitted on the collected frames"
        if licence:
            found = encoder.repository and hub.try_to_load_from_cache(encoder.repository, "model.safetensors")
            weights = f"{encoder.repository or '--weights FILE'} ({licence}, {'' if found else 'not '}here)"
        shape = f"{encoder.num_patches:6} {encoder.dim:5}"
        print(f"{name:15} {encoder.img_size:5} {shape} {size:8.2f} {rate:8.3g}  {weights}")


def sample_frames(dataset, clips=50, length=8):
    """(clips * length, H, W, 3) uint8, `length` in a row: from a data set's folder, or PointMaze, pushed at random."""
    if dataset is not None:
        dataset = Dataset(dataset)
        starts = Windows(dataset, np.arange(len(dataset)), length, dataset.meta["frameskip"]).starts
        first = starts[np.linspace(0, len(starts) - 1, clips).astype(int)]
        return dataset.frames[(first[:, None] + np.arange(length)).ravel()]
    env, rng, frames = make_env("pointmaze", 224), np.random.default_rng(0), []
    for _ in range(clips):
        env.set_state(env.sample_state(rng))
        for actions in rng.uniform(-1, 1, (length, 5, 2)):
            frames.append(env.observe()["visual"])
            for action in actions:
                env.step(action, render=False)
    return np.stack(frames)


def principal_colours(tokens):
    """Tokens (B, N, d) -> images (B, side, side, 3): their first three principal components over all B * N tokens, each
    stretched from its 1st to its 99th percentile, as red, green and blue."""
    x = tokens.flatten(0, 1).double()
    _, vectors = torch.linalg.eigh(torch.cov(x.T))  # ascending
    x = (x - x.mean(0)) @ vectors.flip(1)[:, :3]
    low, high = x.quantile(0.01, 0), x.quantile(0.99, 0)
    side = math.isqrt(tokens.shape[1])
    return ((x - low) / (high - low).clamp(min=1e-9)).clamp(0, 1).view(-1, side, side, 3)


def show(names, weights, frames, directory, count=4):
    """Writes `directory`/tokens.png: a row of frames, and below it a row for each encoder."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    seen = frames[::8]  # of each clip one
    rows = {"frame": seen[:count]}
    for name in names:
        pretrained = ENCODERS[name.partition("-")[0]][3] is not None
        try:
            encoder = build_encoder(name, weights=weights if pretrained else None)
        except UserError as error:
            print(f"left out: {error}")
            continue
        if hasattr(encoder, "fit"):
            encoder.fit(frames)
        tokens = see_all(encoder, seen, "cpu", 10)
        label = f"{name}\nrandom weights" if pretrained and weights == "random" else name
        rows[f"{label}\n{tokens.shape[1]} x {tokens.shape[2]}"] = principal_colours(tokens)[:count].numpy()
    size = (1.5 * count + 1, 1.5 * len(rows))
    figure, axes = plt.subplots(len(rows), count, figsize=size, squeeze=False, layout="constrained")
    for row, (label, pictures) in zip(axes, rows.items(), strict=True):
        row[0].set_ylabel(label, rotation=0, ha="right", va="center")
        for ax, picture in zip(row, pictures, strict=True):
            ax.imshow(picture)
            ax.set(xticks=[], yticks=[])
    path = Path(directory) / "tokens.png"
    write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=100))
    print(f"wrote {path}")


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--encoders", default=",".join(ENCODERS), help="which, with commas between")
    add("--batch-size", type=positive, default=8, help="for frames/s in the table")
    add("--show", metavar="DIR", help="instead of the table: draw the tokens to DIR/tokens.png")
    add("--weights", help="for --show: as train.py's, for all encoders that take any")
    add("--data", help="for --show: the data set whose frames to see and to fit to (default: PointMaze, rendered)")
    args = parser.parse_args()
    names = args.encoders.split(",")
    if unknown := [name for name in names if name.partition("-")[0] not in ENCODERS]:
        raise UserError(f"unknown encoder '{unknown[0]}'; known: {', '.join(ENCODERS)}")
    if args.show:
        show(names, args.weights, sample_frames(args.data), args.show)
    else:
        print_table(names, args.batch_size)


if __name__ == "__main__":
    run_script(main)
