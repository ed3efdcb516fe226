"""World Models (Ha & Schmidhuber, 2018, arXiv:1803.10122): V, M, C, the dream and iterative training, in one file.

    V  a variational autoencoder        z_t ~ q(z | o_t)
    M  an LSTM with a mixture density   P(z_{t+1} | a_t, z_t, h_t) = sum_k pi_k N(mu_k, sigma_k^2)
    C  one linear layer                 a_t = W_c [z_t h_t] + b_c, evolved by CMA-ES

V and M learn from what a random policy saw. C is then evolved in the real environment (CarRacing, section 3), or inside
M alone, in a dream that never renders a frame (TakeCover, section 4). What the paper leaves open is as in its code
(github.com/hardmaru/WorldModelsExperiments), unless a docstring says otherwise.

    python vae_mdnrnn.py all --env takecover        # the five steps: collect, train-v, train-m, train-c, test
    python vae_mdnrnn.py train-c --tau 1.15         # one of them: C, in a dream of another temperature
    python vae_mdnrnn.py iterate --env takecover    # section 5: roll out with C, train M, train C in M; again
    torchrun --nproc-per-node 4 vae_mdnrnn.py train-c   # four processes share the population
    python vae_mdnrnn.py bench                      # dream steps per second

Everything lands in runs/worldmodels_<env>, or of `iterate` in runs/worldmodels_<env>_iterate. If the same command is
given again, training goes on where it was killed, `collect` begins again unless it was done, and `test` always plays.
"""

import argparse
import contextlib
import functools
import itertools
import math

import cma
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
from lib import common, processes, recipes, reports
from lib.common import RANK, WORLD_SIZE, UserError, bfloat16, fit, to_tensor, tqdm
from lib.decoders import OnePixelDeconv
from lib.recipes import c_names, first_held_out, load_c, load_data, need, open_report, parse_args, temperature
from lib.worlds import BATCH, DreamEnv, EpisodePool

# ---- V: what is seen, in few numbers -------------------------------------------------------------


class VAE(nn.Module):
    """V: a 64x64 frame becomes a small latent vector z (appendix A.1).

    Four stride-2 convolutions lead down to 2x2x256, and two linear layers to mu and logvar. One linear layer and four
    transposed convolutions lead back. With z_dim 32 (CarRacing) it has 4,348,547 parameters, with 64 (TakeCover)
    4,446,915, as in the paper's tables.
    """

    def __init__(self, z_dim=32):
        super().__init__()
        self.z_dim = z_dim
        self.encoder = nn.Sequential(
            *(nn.Conv2d(3, 32, 4, stride=2), nn.ReLU()),
            *(nn.Conv2d(32, 64, 4, stride=2), nn.ReLU()),
            *(nn.Conv2d(64, 128, 4, stride=2), nn.ReLU()),
            *(nn.Conv2d(128, 256, 4, stride=2), nn.ReLU()),
            nn.Flatten(),
        )
        self.mu, self.logvar = nn.Linear(1024, z_dim), nn.Linear(1024, z_dim)
        self.decoder = nn.Sequential(
            *(nn.Linear(z_dim, 1024), nn.Unflatten(1, (1024, 1, 1))),
            *(OnePixelDeconv(1024, 128, 5, stride=2), nn.ReLU()),
            *(nn.ConvTranspose2d(128, 64, 5, stride=2), nn.ReLU()),
            *(nn.ConvTranspose2d(64, 32, 6, stride=2), nn.ReLU()),
            *(nn.ConvTranspose2d(32, 3, 6, stride=2), nn.Sigmoid()),
        )

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


def sample_z(mu, logvar, generator=None):
    """z ~ N(mu, exp(logvar)), written so that the gradient passes through mu and logvar."""
    noise = torch.randn(mu.shape, generator=generator, device=mu.device)
    return mu + torch.exp(logvar / 2) * noise


def vae_loss(recon, x, mu, logvar, beta=1.0, kl_tolerance=0.5, weight=1.0):
    """Squared error summed over the frame + beta * KL(q(z|x) || N(0, 1)), mean over the batch. As in the paper's code
    the KL has no gradient below kl_tolerance nats per latent dimension. `weight` (B, 1, H, W) weighs the pixels."""
    recon_loss = (weight * (recon - x).square()).sum((1, 2, 3))  # (B,)
    kl = -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum(1)  # (B,)
    return (recon_loss + beta * kl.clamp(min=kl_tolerance * mu.shape[1])).mean()


