"""Every claim of the components, in minutes, on a CPU:  python -m pytest -q test_all.py"""

import contextlib
import copy
import errno
import io
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import types
import urllib.error
import urllib.request
import zipfile
from functools import partial
from pathlib import Path
from unittest import mock

import imageio.v3 as imageio
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal
from torchvision import models, transforms

import cem
import data
import decoders
import encoders
import plan
import predictor
import released
import study
import train
import vae_mdnrnn as wm
import vjepa
from data import UserError
from vae_mdnrnn import to_tensor
from weights import load_weights, resample_positions, resnet_names, vit_names, vjepa2_names

HERE = Path(__file__).parent
TINY = ["--epochs", "2", "--depth", "1", "--heads", "2", "--mlp-dim", "16"]


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers in every run."""
    torch.manual_seed(0)


@pytest.fixture
def script(monkeypatch, capsys):
    """Runs a script's main in this process: script("train", "--epochs", 1) -> (exit code, stdout, stderr)."""

    def run(name, *argv):
        monkeypatch.setattr(sys, "argv", [name, *map(str, argv)])
        module = sys.modules[name]
        main = (lambda: train.train(train.get_args())) if name == "train" else module.main
        capsys.readouterr()
        code = 0
        try:
            data.run_script(main)
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """Thirty short episodes of PointMaze."""
    path = tmp_path_factory.mktemp("data") / "pointmaze"
    return data.collect(path, "pointmaze", episodes=30, steps=6, frameskip=5, img_size=64, seed=3, workers=2)


@pytest.fixture
def workplace(tmp_path, monkeypatch, dataset):
    """An empty folder to run scripts in, with the data set where they look for it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "pointmaze").symlink_to(dataset.path)
    return tmp_path


def fake_dataset(path, lengths, frameskip=1, dof=2):
    """Episodes whose numbers say where they come from: action = 1000 * episode + environment step."""

    def episodes():
        for e, length in enumerate(lengths):
            actions = 1000 * e + np.arange(length * frameskip, dtype=np.float32).repeat(dof)
            yield {
                "frames": np.full((length, 8, 8, 3), e, np.uint8),
                "states": np.full((length, 4), e, np.float32),
                "actions": actions.reshape(length, -1),
                "rewards": np.zeros(length, np.float32),
                "dones": np.zeros(length, bool),
            }

    meta = dict(env="pointmaze", seed=0, policy="none", img_size=8, frameskip=frameskip)
    return data.write_dataset(path, episodes(), len(lengths), meta)


# -- data.py ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maze", ["UMaze", "Medium", "Large"])
def test_pointmaze_is_the_packages_maze_with_five_physics_steps(maze):
    import gymnasium as gym

    env = data.PointMaze(maze)
    reference = gym.make(f"PointMaze_{maze}-v3").unwrapped.point_env
    reference.reset(seed=0)
    reference.frame_skip = 5
    rng = np.random.default_rng(0)
    state = env.sample_state(rng)
    env.set_state(state)
    reference.set_state(state[:2], state[2:])
    for action in rng.uniform(-1, 1, (300, 1)) * [1, -1] + rng.uniform(-0.3, 0.3, (300, 2)):  # into the walls, too
        env.step(action, render=False)
        reference.step(action)
        np.testing.assert_allclose(env.state, np.r_[reference.data.qpos, reference.data.qvel], atol=1e-12)


def test_threaded_simulation_equals_stepping():
    env, rng = data.PointMaze(), np.random.default_rng(1)
    starts = np.stack([env.sample_state(rng) for _ in range(7)])
    actions = rng.uniform(-1.5, 1.5, (7, 25, 2))
    final = env.simulate(starts, actions)
    for start, sequence, end in zip(starts, actions, final, strict=True):
        env.set_state(start)
        for action in sequence:
            env.step(action, render=False)
        np.testing.assert_allclose(env.state, end, atol=1e-9)


def test_looking_does_not_change_what_happens():
    states = []
    for render in (False, True):
        env, rng = data.PointMaze(), np.random.default_rng(5)
        env.set_state(env.sample_state(rng))
        for action in rng.uniform(-1, 1, (100, 2)):
            env.step(action, render)
        states.append(env.state)
    np.testing.assert_array_equal(*states)


@pytest.mark.parametrize("shift", data.SHIFTS)
def test_another_look_is_seen_and_not_felt(shift):
    plain, other = data.make_env("pointmaze"), data.make_env("pointmaze", shift=shift)
    rng, frames = np.random.default_rng(0), []
    state = plain.sample_state(rng)
    for env in (plain, other):
        env.set_state(state)
        frames.append([env.render().astype(int) for _ in range(2)])
        for action in np.random.default_rng(1).uniform(-1, 1, (30, 2)):
            env.step(action)
    assert (plain.state == other.state).all()
    difference = np.abs(frames[0][0] - frames[1][0])
    assert difference.max() > 20 and (frames[0][0] == frames[0][1]).all()
    assert (frames[1][0] == frames[1][1]).all() == (shift in ("colours", "light", "camera"))  # the others change


@pytest.mark.parametrize("maze", ["UMaze", "Large"])
def test_sampled_states_are_clear_of_the_walls_and_everywhere_else(maze):
    env, rng = data.PointMaze(maze), np.random.default_rng(0)
    xy = np.stack([env.sample_state(rng) for _ in range(2000)])[:, :2]
    blocks = [i for i in range(env.model.ngeom) if env.model.geom(i).name.startswith("block")]
    outside = np.abs(xy[:, None] - env.model.geom_pos[blocks][None, :, :2]) - env.model.geom_size[blocks][None, :, :2]
    assert np.linalg.norm(outside.clip(min=0), axis=-1).min() > env.BALL_RADIUS
    rows, cols = env.free.shape
    seen = {(int(rows / 2 - y), int(x + cols / 2)) for x, y in xy}
    assert seen == set(map(tuple, np.argwhere(env.free)))


def test_camera_sees_the_ball_where_it_is_and_no_goal_marker():
    env = data.PointMaze("UMaze", 64)
    for x, y in [(-1, 1), (1, 1), (1.2, -0.8), (-1.3, -1.2)]:
        env.set_state(np.array([x, y, 0, 0]))
        frame = env.observe()["visual"].astype(float)
        green = (frame[..., 1] - frame[..., [0, 2]].max(-1)).clip(min=20) - 20
        rows, cols = np.indices(green.shape)
        center = np.array([(green * cols).sum(), (green * rows).sum()]) / green.sum() + 0.5
        np.testing.assert_allclose(center, [(x + 2.5) / 5 * 64, (2.5 - y) / 5 * 64], atol=0.6)
        assert not (frame[..., 0] > 1.8 * frame[..., 1]).any()  # nothing red
        np.testing.assert_array_equal(frame[0, 0], frame[-1, -1])  # wall in every corner: the whole maze is in view


def test_collection_is_consistent_and_does_not_depend_on_the_workers(dataset, tmp_path):
    alone = data.collect(tmp_path / "d", "pointmaze", 4, 6, 5, 64, seed=3, workers=1)
    for name in data.Dataset.ARRAYS:
        np.testing.assert_array_equal(getattr(alone, name), getattr(dataset, name)[:24])
    env = data.PointMaze()
    env.set_state(dataset.states[0].astype(float))
    for action in dataset.actions[0].reshape(5, 2):
        obs, *_ = env.step(action)
    np.testing.assert_allclose(obs["proprio"], dataset.states[1], atol=1e-4)
    np.testing.assert_array_equal(obs["visual"], dataset.frames[1])
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_windows_stay_in_their_episode_and_concatenate_actions(tmp_path):
    dataset = fake_dataset(tmp_path / "d", [3, 9, 25], frameskip=1)
    windows = data.Windows(dataset, np.arange(3), num_frames=2, frameskip=4)
    assert len(windows) == 0 + 2 + 18  # episodes of 9 and 25 steps hold 9 - 8 + 1 and 25 - 8 + 1 windows
    tokens = np.arange(37)[:, None, None]
    batch = windows.batch(np.arange(len(windows)), tokens)
    assert batch["action"].shape == (20, 2, 8)
    for visual, states, action in zip(batch["visual"], batch["proprio"], batch["action"], strict=True):
        assert len(set((action // 1000).ravel()) | set(states.ravel())) == 1  # one episode
        steps = action.reshape(-1, 2)[:, 0] % 1000
        assert (np.diff(steps) == 1).all() and visual[1, 0, 0] - visual[0, 0, 0] == 4
        assert visual[0, 0, 0] == steps[0] + dataset.episode_starts[int(action[0, 0] // 1000)]


def test_a_data_set_is_collected_beside_another_process_that_does(tmp_path):
    other = tmp_path / f".d.{os.getppid()}.partial"  # a process that runs
    other.mkdir()
    assert len(fake_dataset(tmp_path / "d", [4, 4])) == 2 and other.exists()


def test_a_single_episode_is_too_few(tmp_path):
    dataset = fake_dataset(tmp_path / "d", [9])
    with pytest.raises(UserError, match="has 1 episode: two are needed"):
        data.Windows(dataset, dataset.split()[0], 2, 1)


@pytest.mark.parametrize("meta", [[], {"rows": 4}, {"rows": 4, "version": data.VERSION, "env": "pointmaze"}])
def test_a_foreign_meta_file_is_no_data_set(meta, tmp_path):
    path = fake_dataset(tmp_path / "d", [4]).path
    (path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="is not a whole data set .meta.json"):
        data.Dataset(path)


def test_statistics_and_split_are_by_episode(tmp_path):
    dataset = fake_dataset(tmp_path / "d", [4] * 20, frameskip=2)
    train_episodes, val_episodes = dataset.split()
    assert len(val_episodes) == 2 and not set(train_episodes) & set(val_episodes)
    mean, std = dataset.statistics(train_episodes)["proprio"]
    np.testing.assert_allclose(mean, train_episodes.mean(), rtol=1e-5)
    np.testing.assert_allclose(std, train_episodes.std(), rtol=1e-4)
    assert dataset.statistics(train_episodes)["action"][0].shape == (2,)


def test_a_full_disk_leaves_nothing(tmp_path, script, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(data.NpyWriter, "append", full)
    code, _, err = script("data", "--episodes", 2, "--steps", 2, "--out", tmp_path / "d")
    assert code == 2 and "Traceback" not in err
    assert err.splitlines()[-1].startswith("error: cannot write") and "No space left" in err
    assert not list(tmp_path.iterdir())


def test_a_killed_collection_leaves_nothing_and_its_workers_end(tmp_path):
    command = [sys.executable, HERE / "data.py", "--episodes", "5000", "--out", tmp_path / "d", "--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    frames = tmp_path / f".d.{process.pid}.partial" / "frames.npy"
    while not (frames.exists() and frames.stat().st_size > 10**5):
        assert process.poll() is None
        time.sleep(0.05)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    workers = workers.read_text().split() if workers.exists() else []
    process.kill()
    process.wait()
    assert not (tmp_path / "d").exists()
    data.collect(tmp_path / "d", "pointmaze", 2, 2, 5, 64, workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["d"]
    deadline = time.time() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.time() < deadline, "orphaned workers"
        time.sleep(0.05)


def _die(_):
    os.kill(os.getpid(), signal.SIGKILL)


def _die_once(i, path):
    if i == 5 and not path.exists():
        path.touch()
        _die(i)
    return i


def test_a_worker_that_dies_is_replaced_and_one_that_always_dies_is_reported(tmp_path):
    with data.Workers(2) as pool:
        assert list(pool.map(partial(_die_once, path=tmp_path / "dead"), range(20), 2)) == list(range(20))
        with pytest.raises(UserError, match="worker process died"):
            list(pool.map(_die, range(4)))


def test_inspect_prints_a_table_and_draws_a_contact_sheet(dataset, script):
    code, out, _ = script("data", "--inspect", dataset.path)
    assert code == 0 and "(180, 64, 64, 3)" in out
    import imageio.v3 as imageio

    assert imageio.imread(dataset.path / "contact_sheet.png").shape == (8 * 66, 10 * 66, 3)


# -- cem.py -------------------------------------------------------------------------------------------------


def test_cem_step_by_hand():
    seen = []

    def cost(actions):
        seen.append(actions.clone())
        return (actions - 3).square().sum((-1, -2))

    mean, std = torch.full((2, 1, 2), 0.5), torch.full((2, 1, 2), 2.0)
    result = cem.cem(cost, mean, std, 20, 4, 1, torch.Generator().manual_seed(0))
    (actions,) = seen
    torch.testing.assert_close(actions[:, 0], mean)  # the first candidate is the mean
    noise = torch.randn(2, 20, 1, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(actions[:, 1:], (0.5 + 2 * noise)[:, 1:])
    for b in range(2):
        best = sorted(actions[b], key=lambda a: (a - 3).square().sum().item())[:4]
        torch.testing.assert_close(result[b], torch.stack(best).mean(0))
    cem.cem(cost, mean, std, 20, 4, 2, torch.Generator().manual_seed(0))
    elites = seen[1].flatten(2)[0, (seen[1][0] - 3).square().sum((-1, -2)).argsort()[:4]]
    generator = torch.Generator().manual_seed(0)
    torch.randn(2, 20, 1, 2, generator=generator)
    second = torch.randn(2, 20, 1, 2, generator=generator)[0, 1:].flatten(1)
    torch.testing.assert_close(seen[2][0, 1:].flatten(1), elites.mean(0) + elites.std(0) * second)  # n - 1


def test_cem_finds_different_optima_of_a_batch():
    target = torch.tensor([-1.0, 0.0, 2.0]).view(3, 1, 1, 1)
    cost = lambda a: (a - target).square().sum((-1, -2))  # noqa: E731
    found = cem.cem(cost, torch.zeros(3, 4, 2), torch.ones(3, 4, 2), 200, 20, 20, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, target[:, 0].expand(3, 4, 2), atol=0.02, rtol=0)
    with pytest.raises(ValueError):
        cem.cem(cost, torch.zeros(3, 4, 2), torch.ones(3, 4, 2), num_samples=5, topk=6)


def test_mpc_warm_starts_and_leaves_solved_worlds_alone():
    position, means, acted = torch.zeros(3), [], []

    def plan_step(problems, mean):
        means.append(mean)
        return torch.arange(3.0).view(1, 3, 1).expand(len(problems), -1, -1) + 1

    def act(problems, actions):
        acted.append(list(problems))
        position[problems] += actions.sum((1, 2))
        return position[problems] >= torch.tensor([6.0, 3.0, 100.0])[problems]

    success = cem.mpc(plan_step, act, 3, horizon=3, action_dim=1, n_taken_actions=2, max_iter=3)
    assert acted == [[0, 1, 2], [0, 2], [2]]
    assert success.tolist() == [[False, True, False], [True, True, False], [True, True, False]]
    assert means[1][0].flatten().tolist() == [3, 0, 0]  # what was left of the plan, then zeros


def test_cem_with_momentum_stays_in_its_ball():
    generator = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    seen = []
    cost = lambda a: seen.append(a) or (a - 2).square().sum((2, 3))  # noqa: E731
    mean, std = torch.full((1, 2, 3), 0.2), torch.ones(1, 2, 3)
    out = cem.cem(cost, mean, std, 50, 5, 1, generator(), momentum=0.25, maxnorm=0.5)
    elites = seen[0][0][cost(seen[0])[0].topk(5, largest=False).indices]
    torch.testing.assert_close(out[0], 0.75 * elites.mean(0) + 0.25 * mean[0])
    assert seen[0].abs().max() == 0.5
    seen.clear()
    out = cem.cem(cost, mean, std, 50, 5, 2, generator(), momentum=0.25)
    first = seen[0][0][(seen[0] - 2).square().sum((2, 3))[0].topk(5, largest=False).indices]
    noise = (seen[1][0, 1:] - (0.75 * first.mean(0) + 0.25 * mean[0])) / (0.75 * first.std(0) + 0.25 * std[0])
    source = generator()
    _, second = (torch.randn(1, 50, 2, 3, generator=source) for _ in range(2))
    torch.testing.assert_close(noise, second[0, 1:], atol=1e-4, rtol=1e-4)  # the deviation has momentum, too


def test_improved_cem_keeps_its_best_and_draws_by_the_noise_it_is_given():
    seen = []
    cost = lambda a: seen.append(a.clone()) or (a - 2).square().sum((2, 3))  # noqa: E731
    noise = lambda *shape, **_: torch.rand(shape)  # noqa: E731
    cem.cem(cost, torch.zeros(2, 3, 4), torch.ones(2, 3, 4), 20, 5, 2, noise=noise, keep=2)
    assert (seen[0] >= 0).all()
    best = (seen[0][1] - 2).square().sum((1, 2)).argsort()[:2]
    assert torch.equal(seen[1][1, 1:3], seen[0][1, best])


def test_coloured_noise_has_variance_one_and_neighbours_alike():
    white, red = (cem.coloured_noise(beta, 2)(3, 4000, 5, 10) for beta in (0.0, 2.0))
    for noise in (white, red):
        assert noise.shape == (3, 4000, 5, 10)
        torch.testing.assert_close(noise.var((0, 1)), torch.ones(5, 10), atol=0.06, rtol=0)
    alike = lambda x: (x[..., 2:] * x[..., :-2]).mean()  # noqa: E731  (one environment step apart: DoF is 2)
    assert abs(alike(white)) < 0.02 and alike(red) > 0.7
    torch.manual_seed(1)
    expected = torch.randn(1, 2, 25, 2)
    torch.manual_seed(1)
    torch.testing.assert_close(cem.coloured_noise(0.0, 2)(1, 2, 5, 10).view(1, 2, 25, 2), expected)


def test_mppi_by_hand():
    seen = []
    cost = lambda a: seen.append(a) or (a - 1).square().sum((2, 3))  # noqa: E731
    mean = cem.mppi(cost, torch.zeros(2, 2, 3), torch.ones(2, 2, 3), 30, 1, 0.5)
    for b in range(2):
        J = (seen[0][b] - 1).square().sum((1, 2))
        weights = torch.exp(-(J - J.min()) / (0.5 * J.std()))
        torch.testing.assert_close(mean[b], (weights[:, None, None] * seen[0][b]).sum(0) / weights.sum())


def test_gradient_descent_by_hand():
    start, target = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    cost = lambda a: (a - target[:, None]).square().sum((2, 3))  # noqa: E731
    generator = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    noise = torch.randn(3, 2, 4, generator=generator())
    with torch.no_grad():  # as `plan.solve` calls it
        after = cem.gradient_descent(cost, start, 1, lr=0.1, action_noise=0.3, generator=generator())
        held = cem.gradient_descent(cost, start, 50, 0.1, 0.0, torch.full((4,), -0.2), torch.full((4,), 0.3))
    torch.testing.assert_close(after, start - 0.1 * 2 * (start - target) + 0.3 * noise)
    torch.testing.assert_close(held, target.clamp(-0.2, 0.3))
    assert not after.requires_grad and not start.requires_grad


def test_mpc_starts_new_steps_where_it_is_told():
    means = []
    cem.mpc(
        lambda _, mean: means.append(mean) or torch.zeros_like(mean), lambda problems, _: [False] * len(problems),
        2, horizon=3, action_dim=1, n_taken_actions=2, max_iter=2, start=lambda *shape: torch.full(shape, 7.0),
    )  # fmt: skip
    assert means[0].flatten().tolist() == [7] * 6 and means[1][0].flatten().tolist() == [0, 7, 7]


# -- vae_mdnrnn.py ------------------------------------------------------------------------------------------


def number_of_parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("z_dim, count", [(32, 4_348_547), (64, 4_446_915)])
def test_vae_has_the_papers_number_of_parameters(z_dim, count):
    vae = wm.VAE(z_dim)
    assert number_of_parameters(vae) == count
    recon, mu, logvar = vae(torch.rand(2, 3, 64, 64))
    assert recon.shape == (2, 3, 64, 64) and mu.shape == logvar.shape == (2, z_dim)


def test_v_decodes_its_one_pixel_as_a_transposed_convolution_does():
    layer, x = wm.VAE(4).decoder[2], torch.randn(3, 1024, 1, 1)
    expected = F.conv_transpose2d(x, layer.weight, layer.bias, stride=2)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_m_and_c_have_the_papers_number_of_parameters(tmp_path):
    car = wm.MDNRNN(32, 3, 256, mixture="dimension")
    doom = wm.MDNRNN(64, 1, 512, mixture="dimension", heads="done", restart=True)
    assert number_of_parameters(car) - 4 * 256 == 422_368 and number_of_parameters(doom) - 4 * 512 == 1_678_785
    for env, count in {"takecover": 1088, "carracing": 867, "pointmaze": 578}.items():
        args = wm.parse_args(["all", "--env", env, "--out", str(tmp_path)])
        assert wm.make_controller(args).num_params == count


def test_vae_loss_is_squared_error_plus_kl():
    mu, logvar, x = torch.randn(5, 8), torch.randn(5, 8), torch.rand(5, 3, 4, 4)
    posterior = torch.distributions.Normal(mu, (logvar / 2).exp())
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(1)
    expected = 4 * 4 * 3 * 0.01 + 2.0 * kl.mean()
    torch.testing.assert_close(wm.vae_loss(x + 0.1, x, mu, logvar, beta=2.0, kl_tolerance=0.0), expected)
    free = wm.vae_loss(x, x, 0 * mu, 0 * logvar, kl_tolerance=0.5)
    assert free.item() == pytest.approx(0.5 * 8)


@pytest.mark.parametrize("mixture", ["vector", "dimension"])
def test_mdn_nll_is_torch_distributions(mixture):
    rnn = wm.MDNRNN(6, 2, 16, mixture=mixture)
    z = torch.randn(3, 7, 6)
    logpi, mu, logsigma = rnn.mixture(torch.randn(3, 7, 16) * 5)
    library = MixtureSameFamily(Categorical(logits=logpi), Independent(Normal(mu, logsigma.exp()), 1))
    expected = -library.log_prob(z.unflatten(-1, (mu.shape[-3], mu.shape[-1]))).sum(-1)
    torch.testing.assert_close(wm.mdn_nll(logpi, mu, logsigma, z), expected, rtol=1e-5, atol=1e-5)


def test_mdn_nll_is_finite_for_a_tiny_sigma():
    rnn = wm.MDNRNN(2, 1, 4)
    torch.nn.init.constant_(rnn.mdn.bias, -100.0)
    loss = wm.mdn_nll(*rnn.mixture(torch.zeros(1, 4)), torch.full((1, 2), 3.0)).sum()
    loss.backward()
    assert loss.isfinite() and rnn.mdn.weight.grad.isfinite().all()


@pytest.mark.parametrize("groups", [1, 3])
def test_mdn_samples_have_the_moments_of_torch_distributions(groups):
    torch.manual_seed(0)
    logpi = torch.randn(groups, 4).log_softmax(-1)
    mu, logsigma = torch.randn(groups, 4, 3 // groups), torch.randn(groups, 4, 3 // groups)
    z = wm.mdn_sample(*(t.expand(200_000, *t.shape) for t in (logpi, mu, logsigma)))
    library = MixtureSameFamily(Categorical(logits=logpi), Independent(Normal(mu, logsigma.exp()), 1))
    torch.testing.assert_close(z.mean(0), library.mean.flatten(), atol=0.05, rtol=0)
    torch.testing.assert_close(z.var(0), library.variance.flatten(), atol=0, rtol=0.05)


def test_temperature():
    torch.manual_seed(0)
    logpi, mu, logsigma = torch.randn(1, 5).log_softmax(-1), torch.randn(1, 5, 3), torch.zeros(1, 5, 3)
    many = [t.expand(20_000, *t.shape) for t in (logpi, mu, logsigma)]
    cold = wm.mdn_sample(*many, tau=1e-8)
    torch.testing.assert_close(cold, mu[0, logpi.argmax()].expand(20_000, 3), atol=1e-2, rtol=0)
    spread = [wm.mdn_sample(*many, tau=tau).var(0).sum() for tau in (0.1, 0.5, 1.0, 2.0)]
    assert spread == sorted(spread)
    one = torch.zeros(20_000, 1, 1, 2)
    assert wm.mdn_sample(one[..., 0], one, one, tau=4.0).std() == pytest.approx(2, abs=0.05)  # the variance, times tau


def test_m_is_causal_and_its_loss_ignores_what_is_not_there():
    rnn = wm.MDNRNN(4, 1, 8, heads="done,reward,action", restart=True)
    z, a, reward, done = torch.randn(2, 6, 4), torch.randn(2, 6, 1), torch.randn(2, 6), torch.zeros(2, 6)
    valid, restart = torch.ones(2, 6, dtype=torch.bool), torch.zeros(2, 6)
    valid[1, 4:] = False
    first = wm.mdnrnn_loss(rnn, z, a, reward, done, valid, restart)
    assert set(first) == {"loss", "nll", "done", "reward", "action"}
    z[1, 4:], a[1, 4:], reward[1, 4:], done[1, 4:] = 9, 9, 9, 1
    for name, value in wm.mdnrnn_loss(rnn, z, a, reward, done, valid, restart).items():
        torch.testing.assert_close(value, first[name], msg=name)
    z[0, 5] = 9
    assert wm.mdnrnn_loss(rnn, z, a, reward, done, valid, restart)["nll"] > first["nll"]


def test_m_predicts_what_follows_the_step_that_it_sees():
    """h_t, which has seen z_0..t and a_0..t, is for z_{t+1}, reward_t, done_t and a_{t+1}: one step at a time."""
    rnn = wm.MDNRNN(4, 2, 8, heads="done,reward,action", restart=True)
    z, a, reward, done = (
        torch.randn(1, 5, 4),
        torch.randn(1, 5, 2),
        torch.randn(1, 5),
        torch.tensor([[0, 0, 0, 0, 1.0]]),
    )
    valid, restart = torch.ones(1, 5, dtype=torch.bool), torch.tensor([[1.0, 0, 0, 0, 0]])
    losses, state, parts = wm.mdnrnn_loss(rnn, z, a, reward, done, valid, restart), None, []
    for t in range(5):
        h, state = rnn(z[:, t : t + 1], a[:, t : t + 1], restart[:, t : t + 1], state)
        parts.append({
            "reward": (rnn.heads["reward"](h[0, 0])[0] - reward[0, t]).square(),
            "done": -[1 - (p := torch.sigmoid(rnn.heads["done"](h[0, 0])[0])), p][int(done[0, t])].log()
            * [1, wm.DONE_WEIGHT][int(done[0, t])],
        })  # fmt: skip
        if t < 4:
            parts[-1]["nll"] = wm.mdn_nll(*rnn.mixture(h[0, 0]), z[0, t + 1]) / 4
            parts[-1]["action"] = (rnn.heads["action"](h[0, 0]) - a[0, t + 1]).square().mean()
    for name in ("nll", "done", "reward", "action"):
        expected = torch.stack([part[name] for part in parts if name in part]).mean()
        torch.testing.assert_close(losses[name], expected, msg=name)


@pytest.mark.parametrize("cell", [False, True])
def test_an_agent_acts_before_m_sees_its_action(cell, monkeypatch):
    """Frame by frame: z = V(o), a = C(z, h), h = M(z, a, h); M is told of the first step alone that it is the first."""
    vae, rnn, seen = wm.VAE(4).eval(), wm.MDNRNN(4, 1, 8, restart=True).eval(), []
    monkeypatch.setattr(wm, "sample_z", lambda mu, logvar: mu)
    controller = wm.Controller(12 + 8 * cell, 1)
    recorded = lambda params, features: (seen.append(features), controller(params, features))[1]  # noqa: E731
    params, frames = torch.randn(controller.num_params), np.random.default_rng(0).integers(0, 255, (3, 64, 64, 3), "B")
    agent, state = wm.Agent(vae, rnn, recorded, cell, params), (torch.zeros(1, 1, 8), torch.zeros(1, 1, 8))
    with torch.inference_mode():
        for t, frame in enumerate(frames):
            action = torch.from_numpy(agent(frame))
            z = vae.encode(wm.to_tensor(frame[None]))[0]
            expected = torch.cat([z, state[0][0], state[1][0]] if cell else [z, state[0][0]], 1)
            torch.testing.assert_close(seen[t], expected)
            _, state = rnn(z[None], action[None, None], torch.tensor([[float(t == 0)]]), state)


def test_m_steps_as_it_runs():
    rnn = wm.MDNRNN(4, 1, 8, restart=True)
    z, a, restart = torch.randn(2, 5, 4), torch.randn(2, 5, 1), torch.rand(2, 5)
    state, steps = None, []
    for t in range(5):
        h, state = rnn(z[:, t : t + 1], a[:, t : t + 1], restart[:, t : t + 1], state)
        steps.append(h)
    torch.testing.assert_close(rnn(z, a, restart)[0], torch.cat(steps, 1))


def test_m_sees_whole_episodes(tmp_path, monkeypatch):
    dataset, seen = fake_dataset(tmp_path / "d", [3, 40, 10], dof=1), set()

    def loss(rnn, z, a, reward, done, valid, restart):
        for actions, real, begins in zip(a[..., 0], valid, restart, strict=True):
            episode = int(actions[0] // 1000)
            assert actions[real].tolist() == [1000 * episode + t for t in range([3, 40, 10][episode])]
            assert begins.tolist() == [1] + [0] * (len(begins) - 1)
            seen.add(episode)
        return {"loss": rnn.mdn.weight.sum()}

    monkeypatch.setattr(wm, "mdnrnn_loss", loss)
    latents = np.zeros((53, 2), np.float32), np.zeros((53, 2), np.float32)
    wm.train_mdnrnn(wm.MDNRNN(2, 1, 4), latents, dataset, 20, batch_size=2)
    assert seen == {0, 1, 2}


def test_controller_is_one_linear_layer_for_each_row():
    controller = wm.Controller(5, 3, squash="car")
    params, features = torch.randn(4, controller.num_params), torch.randn(4, 5)
    a = controller(params, features)
    for i in range(4):
        raw = torch.tanh(params[i, :15].view(3, 5) @ features[i] + params[i, 15:])
        torch.testing.assert_close(a[i], torch.stack([raw[0], (raw[1] + 1) / 2, raw[2].clamp(0, 1)]))


def test_random_policies():
    space = data.gym.spaces.Box(-1, 1, (2,))
    held = wm.RandomPolicy("hold", space, np.random.default_rng(0))
    actions = np.array([held(None) for _ in range(2000)])
    lengths = np.diff(np.flatnonzero(np.any(np.diff(actions, axis=0) != 0, 1)))
    assert lengths.min() == 1 and 50 < lengths.max() < 100
    brown = wm.RandomPolicy("brownian", space, np.random.default_rng(0))
    steps = np.diff([brown(None) for _ in range(2000)], axis=0)
    inner = steps[np.abs(steps).max(1) > 0]
    assert 0.1 < inner.std() < 0.15  # sqrt(1 / 50) = 0.141, less at the bounds


@pytest.mark.parametrize("patience, steps", [(math.inf, 9), (4, 9), (3, 8), (2, 3)])
def test_a_rollout_is_cut_short_after_steps_without_a_reward(patience, steps):
    class World:
        state, rewards = np.zeros(1), iter([1, -1, 0, 1, 1, -1, -1, -1, 1])

        def reset(self, seed):
            return {"visual": np.zeros((2, 2, 3), np.uint8)}, {}

        def step(self, action):
            return *self.reset(0)[:1], next(self.rewards), False, False, {}

    assert len(wm.rollout(World(), lambda frame: np.zeros(1), 0, 9, patience)["rewards"]) == steps


def tiny_dream(tau=1.0, max_steps=20, heads="done,reward", p_done=None):
    torch.manual_seed(0)
    rnn = wm.MDNRNN(4, 1, 8, heads=heads, restart=True).eval().requires_grad_(False)
    if p_done:
        torch.nn.init.zeros_(rnn.heads["done"].weight)
        torch.nn.init.constant_(rnn.heads["done"].bias, np.log(p_done / (1 - p_done)) + np.log(wm.DONE_WEIGHT))
    return wm.Dream(rnn, (torch.randn(6, 4), torch.zeros(6, 4)), tau, max_steps, cell=True)


def test_dream_scores_count_each_dream_to_its_own_end():
    """With a reward of 1 scores are the geometric lifetimes that done's probability gives."""
    scores = wm.dream_scores(tiny_dream(1, 300, "done", 0.05), wm.Controller(20, 1), np.zeros((40, 21), "f"), 0, 50)
    assert scores.shape == (40, 50) and scores.min() == 1
    assert scores.mean() == pytest.approx(20, abs=1.5) and scores.std() == pytest.approx(20, abs=3)


