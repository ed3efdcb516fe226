"""Decoders paint a frame from its latent. The picture is for people: planning does not use it, and its gradient does
not reach the world model.

DINO-WM (Zhou et al., 2024, arXiv:2411.04983, section 3.2 and appendix; the released models/vqvae.py and
models/decoder/transposed_conv.py) trains a decoder q beside the transition model, on latents cut off from the graph:

    L = mean (q(sg[z]) - o)^2 + 0.25 mean (sg[e_k] - sg[z])^2             o: the frame, its pixels in [-1, 1]

`VQVAEDecoder` paints from a square grid of N patch tokens. It is the upper half of a VQ-VAE (van den Oord et al., 2017,
arXiv:1711.00937), and can first replace each token by e_k, the nearest of its codes. The codes have no gradient. They
follow the tokens by a moving average (appendix A.1 there), so the second term teaches nothing if the encoder is frozen;
it only measures how far the codes are. `TransposedConvDecoder` paints from the one token of a frame.
"""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from lib.common import UserError


class Quantize(nn.Module):
    """Replaces every vector by the nearest of `n_embed` codes, which follow the mean of the vectors that chose them."""

    def __init__(self, dim, n_embed, decay=0.99, eps=1e-5):
        super().__init__()
        self.decay, self.eps = decay, eps
        self.register_buffer("embed", torch.randn(dim, n_embed))
        self.register_buffer("cluster_size", torch.zeros(n_embed))
        self.register_buffer("embed_avg", self.embed.clone())

    def forward(self, x):
        """(..., d) -> codes (..., d) and their mean squared distance."""
        with torch.autocast(x.device.type, enabled=False):  # a moving average needs full precision
            x = x.float()
            flat = x.flatten(0, -2)  # (n, d)
            distance = flat.square().sum(1, keepdim=True) - 2 * flat @ self.embed + self.embed.square().sum(0)
            chosen = distance.argmin(1)
            codes = self.embed.T[chosen].view_as(x)
            if self.training:
                self.follow(flat, chosen)
            return codes, (codes - x).square().mean()

    @torch.no_grad()
    def follow(self, flat, chosen):
        one_hot = F.one_hot(chosen, self.embed.shape[1]).to(flat.dtype)  # (n, n_embed)
        self.cluster_size.lerp_(one_hot.sum(0), 1 - self.decay)
        self.embed_avg.lerp_(flat.T @ one_hot, 1 - self.decay)
        total, n_embed = self.cluster_size.sum(), len(self.cluster_size)
        size = (self.cluster_size + self.eps) / (total + n_embed * self.eps) * total  # smoothed, so it is never zero
        self.embed.copy_(self.embed_avg / size)


class OnePixelDeconv(nn.ConvTranspose2d):
    """A transposed convolution of a single pixel, (B, C, 1, 1). A matrix product computes it in a third of the time."""

    def forward(self, x):
        return (x.flatten(1) @ self.weight.flatten(1)).unflatten(1, self.weight.shape[1:]) + self.bias[:, None, None]


class ResBlock(nn.Module):
    def __init__(self, channel, n_res_channel):
        super().__init__()
        convs = nn.Conv2d(channel, n_res_channel, 3, padding=1), nn.Conv2d(n_res_channel, channel, 1)
        self.conv = nn.Sequential(nn.ReLU(), convs[0], nn.ReLU(), convs[1])

    def forward(self, x):
        return x + self.conv(x)


def upsample4(i, o, channel, n_res_block, n_res_channel):
    """A network that maps (B, i, h, w) to (B, o, 4h, 4w)."""
    layers = [nn.Conv2d(i, channel, 3, padding=1), *(ResBlock(channel, n_res_channel) for _ in range(n_res_block))]
    layers += [nn.ReLU(), nn.ConvTranspose2d(channel, channel // 2, 4, stride=2, padding=1)]
    layers += [nn.ReLU(), nn.ConvTranspose2d(channel // 2, o, 4, stride=2, padding=1)]
    return nn.Sequential(OrderedDict(blocks=nn.Sequential(*layers)))


class VQVAEDecoder(nn.Module):
    """Paints each of a grid of patch tokens as 16 x 16 pixels, and resizes the result to `img_size`. Its names and
    default sizes are the release's. With `quantize`, each token first becomes the nearest of `n_embed` codes."""

    def __init__(self, dim, img_size, channel=384, n_res_block=4, n_res_channel=128, quantize=False, n_embed=2048):
        super().__init__()
        self.img_size, self.quantize = img_size, quantize
        self.quantize_b = Quantize(dim, n_embed)  # the release has it in any case
        self.upsample_b = upsample4(dim, dim, channel, n_res_block, n_res_channel)
        self.dec = upsample4(dim, 3, channel, n_res_block, n_res_channel)

    def forward(self, z):
        """Tokens (B, T, N, d) -> images (B, T, 3, H, W) in [-1, 1], and the mean squared distance to the codes."""
        side = math.isqrt(z.shape[2])
        x, distance = self.quantize_b(z) if self.quantize else (z, z.new_zeros(()))
        x = x.flatten(0, 1).unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (B * T, d, side, side)
        images = F.interpolate(self.dec(self.upsample_b(x)), (self.img_size, self.img_size), mode="bilinear")
        return images.unflatten(0, z.shape[:2]), distance


class TransposedConvDecoder(nn.Module):
    """Paints the one token of a frame by a linear layer and transposed convolutions, each of which triples the side.
    The release has five, whose inputs are 32, 8, 4, 2 and 1 times `depth` wide, and resizes their 243 pixels to 224.
    Smaller images need fewer."""

    def __init__(self, dim, img_size, depth=64):
        super().__init__()
        self.img_size, steps = img_size, min(5, math.ceil(math.log(img_size, 3)))
        widths = [depth * k for k in (32, 8, 4, 2, 1)[:steps]] + [3]
        layers = [nn.Linear(dim, widths[0]), nn.Unflatten(1, (widths[0], 1)), nn.Unflatten(2, (1, 1))]
        for i, o in zip(widths, widths[1:], strict=False):
            layers += [nn.ConvTranspose2d(i, o, 5, stride=3, padding=1), nn.ReLU()]
        self.network = nn.Sequential(*layers[:-1])  # the names are the release's
        for layer in self.network:
            if hasattr(layer, "weight"):
                nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)

    def forward(self, z):
        """Tokens (B, T, 1, d) -> images (B, T, 3, H, W) in [-1, 1], and 0, since it has no codes."""
        images = F.interpolate(self.network(z.flatten(0, 2)), (self.img_size, self.img_size), mode="bilinear")
        return images.unflatten(0, z.shape[:2]), z.new_zeros(())


def build_decoder(num_patches, dim, **sizes):
    """The decoder for latents of N tokens of d numbers. UserError if there is none."""
    if num_patches == 1:
        if sizes.get("quantize"):
            raise UserError("--decoder vq makes codes of patch tokens, but a frame has one token: use --decoder plain")
        return TransposedConvDecoder(dim, **sizes)
    if math.isqrt(num_patches) ** 2 != num_patches:
        raise UserError(f"--decoder needs a square grid of tokens, not {num_patches}")
    return VQVAEDecoder(dim, **sizes)