def moving(x, before):
    """How much each pixel of frames x (B, 3, H, W) moves, from 0 to 0.5, (B, 1, H, W): its change since the frame
    `before`, less twice the median change of its frame, which the motion of the camera explains."""
    change = (x - before).abs().mean(1, keepdim=True)  # (B, 1, H, W)
    return (change - 2 * change.flatten(1).median(1).values[:, None, None, None]).clamp(0, 0.5)


def frames_and_motion(frames, index, starts, device):
    """Images (B, 3, H, W) of frames `index`, and how much each pixel moves, (B, 1, H, W). At the `starts` none does."""
    x, before = (to_tensor(frames[i], device) for i in (index, np.where(np.isin(index, starts), index, index - 1)))
    return x, moving(x, before)


def train_vae(
    vae, frames, steps, lr=1e-3, beta=1.0, kl_tolerance=0.5, focus=0.0, starts=(0,), bf16=False, transform=None, seed=0,
    **options,
):  # fmt: skip
    """Fits the VAE in place to uint8 frames (S, 64, 64, 3), which may be memory-mapped. `options` are `fit`'s.

    V sees and reconstructs images (B, 3, 64, 64), or what `transform` makes of them, with `bf16` in bfloat16.
    Deviations: ten times the paper's learning rate, lowered along a cosine, and a third of its batch, for a fraction of
    its frames. `focus` is for worlds in which small things matter: a far fireball is a few pixels among thousands of
    wall. The error of a pixel then has the weight 1 + focus * `moving`, and V sees 32 of every 128 frames, more often
    those in which much moves. Episodes begin with the frames `starts`.
    """
    device = vae.mu.weight.device

    def loss():
        index = torch.randint(len(frames), (128 if focus else 32,)).sort().values.numpy()
        if focus:
            x, moves = frames_and_motion(frames, index, starts, device)  # (128, 3, 64, 64), (128, 1, 64, 64)
            much = moves.sum((1, 2, 3))
            seen = torch.multinomial(much + much.median() + 1e-6, 32)
            x, weight = x[seen], 1 + focus * moves[seen]
        else:
            x, weight = to_tensor(frames[index], device), 1.0
        x = transform(x) if transform else x
        with bfloat16(device, bf16):
            recon, mu, logvar = (out.float() for out in vae(x))
        return {"loss": vae_loss(recon, x, mu, logvar, beta, kl_tolerance, weight), "recon": F.mse_loss(recon, x)}

    return fit(vae, loss, steps, lr, seed, "train V", **options)


# ---- M: what happens next ------------------------------------------------------------------------


class MDNRNN(nn.Module):
    """M: P(z_{t+1} | a_t, z_t, h_t) as a mixture of n_mix Gaussians, from an LSTM (section 2.2, appendix A.2).

    With the mixture "vector" there are n_mix Gaussians over the whole next latent vector, as in the paper's equation;
    with "dimension" there are n_mix for each dimension, as in the paper's code. Both are G mixtures over D = z_dim / G
    dimensions each. `heads` names what else M predicts: "done,reward,action" (the next action) or some of these.
    With "dimension", and without the second bias vector of PyTorch's LSTM (4 x hidden), it has the paper's parameters:
    422,368 (CarRacing: no heads, no restart flag), 1,678,785 (TakeCover: restart flag, done head).
    """

    def __init__(self, z_dim, action_dim, hidden=256, n_mix=5, mixture="dimension", heads="", restart=False):
        super().__init__()
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
        return self.lstm(torch.cat(x, -1).to(self.mdn.weight.dtype), state)

    def mixture(self, h):
        """h (..., hidden) -> pi as logits (..., G, K), mu and log sigma (..., G, K, D) of the next z."""
        K, D = self.n_mix, self.z_dim // self.groups
        logit, mu, logsigma = self.mdn(h).float().unflatten(-1, (self.groups, -1)).split([K, K * D, K * D], -1)
        mu, logsigma = mu.unflatten(-1, (K, D)), logsigma.unflatten(-1, (K, D))
        return logit, mu, logsigma.clamp(min=-7)  # a sigma of 0 would be an infinite likelihood


def mdn_nll(logit, mu, logsigma, z):
    """z (..., z_dim) -> -log sum_k pi_k N(z | mu_k, sigma_k^2) in nats, summed over the groups: (...,)."""
    z = z.unflatten(-1, (mu.shape[-3], 1, mu.shape[-1]))  # (..., G, 1, D)
    log_n = -0.5 * ((z - mu) * torch.exp(-logsigma)).square() - logsigma - 0.5 * math.log(2 * math.pi)
    return -torch.logsumexp(logit.log_softmax(-1) + log_n.sum(-1), -1).sum(-1)


