"""The frozen eyes of the world model: an image becomes N tokens of d numbers. One interface, one builder.

    encoder = build_encoder(name, img_size, weights)      .name, .num_patches (N), .dim (d), .img_size
    encoder.fit(frames)                                   for those that learn from our own frames
    encoder(images (B, 3, h, w) in [0, 1]) -> (B, N, d)   resizes and normalises inside; never trains

`pca` and `vae` learn from the collected frames and need no download. `dinov2`, `dino_cls` and `dinov3` are
pretrained vision transformers from timm: DINOv2 (Oquab et al., 2023, arXiv:2304.07193) is DINO-WM's own.

    python encoders.py                # the table: tokens, width, parameters, weights, frames per second
"""

import argparse
import time
import urllib.error
import urllib.request
from pathlib import Path

import timm  # here and not where it is used: it loads Triton, which crashes once a renderer has loaded Mesa's LLVM
import torch
import torch.nn.functional as F
from torch import nn

from data import UserError, run_script
from vae_mdnrnn import VAE, to_tensor, train_vae


class FrozenEncoder(nn.Module):
    """What all encoders share: no gradient, and eval mode whatever `train()` says."""

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


def chunks(frames, size=500):
    return (frames[i : i + size] for i in range(0, len(frames), size))


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
    maze: with the true dynamics and this cost, CEM reaches 0.76 of 100 goals in one MPC iteration with sigma 0.08,
    0.86 with 0.16. Full whitening (c = 0) would make the last, noisy components as loud as the first.

    Args: dim, number of components; sigma, width of the filter as a fraction of the image; damping, c; grid,
    samples a side.
    """

    name, num_patches = "pca", 1

    def __init__(self, img_size=64, dim=32, sigma=0.14, damping=0.05, grid=16):
        super().__init__()
        self.img_size, self.dim, self.damping = img_size, dim, damping
        self.register_buffer("lowpass", gaussian_lowpass(grid, img_size, sigma))
        self.register_buffer("mean", torch.zeros(3 * grid**2))
        self.register_buffer("axes", torch.zeros(3 * grid**2, dim))  # v_i / (s_i + c s_1)

    def filtered(self, images):
        """(B, 3, h, w) -> (B, 3 * grid^2)."""
        return (self.lowpass @ self.resize(images) @ self.lowpass.T).flatten(1)

    @torch.no_grad()
    def fit(self, frames, seed=0):
        """frames (S, H, W, 3) uint8. Exact, by the eigenvectors of the covariance."""
        y = torch.cat([self.filtered(to_tensor(f, self.mean.device)) for f in chunks(frames)])
        self.mean.copy_(y.mean(0))
        variance, vectors = torch.linalg.eigh(torch.cov(y.T.double()))  # ascending
        std = variance.clamp(min=0).sqrt().flip(0)[: self.dim]
        self.axes.copy_(vectors.flip(1)[:, : self.dim] / (std + self.damping * std[0]))
        return self

    @torch.no_grad()
    def forward(self, images):
        return ((self.filtered(images) - self.mean) @ self.axes)[:, None]  # (B, 1, d)


class VAEEncoder(FrozenEncoder):
    """The V of World Models as an encoder: one token, the posterior mean, normalised as PCA's is.

        x' = 1/2 + gain * L (x - mean frame) L^T        what V sees and reconstructs, in [0, 1]
        token_i = (mu_i(x') - m_i) / (s_i + c max s)    m_i, s_i: mean and standard deviation of mu_i

    What V lacks on the plain frames, and what is done about it:
    - Training length. The ball is 2 % of the pixels and the rest never changes: V paints the background first, and
      after 400 steps of 64 frames all means are still constant, with the KL term at full weight and free bits, at 0.01
      of it, or on blurred frames at 0.001. Without the mean frame and at full contrast (x'), a linear map reads the
      ball's position from mu to 0.1 m after 200 steps of 32 frames.
    - The weight of the KL term. At 1, saying where the ball is costs more nats than the frame gains: beta = 0.01.
    - Collapsed dimensions. Even so fewer of the 32 stay in use the longer V trains (8 after 1,600 steps). The others
      are noise, which a division by their own tiny deviation would blow up: hence c.
    - Scale. A sharp ball's latent says that two places differ, not how far apart they are; L makes neighbours overlap.
    """

    name, num_patches = "vae", 1

    def __init__(self, img_size=64, dim=32, sigma=0.1, beta=0.01, damping=0.1):
        super().__init__()
        if img_size != 64:
            raise UserError(f"--encoder vae sees 64 px, as the paper's V, not {img_size}")
        self.img_size, self.dim, self.beta, self.damping, self.vae = img_size, dim, beta, damping, VAE(dim)
        self.register_buffer("lowpass", gaussian_lowpass(64, 64, sigma))
        self.register_buffer("background", torch.zeros(3, 64, 64))
        self.register_buffer("gain", torch.ones(()))
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))

    def filtered(self, images):
        """L x L^T of images (B, 3, h, w) -> (B, 3, 64, 64)."""
        return self.lowpass @ self.resize(images) @ self.lowpass.T

    def contrast(self, images):
        """x' (B, 3, 64, 64) of images (B, 3, h, w)."""
        return (0.5 + self.gain * (self.filtered(images) - self.background)).clamp(0, 1)

    @torch.no_grad()
    def posterior_mean(self, images):
        return self.vae.encode(self.contrast(images))[0]

    def fit(self, frames, seed=0, steps=2000):
        """frames (S, H, W, 3) uint8."""
        device = self.mean.device
        sample = self.filtered(to_tensor(frames[:: max(1, len(frames) // 4000)], device))
        self.background.copy_(sample.mean(0))
        self.gain.copy_(0.5 / (sample - self.background).abs().amax())
        self.vae.requires_grad_(True)
        train_vae(self.vae, frames, steps, batch_size=32, beta=self.beta, kl_tolerance=0, seed=seed, see=self.contrast)
        self.freeze()
        mu = torch.cat([self.posterior_mean(to_tensor(f, device)) for f in chunks(frames)])
        std = mu.std(0)
        self.mean.copy_(mu.mean(0))
        self.scale.copy_(std + self.damping * std.max())
        return self

    def forward(self, images):
        return ((self.posterior_mean(images) - self.mean) / self.scale)[:, None]  # (B, 1, d)


class ViTEncoder(FrozenEncoder):
    """A pretrained vision transformer of timm: its patch tokens, or its class token, after the final norm.

    Args:
        name, model: our name, and timm's (its weights are the Hugging Face repository timm/<model>).
        img_size: side that the image is resized to, a multiple of the patch size.
        mean, std: normalisation of the pixels; 0.5 and 0.5 is DINO-WM's choice for DINOv2, not DINOv2's own.
        cls: the class token alone, (B, 1, d), instead of the patch tokens.
        weights: None for the pretrained ones, a local file in timm's or the original release's format
            (.safetensors or .pth), or "random".
    """

    def __init__(self, name, model, img_size, mean=(0.5,) * 3, std=(0.5,) * 3, cls=False, weights=None):
        super().__init__()
        patch = int(model.split("patch")[1].split("_")[0])
        if img_size % patch:
            raise UserError(f"--encoder {name}: image size {img_size} is not a multiple of its patch size {patch}")
        self.name, self.img_size, self.cls = name, img_size, cls
        self.vit = timm.create_model(model, img_size=img_size, num_classes=0)
        self.num_patches = 1 if cls else (img_size // patch) ** 2
        self.dim = self.vit.num_features
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        if weights != "random":
            load_timm_weights(self.vit, weights or download(f"timm/{model}"))

    @torch.no_grad()
    def forward(self, images):
        x = self.vit.forward_features((self.resize(images) - self.mean) / self.std)  # (B, prefix + N, d)
        return x[:, :1] if self.cls else x[:, self.vit.num_prefix_tokens :]


def download(repository, filename="model.safetensors"):
    """The local path of a file of a Hugging Face repository, from the cache or the network."""
    import huggingface_hub as hub

    try:
        return hub.hf_hub_download(repository, filename, local_files_only=True)
    except hub.errors.LocalEntryNotFoundError:
        pass
    url, help = hub.hf_hub_url(repository, filename), "download it elsewhere and give --weights PATH"
    try:
        headers = hub.utils.build_hf_headers()
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD", headers=headers), timeout=10)
        return hub.hf_hub_download(repository, filename)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise UserError(f"{repository} is gated: accept its licence there and log in, or {help}") from None
        raise UserError(f"{repository} answers {error.code} for {filename}: {help}") from None
    except OSError:
        raise UserError(f"the weights {repository}/{filename} are not here, and no network: {help}") from None


def load_timm_weights(model, path):
    """Loads a file into a timm model, whole or not at all; position embeddings are resampled to its size."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no weights at {path}: --weights takes a .safetensors or .pth file, or 'random'")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the formats' libraries raise whatever they like on a damaged file
        raise UserError(f"{path} is damaged, or no file of tensors ({type(error).__name__})") from None
    if hasattr(model, "patch_embed"):
        from timm.models import eva, vision_transformer

        module = eva if isinstance(model, eva.Eva) else vision_transformer
        try:
            state = module.checkpoint_filter_fn(state, model)  # original names -> timm's, positions resampled
        except Exception:
            raise UserError(f"{path} does not hold the weights of {type(model).__name__}") from None
    own = model.state_dict()
    missing = sorted(own.keys() - state.keys())
    unknown = sorted(state.keys() - own.keys())
    shapes = sorted(k for k in own.keys() & state.keys() if own[k].shape != state[k].shape)
    if missing or unknown or shapes:
        problems = [f"{len(k)} {what}, e.g. {k[0]}" for what, k in
                    (("missing", missing), ("unknown", unknown), ("of another shape", shapes)) if k]  # fmt: skip
        raise UserError(f"{path} is a checkpoint of another architecture: keys {'; '.join(problems)}")
    model.load_state_dict(state)


IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
DINOV2, DINOV3 = "vit_small_patch14_dinov2.lvd142m", "vit_small_patch16_dinov3.lvd1689m"

ENCODERS = {
    "pca": lambda img_size, weights: PCAEncoder(img_size or 64),
    "vae": lambda img_size, weights: VAEEncoder(img_size or 64),
    "dinov2": lambda img_size, weights: ViTEncoder("dinov2", DINOV2, img_size or 196, weights=weights),
    "dino_cls": lambda img_size, weights: ViTEncoder("dino_cls", DINOV2, img_size or 196, cls=True, weights=weights),
    "dinov3": lambda img_size, weights: ViTEncoder("dinov3", DINOV3, img_size or 224, **IMAGENET, weights=weights),
}
LICENCES = {"dinov2": "Apache-2.0", "dino_cls": "Apache-2.0", "dinov3": "DINOv3 licence"}


def build_encoder(name, img_size=None, weights=None):
    """The frozen encoder called `name`; `img_size` is the side it resizes images to (default: its own)."""
    if name not in ENCODERS:
        raise UserError(f"unknown encoder '{name}'; known: {', '.join(ENCODERS)}")
    encoder = ENCODERS[name](img_size, weights).freeze()
    if hasattr(encoder, "fit") and weights not in (None, "random"):
        raise UserError(f"--encoder {name} learns from the collected frames: it takes no --weights")
    return encoder


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch-size", type=int, default=16)
    batch_size = parser.parse_args().batch_size
    print(f"{'encoder':10} {'image':>5} {'tokens':>6} {'width':>5} {'M params':>8} {'frames/s':>8}  weights (licence)")
    for name in ENCODERS:
        encoder = build_encoder(name, weights="random")
        images = torch.rand(batch_size, 3, encoder.img_size, encoder.img_size)
        tokens, n, start = encoder(images), 0, time.perf_counter()
        while time.perf_counter() - start < 1:
            encoder(images)
            n += batch_size
        rate = n / (time.perf_counter() - start)
        size = sum(p.numel() for p in encoder.parameters()) / 1e6
        weights = f"pretrained ({LICENCES[name]})" if name in LICENCES else "fitted on the collected frames"
        print(
            f"{name:10} {encoder.img_size:5} {tokens.shape[1]:6} {tokens.shape[2]:5} {size:8.2f} {rate:8.0f}  {weights}"
        )


if __name__ == "__main__":
    run_script(main)
