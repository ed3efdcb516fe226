"""Planning: the cross-entropy method and the receding-horizon loop around it. No network in sight.

CEM (Rubinstein, 1999) keeps a Gaussian over action sequences and moves it to where the cost is low:

    a^(m) ~ N(mean, std^2), m = 1..M          sample candidates (the first one is the mean itself)
    E = the topk candidates of least cost     keep the elites
    mean, std <- mean(E), std(E)              and again, opt_steps times

V-JEPA 2-AC (Assran et al., 2025, arXiv:2506.09985; the released code) keeps the candidates in a ball around zero,
|a| <= maxnorm in every dimension, and moves the Gaussian with momentum: mean <- momentum mean + (1 - momentum) mean(E),
and std alike.

MPC executes the first steps of the plan, looks at where it really is, and plans again from there, starting
from what is left of the old plan (DINO-WM, Zhou et al., 2024, arXiv:2411.04983, section 3.3 and the released
code, which executes n_taken_actions steps; the paper executes one).

    python cem.py             # a toy problem with a known optimum, and candidate-steps per second
"""

import time

import numpy as np
import torch


def cem(
    cost, mean, std, num_samples=300, topk=30, opt_steps=10, generator=None, momentum=0.0, maxnorm=float("inf")
):  # fmt: skip
    """Solves B planning problems at once.

    Args:
        cost: candidates (B, M, T, A) -> costs (B, M), lower is better.
        mean, std: (B, T, A), where the search starts and how widely.
        num_samples, topk, opt_steps: M candidates, of which `topk` become elites, `opt_steps` times.
        generator: a torch.Generator on the device of `mean`.
        momentum, maxnorm: how much of the old Gaussian stays; the bound of the candidates.
    Returns the last mean, actions (B, T, A).
    Raises ValueError if there are fewer candidates than elites, or fewer than two elites.
    """
    if not 2 <= topk <= num_samples:
        raise ValueError(f"topk must lie between 2 and num_samples: {topk}, {num_samples}")
    B, T, A = mean.shape
    for _ in range(opt_steps):
        noise = torch.randn(B, num_samples, T, A, generator=generator, device=mean.device)
        candidates = mean[:, None] + std[:, None] * noise  # (B, M, T, A)
        candidates[:, 0] = mean
        candidates.clamp_(-maxnorm, maxnorm)
        elite = cost(candidates).topk(topk, dim=1, largest=False).indices  # (B, K)
        elites = candidates.gather(1, elite[:, :, None, None].expand(-1, -1, T, A))  # (B, K, T, A)
        mean, std = elites.mean(1).lerp(mean, momentum), elites.std(1).lerp(std, momentum)
    return mean


def mpc(plan, act, num_problems, horizon, action_dim, n_taken_actions=5, max_iter=10, device="cpu"):
    """Receding-horizon control of `num_problems` worlds at once; a world that reached its goal is left alone.

    Args:
        plan: (problems (B,) int array, mean (B, T, A)) -> actions (B, T, A), e.g. `cem` on what is seen there now.
        act: (problems (B,), actions (B, n_taken_actions, A)) -> reached (B,) bool; executes and observes.
        horizon, action_dim: T planner steps of A numbers.
        n_taken_actions: planner steps that are executed before planning again, at most T.
        max_iter: rounds of planning and acting, at most.
    Returns `success` (max_iter, num_problems) bool: whether the goal was reached within 1, 2, ... rounds.
    """
    if n_taken_actions > horizon:
        raise ValueError(f"cannot take {n_taken_actions} actions of a plan of {horizon}")
    mean = torch.zeros(num_problems, horizon, action_dim, device=device)
    success = torch.zeros(max_iter, num_problems, dtype=torch.bool)
    open_problems = np.arange(num_problems)
    for i in range(max_iter):
        if len(open_problems):
            actions = plan(open_problems, mean[open_problems])
            reached = act(open_problems, actions[:, :n_taken_actions])
            success[i, open_problems] = torch.as_tensor(reached)
            left = actions[:, n_taken_actions:]  # warm start: the rest of the plan, then zeros
            mean[open_problems] = torch.nn.functional.pad(left, (0, 0, 0, n_taken_actions))
        success[i] |= success[max(i - 1, 0)]
        open_problems = np.flatnonzero(~success[i])
    return success


def main():
    """Reach a target by summing steps: the optimal plan has the sum `target`, the least-norm one is target/T."""
    B, M, T, A = 50, 300, 5, 10
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(B, 1, A, generator=generator)
    mean, std = torch.zeros(B, T, A), torch.ones(B, T, A)
    start = time.perf_counter()
    plan = cem(lambda a: (a.sum(2) - target).pow(2).sum(-1), mean, std, M, 30, 30, generator)
    seconds = time.perf_counter() - start
    before, after = target.norm(dim=-1).mean(), (plan.sum(1) - target[:, 0]).norm(dim=-1).mean()
    print(f"{B} problems, {M} candidates, horizon {T}, 30 iterations: {30 * B * M * T / seconds:.3g} candidate-steps/s")
    print(f"distance to the optimum: {before:.3f} before, {after:.3f} after")


if __name__ == "__main__":
    main()