def mdn_sample(logit, mu, logsigma, gumbel, noise, tau=1.0):
    """Draws z (..., z_dim) as the paper's code does: k ~ Categorical(softmax(logit / tau)), z ~ N(mu_k, tau sigma_k^2).
    Its random numbers are given: gumbel (..., G, K), of which the Gumbel-max trick makes k, and noise (..., G, D)."""
    k = (logit / tau + gumbel).argmax(-1)[..., None, None].expand(*noise.shape[:-1], 1, noise.shape[-1])
    mu, logsigma = (part.gather(-2, k)[..., 0, :] for part in (mu, logsigma))  # (..., G, D)
    return (mu + math.sqrt(tau) * logsigma.exp() * noise).flatten(-2)


def mdnrnn_loss(rnn, z, a, reward, done, valid, restart, done_weight=10.0, bf16=False):
    """Teacher forcing: from z_t, a_t and its state M predicts z_{t+1}; its heads predict done, reward and next action.

    All are (B, T, ...), and padded where `valid` (B, T) is false. As in the paper's code the likelihood is divided by
    z_dim, and the rare last step of an episode weighs `done_weight`. Unlike there, the log of this weight is added to
    the head's logit in the loss, so that the head itself learns the true log odds. With `bf16` M computes in bfloat16.
    """
    both = valid[:, 1:]  # step t + 1 exists, and so does step t
    with bfloat16(z.device, bf16):
        h = rnn(z, a, restart)[0]  # (B, T, hidden)
        mixture = rnn.mixture(h[:, :-1][both])
    h, losses = h.float(), {"nll": mdn_nll(*mixture, z[:, 1:][both]).mean() / rnn.z_dim}
    if "done" in rnn.heads:
        logit, target = rnn.heads["done"](h[valid])[:, 0] + math.log(done_weight), done[valid]
        losses["done"] = F.binary_cross_entropy_with_logits(logit, target, 1 + (done_weight - 1) * target)
    if "reward" in rnn.heads:
        losses["reward"] = F.mse_loss(rnn.heads["reward"](h[valid])[:, 0], reward[valid])
    if "action" in rnn.heads:
        losses["action"] = F.mse_loss(rnn.heads["action"](h[:, :-1][both]), a[:, 1:][both])
    return {"loss": sum(losses.values()), **losses}


def whole_episodes(latents, dataset, episodes, device):
    """These episodes, padded, as `mdnrnn_loss` takes them. z is drawn anew each time from its mu and logvar, which are
    `latents` (2, S, z_dim)."""
    starts, ends = (torch.from_numpy(np.array(x))[episodes] for x in (dataset.episode_starts, dataset.episode_ends))
    rows = starts[:, None] + torch.arange(int((ends - starts).max()))  # (B, T)
    valid = rows < ends[:, None]
    rows = torch.where(valid, rows, starts[:, None]).numpy()
    arrays = *latents, dataset.actions, dataset.rewards, dataset.dones
    mu, logvar, a, reward, done = (torch.as_tensor(np.float32(x[rows]), device=device) for x in arrays)
    restart = torch.zeros_like(done)
    restart[:, 0] = 1
    return sample_z(mu, logvar), a, reward, done, valid.to(device), restart


def train_mdnrnn(rnn, latents, dataset, episodes, steps, batch_size=8, lr=1e-3, seed=0, **options):
    """Fits M in place to whole episodes, because what decides the next step may lie far back (a player's wounds do).

    A batch holds a random one of `episodes` and others of similar length, so that little of it is padding.
    Deviations: the paper's code takes 100 parts of 500 or 999 steps at a time, leaves out the shortest episodes, and
    hardly lowers the learning rate, which falls along a cosine here.
    """
    episodes = torch.as_tensor(episodes)
    lengths = torch.from_numpy(dataset.episode_ends - dataset.episode_starts)[episodes]

    def loss():
        order = (lengths + torch.rand(len(lengths))).argsort()  # by length, ties in any order
        first = int(torch.randint(1 - batch_size, len(order), ()))  # a window of it, which may hang over the ends
        batch = episodes[order[max(0, first) : first + batch_size]]
        return mdnrnn_loss(rnn, *whole_episodes(latents, dataset, batch, rnn.mdn.weight.device), bf16=True)

    return fit(rnn, loss, steps, lr, seed, "train M", clip=1.0, **options)


@torch.inference_mode()
def held_out_losses(rnn, latents, dataset, episodes):
    """`mdnrnn_loss` of episodes that M has not seen, averaged over batches of 8, with a `done_weight` of 1."""
    torch.manual_seed(0)
    arrays = (whole_episodes(latents, dataset, e, rnn.mdn.weight.device) for e in torch.as_tensor(episodes).split(8))
    losses = [mdnrnn_loss(rnn, *batch, done_weight=1.0) for batch in arrays]
    return {name: torch.stack([each[name] for each in losses]).mean().item() for name in losses[0]}


