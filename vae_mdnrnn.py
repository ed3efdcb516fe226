"""World Models (Ha & Schmidhuber, 2018, arXiv:1803.10122): V, M, C, the dream and iterative training, in one file.

    V  a variational autoencoder        z_t ~ q(z | o_t)
    M  an LSTM with a mixture density   P(z_{t+1} | a_t, z_t, h_t) = sum_k pi_k N(mu_k, sigma_k^2)
    C  one linear layer                 a_t = W_c [z_t h_t] + b_c, evolved by CMA-ES

V and M learn from what a random policy saw. C is then evolved in the real environment (CarRacing, section 3), or inside
M alone, in a dream that never renders a frame (TakeCover, section 4).
What the paper leaves open is as in its code (github.com/hardmaru/WorldModelsExperiments), unless a docstring says
otherwise.

    python vae_mdnrnn.py all --env takecover        # the five steps below, one after the other

    python vae_mdnrnn.py collect --env takecover    # 1. episodes of a random policy
    python vae_mdnrnn.py train-v --env takecover    # 2. V: frames -> z
    python vae_mdnrnn.py train-m --env takecover    # 3. M: z, a -> the next z
    python vae_mdnrnn.py train-c --env takecover    # 4. C, in the dream or in the real environment
    python vae_mdnrnn.py test --env takecover       # 5. 100 real episodes, 100 dreams, a random policy beside them

    python vae_mdnrnn.py iterate --env pointmaze    # section 5: roll out with C, train M, train C in M; again
    python vae_mdnrnn.py bench                      # dream steps per second

Everything lands in runs/worldmodels_<env>. A step that was killed goes on where it stopped when it is called again, and
one that is done stays done, unless --overwrite. The run keeps its flags (args.json), but for test's: give them once.
"""

import argparse
import functools
import itertools
import json
import math
import os
import shutil
import time
import zipfile
from pathlib import Path

import cma
import gymnasium as gym
import imageio.v3 as imageio
import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
from data import UserError
from decoders import write_strips

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402

# The paper's sizes (appendix A), budgets for two CPU cores: an hour for takecover, one or two for carracing;
# pointmaze's are not tuned.
# heads: what M predicts besides the next z (the reward, unlike the paper's M of CarRacing, so that it can be dreamt).
# cell: C sees the LSTM's cell state, too. restart: M is told when an episode begins. squash: how C's outputs become
# actions.
RECIPES = {
    "takecover": dict(
        action_dim=1, z_dim=64, hidden=512, cell=True, bias=False, restart=True, heads="done", squash="tanh",
        policy="hold", max_steps=2100, episodes=2400, v_steps=5000, m_steps=6000, where="dream", tau=[3.0],
        beta=0.1, popsize=64, trials=8, generations=25, score_trials=100,
    ),
    "carracing": dict(
        action_dim=3, z_dim=32, hidden=256, cell=False, bias=True, restart=False, heads="reward", squash="car",
        policy="brownian", max_steps=1000, episodes=60, v_steps=3000, m_steps=1000, where="real", tau=[1.0],
        beta=1.0, popsize=16, trials=2, generations=50, score_trials=16,
    ),
    "pointmaze": dict(
        action_dim=2, z_dim=32, hidden=256, cell=False, bias=True, restart=False, heads="reward", squash="tanh",
        policy="hold", max_steps=100, episodes=300, v_steps=4000, m_steps=1000, where="dream", tau=[1.0],
        beta=0.1, popsize=32, trials=8, generations=40, score_trials=100,
    ),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------
# V: what is seen, in few numbers


class VAE(nn.Module):
    """V: a 64x64 frame becomes a small latent vector z (appendix A.1).

    Four stride-2 convolutions down to 2x2x256, two linear layers to mu and logvar; one linear layer and four
    transposed convolutions back. 4,348,547 parameters with z_dim 32 (CarRacing), 4,446,915 with 64 (TakeCover),
    as in the paper's tables.
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
            OnePixelDeconv(1024, 128, 5, stride=2), nn.ReLU(),
            nn.ConvTranspose2d(128, 64, 5, stride=2), nn.ReLU(),
            nn.ConvTranspose2d(64, 32, 6, stride=2), nn.ReLU(),
            nn.ConvTranspose2d(32, 3, 6, stride=2), nn.Sigmoid(),
        )  # fmt: skip

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


class OnePixelDeconv(nn.ConvTranspose2d):
    """Of a single pixel, (B, C, 1, 1), a transposed convolution is a matrix product: like this three times as fast."""

    def forward(self, x):
        return (x.flatten(1) @ self.weight.flatten(1)).unflatten(1, self.weight.shape[1:]) + self.bias[:, None, None]


def sample_z(mu, logvar, generator=None):
    """z ~ N(mu, exp(logvar)), written so that the gradient passes through mu and logvar."""
    noise = torch.randn(mu.shape, generator=generator, device=mu.device)
    return mu + torch.exp(logvar / 2) * noise


def vae_loss(recon, x, mu, logvar, beta=1.0, kl_tolerance=0.5):
    """Squared error summed over the frame + beta * KL(q(z|x) || N(0, 1)), mean over the batch.

    As in the paper's code the KL is free up to kl_tolerance nats per latent dimension: below that it is held
    constant and pulls at nothing.
    """
    recon_loss = (recon - x).square().sum((1, 2, 3))  # (B,)
    kl = -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum(1)  # (B,)
    kl = kl.clamp(min=kl_tolerance * mu.shape[1])
    return (recon_loss + beta * kl).mean()


def to_tensor(frames, device="cpu"):
    """uint8 frames (B, H, W, 3) -> float (B, 3, H, W) in [0, 1]."""
    frames = torch.as_tensor(frames if torch.is_tensor(frames) else np.array(frames), device=device)
    return frames.permute(0, 3, 1, 2).float() / 255


def to_frames(images):
    """float (B, 3, H, W) in [0, 1] -> uint8 frames (B, H, W, 3): `to_tensor`, back."""
    return (images.permute(0, 2, 3, 1) * 255).round().byte().cpu().numpy()


def train_vae(vae, frames, steps, batch_size=32, lr=1e-3, beta=1.0, kl_tolerance=0.5, seed=0, see=lambda x: x,
              checkpoint=None):  # fmt: skip
    """Fits the VAE in place to uint8 frames (S, 64, 64, 3), which may be memory-mapped.

    `see` is what V sees of images (B, 3, 64, 64), and reconstructs: the images themselves, or a filter of them.
    Deviations: ten times the paper's learning rate, lowered along a cosine, and a third of its batch, for a fraction
    of its frames; for small things that move, a smaller `beta` (at 1 a far fireball costs more nats than it gains).
    """
    device = vae.mu.weight.device

    def loss():
        index = torch.randint(len(frames), (batch_size,)).sort().values.numpy()
        x = see(to_tensor(frames[index], device))  # (B, 3, 64, 64)
        recon, mu, logvar = vae(x)
        return {"loss": vae_loss(recon, x, mu, logvar, beta, kl_tolerance), "recon": F.mse_loss(recon, x)}

    return fit(vae, loss, steps, lr, seed, "train V", checkpoint, {"z_dim": vae.z_dim})


# ---------------------------------------------------------------------------------------------------------
# How V and M are trained, kept and read again


def load_tensors(path, device="cpu", kind=dict, **options):
    """What torch.save wrote to `path`, of tensors and plain values; never executes a pickle. UserError if it is not
    there, damaged, or no `kind`."""
    try:
        content = torch.load(path, map_location=device, weights_only=True, **options)
    except FileNotFoundError:
        raise UserError(f"no file at {path}") from None
    except Exception:  # a damaged file can fail in any way
        content = None
    if not isinstance(content, kind):
        raise UserError(f"{path} is damaged, or does not hold a {kind.__name__.lower()} of torch.save")
    return content


def restore(model, saved, path):
    """`saved` is what `fit` wrote to `path`."""
    try:
        model.load_state_dict(saved["model"])
    except (RuntimeError, KeyError):
        sizes = ", ".join(f"{k} {v}" for k, v in (saved.get("config") or {}).items())
        raise UserError(f"{path} is of other sizes ({sizes}): give these, another --out, or --overwrite") from None


def fit(model, loss, steps, lr, seed, name, checkpoint=None, config=None, clip=None):
    """`steps` steps of Adam, its learning rate on a cosine, on `loss()["loss"]`, in place.

    With a `checkpoint` the run is resumable: step n draws from a generator seeded by (seed, n) alone, so that a run
    that was killed ends with the same weights as one that was not. Beside it a .csv of the losses.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    first, log = 0, []
    if checkpoint and checkpoint.exists():
        saved = load_tensors(checkpoint)
        restore(model, saved, checkpoint)
        optimizer.load_state_dict(saved["optimizer"])
        first, log = saved["step"], saved["log"]
    model.train()
    saved_at = time.monotonic()
    bar = tqdm(range(first, steps), desc=name, initial=first, total=steps)
    for step in bar:
        torch.manual_seed(seed * 1_000_003 + step)
        optimizer.param_groups[0]["lr"] = lr * (0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2)
        losses = loss()
        if not torch.isfinite(losses["loss"]):
            raise UserError(f"{name}: the loss is {losses['loss'].item()} at step {step}: try a smaller learning rate")
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        if clip:
            nn.utils.clip_grad_value_(model.parameters(), clip)
        optimizer.step()
        if step % 20 == 0 or step == steps - 1:
            log.append({"step": step, **{k: v.item() for k, v in losses.items()}})
            bar.set_postfix({k: f"{v:.4g}" for k, v in log[-1].items() if k != "step"})
        if checkpoint and (step == steps - 1 or time.monotonic() - saved_at > 30):
            state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), config=config, step=step + 1)
            data.write_atomic(checkpoint, lambda p: torch.save({**state, "log": log}, p))  # noqa: B023
            data.write_csv(checkpoint.with_suffix(".csv"), log)
            saved_at = time.monotonic()
    return model.eval()


