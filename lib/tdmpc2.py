"""TD-MPC2's latent dynamics, which collapse without a reward, and LeWorldModel, where one term prevents that.

`tdmpc2`, TD-MPC2 (Hansen, Su & Wang, 2024, arXiv:2310.16828), section 3.1, without the reward, the value and the
policy, since nobody gives a reward here. h is the encoder, d the dynamics; both end in SimNorm, a softmax over every
eight numbers of the latent:

    z_t = h(o_t),    z^_{t+1} = d(z_t, a_t)
    L = 20 mean_k rho^(k-1) ||z^_{t+k} - sg h(o_{t+k})||^2          k = 1 .. K steps of imagination, rho = 0.5

A latent that is the same for all frames makes L zero, and nothing asks for another: in PointMaze its variance stays
below 1e-5, where that of `lewm` is 0.8. `lewm` is the same model with one term against that: SIGReg (LeJEPA,
Balestriero & LeCun, 2025, arXiv:2511.08544, section 4), with which LeWorldModel (Maes et al., 2026, arXiv:2603.19312)
keeps the latents of a batch an isotropic Gaussian:

    L = mean_k rho^(k-1) ||z^_{t+k} - h(o_{t+k})||^2 + 0.09 SIGReg(z)
    SIGReg(z) = mean_u B int |phi_u(s) - exp(-s^2 / 2)|^2 exp(-s^2 / 2) ds,      phi_u(s) = 1/B sum_b exp(i s u.z_b)

u are random directions, and phi_u is the characteristic function of the B latents along u (Epps & Pulley, 1983).

Deviations. From TD-MPC2: it stacks three frames in the encoder; here every frame has a latent of its own, so that a
single image can be the goal, and d sees the latents and actions of the last three. Its random shifts of the image are
left out, because a shift would move the ball, whose position matters. All parts have one learning rate, no gradient is
clipped, and weights begin as PyTorch's do. From LeWorldModel: its encoder is a ViT and its dynamics a
transformer that learns one step ahead; here both are TD-MPC2's, so that the pair differs in the term and in what the
term asks for: no SimNorm, whose latents cannot be Gaussian, and, as in its release, no stopped gradient and a
batch normalisation (there in two projectors of two layers, here before the encoder's last layer).

    python train.py --system tdmpc2 && python plan.py        # log.csv: val_variance, the variance of the latents
    python train.py --system lewm && python plan.py
"""

import torch
import torch.nn.functional as F
from torch import nn

from lib.common import UserError
from lib.dreamer import conv_decoder
from lib.systems import System


class SimNorm(nn.Module):
    """Turns every eight numbers into probabilities (Lavoie et al., 2022, arXiv:2204.00616): (..., d) -> (..., d)."""

    def forward(self, z):
        return z.unflatten(-1, (-1, 8)).softmax(-1).flatten(-2)


def dense(inputs, outputs, activation):
    """The layer that TD-MPC2's networks are made of."""
    return nn.Sequential(nn.Linear(inputs, outputs), nn.LayerNorm(outputs), activation)


def sigreg(z, num_proj=256, knots=17):
    """How far latents (..., B, d) are from an isotropic Gaussian: a mean over `num_proj` directions and over all axes
    before B. As in LeWorldModel's release, which has 1024, the integral is twice a trapezoidal sum from 0 to 3."""
    u, s = torch.randn(z.shape[-1], num_proj, device=z.device), torch.linspace(0, 3, knots, device=z.device)
    x = (z @ (u / u.norm(dim=0)))[..., None] * s  # (..., B, num_proj, knots)
    gaussian = torch.exp(-s.square() / 2)  # which is its own characteristic function
    error = (x.cos().mean(-3) - gaussian).square() + x.sin().mean(-3).square()  # |phi_u - gaussian|^2
    return 2 * z.shape[-2] * torch.trapezoid(error * gaussian, s).mean()