# ---- C: what to do -------------------------------------------------------------------------------


class Controller:
    """C: a_t = squash(W_c [z_t h_t] + b_c), one linear layer (section 2.3).

    It holds no weights of its own: `__call__` takes them, one row of `num_params` for each row of features, so that a
    whole CMA-ES population acts at once. 867 parameters for CarRacing; 1,088 for TakeCover ([z h c], no bias).
    """

    def __init__(self, in_dim, action_dim, bias=True, squash="tanh"):
        self.in_dim, self.action_dim, self.bias, self.squash = in_dim, action_dim, bias, squash
        self.num_params = action_dim * (in_dim + bias)

    def __call__(self, params, features):
        """params (B, num_params), features (B, in_dim) -> actions (B, action_dim)."""
        W, b = params.split([self.action_dim * self.in_dim, self.action_dim * self.bias], 1)
        a = torch.einsum("bad,bd->ba", W.unflatten(1, (self.action_dim, self.in_dim)), features)
        a = torch.tanh(a + b if self.bias else a)
        if self.squash == "car":  # steering in [-1, 1], gas in [0, 1], brake in [0, 1], as in the paper's code
            a = torch.stack([a[:, 0], (a[:, 1] + 1) / 2, a[:, 2].clamp(0, 1)], 1)
        return a


def features_of(z, state, cell):
    """What C sees: [z h], or [z h c] with the cell state. z (B, z_dim), state (h, c) of (1, B, hidden) each."""
    return torch.cat([z, *(part[0] for part in state[: 1 + cell])], 1)


class Agents:
    """V, M and C in many real episodes at once (`rollout` of section 2.4), each with a C and a generator of its own."""

    def __init__(self, vae, rnn, controller, cell, size=BATCH):
        self.vae, self.rnn, self.controller, self.cell = vae, rnn, controller, cell
        self.generators = [torch.Generator() for _ in range(size)]
        self.params, self.restart = torch.zeros(size, controller.num_params), torch.ones(size, 1)
        self.state = torch.zeros(1, size, rnn.hidden), torch.zeros(1, size, rnn.hidden)  # h and c

    @torch.inference_mode()
    def begin(self, i, params, seed):
        """Row i begins an episode, in which C has the weights `params`."""
        self.generators[i].manual_seed(seed)
        self.params[i], self.restart[i] = torch.as_tensor(params), 1
        self.state[0][0, i] = self.state[1][0, i] = 0

    @torch.inference_mode()
    def __call__(self, frames):
        """Frames (B, 64, 64, 3) uint8 -> actions (B, action_dim)."""
        with bfloat16(self.restart.device):
            mu, logvar = (out.float() for out in self.vae.encode(to_tensor(frames)))
        noise = torch.stack([torch.randn(self.vae.z_dim, generator=generator) for generator in self.generators])
        z = mu + torch.exp(logvar / 2) * noise  # z = V(o)
        a = self.controller(self.params, features_of(z, self.state, self.cell))  # a = C(z, h)
        _, self.state = self.rnn(z[:, None], a[:, None], self.restart, self.state)  # h = M(a, z, h)
        self.restart = torch.zeros_like(self.restart)
        return a.numpy()


# ---- The dream: M as the environment -------------------------------------------------------------