def test_dream_scores_give_each_candidate_its_own_weights():
    dream = tiny_dream(heads="reward")
    for parameter in dream.rnn.lstm.parameters():
        torch.nn.init.zeros_(parameter)
    dream.rnn.lstm.weight_ih_l0[:, 4] = 1.0  # only the action reaches M
    torch.nn.init.ones_(dream.rnn.heads["reward"].weight)
    params = torch.zeros(3, 21)
    params[:, -1] = torch.tensor([-2.0, 0.0, 2.0])
    scores = wm.dream_scores(dream, wm.Controller(20, 1), params, 0, 2).mean(1)
    assert scores[0] < scores[1] < scores[2]


def test_a_dream_lasts_its_limit_and_repeats_with_its_seed():
    params = torch.randn(3, 21)
    scores = [wm.dream_scores(tiny_dream(heads="reward"), wm.Controller(20, 1), params, s, 4) for s in (1, 1, 2)]
    assert np.array_equal(scores[0], scores[1]) and not np.array_equal(scores[0], scores[2])
    assert (wm.dream_scores(tiny_dream(heads=""), wm.Controller(20, 1), params, 0, 4) == 20).all()


def test_dream_env_is_a_gymnasium_environment():
    from gymnasium.utils.env_checker import check_env

    env = wm.DreamEnv(tiny_dream(), wm.VAE(4))
    check_env(env, skip_render_check=True)
    env.reset(seed=0)
    assert env.render().shape == (64, 64, 3) and env.render().dtype == np.uint8


def test_evolve_finds_an_optimum_and_resumes_bit_for_bit(tmp_path):
    def scores(params, seed, trials):
        return -np.square(params - np.arange(5) / 5).sum(1, keepdims=True).repeat(trials, 1)

    def evolve(name, popsize, generations, seed=0):
        return wm.evolve(scores, np.zeros(5), tmp_path / name, popsize, 2, generations, 3, seed=seed)

    whole = evolve("whole.pt", 8, 60)
    assert whole["score"] > -1e-3
    evolve("parts.pt", 8, 23)
    parts = evolve("parts.pt", 8, 60)
    assert torch.equal(parts["params"], whole["params"]) and parts["fitness"] == whole["fitness"]
    with pytest.raises(UserError, match="was begun with --seed 0: go on with that"):
        evolve("parts.pt", 8, 60, seed=1)
    with pytest.raises(UserError, match="was begun with --popsize 8"):
        evolve("parts.pt", 6, 60)


def test_fit_resumed_equals_fit_at_once(tmp_path, monkeypatch):
    frames = np.random.default_rng(0).integers(0, 255, (20, 64, 64, 3), np.uint8)

    def fit(name):
        torch.manual_seed(3)
        return wm.train_vae(wm.VAE(2), frames, 6, 4, checkpoint=tmp_path / name)

    whole, real_loss, steps, clock = fit("whole.pt"), wm.vae_loss, iter(range(100)), iter(range(0, 10**6, 100))

    def dies(*args):
        if next(steps) == 4:
            raise KeyboardInterrupt
        return real_loss(*args)

    monkeypatch.setattr(wm.time, "monotonic", lambda: next(clock))  # a checkpoint after every step
    monkeypatch.setattr(wm, "vae_loss", dies)
    with pytest.raises(KeyboardInterrupt):
        fit("parts.pt")
    assert wm.load_tensors(tmp_path / "parts.pt")["step"] == 4
    monkeypatch.setattr(wm, "vae_loss", real_loss)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), fit("parts.pt").parameters(), strict=True))


def test_a_loss_that_is_no_number_is_an_error():
    with pytest.raises(UserError, match="loss is"):
        wm.train_vae(wm.VAE(2), np.zeros((8, 64, 64, 3), np.uint8), 5, 4, lr=1e12)


SMALL = (
    "--env pointmaze --episodes 6 --max-steps 8 --v-steps 4 --v-batch 8 --z-dim 4 --m-steps 6 --m-batch 3 --hidden 8 "
    "--popsize 4 --trials 2 --generations 4 --score-trials 2 --test-episodes 2 --workers 2"
).split()


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A whole run of World Models, as small as can be."""
    path = tmp_path_factory.mktemp("run")
    wm.main(["all", *SMALL, "--out", str(path)])
    return path


@pytest.fixture
def wm_run(finished, tmp_path):
    """A copy of it to work on: wm_run("train-m", ...) runs a step there; the folder is wm_run.path."""
    shutil.copytree(finished, tmp_path / "run")

    def run(step, *flags):
        wm.main([step, "--env", "pointmaze", "--out", str(tmp_path / "run"), "--workers", "2", *map(str, flags)])

    run.path = tmp_path / "run"
    return run


def test_every_step_writes_what_the_next_reads(finished, tmp_path):
    names = {p.name for p in finished.iterdir()}
    assert {"data", "vae.pt", "vae.csv", "latents.npz", "rnn.pt", "c_dream_tau1.pt", "c_dream_tau1.png"} <= names
    assert {"test.json", "reconstructions.png", "dream.gif", "args.json"} <= names
    returns = json.loads((finished / "test.json").read_text())["returns"]
    assert len(returns["random"]["real"]) == len(returns["dream_tau1"]["dream"]) == 2
    wm.main(["all", *SMALL, "--out", str(tmp_path)])
    assert (finished / "test.json").read_text() == (tmp_path / "test.json").read_text()  # the same seed, the same run


def test_c_in_the_real_environment_and_several_temperatures(wm_run):
    wm_run("train-c", "--in", "real", "--generations", 2)
    assert len(wm.load_tensors(wm_run.path / "c_real.pt")["fitness"]) == 2
    wm_run("train-c", "--in", "dream", "--generations", 2, "--tau", 0.5, 1.3)
    wm_run("test")
    returns = json.loads((wm_run.path / "test.json").read_text())["returns"]
    assert set(returns) == {"random", "real", "dream_tau0.5", "dream_tau1", "dream_tau1.3"}
    for path in wm_run.path.glob("c_*"):
        path.unlink()
    with pytest.raises(UserError, match="no .*c_dream_tau0.5.pt: first run python vae_mdnrnn.py train-c"):
        wm_run("test")


def test_what_was_tested_is_not_tested_again(wm_run):
    path = wm_run.path / "test.json"

    def test_after(content, *flags):
        path.write_text(content)
        wm_run("test", *flags)
        return json.loads(path.read_text())["returns"]

    true = json.loads(path.read_text())
    marked = json.dumps({**true, "returns": {"random": {"real": [7, 7]}, "dream_tau1": {"real": [8, 8]}}})
    assert test_after(marked) == json.loads(marked)["returns"]
    assert test_after("{") == true["returns"]  # damaged
    assert len(test_after(marked, "--test-episodes", 1)["random"]["real"]) == 1  # another protocol
    path.write_text(marked)
    os.utime(wm_run.path / "c_dream_tau1.pt", (time.time() + 9, time.time() + 9))  # another C
    wm_run("test")
    assert json.loads(path.read_text())["returns"] == {**true["returns"], "random": {"real": [7, 7]}}


def test_iterations_build_on_each_other(tmp_path, monkeypatch, capsys):
    means, begun, evolve, fit = [], [], wm.evolve, wm.fit

    def watched_fit(model, *args, **options):
        begun.append({k: v.clone() for k, v in model.state_dict().items()})
        return fit(model, *args, **options)

    monkeypatch.setattr(wm, "fit", watched_fit)
    monkeypatch.setattr(wm, "evolve", lambda scores, mean, *args: (means.append(mean), evolve(scores, mean, *args))[1])
    wm.main(["iterate", "--iterations", "2", *SMALL, "--out", str(tmp_path)])
    c = wm.load_tensors(tmp_path / "iteration1" / "c_dream_tau1.pt")["params"]
    assert not means[0].any() and np.array_equal(means[1], c.numpy())
    for first, model in zip(("vae.pt", "rnn.pt"), begun[2:], strict=True):  # V and M go on
        for name, value in wm.load_tensors(tmp_path / "iteration1" / first)["model"].items():
            assert torch.equal(model[name], value), name
    policies = [json.loads((tmp_path / f"iteration{i}" / "data" / "meta.json").read_text())["policy"] for i in (1, 2)]
    assert policies == ["hold", "C"]
    wm.main(["test", "--env", "pointmaze", "--out", str(tmp_path / "iteration2"), "--workers", "2"])  # a run of its own
    assert "dream_tau1" in capsys.readouterr().out
    first, second = (data.Dataset(tmp_path / f"iteration{i}" / "data") for i in (1, 2))
    assert len(second) == 2 * len(first) == 12 and np.array_equal(second.frames[: len(first.frames)], first.frames)
    assert wm.load_tensors(tmp_path / "iteration2" / "rnn.pt")["config"]["heads"] == "reward,action"
    assert len((tmp_path / "iterations.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    "step, without, first", [
        ("train-v", "data/meta.json", "collect"), ("train-m", "latents.npz", "train-v"),
        ("train-c", "rnn.pt", "train-m"), ("test", "c_dream_tau1.pt", "train-c"),
    ],
)  # fmt: skip
def test_a_missing_predecessor_is_named(wm_run, step, without, first):
    (wm_run.path / without).unlink()
    with pytest.raises(UserError, match=f"first run python vae_mdnrnn.py {first} --env pointmaze"):
        wm_run(step)


@pytest.mark.parametrize(
    "words, message", [
        ("train-v --z-dim 5", "z_dim 4"), ("train-m --z-dim 5", "--z-dim 4"), ("train-m --hidden 5", "hidden 8"),
        ("train-v --v-steps 9", "rnn.pt builds on"), ("train-m --m-steps 9", "c_dream_tau1.pt builds on"),
        ("train-c --tau 0", "temperature"), ("train-c --tau 1.2 1.2", "stands twice"),
        ("iterate --tau 1 2", "one --tau"),
        ("train-c --tau nan", "temperature"), ("train-c --popsize 3", "population"),
        ("test --env takecover", "a run of --env pointmaze"),
    ],
)  # fmt: skip
def test_what_does_not_fit_a_run_is_one_line(wm_run, words, message):
    with pytest.raises(UserError, match=message) as error:
        wm_run(*words.split())
    assert "\n" not in str(error.value)


def test_a_run_of_another_environment_or_half_a_file_is_refused(wm_run):
    rnn = wm.MDNRNN(4, 3, 8, heads="reward")
    torch.save({**wm.load_tensors(wm_run.path / "rnn.pt"), "config": rnn.config, "model": rnn.state_dict()},
               wm_run.path / "rnn.pt")  # fmt: skip
    with pytest.raises(UserError, match="action_dim 3"):
        wm_run("train-c")
    (wm_run.path / "rnn.pt").write_bytes((wm_run.path / "rnn.pt").read_bytes()[:1000])
    with pytest.raises(UserError, match="is damaged, or does not hold a dict"):
        wm_run("train-c")
    for name, step in {"latents.npz": "train-m", "args.json": "test"}.items():
        (wm_run.path / name).write_bytes((wm_run.path / name).read_bytes()[:100])
        with pytest.raises(UserError, match=f"{name} is damaged: remove it"):
            wm_run(step)


@pytest.mark.parametrize("file, step, later", [("vae.pt", "train-v", "train-m"), ("rnn.pt", "train-m", "train-c")])
def test_what_stopped_halfway_is_not_built_on(wm_run, file, step, later):
    torch.save({**wm.load_tensors(wm_run.path / file), "step": 3}, wm_run.path / file)
    with pytest.raises(UserError, match=f"stopped after 3 of . steps: go on with python vae_mdnrnn.py {step}"):
        wm_run(later)


def test_overwrite_begins_anew_from_that_step(wm_run):
    wm_run("train-m", "--overwrite", "--m-steps", 2, "--hidden", 5)
    assert wm.load_tensors(wm_run.path / "rnn.pt")["config"]["hidden"] == 5 and not list(wm_run.path.glob("c_*"))
    assert json.loads((wm_run.path / "args.json").read_text())["hidden"] == 5  # the run keeps its flags
    with pytest.raises(UserError, match="--z-dim 4"):
        wm_run("train-m", "--z-dim", 9)
    assert json.loads((wm_run.path / "args.json").read_text())["z_dim"] == 4  # but not those that do not fit


@pytest.mark.parametrize("words", ["train-m --z-dim 9", "train-c --popsize 4 --hidden 9", "iterate --tau 1 2"])
def test_overwriting_with_flags_that_do_not_fit_loses_nothing(wm_run, words):
    for name in ("iteration1", ".overwritten/data"):  # the latter left by a run that was killed
        (wm_run.path / name).mkdir(parents=True)
    wm_run("test", "--overwrite")
    before = {path: path.is_file() and path.read_bytes() for path in sorted(wm_run.path.rglob("*"))}
    with pytest.raises(UserError):
        wm_run(*words.split(), "--overwrite")
    assert before == {path: path.is_file() and path.read_bytes() for path in sorted(wm_run.path.rglob("*"))}


def test_overwriting_one_c_leaves_the_others(wm_run):
    before = (wm_run.path / "c_dream_tau1.pt").read_bytes()
    wm_run("train-c", "--tau", 1.3, "--generations", 1)
    wm_run("train-c", "--tau", 1.3, "--generations", 2, "--overwrite")
    assert len(wm.load_tensors(wm_run.path / "c_dream_tau1.3.pt")["fitness"]) == 2
    assert (wm_run.path / "c_dream_tau1.pt").read_bytes() == before and not (wm_run.path / "test.json").exists()


def test_a_run_keeps_its_flags_and_what_another_step_wrote(wm_run, tmp_path, monkeypatch):
    def killed(args):
        raise KeyboardInterrupt

    monkeypatch.setitem(wm.STEPS, "collect", killed)
    with pytest.raises(KeyboardInterrupt):
        wm.main(["collect", "--env", "pointmaze", "--out", str(tmp_path / "new"), "--z-dim", "7"])
    args = wm.parse_args(["train-v", "--out", str(tmp_path / "new")])
    assert (args.env, args.z_dim) == ("pointmaze", 7)
    monkeypatch.setitem(wm.STEPS, "iterate", lambda args: None)
    (wm_run.path / "iteration1").mkdir()
    wm_run("iterate", "--overwrite")
    assert not (wm_run.path / "iteration1").exists() and (wm_run.path / "rnn.pt").exists()


def test_bench_ends(capsys, tmp_path):
    wm.bench(wm.parse_args(["bench", "--out", str(tmp_path), "--hidden", "8", "--device", "cpu"]), seconds=0.01)
    assert capsys.readouterr().out.count("dream steps/s") == 3


@pytest.mark.parametrize("name, low", [("takecover", [-1]), ("carracing", [-1, 0, 0])])
def test_the_papers_environments_repeat_with_their_seed(name, low):
    env = data.make_env(name)
    assert env.action_space.low.tolist() == low

    def episode():
        return wm.rollout(env, wm.RandomPolicy("hold", env.action_space, np.random.default_rng(0)), 5, 30)

    one, two = episode(), episode()
    env.close()
    assert one["frames"].shape == (30, 64, 64, 3) and one["frames"].dtype == np.uint8
    assert np.array_equal(one["frames"], two["frames"]) and np.array_equal(one["rewards"], two["rewards"])


def test_carracing_draws_what_gymnasium_draws():
    own, original = data.make_env("carracing"), data.gym.make("CarRacing-v3")
    for seed in (0, 1):  # the second track is drawn anew
        own.reset(seed=seed)
        assert np.array_equal(own.screen, original.reset(seed=seed)[0][:84])
        for t in range(80):  # the first 50 frames zoom in
            action = np.array([math.sin(t / 10), 0.5, 0], np.float32)
            own.step(action)
            assert np.array_equal(own.screen, original.step(action)[0][:84])


def test_takecover_moves_left_and_right():
    env, walls = data.make_env("takecover"), []
    for action in (-1.0, 0.0, 1.0):
        env.reset(seed=0)
        for _ in range(15):
            obs, *_ = env.step(np.array([action]))
        walls.append(obs["visual"][25:40].mean((0, 2)))  # brightness by column
    env.close()
    assert np.abs(walls[0] - walls[1]).sum() > 50 and np.abs(walls[2] - walls[1]).sum() > 50
    assert np.abs(walls[0] - walls[2]).sum() > 50


@pytest.mark.parametrize("name, module", [("takecover", "vizdoom.gymnasium_wrapper"), ("carracing", "Box2D")])
def test_a_missing_package_is_named(name, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match="pip install"):
        data.make_env(name)


# -- encoders.py --------------------------------------------------------------------------------------------


SHAPES = {
    "pca": (1, 32), "vae": (1, 32), "vae_map": (16, 16), "vjepa_tiny": (16, 64), "patches": (16, 64),
    "dinov2": (196, 384), "dinov2_imagenet": (196, 384), "dino_cls": (1, 384), "dinov3": (196, 384),
    "vjepa2-tiny": (256, 48), "resnet18": (1, 512), "resnet18_map": (49, 512), "r3m": (1, 512),
    "dino_tok": (196, 64), "dino_tok_vq": (196, 64), "vfm_vae": (196, 32),
}  # fmt: skip


@pytest.fixture(autouse=True)
def tiny_vjepa2(monkeypatch):
    """A V-JEPA 2 of the same family that fits into a test: the size `tiny`."""
    tiny = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=2)
    monkeypatch.setitem(encoders.VJEPA2_SIZES, "tiny", tiny)


@pytest.fixture
def frames():
    """Frames with something to see: a square that moves over a gradient."""
    y, x = np.mgrid[:64, :64]
    frames = np.repeat(np.stack([x * 2, y * 2, x + y], -1)[None].astype(np.uint8), 24, axis=0)
    for i, frame in enumerate(frames):
        frame[8 * (i // 6) : 8 * (i // 6) + 16, 8 * (i % 6) : 8 * (i % 6) + 16] = (250, 20, 20)
    return frames


def randomised(model):
    """Every tensor of a state dict nonzero and unlike the others: what is dropped or swapped shows."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, tensor in model.state_dict().items():
        state[name] = tensor
        if tensor.is_floating_point():
            noise = torch.rand(tensor.shape, generator=generator)
            state[name] = tensor + 0.05 * noise if tensor.dim() == 1 else 0.06 * (noise - 0.5)
    model.load_state_dict(state)
    return model.eval()


