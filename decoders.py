"""Decoders: pictures of latents, for people to look at. Nothing plans by them, and nothing flows back through them.

DINO-WM (Zhou et al., 2024, arXiv:2411.04983, section 3.2 and appendix; the released models/vqvae.py and
models/decoder/transposed_conv.py) trains one beside the transition model, on latents cut off from the graph:

    L = mean (q(sg[z]) - o)^2 + 0.25 mean (sg[e_k] - sg[z])^2             o: the frame, its pixels in [-1, 1]

`VQVAEDecoder`, for a square grid of N patch tokens, is the upper half of a VQ-VAE (van den Oord et al., 2017,
arXiv:1711.00937); each token may first be replaced by e_k, the nearest of its codes. The codes have no gradient:
they follow the tokens by a moving average (appendix A.1 there), so that with a frozen encoder the second term teaches
nothing, and is but their distance. `TransposedConvDecoder`, for one token a frame, paints from that vector.

Beside them, how good a picture is: PSNR, SSIM (Wang et al., 2004) and, where torchvision's VGG-16 has been downloaded,
LPIPS (Zhang et al., 2018, arXiv:1801.03924).

    python decoders.py            # shapes, parameters, frames per second
    python train.py --decoder     # trains one; then python plan.py --decode
"""

import functools
import math
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data import UserError, per_second, run_script, write_atomic


class Quantize(nn.Module):
    """Every vector's nearest of `n_embed` codes, which follow the mean of the vectors that chose them."""

    def __init__(self, dim, n_embed, decay=0.99, eps=1e-5):
        super().__init__()
        self.decay, self.eps = decay, eps
        self.register_buffer("embed", torch.randn(dim, n_embed))
        self.register_buffer("cluster_size", torch.zeros(n_embed))
        self.register_buffer("embed_avg", self.embed.clone())

    def forward(self, x):
        """(..., d) -> codes (..., d), and their mean squared distance; in full precision, as a moving average needs."""
        with torch.autocast(x.device.type, enabled=False):
            return self.quantize(x.float())

    def quantize(self, x):
        flat = x.flatten(0, -2)
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
        size = (self.cluster_size + self.eps) / (total + n_embed * self.eps) * total  # smoothed: none is ever zero
        self.embed.copy_(self.embed_avg / size)


class ResBlock(nn.Module):
    def __init__(self, channel, n_res_channel):
        super().__init__()
        self.conv = nn.Sequential(
            nn.ReLU(), nn.Conv2d(channel, n_res_channel, 3, padding=1), nn.ReLU(), nn.Conv2d(n_res_channel, channel, 1)
        )

    def forward(self, x):
        return x + self.conv(x)