# ---------------------------------------------------------------------------------------------------------
# M: what happens next


class MDNRNN(nn.Module):
    """M: P(z_{t+1} | a_t, z_t, h_t) as a mixture of n_mix Gaussians, from an LSTM (section 2.2, appendix A.2).

    mixture "vector" (default): n_mix Gaussians over the whole next latent vector, as the paper's equation reads;
    "dimension": n_mix for each of its dimensions by itself, as in the paper's code. Both are G mixtures over
    D = z_dim / G dimensions each.
    heads: any of "done", "reward", "action" (the next one, for iterative training), as one comma-separated string.
    With "dimension" and the second bias vector of PyTorch's LSTM (4 x hidden) taken off, the parameters are the
    paper's: 422,368 (CarRacing: no heads, no restart flag), 1,678,785 (TakeCover: restart flag, done head).
    """

    def __init__(self, z_dim, action_dim, hidden=256, n_mix=5, mixture="vector", heads="", restart=False):
        super().__init__()
        self.config = dict(z_dim=z_dim, action_dim=action_dim, hidden=hidden, n_mix=n_mix, mixture=mixture,
                           heads=heads, restart=restart)  # fmt: skip
        self.z_dim, self.action_dim, self.hidden, self.n_mix, self.restart = z_dim, action_dim, hidden, n_mix, restart
        self.groups = {"vector": 1, "dimension": z_dim}[mixture]
        self.lstm = nn.LSTM(z_dim + action_dim + restart, hidden, batch_first=True)
        self.mdn = nn.Linear(hidden, self.groups * n_mix * (1 + 2 * z_dim // self.groups))
        sizes = {"done": 1, "reward": 1, "action": action_dim}
        self.heads = nn.ModuleDict({name: nn.Linear(hidden, sizes[name]) for name in heads.split(",") if name})
        with torch.no_grad():
            self.lstm.bias_hh_l0[hidden : 2 * hidden] = 1.0  # the forget gate starts open, as TensorFlow's does

    def forward(self, z, a, restart, state=None):
        """z (B, T, z_dim), a (B, T, A), restart (B, T) -> the outputs h (B, T, hidden), and the state (h, c)."""
        x = [z, a, restart[..., None]] if self.restart else [z, a]
        return self.lstm(torch.cat(x, -1), state)

    def mixture(self, h):
        """h (..., hidden) -> log pi (..., G, K), mu and log sigma (..., G, K, D) of the next z."""
        K, D = self.n_mix, self.z_dim // self.groups
        logit, mu, logsigma = self.mdn(h).unflatten(-1, (self.groups, -1)).split([K, K * D, K * D], -1)
        mu, logsigma = mu.unflatten(-1, (K, D)), logsigma.unflatten(-1, (K, D))
        return logit.log_softmax(-1), mu, logsigma.clamp(min=-7)  # a sigma of 0 would be an infinite likelihood


def mdn_nll(logpi, mu, logsigma, z):
    """-log sum_k pi_k N(z | mu_k, sigma_k^2) in nats, summed over the groups: (...,) for z (..., z_dim).

    In log space throughout: log sigma is the network's output, and the sum over k is a logsumexp.
    """
    z = z.unflatten(-1, (mu.shape[-3], 1, mu.shape[-1]))  # (..., G, 1, D)
    log_n = -0.5 * ((z - mu) * torch.exp(-logsigma)).square() - logsigma - 0.5 * math.log(2 * math.pi)
    return -torch.logsumexp(logpi + log_n.sum(-1), -1).sum(-1)


def mdn_sample(logpi, mu, logsigma, tau=1.0, generator=None):
    """z (..., z_dim): k ~ Categorical(softmax(log pi / tau)), then z ~ N(mu_k, tau sigma_k^2) (the paper's code)."""
    u = torch.rand(logpi.shape, generator=generator, device=mu.device).clamp_(1e-20, 1 - 1e-7)
    k = (logpi / tau - torch.log(-torch.log(u))).argmax(-1)  # (..., G): the largest of Gumbels is a categorical sample
    k = k[..., None, None].expand(*k.shape, 1, mu.shape[-1])  # (..., G, 1, D)
    mu, sigma = mu.gather(-2, k), logsigma.gather(-2, k).exp()
    noise = torch.randn(mu.shape, generator=generator, device=mu.device)
    return (mu + math.sqrt(tau) * sigma * noise).flatten(-3)


DONE_WEIGHT = 10.0  # of the rare last step of an episode, in M's loss (the paper's code: restart_factor)


def mdnrnn_loss(rnn, z, a, reward, done, valid, restart):
    """Teacher forcing: from z_t, a_t and its state M predicts z_{t+1}, and what its heads are for.

    All (B, T, ...), padded; `valid` (B, T) marks the true steps, the first of each row first. As in the paper's code
    the likelihood is per latent dimension, and so of one size with the other losses.
    """
    h, _ = rnn(z, a, restart)  # (B, T, hidden)
    both = valid[:, :-1] & valid[:, 1:]  # t and t + 1 are there
    losses = {"nll": mdn_nll(*rnn.mixture(h[:, :-1][both]), z[:, 1:][both]).mean() / rnn.z_dim}
    if "done" in rnn.heads:
        weight = 1 + (DONE_WEIGHT - 1) * done[valid]
        logit = rnn.heads["done"](h[valid])[:, 0]
        losses["done"] = F.binary_cross_entropy_with_logits(logit, done[valid], weight)
    if "reward" in rnn.heads:
        losses["reward"] = F.mse_loss(rnn.heads["reward"](h[valid])[:, 0], reward[valid])
    if "action" in rnn.heads:
        losses["action"] = F.mse_loss(rnn.heads["action"](h[:, :-1][both]), a[:, 1:][both])
    return {"loss": sum(losses.values()), **losses}


def train_mdnrnn(rnn, latents, dataset, steps, batch_size=8, lr=1e-3, seed=0, checkpoint=None):
    """Fits M in place to whole episodes: what decides the next step may lie far back (a player's wounds do).

    z is drawn anew from its mu and logvar each time. A batch holds episodes of similar length, so that little of it is
    padding, around one that is drawn at random.
    Deviations: the paper's code takes 100 parts of 500 or 999 steps at a time, and leaves out the shortest episodes.
    """
    device = rnn.mdn.weight.device
    mu, logvar = latents  # (S, z_dim) each
    starts, ends = torch.tensor(dataset.episode_starts), torch.tensor(dataset.episode_ends)
    lengths = ends - starts

    def loss():
        order = (lengths + torch.rand(len(lengths))).argsort()  # by length, ties in any order
        first = int(torch.randint(1 - batch_size, len(order), ()))  # a window of it, which may hang over the ends
        e = order[max(0, first) : first + batch_size]
        rows = starts[e, None] + torch.arange(int(lengths[e].max()))  # (B, T)
        valid = rows < ends[e, None]
        rows = rows.clamp(max=len(mu) - 1).numpy()

        def batch(array):
            return torch.as_tensor(np.asarray(array[rows], np.float32), device=device)

        z = sample_z(batch(mu), batch(logvar))  # (B, T, z_dim)
        a, reward, done = batch(dataset.actions), batch(dataset.rewards), batch(dataset.dones)
        restart = torch.zeros_like(done)
        restart[:, 0] = 1
        return mdnrnn_loss(rnn, z, a, reward, done, valid.to(device), restart)

    return fit(rnn, loss, steps, lr, seed, "train M", checkpoint, rnn.config, clip=1.0)


# ---------------------------------------------------------------------------------------------------------
# C: what to do


class Controller:
    """C: a_t = squash(W_c [z_t h_t] + b_c), one linear layer (section 2.3).

    It holds no weights: `__call__` takes them, one row of `num_params` for each row of features, so that a whole
    CMA-ES population acts at once. 867 parameters for CarRacing; 1,088 for TakeCover ([z h c], no bias).
    """

    def __init__(self, in_dim, action_dim, bias=True, squash="tanh"):
        self.in_dim, self.action_dim, self.bias, self.squash = in_dim, action_dim, bias, squash
        self.num_params = action_dim * (in_dim + bias)

    def __call__(self, params, features):
        """params (B, num_params), features (B, in_dim) -> actions (B, action_dim)."""
        W = params[:, : self.action_dim * self.in_dim].unflatten(1, (self.action_dim, self.in_dim))
        a = torch.einsum("bad,bd->ba", W, features)
        if self.bias:
            a = a + params[:, self.action_dim * self.in_dim :]
        a = torch.tanh(a)
        if self.squash == "car":  # steering in [-1, 1], gas in [0, 1], brake in [0, 1], as in the paper's code
            a = torch.stack([a[:, 0], (a[:, 1] + 1) / 2, a[:, 2].clamp(0, 1)], 1)
        return a


def features_of(z, state, cell):
    """What C sees: [z h], or [z h c] with the cell state. z (B, z_dim), state (h, c) of (1, B, hidden) each."""
    h, c = state
    return torch.cat([z, h[0], c[0]] if cell else [z, h[0]], 1)


class Agent:
    """V, M and C acting in a real environment, frame by frame (`rollout` of section 2.4)."""

    def __init__(self, vae, rnn, controller, cell, params):
        self.vae, self.rnn, self.controller, self.cell = vae, rnn, controller, cell
        self.params = torch.as_tensor(params, dtype=torch.float32)[None]  # (1, num_params)
        zeros = torch.zeros(1, 1, rnn.hidden)
        self.state, self.restart = (zeros, zeros), torch.ones(1, 1)

    @torch.inference_mode()
    def __call__(self, frame):
        """A frame (64, 64, 3) uint8 -> an action (action_dim,)."""
        z = sample_z(*self.vae.encode(to_tensor(frame[None])))  # z = V(o)
        a = self.controller(self.params, features_of(z, self.state, self.cell))  # a = C(z, h)
        _, self.state = self.rnn(z[None], a[None], self.restart, self.state)  # h = M(a, z, h)
        self.restart = torch.zeros(1, 1)
        return a[0].numpy()


class RandomPolicy:
    """ "hold": a uniform action, kept for 1 to 99 steps, log-uniformly (TakeCover; the paper keeps it for 1 to 10, but
    has twelve times as many episodes in which to reach the walls); "brownian": a_{t+1} = a_t + sqrt(dt) N(0, 1),
    dt = 1/50, kept within bounds (CarRacing, after github.com/ctallec/world-models; the paper's code draws a random C
    for each episode); "uniform": anew each step, the control of `test`."""

    def __init__(self, kind, space, rng):
        self.kind, self.space, self.rng = kind, space, rng
        self.action, self.left = self.uniform(), 0

    def uniform(self):
        return self.rng.uniform(self.space.low, self.space.high)

    def __call__(self, frame):
        if self.kind == "brownian":
            step = math.sqrt(1 / 50) * self.rng.standard_normal(self.space.shape)
            self.action = np.clip(self.action + step, self.space.low, self.space.high)
        elif self.left == 0:
            self.action = self.uniform()
            self.left = int(10 ** self.rng.uniform(0, 2)) if self.kind == "hold" else 1
        self.left -= 1
        return self.action


def rollout(env, policy, seed, max_steps, patience=math.inf):
    """One episode of `policy(frame)`: arrays with a row per step, as the data set has them. It is cut short after
    `patience` steps in a row without a reward above 0."""
    rows = {"frames": [], "states": [], "actions": [], "rewards": [], "dones": []}
    obs, _ = env.reset(seed=seed)
    in_vain = 0
    for _ in range(max_steps):
        action = policy(obs["visual"])
        before = {"frames": obs["visual"], "states": np.float32(env.state), "actions": np.float32(action)}
        obs, reward, done, truncated, _ = env.step(action)
        for name, value in {**before, "rewards": np.float32(reward), "dones": done}.items():
            rows[name].append(value)
        in_vain = 0 if reward > 0 else in_vain + 1
        if done or truncated or in_vain >= patience:
            break
    return {name: np.stack(values) for name, values in rows.items()}


# ---------------------------------------------------------------------------------------------------------
# The dream: M as the environment


class Dream:
    """Thousands of dreams at once: z_{t+1} and done are drawn from M, the reward is its mean, and no frame is rendered
    (section 4.2).

    A dream begins at the first z of a real episode, with an empty memory. Without a reward head a step survived is
    worth 1, without a done head a dream lasts `max_steps`.
    Deviation: done is drawn from its probability, with DONE_WEIGHT's bias taken off the logit; the paper's code ends
    the dream once the biased probability passes one half.

    Args:
        start: mu and logvar (E, z_dim) of the first frames.
        tau: temperature, > 0; above 1 the dream is less certain and harder to exploit (section 4.3).
    """

    def __init__(self, rnn, start, tau=1.0, max_steps=1000, cell=False, seed=0):
        if not tau > 0:
            raise UserError(f"the temperature must be above 0, not {tau:g}: try --tau 1.15")
        self.device = rnn.mdn.weight.device
        self.rnn, self.tau, self.max_steps, self.cell = rnn, tau, max_steps, cell
        self.start = [torch.as_tensor(x, dtype=torch.float32, device=self.device) for x in start]
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def reset(self, num):
        """Begins `num` dreams: what C sees of each, (num, in_dim)."""
        mu, logvar = self.start
        i = torch.randint(len(mu), (num,), generator=self.generator, device=self.device)
        self.z = sample_z(mu[i], logvar[i], self.generator)
        zeros = torch.zeros(1, num, self.rnn.hidden, device=self.device)
        self.state, self.restart, self.t = (zeros, zeros), torch.ones(num, 1, device=self.device), 0
        return features_of(self.z, self.state, self.cell)

    @torch.inference_mode()
    def step(self, a):
        """Actions (B, A) -> features (B, in_dim), rewards (B,), done (B,) bool."""
        h, self.state = self.rnn(self.z[:, None], a[:, None], self.restart, self.state)
        h = h[:, 0]  # (B, hidden)
        self.z = mdn_sample(*self.rnn.mixture(h), self.tau, self.generator)
        self.restart, self.t = torch.zeros_like(self.restart), self.t + 1
        heads = self.rnn.heads
        reward = heads["reward"](h)[:, 0] if "reward" in heads else torch.ones(len(h), device=self.device)
        done = torch.full((len(h),), self.t >= self.max_steps, device=self.device)
        if "done" in heads:
            p = torch.sigmoid(heads["done"](h)[:, 0] - math.log(DONE_WEIGHT))
            done |= torch.rand(p.shape, generator=self.generator, device=self.device) < p
        return features_of(self.z, self.state, self.cell), reward, done

    def keep(self, rows):
        """Goes on with these rows only."""
        self.z, self.restart = self.z[rows], self.restart[rows]
        self.state = tuple(s[:, rows] for s in self.state)


class DreamEnv(gym.Env):
    """One dream with Gymnasium's interface: the observation is what C sees, `render()` what V imagines."""

    metadata = {"render_modes": ["rgb_array"]}
    render_mode = "rgb_array"

    def __init__(self, dream, vae):
        self.dream, self.vae = dream, vae
        size = dream.reset(1).shape[1]
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (size,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (dream.rnn.action_dim,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.dream.generator.manual_seed(seed)
        return self.dream.reset(1)[0].cpu().numpy(), {}

    def step(self, action):
        a = torch.as_tensor(np.asarray(action, np.float32), device=self.dream.device)[None]
        features, reward, done = self.dream.step(a)
        timeout = self.dream.t >= self.dream.max_steps
        return features[0].cpu().numpy(), float(reward[0]), bool(done[0]) and not timeout, timeout, {}

    @torch.inference_mode()
    def render(self):
        """The frame (64, 64, 3) uint8 that V decodes from z."""
        return to_frames(self.vae.decode(self.dream.z[:1]))[0]


@torch.inference_mode()
def dream_scores(dream, controller, params, seed, trials):
    """Cumulative reward of every row of params (P, num_params) in `trials` dreams each: (P, trials)."""
    dream.generator.manual_seed(seed)
    params = torch.as_tensor(params, device=dream.device)
    who = torch.arange(len(params), device=dream.device).repeat_interleave(trials)
    alive, total = torch.arange(len(who), device=dream.device), torch.zeros(len(who), device=dream.device)
    features, own = dream.reset(len(who)), params[who]
    running = torch.ones(len(who), device=dream.device)
    while True:
        features, reward, done = dream.step(controller(own, features))
        total[alive] += reward * running  # the step that ends a dream counts
        running *= ~done
        if dream.t % 10 == 0 or dream.t >= dream.max_steps:
            if not running.any():
                return total.view(len(params), trials).cpu().numpy()
            if running.mean() < 0.9:  # those that are over need no computing
                rows = running.nonzero()[:, 0]
                dream.keep(rows)
                alive, own, features, running = alive[rows], own[rows], features[rows], running[rows]


def evolve(scores, mean, path, popsize, trials, generations, score_trials, sigma0=0.1, seed=0, score_every=5):
    """CMA-ES (appendix A.4) from `mean` (n,), resumable: keeps in `path` the population's mean that scored best.

    scores(params (P, n), seed, trials) -> (P, trials) returns. The seed is one for a generation, so that all its
    candidates drive on the same tracks (but dream each its own dreams), and one for all scores of the mean, a longer
    look every few generations.
    CMA-ES is deterministic, so that the fitness values are its checkpoint: a resumed run asks for the same candidates
    and tells it the stored values.
    """
    begun = dict(popsize=popsize, trials=trials, sigma0=sigma0, seed=seed)
    es = cma.CMAEvolutionStrategy(mean, sigma0, {"popsize": popsize, "seed": seed + 1, "verbose": -9})
    best = load_tensors(path) if path.exists() else {"score": -math.inf, "fitness": [], "log": [], "begun": begun}
    if best.setdefault("begun", begun) != begun:
        flags = ", ".join(f"--{name} {value}" for name, value in best["begun"].items() if value != begun[name])
        raise UserError(f"{path} was begun with {flags}: go on with that, or --overwrite")
    bar = tqdm(range(generations), desc=f"train C ({path.stem})")
    for generation in bar:
        candidates = es.ask()
        if generation < len(best["fitness"]):
            es.tell(candidates, [-f for f in best["fitness"][generation]])
            continue
        values = scores(np.float32(candidates), (seed + 1) * 1_000_003 + generation * trials, trials).mean(1)
        es.tell(candidates, -values.astype(float))
        row = {"generation": generation + 1, "mean": values.mean(), "best": values.max(), "worst": values.min()}
        if (generation + 1) % score_every == 0 or generation == generations - 1:
            row["score"] = scores(np.float32(es.mean[None]), (seed + 2) * 1_000_003, score_trials).mean()
            if row["score"] > best["score"]:
                best.update(score=float(row["score"]), params=torch.tensor(es.mean, dtype=torch.float32))
        best["fitness"].append(values.tolist())
        best["log"].append({k: float(v) for k, v in row.items()})
        bar.set_postfix({k: f"{v:.4g}" for k, v in row.items() if k != "generation"})
        data.write_atomic(path, lambda p: torch.save(best, p))
        data.write_csv(path.with_suffix(".csv"), best["log"])
    return best


# ---------------------------------------------------------------------------------------------------------
# The steps. Each reads what the one before wrote into the run's folder, `args.run`


def need(path, step, args):
    if not path.exists():
        raise UserError(f"no {path}: first run python vae_mdnrnn.py {step} --env {args.env}")
    return path


def dataset_of(args):
    need(args.run / "data" / "meta.json", "collect", args)
    dataset = data.Dataset(args.run / "data")
    if dataset.frames.shape[1:] != (64, 64, 3):
        raise UserError(f"V sees frames of 64x64x3, {dataset.path} has {dataset.frames.shape[1:]}")
    return dataset


def latents_of(args):
    """mu and logvar (S, z_dim) of every frame."""
    path = need(args.run / "latents.npz", "train-v", args)
    try:
        with np.load(path) as file:
            return file["mu"], file["logvar"]
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        raise UserError(f"{path} is damaged: remove it, then python vae_mdnrnn.py train-v --env {args.env}") from None


def trained(path, step, args):
    """What `fit` keeps in `path`, if it has run to its end."""
    saved = load_tensors(need(path, step, args))
    if saved["step"] < (steps := getattr(args, step.replace("train-", "") + "_steps")):
        command = f"python vae_mdnrnn.py {step} --env {args.env}"
        raise UserError(f"{path} stopped after {saved['step']} of {steps} steps: go on with {command}")
    return saved


def load_models(args):
    """V, M and C's form, as saved; sizes that do not fit each other or the flags are the user's to put right."""
    v_path, m_path = args.run / "vae.pt", args.run / "rnn.pt"
    vae, rnn = VAE(args.z_dim), make_rnn(args)
    restore(vae, trained(v_path, "train-v", args), v_path)
    restore(rnn, trained(m_path, "train-m", args), m_path)
    vae.encoder.to(memory_format=torch.channels_last)  # as the frames are: the same z, and a third less time
    return vae.eval().requires_grad_(False), rnn.eval().requires_grad_(False), make_controller(args)


def make_rnn(args):
    return MDNRNN(args.z_dim, args.action_dim, args.hidden, args.n_mix, args.mixture, args.heads, args.restart)


def make_controller(args):
    return Controller(args.z_dim + args.hidden * (2 if args.cell else 1), args.action_dim, args.bias, args.squash)


def make_dream(args, rnn, tau):
    starts = dataset_of(args).episode_starts
    return Dream(rnn, [x[starts] for x in latents_of(args)], tau, args.max_steps, args.cell, args.seed)


def controllers(args):
    """{name: path} of what train-c makes: one C for each temperature, or one for the real environment."""
    names = [f"dream_tau{tau:g}" for tau in args.tau] if args.where == "dream" else ["real"]
    return {name: args.run / f"c_{name}.pt" for name in names}


def load_params(path, args):
    best, size = load_tensors(need(path, "train-c", args)), make_controller(args).num_params
    if "params" not in best:
        raise UserError(f"{path} stopped before its first score: go on with train-c --env {args.env}")
    if len(best["params"]) != size:
        raise UserError(f"{path} has {len(best['params'])} weights, C now {size}: train-c --overwrite")
    return best["params"]


def _start_worker(args):
    """A worker process keeps its environment, V and M."""
    global _worker
    torch.set_num_threads(1)
    models = load_models(args) if (args.run / "rnn.pt").exists() else None
    _worker = args, data.make_env(args.env), models


def _episode(job):
    """One real episode with C's weights `params`, or with a random policy if it is the name of one."""
    params, seed, keep, patience = job
    args, env, models = _worker
    torch.manual_seed(seed)
    if isinstance(params, str):
        policy = RandomPolicy(params, env.action_space, np.random.default_rng(seed))
    else:
        policy = Agent(*models, args.cell, params)
    episode = rollout(env, policy, seed, args.max_steps, patience)
    return episode if keep else float(episode["rewards"].sum(dtype=np.float64))


def workers(args):
    data.make_env(args.env).close()  # a missing package is said here, once
    return data.Workers(args.workers, _start_worker, (args,))


def collect(args):
    """1. Episodes of a random policy; in iterative training, from the second iteration on, of C."""
    out = args.run / "data"
    if out.exists():
        return print(f"{out}: {len(data.Dataset(out))} episodes are there")
    who, earlier, count, actor = args.policy, iter(()), 0, args.previous or args
    if args.previous:  # C acts, and what the earlier iterations saw stays
        who, old = last_params(args.previous), dataset_of(args.previous)
        spans, count = zip(old.episode_starts, old.episode_ends, strict=True), len(old)
        earlier = ({name: getattr(old, name)[s:e] for name in old.ARRAYS} for s, e in spans)
    jobs = [(who, args.seed * 1_000_003 + i, True, math.inf) for i in range(args.episodes)]
    policy = "C" if args.previous else args.policy
    meta = dict(env=args.env, seed=args.seed, policy=policy, img_size=64, frameskip=1)
    with workers(actor) as pool:
        episodes = itertools.chain(earlier, pool.map(_episode, jobs))
        dataset = data.write_dataset(out, episodes, count + args.episodes, meta)
    returns = np.add.reduceat(dataset.rewards, dataset.episode_starts)[count:]  # of those that are new
    print(f"{len(dataset)} episodes, {len(dataset.frames)} frames, return {returns.mean():.1f} ± {returns.std():.1f}")


def last_params(args):
    """C's weights (n,) of the one C of an iteration."""
    (path,) = controllers(args).values()
    return load_params(path, args).numpy()


def begin(model, path, args, steps, later):
    """In iterative training V and M go on from where the iteration before left them. What `later` holds was built on
    them as they are: more `steps` would leave it behind."""
    built = sorted(args.run.glob(later))
    if path.exists() and built and (done := load_tensors(path)["step"]) < steps:
        raise UserError(f"{built[0]} builds on {path} as it is after {done} of {steps} steps: first remove {built[0]}")
    if args.previous and not path.exists():
        restore(model, load_tensors(args.previous.run / path.name), args.previous.run / path.name)
    return model.to(args.device)


def train_v(args):
    """2. V on the frames, then mu and logvar of each frame into latents.npz."""
    dataset, checkpoint, latents = dataset_of(args), args.run / "vae.pt", args.run / "latents.npz"
    torch.manual_seed(args.seed)
    vae = begin(VAE(args.z_dim), checkpoint, args, args.v_steps, "rnn.pt")
    train_vae(vae, dataset.frames, args.v_steps, args.v_batch, args.v_lr, args.beta, args.kl_tolerance, args.seed,
              checkpoint=checkpoint)  # fmt: skip
    if not latents.exists() or latents.stat().st_mtime < checkpoint.stat().st_mtime:
        parts = []
        with torch.inference_mode():
            for i in tqdm(range(0, len(dataset.frames), 500), desc="encode"):
                parts.append(vae.encode(to_tensor(dataset.frames[i : i + 500], args.device)))
        mu, logvar = (torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))
        data.write_atomic(latents, lambda p: np.savez(p, mu=mu, logvar=logvar))
    draw_reconstructions(vae, dataset, args)


def train_m(args):
    """3. M on the latents."""
    dataset, latents, checkpoint = dataset_of(args), latents_of(args), args.run / "rnn.pt"
    trained(args.run / "vae.pt", "train-v", args)
    if latents[0].shape != (len(dataset.frames), args.z_dim):
        raise UserError(
            f"V's latents are {latents[0].shape}, and not (frames, z) = ({len(dataset.frames)}, {args.z_dim}): "
            f"give --z-dim {latents[0].shape[1]}, or train-v --overwrite"
        )
    torch.manual_seed(args.seed)
    rnn = begin(make_rnn(args), checkpoint, args, args.m_steps, "c_*.pt")
    train_mdnrnn(rnn, latents, dataset, args.m_steps, args.m_batch, args.m_lr, args.seed, checkpoint)


def train_c(args):
    """4. C by CMA-ES, in the dream (M alone, one C for each --tau) or in the real environment."""
    _, rnn, controller = load_models(args)
    # in iterative training C goes on from the iteration before
    mean = last_params(args.previous) if args.previous else np.zeros(controller.num_params)

    def run_evolve(scores, path):
        best = evolve(scores, mean, path, args.popsize, args.trials, args.generations, args.score_trials, args.sigma0,
                      args.seed)  # fmt: skip
        draw_scores(best["log"], path)
        print(f"{path}: {controller.num_params} weights, {best['score']:.1f} in the {args.where} environment")

    if args.where == "dream":
        for tau, path in zip(args.tau, controllers(args).values(), strict=True):
            run_evolve(functools.partial(dream_scores, make_dream(args, rnn.to(args.device), tau), controller), path)
    else:
        with workers(args) as pool:
            run_evolve(functools.partial(real_scores, pool), *controllers(args).values())


PATIENCE = 100  # steps without a reward after which the search gives an episode up: off the road few cars come back


def real_scores(pool, params, seed, trials):
    """As `dream_scores`, in the real environment, and on the same `trials` tracks for every row of params (P, n)."""
    jobs = [(p, seed + i, False, PATIENCE) for p in params for i in range(trials)]
    return np.array(list(pool.map(_episode, jobs, chunksize=1))).reshape(len(params), trials)


def test(args):
    """5. Every trained C and a random policy: return over --test-episodes real episodes, and as many dreams."""
    vae, rnn, controller = load_models(args)
    paths = {path.stem.removeprefix("c_"): path for path in sorted(args.run.glob("c_*.pt"))} or controllers(args)
    found = {name: load_params(path, args).numpy() for name, path in paths.items()}
    path, protocol = args.run / "test.json", {k: getattr(args, k) for k in ("test_episodes", "seed", "max_steps")}
    results = tested(path, protocol, paths)
    with workers(args) as pool:
        for name, params in {"random": "uniform", **found}.items():
            if name in results:
                continue
            jobs = [(params, 777_000_000 + args.seed * 1_000 + i, False, math.inf) for i in range(args.test_episodes)]
            results[name] = {"real": list(tqdm(pool.map(_episode, jobs, 1), f"test {name}", len(jobs)))}
            if name.startswith("dream"):
                dream = make_dream(args, rnn, float(name.removeprefix("dream_tau")))
                returns = dream_scores(dream, controller, params[None], 777_000_000 + args.seed, args.test_episodes)
                results[name]["dream"] = returns[0].tolist()
    text = json.dumps({**protocol, "returns": results})
    data.write_atomic(path, lambda p: p.write_text(text))
    print(f"return over {args.test_episodes} episodes, mean ± standard deviation\n{'C':16} {'dream':>14} {'real':>14}")
    for name, result in results.items():
        dream, real = (f"{np.mean(r):.0f} ± {np.std(r):.0f}" if r else "-" for r in map(result.get, ("dream", "real")))
        print(f"{name:16} {dream:>14} {real:>14}")
    draw_dream(args, vae, rnn, controller, found)
    return results


def tested(path, protocol, controllers):
    """Of an earlier test in `path`, by the same protocol, what is still true: C's that have not changed since."""
    try:
        before = json.loads(path.read_text())
    except (OSError, ValueError):  # there was none, or it is damaged
        return {}
    if any(before.get(name) != value for name, value in protocol.items()):
        return {}
    unchanged = [name for name, c in controllers.items() if c.stat().st_mtime <= path.stat().st_mtime]
    return {name: before["returns"][name] for name in ["random", *unchanged] if name in before["returns"]}


def iterate(args):
    """Section 5: roll out, train M on what comes next (z, reward, the action; done where the recipe has it), train C in
    M; again.

    Each iteration is a run of its own, with all data so far; V, M and C go on from where the one before left them.
    Deviation: V is trained on, too, for later iterations see what the first did not.
    """
    if len(args.tau) > 1:
        raise UserError(f"iterate trains one C at a time: give one --tau, not {len(args.tau)}")
    table, previous = [], None
    heads = ",".join(dict.fromkeys([*args.heads.split(","), "reward", "action"]))
    for i in range(args.iterations):
        print(f"iteration {i + 1} of {args.iterations}")
        own = dict(run=args.run / f"iteration{i + 1}", seed=args.seed + i, where="dream", heads=heads)
        previous = argparse.Namespace(**vars(args) | own | {"previous": previous})
        keep_flags(previous)
        results = all_steps(previous)
        (name,) = controllers(previous)
        returns = {**results[name], "random": results["random"]["real"]}
        table.append({"iteration": i + 1, **{who: float(np.mean(r)) for who, r in returns.items()}})
        data.write_csv(args.run / "iterations.csv", table)
    for row in table:
        print("  ".join(f"{name} {value:.4g}" for name, value in row.items()))


def all_steps(args):
    """Steps 1 to 5, one after the other."""
    return [step(args) for step in (collect, train_v, train_m, train_c, test)][-1]


def bench(args, seconds=3):
    """Dream steps per second, C included, at the sizes of --env, with weights as they are born."""
    torch.manual_seed(0)
    rnn, controller = make_rnn(args).eval().requires_grad_(False).to(args.device), make_controller(args)
    dream = Dream(rnn, torch.zeros(2, 1, args.z_dim), 1.0, 10**9, args.cell)
    print(f"{args.env}: z {args.z_dim}, LSTM {args.hidden}, {torch.get_num_threads()} threads, {args.device}")
    base = None
    for batch in (1, 64, 1024):
        params = 0.1 * torch.randn(batch, controller.num_params, device=args.device)
        features = dream.reset(batch)

        def step():
            _, _, done = dream.step(controller(params, features))  # noqa: B023
            done.any().item()  # waits for the device

        step()  # warms up
        rate = batch * data.per_second(step, seconds)
        base = base or rate
        print(f"batch {batch:5}: {rate:9.0f} dream steps/s, {rate / base:6.1f} x batch 1")


# ---------------------------------------------------------------------------------------------------------
# Pictures


def draw_reconstructions(vae, dataset, args):
    """Twelve frames above what V makes of them: reconstructions.png."""
    frames = dataset.frames[np.linspace(0, len(dataset.frames) - 1, 12).astype(int)]
    with torch.inference_mode():
        recon = to_frames(vae.decode(vae.encode(to_tensor(frames, args.device))[0]))
    write_strips(args.run / "reconstructions.png", frames, recon)


def draw_scores(log, path):
    """C's score by generation, beside its weights: c_....png."""
    plt.figure(figsize=(5, 3.5))
    for name in ("best", "mean", "worst"):
        plt.plot([row["generation"] for row in log], [row[name] for row in log], label=f"{name} of the population")
    scored = [row for row in log if "score" in row]
    plt.plot([r["generation"] for r in scored], [r["score"] for r in scored], "ko-", ms=3, label="the search's centre")
    plt.xlabel("generation")
    plt.ylabel("return")
    plt.legend(fontsize=7)
    plt.tight_layout()
    data.write_atomic(path.with_suffix(".png"), lambda p: plt.savefig(p, dpi=120))
    plt.close()


def draw_dream(args, vae, rnn, controller, trained, length=600):
    """A dream (left) beside a real episode (right), both with the same C: dream.gif."""
    name = next((name for name in controllers(args) if name in trained), min(trained))
    params = torch.from_numpy(trained[name])
    torch.manual_seed(args.seed)
    agent = Agent(vae, rnn, controller, args.cell, params)
    real = rollout(data.make_env(args.env), agent, args.seed, length)["frames"]
    tau = float(name.removeprefix("dream_tau")) if name.startswith("dream") else args.tau[0]
    world = DreamEnv(make_dream(args, rnn, tau), vae)
    features, _ = world.reset(seed=args.seed)
    dreamt, done = [world.render()], False
    while not done and len(dreamt) < length:
        action = controller(params[None], torch.as_tensor(features)[None])[0].numpy()
        features, _, terminated, truncated, _ = world.step(action)
        dreamt.append(world.render())
        done = terminated or truncated
    pairs = [np.concatenate([d, r], 1).repeat(2, 0).repeat(2, 1) for d, r in zip(dreamt, real, strict=False)]
    data.write_atomic(args.run / "dream.gif", lambda p: imageio.imwrite(p, pairs[::3], duration=85, loop=0))


# ---------------------------------------------------------------------------------------------------------
# Command line

STEPS = {"collect": collect, "train-v": train_v, "train-m": train_m, "train-c": train_c, "test": test,
         "all": all_steps, "iterate": iterate, "bench": bench}  # fmt: skip
FILES = {"collect": "data", "train-v": "vae.* latents.npz reconstructions.png", "train-m": "rnn.*",
         "train-c": "c_*", "test": "test.json dream.gif"}  # fmt: skip
NOT_KEPT = ("step", "out", "run", "previous", "device", "workers", "overwrite")


def available_device(text):
    """An `argparse` type: the name of a device that torch can use here."""
    try:
        torch.zeros(1, device=text)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise argparse.ArgumentTypeError(f"torch cannot use the device '{text}' here") from None
    return text


def build_parser():
    parser = data.Parser(description=__doc__)
    add = parser.add_argument
    add("step", choices=STEPS, metavar="step", help=", ".join(STEPS))
    add("--env", default="takecover", choices=RECIPES, help="most other defaults are this one's")
    add("--out", type=Path, help="the run's folder (default: runs/worldmodels_ENV)")
    add("--seed", type=data.natural, default=0, help="the same seed gives the same run")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", type=available_device, default=default, help="for training, and for the dreams of train-c")
    add("--workers", type=data.positive, default=os.cpu_count(), help="processes with a real environment")
    add("--overwrite", action="store_true", help="begin this step, and what builds on it, anew")
    add("--max-steps", type=data.positive, help="an episode's length at most, real or dreamt")
    add = parser.add_argument_group("1. collect").add_argument
    add("--episodes", type=data.positive, help="the paper: 10,000")
    add = parser.add_argument_group("2. train-v").add_argument
    add("--z-dim", type=data.positive, help="size of z")
    add("--v-steps", type=data.positive, help="steps of Adam")
    add("--v-batch", type=data.positive, default=32, help="frames per step")
    add("--v-lr", type=float, default=1e-3, help="learning rate at the start")
    add("--beta", type=float, help="weight of the KL term")
    add("--kl-tolerance", type=float, default=0.5, help="free nats of KL per dimension of z")
    add = parser.add_argument_group("3. train-m").add_argument
    add("--hidden", type=data.positive, help="units of the LSTM")
    add("--n-mix", type=data.positive, default=5, help="Gaussians of the mixture")
    add("--mixture", choices=("vector", "dimension"), default="vector", help="over the whole z, or for each dimension")
    add("--m-steps", type=data.positive, help="steps of Adam")
    add("--m-batch", type=data.positive, default=8, help="episodes per step")
    add("--m-lr", type=float, default=1e-3, help="learning rate at the start")
    add = parser.add_argument_group("4. train-c").add_argument
    add("--in", dest="where", choices=("dream", "real"), help="where C is trained")
    add("--tau", type=float, nargs="+", help="temperature of the dream; several: a C for each")
    add("--popsize", type=data.positive, help="candidates per generation (the paper: 64)")
    add("--trials", type=data.positive, help="episodes per candidate (the paper: 16)")
    add("--generations", type=data.positive, help="generations of CMA-ES")
    add("--sigma0", type=float, default=0.1, help="CMA-ES's first standard deviation")
    add("--score-trials", type=data.positive, help="episodes by which the best C is chosen")
    add = parser.add_argument_group("5. test").add_argument
    add("--test-episodes", type=data.positive, default=100, help="real ones, and as many dreams, for each C")
    add = parser.add_argument_group("iterate").add_argument
    add("--iterations", type=data.positive, default=3, help="rounds of the procedure")
    return parser


def parse_args(argv=None):
    """Twice, because the defaults are those of --env and of the run in --out."""
    first = data.Parser(add_help=False)
    first.add_argument("--env", choices=RECIPES)
    first.add_argument("--out", type=Path)
    given, _ = first.parse_known_args(argv)
    run = given.out or Path(f"runs/worldmodels_{given.env or 'takecover'}")
    kept = data.read_json(path) if (path := run / "args.json").exists() else {}
    env = given.env or kept.get("env", "takecover")
    if kept.get("env", env) != env:
        raise UserError(f"{run} is a run of --env {kept['env']}: give another --out than for {env}")
    parser = build_parser()
    parser.set_defaults(**{**RECIPES[env], **kept, "env": env})
    args = parser.parse_args(argv)
    args.run, args.previous = run, None
    if not all(tau > 0 for tau in args.tau):
        raise UserError(f"the temperature must be above 0, not {min(args.tau):g}: try --tau 1.15")
    if len({f"{tau:g}" for tau in args.tau}) < len(args.tau):
        raise UserError("a temperature stands twice in --tau")
    if args.popsize < 4:
        raise UserError(f"CMA-ES needs a population of at least 4, not {args.popsize}: give a larger --popsize")
    for name in ("v_lr", "m_lr", "sigma0"):
        if not 0 < getattr(args, name) < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name):g} is not above 0")
    if not min(args.beta, args.kl_tolerance) >= 0:
        raise UserError("--beta and --kl-tolerance must be at least 0")
    return args


def set_aside(args, aside):
    """--overwrite: what this step and those after it wrote goes into the folder `aside`."""
    names = list(FILES)
    later = names[names.index(args.step) if args.step in names else 0 :] if args.step != "iterate" else []
    patterns = " ".join(FILES[step] for step in later).split() or ["iteration*"]
    if args.step == "train-c":  # another C, of another temperature, does not build on this one
        patterns[:1] = [f"{path.stem}.*" for path in controllers(args).values()]
    shutil.rmtree(aside, ignore_errors=True)  # left by a run that was killed
    aside.mkdir(parents=True)
    for path in itertools.chain(*map(args.run.glob, patterns)):
        path.rename(aside / path.name)


def main(argv=None):
    args = parse_args(argv)
    if args.step == "bench":
        return bench(args)
    aside, kept = args.run / ".overwritten", args.run / "args.json"
    if args.overwrite:
        set_aside(args, aside)
    before = kept.read_bytes() if kept.exists() else None
    if args.step != "test" or not before:
        keep_flags(args)  # now, so that a step that is killed goes on with them
    try:
        STEPS[args.step](args)
    except UserError:  # flags that do not fit are not kept, and nothing is lost by them
        if before:
            data.write_atomic(kept, lambda path: path.write_bytes(before))
        old = list(aside.glob("*"))
        if not any((args.run / path.name).exists() for path in old):
            for path in old:
                path.rename(args.run / path.name)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def keep_flags(args):
    kept = {k: v for k, v in vars(args).items() if k not in NOT_KEPT}
    data.write_atomic(args.run / "args.json", lambda p: p.write_text(json.dumps(kept, indent=1)))


if __name__ == "__main__":
    data.run_script(main)
