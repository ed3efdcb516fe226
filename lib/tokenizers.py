"""Two tokenizers, DINO-Tok and VFM-VAE, learned on a frozen backbone. They turn its features after the blocks
`.layers` (0 is the patch embedding, -1 the normed output) into tokens of `.dim` numbers.

    tokenizer.fit(see, frames, device, seed)        see(uint8 frames (n, H, W, 3)) -> images (n, 3, s, s), features
    tokenizer(features) -> tokens (B, N, dim)       features: a list with (B, N, d) for each of `.layers`
"""

import math
import warnings

import torch
import torch.nn.functional as F
from torch import nn

from lib.common import fit


def some_features(see, frames):
    """Yields the features of at most 500 evenly spread frames, 50 frames at a time."""
    frames = frames[:: -(-len(frames) // 500)]
    return (see(frames[i : i + 50])[1] for i in range(0, len(frames), 50))


class DINOTok(nn.Module):
    """DINO-Tok (Jia et al., 2025, arXiv:2511.20565). Shallow features keep detail and deep ones keep meaning. Joined,
    they are an "information-complete" latent. It is projected on a global PCA, and the VQ form quantises it as well.

        z_b = V_b^T (f_b - m_b) / s_b       b = shallow, deep; V_b: the first dim/2 principal axes over all frames
        token = [z_shallow, z_deep]         s_b: one number, so that both branches are equally loud
        token = [c_shallow, c_deep]         VQ: each half becomes the nearest centre of its codebook

    Nothing is whitened, so that the leading components of a branch dominate every distance, as the paper intends.
    Deviation: the paper trains its codebooks and a decoder on ImageNet, and has released neither code nor weights.
    Here the axes are exact and the codebooks are k-means centres, both of our own frames. There is no decoder.
    The shallow layer (after a third of the blocks), `dim` and the size of the codebooks are our choices."""

    def __init__(self, dim_in, num_blocks, dim=64, codes=0):
        super().__init__()
        self.dim, self.layers = dim, (num_blocks // 3, -1)
        self.register_buffer("mean", torch.zeros(2, 1, dim_in))
        self.register_buffer("axes", torch.zeros(2, dim_in, dim // 2))  # V_b / s_b
        self.register_buffer("codebooks", torch.zeros(2, codes, dim // 2))

    def fit(self, see, frames, device, seed):
        """Computes the axes, and the codebooks if there are any, from 500 of the uint8 frames (S, H, W, 3)."""
        self.to(device)
        f = torch.cat([torch.stack(some).flatten(1, 2) for some in some_features(see, frames)], dim=1)  # (2, S * N, d)
        self.mean.copy_(f.mean(1, keepdim=True))
        f -= self.mean
        variance, vectors = torch.linalg.eigh((f.mT @ f).double() / f.shape[1])  # in ascending order
        variance, vectors = variance.flip(1)[:, : self.dim // 2], vectors.flip(2)[..., : self.dim // 2]
        self.axes.copy_(vectors / variance.mean(1).sqrt()[:, None, None])
        if self.codebooks.numel():
            for codebook, z in zip(self.codebooks, f @ self.axes, strict=True):
                codebook.copy_(kmeans(z, len(codebook), seed))
        return self

    def forward(self, features):
        z = (torch.stack(features).flatten(1, 2) - self.mean) @ self.axes  # (2, B * N, dim / 2)
        if self.codebooks.numel():
            nearest = torch.cdist(z, self.codebooks).argmin(-1, keepdim=True)
            z = self.codebooks.gather(1, nearest.expand_as(z))
        return z.unflatten(1, features[0].shape[:2]).movedim(0, 2).flatten(2)  # (B, N, dim)


def kmeans(x, k, seed):
    """The centres (k, d) that k-means finds among x (n, d), of which it uses at most 50,000."""
    from scipy.cluster.vq import kmeans2  # here, since the import takes a third of a second

    index = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:50_000]
    index = index.repeat(-(-k // len(index)))  # each centre begins at a point, so there must be at least k
    with warnings.catch_warnings(action="ignore"):  # the centre of an empty cluster stays where it was
        centres, _ = kmeans2(x[index.to(x.device)].cpu().numpy(), k, iter=20, minit="points", seed=seed)
    return torch.from_numpy(centres)


class VFMVAE(nn.Module):
    """VFM-VAE (Bi et al., 2025, arXiv:2510.18457): a VAE whose encoder is a frozen vision foundation model.

        f_1, f_2, f_3: the backbone's patch embedding, its middle layer, its output       (B, N, d) each
        mu, logvar = W [W_1 f_1, W_2 f_2, W_3 f_3]                                        d -> 64 each, 192 -> 2 * dim
        z = mu + exp(logvar / 2) eps                                                      (B, N, dim)
        L = |x^ - x| + 0.1 sum_s |x^_s - x_s| + 1e-6 KL(q(z|x) || N(0, 1)) + 0.1 (1 - cos(W_z z, f_3))

    x^_s is the picture at a coarser scale. A token is the standardised posterior mean. The layers, the widths and the
    first three factors are the release's (github.com/tianciB/VFM-VAE, f16d32); the linear maps are its `conv` variant.
    Deviation: DINOv2 stands for SigLIP 2, and the decoder is a smaller one. The alignment with f_3 has a fixed factor
    and no distance matrix. There is no equivariance term, LPIPS or discriminator, so the pictures are blurrier."""

    def __init__(self, dim_in, num_blocks, dim=32):
        super().__init__()
        self.dim, self.layers = dim, (0, num_blocks // 2, -1)
        self.levels = nn.ModuleList(nn.Linear(dim_in, 64) for _ in range(3))
        self.to_latent, self.to_features = nn.Linear(3 * 64, 2 * dim), nn.Linear(dim, dim_in)
        self.decoder = FusionDecoder(dim)
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))

    def posterior(self, features):
        levels = [level(f) for level, f in zip(self.levels, features, strict=True)]  # three (B, N, 64)
        return self.to_latent(torch.cat(levels, -1)).chunk(2, -1)  # mu and logvar, each (B, N, dim)

    def loss(self, images, features):
        mu, logvar = self.posterior(features)
        z = mu + torch.exp(logvar / 2) * torch.randn(mu.shape, device=mu.device)
        side = math.isqrt(z.shape[1])
        pictures = self.decoder(z.mT.unflatten(2, (side, side)))
        error = [F.l1_loss(x, F.adaptive_avg_pool2d(images, x.shape[-2:])) for x in pictures]
        kl = -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum((1, 2)).mean()
        align = 1 - F.cosine_similarity(self.to_features(z), features[-1], dim=-1).mean()
        return {"loss": error[-1] + 0.1 * sum(error[:-1]) + 1e-6 * kl + 0.1 * align, "recon": error[-1]}

    def fit(self, see, frames, device, seed, steps=1000, batch_size=16):
        """Trains the VAE on the uint8 frames (S, H, W, 3), then standardises its tokens on 500 of them."""

        def loss():
            return self.loss(*see(frames[torch.randint(len(frames), (batch_size,)).sort().values.numpy()]))

        fit(self.to(device).requires_grad_(True), loss, steps, 1e-3, seed, "train VFM-VAE")
        self.requires_grad_(False)
        mu = torch.cat([self.posterior(some)[0] for some in some_features(see, frames)]).flatten(0, 1)  # (S * N, dim)
        self.mean.copy_(mu.mean(0))
        self.scale.copy_(mu.std(0) + 0.1 * mu.std(0).max())  # so that a number that hardly varies is not blown up
        return self

    def forward(self, features):
        return (self.posterior(features)[0] - self.mean) / self.scale  # (B, N, dim)


class FusionDecoder(nn.Module):
    """z (B, dim, s, s) -> pictures of s, 2s, 4s and 8s pixels, each of which adds detail to the one before it. Each
    scale sees z itself, through a convolution whose channels are shuffled into pixels, and the scale below it.
    Deviation: the paper's attention and its modulation by the pooled z are left out."""

    def __init__(self, dim, widths=(128, 64, 32, 16)):
        super().__init__()
        self.fuse, self.blocks, self.to_rgb = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for i, (below, width) in enumerate(zip((0, *widths), widths, strict=False)):
            self.fuse.append(nn.Sequential(nn.Conv2d(dim, width * 4**i, 3, padding=1), nn.PixelShuffle(2**i)))
            convs = nn.Conv2d(below + width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
            self.blocks.append(nn.Sequential(convs[0], nn.GELU(), convs[1], nn.GELU()))
            self.to_rgb.append(nn.Conv2d(width, 3, 1))

    def forward(self, z):
        x = self.blocks[0](self.fuse[0](z))
        pictures = [0.5 + self.to_rgb[0](x)]
        for fuse, block, to_rgb in zip(self.fuse[1:], self.blocks[1:], self.to_rgb[1:], strict=True):
            x, picture = (F.interpolate(t, scale_factor=2, mode="bilinear") for t in (x, pictures[-1]))
            x = block(torch.cat([x, fuse(z)], 1))
            pictures.append(picture + to_rgb(x))
        return pictures