class Upsample4(nn.Module):
    """(B, i, h, w) -> (B, o, 4h, 4w)."""

    def __init__(self, i, o, channel, n_res_block, n_res_channel):
        super().__init__()
        self.blocks = nn.Sequential(
            nn.Conv2d(i, channel, 3, padding=1),
            *(ResBlock(channel, n_res_channel) for _ in range(n_res_block)),
            nn.ReLU(),
            nn.ConvTranspose2d(channel, channel // 2, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(channel // 2, o, 4, stride=2, padding=1),
        )

    def forward(self, x):
        return self.blocks(x)


class VQVAEDecoder(nn.Module):
    """A grid of patch tokens -> images, 16 pixels a side for each token; resized if the frames are of another size.

    Args:
        dim, img_size: d, and the side of the images.
        channel, n_res_block, n_res_channel: of the two steps of four, the release's by default.
        quantize, n_embed: whether tokens become codes, and how many of them.
    """

    def __init__(self, dim, img_size, channel=384, n_res_block=4, n_res_channel=128, quantize=False, n_embed=2048):
        super().__init__()
        self.img_size, self.quantize = img_size, quantize
        self.quantize_b = Quantize(dim, n_embed)  # the release has it in any case, and these names
        self.upsample_b = Upsample4(dim, dim, channel, n_res_block, n_res_channel)
        self.dec = Upsample4(dim, 3, channel, n_res_block, n_res_channel)

    def forward(self, z):
        """Tokens (B, T, N, d) -> images (B, T, 3, H, W) in [-1, 1], and the mean squared distance to the codes."""
        side = math.isqrt(z.shape[2])
        x, distance = self.quantize_b(z) if self.quantize else (z, z.new_zeros(()))
        x = x.flatten(0, 1).unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (BT, d, side, side)
        return resize(self.dec(self.upsample_b(x)), self.img_size).unflatten(0, z.shape[:2]), distance


class TransposedConvDecoder(nn.Module):
    """One token a frame -> images: a linear layer, transposed convolutions that each treble the side, a resize.

    The release has five of them (243 pixels, shown at 224); smaller images need fewer.

    Args: dim, img_size: d, and the side of the images. depth: of the widths 32, 8, 4, 2 and 1 times it.
    """

    def __init__(self, dim, img_size, depth=64):
        super().__init__()
        self.img_size = img_size
        steps = min(5, math.ceil(math.log(img_size, 3)))
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
        """Tokens (B, T, 1, d) -> images (B, T, 3, H, W) in [-1, 1], and 0: it has no codes."""
        return resize(self.network(z.flatten(0, 2)), self.img_size).unflatten(0, z.shape[:2]), z.new_zeros(())


def resize(images, size):
    """(B, 3, h, w) -> (B, 3, size, size), bilinear."""
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bilinear", align_corners=False)


def build_decoder(num_patches, dim, **sizes):
    """The decoder of latents of N tokens of d numbers; UserError if there is none."""
    if num_patches == 1:
        if sizes.get("quantize"):
            raise UserError("--decoder vq makes codes of patch tokens, and here is one token a frame: --decoder plain")
        return TransposedConvDecoder(dim, **sizes)
    if math.isqrt(num_patches) ** 2 != num_patches:
        raise UserError(f"--decoder wants a square grid of tokens, not {num_patches}")
    return VQVAEDecoder(dim, **sizes)


# ---------------------------------------------------------------------------------------------------------
# Pictures


def to_pixels(frames):
    """Frames (B, T, H, W, 3) of 0 to 255 -> images (B, T, 3, H, W) in [-1, 1]."""
    return frames.movedim(-1, -3) / 127.5 - 1


def from_pixels(images):
    """`to_pixels`, back: images (B, T, 3, H, W), clipped to [-1, 1] -> uint8 frames (B, T, H, W, 3)."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(-3, -1).cpu().numpy()


def psnr(images, truth):
    """Peak signal-to-noise ratio of images (B, 3, H, W) in [0, 1], in dB; of all of them together, as released."""
    return -10 * (images - truth).square().mean().log10()


def ssim(images, truth):
    """Structural similarity of images (B, 3, H, W) in [0, 1] (Wang et al., 2004), the mean over places and images:

    (2 m_x m_y + c_1) (2 s_xy + c_2) / ((m_x^2 + m_y^2 + c_1) (s_x^2 + s_y^2 + c_2)) of windows of 11 pixels.
    """
    line = torch.exp(-((torch.arange(11.0, device=images.device) - 5) ** 2) / (2 * 1.5**2))
    window = (line[:, None] * line / line.sum() ** 2).expand(3, 1, 11, 11)
    mean = lambda x: F.conv2d(x, window, padding=5, groups=3)  # noqa: E731
    m_x, m_y = mean(images), mean(truth)
    s_x, s_y, s_xy = mean(images**2) - m_x**2, mean(truth**2) - m_y**2, mean(images * truth) - m_x * m_y
    c_1, c_2 = 0.01**2, 0.03**2
    return ((2 * m_x * m_y + c_1) * (2 * s_xy + c_2) / ((m_x**2 + m_y**2 + c_1) * (s_x + s_y + c_2))).mean()


@functools.cache
def perceptual_metric():
    """LPIPS on VGG-16 as a function of two batches of images, or None where torch's cache lacks the weights."""
    if not Path(torch.hub.get_dir(), "checkpoints", "vgg16-397923af.pth").is_file():
        return None
    import lpips  # here, since it takes seconds

    return lpips.LPIPS(net="vgg", verbose=False)


@torch.no_grad()
def likeness(frames, truth):
    """{"psnr", "ssim", with VGG-16 at hand "lpips"} of uint8 frames (..., H, W, 3)."""
    x, y = (torch.from_numpy(f.reshape(-1, *f.shape[-3:])).permute(0, 3, 1, 2) / 255 for f in (frames, truth))
    scores = {"psnr": psnr(x, y).item(), "ssim": ssim(x, y).item()}
    if metric := perceptual_metric():
        scores["lpips"] = metric(x, y, normalize=True).mean().item()
    return scores


def beside(*panels):
    """Films (T, H, W, 3), or pictures (1, H, W, 3), side by side -> (T, H, W', 3)."""
    length, gap = max(map(len, panels)), np.full((1, panels[0].shape[1], 2, 3), 255, np.uint8)
    panels = [part for panel in panels for part in (panel, gap)][:-1]
    return np.concatenate([np.broadcast_to(part, (length, *part.shape[1:])) for part in panels], axis=2)


def write_gif(path, film):
    """A film (T, H, W, 3), small frames enlarged."""
    scale = max(1, 256 // film.shape[1])
    film = film.repeat(scale, axis=1).repeat(scale, axis=2)
    write_atomic(path, lambda p: imageio.imwrite(p, film, duration=50, loop=0))


def write_strips(path, *films):
    """A row for each film (T, H, W, 3), time to the right."""
    rows = [np.concatenate(np.pad(film, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255), 1) for film in films]
    write_atomic(path, lambda p: imageio.imwrite(p, np.concatenate(rows)))


def main():
    for what, num_patches, dim, sizes in (
        ("one token, laptop", 1, 32, dict(img_size=64, depth=16)),
        ("16 tokens, laptop", 16, 16, dict(img_size=64, channel=64, n_res_block=2, n_res_channel=32)),
        ("16 tokens, codes", 16, 16, dict(img_size=64, channel=64, n_res_block=2, n_res_channel=32, quantize=True)),
        ("one token, released", 1, 384, dict(img_size=224)), ("196 tokens, released", 196, 384, dict(img_size=224)),
    ):  # fmt: skip
        decoder, z = build_decoder(num_patches, dim, **sizes).eval(), torch.randn(1, 2, num_patches, dim)
        with torch.no_grad():
            images, _ = decoder(z)
            rate = 2 * per_second(lambda: decoder(z))  # noqa: B023
        million = sum(p.numel() for p in decoder.parameters()) / 1e6
        print(f"{what:20} {tuple(z.shape)} -> {tuple(images.shape)}  {million:6.2f} M parameters  {rate:7.3g} frames/s")


if __name__ == "__main__":
    run_script(main)