class Dream:
    """Thousands of dreams at once (section 4.2): M draws z_{t+1}, gives the mean reward, and ends episodes.

    A dream begins at the first z of a real episode, with an empty memory; `start` holds mu and logvar, (E, z_dim) each.
    At a temperature `tau` above 1 it is less certain, and harder to exploit (section 4.5). Without a reward head each
    step is worth 1, and without a done head a dream lasts `max_steps`.
    As in the paper's code a dream ends once the odds of done exceed 1 : 10 (the weight of 10 makes them even there).
    """

    def __init__(self, rnn, start, tau=1.0, max_steps=1000, cell=False):
        self.device = rnn.mdn.weight.device
        self.rnn, self.tau, self.max_steps, self.cell = rnn, tau, max_steps, cell
        self.start = [torch.as_tensor(x, dtype=torch.float32, device=self.device) for x in start]
        self.generator = torch.Generator(self.device)
        self.random = dict(generator=self.generator, device=self.device)

    def reset(self, trial, trials=None):
        """Begins dreams and returns what C sees of each, (B, in_dim). Dreams with the same number in `trial` (B,), one
        of `trials` (default: as many as they need), draw the same random numbers."""
        self.t, self.trial, self.trials = 0, trial.to(self.device), trials or int(trial.max()) + 1
        i = torch.randint(len(self.start[0]), (self.trials,), **self.random)
        self.z = sample_z(*(x[i] for x in self.start), self.generator)[self.trial]
        self.state = (self.rnn.mdn.weight.new_zeros(1, len(trial), self.rnn.hidden),) * 2
        return features_of(self.z, self.state, self.cell)

    @torch.inference_mode()
    def step(self, a):
        """Actions (B, A) -> features (B, in_dim), rewards (B,), done (B,) bool."""
        restart = torch.full((len(a), 1), float(self.t == 0), device=self.device)
        h, self.state = self.rnn(self.z[:, None], a[:, None], restart, self.state)
        h, heads, self.t = h[:, 0], self.rnn.heads, self.t + 1  # h (B, hidden)
        logit, mu, logsigma = self.rnn.mixture(h)
        gumbel = -torch.log(-torch.log(torch.rand(self.trials, *logit.shape[1:], **self.random)))
        noise = torch.randn(self.trials, *mu.shape[1::2], **self.random)  # (trials, G, D)
        self.z = mdn_sample(logit, mu, logsigma, gumbel[self.trial], noise[self.trial], self.tau)
        reward = heads["reward"](h)[:, 0] if "reward" in heads else torch.ones(len(h), device=self.device)
        done = torch.full((len(h),), self.t >= self.max_steps, device=self.device)
        if "done" in heads:  # here the dream ends an episode
            done |= torch.sigmoid(heads["done"](h)[:, 0].float()) > 1 / 11
        return features_of(self.z, self.state, self.cell), reward, done

    def keep(self, rows):
        """Goes on with these dreams only."""
        self.trial, self.z, self.state = self.trial[rows], self.z[rows], tuple(s[:, rows] for s in self.state)


# ---- CMA-ES: how C is found ----------------------------------------------------------------------


@torch.inference_mode()
def dream_returns(dream, controller, params, trial, trials, seed):
    """What each row of params (B, num_params), the weights of a C, earns in a dream, (B,), and how many steps they all
    take. `trial` (B,) and `trials` are those of `Dream.reset`."""
    dream.generator.manual_seed(seed)
    features, alive = dream.reset(trial, trials), torch.arange(len(params), device=dream.device)
    total, running = torch.zeros(len(params), device=dream.device), torch.ones(len(params), device=dream.device)
    steps = torch.zeros((), dtype=torch.int64, device=dream.device)
    while running.any():
        if running.mean() < 0.9:  # dreams that are over need no computing
            rows = running.nonzero()[:, 0]
            dream.keep(rows)
            alive, params, features, running = alive[rows], params[rows], features[rows], running[rows]
        for _ in range(10):  # to ask after each step whether any dream still runs would make a GPU wait
            features, reward, done = dream.step(controller(params, features))
            total[alive] += reward * running  # the step that ends a dream counts
            steps += running.sum().long()
            running *= ~done
    return total.cpu().numpy(), int(steps)


def dream_scores(dream, controller, params, seed, trials):
    """What every row of params (P, num_params) earns in `trials` dreams, (P, trials), and how many steps they all take.
    All rows meet the same random numbers, as if on the same tracks. The processes of torchrun share the dreams."""
    each = torch.as_tensor(params, device=dream.device).repeat_interleave(trials, 0)  # each dream has its own C
    groups = [rows for rows in torch.arange(len(each)).tensor_split(WORLD_SIZE) if len(rows)]
    part = lambda rows: dream_returns(dream, controller, each[rows], rows % trials, trials, seed)  # noqa: E731
    returns, steps = zip(*processes.share(part, groups), strict=True)
    return np.concatenate(returns).reshape(len(params), trials), sum(steps)


def real_scores(pool, args, params, seed, trials):
    """Like `dream_scores`, in the real environment, and on the same `trials` tracks for every row of params. Deviation:
    an episode ends after `--patience` steps without a reward, because few cars come back to the road."""
    limits = dict(steps=args.max_steps, patience=args.patience)
    jobs = [dict(who=p, seed=seed + i, **limits) for p in params for i in range(trials)]
    parts = np.array_split(jobs, min(WORLD_SIZE, len(jobs)))  # one for each process of torchrun
    parts = processes.share(lambda part: list(pool.returns(part.tolist())), parts)
    returns, steps = zip(*itertools.chain(*parts), strict=True)
    return np.reshape(returns, (len(params), trials)), sum(steps)


