"""World Models by hand: V, M, C, the dream and the search, number by number."""

import math
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import vae_mdnrnn as wm
from lib import common
from lib.recipes import parse_args, temperature
from lib.worlds import DreamEnv
from test_all import SMALL, close, evolve, paraboloid


def test_z_has_the_mean_and_the_deviation_that_v_gives():
    mu, logvar = torch.randn(5, 3), torch.full((5, 3), 2 * math.log(3))
    ours, theirs = (torch.Generator().manual_seed(0) for _ in range(2))
    close(wm.sample_z(mu, logvar, ours), mu + 3 * torch.randn(5, 3, generator=theirs))


def test_what_moves_is_what_the_camera_does_not_explain():
    before, x = torch.zeros(1, 3, 5, 5), torch.full((1, 3, 5, 5), 0.1)  # the camera changes every pixel by 0.1
    x[..., 1, 2], x[..., 3, 3] = 0.4, 1.0
    moves = wm.moving(x, before)[0, 0]
    close(moves[[1, 3], [2, 3]], torch.tensor([0.2, 0.5]))  # 0.4 - 2 * 0.1, and the most that there is
    assert (moves > 0).sum() == 2


def test_the_error_of_each_pixel_counts_as_much_as_its_weight():
    x, weight, latent = torch.rand(5, 3, 4, 4), torch.rand(5, 1, 4, 4), torch.zeros(5, 8)
    loss = wm.vae_loss(x + 0.1, x, latent, latent, kl_tolerance=0, weight=weight)
    close(loss, 3 * 0.01 * weight.sum((1, 2, 3)).mean(), atol=1e-4, rtol=0)


def test_v_and_m_never_learn_from_the_last_twentieth(tmp_path, script, one_process, monkeypatch):
    seen = []
    monkeypatch.setattr(wm, "train_vae", lambda vae, frames, *_, **__: seen.append(len(frames)))
    monkeypatch.setattr(wm, "train_mdnrnn", lambda rnn, z, dataset, episodes, *_, **__: seen.append(list(episodes)))
    for step in ("collect", "train-v", "train-m"):  # six episodes of eight steps
        assert script("vae_mdnrnn", step, *SMALL, "--out", tmp_path / "run")[0] == 0
    assert seen == [5 * 8, [0, 1, 2, 3, 4]]


@torch.inference_mode()
def test_a_cold_dream_is_m_step_by_step():
    """Near a temperature of 0 z is the likeliest mean. M is told of the first step alone that it is the first."""
    rnn = wm.MDNRNN(4, 1, 8, heads="reward", restart=True).eval()
    dream = wm.Dream(rnn, (torch.ones(1, 4), torch.full((1, 4), -80.0)), tau=1e-9, cell=True)
    z, state, seen = torch.ones(2, 4), (torch.zeros(1, 2, 8),) * 2, dream.reset(torch.arange(2))
    for t in range(3):
        close(seen, torch.cat([z, state[0][0], state[1][0]], 1), atol=1e-3, rtol=0)
        a = torch.randn(2, 1)
        h, state = rnn(z[:, None], a[:, None], torch.full((2, 1), float(t == 0)), state)
        logit, mu, _ = rnn.mixture(h[:, 0])
        z = mu[..., 0].gather(-1, logit.argmax(-1, keepdim=True))[..., 0]
        seen, reward, _ = dream.step(a)
        close(reward, rnn.heads["reward"](h[:, 0])[:, 0], atol=1e-3, rtol=0)


def test_an_action_in_a_dream_is_bounded_as_in_the_world_that_is_dreamt():
    dream = wm.Dream(wm.MDNRNN(4, 3, 8), torch.zeros(2, 1, 4))
    space = DreamEnv(dream, wm.VAE(4), low=[-1, 0, 0]).action_space
    assert space.low.tolist() == [-1, 0, 0] and space.high.tolist() == [1, 1, 1]


def test_the_name_of_a_c_says_the_temperature_of_its_dream():
    assert [temperature(name) for name in ("dream_tau0.5", "dream_tau1.15", "real")] == [0.5, 1.15, 1]


def test_all_and_iterate_do_not_share_a_folder():
    one, more = (parse_args([step], wm.STEPS, "World Models.").run for step in ("all", "iterate"))
    assert (one, more) == (Path("runs/worldmodels_takecover"), Path("runs/worldmodels_takecover_iterate"))


def test_each_trial_of_a_candidate_is_on_a_track_of_its_own_and_all_candidates_meet_the_same():
    pool = types.SimpleNamespace(returns=lambda jobs: [(1000 * job["who"][0] + job["seed"], 2) for job in jobs])
    limits, params = types.SimpleNamespace(max_steps=9, patience=3), np.array([[1.0], [2.0]])
    returns, steps = wm.real_scores(pool, limits, params, seed=5, trials=3)
    assert returns.tolist() == [[1005, 1006, 1007], [2005, 2006, 2007]] and steps == 6 * 2


def test_each_generation_has_tracks_of_its_own_and_all_scores_the_same(tmp_path):
    asked = []

    def scores(params, seed, trials):
        asked.append((len(params), seed))
        return paraboloid(params, seed, trials)

    evolve(tmp_path / "c.pt", 384, scores)  # with two trials for each candidate, on the tracks `seed` and `seed + 1`
    drawn, scored = [seed for count, seed in asked if count > 1], [seed for count, seed in asked if count == 1]
    assert np.diff(drawn).min() >= 2 and len(scored) > 1 and len(set(scored)) == 1 and not set(scored) & set(drawn)


def test_the_c_that_is_kept_is_the_one_that_earned_the_score(tmp_path):
    search = evolve(tmp_path / "c.pt", 384)
    returns, _ = paraboloid(search["params"].numpy()[None], seed=0, trials=1)
    assert returns.item() == pytest.approx(search["score"], abs=1e-5)


def test_the_learning_rate_rises_before_it_falls(monkeypatch):
    rates, step, layer = [], torch.optim.Adam.step, torch.nn.Linear(1, 1)
    record = lambda self: rates.append(self.param_groups[0]["lr"]) or step(self)  # noqa: E731
    monkeypatch.setattr(torch.optim.Adam, "step", record)
    common.fit(layer, lambda: {"loss": layer.weight.square().sum()}, steps=100, lr=2.0, seed=0, name="a layer")
    assert rates[:2] == pytest.approx([0.4, 0.8], rel=1e-3) and rates[50] == pytest.approx(2 * (0.01 + 0.99 / 2))
    assert (np.diff(rates[:5]) > 0).all() and (np.diff(rates[4:]) < 0).all() and rates[-1] < 0.03