def seen(images, size, mean=encoders.IMAGENET["mean"], std=encoders.IMAGENET["std"]):
    images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
    return (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


# -- one interface -------------------------------------------------------------------------------------------


def test_every_encoder_is_tested():
    assert {name.partition("-")[0] for name in SHAPES} == set(encoders.ENCODERS)


@pytest.mark.parametrize("name", SHAPES)
def test_encoders_are_frozen_and_do_not_mix_the_batch(name):
    encoder = encoders.build_encoder(name, weights="random")
    for buffer in ("axes", "codebooks"):  # as if fitted
        if hasattr(encoder, buffer):
            getattr(encoder, buffer).normal_()
    before = copy.deepcopy(encoder.state_dict())
    encoder.train()
    assert encoder.name == name and not any(m.training for m in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())
    images = torch.rand(2, 3, 80, 80, requires_grad=True)
    tokens = encoder(images)
    assert tokens.shape == (2, encoder.num_patches, encoder.dim) == (2, *SHAPES[name])
    assert not tokens.requires_grad and tokens.isfinite().all() and tokens.std() > 0
    alone = encoder(images[1:2])
    torch.testing.assert_close(tokens[1:2], alone, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(before[k], v) for k, v in encoder.state_dict().items())  # batch-norm statistics included
    again = encoders.build_encoder(encoder.name, encoder.img_size, weights="random")  # as a checkpoint is loaded
    again.load_state_dict(encoder.state_dict())
    assert (again.num_patches, again.dim) == (encoder.num_patches, encoder.dim)


# -- released formats, random weights: our tokens are the library's ------------------------------------------


@pytest.fixture(scope="module")
def images():
    return torch.rand(1, 3, 230, 230, generator=torch.Generator().manual_seed(1))


def original_names(timm_state, register="storage_tokens"):
    """timm's names of a DINOv2 or DINOv3 -> the original repository's."""
    state = {}
    for key, value in timm_state.items():
        if key.endswith("attn.v_bias"):
            continue
        if key.endswith("attn.q_bias"):
            v = timm_state[key.replace("q_bias", "v_bias")]
            value, key = torch.cat([value, torch.full_like(v, 9.0), v]), key.replace("q_bias", "qkv.bias")
            state[key + "_mask"] = torch.cat([torch.ones_like(v), torch.zeros_like(v), torch.ones_like(v)])
        key = key.replace("reg_token", register)
        key = key.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
        state[key] = value
    return state


def test_dinov2_in_timms_and_the_original_format(images, tmp_path):
    released = randomised(
        timm.create_model(encoders.DINOV2.format("small"), num_classes=0)
    )  # 518 px: 37 x 37 positions
    save_file(released.state_dict(), tmp_path / "model.safetensors")
    torch.save(original_names(released.state_dict()) | {"mask_token": torch.ones(1, 384)}, tmp_path / "dinov2.pth")
    # its own interpolation of the positions to 14 x 14 (dinov2/models/vision_transformer.py)
    grid = released.pos_embed[:, 1:].reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=(14.1 / 37, 14.1 / 37), mode="bicubic", antialias=False)
    positions = torch.cat([released.pos_embed[:, :1], grid.permute(0, 2, 3, 1).reshape(1, 196, 384)], 1)
    small = timm.create_model(encoders.DINOV2.format("small"), num_classes=0, img_size=196).eval()
    small.load_state_dict(released.state_dict() | {"pos_embed": positions.detach()})
    with torch.no_grad():
        dino_wm = small.forward_features(seen(images, 196, (0.5,) * 3, (0.5,) * 3))
        dinov2 = small.forward_features(seen(images, 196))
    for name, file, expected in (
        ("dinov2", "model.safetensors", dino_wm[:, 1:]),
        ("dino_cls", "", dino_wm[:, :1]),  # the folder
        ("dinov2_imagenet", "dinov2.pth", dinov2[:, 1:]),
    ):
        close(encoders.build_encoder(name, weights=str(tmp_path / file))(images), expected)


def test_dinov2_in_transformers_format(images, tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    released = randomised(Dinov2Model(Dinov2Config(image_size=196, hidden_size=384, num_attention_heads=6)))
    released.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = released(seen(images, 196)).last_hidden_state[:, 1:]
    close(encoders.build_encoder("dinov2_imagenet", weights=tmp_path)(images), expected)


def test_dinov3_in_all_its_formats(images, tmp_path):
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    def half_loads(path):
        with pytest.raises(UserError, match="1 missing, e.g. blocks.3.attn|2 missing, e.g. blocks.3.attn.q_bias"):
            load_weights(released_timm, path, None, partial(vit_names, released_timm))

    model = encoders.DINOV3.format("small")
    released = released_timm = timm.create_model(model.replace("dinov3.", "dinov3_qkvb."), num_classes=0, img_size=224)
    randomised(released)
    with torch.no_grad():
        expected = released.forward_features(seen(images, 224))[:, 5:]  # class token, four registers
    state = original_names(released.state_dict())
    state |= {"mask_token": torch.ones(1, 384), "rope_embed.periods": torch.ones(16)}
    torch.save(state, tmp_path / "dinov3.pth")
    close(encoders.build_encoder("dinov3", weights=tmp_path / "dinov3.pth")(images), expected)

    for lost in ("blocks.3.attn.qkv.bias", "blocks.3.attn.qkv.weight"):
        torch.save({k: v for k, v in state.items() if k != lost}, tmp_path / "half.pth")
        half_loads(tmp_path / "half.pth")

    no_bias = randomised(timm.create_model(model, num_classes=0, img_size=224))  # timm's own: without q, k, v biases
    save_file(no_bias.state_dict(), tmp_path / "timm.safetensors")
    with torch.no_grad():
        expected = no_bias.forward_features(seen(images, 224))[:, 5:]
    close(encoders.build_encoder("dinov3", weights=tmp_path / "timm.safetensors")(images), expected)

    config = DINOv3ViTConfig(num_register_tokens=4, hidden_size=384, num_attention_heads=6, intermediate_size=1536)
    released = randomised(DINOv3ViTModel(config))
    released.save_pretrained(tmp_path / "hf")
    with torch.no_grad():
        expected = released(seen(images, 224)).last_hidden_state[:, 5:]
    close(encoders.build_encoder("dinov3", weights=tmp_path / "hf")(images), expected)
    state = load_file(tmp_path / "hf" / "model.safetensors")
    for lost in ("k_proj.weight", "q_proj.bias", "o_proj.bias"):
        save_file({k: v for k, v in state.items() if k != f"layer.3.attention.{lost}"}, tmp_path / "half.safetensors")
        half_loads(tmp_path / "half.safetensors")


def test_vjepa2_in_both_formats(images, tmp_path):
    from transformers import VJEPA2Config, VJEPA2Model

    released = randomised(VJEPA2Model(VJEPA2Config(pred_num_hidden_layers=2, **encoders.VJEPA2_SIZES["tiny"])))
    released.save_pretrained(tmp_path / "hf")
    clip = seen(images, 256)[:, None].repeat(1, 2, 1, 1, 1)
    with torch.no_grad():
        expected = F.layer_norm(released.get_vision_features(clip), (48,))
    close(encoders.build_encoder("vjepa2-tiny", weights=tmp_path / "hf")(images), expected)

    state = {}
    for key, value in released.encoder.state_dict().items():
        if ".query." in key:
            parts = [released.encoder.state_dict()[key.replace("query", k)] for k in ("query", "key", "value")]
            key, value = key.replace("query", "qkv"), torch.cat(parts)
        elif ".key." in key or ".value." in key:
            continue
        for old, new in (("embeddings.patch_embeddings.", "patch_embed."), ("layer.", "blocks."),
                         ("attention.", "attn."), ("layernorm.", "norm.")):  # fmt: skip
            key = new + key[len(old) :] if key.startswith(old) else key.replace("." + old, "." + new)
        state["module.backbone." + key] = value
    state["module.backbone.pos_embed"] = torch.ones(1, 8192, 48)
    torch.save({"encoder": state, "predictor": {}, "epoch": 1, "lr": 1e-4}, tmp_path / "vitt.pt")
    assert "module.backbone.blocks.1.attn.qkv.bias" in state and "module.backbone.patch_embed.proj.weight" in state
    close(encoders.build_encoder("vjepa2-tiny", weights=tmp_path / "vitt.pt")(images), expected)


def test_resnets_and_r3m(images, tmp_path):
    net = models.resnet18()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2), module.running_var.uniform_(0.5, 2), module.weight.data.uniform_()
    net.eval()
    without_counters = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(without_counters, tmp_path / "resnet18.pth")  # as torchvision's own file
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    r3m = {f"module.convnet.{k}": v for k, v in net.state_dict().items() if not k.startswith("fc.")}
    r3m["module.lang_rew.pred.0.weight"] = torch.ones(2, 2)
    torch.save({"r3m": r3m, "global_step": 7}, tmp_path / "model.pt")
    net.fc = torch.nn.Identity()
    with torch.no_grad():
        pooled = net(seen(images, 224))[:, None]
    for name, file in (("resnet18", "resnet18.pth"), ("resnet18", "model.safetensors"), ("r3m", "model.pt")):
        close(encoders.build_encoder(name, weights=tmp_path / file)(images), pooled)
    tokens = encoders.build_encoder("resnet18_map", weights=tmp_path / "resnet18.pth")(images)
    close(tokens.mean(1, keepdim=True), pooled)
    net.avgpool = torch.nn.Identity()
    with torch.no_grad():
        close(tokens, net(seen(images, 224)).view(1, 512, 49).mT)


# -- tokenizers and controls ----------------------------------------------------------------------------------


def test_layers_are_the_backbones_own(images):
    encoder = encoders.build_encoder("dinov2_imagenet", weights="random")
    first, last = encoder.layers(images, (4, -1))
    close(last, encoder(images))
    vit = encoder.vit
    expected = vit.forward_intermediates(seen(images, 196), indices=[3], output_fmt="NLC", intermediates_only=True)
    close(first, expected[0].detach())


@pytest.mark.parametrize("name", ["dino_tok", "dino_tok_vq"])
def test_dino_tok_is_a_pca_of_each_branch(name, frames, monkeypatch):
    encoder = encoders.build_encoder(name, 98, weights="random")  # 49 tokens
    if name == "dino_tok_vq":
        encoder.codebooks = torch.zeros(2, 16, 32)
    frames = frames[::3]
    encoder.fit(frames)
    images = to_tensor(frames)
    tokens = encoder(images)
    f = encoder.branches(images).double()
    parts = []
    for branch in f:  # by the singular values
        u, s, _ = torch.linalg.svd(branch - branch.mean(0), full_matrices=False)
        z = (u * s)[:, :32]
        parts.append(z / z.square().mean().sqrt())
    if name == "dino_tok":
        torch.testing.assert_close(tokens.flatten(0, 1).abs(), torch.cat(parts, 1).abs().float(), atol=5e-3, rtol=5e-3)
    else:
        halves = tokens.flatten(0, 1).split(32, 1)
        for half, codebook in zip(halves, encoder.codebooks, strict=True):
            assert (
                torch.cdist(half, codebook, compute_mode="donot_use_mm_for_euclid_dist").min(1).values.max() < 1e-5
            )  # every token is a centre
            assert len(half.unique(dim=0)) > 8  # and most centres are in use
        twin = encoders.build_encoder(name, 98, weights="random")
        twin.codebooks = torch.zeros(2, 16, 32)
        twin.backbone.load_state_dict(encoder.backbone.state_dict())
        assert torch.equal(twin.fit(frames)(images), tokens)  # one seed, one result


def test_kmeans_finds_the_clusters():
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    x = torch.cat([c + torch.rand(50, 2) for c in centres])
    found = encoders.kmeans(x, 12, torch.Generator().manual_seed(0))
    assert torch.cdist(x, found).min(1).values.max() < 2**0.5


def test_vfm_vae_learns_to_reconstruct(frames):
    encoder = encoders.build_encoder("vfm_vae", 56, weights="random")  # 4 x 4 tokens
    backbone = copy.deepcopy(encoder.backbone.state_dict())
    torch.manual_seed(0)
    images = encoder.resize(to_tensor(frames))
    pictures = encoder.decoder(torch.zeros(1, 32, 4, 4))
    assert [p.shape[-1] for p in pictures] == [4, 8, 16, 32]
    with torch.no_grad():
        before = encoder.loss(images)["recon"]
    encoder.fit(frames, steps=20, batch_size=4)
    with torch.no_grad():
        assert encoder.loss(images)["recon"] < 0.7 * before
    assert not any(p.requires_grad for p in encoder.parameters())
    assert all(torch.equal(backbone[k], v) for k, v in encoder.backbone.state_dict().items())
    tokens = encoder(images)
    assert tokens.shape == (24, 16, 32) and tokens.mean().abs() < 0.1 and 0.3 < tokens.std() < 1.2


def test_the_spatial_v_learns_and_keeps_its_places(frames):
    encoder = encoders.build_encoder("vae_map")
    mu, logvar = encoder.vae.encode(torch.rand(2, 3, 64, 64))
    assert mu.shape == logvar.shape == (2, 256) and encoder.vae.decode(mu).shape == (2, 3, 64, 64)
    encoder.fit(frames, steps=4)
    tokens = encoder(to_tensor(frames))
    change = (tokens - tokens.mean(0)).square().sum(2)  # (24, 16)
    assert tokens.shape == (24, 16, 16) and change[0, 0] > change[0, 15]  # the square is top left in the first frame


# -- V-JEPA 2's pretraining ------------------------------------------------------------------------------------


def test_rotary_attention_depends_on_relative_positions_alone():
    q, k = torch.randn(2, 32)
    place, other, move = torch.tensor([2, 1, 3]), torch.tensor([0, 3, 1]), torch.tensor([5, 2, 7])

    def score(at, to, **released):
        turn = lambda x, p: vjepa.rotate(x, *vjepa.rotary_angles(p, 32, **released))  # noqa: E731
        return turn(q, at) @ turn(k, to)

    close(score(place, other), score(place + move, other + move))
    close(score(place, place), q @ k)
    for axis in torch.eye(3).long():  # each of time, row and column matters
        assert (score(place, other) - score(place + axis, other)).abs() > 1e-3
    assert (score(place, place, released=True) - q @ k).abs() > 1e-3  # the slip in the released weights' positions


