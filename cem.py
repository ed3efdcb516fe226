"""Planning: CEM, its improved form, MPPI, gradient descent, and the receding-horizon loop around any. No network here.

CEM (Rubinstein, 1999) keeps a Gaussian over action sequences and moves it to where the cost is low:

    a^(m) ~ N(mean, std^2), m = 1..M          sample candidates (the first one is the mean itself)
    E = the topk candidates of least cost     keep the elites
    mean, std <- mean(E), std(E)              and again, opt_steps times

V-JEPA 2-AC (Assran et al., 2025, arXiv:2506.09985; the released code) clips the numbers of a candidate to
|a| <= maxnorm (here all of them, there all but the gripper's), and moves the Gaussian with momentum:
mean <- momentum mean + (1 - momentum) mean(E), and std alike (there with a momentum of its own).

The improved CEM (iCEM, Pinneri et al., 2020, arXiv:2008.06389) draws noise whose neighbours in time are alike, with a
power spectrum 1 / f^beta, and lets some of the elites run again. Deviations: the population does not shrink, no elite
outlives its plan, the mean is executed and not the best elite, and there is no momentum by default (theirs: 0.1).

MPPI (Williams et al., 2017, ICRA) weighs all candidates instead, and leaves the standard deviation unchanged:

    mean <- sum_m w_m a^(m),    w = softmax(-J / lambda)

Gradient descent (DINO-WM's, the released planning/gd.py) goes through the model:

    a <- a - lr dJ/da + action_noise * n,    n ~ N(0, 1)

MPC executes the first steps of the plan, observes where it really is, and plans again from there, starting from what is
left of the old plan (DINO-WM, Zhou et al., 2024, arXiv:2411.04983, section 3.3 and the released code, which executes
n_taken_actions steps; the paper executes one).

    python cem.py             # a toy problem with a known optimum, and candidate-steps per second
"""

import time
from math import inf

import numpy as np
import torch


def cem(
    cost, mean, std, num_samples=300, topk=30, opt_steps=10, generator=None,
    momentum=0.0, maxnorm=inf, noise=torch.randn, keep=0,
):  # fmt: skip
    """Solves B planning problems at once.

    Args:
        cost: candidates (B, M, T, A) -> costs (B, M), lower is better.
        mean, std: (B, T, A), where the search starts and how widely it looks around.
        num_samples, topk, opt_steps: M candidates, of which `topk` become elites, `opt_steps` times.
        generator: a torch.Generator on the device of `mean`.
        momentum, maxnorm: the share of the old Gaussian that stays, and the bound of the candidates.
        noise: draws standard normal numbers, as `torch.randn` does.
        keep: the number of elites that run again in the next iteration (iCEM).
    Returns the last mean, actions (B, T, A).
    """
    if not 2 <= topk <= num_samples:
        raise ValueError(f"topk must lie between 2 and num_samples: {topk}, {num_samples}")
    B, T, A = mean.shape
    elites = mean.new_empty(B, 0, T, A)
    for _ in range(opt_steps):
        n = noise(B, num_samples, T, A, generator=generator, device=mean.device)
        candidates = mean[:, None] + std[:, None] * n  # (B, M, T, A)
        candidates[:, 0] = mean
        kept = elites[:, :keep]  # the best come first
        candidates[:, 1 : 1 + kept.shape[1]] = kept
        candidates.clamp_(-maxnorm, maxnorm)
        elite = cost(candidates).topk(topk, dim=1, largest=False).indices  # (B, K)
        elites = candidates.gather(1, elite[:, :, None, None].expand(-1, -1, T, A))  # (B, K, T, A)
        mean, std = elites.mean(1).lerp(mean, momentum), elites.std(1).lerp(std, momentum)
    return mean


