"""World Models (Ha & Schmidhuber, 2018, arXiv:1803.10122): V, M, C and the dream, in one file."""

import numpy as np
import torch
from torch import nn
from tqdm import tqdm


class VAE(nn.Module):
    """V: a 64x64 frame becomes a small latent vector z (appendix A.1).

    Four stride-2 convolutions down to 2x2x256, two linear layers to mu and logvar; one linear layer
    and four transposed convolutions back. 4,348,547 parameters with z_dim 32 (CarRacing),
    4,446,915 with 64 (TakeCover), as in the paper's tables.
    """

    def __init__(self, z_dim=32):
        super().__init__()
        self.z_dim = z_dim
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 32, 4, stride=2), nn.ReLU(),
            nn.Conv2d(32, 64, 4, stride=2), nn.ReLU(),
            nn.Conv2d(64, 128, 4, stride=2), nn.ReLU(),
            nn.Conv2d(128, 256, 4, stride=2), nn.ReLU(),
            nn.Flatten(),
        )  # fmt: skip
        self.mu = nn.Linear(1024, z_dim)
        self.logvar = nn.Linear(1024, z_dim)
        self.decoder = nn.Sequential(
            nn.Linear(z_dim, 1024), nn.Unflatten(1, (1024, 1, 1)),
            nn.ConvTranspose2d(1024, 128, 5, stride=2), nn.ReLU(),
            nn.ConvTranspose2d(128, 64, 5, stride=2), nn.ReLU(),
            nn.ConvTranspose2d(64, 32, 6, stride=2), nn.ReLU(),
            nn.ConvTranspose2d(32, 3, 6, stride=2), nn.Sigmoid(),
        )  # fmt: skip
        for module in self.modules():  # TensorFlow's initialisation, which the paper's V had: it learns sooner
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def encode(self, x):
        """Frames x (B, 3, 64, 64) in [0, 1] -> mu, logvar, each (B, z_dim), of q(z | x)."""
        features = self.encoder(x)  # (B, 1024)
        return self.mu(features), self.logvar(features)

    def decode(self, z):
        """Latents z (B, z_dim) -> frames (B, 3, 64, 64) in [0, 1]."""
        return self.decoder(z)

    def forward(self, x):
        """x (B, 3, 64, 64) -> its reconstruction from one sample of z, mu, logvar."""
        mu, logvar = self.encode(x)
        return self.decode(sample_z(mu, logvar)), mu, logvar


def sample_z(mu, logvar):
    """z ~ N(mu, exp(logvar)), written so that the gradient passes through mu and logvar."""
    return mu + torch.exp(logvar / 2) * torch.randn_like(mu)


def vae_loss(recon, x, mu, logvar, beta=1.0, kl_tolerance=0.5):
    """Squared error summed over the frame + beta * KL(q(z|x) || N(0, 1)), mean over the batch.

    As in the paper's code the KL is free up to kl_tolerance nats per latent dimension: below that
    it is held constant and pulls at nothing.
    """
    recon_loss = (recon - x).square().sum((1, 2, 3))  # (B,)
    kl = -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum(1)  # (B,)
    kl = kl.clamp(min=kl_tolerance * mu.shape[1])
    return (recon_loss + beta * kl).mean()


def to_tensor(frames, device="cpu"):
    """uint8 frames (B, H, W, 3) -> float (B, 3, H, W) in [0, 1]."""
    frames = torch.as_tensor(frames if torch.is_tensor(frames) else np.array(frames), device=device)
    return frames.permute(0, 3, 1, 2).float() / 255


def train_vae(vae, frames, steps, batch_size=100, lr=1e-3, beta=1.0, kl_tolerance=0.5, seed=0, see=lambda x: x):
    """Fits the VAE in place to uint8 frames (S, 64, 64, 3), which may be memory-mapped.

    `see` is what V sees of images (B, 3, 64, 64), and reconstructs: the images themselves, or a filter of them.
    """
    device = vae.mu.weight.device
    optimizer = torch.optim.Adam(vae.parameters(), lr=lr)
    for step in tqdm(range(steps), desc="train V"):
        torch.manual_seed(seed * 1_000_003 + step)
        index = torch.randint(len(frames), (batch_size,)).sort().values.numpy()
        x = see(to_tensor(frames[index], device))  # (B, 3, 64, 64)
        recon, mu, logvar = vae(x)
        loss = vae_loss(recon, x, mu, logvar, beta, kl_tolerance)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return vae