class TDMPC2(System):
    """The latent is what the convolutions give, 16 * `channels` numbers for a frame of 64 pixels; `mlp_dim` is the
    dynamics' width. The sizes suit a laptop; the paper has channels=32,mlp_dim=512, batches of 256, and lr 3e-4."""

    name = "tdmpc2"
    num_hist, num_frames = 3, 6  # frames that d sees, and K = 3 more
    batch_size, steps, lr = 64, 2000, 1e-3
    sizes = dict(channels=16, mlp_dim=256)
    rho, weight = 0.5, 20.0
    painted = 16  # frames of a batch that the decoder paints

    def build(self, img_size, channels, mlp_dim, dim=None):
        side, layers = img_size, []
        for kernel, stride in ((7, 2), (5, 2), (3, 2), (3, 1)):
            layers += [nn.Conv2d(channels if layers else 3, channels, kernel, stride), nn.ReLU()]
            side = (side - kernel) // stride + 1
        if side < 1:
            raise UserError(f"--system {self.name} wants frames of 64, 128, ... pixels a side, not {img_size}")
        dim, encoder_end, dynamics_end = self.ends(channels * side**2, mlp_dim, dim)
        self.encoder = nn.Sequential(*layers[:-1], nn.Flatten(), encoder_end)
        first = dense(self.num_hist * (dim + self.action_dim), mlp_dim, nn.Mish())
        self.dynamics = nn.Sequential(first, dense(mlp_dim, mlp_dim, nn.Mish()), dynamics_end)
        self.decoder = conv_decoder(dim, img_size, channels=8)  # for people; nothing else learns from it

    def ends(self, features, mlp_dim, dim):
        """The latent's width, and the last layers of the encoder and of the dynamics."""
        return features, SimNorm(), dense(mlp_dim, features, SimNorm())

    def encode(self, obs):
        frames = obs["visual"]
        images = frames.flatten(0, 1).movedim(-1, -3).float() / 255 - 0.5
        return self.unpack(self.encoder(images).unflatten(0, frames.shape[:2]))

    def unpack(self, z):
        return {"visual": z[:, :, None], "proprio": z[:, :, :0]}

    def imagine(self, z, actions):
        """Latents z (B, T0, d) of the first frames, actions (B, T, A) -> (B, T + 1, d). The window is filled up with
        copies of the first frame and with no force. No window of the data looks like that, so d learns to read it as
        "velocity unknown"."""
        H, a = self.num_hist, self.encode_action(F.pad(actions, (0, 0, self.num_hist - 1, 0)))
        z = torch.cat([z[:, :1].expand(-1, H - 1, -1), z], 1)
        for t in range(z.shape[1], a.shape[1] + 1):
            after = self.dynamics(torch.cat([z[:, t - H :], a[:, t - H : t]], -1).flatten(1))
            z = torch.cat([z, after[:, None]], 1)
        return z[:, H - 1 :]

    def rollout(self, z0, actions):
        return self.unpack(self.imagine(z0["visual"][:, :, 0], actions))

    def loss(self, batch, *_):
        """L, averaged over K frames imagined from one, from two and from three known ones, and the decoder's error.
        The part "variance" is the latents' over the batch, averaged over their numbers."""
        z, H = self.encode(batch)["visual"][:, :, 0], self.num_hist
        K, target, loss = z.shape[1] - H, self.target(z), 0.0
        discount = self.rho ** torch.arange(K, device=z.device)
        for known in range(1, H + 1):
            imagined = self.imagine(z[:, :known], batch["action"][:, : known + K - 1])
            errors = (imagined[:, known:] - target[:, known : known + K]).square().mean((0, 2))  # (K,)
            loss = loss + self.weight * (discount * errors).mean() / H
        images = self.paint(z[: self.painted, -1:].detach())
        painting = F.mse_loss(images, batch["visual"][: self.painted, -1].movedim(-1, -3) / 255)
        parts = {"visual": errors[0], "variance": z.flatten(0, 1).var(0).mean(), "recon": painting}
        loss, parts = self.regularise(loss, z, parts)
        return loss + painting, {name: part.detach() for name, part in parts.items()}

    def target(self, z):
        return z.detach()

    def regularise(self, loss, z, parts):
        return loss, parts

    def paint(self, latents):
        return self.decoder(latents[:, 0]) + 0.5


class LeWM(TDMPC2):
    """`dim` is the latent's width, to which a linear layer brings what the convolutions give (LeWorldModel: 192).

    Before this layer there is a batch normalisation. Without it the latents of a new network are so much alike that
    SIGReg's gradient is nearly zero: in the medium maze they stayed one point for three of five epochs.
    """

    name = "lewm"
    sizes = TDMPC2.sizes | dict(dim=32)
    weight = 1.0

    def ends(self, features, mlp_dim, dim):
        return dim, nn.Sequential(nn.BatchNorm1d(features), nn.Linear(features, dim)), nn.Linear(mlp_dim, dim)

    def target(self, z):
        return z

    def regularise(self, loss, z, parts):
        term = sigreg(z.transpose(0, 1))  # as in the release, for the frames of one time at once
        return loss + 0.09 * term, parts | {"sigreg": term}