def coloured_noise(beta, dof):
    """A `noise` for `cem`: normal numbers (B, M, T, A) of variance 1 with a power spectrum 1 / f^beta in time.

    The A numbers of a planner step are A / dof environment steps of `dof` numbers each; time runs through all of them.
    """

    def noise(B, M, T, A, **options):
        L = T * A // dof  # environment steps
        spectrum = torch.fft.rfft(torch.randn(B, M, L, dof, **options), dim=2)
        f = torch.fft.rfftfreq(L, device=spectrum.device)
        scale = f.clamp(min=1 / L) ** (-beta / 2)  # the mean is as loud as the slowest wave
        both = torch.cat([scale, scale[1 : (L + 1) // 2]])  # the frequencies below zero, too
        scale = scale / both.square().mean().sqrt()
        return torch.fft.irfft(spectrum * scale[:, None], n=L, dim=2).reshape(B, M, T, A)

    return noise


def mppi(cost, mean, std, num_samples=300, opt_steps=10, temperature=0.1, generator=None):
    """Like `cem`, but with weighted candidates in the place of elites.

    `temperature` is lambda in units of the standard deviation of the candidates' costs, so that it suits any cost.
    """
    for _ in range(opt_steps):
        noise = torch.randn(len(mean), num_samples, *mean.shape[1:], generator=generator, device=mean.device)
        candidates = mean[:, None] + std[:, None] * noise  # (B, M, T, A)
        candidates[:, 0] = mean
        J = cost(candidates)  # (B, M)
        w = torch.softmax(-J / (temperature * J.std(1, keepdim=True) + 1e-9), dim=1)
        mean = torch.einsum("bm,bmta->bta", w, candidates)
    return mean


def gradient_descent(cost, actions, opt_steps=1000, lr=1.0, action_noise=0.003, low=-inf, high=inf, generator=None):
    """Moves actions (B, T, A) down the gradient of `cost`, which sees them as (B, 1, T, A) and must be differentiable.

    low, high: (A,), the bounds within which the actions are held, because a cost that clips has no gradient beyond
    them. The release leaves them free.
    """
    for _ in range(opt_steps):
        actions = actions.detach().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(cost(actions[:, None]).sum(), actions)
        noise = torch.randn(actions.shape, generator=generator, device=actions.device)
        actions = (actions.detach() - lr * gradient + action_noise * noise).clamp(low, high)
    return actions


def mpc(plan, act, num_problems, horizon, action_dim, n_taken_actions=5, max_iter=10, device="cpu", start=torch.zeros):
    """Receding-horizon control of `num_problems` worlds at once. A world that has reached its goal is left alone.

    Args:
        plan: (problems (B,) int array, mean (B, T, A)) -> actions (B, T, A), e.g. `cem` on what is seen there now.
        act: (problems (B,), actions (B, n_taken_actions, A)) -> reached (B,) bool; it executes and observes.
        horizon, action_dim: T planner steps of A numbers.
        n_taken_actions: planner steps that are executed before planning again, at most T.
        max_iter: rounds of planning and acting, at most. With one round the plan is executed in an open loop.
        start: (B, n, A) -> what the search starts from at steps that no plan has reached yet.
    Returns `success` (max_iter, num_problems) bool: whether the goal was reached within 1, 2, ... rounds.
    """
    mean = start(num_problems, horizon, action_dim).to(device)
    solved, success = np.zeros(num_problems, bool), torch.zeros(max_iter, num_problems, dtype=torch.bool)
    for i in range(max_iter):
        unsolved = np.flatnonzero(~solved)
        if len(unsolved):
            actions = plan(unsolved, mean[unsolved])
            solved[unsolved] = act(unsolved, actions[:, :n_taken_actions])
            left = actions[:, n_taken_actions:]  # warm start: the rest of the plan, then new steps
            mean[unsolved] = torch.cat([left, start(len(left), n_taken_actions, action_dim).to(left)], dim=1)
        success[i] = torch.from_numpy(solved)
    return success


def main():
    """A toy problem: the steps of an optimal plan sum up to `target`."""
    B, M, T, A, generator = 50, 300, 5, 10, torch.Generator().manual_seed(0)
    target = torch.randn(B, 1, A, generator=generator)
    mean, std = torch.zeros(B, T, A), torch.ones(B, T, A)

    def cost(a):
        return (a.sum(2) - target).pow(2).sum(-1)

    planners = {
        "cem": lambda: cem(cost, mean, std, M, 30, 30, generator),
        "icem": lambda: cem(cost, mean, std, M, 30, 30, generator, noise=coloured_noise(1.0, 2), keep=9),
        "mppi": lambda: mppi(cost, mean, std, M, 30, 0.1, generator),
        "gd": lambda: gradient_descent(cost, mean, 30, 0.1, 0.0),
    }
    print(f"mean distance to the target of {B} problems: {target.norm(dim=-1).mean():.3f}; after 30 iterations:")
    for name, plan in planners.items():
        begin = time.perf_counter()
        distance = (plan().sum(1) - target[:, 0]).norm(dim=-1).mean()
        speed = 30 * B * T * (1 if name == "gd" else M) / (time.perf_counter() - begin)
        print(f"{name:5} {distance:.3f}, {speed:.3g} candidate-steps/s")


if __name__ == "__main__":
    main()