def evolve(scores, mean, path, popsize, trials, steps, score_trials, sigma0=0.1, seed=0, report=lambda *_: None):
    """CMA-ES (appendix A.4) from `mean` (n,), for about `steps` steps. `path` keeps the search; its best mean is C.

    scores(params (P, n), seed, trials) -> (P, trials) returns, and the steps that they took. All candidates of a
    generation get the same seed and so drive on the same tracks, or dream on the same random numbers. After every fifth
    generation and the last, CMA-ES's mean is scored over `score_trials` trials, always with the same seed.
    Deviations: the paper's code also lowers the return of large weights, gives tracks to pairs of candidates, scores
    the mean after every 25th generation over 1,024 trials, and has 64 candidates with 16 trials each. Here candidates
    have few trials, and `popsize` is their first number and the largest. Early on a few candidates suffice to find a
    direction. Later luck decides their ranking, and more candidates average it out as more trials do, but try more
    directions, too. So their number doubles, and the covariance is learned anew, once the mean returns on one half of
    the tracks and on the other correlate below 1/3 on average over five generations.
    CMA-ES is deterministic, so the fitness values are its checkpoint: a resumed run tells it the stored values.
    """

    def population(size, mean, sigma, seed=math.nan):  # with NaN the random numbers go on where they were
        return cma.CMAEvolutionStrategy(mean, sigma, {"popsize": size, "seed": seed, "verbose": -9})

    begun = dict(popsize=popsize, trials=trials, score_trials=score_trials, sigma0=sigma0, seed=seed)
    es = population(popsize[0], mean, sigma0, seed + 1)  # 0 would mean the clock
    search = dict(score=-math.inf, params=torch.tensor(mean, dtype=torch.float32), fitness=[], log=[], begun=begun)
    if path.exists():
        search = recipes.load_search(path, len(mean), begun)
    for values in search["fitness"]:
        if len(values) > es.popsize:
            es = population(len(values), es.mean, es.sigma)
        es.tell(es.ask(), [-f for f in values])
    log = search["log"]
    done = log[-1]["steps"] if log else 0
    bar = tqdm(total=steps, initial=done, desc=f"train C ({path.stem})", unit="step", unit_scale=True)
    while done < steps:
        last = [row["agreement"] for row in log if row["popsize"] == es.popsize][-5:]
        if es.popsize < popsize[-1] and len(last) == 5 and np.mean(last) < 1 / 3:
            es = population(min(2 * es.popsize, popsize[-1]), es.mean, es.sigma)
        candidates = es.ask()
        returns, taken = scores(np.float32(candidates), (seed + 1) * 1_000_003 + len(log) * trials, trials)
        values, done = returns.mean(1), done + taken
        if not values.min() < values.max():  # a NaN fails the comparison, too
            cure = "train V and M longer, or, in a dream, raise --tau"
            raise UserError(f"all candidates of generation {len(log) + 1} earn {values[0]:g}: {cure}")
        es.tell(candidates, -values.astype(float))
        row = {"generation": len(log) + 1, "popsize": es.popsize, "best": values.max(), "mean": values.mean()}
        row |= {"worst": values.min(), "agreement": np.corrcoef([returns[:, i::2].mean(1) for i in (0, 1)])[0, 1]}
        if row["generation"] % 5 == 0 or done >= steps:
            returns, taken = scores(np.float32(es.mean[None]), (seed + 2) * 1_000_003, score_trials)
            row["score"], done = returns.mean(), done + taken
            if row["score"] > search["score"]:
                search.update(score=float(row["score"]), params=torch.tensor(es.mean, dtype=torch.float32))
        search["fitness"].append(values.tolist())
        log.append({"steps": done} | {k: v if isinstance(v, int) else float(v) for k, v in row.items()})
        bar.update(done - bar.n)
        bar.set_postfix({k: f"{v:.4g}" for k, v in row.items() if k != "agreement"})
        report(f"train {path.stem}", done, row)
        if RANK == 0:
            recipes.save_search(path, search)
    return search


# ---- The steps: each reads what the one before wrote into the run's folder, `args.run` -----------


