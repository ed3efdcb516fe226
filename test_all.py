"""Every claim of the components, in minutes, on a CPU:  python -m pytest -q test_all.py"""

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

import cem
import data
import encoders
import plan
import predictor
import train
import vae_mdnrnn as wm
from data import UserError

HERE = Path(__file__).parent
TINY = ["--epochs", "2", "--depth", "1", "--heads", "2", "--mlp-dim", "16"]


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
    assert not (tmp_path / ".d.partial").exists()


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
    frames = tmp_path / ".d.partial" / "frames.npy"
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


def test_a_worker_that_dies_is_reported():
    with pytest.raises(UserError, match="worker process died"):
        with data.Workers(2) as pool:
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


# -- vae_mdnrnn.py ------------------------------------------------------------------------------------------


def number_of_parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("z_dim, count", [(32, 4_348_547), (64, 4_446_915)])
def test_vae_has_the_papers_number_of_parameters(z_dim, count):
    vae = wm.VAE(z_dim)
    assert number_of_parameters(vae) == count
    recon, mu, logvar = vae(torch.rand(2, 3, 64, 64))
    assert recon.shape == (2, 3, 64, 64) and mu.shape == logvar.shape == (2, z_dim)


def test_m_and_c_have_the_papers_number_of_parameters():
    car = wm.MDNRNN(32, 3, 256, mixture="dimension")
    doom = wm.MDNRNN(64, 1, 512, mixture="dimension", heads="done", restart=True)
    assert number_of_parameters(car) - 4 * 256 == 422_368 and number_of_parameters(doom) - 4 * 512 == 1_678_785
    for env, count in {"takecover": 1088, "carracing": 867, "pointmaze": 578}.items():
        args = wm.parse_args(["all", "--env", env])
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

    def evolve(name, popsize, generations):
        return wm.evolve(scores, np.zeros(5), tmp_path / name, popsize, 2, generations, 3)

    whole = evolve("whole.pt", 8, 60)
    assert whole["score"] > -1e-3
    evolve("parts.pt", 8, 23)
    parts = evolve("parts.pt", 8, 60)
    assert torch.equal(parts["params"], whole["params"]) and parts["fitness"] == whole["fitness"]
    with pytest.raises(UserError, match="--popsize 8"):
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
    assert wm.load(tmp_path / "parts.pt")["step"] == 4
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
    assert len(wm.load(wm_run.path / "c_real.pt")["fitness"]) == 2
    wm_run("train-c", "--in", "dream", "--generations", 2, "--tau", 0.5, 1.3)
    wm_run("test")
    returns = json.loads((wm_run.path / "test.json").read_text())["returns"]
    assert set(returns) == {"random", "real", "dream_tau0.5", "dream_tau1", "dream_tau1.3"}