def test_block_masks_hide_boxes_and_what_is_hidden_is_not_seen():
    T, side, _ = grid = (4, 6, 6)
    for blocks, area, duration in [(1, 0.3, 1.0), (1, 0.3, 0.5), (2, 0.7, 0.5), (8, 0.15, 0.5)] * 5:
        context, target = vjepa.block_masks(7, grid, blocks, area, duration)
        assert context.shape[1] > 0 and context.shape[1] + target.shape[1] <= T * side**2
        for seen, hidden in zip(context.tolist(), target.tolist(), strict=True):
            assert len({*seen, *hidden}) == len(seen) + len(hidden)
        if blocks == 1:  # then all that the block covers, and all that it does not
            assert context.shape[1] + target.shape[1] == T * side**2
            for hidden in target:
                place = torch.stack([hidden // side**2, hidden // side % side, hidden % side])
                extent = (place.amax(1) - place.amin(1) + 1).tolist()
                assert extent[0] == duration * T and np.prod(extent) == len(hidden)
                assert extent[1] * extent[2] == pytest.approx(area * side**2, rel=0.3)
        assert len({tuple(sorted(hidden.tolist())) for hidden in target}) > 1  # each clip has its own


def test_the_context_encoder_never_sees_a_target():
    encoder = encoders.build_encoder("vjepa_tiny")
    clips = torch.rand(2, 8, 3, 64, 64)
    context, target = vjepa.block_masks(2, encoder.grid, 2, 0.3, 0.5)
    before, all_before = encoder.vit(clips, context), encoder.vit(clips)
    for clip, hidden in zip(clips, target, strict=True):
        for place in hidden.tolist():
            t, row, column = place // 16, place // 4 % 4, place % 4
            clip[2 * t : 2 * t + 2, :, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = 9.0
    assert torch.equal(encoder.vit(clips, context), before)
    changed = (encoder.vit(clips) - all_before).abs().sum(-1)
    assert (changed.take_along_dim(target, 1) > 1e-3).all()  # and these blocks are those places' pixels
    close(encoder.vit(clips, torch.arange(64).expand(2, -1)), encoder.vit(clips))


def test_the_masked_predictor_knows_places_not_order():
    predictor = vjepa.MaskedPredictor((4, 4, 4), 64, 48, depth=2, heads=2).eval()
    predictor.mask_token.data.normal_()
    tokens, context, target = torch.randn(2, 9, 64), torch.arange(9).repeat(2, 1), torch.tensor([[20, 31, 47]] * 2)
    predicted = predictor(tokens, context, target)
    assert predicted.shape == (2, 3, 64) and (predicted[:, 0] - predicted[:, 1]).abs().max() > 1e-3
    order, flipped = torch.randperm(9), target.flip(1)
    close(predictor(tokens[:, order], context[:, order], flipped), predicted.flip(1))


def test_the_target_encoder_follows_and_learns_nothing_by_itself(frames):
    average, model = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    expected = 0.9 * average.weight + 0.1 * model.weight
    vjepa.follow(average, model, 0.9)
    close(average.weight, expected)
    results = {}
    for name, momentum in {"held": 1.0, "follows": 0.5, "again": 0.5}.items():
        torch.manual_seed(0)
        encoder = encoders.build_encoder("vjepa_tiny")
        before = copy.deepcopy(encoder.vit.state_dict())
        encoder.fit(frames, steps=3, batch_size=2, momentum=momentum)
        results[name] = encoder.vit.state_dict()
        assert not any(p.requires_grad for p in encoder.parameters())
        seen = encoder.see(to_tensor(frames))
        assert seen.mean(0).abs().max() < 1e-4 and seen.std(0).max() < 1
    for key, start in before.items():
        assert torch.equal(results["held"][key], start) and torch.equal(results["again"][key], results["follows"][key])
    assert not torch.equal(results["follows"]["embed.weight"], before["embed.weight"])


def test_a_collapse_is_measured_and_ends_the_fit(frames):
    std, rank = encoders.collapse_measures(torch.randn(4000, 3, 1) * torch.tensor([1.0, 2.0, 0.0, 0.0]))
    assert std == pytest.approx(0.75, rel=0.05) and rank == pytest.approx(1, abs=0.01)  # one number, four times
    std, rank = encoders.collapse_measures(torch.randn(20_000, 1, 4) * torch.tensor([1.0, 1.0, 1.0, 0.0]))
    assert std == pytest.approx(0.75, rel=0.05) and rank == pytest.approx(3, abs=0.01)
    constant = torch.randn(1, 3, 4).expand(50, -1, -1)  # places differ, frames do not
    assert encoders.collapse_measures(constant)[0] == pytest.approx(0, abs=1e-6)
    encoder = encoders.build_encoder("vjepa_tiny")
    for parameter in encoder.vit.embed.parameters():
        parameter.zero_()
    with pytest.raises(UserError, match="vjepa_tiny has collapsed: .* try another --seed"):
        encoder.fit(frames, steps=1, batch_size=2)


def test_encoders_are_fitted_to_clips_of_single_episodes(dataset, monkeypatch):
    monkeypatch.setattr(train, "FIT_FRAMES", 20)
    episodes = dataset.split()[0]

    def fit_frames(clip_frames):
        encoder = encoders.build_encoder("patches")
        encoder.clip_frames = clip_frames
        return train.fit_frames(encoder, dataset, episodes, np.random.default_rng(0))

    alone = np.sort(np.random.default_rng(0).choice(dataset.rows(episodes), 20, replace=False))
    np.testing.assert_array_equal(fit_frames(1), dataset.frames[alone])
    clips = fit_frames(4).reshape(5, 4, *dataset.frames.shape[1:])
    ends = set(dataset.episode_ends)
    for clip in clips:
        (first,) = np.flatnonzero((dataset.frames[:] == clip[0]).all((1, 2, 3)))
        assert not ends & set(range(first + 1, first + 4))  # no episode ends within the clip
        np.testing.assert_array_equal(clip, dataset.frames[first : first + 4])


def test_patches_project_each_patch_by_itself():
    encoder = encoders.build_encoder("patches")
    images = torch.rand(2, 3, 64, 64)
    patch = images[1, :, 16:32, 48:64].flatten()  # second row, last column
    close(encoder(images)[1, 7], patch @ encoder.projection)
    encoder.fit((images.permute(0, 2, 3, 1) * 255).byte().numpy())
    tokens = encoder((images * 255).byte() / 255)
    close(tokens.mean(0), torch.zeros(16, 64))
    close(tokens.square().mean(), torch.ones(()))
    assert torch.equal(encoder.projection, encoders.build_encoder("patches").projection)


def test_a_world_model_is_saved_and_loaded_with_a_sized_and_a_fitted_encoder(tmp_path, images):
    import predictor

    stats = (torch.zeros(2), torch.ones(2)), (torch.zeros(4), torch.ones(4))
    for name in ("vjepa2-tiny", "vae_map", "vjepa_tiny"):
        encoder = encoders.build_encoder(name, weights="random")
        model = predictor.WorldModel(encoder, *stats, depth=1, heads=1, mlp_dim=8)
        model.save(tmp_path)
        loaded = predictor.WorldModel.load(tmp_path)
        assert loaded.encoder.name == name and torch.equal(loaded.encoder(images), encoder(images))


# -- what wrong input gets -------------------------------------------------------------------------------------


def refused(match, *args, **kwargs):
    with pytest.raises(UserError, match=match) as error:
        encoders.build_encoder(*args, **kwargs)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_weights_that_do_not_fit_are_named(tmp_path):
    vit, net = encoders.build_encoder("dinov2", weights="random").vit, timm.create_model("resnet18", num_classes=0)
    before = copy.deepcopy(vit.state_dict())

    def refused(match, content=None, model=vit, rename=None, weights=tmp_path / "x.pth"):
        if content is not None:
            torch.save(content, tmp_path / "x.pth")
        with pytest.raises(UserError, match=match) as error:
            load_weights(model, weights, "timm/x", rename or partial(vit_names, vit))
        assert "\n" not in str(error.value)

    state = vit.state_dict()
    refused("another architecture: keys .* missing, .* unknown", net.state_dict())
    refused("another architecture", state, net, resnet_names)
    refused("another architecture", state, net, vjepa2_names)
    refused("does not hold the weights", {"encoder": torch.zeros(3)}, net, vjepa2_names)
    refused(
        "1 missing, e.g. blocks.3.attn.qkv.weight$", {k: v for k, v in state.items() if k != "blocks.3.attn.qkv.weight"}
    )
    refused("1 unknown, e.g. register_tokens$", state | {"register_tokens": torch.zeros(1, 4, 384)})
    refused("1 of another shape, e.g. norm.bias$", state | {"norm.bias": torch.zeros(5)})
    refused("another shape, e.g. blocks.0.attn.qkv.weight$", state | {"blocks.0.attn.qkv.weight": "not a tensor"})
    refused("does not hold the weights", state | {"pos_embed": "not a tensor"})
    refused("damaged, or does not hold a dict", ["a", "list"])
    refused("damaged, or does not hold a dict", torch.zeros(3))
    (tmp_path / "x.pth").write_bytes((tmp_path / "x.pth").read_bytes()[:100])
    refused("damaged")
    refused("no model.safetensors in the folder", weights=tmp_path)
    refused("no weights at missing.pth", weights="missing.pth")
    refused("no weights at some/where/x.pth", weights="some/where/x.pth")
    assert all(torch.equal(v, before[k]) for k, v in vit.state_dict().items())  # nothing was half loaded


def test_names_and_sizes_that_are_not_there():
    refused("unknown encoder 'dino'; known: pca", "dino")
    refused("has no size 'huge', but small, base, large", "dinov3-huge")
    refused("has no size 'base', but one alone", "pca-base")
    refused("200 is not a multiple of its patch size 14", "dinov2", 200)
    refused("200 is not a multiple of its patch size 16", "vjepa2-tiny", 200, "random")
    refused("200 is not a multiple of its patch size 14", "vfm_vae", 200, "random")
    refused("100 is not a multiple of its patch size 32", "resnet18_map", 100, "random")
    refused("60 is not a multiple of its patch size 16", "patches", 60)
    refused("takes no --weights", "patches", weights="x.pth")
    refused("R3M's weights .* --weights", "r3m")
    assert encoders.build_encoder("dinov3-base", weights="random").dim == 768


@pytest.mark.parametrize("code, match", [(None, "are not here, and no network.*--weights PATH"), (403, "is gated"),
                                         (401, "is gated"), (404, "answers 404")])  # fmt: skip
def test_weights_out_of_reach(code, match, monkeypatch, tmp_path):
    import huggingface_hub as hub

    def urlopen(*_, **__):
        raise OSError("no route") if code is None else urllib.error.HTTPError("", code, "", {}, io.BytesIO())

    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    refused(f"timm/vit_small_patch14_dinov2.lvd142m.*{match}", "dinov2")
    refused(f"someone/dinov3.*{match}", "dinov3", weights="someone/dinov3")
    refused(f"facebook/vjepa2-vitt-fpc64-256.*{match}", "vjepa2-tiny")


def test_a_hugging_face_repository_is_a_value_of_weights(monkeypatch, tmp_path):
    state = encoders.build_encoder("dinov2", weights="random").vit.state_dict()
    save_file(state, tmp_path / "model.safetensors")
    asked = []

    def download(repository):
        asked.append(repository)
        return tmp_path / "model.safetensors"

    monkeypatch.setattr("weights.download", download)
    assert torch.equal(encoders.build_encoder("dinov2").vit.norm.bias, state["norm.bias"])
    encoders.build_encoder("dino_tok", weights="me/mine")
    assert asked == ["timm/vit_small_patch14_dinov2.lvd142m", "me/mine"]


# -- the table and the picture ---------------------------------------------------------------------------------


def test_the_table_and_the_picture(monkeypatch, tmp_path, capsys):
    from PIL import Image

    run = lambda *args: (monkeypatch.setattr(sys, "argv", ["encoders.py", *args]), encoders.main())  # noqa: E731
    monkeypatch.setattr(time, "perf_counter", iter(range(99)).__next__)  # a second has passed at each look
    run("--encoders", "patches,resnet18", "--batch-size", "1")
    table = capsys.readouterr().out.splitlines()
    assert table[1].split()[:4] == ["patches", "64", "16", "64"] and "BSD-3-Clause" in table[2]
    with pytest.raises(UserError, match="unknown encoder 'x'"):
        run("--encoders", "patches,x")
    monkeypatch.setattr(
        encoders, "sample_frames", lambda _: np.random.default_rng(0).integers(0, 255, (60, 64, 64, 3), np.uint8)
    )
    run("--encoders", "pca,patches,r3m", "--show", str(tmp_path))
    assert "left out: " in capsys.readouterr().out  # r3m without weights: never random by itself
    assert Image.open(tmp_path / "tokens.png").size[1] == 450  # three rows
    tokens = torch.rand(3, 4, 5)
    colours = encoders.principal_colours(tokens)
    assert colours.shape == (3, 2, 2, 3) and colours.min() == 0 and colours.max() == 1


def test_pca_is_numpys_svd(dataset):
    frames = dataset.frames[:120]
    encoder = encoders.PCAEncoder(dim=8).fit(frames)
    y = encoder.filtered(to_tensor(frames)).flatten(1).double().numpy()
    u, s, _ = np.linalg.svd(y - y.mean(0), full_matrices=False)
    std = s / np.sqrt(len(y) - 1)
    expected = (u * s / (std + encoder.damping * std[0]))[:, :8]
    tokens = encoder(to_tensor(frames))[:, 0].numpy()
    np.testing.assert_allclose(np.abs(tokens), np.abs(expected), atol=2e-3)


# -- predictor.py -------------------------------------------------------------------------------------------


def tiny_model(name="pca", num_hist=3, **vit):
    torch.manual_seed(0)
    encoder = encoders.build_encoder(name, weights="random")
    stats = (torch.tensor([0.1, -0.1]), torch.tensor([0.5, 0.6])), (torch.zeros(4), torch.full((4,), 2.0))
    return predictor.WorldModel(encoder, *stats, num_hist, **({"depth": 2, "heads": 2, "mlp_dim": 16} | vit)).eval()


def test_predictor_is_causal_by_frame_and_free_within_one():
    torch.manual_seed(0)
    vit = predictor.ViTPredictor(num_patches=4, num_frames=3, dim=8, depth=2, heads=2, dim_head=4, mlp_dim=16).eval()
    x = torch.randn(1, 12, 8)
    before = vit(x).view(3, 4, 8)
    for token in range(12):
        changed = x.clone()
        changed[0, token] += torch.randn(8)
        moved = (vit(changed).view(3, 4, 8) - before).abs().sum(-1) > 1e-6  # (frame, patch)
        assert moved[token // 4 :].all() and not moved[: token // 4].any()
    torch.testing.assert_close(vit(x[:, :8]).view(2, 4, 8), before[:2])  # a shorter window is a prefix


def test_loss_by_hand():
    model = tiny_model(num_hist=2)
    batch = {"visual": torch.randn(5, 3, 1, 32), "proprio": torch.randn(5, 3, 4), "action": torch.rand(5, 3, 10)}
    loss, parts = model.loss(batch)
    phi = model.proprio_encoder(batch["proprio"] / 2)
    psi = model.action_encoder(
        (batch["action"] - torch.tensor([0.1, -0.1]).repeat(5)) / torch.tensor([0.5, 0.6]).repeat(5)
    )
    x = torch.cat([batch["visual"][:, :, 0], phi, psi], dim=-1)
    out = model.predictor(x[:, :2])
    torch.testing.assert_close(loss, (out[..., :42] - x[:, 1:, :42]).square().mean())
    assert parts["visual"] == pytest.approx((out[..., :32] - x[:, 1:, :32]).square().mean().item(), rel=1e-5)
    last = batch | {"action": batch["action"].clone()}
    last["action"][:, 2] = 0  # the action of the last target is no part of the loss
    torch.testing.assert_close(model.loss(last)[0], loss)
    (gradient,) = torch.autograd.grad(loss, model.proprio_encoder.bias)
    assert gradient.abs().sum() > 0


def test_rollout_grows_its_window_then_slides():
    model = tiny_model(num_hist=2)
    obs = {"visual": torch.randint(256, (3, 1, 64, 64, 3), dtype=torch.uint8), "proprio": torch.randn(3, 1, 4)}
    actions = torch.rand(3, 4, 10)
    z = model.rollout(model.encode(obs), actions)
    assert z["visual"].shape == (3, 5, 1, 32) and z["proprio"].shape == (3, 5, 10)
    a = model.encode_action(actions)
    frames = [model.encode(obs)]
    for t in range(4):
        window = {k: torch.cat([f[k] for f in frames[-2:]], 1) for k in z}
        after = model.predict(window, a[:, max(t - 1, 0) : t + 1])
        frames.append({"visual": after["visual"][:, -1:], "proprio": after["proprio"][:, -1:, 0]})
        for name in z:
            torch.testing.assert_close(z[name][:, t + 1], frames[-1][name][:, 0])
    continued = model.rollout({name: latent[:, :3] for name, latent in z.items()}, actions)  # three frames given
    torch.testing.assert_close(continued["visual"], z["visual"])


def test_checkpoint_round_trip_and_refusals(tmp_path):
    model = tiny_model()
    model.world = dict(env="pointmaze", img_size=64, data="d")
    model.save(tmp_path)
    again = predictor.WorldModel.load(tmp_path)
    assert again.world == model.world
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=0, atol=0)
    whole = (tmp_path / "model.pt").read_bytes()
    (tmp_path / "model.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="is damaged, or does not hold a dict"):
        predictor.WorldModel.load(tmp_path)
    torch.save({"state": 1}, tmp_path / "model.pt")
    with pytest.raises(UserError, match="lacks 'config'"):
        predictor.WorldModel.load(tmp_path)

    torch.save({"config": {"frameskip": 5}, "model": {}}, tmp_path / "model.pt")
    with pytest.raises(UserError, match="not a checkpoint of this version .'action_mean'"):
        predictor.WorldModel.load(tmp_path)

    class Malicious:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'pwned'}",)

    for content in (pickle.dumps(Malicious()), None):
        if content is None:
            torch.save({"config": Malicious(), "model": {}}, tmp_path / "model.pt")
        else:
            (tmp_path / "model.pt").write_bytes(content)
        with pytest.raises(UserError, match="is damaged, or does not hold a dict"):
            predictor.WorldModel.load(tmp_path)
    assert not (tmp_path / "pwned").exists()


def tiny_eyes(num_patches, dim):
    """Stands in for an encoder of N tokens of d numbers."""
    eyes = encoders.FrozenEncoder("tiny", 8, dim)
    eyes.num_patches = num_patches
    return eyes


SIZES = {
    "vit": dict(depth=2, heads=2, mlp_dim=16, dropout=0.0),
    "rwm": dict(width=16, mlp_dim=8),
    "vjepa2_ac": dict(width=24, depth=2, heads=2, mlp_dim=32),
}


def tiny_transition(name, num_patches=1, dim=6, num_hist=3, state=False, **sizes):
    """A world model of this transition, and a batch of 7 frames."""
    torch.manual_seed(0)
    eyes = predictor.StateEncoder() if state else tiny_eyes(num_patches, dim)
    stats = (torch.tensor([0.1, -0.1]), torch.tensor([0.5, 0.6])), (torch.zeros(4), torch.full((4,), 2.0))
    model = predictor.WorldModel(eyes, *stats, num_hist, predictor=name, **(SIZES[name] | sizes))
    batch = {"visual": torch.randn(5, 7, num_patches, dim), "proprio": torch.randn(5, 7, 4)}
    return model.eval(), batch | {"action": torch.rand(5, 7, 10)}


MODELS = [("vit", 4, False), ("vit", 1, True), ("rwm", 1, False), ("rwm", 1, True), ("vjepa2_ac", 4, False)]


@pytest.mark.parametrize("name, num_patches, state", MODELS)
def test_every_transition_is_causal_and_its_rollout_is_its_steps(name, num_patches, state):
    model, batch = tiny_transition(name, num_patches, state=state)
    with torch.no_grad():
        z, actions = model.encode(batch), model.encode_action(batch["action"])
        window = {k: latent[:, :3] for k, latent in z.items()}
        before = model.predict(window, actions[:, :3])
        assert before["visual"].shape == window["visual"].shape
        assert before["proprio"].shape[-1] == z["proprio"].shape[-1] == (0 if state else 10 if name == "vit" else 4)
        for t in range(3):  # a frame and its action move their own prediction and later ones, no earlier one
            moved = {k: latent.clone() for k, latent in window.items()}
            moved["visual"][:, t] += torch.randn_like(moved["visual"][:, t])
            for after in (
                model.predict(moved, actions[:, :3]),
                model.predict(window, actions[:, :3].index_add(1, torch.tensor([t]), torch.ones(5, 1, 10))),
            ):
                change = (after["visual"] - before["visual"]).abs().amax((0, 2, 3)) > 1e-6
                assert change[t:].all() and not change[:t].any()
        shorter = model.predict({k: latent[:, :2] for k, latent in z.items()}, actions[:, :2])
        torch.testing.assert_close(shorter["visual"], before["visual"][:, :2])  # a shorter window is a prefix

        imagined = model.rollout({k: latent[:, :1] for k, latent in z.items()}, batch["action"][:, :5])
        known = {"visual": z["visual"][:, :1], "proprio": z["proprio"][:, :1, None].expand_as(before["proprio"][:, :1])}
        for t in range(1, 6):
            first = 0 if name == "rwm" else max(t - 3, 0)  # a GRU's memory is as long as what it has read
            after = model.predict({k: latent[:, first:t] for k, latent in known.items()}, actions[:, first:t])
            known = {k: torch.cat([latent, after[k][:, -1:]], dim=1) for k, latent in known.items()}
            torch.testing.assert_close(imagined["visual"][:, t], known["visual"][:, t])
            torch.testing.assert_close(imagined["proprio"][:, t], known["proprio"][:, t, 0])  # the first token's


def test_one_rollout_step_is_teacher_forcing_bit_for_bit():
    model, batch = tiny_transition("vit", 4)
    batch = {k: value[:, :4] for k, value in batch.items()}
    z = model.encode(batch)
    source = {k: latent[:, :3] for k, latent in z.items()}
    predicted = model.predict(source, model.encode_action(batch["action"][:, :3]))
    visual = F.mse_loss(predicted["visual"], z["visual"][:, 1:])
    target = z["proprio"][:, 1:].detach()
    proprio = F.mse_loss(predicted["proprio"], target[:, :, None].expand_as(predicted["proprio"]))
    expected = (6 * visual + 10 * proprio) / 16
    loss, parts = model.loss(batch)
    assert torch.equal(loss, expected) and parts == {"visual": visual.item(), "proprio": proprio.item()}
    assert torch.equal(model.loss(batch, 1, 0.5)[0], expected)
    for ours, theirs in zip(
        torch.autograd.grad(loss, model.parameters()), torch.autograd.grad(expected, model.parameters()), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name, num_patches", [("vit", 4), ("rwm", 1), ("vjepa2_ac", 4)])
def test_rollout_loss_by_hand(name, num_patches):
    model, batch = tiny_transition(name, num_patches)
    K, decay, start = 4, 0.5, 3 if name == "rwm" else 1
    z = model.encode(batch)
    imagined = model.rollout({k: latent[:, :start] for k, latent in z.items()}, batch["action"][:, : start + K - 1])
    rollout = 0
    for k in range(1, K + 1):
        error = 0
        for part in ("visual", "proprio"):
            difference = imagined[part][:, start + k - 1] - z[part][:, start + k - 1]
            error += (difference.abs() if name == "vjepa2_ac" else difference.square()).mean() * z[part].shape[-1]
        rollout += decay**k * error / (z["visual"].shape[-1] + z["proprio"].shape[-1]) / K
    loss, parts = model.loss(batch, K, decay)
    torch.testing.assert_close(loss, model.loss(batch)[0] + rollout)
    assert parts["rollout"] == pytest.approx(rollout.item(), rel=1e-5)
    assert parts["visual"] == model.loss(batch)[1]["visual"]


@pytest.mark.parametrize("name, num_patches", [("vit", 4), ("rwm", 1), ("vjepa2_ac", 4)])
def test_gradient_goes_through_the_rollout(name, num_patches):
    """The last imagined frame depends on the first action by way of all frames between them."""
    model, batch = tiny_transition(name, num_patches, num_hist=2)
    actions = batch["action"][:, :5].requires_grad_()
    z = model.rollout({k: latent[:, :1] for k, latent in model.encode(batch).items()}, actions)
    (gradient,) = torch.autograd.grad(z["visual"][:, -1].square().sum(), actions)
    assert (gradient.abs().amax((0, 2)) > 0).all()  # num_hist is 2: the first three act through predictions alone


@pytest.mark.parametrize("name, num_patches", [("vit", 4), ("rwm", 1), ("vjepa2_ac", 4)])
def test_gradient_goes_through_the_last_frames_alone(name, num_patches):
    model, batch = tiny_transition(name, num_patches, num_hist=1 if name != "rwm" else 2)
    actions = batch["action"][:, :5].requires_grad_()
    z0 = {k: latent[:, :1].detach() for k, latent in model.encode(batch).items()}
    whole = model.rollout(z0, actions)["visual"]
    for steps in (1, 2, 3, 5, 9):
        z = model.rollout(z0, actions, steps)["visual"]
        assert torch.equal(z, whole)
        (gradient,) = torch.autograd.grad(z[:, -1].square().sum(), actions)
        assert [bool(g) for g in gradient.abs().amax((0, 2)) > 0] == [t >= 5 - steps for t in range(5)]


def test_truncated_gradient_by_hand():
    model, batch = tiny_transition("vit", 4)
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    K, z = 4, {k: latent.detach() for k, latent in model.encode(batch).items()}
    z0 = {k: latent[:, :1] for k, latent in model.encode(batch).items()}  # true: its gradient goes on to phi
    z0["proprio"] = z0["proprio"][:, :, None].expand(-1, -1, 4, -1)  # a copy for each token
    actions, known, error = model.encode_action(batch["action"]), [z0], 0
    for t in range(1, K + 1):  # frames 1 and 2 are cut off; 3 goes on to 4
        window = {k: torch.cat([latent[k] for latent in known[-3:]], 1) for k in z}
        new = {k: latent[:, -1:] for k, latent in model.predict(window, actions[:, max(t - 3, 0) : t]).items()}
        seen = new | {"proprio": new["proprio"][:, :, 0]}
        error += sum(F.mse_loss(seen[k], z[k][:, t : t + 1]) * z[k].shape[-1] for k in z) / 16 / K
        known.append({k: latent.detach() if t < 3 else latent for k, latent in new.items()})
    loss = model.loss(batch, K, grad_steps=2)[0] - model.loss(batch)[0]
    torch.testing.assert_close(loss, error)
    grads = lambda value: torch.autograd.grad(value, parameters, allow_unused=True)  # noqa: E731
    ours, expected = grads(loss), grads(error)
    for name, a, b in zip(names, ours, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4, msg=name)
    through_all = grads(model.loss(batch, K)[0] - model.loss(batch)[0])
    assert max((a - b).abs().max() for a, b in zip(ours, through_all, strict=True)) > 1e-4
    for a, b in zip(through_all, grads(model.loss(batch, K, grad_steps=K)[0] - model.loss(batch)[0]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("N", [1, 4])
def test_two_more_tokens_are_causal_by_frame_and_weigh_as_one_of_the_others(N):
    model, batch = tiny_transition("vit", N, concat_dim=0, emb_dim=6)
    z, psi = model.encode(batch), model.encode_action(batch["action"])
    window = {k: latent[:, :3] for k, latent in z.items()}
    x = torch.cat([window["visual"], window["proprio"][:, :, None], psi[:, :3, None]], dim=2)  # (B, 3, N + 2, d)
    out = model.predictor(x.flatten(1, 2)).view(x.shape)
    after = model.predict(window, psi[:, :3])
    assert torch.equal(after["visual"], out[:, :, :N]) and torch.equal(after["proprio"], out[:, :, N : N + 1])
    truth = torch.cat([z["visual"], z["proprio"][:, :, None]], dim=2)[:, 1:4]
    torch.testing.assert_close(model.loss(batch)[0], (out[:, :, : N + 1] - truth).square().mean())
    for t in range(3):
        moved = x.clone()
        moved[:, t, -1] += torch.randn(6)  # the action
        change = (model.predictor(moved.flatten(1, 2)).view(x.shape) - out).abs().amax((0, 2, 3)) > 1e-6
        assert change[t:].all() and not change[:t].any()
    imagined = model.rollout({k: latent[:, :1] for k, latent in z.items()}, batch["action"][:, :2])
    first = model.predict({k: latent[:, :1] for k, latent in z.items()}, psi[:, :1])
    second = model.predict(
        {"visual": torch.cat([z["visual"][:, :1], first["visual"]], 1),
         "proprio": torch.cat([z["proprio"][:, :1], first["proprio"][:, :, 0]], 1)}, psi[:, :2],
    )  # fmt: skip
    torch.testing.assert_close(imagined["visual"][:, 2], second["visual"][:, 1])


def test_copies_on_each_token_are_in_the_loss():
    model, batch = tiny_transition("vit", 4, num_proprio_repeat=2, num_action_repeat=3, action_emb_dim=5)
    z, psi = model.encode(batch), model.encode_action(batch["action"])
    copies = torch.cat([z["proprio"]] * 2 + [psi] * 3, dim=-1)  # (B, T, 20 + 15)
    x = torch.cat([z["visual"], copies[:, :, None].expand(-1, -1, 4, -1)], dim=-1)
    out = model.predictor(x[:, :3].flatten(1, 2)).view(5, 3, 4, 6 + 20 + 15)
    loss, parts = model.loss(batch)
    torch.testing.assert_close(loss, (out[..., :26] - x[:, 1:4, :, :26]).square().mean())
    assert parts["proprio"] == pytest.approx((out[..., 6:26] - x[:, 1:4, :, 6:26]).square().mean().item(), rel=1e-5)


def test_the_papers_variant_by_hand(tmp_path):
    """No proprio, an MLP for actions, a loss on the next frame alone."""
    model, batch = tiny_transition("vit", 4, variant="paper")
    assert model.proprio_dim == 0 and model.context == 3
    w1, b1, w2, b2 = model.action_encoder.state_dict().values()
    a = (batch["action"][:, :3] - model.action_mean) / model.action_std
    psi = F.gelu(a @ w1.T + b1) @ w2.T + b2
    x = torch.cat([batch["visual"][:, :3], psi[:, :, None].expand(-1, -1, 4, -1)], dim=-1)
    out = model.predictor(x.flatten(1, 2)).view(5, 3, 4, 16)
    loss, parts = model.loss(batch)
    torch.testing.assert_close(loss, (out[:, 2, :, :6] - batch["visual"][:, 3]).square().mean())
    assert parts["proprio"] == 0
    other, _ = tiny_transition("vit", 4, variant="repository")
    assert other.loss(batch)[0] != loss
    eyes = encoders.build_encoder("patches")
    stats = ([0, 0], [1, 1]), ([0] * 4, [1] * 4)
    model = predictor.WorldModel(eyes, *stats, variant="paper", decoder=dict(img_size=64, channel=8), **SIZES["vit"])
    model.save(tmp_path)
    again = predictor.WorldModel.load(tmp_path)
    assert again.variant == "paper" and again.proprio_dim == 0 and again.decoder.dec.blocks[0].out_channels == 8


def test_attention_that_makes_its_scores_again_has_the_same_gradient(monkeypatch):
    vit = predictor.ViTPredictor(4, 3, 8, depth=2, heads=2, dim_head=4, mlp_dim=8).train()
    x, gradients = torch.randn(2, 12, 8), []
    again = mock.Mock(wraps=predictor.checkpoint)
    monkeypatch.setattr(predictor, "checkpoint", again)
    for kept in (2**26, 0):
        monkeypatch.setattr(predictor, "KEPT_SCORES", kept)
        torch.manual_seed(0)
        gradients.append(torch.autograd.grad(vit(x).square().sum(), vit.parameters()))
    assert again.call_count == 2 and all(map(torch.equal, *gradients))  # dropout included


def test_rwm_trains_on_samples_and_imagines_means():
    model, batch = tiny_transition("rwm")
    z = model.encode(batch)
    state, action = (
        torch.cat([z["visual"][:, :, 0], z["proprio"]], -1)[:, :3],
        model.encode_action(batch["action"])[:, :3],
    )
    mean, std, _ = model.predictor(state, action)
    low, high = model.predictor.LOG_STD
    assert mean.shape == std.shape == (5, 3, 10) and (std > np.exp(low)).all() and (std < np.exp(high)).all()
    window = {k: latent[:, :3] for k, latent in z.items()}
    torch.testing.assert_close(model.predict(window, action)["visual"][:, :, 0], mean[..., :6])
    h = model.predictor.gru(torch.cat([state, action], -1))[0]
    torch.testing.assert_close(mean, state + model.predictor.mean(h))  # a change of the last state

    model.train()
    torch.manual_seed(1)
    noise = torch.randn(5, 3, 10)
    torch.manual_seed(1)
    sample = model.predict(window, action)
    torch.testing.assert_close(sample["visual"][:, :, 0], (mean + std * noise)[..., :6])
    torch.testing.assert_close(sample["proprio"][:, :, 0], (mean + std * noise)[..., 6:])
    loss, _ = model.loss(batch, 4)
    gradient = torch.autograd.grad(loss, [model.predictor.log_std[2].bias, model.predictor.mean[2].bias])
    assert all((g.abs() > 0).all() for g in gradient)  # reparameterised: both heads learn


def test_rwm_imagines_as_it_trains():
    """In eval mode the frames of the training loss and those of a rollout are the same, from the same history."""
    model, batch = tiny_transition("rwm", state=True)
    seen = []
    step = model.predictor.step
    model.predictor.step = lambda z, a: seen.append(step(z, a)) or seen[-1]
    model.loss(batch, 4)
    trained = torch.stack([z["visual"][:, -1] for z in seen[1:]], 1)  # the first call is the teacher's
    model.predictor.step = step
    z = model.rollout({k: latent[:, :3] for k, latent in model.encode(batch).items()}, batch["action"][:, :6])
    assert torch.equal(z["visual"][:, 3:], trained)


def test_the_state_itself_can_be_the_token():
    model, batch = tiny_transition("rwm", state=True)
    z = model.encode(batch)
    torch.testing.assert_close(z["visual"], batch["proprio"][:, :, None] / 2)
    assert z["proprio"].shape == (5, 7, 0) and model.encoder.dim == 4
    loss, parts = model.loss(batch)
    assert loss.isfinite() and parts["proprio"] == 0
    frames = {"visual": torch.zeros(5, 7, 8, 8, 3, dtype=torch.uint8), "proprio": batch["proprio"]}
    assert torch.equal(model.encode(frames)["visual"], z["visual"])  # in planning there are frames: not looked at


def test_rotary_positions_by_hand():
    side, head_dim = 2, 14  # sections of 4 for frame, row and column; 2 numbers are left alone
    cos, sin = predictor.rotary_tables(num_frames=3, side=side, head_dim=head_dim)
    x = torch.randn(18, head_dim)
    out = vjepa.rotate(x, cos, sin)
    for token in range(18):
        frame, place = divmod(token, 6)
        row, col = divmod(max(place - 2, 0), side)
        for i in range(head_dim):
            section, j = divmod(i, 4)
            angle = 0 if section == 3 else (frame, row, col)[section] * 10000 ** -((j % 2) / 2)
            partner = -x[token, i + 1] if i % 2 == 0 else x[token, i - 1]
            assert out[token, i].item() == pytest.approx(
                (x[token, i] * np.cos(angle) + partner * np.sin(angle)).item(), abs=1e-5
            )


def pattern(shape, k, scale=1.0):
    return (torch.sin(torch.arange(np.prod(shape), dtype=torch.float64) * 0.7 + k) * scale).float().reshape(shape)


def test_ac_predictor_gives_what_the_release_gives():
    """Numbers of facebookresearch/vjepa2 (c2963a4), VisionTransformerPredictorAC(img_size=(32, 32), patch_size=16,
    num_frames=6, tubelet_size=2, embed_dim=6, predictor_embed_dim=32, depth=2, num_heads=2, action_embed_dim=3)."""
    ac = predictor.ACPredictor(4, 3, 6, 3, 3, width=32, depth=2, heads=2, mlp_dim=128, integrate=True)
    for i, (name, parameter) in enumerate(sorted(ac.named_parameters())):
        parameter.data = pattern(parameter.shape, i, 0.3) + float("norm" in name and name.endswith("weight"))
    x, actions, states = pattern((1, 12, 6), 1), pattern((1, 3, 3), 2), pattern((1, 3, 3), 3)
    with torch.no_grad():
        out, after = ac(x, actions, states)
    release = [-2.10043, 0.9186, -0.20609, -0.50056, 1.76521, -1.85027, -2.0992, 0.90276, -0.22772, -0.48819, 1.85079]
    torch.testing.assert_close(out.flatten()[::7], torch.tensor(release), atol=1e-4, rtol=0)
    torch.testing.assert_close(after, states + actions)


def test_ac_predictor_has_the_releases_keys_and_size():
    with torch.device("meta"):
        ac = predictor.ACPredictor(256, 2, 1408, 7, 7, integrate=True)
    state = ac.state_dict()
    assert sum(p.numel() for p in ac.parameters()) == 305_220_992 - 7 * 1024  # without the extrinsics' encoder
    block = "attn.proj attn.qkv mlp.fc1 mlp.fc2 norm1 norm2".split()
    names = [f"predictor_blocks.{i}.{part}" for i in range(24) for part in block]
    names += "predictor_embed action_encoder state_encoder predictor_norm predictor_proj".split()
    assert state.keys() == {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}
    assert state["predictor_blocks.0.attn.qkv.weight"].shape == (3072, 1024)


def test_a_released_predictor_loads_and_a_foreign_one_is_named(tmp_path):
    sizes = dict(num_patches=4, num_frames=2, dim=6, proprio_dim=3, action_dim=3, width=24, depth=1, heads=2, mlp_dim=8)
    released, ours = predictor.ACPredictor(**sizes, integrate=True), predictor.ACPredictor(**sizes)
    state = {f"module.{k}": v for k, v in released.state_dict().items()}
    extra = {"module.extrinsics_encoder.weight": torch.zeros(24, 2), "module.extrinsics_encoder.bias": torch.zeros(24)}
    path = tmp_path / "ac.pt"
    torch.save({"predictor": state | extra, "encoder": {}, "epoch": 3, "opt": {"state": {0: torch.zeros(1)}}}, path)
    head = ours.state_head.weight.clone()
    ours.load_released(path)
    for name, tensor in released.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor)
    assert torch.equal(ours.state_head.weight, head)

    before = {k: v.clone() for k, v in ours.state_dict().items()}
    for content, message in (
        ({"predictor": predictor.ACPredictor(**sizes).state_dict()}, "2 keys differ, e.g. state_head.bias"),
        ({"predictor": predictor.ACPredictor(**sizes | {"depth": 2}, integrate=True).state_dict()},
         "12 keys differ, e.g. predictor_blocks.1.attn.proj.bias"),
        ({"predictor": predictor.ACPredictor(**sizes | {"action_dim": 6}, integrate=True).state_dict()},
         r"of another size: action_encoder.weight is \(24, 6\), not \(24, 3\)"),
        ({"predictor": predictor.ACPredictor(**sizes | {"dim": 8}, integrate=True).state_dict()},
         r"of another size: predictor_embed.weight is \(24, 8\), not \(24, 6\)"),
        ({"a": torch.zeros(1)}, "is no V-JEPA 2-AC predictor"),
    ):  # fmt: skip
        torch.save(content, path)
        with pytest.raises(UserError, match=message) as error:
            ours.load_released(path)
        assert "\n" not in str(error.value)
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="damaged"):
        ours.load_released(path)
    with pytest.raises(UserError, match="no file at"):
        ours.load_released(tmp_path / "missing.pt")
    assert all(torch.equal(before[k], v) for k, v in ours.state_dict().items())


def test_ac_tokens_are_normalised_and_its_actions_can_be_the_change_of_state():
    model, batch = tiny_transition("vjepa2_ac", 4)
    z = model.encode(batch)
    after = model.predict({k: latent[:, :3] for k, latent in z.items()}, model.encode_action(batch["action"][:, :3]))
    for tokens in (z["visual"], after["visual"]):
        torch.testing.assert_close(tokens.mean(-1), torch.zeros_like(tokens[..., 0]), atol=1e-5, rtol=0)
        torch.testing.assert_close(tokens.var(-1, correction=0), torch.ones_like(tokens[..., 0]), atol=0.05, rtol=0)
    ac = predictor.ACPredictor(4, 3, 6, 2, 10, width=24, depth=1, heads=2, mlp_dim=8, integrate=True)
    states, actions = torch.randn(5, 3, 2), torch.randn(5, 3, 10)
    expected = states + actions.view(5, 3, 5, 2).sum(2)  # the five actions of a model step
    torch.testing.assert_close(ac(torch.randn(5, 12, 6), actions, states)[1], expected)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: tiny_transition("rwm", 4), "--predictor rwm takes one token a frame, not 4"),
        (lambda: tiny_transition("vjepa2_ac", 3), "takes a square grid of tokens a frame, not 3"),
        (lambda: tiny_transition("vjepa2_ac", 4, heads=5), "--width 24 is not a multiple of twice --heads 5"),
        (lambda: tiny_transition("vjepa2_ac", 4, integrate=True), "actions of 10 numbers are no changes of a state"),
    ],
)
def test_a_transition_that_does_not_fit_is_one_line(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize("name", ["rwm", "vjepa2_ac"])
def test_checkpoints_know_their_transition(name, tmp_path):
    torch.manual_seed(0)
    eyes = predictor.build_eyes("state" if name == "rwm" else "pca", weights="random")
    stats = (torch.zeros(2), torch.ones(2)), (torch.zeros(4), torch.ones(4))
    predictor.WorldModel(eyes, *stats, predictor=name, **SIZES[name]).save(tmp_path)
    again = predictor.WorldModel.load(tmp_path)
    assert type(again.predictor) is predictor.PREDICTORS[name] and again.sizes == SIZES[name]
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    content["config"]["predictor"] = "vit"
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(UserError, match="not a checkpoint of this version"):
        predictor.WorldModel.load(tmp_path)


# -- decoders.py --------------------------------------------------------------------------------------------


def test_decoders_paint_frames_of_every_size_and_teach_only_themselves():
    for N, dim, sizes, pixels in (
        (1, 6, dict(img_size=64, depth=2), 81), (1, 6, dict(img_size=20, depth=2), 27),
        (4, 6, dict(img_size=32, channel=8, n_res_block=1, n_res_channel=4), 32),
        (9, 6, dict(img_size=40, channel=8, quantize=True, n_embed=5), 48),
    ):  # fmt: skip
        decoder = decoders.build_decoder(N, dim, **sizes)
        z = torch.randn(2, 3, N, dim)
        images, distance = decoder(z)
        assert images.shape == (2, 3, 3, sizes["img_size"], sizes["img_size"])
        assert (distance > 0) == sizes.get("quantize", False)
        grid = torch.zeros(1, dim, math.isqrt(N), math.isqrt(N))
        raw = decoder.network(z.flatten(0, 2)) if N == 1 else decoder.dec(decoder.upsample_b(grid))
        assert raw.shape[-1] == pixels
    with pytest.raises(UserError, match="one token a frame"):
        decoders.build_decoder(1, 6, img_size=64, quantize=True)
    with pytest.raises(UserError, match="square grid of tokens, not 3"):
        decoders.build_decoder(3, 6, img_size=64)
    model, batch = tiny_transition("vit", 4, decoder=dict(img_size=32, channel=8, n_res_block=1, n_res_channel=4))
    frames = torch.randint(256, (5, 7, 32, 32, 3)).float()
    loss, reconstruction, codes = model.decoder_loss(model.encode(batch)["visual"].requires_grad_(), frames)
    image = model.decoder(batch["visual"])[0][3, 2]
    assert model.decode(batch["visual"])[3, 2, 4, 5, 0] == round((image[0, 4, 5].item() + 1) * 127.5)
    expected = (model.decoder(batch["visual"])[0] - (frames.permute(0, 1, 4, 2, 3) / 127.5 - 1)).square().mean()
    torch.testing.assert_close(reconstruction, expected)
    assert loss == reconstruction and codes == 0
    loss.backward()
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None} == {"decoder"}


def test_codes_are_the_nearest_and_follow_by_a_moving_average():
    codebook = decoders.Quantize(3, 4, decay=0.9)
    x, before = torch.randn(2, 5, 3), codebook.embed.clone()
    chosen = (x[..., None, :] - before.T).square().sum(-1).argmin(-1)  # (2, 5)
    codes, distance = codebook.eval()(x)
    torch.testing.assert_close(codes, before.T[chosen])
    torch.testing.assert_close(distance, (codes - x).square().mean())
    assert torch.equal(codebook.embed, before)
    codebook.train()(x)
    count = torch.tensor([(chosen == k).sum() for k in range(4)]) * 0.1
    total = torch.stack([x[chosen == k].sum(0) for k in range(4)], 1) * 0.1 + 0.9 * before
    size = (count + 1e-5) / (count.sum() + 4e-5) * count.sum()
    torch.testing.assert_close(codebook.embed, total / size)
    codes, _ = codebook.eval()(x)
    with torch.autocast("cpu", torch.bfloat16):  # as training on a GPU
        assert torch.equal(codebook(x)[0], codes)
        codebook.train()(x.bfloat16())


def test_psnr_and_ssim():
    x = torch.full((2, 3, 20, 20), 0.5)
    assert decoders.psnr(x, x + 0.1).item() == pytest.approx(20, abs=1e-4)
    y = torch.rand(2, 3, 20, 20)
    assert decoders.ssim(y, y).item() == pytest.approx(1, abs=1e-5) and decoders.ssim(y, y.flip(3)) < 0.2
    line = np.exp(-((np.arange(11) - 5) ** 2) / 4.5)
    window = np.outer(line, line) / line.sum() ** 2
    a, b = (torch.rand(1, 1, 11, 11).expand(1, 3, 11, 11) for _ in range(2))
    mean = lambda v: (v[0, 0].numpy() * window).sum()  # noqa: E731
    m_a, m_b = mean(a), mean(b)
    s_a, s_b, s_ab = mean(a * a) - m_a**2, mean(b * b) - m_b**2, mean(a * b) - m_a * m_b
    expected = (2 * m_a * m_b + 1e-4) * (2 * s_ab + 9e-4) / ((m_a**2 + m_b**2 + 1e-4) * (s_a + s_b + 9e-4))
    real = F.conv2d
    middle = lambda x, w, **options: real(x, w, **options)[..., 5:6, 5:6]  # noqa: E731  (the one whole window)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoders.F, "conv2d", middle)
        assert decoders.ssim(a, b).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.filterwarnings("ignore::UserWarning:torchvision")
def test_lpips_where_its_weights_are_at_hand(tmp_path, monkeypatch):
    a, b = np.random.default_rng(0).integers(0, 256, (2, 3, 64, 64, 3), dtype=np.uint8)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(decoders, "perceptual_metric", decoders.perceptual_metric.__wrapped__)
    assert decoders.likeness(a, b).keys() == {"psnr", "ssim"}
    vgg = models.vgg16(init_weights=False)
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    torch.save(vgg.state_dict(), tmp_path / "hub/checkpoints/vgg16-397923af.pth")
    assert decoders.likeness(a, a)["lpips"] == 0 and decoders.likeness(a, b)["lpips"] > 0.01


# -- train.py and plan.py -----------------------------------------------------------------------------------


def test_train_and_plan_end_to_end(workplace, script):
    code, _, err = script("train", *TINY, "--name", "tiny")
    assert code == 0, err
    run = workplace / "runs" / "tiny"
    assert {path.name for path in run.iterdir()} == {"args.json", "model.pt", "log.csv", "curves.png"}
    log = (run / "log.csv").read_text().splitlines()
    assert len(log) == 3 and log[0].startswith("epoch,train,val,val_visual,val_proprio,copy")
    assert float(log[2].split(",")[1]) < float(log[1].split(",")[1])
    assert "trained already" in script("train", *TINY, "--name", "tiny")[1]

    budget = ["--n-evals", 3, "--seed", 0, 1, "--max-iter", 2, "--num-samples", 20, "--topk", 5, "--opt-steps", 2]
    code, out, err = script("plan", *budget, "--baselines", "random,oracle", "--n-gifs", 1)
    assert code == 0, err
    results = json.loads((workplace / "plan_outputs" / "tiny" / "results.json").read_text())
    assert results["n_evals"] == 6 and len(results["success_by_iter"]) == len(results["interval"]) == 2
    assert set(results["controls"]) == {"random", "oracle"} and len(results["controls"]["oracle"]) == 2
    assert (workplace / "plan_outputs" / "tiny" / "problem_0.gif").exists()
    code, _, err = script("plan", *budget, "--goal-source", "dset", "--n-gifs", 0, "--name", "again")
    assert code == 0, err
    script("plan", *budget, "--name", "repeat", "--n-gifs", 0)
    repeat = json.loads((workplace / "plan_outputs" / "repeat" / "results.json").read_text())
    assert repeat["success_by_iter"] == results["success_by_iter"]


def test_the_true_simulator_plans_and_observations_are_encoded_once(workplace, script, monkeypatch):
    script("train", *TINY, "--name", "tiny")
    model = predictor.WorldModel.load("runs/tiny")
    env = data.make_env("pointmaze")
    monkeypatch.setattr(sys, "argv", ["plan", "--n-evals", "8", "--max-iter", "3", "--opt-steps", "4"])
    args = plan.get_args()
    starts, goals = plan.make_problems(env, args, 5)
    success = plan.solve(
        plan.Worlds(env, starts, goals), plan.simulator_cost(plan.Worlds(env, starts, goals)), model, args, "cpu"
    )
    worlds = plan.Worlds(env, starts, goals, films=1)
    first = worlds.obs["visual"][0].copy()
    success = plan.solve(worlds, plan.simulator_cost(worlds), model, args, "cpu")
    assert success[-1].float().mean() >= 0.75
    assert (env.goal_reached(worlds.states, goals) == success[-1].numpy()).all()
    film = worlds.films[0]
    assert (film[0] == first).all() and (film[-1] == worlds.obs["visual"][0]).all() and len(film) % 25 == 1

    encoded, predicted = [], []
    encode, predict = model.encode, model.predict
    monkeypatch.setattr(model, "encode", lambda obs: encoded.append(len(obs["visual"])) or encode(obs))
    monkeypatch.setattr(model, "predict", lambda z, a: predicted.append(len(a)) or predict(z, a))
    args.max_iter = 1
    plan.solve(worlds, plan.latent_cost(model, worlds, 0.0, torch.device("cpu")), model, args, "cpu")
    assert encoded == [8, 8]  # goals, then observations: once per plan
    assert predicted == [8 * 300] * (4 * 5)  # one call per CEM iteration and planner step, for all candidates


def test_a_decoder_looks_and_changes_nothing(workplace, script):
    """The transition model is bit for bit the one trained without; what it imagines can be seen."""
    for name, extra in (("blind", []), ("seeing", ["--decoder"])):
        code, _, err = script("train", *TINY, "--dropout", "0.1", "--name", name, *extra)
        assert code == 0, err
    blind, seeing = (predictor.load_checkpoint(f"runs/{name}")["model"] for name in ("blind", "seeing"))
    assert all(torch.equal(tensor, seeing[name]) for name, tensor in blind.items())
    log = np.genfromtxt("runs/seeing/log.csv", delimiter=",", names=True)
    assert log["recon"][1] < log["recon"][0] and (log["recon_pred"] > 0).all() and np.isfinite(log["ssim"]).all()
    strips = imageio.imread("runs/seeing/imagined.png")
    assert strips.shape == (4 * 3 * 66, 6 * 66, 3) and Path("runs/seeing/imagined.gif").exists()

    code, out, err = script("plan", "--ckpt", "runs/seeing", *BUDGET, "--n-gifs", 2, "--decode", "--planner", "mpc-cem")
    assert code == 0 and "imagined against real frames: PSNR" in out, err
    out = workplace / "plan_outputs" / "seeing"
    assert imageio.imread(out / "imagined_1.png").shape == (2 * 66, 6 * 66, 3)
    assert imageio.imread(out / "problem_0.gif").shape == (26, 4 * 64, 4 * (4 * 64 + 6), 3)
    code, _, err = script("plan", "--ckpt", "runs/blind", *BUDGET, "--decode")
    assert code == 2 and "--decode: runs/blind has no decoder; train one with python train.py --decoder" in err


def test_what_is_imagined_stands_beside_what_happened():
    model = tiny_model(decoder=dict(img_size=64, depth=2))
    env = data.make_env("pointmaze")
    starts = np.array([env.sample_state(np.random.default_rng(i)) for i in range(2)])
    worlds = plan.Worlds(env, starts, starts, films=1)
    actions = np.random.default_rng(0).uniform(-1, 1, (2, 2, 10)).astype(np.float32)
    first = {name: torch.from_numpy(o[:1, None].copy()) for name, o in worlds.obs.items()}
    worlds.act(np.arange(2), actions)
    second = {name: torch.from_numpy(o[:1, None].copy()) for name, o in worlds.obs.items()}
    worlds.act(np.arange(1), actions[:1, :1])
    with torch.no_grad():
        z = model.rollout(model.encode(first), torch.from_numpy(actions[:1]))["visual"]
        again = model.rollout(model.encode(second), torch.from_numpy(actions[:1, :1]))["visual"][:, 1:]
        expected = model.decode(torch.cat([z, again], dim=1))[0]
    assert (plan.imagine(model, worlds.plans[0], "cpu") == expected).all() and len(worlds.films[0]) == 3 * 5 + 1


def test_worlds_remember_frames_and_actions():
    env = data.make_env("pointmaze")
    starts = np.array([env.sample_state(np.random.default_rng(i)) for i in range(3)])
    worlds = plan.Worlds(env, starts, starts, history=3, frameskip=5)
    seen = [worlds.obs["visual"].copy()]
    assert (worlds.past["visual"] == seen[0][:, None]).all() and not worlds.taken.any()
    actions = np.random.default_rng(0).uniform(-1, 1, (3, 3, 10)).astype(np.float32)
    for t in range(3):
        worlds.act(np.array([0, 2]), actions[[0, 2], t : t + 1])
        seen.append(worlds.obs["visual"].copy())
        expected = np.stack([seen[0], *seen][-3:], axis=1)
        assert (worlds.past["visual"][[0, 2]] == expected[[0, 2]]).all()
    assert (worlds.taken.reshape(3, 2, 10)[[0, 2]] == actions[[0, 2], 1:]).all()
    whole = plan.Worlds(env, starts, starts, films=1, history=3, frameskip=5)
    whole.act(np.array([0, 2]), actions[[0, 2]])  # all at once: the same, and one plan
    assert all((whole.past[name] == worlds.past[name]).all() for name in whole.past)
    assert (whole.plans[0][0][1][-15:] == actions[0].reshape(-1, 2)).all() and len(whole.plans[0]) == 1
    assert not worlds.taken[1].any() and (worlds.past["visual"][1] == seen[0][1]).all()


@pytest.mark.parametrize("history", [1, 3])
def test_objectives_by_hand(history):
    model = tiny_model()
    env = data.make_env("pointmaze")
    starts = np.array([env.sample_state(np.random.default_rng(i)) for i in range(4)])
    worlds = plan.Worlds(env, starts[:2], starts[2:], history=history, frameskip=5)
    worlds.act(np.arange(2), np.full((2, 1, 10), 0.3, np.float32))
    actions, device = torch.rand(2, 3, 4, 10), torch.device("cpu")
    with torch.no_grad():
        goal = model.encode({k: torch.from_numpy(o[:, None]) for k, o in worlds.goal_obs.items()})
        known = model.encode({k: torch.from_numpy(o) for k, o in worlds.past.items()})
        for b, m in ((0, 2), (1, 0)):
            before = (
                torch.tensor([0.0, 0.3])[-history + 1 :, None].expand(-1, 10) if history > 1 else torch.zeros(0, 10)
            )
            z = model.rollout({k: v[b : b + 1] for k, v in known.items()}, torch.cat([before, actions[b, m]])[None])
            J = sum(
                weight * (z[k][0, history - 1 :] - goal[k][b]).flatten(1).square().mean(1)
                for k, weight in (("visual", 1), ("proprio", 0.5))
            )
            w = torch.tensor([1.0, 3, 9, 27, 81]) / 121
            for objective, expected in (("last", J[-1]), ("all", (w * J).mean())):
                cost = plan.latent_cost(model, worlds, 0.5, device, objective, 3.0)(np.arange(2))(actions)
                assert cost.shape == (2, 3)
                torch.testing.assert_close(cost[b, m], expected)


def test_every_planner_plans_and_several_make_a_table(workplace, script):
    script("train", *TINY, "--name", "tiny")
    planners = ["cem", "gd", "mpc-gd", "mpc-icem", "mppi"]
    budget = ["--n-evals", 2, "--max-iter", 2, "--num-samples", 20, "--topk", 5, "--opt-steps", 2, "--n-gifs", 0]
    code, out, err = script("plan", *budget, "--planner", ",".join(planners), "--baselines", "random,oracle")
    assert code == 0, err
    table = (workplace / "plan_outputs" / "tiny" / "table.md").read_text()
    assert table in out and table.startswith(
        "| planner | search per plan | plans × model steps | success | random | or"
    )
    assert "| `gd` | 2 gradient steps | 1 × 5 |" in table and "| `mpc-icem` | 2 × 20 candidates | 2 × 5 |" in table
    for planner in planners:
        result = json.loads((workplace / "plan_outputs" / "tiny" / planner / "results.json").read_text())
        assert len(result["success_by_iter"]) == (2 if planner.startswith("mpc-") else 1)
        assert len(result["controls"]["oracle"]) == len(result["success_by_iter"])


def test_gradient_descent_comes_closer_to_the_goal_in_imagination(workplace, script):
    script("train", *TINY, "--name", "tiny")
    model, env, device = predictor.WorldModel.load("runs/tiny"), data.make_env("pointmaze"), torch.device("cpu")
    costs = {}
    for kind, steps in (("randn", 1), ("randn", 40), ("zero", 40)):
        options = ["--planner", "gd", "--opt-steps", str(steps), "--lr", "30", "--sample-type", kind]
        args = plan.get_args([*options, "--n-evals", "4"])
        worlds = plan.Worlds(env, *plan.make_problems(env, args, 5), films=4)
        cost = plan.latent_cost(model, worlds, 0.0, device)(np.arange(4))
        success = plan.solve(worlds, plan.latent_cost(model, worlds, 0.0, device), model, args, device)
        assert success.shape == (1, 4) and abs(np.array([p[0][1] for p in worlds.plans])).max() <= 1
        actions = torch.from_numpy(np.stack([p[0][1] for p in worlds.plans])).view(4, 1, 5, 10)
        costs[kind, steps] = cost(actions).mean().item()
    assert costs["randn", 40] < 0.9 * costs["randn", 1] and costs["zero", 40] < costs["randn", 1]


def test_the_papers_variant_trains_and_plans_with_its_defaults(workplace, script):
    code, _, err = script("train", *TINY, "--variant", "paper")
    assert code == 0, err
    budget = ["--n-evals", 2, "--num-samples", 20, "--topk", 5, "--opt-steps", 1, "--n-gifs", 1, "--goal-H", 3]
    code, _, err = script("plan", *budget)
    assert code == 0, err
    result = json.loads((workplace / "plan_outputs" / "pointmaze_pca_paper" / "results.json").read_text())
    settled = {name: result["args"][name] for name in ("n_taken_actions", "history", "max_iter")}
    assert settled == {"n_taken_actions": 1, "history": 3, "max_iter": 30}
    args = train.get_args(["--variant", "paper", "--encoder", "dinov2"])
    assert args.encoder_img_size == 224 and args.name == "pointmaze_dinov2_paper"
    code, _, err = script("plan", *budget, "--history", 1, "--n-taken-actions", 2, "--max-iter", 1, "--name", "other")
    assert code == 0, err


def test_goals_out_of_a_file_are_those_saved(workplace, script):
    script("train", *TINY, "--name", "tiny")
    for source in ("random_action", "random_state"):
        code, _, err = script(
            "plan", *BUDGET, "--goal-source", source, "--save-targets", "goals.json", "--name", "first"
        )
        assert code == 0, err
        env = data.make_env("pointmaze")
        starts, goals = plan.read_problems("goals.json", env, "pointmaze")
        assert starts.shape == goals.shape == (3, 4)
    args = plan.get_args(["--n-evals", "3"])
    for saved, drawn in zip((starts, goals), plan.make_problems(env, args, 5), strict=True):
        assert np.array_equal(saved, drawn)
    code, _, err = script("plan", *BUDGET, "--goal-source", "file", "--goal-file", "goals.json", "--name", "second")
    assert code == 0, err
    first, second = (json.loads(Path(f"plan_outputs/{name}/results.json").read_text()) for name in ("first", "second"))
    assert first["success_by_iter"] == second["success_by_iter"] and second["n_evals"] == 3

    content = json.loads(Path("goals.json").read_text())
    command = ["plan", *BUDGET, "--goal-source", "file", "--goal-file"]
    for broken, message in (
        (content | {"env": "pointmaze-large"}, "goals.json holds problems of pointmaze-large"),
        (content | {"goals": content["goals"][:2]}, "goals.json is no file of --save-targets (goals of shape (2, 4)"),
        (content | {"starts": [[0, 0]], "goals": [[1, 1]]}, "--save-targets (starts of shape (1, 2)"),
        (content | {"starts": [], "goals": []}, "--save-targets (starts of shape (0,)"),
        ({"starts": []}, "goals.json is no file of --save-targets"), ([1], "goals.json is no file of --save-targets"),
    ):  # fmt: skip
        Path("goals.json").write_text(json.dumps(broken))
        code, _, err = script(*command, "goals.json", "--name", "third")
        assert code == 2 and message in err and len(err.strip().splitlines()) == 1
    code, _, err = script(*command, "nowhere.json", "--name", "third")
    assert code == 2 and "no file at nowhere.json: write one with --save-targets" in err
    assert not Path("plan_outputs/third").exists()


@pytest.mark.parametrize("shift", ["noise", "distractor"])
def test_filming_changes_nothing_that_is_seen(shift):
    env, seen = data.make_env("pointmaze", shift=shift), []
    states = np.array([[-1, 1, 0, 0], [1, 1, 0, 0]], float)
    for films in (0, 2):
        worlds = plan.Worlds(env, states, states, films)
        worlds.act(np.arange(2), np.ones((2, 1, 10), np.float32))
        seen.append(worlds.obs["visual"])
    assert np.array_equal(*seen) and not np.array_equal(*worlds.films[0][1:3])


def test_only_a_world_that_can_be_set_is_planned_in(workplace, script):
    model, _ = tiny_transition("rwm", state=True)
    model.world = dict(env="carracing", img_size=64, data="d")
    model.save("runs/cars")
    for command in (["plan"], ["plan", "--horizon-error", 2]):
        code, _, err = script(*command, "--ckpt", "runs/cars")
        assert code == 2 and err.startswith("error: carracing cannot be put into a start and a goal state: plan in")


def test_elites_are_asked_of_those_that_have_them():
    assert plan.get_args("--ckpt x --planner mppi,gd --num-samples 20".split()).topk == 30
    for planner in ("--planner mppi --baselines oracle", "--planner gd,mpc-icem"):
        with pytest.raises(UserError, match="--topk 30 must lie between 2 and --num-samples 20"):
            plan.get_args(f"--ckpt x {planner} --num-samples 20".split())


def test_the_log_is_written_before_the_model_that_ends_training(workplace, script, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "write_log", killed)
    assert script("train", *TINY, "--name", "tiny")[0] == 130
    assert not Path("runs/tiny/model.pt").exists()


def test_what_a_training_left_damaged_is_named(workplace, script):
    code, out, err = script("train", *TINY, "--name", "tiny")
    assert code == 0 and "datasets/pointmaze: 30 episodes, frameskip 5" in out
    checkpoint = predictor.load_checkpoint("runs/tiny")
    torch.save(checkpoint | {"optimizer": {}, "schedule": {}, "log": []}, "runs/tiny/model.pt")
    code, _, err = script("train", *TINY, "--name", "tiny")
    assert code == 2 and "model.pt does not go on with these flags: --overwrite" in err
    (tokens,) = Path("datasets/pointmaze").glob("tokens_pca_*.npy")
    whole = tokens.read_bytes()
    tokens.write_bytes(whole[: len(whole) // 2])
    code, _, err = script("train", *TINY, "--name", "other")
    tokens.write_bytes(whole)
    assert code == 2 and f"{tokens} is damaged: remove it" in err
    Path("runs/tiny/args.json").write_text("{")
    code, _, err = script("train", *TINY, "--name", "tiny")
    assert code == 2 and "args.json is damaged: remove it" in err


def test_training_deletes_only_what_it_is_told_to(workplace, script):
    other = workplace / "runs" / "mine" / "other.txt"
    other.parent.mkdir(parents=True)
    other.touch()
    assert script("train", *TINY, "--name", "mine")[0] == 0 and other.exists()
    assert script("train", *TINY, "--name", "mine", "--overwrite")[0] == 0 and not other.exists()


def test_a_killed_training_resumes_bit_for_bit(workplace):
    command = [sys.executable, HERE / "train.py", *TINY, "--dropout", "0.1", "--batch-size", "8", "--epochs", "6"]
    subprocess.run([*command, "--name", "whole"], check=True, capture_output=True)
    process = subprocess.Popen([*command, "--name", "killed"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (workplace / "runs" / "killed" / "model.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    state = predictor.load_checkpoint("runs/killed")
    assert "optimizer" in state and len(state["log"]) < 6
    result = subprocess.run([*command, "--name", "killed"], check=True, capture_output=True, text=True)
    assert "going on after epoch" in result.stdout
    whole, killed = (predictor.load_checkpoint(f"runs/{name}")["model"] for name in ("whole", "killed"))
    for name in whole:
        assert torch.equal(whole[name], killed[name]), name


def test_steps_ends_training_early_and_encodes_what_it_needs(workplace, script):
    folder = workplace / "datasets" / "pointmaze"
    before = set(folder.iterdir())
    code, _, err = script("train", *TINY[2:], "--batch-size", 8, "--steps", 3, "--name", "short")
    assert code == 0, err
    assert len((workplace / "runs" / "short" / "log.csv").read_text().splitlines()) == 2
    assert set(folder.iterdir()) == before  # no token cache
    model, dataset = predictor.WorldModel.load("runs/short"), data.Dataset("datasets/pointmaze")
    rows = np.array([[3, 4, 5], [40, 41, 42]])
    on_demand = train.TokensOnDemand(model.encoder, dataset, "cpu")[rows]
    assert on_demand.shape == (2, 3, 1, 32)
    close(torch.from_numpy(on_demand), torch.from_numpy(train.token_cache(model.encoder, dataset, "cpu")[rows]))


def test_the_study_measures_every_run_once(workplace, script):
    budget = BUDGET[:-2] + ["--steps", 4, "--drift", 2, "--workers", 1, "--env", "pointmaze", "--max-iter", 2]
    budget += ["--episodes", len(data.Dataset("datasets/pointmaze"))]
    flags = [*budget, "--encoder", "pca", "--seeds", "0,1", "--shift", "colours"]
    code, out, err = script("study", *flags)
    assert code == 0, err
    root = workplace / "runs" / "study"
    rows = [line for line in (root / "table.md").read_text().splitlines() if line.startswith("| pca |")]
    assert "1 × 32" in rows[0] and rows[0].count("±") == 6 and rows[1].count("±") == 2
    assert (root / "study.png").exists() and "| oracle |" in out
    result = json.loads((root / "pointmaze_pca_1" / "study.json").read_text())
    assert len(result["success"]) == 2 and list(result["shift"]) == ["colours"] and result["probe"][0] > 0.7
    assert len(result["drift"]["model"]) == len(result["drift"]["copy"]) == 2

    code, _, err = script("study", *budget, "--topk", 30, "--name", "late")
    assert code == 2 and "--topk 30 must lie between" in err and not (workplace / "runs" / "late").exists()
    stamps = {path: path.stat().st_mtime_ns for path in root.glob("*/study.json")}
    (root / "pointmaze_pca_1" / "study.json").unlink()
    code, _, err = script("study", *flags)
    assert (
        code == 0 and json.loads((root / "pointmaze_pca_1" / "study.json").read_text())["success"] == result["success"]
    )
    changed = {path for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp}
    assert changed == {root / "pointmaze_pca_1" / "study.json"}
    code, _, err = script("study", *flags, "--steps", 13)
    assert code == 2 and "was begun with other --steps" in err


def test_linear_probe_and_intervals():
    tokens, weights = np.random.default_rng(0).normal(size=(400, 2, 3)).astype(np.float32), np.arange(12).reshape(6, 2)
    states = np.column_stack([tokens.reshape(400, 6) @ weights + 5, np.random.default_rng(1).normal(size=400)])
    read = study.linear_probe(tokens, states, np.arange(300), np.arange(300, 400))
    assert min(read[:2]) > 0.999 and abs(read[2]) < 0.1
    mean, half = study.interval([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]])
    close(torch.tensor(mean), torch.tensor([2.0, 5.0]).double())
    close(torch.tensor(half), torch.tensor([4.30 / 3**0.5, 0.0]).double())


@pytest.mark.parametrize(
    "command, message",
    [
        ("data --env nowhere", "unknown environment 'nowhere'; known: pointmaze"),
        ("data --episodes 0", "not a positive whole number"),
        ("data --inspect missing", "no data set at missing"),
        ("data --inspect cut", "cut is not a whole data set (frames.npy"),
        ("data --out datasets/pointmaze", "already there"),
        ("data --episodes 1 --out cut/meta.json/d", "cannot write cut/meta.json"),
        ("train --encoder nowhere", "unknown encoder 'nowhere'; known: pca"),
        ("train --env nowhere", "unknown environment 'nowhere'"),
        ("train --data missing", "no data set at missing"),
        ("train --img-size 32 --data datasets/pointmaze", "has --img-size 64, not the 32 that is asked for"),
        ("train --env pointmaze-large --data datasets/pointmaze", "has --env pointmaze, not the pointmaze-large"),
        ("train --num-hist 6", "no episode of datasets/pointmaze is as long as a window of 7 model steps"),
        ("train --frameskip 7", "not a multiple of the data set's own 5"),
        ("train --num-hist 0", "not a positive whole number"),
        ("train --lr -1", "--lr -1.0 is not between 0 and 1"),
        ("train --encoder dinov2 --weights missing.pth", "no weights at missing.pth"),
        ("train --encoder vae --encoder-img-size 128", "sees 64 px"),
        ("train --encoder pca --weights x.pth", "it takes no --weights"),
        ("train --device nowhere", "cannot use the device 'nowhere'"),
        ("train --seed -1", "not a whole number of at least 0"),
        ("plan --ckpt missing", "no checkpoint at missing/model.pt"),
        ("plan", "no trained model under runs/"),
        ("plan --topk 400 --ckpt x", "--topk 400 must lie between 2 and --num-samples 300"),
        ("plan --n-evals -3", "not a positive whole number"),
        ("plan --n-taken-actions 6 --ckpt x", "--n-taken-actions 6 is more than --goal-H 5"),
        ("plan --baselines magic --ckpt x", "unknown --baselines magic"),
        ("train --rollout-steps 4", "as a window of 7 model steps, 7 rows; the longest has 6"),
        ("train --predictor rwm --encoder state", "11 rows; the longest has 6: collect longer ones"),
        ("train --rollout-steps 0", "not a positive whole number"),
        ("train --rollout-grad 0", "not a positive whole number"),
        ("train --encoder vjepa_tiny", "as a window of 8 model steps, 8 rows; the longest has 6"),
        ("train --rollout-decay 1.5", "--rollout-decay 1.5 is not above 0 and at most 1"),
        ("train --predictor lstm", "invalid choice: 'lstm'"),
        ("train --predictor rwm --rollout-steps 1 --heads 2", "--predictor rwm has no --heads"),
        ("train --width 64", "--predictor vit has no --width"),
        ("train --predictor vjepa2_ac --dropout 0.1", "--predictor vjepa2_ac has no --dropout"),
        ("train --predictor vjepa2_ac --heads 5", "--width 128 is not a multiple of twice --heads 5"),
        ("train --predictor-weights x.pt", "--predictor-weights are for --predictor vjepa2_ac, not vit"),
        ("train --predictor vjepa2_ac --predictor-weights x.pt", "no file at x.pt"),
        (
            "train --predictor rwm --rollout-steps 1 --encoder dinov2 --weights random",
            "--predictor rwm takes one token a frame, not 196: try --encoder pca or state",
        ),
        ("plan --ckpt a b", "one --ckpt at a time can plan; --horizon-error compares several"),
        ("plan --ckpt a b --horizon-error 3", "no checkpoint at a/model.pt"),
        ("plan --ckpt a --horizon-error 0", "not a positive whole number"),
        ("train --predictor rwm --rollout-steps 1 --concat-dim 0", "--predictor rwm has no --concat-dim"),
        (
            "train --concat-dim 0 --variant paper",
            "--concat-dim 0 wants proprio and action as wide as a token, 32, not 0",
        ),
        ("train --variant paper --predictor rwm", "--variant paper is DINO-WM's, of --predictor vit, not rwm"),
        ("train --decoder vq", "here is one token a frame: --decoder plain"),
        ("train --decoder jpeg", "invalid choice: 'jpeg'"),
        ("plan --ckpt a --planner cem,sgd", "unknown --planner sgd; known: cem, icem, mppi, gd, mpc-cem"),
        ("plan --ckpt a --goal-source file", "--goal-source file and --goal-file PATH go together"),
        ("plan --ckpt a --goal-file x.json", "--goal-source file and --goal-file PATH go together"),
        ("plan --ckpt a --lr 0", "--temperature and --lr must be above 0"),
        ("plan --ckpt a --planner icem --keep 300", "--keep 300 leaves no new candidate of --num-samples 300"),
        ("plan --ckpt a --momentum 1", "--momentum must be at least 0 and below 1"),
        ("plan --ckpt a --maxnorm 0", "and --maxnorm above 0"),
        ("plan --ckpt a --shift dark", "invalid choice: 'dark'"),
        ("train --steps 0", "not a positive whole number"),
        ("study --encoder pca,nowhere", "unknown encoder 'nowhere'; known: pca"),
        ("study --encoder r3m@missing.pth", "no weights at missing.pth"),
        ("study --seeds 0,x", "x is not a whole number of at least 0"),
        ("study --shift dark", "unknown --shift dark; known: colours"),
        ("study --env nowhere", "unknown environment 'nowhere'"),
        ("study --encoder ,", "--encoder names nothing"),
        ("train --episodes 5", "datasets/pointmaze has"),
        ("train --encoder dinov2 --weights weights/dinov2--small", "weights/dinov2--small is neither a file nor"),
        ("data --out cut/.. --overwrite", "holds no data set that could be overwritten"),
    ],
)
def test_what_wrong_input_gets(command, message, script, workplace, dataset):
    cut = workplace / "cut"
    cut.mkdir()
    for file in dataset.path.iterdir():
        if file.suffix in (".npy", ".json"):
            content = file.read_bytes()
            (cut / file.name).write_bytes(content[: len(content) // 2] if file.name == "frames.npy" else content)
    before = sorted(workplace.rglob("*"))
    code, _, err = script(*command.split())
    assert code == 2 and message in err
    assert "Traceback" not in err and len(err.strip().splitlines()[-1]) < 300
    assert sorted(workplace.rglob("*")) == before  # nothing half-written


def test_a_checkpoint_of_another_world_or_other_flags_is_refused(workplace, script, monkeypatch):
    script("train", *TINY, "--name", "tiny")
    data.collect("medium", "pointmaze-medium", 3, 7, 5, 64, workers=1)
    code, _, err = script("plan", "--goal-source", "dset", "--data", "medium")
    assert code == 2 and "has --env pointmaze-medium, not the pointmaze that is asked for" in err
    code, _, err = script("train", *TINY, "--name", "tiny", "--lr", "0.01")
    assert code == 2 and "trained with other --lr" in err
    nan = torch.tensor(float("nan"), requires_grad=True)
    monkeypatch.setattr(predictor.WorldModel, "loss", lambda *_: (nan, {}))
    code, _, err = script("train", *TINY, "--name", "nan")
    assert (
        code == 2
        and "the loss is not finite in epoch 1" in err
        and not (workplace / "runs" / "nan" / "model.pt").exists()
    )


QUICK = {"vit": TINY, "rwm": ["--epochs", "2", "--width", "16"], "vjepa2_ac": [*TINY, "--width", "24"]}
BUDGET = ["--n-evals", 3, "--max-iter", 1, "--num-samples", 20, "--topk", 5, "--opt-steps", 2, "--n-gifs", 0]


def test_each_transition_trains_plans_and_shows_its_horizon_error(workplace, script):
    for name, extra in (("vit", []), ("rwm", ["--encoder", "state"]), ("vjepa2_ac", [])):
        code, _, err = script("train", "--predictor", name, "--rollout-steps", 2, "--name", name, *extra, *QUICK[name])
        assert code == 0, err
        log = np.genfromtxt(f"runs/{name}/log.csv", delimiter=",", names=True)
        assert np.isfinite(log["val_rollout"]).all() and log["train"][1] < log["train"][0]
        code, _, err = script("plan", "--ckpt", f"runs/{name}", *BUDGET, "--momentum", 0.15, "--maxnorm", 1)
        assert code == 0, err
        assert json.loads((workplace / "plan_outputs" / name / "results.json").read_text())["n_evals"] == 3
    runs = [f"runs/{name}" for name in ("vit", "rwm", "vjepa2_ac")]
    code, out, err = script("plan", "--horizon-error", 4, "--n-evals", 6, "--name", "error", "--ckpt", *runs)
    assert code == 0, err
    assert out.count("copying") == out.count("  simulator") == 3
    assert (workplace / "plan_outputs" / "error" / "horizon_error.png").exists()
    curves = json.loads((workplace / "plan_outputs" / "error" / "horizon_error.json").read_text())["curves"]
    assert list(curves) == runs
    for by_name in curves.values():
        assert all(len(curve) == 4 and min(curve) > 0 for curve in by_name.values())
        assert by_name["simulator"][0] < 0.5 * by_name["copy"][0]
    script("plan", "--horizon-error", 4, "--n-evals", 6, "--name", "again", "--ckpt", "runs/rwm", "runs/vit")
    again = json.loads((workplace / "plan_outputs" / "again" / "horizon_error.json").read_text())["curves"]
    assert again == {run: curves[run] for run in again}  # the trajectories are the same, whoever is compared


def test_horizon_error_of_the_truth_is_zero(workplace, script, monkeypatch):
    """A model that imagines with MuJoCo: its error is rounding, and copying's is the distance travelled."""
    torch.manual_seed(0)
    stats = (torch.zeros(2), torch.ones(2)), (torch.zeros(4), torch.ones(4))
    model = predictor.WorldModel(predictor.StateEncoder(), *stats, predictor="rwm", **SIZES["rwm"])
    env = data.make_env("pointmaze")

    def simulate(z0, actions):
        states = [latent for latent in z0["visual"][:, :, 0].double().numpy().swapaxes(0, 1)]
        for t in range(len(states) - 1, actions.shape[1]):
            chunk = actions[:, t].double().numpy().reshape(len(actions), 5, 2)
            states.append(env.simulate(states[-1], chunk))
        return {"visual": torch.from_numpy(np.stack(states, 1)).float()[:, :, None]}

    monkeypatch.setattr(model, "rollout", simulate)
    curves = plan.horizon_error(env, {"truth": model.eval()}, 3, 4, [99], torch.device("cpu"))["truth"]
    assert max(curves["model"]) < 1e-4 < min(curves["simulator"][0], 0.01) < curves["copy"][0]


def test_runs_of_different_worlds_have_no_common_horizon(workplace, script):
    for name, frameskip in (("a", 5), ("b", 1)):
        model, _ = tiny_transition("rwm", state=True)
        model.frameskip, model.world = frameskip, dict(env="pointmaze", img_size=64, data="d")
        if frameskip == 1:
            model = predictor.WorldModel(
                predictor.StateEncoder(), ([0, 0], [1, 1]), ([0] * 4, [1] * 4), frameskip=1, predictor="rwm",
                world=model.world, **SIZES["rwm"],
            )  # fmt: skip
        model.save(f"runs/{name}")
    code, _, err = script("plan", "--ckpt", "runs/a", "runs/b", "--horizon-error", "3")
    assert code == 2 and "compares runs of one environment, --img-size and --frameskip" in err
    code, _, err = script("plan", "--ckpt", "runs/a", "--alpha", "0.5")
    assert code == 2 and "--alpha weighs proprio, which runs/a does not have" in err
    assert not (workplace / "plan_outputs").exists()


def test_a_run_of_another_predictor_is_not_resumed(workplace, script):
    script("train", *TINY, "--name", "tiny")
    code, _, err = script("train", *TINY, "--name", "tiny", "--predictor", "vjepa2_ac")
    assert code == 2 and "trained with other --predictor, --rollout-steps" in err


def test_training_starts_from_a_released_predictor(workplace, script):
    """One that fits is where training starts; one of a robot's seven numbers is refused before anything is written."""
    sizes = dict(width=24, depth=1, heads=2, mlp_dim=16, integrate=True)
    fits = predictor.ACPredictor(1, 3, 32, 4, 10, **sizes | {"integrate": False}).state_dict()
    fits = {k: v for k, v in fits.items() if not k.startswith("state_head")}
    torch.save({"predictor": fits}, "fits.pt")
    torch.save({"predictor": predictor.ACPredictor(1, 3, 32, 7, 7, **sizes).state_dict()}, "robot.pt")
    command = ["train", "--predictor", "vjepa2_ac", *QUICK["vjepa2_ac"], "--lr", 0, "--predictor-weights"]
    code, _, err = script(*command, "robot.pt", "--name", "robot")
    assert code == 2 and "action_encoder.weight is (24, 7), not (24, 10)" in err
    assert not (workplace / "runs").exists()
    code, _, err = script(*command, "fits.pt", "--name", "fits")
    assert code == 0, err
    trained = predictor.load_checkpoint("runs/fits")["model"]
    assert all(torch.equal(trained[f"predictor.{k}"], v) for k, v in fits.items())  # the learning rate was 0


# -- released.py, and the world of the released data ---------------------------------------------------------


def test_pointmaze_d4rl_follows_the_published_model():
    """D4RL's maze2d-umaze, geom by geom, and 500 steps of it as its environment takes them."""
    import mujoco

    spec = mujoco.MjSpec()
    spec.option.timestep, spec.option.gravity, spec.option.iterations = 0.01, [0, 0, 0], 20
    spec.option.integrator = mujoco.mjtIntegrator.mjINT_EULER
    box, sphere, plane = (getattr(mujoco.mjtGeom, f"mjGEOM_{kind}") for kind in ("BOX", "SPHERE", "PLANE"))
    contact = dict(condim=1, margin=0.002, friction=[0.5, 0.1, 0.1], density=1000)
    world = spec.worldbody
    world.add_geom(type=plane, size=[40, 40, 0.25], pos=[0, 0, -0.1], contype=1, conaffinity=0, **contact)
    ball = world.add_body(name="ball", pos=[1.2, 1.2, 0])
    ball.add_geom(type=sphere, size=[0.1, 0, 0], contype=1, conaffinity=1, **contact)
    for name, axis in (("ball_x", [1, 0, 0]), ("ball_y", [0, 1, 0])):
        ball.add_joint(name=name, type=mujoco.mjtJoint.mjJNT_SLIDE, axis=axis, damping=[1, 0, 0])
        motor = spec.add_actuator(name=name, target=name, trntype=mujoco.mjtTrn.mjTRN_JOINT, gear=[100, 0, 0, 0, 0, 0])
        motor.ctrllimited, motor.ctrlrange = True, [-1, 1]
    for row, cells in enumerate(["#####", "#GOO#", "###O#", "#OOO#", "#####"]):
        for col in (i for i, cell in enumerate(cells) if cell == "#"):
            world.add_geom(
                type=box, size=[0.5, 0.5, 0.2], pos=[row + 1, col + 1, 0], contype=2, conaffinity=1, **contact
            )
    model = spec.compile()
    simulation = mujoco.MjData(model)

    env, rng, touching = data.make_env("pointmaze-d4rl"), np.random.default_rng(0), 0
    state = env.sample_state(rng)
    env.set_state(state)
    simulation.qpos[:], simulation.qvel[:] = state[:2], state[2:]
    for action in rng.uniform(-1.2, 1.2, (50, 2)).repeat(10, axis=0):  # held, so that the walls are reached
        simulation.qvel[:] = simulation.qvel.clip(-5, 5)
        simulation.ctrl[:] = action.clip(-1, 1)
        mujoco.mj_step(model, simulation, 5)
        env.step(action, render=False)
        np.testing.assert_allclose(env.state, np.r_[simulation.qpos, simulation.qvel], atol=1e-6)
        touching += any(box in model.geom_type[contact.geom] for contact in simulation.contact)
    assert touching > 50


def test_pointmaze_d4rl_is_seen_through_mujoco_pys_free_camera():
    env = data.make_env("pointmaze-d4rl", 224)
    side = 2 * (5.5 + 0.235 + 4) * np.tan(np.pi / 8)  # metres in view: its distance is the model's extent
    for x, y in [(0.8, 0.8), (0.8, 2.8), (2.8, 2.8), (2.8, 1.0)]:
        env.set_state(np.array([x, y, 0, 0]))
        frame = env.observe()["visual"].astype(float)
        green = (frame[..., 1] - frame[..., [0, 2]].max(-1)).clip(min=30) - 30
        rows, cols = np.indices(green.shape)
        center = np.array([(green * cols).sum(), (green * rows).sum()]) / green.sum() + 0.5
        np.testing.assert_allclose(center, 112 + 224 / side * (np.array([x, y]) + 1.2 - 3), atol=1)
    wall, floor = frame[112 - 224 // 4, 112], frame[5, 5:60]  # rows grow with y, columns with x
    assert wall[0] > wall[1] > wall[2] and (floor[:, 2] > floor[:, 0]).all()  # sand; a blue checker
    assert len({tuple(pixel) for pixel in floor.round(-1)}) >= 2


def test_pointmaze_d4rl_poses_the_releases_problems():
    env = data.make_env("pointmaze-d4rl")
    rng = np.random.RandomState(99 * 3 + 1)
    expected = []
    while len(expected) < 2:
        x, y = rng.uniform(0.5, 3.1), rng.uniform(0.5, 3.1)
        in_a_leg, in_the_bend = not 1.1 < x < 2.5, 1.1 < x < 2.5 and 2.5 <= y
        if in_a_leg or in_the_bend:
            expected.append([x, y, rng.uniform(-5.2262554, 5.2262554), rng.uniform(-5.2262554, 5.2262554)])
    np.testing.assert_array_equal(env.sample_problem(99, 3), expected)
    args = types.SimpleNamespace(seed=[99, 7], n_evals=4, goal_H=5, goal_source="random_state")
    starts, goals = plan.make_problems(env, args, 5)
    np.testing.assert_array_equal([starts[3], goals[3]], expected)
    np.testing.assert_array_equal(starts[5], env.sample_problem(7, 1)[0])
    with pytest.raises(UserError, match="seed 0 is none of the release's"):
        env.sample_problem(0, 0)
    here, away, behind = np.array([[1, 1, 0, 0], [1.4, 1, 3, 3], [1.6, 1, 0, 0]], float)
    assert env.goal_reached(here, away) and not env.goal_reached(here, behind)  # less than 0.5 m, whatever the speed
    assert env.free[tuple(np.round(starts[:, :2] + 0.2).astype(int).T)].all()


LENGTHS = [30, 26, 30, 28, 30, 30, 27, 30, 30, 30]


@pytest.fixture(scope="session")
def archive_content(tmp_path_factory):
    """The released format: ten episodes, padded, the padding not a number; frame t of episode e begins with (e, t)."""
    path = tmp_path_factory.mktemp("released") / "point_maze"
    (path / "obses").mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(10, 30, 4, generator=generator, dtype=torch.float64)
    states[..., :2] = states[..., :2].clamp(-0.1, 0.1) + 0.8
    actions = torch.rand(10, 30, 2, generator=generator) * 2 - 1
    for e, length in enumerate(LENGTHS):
        states[e, length:], actions[e, length:] = torch.nan, torch.nan
        frames = torch.randint(256, (length, 32, 32, 3), generator=generator, dtype=torch.uint8)
        frames[:, 0, 0, 0], frames[:, 0, 0, 1] = e, torch.arange(length)
        torch.save(frames, path / "obses" / f"episode_{e:03d}.pth")
    for name, tensor in (("states", states), ("actions", actions), ("seq_lengths", torch.tensor(LENGTHS))):
        torch.save(tensor, path / f"{name}.pth")
    return path


@pytest.fixture
def archive(archive_content, tmp_path, monkeypatch):
    """A copy of it, in an empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(archive_content, tmp_path / "point_maze")).relative_to(tmp_path)


def test_the_released_data_set(archive, monkeypatch):
    dataset = released.open_dataset(archive)
    actions, states = (torch.load(archive / f"{name}.pth") for name in ("actions", "states"))
    rows = torch.cat([states[e, :length] for e, length in enumerate(LENGTHS)]).float()
    statistics = dataset.statistics()
    np.testing.assert_array_equal(statistics["proprio"][0], rows.mean(0))
    np.testing.assert_array_equal(statistics["proprio"][1], rows.std(0))  # n - 1, and all episodes
    np.testing.assert_array_equal(dataset.actions[30:56], actions[1, :26])
    order = torch.randperm(10, generator=torch.Generator().manual_seed(42)).tolist()
    assert [part.tolist() for part in dataset.split()] == [sorted(order[:9]), order[9:]]
    assert (dataset.meta["env"], dataset.meta["img_size"], dataset.frames.shape) == (
        "pointmaze-d4rl",
        32,
        (291, 32, 32, 3),
    )

    opened, read = [], released.read_tensor
    monkeypatch.setattr(released, "read_tensor", lambda path: opened.append(path.name) or read(path))
    frames = dataset.frames[np.array([29, 30, 57])]
    assert frames[:, 0, 0, :2].tolist() == [[0, 29], [1, 0], [2, 1]]
    assert dataset.frames[54:58][:, 0, 0, :2].tolist() == [[1, 24], [1, 25], [2, 0], [2, 1]]
    assert opened == ["episode_000.pth", "episode_001.pth", "episode_002.pth"] + ["episode_001.pth", "episode_002.pth"]
    assert dataset.frames[30].shape == (32, 32, 3) and dataset.frames[::100].shape == (3, 32, 32, 3)

    windows = data.Windows(dataset, np.arange(10), num_frames=4, frameskip=5)
    assert len(windows) == sum(length - 20 + 1 for length in LENGTHS)
    batch = windows.batch(np.array([12]), np.arange(291)[:, None, None])  # the second of episode 1, which begins at 30
    assert batch["visual"].ravel().tolist() == [31, 36, 41, 46]
    np.testing.assert_array_equal(batch["action"][0, 1], actions[1, 6:11].ravel())


def test_the_released_data_set_trains_plans_and_is_described(archive, script):
    code, _, err = script("train", "--data", archive, "--encoder", "patches", *TINY, "--name", "tiny")
    assert code == 0, err
    for extra in ([], ["--goal-source", "dset"]):
        code, _, err = script("plan", "--ckpt", "runs/tiny", *BUDGET, *extra)
        assert code == 0, err
    results = json.loads(Path("plan_outputs/tiny/results.json").read_text())
    assert results["n_evals"] == 3 and len(results["success_by_iter"]) == 1
    code, out, _ = script("released", archive)
    assert code == 0 and "10 episodes of 26 to 30 rows" in out and "(291, 32, 32, 3)" in out
    code, _, err = script("train", "--data", archive, "--env", "pointmaze")
    assert code == 2 and "point_maze has --env pointmaze-d4rl, not the pointmaze that is asked for" in err


def rewrite(path, change):
    torch.save(change(torch.load(path)), path)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda p: (p / "actions.pth").unlink(), "no file at point_maze/actions.pth"),
        (lambda p: (p / "obses" / "episode_004.pth").unlink(), "no file at point_maze/obses/episode_004.pth"),
        (lambda p: rewrite(p / "actions.pth", lambda a: a.index_fill(1, torch.tensor([7]), torch.nan)),
         "point_maze/actions.pth: actions of episode 0 are not finite"),
        (lambda p: rewrite(p / "states.pth", lambda s: s[:, :20]), "point_maze/states.pth: (10, 20, 4) has no room"),
        (lambda p: rewrite(p / "seq_lengths.pth", lambda n: n[:8]), "has no room for the 8 episodes"),
        (lambda p: rewrite(p / "obses" / "episode_002.pth", lambda f: f[:11]),
         "point_maze/obses/episode_002.pth: 11 frames, where seq_lengths.pth says 30"),
        (lambda p: rewrite(p / "obses" / "episode_003.pth", lambda f: f.float()), "of torch.float32 are not (T, H"),
        (lambda p: rewrite(p / "seq_lengths.pth", lambda n: n * 0), "seq_lengths.pth is not one whole number of steps"),
        (lambda p: (p / "states.pth").write_bytes(b"half"), "point_maze/states.pth is damaged"),
        (lambda p: torch.save({"states": 1}, p / "states.pth"), "states.pth is damaged, or does not hold a tensor"),
    ],
)  # fmt: skip
def test_a_released_data_set_that_is_not_whole(archive, script, damage, message):
    damage(archive)
    code, _, err = script("train", "--data", archive, "--encoder", "patches")
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1
    assert not Path("runs").exists()


# The release's modules, as far as their pickles and their arithmetic go: attention with an explicit softmax, its mask
# an attribute and no buffer, both embeddings convolutions of kernel size 1.


class TheirAttention(nn.Module):
    def __init__(self, dim, heads, mask):
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(dim)
        self.to_qkv, self.to_out = nn.Linear(dim, 3 * 64 * heads, bias=False), nn.Sequential(nn.Linear(64 * heads, dim))
        self.attend, self.bias = nn.Softmax(dim=-1), mask

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (self.heads, 64)).transpose(1, 2) for y in self.to_qkv(self.norm(x)).chunk(3, -1))
        dots = (q @ k.mT / 8).masked_fill(self.bias[: x.shape[1], : x.shape[1]] == 0, -torch.inf)
        return self.to_out((self.attend(dots) @ v).transpose(1, 2).flatten(2))


class TheirFeedForward(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        layers = nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(0.1), nn.Linear(hidden, dim), nn.Dropout(0.1)
        self.net = nn.Sequential(nn.LayerNorm(dim), *layers)


class TheirTransformer(nn.Module):
    def __init__(self, dim, mask):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.layers = nn.ModuleList(
            nn.ModuleList([TheirAttention(dim, 2, mask), TheirFeedForward(dim, 8)]) for _ in range(2)
        )


class TheirViT(nn.Module):
    def __init__(self, dim, length, patches):
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.randn(1, length, dim))
        frame = torch.arange(length) // patches
        self.transformer = TheirTransformer(dim, (frame[:, None] >= frame).float())

    def forward(self, x):
        x = x + self.pos_embedding[:, : x.shape[1]]
        for attention, feed_forward in self.transformer.layers:
            x = attention(x) + x
            x = feed_forward.net(x) + x
        return self.transformer.norm(x)


class TheirEmbedding(nn.Module):
    def __init__(self, width, emb_dim=10):
        super().__init__()
        self.patch_embed = nn.Conv1d(width, emb_dim, kernel_size=1, stride=1)


def as_modules(state):
    """Nested modules with these tensors, which behave as nothing."""
    root = nn.Module()
    for name, tensor in state.items():
        *parents, leaf = name.split(".")
        module = root
        for parent in parents:
            module = module._modules.setdefault(parent, nn.Module())
        module.register_parameter(leaf, nn.Parameter(tensor))
    return root


class TheirOptimizer:
    def __init__(self, optimizer):
        self.optimizer, self.device = optimizer, torch.device("cpu")


HOMES = {
    TheirAttention: "models.vit.Attention", TheirFeedForward: "models.vit.FeedForward",
    TheirTransformer: "models.vit.Transformer", TheirViT: "models.vit.ViTPredictor",
    TheirEmbedding: "models.proprio.ProprioceptiveEmbedding",
    TheirOptimizer: "accelerate.optimizer.AcceleratedOptimizer",
}  # fmt: skip


def save_as_released(content, path):
    """torch.save, with the classes above in the modules where the release has them."""
    with pytest.MonkeyPatch.context() as patch:
        for kind, home in HOMES.items():
            kind.__module__, _, kind.__qualname__ = home.rpartition(".")
            for name in (home.partition(".")[0], kind.__module__):
                patch.setitem(sys.modules, name, sys.modules.get(name) or types.ModuleType(name))
            setattr(sys.modules[kind.__module__], kind.__qualname__, kind)
        torch.save(content, path)


SETTINGS = """
img_size: 32
frameskip: 5
concat_dim: 1
action_emb_dim: 10
num_action_repeat: 1
proprio_emb_dim: 10
num_proprio_repeat: 1
num_hist: 3
num_pred: 1
has_decoder: true
env: {name: point_maze, dataset: {normalize_action: true, data_path: point_maze}}
encoder: {_target_: models.dino.DinoV2Encoder, name: dinov2_vits14, feature_key: x_norm_patchtokens}
decoder: {_target_: models.vqvae.VQVAE, channel: 4, n_embed: 3, n_res_block: 1, n_res_channel: 2, quantize: true}
predictor: {_target_: models.vit.ViTPredictor, depth: 2, heads: 2, mlp_dim: 8, dropout: 0.1, emb_dropout: 0, pool: mean}
"""


@pytest.fixture
def released_run(archive):
    """A run in the released format, of the width of DINOv2's tokens, on 32 px frames: 4 patches."""
    run = Path("outputs") / "pm"
    (run / "checkpoints").mkdir(parents=True)
    (run / "hydra.yaml").write_text(SETTINGS)
    vit = TheirViT(384 + 20, 3 * 4, 4)
    optimizer = torch.optim.AdamW(vit.parameters())
    vit(torch.randn(1, 4, 404)).sum().backward()
    optimizer.step()  # its state is a defaultdict of tensors
    decoder = decoders.VQVAEDecoder(384, 32, channel=4, n_res_block=1, n_res_channel=2, quantize=True, n_embed=3)
    content = dict(epoch=3, predictor=vit, predictor_optimizer=TheirOptimizer(optimizer),
                   decoder=as_modules(decoder.state_dict()), action_encoder=TheirEmbedding(10),
                   proprio_encoder=TheirEmbedding(4))  # fmt: skip
    save_as_released(content, run / "checkpoints" / "model_latest.pth")
    return run, content


def test_a_released_run_computes_what_its_modules_did(released_run):
    run, theirs = released_run
    model = released.load_model(run, weights="random")
    assert (model.encoder.name, model.encoder.img_size, model.encoder.num_patches) == ("dinov2", 28, 4)
    statistics = released.open_dataset("point_maze").statistics()
    torch.testing.assert_close(model.proprio_std, torch.from_numpy(statistics["proprio"][1]), rtol=0, atol=0)
    z, actions = {"visual": torch.randn(2, 1, 4, 384), "proprio": torch.randn(2, 1, 10)}, torch.rand(2, 5, 10)
    mean, std = (torch.from_numpy(s).repeat(5) for s in statistics["action"])
    with torch.no_grad():
        embed = lambda part, x: theirs[part].patch_embed(x.mT).mT  # noqa: E731
        state = torch.randn(2, 1, 4)
        expected = embed("proprio_encoder", (state - model.proprio_mean) / model.proprio_std)
        torch.testing.assert_close(model.encode({"visual": z["visual"], "proprio": state})["proprio"], expected)
        # their rollout: whole tokens go back in, only the action's part is replaced
        a = embed("action_encoder", (actions - mean) / std)[:, :, None].expand(-1, -1, 4, -1)
        x = torch.cat([z["visual"], z["proprio"][:, :, None].expand(-1, -1, 4, -1), a[:, :1]], dim=-1)  # (B, 1, N, D)
        for t in range(1, 6):
            after = theirs["predictor"].eval()(x[:, -3:].flatten(1, 2)).view(2, -1, 4, 404)[:, -1:]
            if t < 5:
                after[..., -10:] = a[:, t : t + 1]
            x = torch.cat([x, after], dim=1)
        imagined = model.rollout(z, actions)
    torch.testing.assert_close(imagined["visual"], x[..., :384], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(imagined["proprio"], x[:, :, 0, 384:394], rtol=1e-4, atol=1e-5)
    assert model.decoder.quantize and model.decode(z["visual"]).shape == (2, 1, 32, 32, 3)
    for name, tensor in theirs["decoder"].state_dict().items():
        torch.testing.assert_close(model.decoder.state_dict()[name], tensor, rtol=0, atol=0)


def test_other_compositions_of_the_release_come_over(released_run):
    """Two tokens more, as wide as the others; and copies of embeddings of different widths."""
    run, content = released_run
    for concat_dim, widths, repeats, dim in ((0, (384, 384), (1, 1), 384), (1, (6, 8), (2, 3), 384 + 2 * 6 + 3 * 8)):
        tokens = 6 if concat_dim == 0 else 4
        content |= dict(predictor=TheirViT(dim, 3 * tokens, tokens), proprio_encoder=TheirEmbedding(4, widths[0]))
        content |= dict(action_encoder=TheirEmbedding(10, widths[1]))
        save_as_released(content, run / "checkpoints" / "model_latest.pth")
        settings = SETTINGS.replace("concat_dim: 1", f"concat_dim: {concat_dim}")
        for name, width, repeat in zip(("proprio", "action"), widths, repeats, strict=True):
            settings = settings.replace(f"{name}_emb_dim: 10", f"{name}_emb_dim: {width}")
            settings = settings.replace(f"num_{name}_repeat: 1", f"num_{name}_repeat: {repeat}")
        (run / "hydra.yaml").write_text(settings)
        model = released.load_model(run, weights="random")
        z = {"visual": torch.randn(2, 1, 4, 384), "proprio": torch.randn(2, 1, widths[0])}
        a = torch.randn(2, 1, widths[1])
        if concat_dim == 0:
            x = torch.cat([z["visual"], z["proprio"][:, :, None], a[:, :, None]], dim=2)
        else:
            parts = torch.cat([z["proprio"], z["proprio"], a, a, a], dim=-1)
            x = torch.cat([z["visual"], parts[:, :, None].expand(-1, -1, 4, -1)], dim=-1)
        with torch.no_grad():
            theirs = content["predictor"].eval()(x.flatten(1, 2)).view(x.shape)
            after = model.predict(z, a)
        expected = theirs[:, :, -2] if concat_dim == 0 else theirs[:, :, 0, 384 : 384 + widths[0]]
        torch.testing.assert_close(after["visual"], theirs[:, :, :4, :384], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(after["proprio"][:, :, 0], expected, rtol=1e-4, atol=1e-5)


def test_a_released_encoder_that_was_trained_comes_over(released_run):
    run, content = released_run
    eyes = encoders.build_encoder("dinov2", weights="random").vit  # 196 px; the run's are 28
    content["encoder"] = as_modules({f"base_model.{k}": v for k, v in eyes.state_dict().items()})
    save_as_released(content, run / "checkpoints" / "model_latest.pth")
    model = released.load_model(run)
    resampled = resample_positions(eyes.pos_embed, 5)
    torch.testing.assert_close(model.encoder.vit.pos_embed, resampled, rtol=0, atol=0)
    torch.testing.assert_close(model.encoder.vit.blocks[3].attn.qkv.weight, eyes.blocks[3].attn.qkv.weight)


def test_a_released_run_plans_at_once_or_converted(released_run, script):
    run, _ = released_run
    code, _, err = script("plan", "--ckpt", run, "--weights", "random", *BUDGET)
    assert code == 0, err
    assert json.loads(Path("plan_outputs/pm/results.json").read_text())["n_evals"] == 3
    code, out, err = script("plan", "--ckpt", run, "--weights", "random", "--convert", "runs/pm")
    assert code == 0 and "python plan.py --ckpt runs/pm" in out, err
    code, out, err = script("plan", "--ckpt", "runs/pm", *BUDGET, "--goal-source", "dset", "--n-gifs", 1, "--decode")
    assert code == 0 and "PSNR" in out, err
    code, out, _ = script("released", run)
    assert code == 0 and "predictor.blocks.1.0.to_qkv.weight" in out and "depth: 2" in out
    code, _, err = script("plan", "--ckpt", run, "--weights", "random", "--convert", "runs/pm")
    assert code == 2 and "runs/pm is a run already" in err
    code, _, err = script("plan", "--ckpt", "runs/pm", "--convert", "runs/again")
    assert code == 2 and "runs/pm is a run of ours" in err


def hydra(old, new):
    return lambda run: (run / "hydra.yaml").write_text(SETTINGS.replace(old, new))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda run: (run / "hydra.yaml").unlink(), "no hydra.yaml in outputs/pm"),
        (lambda run: (run / "hydra.yaml").write_text("a: [b"), "outputs/pm/hydra.yaml is damaged, or not YAML"),
        (hydra("num_hist: 3", ""), "outputs/pm/hydra.yaml has no num_hist"),
        (hydra("depth: 2,", ""), "outputs/pm/hydra.yaml has no predictor.depth"),
        (hydra("name: point_maze", "name: pusht"), "env.name is pusht, not point_maze"),
        (hydra("models.dino.DinoV2Encoder", "models.encoder.r3m.load_r3m"), "encoder._target_ is models.encoder.r3m"),
        (hydra("data_path: point_maze", "data_path: /far"), "are not at /far: give --data"),
        (hydra("depth: 2,", "depth: 3,"), "do not agree"),
        (lambda run: (run / "checkpoints" / "model_latest.pth").unlink(), "no checkpoint at outputs/pm/checkpoints"),
        (lambda run: (run / "checkpoints" / "model_latest.pth").write_bytes(b"PK"), "model_latest.pth is damaged"),
        (lambda run: torch.save({"epoch": 1}, run / "checkpoints" / "model_latest.pth"), "hold a module 'predictor'"),
    ],
)  # fmt: skip
def test_a_released_run_that_is_not_whole(released_run, script, damage, message):
    run, _ = released_run
    damage(run)
    code, _, err = script("plan", "--ckpt", run, "--weights", "random")
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1
    assert not Path("plan_outputs").exists()


class Malicious:
    """Pickles to a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "function, args, name",
    [
        (os.system, ("touch owned",), f"{os.system.__module__}.system"),
        (eval, ("open('owned', 'w')",), "builtins.eval"),
        (getattr, (complex, "real"), "builtins.getattr"),
        (torch.load, ("owned",), "torch.serialization.load"),
        (Path, ("owned",), "pathlib"),
        (subprocess.Popen, (["touch", "owned"],), "Popen"),
    ],
)
@pytest.mark.parametrize("deep", [False, True])
def test_a_malicious_checkpoint_is_refused_and_has_no_effect(released_run, script, function, args, name, deep):
    run, content = released_run
    bomb = Malicious(function, *args)
    if deep:  # in the attributes of a module inside a module, behind tensors
        content["predictor"].transformer.layers[1][0].to_out[0].note = {"a": [torch.zeros(3), (1, bomb)]}
    else:
        content["epoch"] = bomb
    save_as_released(content, run / "checkpoints" / "model_latest.pth")
    code, _, err = script("plan", "--ckpt", run, "--weights", "random")
    assert code == 2 and len(err.strip().splitlines()) == 1
    assert name in err and "which no checkpoint of DINO-WM needs: refused" in err
    assert not Path("owned").exists() and not Path("plan_outputs").exists()


def test_a_shell_has_no_behaviour_and_what_it_is_given_stays_in_it(tmp_path):
    """State for a known name or a module's class, in place of an instance: nothing outlives the reading."""

    def archive(*body):
        with zipfile.ZipFile(tmp_path / "x.pth", "w") as file:
            file.writestr("x/data.pkl", b"\x80\x02" + b"".join(body) + b".")
        return tmp_path / "x.pth"

    state = b"N}U\x01aK\x01s\x86b"  # BUILD with (None, {"a": 1}): sets attributes
    for name in (b"torch._utils\n_rebuild_tensor_v2\n", b"models.vit\nAttention\n", b"collections\nOrderedDict\n"):
        with contextlib.suppress(UserError):
            released.read_pickle(archive(b"c" + name, state))
    assert not hasattr(released.Shell, "a") and not hasattr(released.Shell, "state")
    shell = released.read_pickle(archive(b"cmodels.vit\nAttention\nK\x05\x85R}U\x01aK\x01sb"))
    assert type(shell) is released.Shell and vars(shell) == {"state": {"a": 1}}


def test_the_observation_path_is_the_releases_bit_for_bit():
    """Frames of 224 px to the 196 px that DINOv2 sees, in torchvision's words and the release's order."""
    frames = torch.randint(256, (3, 224, 224, 3), dtype=torch.uint8)
    theirs = transforms.Compose([
        transforms.Resize(224), transforms.CenterCrop(224), transforms.Normalize([0.5] * 3, [0.5] * 3),
        transforms.Resize(196),
    ])  # fmt: skip
    encoder = encoders.build_encoder("dinov2", weights="random")
    seen = []
    encoder.vit.forward_features = lambda x: seen.append(x) or torch.zeros(3, 197, 384)
    encoder(to_tensor(frames))
    assert torch.equal(seen[0], theirs((frames / 255.0).permute(0, 3, 1, 2)))