def collect(args):
    """1. Episodes of a random policy. In later iterations of `iterate` C acts, and the earlier episodes stay."""
    out, before, policy, agents = args.run / "data", [], args.policy, ()
    if out.exists():
        return print(f"{out}: {len(data.Dataset(out))} episodes are there")
    if args.previous:
        policy, agents = load_c(args.previous), (make_agents, args.previous)
        old = data.Dataset(args.previous.run / "data")
        spans = zip(old.episode_starts, old.episode_ends, strict=True)
        before = [{name: getattr(old, name)[start:end] for name in old.ARRAYS} for start, end in spans]
    limits = dict(steps=args.max_steps, patience=args.patience)
    jobs = [dict(who=policy, seed=args.seed * 1_000_003 + len(before) + i, **limits) for i in range(args.episodes)]
    meta = dict(env=args.env, seed=args.seed, policy="C" if before else policy, img_size=64, frameskip=1)
    with EpisodePool(args.workers, args.env, 64, *agents) as pool:
        dataset = data.write_dataset(out, itertools.chain(before, pool.map(jobs)), len(before) + len(jobs), meta)
    returns = np.add.reduceat(dataset.rewards, dataset.episode_starts)[len(before) :]
    print(f"{len(jobs)} new episodes of {len(dataset)}, return {returns.mean():.1f} ± {returns.std():.1f}")


def train_v(args):
    """2. V on the frames, then mu and logvar of each frame into latents.npy."""
    dataset, path = data.Dataset(need(args, "data", "collect")), args.run / "latents.npy"
    frames, starts, first = dataset.frames, dataset.episode_starts, dataset.episode_starts[first_held_out(dataset)]
    if not (args.run / "vae.safetensors").exists():
        common.remove(path)  # which an earlier V has made
    torch.manual_seed(args.seed)
    vae = VAE(args.z_dim).to(args.device)
    if args.previous:
        common.load_fitted(vae, args.previous.run / "vae.safetensors")
    flags = dict(lr=args.lr, beta=args.beta, focus=args.focus, starts=starts, bf16=True, seed=args.seed)
    train_vae(vae, frames[:first], args.v_steps, path=args.run / "vae.safetensors", report=open_report(args), **flags)
    vae.encoder.to(memory_format=torch.channels_last)  # as in `load_models`
    with torch.inference_mode(), bfloat16(args.device):
        if not path.exists():
            z = np.empty((2, len(frames), args.z_dim), np.float32)  # small tensors in a list would scatter the memory
            for i in tqdm(range(0, len(frames), 500), "encode"):
                z[:, i : i + 500] = torch.stack(vae.encode(to_tensor(frames[i : i + 500], args.device))).float().cpu()
            common.write_atomic(path, lambda temporary: np.save(temporary, z))
        index = np.linspace(first, len(frames) - 1, 500).astype(int)
        x, moves = frames_and_motion(frames, index, starts, args.device)
        recon = vae.decode(vae.encode(x)[0]).float()
        reports.show_reconstructions(args.run / "reconstructions.png", x, recon, moves)


def train_m(args):
    """3. M on the latents."""
    dataset, latents = load_data(args)
    torch.manual_seed(args.seed)
    rnn = make_rnn(args, args.heads).to(args.device)
    if args.previous:
        common.load_fitted(rnn, args.previous.run / "rnn.safetensors")
    seen, held = np.split(np.arange(len(dataset)), [first_held_out(dataset)])
    flags = dict(lr=args.lr, seed=args.seed, path=args.run / "rnn.safetensors", report=open_report(args))
    train_mdnrnn(rnn, latents, dataset, seen, args.m_steps, **flags)
    losses = held_out_losses(rnn, latents, dataset, held)
    common.write_json(args.run / "held_out.json", losses)
    print(f"M, held out: {', '.join(f'{name} {value:.4f}' for name, value in losses.items())}")


def train_c(args):
    """4. C by CMA-ES: in the dream (M alone, one C for each --tau), or in the real environment."""
    args.device = processes.join(str(args.device))
    _, rnn, controller = load_models(args)
    mean = load_c(args.previous) if args.previous else np.zeros(controller.num_params)
    real = args.where == "real"
    with EpisodePool(args.workers, args.env, 64, make_agents, args) if real else contextlib.nullcontext() as pool:
        for name in c_names(args):
            if real:
                scores = functools.partial(real_scores, pool, args)
            else:
                rnn = rnn.to(args.device, common.fast_dtype(args.device))
                scores = functools.partial(dream_scores, make_dream(args, rnn, temperature(name)), controller)
            path = args.run / f"c_{name}.pt"
            budget = args.popsize, args.trials, args.c_steps, args.score_trials, args.sigma0, args.seed
            search = evolve(scores, mean, path, *budget, report=open_report(args))
            if RANK == 0:
                reports.write_search(path.with_suffix(".png"), search["log"])
            print(f"{path}: {controller.num_params} weights, {search['score']:.1f} in the {args.where} environment")