def test_iterations_build_on_each_other(tmp_path):
    wm.main(["iterate", "--iterations", "2", *SMALL, "--out", str(tmp_path)])
    first, second = (data.Dataset(tmp_path / f"iteration{i}" / "data") for i in (1, 2))
    assert len(second) == 2 * len(first) == 12 and np.array_equal(second.frames[: len(first.frames)], first.frames)
    assert wm.load(tmp_path / "iteration2" / "rnn.pt")["config"]["heads"] == "reward,action"
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
        ("train-v --v-steps 9 --z-dim 5", "z_dim 4"), ("train-m --z-dim 5", "--z-dim 4"),
        ("train-m --m-steps 9 --hidden 5", "hidden 8"), ("train-c --tau 0", "temperature"),
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
    torch.save({**wm.load(wm_run.path / "rnn.pt"), "config": rnn.config, "model": rnn.state_dict()},
               wm_run.path / "rnn.pt")  # fmt: skip
    with pytest.raises(UserError, match="action_dim 3"):
        wm_run("train-c")
    (wm_run.path / "rnn.pt").write_bytes((wm_run.path / "rnn.pt").read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be read"):
        wm_run("train-c")


def test_overwrite_begins_anew_from_that_step(wm_run):
    wm_run("train-m", "--overwrite", "--m-steps", 2, "--hidden", 5)
    assert wm.load(wm_run.path / "rnn.pt")["config"]["hidden"] == 5 and not list(wm_run.path.glob("c_*"))
    assert json.loads((wm_run.path / "args.json").read_text())["hidden"] == 5  # the run keeps its flags


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


def test_takecover_moves_left_and_right():
    env, walls = data.make_env("takecover"), []
    for action in (-1.0, 0.0, 1.0):
        env.reset(seed=0)
        for _ in range(15):
            obs, *_ = env.step(np.array([action]))
        walls.append(obs["visual"][25:40].mean((0, 2)))  # brightness by column
    env.close()
    assert np.abs(walls[0] - walls[1]).sum() > 50 and np.abs(walls[2] - walls[1]).sum() > 50


@pytest.mark.parametrize("name, module", [("takecover", "vizdoom.gymnasium_wrapper"), ("carracing", "Box2D")])
def test_a_missing_package_is_named(name, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match="pip install"):
        data.make_env(name)


# -- encoders.py --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", encoders.ENCODERS)
def test_encoders_are_frozen_and_do_not_mix_the_batch(name):
    encoder = encoders.build_encoder(name, weights="random").train()
    assert not encoder.training and not any(m.training for m in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())
    images = torch.rand(3, 3, 80, 80, requires_grad=True)
    tokens = encoder(images)
    assert tokens.shape == (3, encoder.num_patches, encoder.dim) and not tokens.requires_grad
    torch.testing.assert_close(tokens[1:2], encoder(images[1:2]), atol=1e-4, rtol=1e-4)
    expected = {"pca": (1, 32), "vae": (1, 32), "dinov2": (196, 384), "dino_cls": (1, 384), "dinov3": (196, 384)}
    assert tokens.shape[1:] == expected[name]


def test_pca_is_numpys_svd(dataset):
    frames = dataset.frames[:120]
    encoder = encoders.PCAEncoder(dim=8).fit(frames)
    y = encoder.filtered(wm.to_tensor(frames)).double().numpy()
    u, s, _ = np.linalg.svd(y - y.mean(0), full_matrices=False)
    std = s / np.sqrt(len(y) - 1)
    expected = (u * s / (std + encoder.damping * std[0]))[:, :8]
    tokens = encoder(wm.to_tensor(frames))[:, 0].numpy()
    np.testing.assert_allclose(np.abs(tokens), np.abs(expected), atol=2e-3)


@pytest.mark.parametrize("name", ["dinov2", "dino_cls", "dinov3"])
def test_local_weights_give_timms_tokens(name, tmp_path):
    import timm
    from safetensors.torch import save_file

    model, size = (encoders.DINOV3, 224) if name == "dinov3" else (encoders.DINOV2, 518)
    released = timm.create_model(model, img_size=size, num_classes=0).eval()
    save_file(released.state_dict(), tmp_path / "model.safetensors")
    torch.save(released.state_dict(), tmp_path / "model.pth")
    images = torch.rand(2, 3, size, size)
    mean, std = (0.5, 0.5) if name != "dinov3" else [torch.tensor(v).view(3, 1, 1) for v in encoders.IMAGENET.values()]
    with torch.no_grad():
        features = released.forward_features((images - mean) / std)
    expected = features[:, :1] if name == "dino_cls" else features[:, released.num_prefix_tokens :]
    for file in ("model.safetensors", "model.pth"):
        encoder = encoders.build_encoder(name, size, tmp_path / file)
        torch.testing.assert_close(encoder(images), expected, atol=1e-5, rtol=1e-5)
    own_size = encoders.build_encoder(name, None, tmp_path / "model.pth")  # positions resampled to 196 px
    assert own_size(images).shape[1:] == (1 if name == "dino_cls" else 196, 384)


def test_weights_that_do_not_fit_are_named(tmp_path, monkeypatch):
    other = encoders.build_encoder("dinov3", weights="random").vit.state_dict()
    torch.save(other, tmp_path / "other.pth")
    with pytest.raises(UserError, match="another architecture|does not hold"):
        encoders.build_encoder("dinov2", weights=tmp_path / "other.pth")
    own = encoders.build_encoder("dinov2", weights="random").vit.state_dict()
    del own["blocks.3.attn.qkv.weight"]
    torch.save(own, tmp_path / "half.pth")
    with pytest.raises(UserError, match="1 missing, e.g. blocks.3.attn.qkv.weight"):
        encoders.build_encoder("dinov2", weights=tmp_path / "half.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "half.pth").read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged"):
        encoders.build_encoder("dinov2", weights=tmp_path / "cut.pth")
    with pytest.raises(UserError, match="not a multiple of its patch size 14"):
        encoders.build_encoder("dinov2", 200)


def test_no_network_is_one_line(monkeypatch, tmp_path):
    import huggingface_hub as hub

    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "hf_hub_url", lambda *_: "http://localhost:9/model.safetensors")
    with pytest.raises(UserError, match="timm/nowhere/model.safetensors are not here, and no network.*--weights PATH"):
        encoders.download("timm/nowhere")


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
    with pytest.raises(UserError, match="damaged, or not a checkpoint"):
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
        with pytest.raises(UserError, match="damaged, or not a checkpoint"):
            predictor.WorldModel.load(tmp_path)
    assert not (tmp_path / "pwned").exists()


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
        ("train --img-size 32 --data datasets/pointmaze", "frames of 64 px, not --img-size 32"),
        ("train --env pointmaze-large --data datasets/pointmaze", "collected in 'pointmaze'"),
        ("train --num-hist 6", "no episode of datasets/pointmaze is as long as a window: 7 rows"),
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
    assert code == 2 and "has environment pointmaze-medium, the checkpoint pointmaze" in err
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