def test(args):
    """5. What a random policy, a C of zeros and every trained C earn in --test-episodes real episodes, and each C in as
    many dreams. A dream can be trusted if every C earns in it what it earns in the real environment."""
    vae, rnn, controller = load_models(args)
    trained = recipes.load_all_c(args) or load_c(args)  # the latter says that train-c comes first
    shown = next(iter(trained))  # is filmed in its median episode, and the C of zeros dreams at its temperature
    players = {"random": "uniform", "zero": np.zeros(controller.num_params, np.float32), **trained}
    env, seed, results = args.test_env or args.env, 777_000_000 + args.seed * 1_000, {}
    jobs = [dict(seed=seed + i, steps=args.max_steps) for i in range(args.test_episodes)]
    with EpisodePool(args.workers, env, 64, make_agents, args) as pool:
        for name, who in players.items():
            episodes = pool.returns([job | {"who": who} for job in jobs])
            results[name] = {"real": [r for r, _ in tqdm(episodes, f"test {name}", len(jobs))]}
        median = np.argsort(results[shown]["real"])[len(jobs) // 2]
        (episode,) = pool.map([jobs[median] | {"who": trained[shown]}])
    for name in ("zero", *trained):
        dream = make_dream(args, rnn, temperature(name if name in trained else shown))
        returns, _ = dream_scores(dream, controller, players[name][None], seed, len(jobs))
        results[name]["dream"] = returns[0].tolist()
    common.write_json(args.run / "test.json", {"env": env, "seed": args.seed, "returns": results})
    reports.print_returns(results)
    act = functools.partial(controller, torch.from_numpy(trained[shown])[None])
    dream = DreamEnv(make_dream(args, rnn, temperature(shown)), vae)
    reports.write_dream(args.run / "dream.gif", dream, act, args.seed, args.max_steps, episode["frames"])
    return results


def run_all(args):
    return [step(args) for step in (collect, train_v, train_m, train_c, test)][-1]


def iterate(args):
    """Section 5: C acts, M learns what comes next (z, action, and reward or done, as the recipe has it), C learns, and
    acts again. Each iteration is a run of its own with all data so far, and V, M and C go on from the one before.
    Deviations: V learns further, too, because C sees what V has not seen, and C learns where --in says."""
    table, previous, heads = [], None, f"{args.heads},action"
    for i in range(args.iterations):
        print(f"iteration {i + 1} of {args.iterations}")
        own = {name: getattr(args, name)[: i + 1][-1] for name in recipes.BUDGETS}  # the last one holds from then on
        own |= dict(run=args.run / f"iteration{i + 1}", heads=heads, previous=previous)
        previous = argparse.Namespace(**vars(args) | own)
        recipes.begin_run(previous)
        results = run_all(previous)
        returns = {**results[c_names(previous)[0]], "random": results["random"]["real"]}
        table.append({"iteration": i + 1, **{who: float(np.mean(r)) for who, r in returns.items()}})
        common.write_csv(args.run / "iterations.csv", table)


def bench(args):
    """Dream steps per second, C included, at the sizes of --env, with untrained weights."""
    from lib.speed import bench_dreaming  # here, because it imports this file

    bench_dreaming(args)


# ---- What the steps read of a run ----------------------------------------------------------------


def load_models(args):
    """V and M with their trained weights, and the controller, which has no weights of its own."""
    vae = common.load_fitted(VAE(args.z_dim), need(args, "vae.safetensors", "train-v")).requires_grad_(False)
    vae.encoder.to(memory_format=torch.channels_last)  # as the frames are: the same z, and a third less time
    path = need(args, "rnn.safetensors", "train-m")
    heads = {name.split(".")[1] for name in common.load_safetensors(path) if name.startswith("heads.")}
    rnn = common.load_fitted(make_rnn(args, ",".join(sorted(heads))), path).requires_grad_(False)
    return vae, rnn, make_controller(args)


def make_rnn(args, heads):
    return MDNRNN(args.z_dim, args.action_dim, args.hidden, args.n_mix, args.mixture, heads, args.restart)


def make_controller(args):
    return Controller(args.in_dim, args.action_dim, args.bias, args.squash)


def make_dream(args, rnn, tau=1.0):
    return Dream(rnn, recipes.load_starts(args), tau, args.max_steps, args.cell)


def make_agents(args):
    """V, M and C for the real episodes of a process of a pool."""
    torch.set_num_threads(1)
    return Agents(*load_models(args), args.cell)


STEPS = {"collect": collect, "train-v": train_v, "train-m": train_m, "train-c": train_c, "test": test}
STEPS |= {"all": run_all, "iterate": iterate, "bench": bench}


def main(argv=None):
    args = parse_args(argv, STEPS, __doc__)
    if args.step != "bench":
        recipes.begin_run(args)
    STEPS[args.step](args)


if __name__ == "__main__":
    common.run_script(main)
