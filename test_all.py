"""The claims of the eight files and of what they lean on most (lib/test_*.py has the rest): pytest -q test_all.py"""

import contextlib
import copy
import errno
import fcntl
import functools
import importlib
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest import mock

import gymnasium as gym
import imageio.v3 as imageio
import numpy as np
import pytest
import timm
import torch
import torch._dynamo  # noqa: F401  (it loads triton, which crashes if Mesa's renderer has loaded its LLVM before)
import torch.nn.functional as F
from safetensors.torch import load_file, save, save_file
from torch import nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, kl_divergence
from torchvision import models

import cem
import data
import encoders
import plan
import predictor
import train
import vae_mdnrnn as wm
from lib import common, decoders, pictures, pointmaze, processes, recipes, tokenizers, worlds
from lib.common import UserError, to_tensor
from lib.problems import random_problems, read_problems
from lib.weights import load_weights, resnet_names, vit_names, vjepa2_names
from lib.worlds import make_env

close = torch.testing.assert_close
torch.set_num_threads(1)  # in every process: sums of two threads round otherwise than those of one


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers in every run."""
    torch.manual_seed(0)


@pytest.fixture
def script(monkeypatch, capsys):
    """Runs a script's main in this process: script("train", "--epochs", 1) -> (exit code, stdout, stderr)."""

    def run(name, *argv):
        module = importlib.import_module(name)
        monkeypatch.setattr(sys, "argv", [name, *map(str, argv)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            common.run_script(module.main)
            sys.exit(0)
        return end.value.code, *capsys.readouterr()

    return run


def assert_refused(result, message):
    """`script` ended with exit code 2 and one line that holds `message`."""
    code, _, err = result
    line = err.strip().splitlines()[-1] if err else ""
    assert code == 2 and "Traceback" not in err and line.startswith("error: ") and len(line) < 300, err
    assert message in line


class OneProcess(contextlib.nullcontext):
    """Takes the place of `Workers` where a test is not about processes: the same calls, in this process."""

    def __init__(self, workers, initializer, initargs):
        super().__init__(self)
        initializer(*initargs)

    def map(self, function, items):
        return map(function, items)


@pytest.fixture
def one_process(monkeypatch):
    """Episodes are played in this process, which saves the start of others."""
    monkeypatch.setattr(worlds, "Workers", OneProcess)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """Thirty short episodes of PointMaze, which the tests of lib and extras use, too."""
    path = tmp_path_factory.getbasetemp() / "pointmaze"
    if not path.exists():
        data.collect(path, "pointmaze", episodes=30, steps=6, frameskip=5, img_size=64, seed=3, workers=2)
    return data.Dataset(path)


@pytest.fixture
def workplace(tmp_path, monkeypatch, dataset):
    """An empty folder to run scripts in, with a copy of the data set where they look for it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(dataset.path, "datasets/pointmaze")
    return tmp_path


def fake_dataset(path, lengths, frameskip=1, dof=2):
    """Episodes whose numbers say where they come from: action = 1000 * episode + environment step."""

    def episode(e, length):
        frames, states = np.full((length, 8, 8, 3), e, np.uint8), np.full((length, 4), e, np.float32)
        actions = 1000 * e + np.arange(length * frameskip, dtype=np.float32).repeat(dof).reshape(length, -1)
        rewards, dones = np.zeros(length, np.float32), np.zeros(length, bool)
        return dict(frames=frames, states=states, actions=actions, rewards=rewards, dones=dones)

    meta = dict(env="pointmaze", seed=0, policy="none", img_size=8, frameskip=frameskip)
    return data.write_dataset(path, (episode(*e) for e in enumerate(lengths)), len(lengths), meta)


def no_room_for(patch, name):
    """From now on the disk is full when the file `name` is written."""
    write, start = Path.write_bytes, f".{Path(name).stem}."

    def write_bytes(path, content):
        if path.name.startswith(start) and path.suffix == Path(name).suffix:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, content)

    patch.setattr(Path, "write_bytes", write_bytes)


def contents(folder):
    """{relative path: bytes} of all files."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- lib/common.py ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [".", "..", "", "a/..", "../runs", "../../x", "/tmp/x", "../runs2/x"])
def test_only_a_folder_below_the_root_is_an_output(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert common.output_folder("runs", "exp/seed1") == Path("runs/exp/seed1")
    with pytest.raises(UserError, match="is not a folder below runs/: choose another --name"):
        common.output_folder("runs", name)


def test_a_write_is_whole_or_not_at_all_and_removes_what_killed_ones_left(tmp_path, monkeypatch):
    a = tmp_path / "a.pt"
    common.write_atomic(a, "old")
    for name in (".a.1.partial.pt", ".a.2.partial.pt", ".b.1.partial.pt", ".d.1.partial/x", ".d.2.partial/x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    busy = [os.open(tmp_path / name, os.O_RDONLY) for name in (".a.2.partial.pt", ".d.2.partial")]
    for file in busy:  # as another process does while it writes
        fcntl.flock(file, fcntl.LOCK_EX)
    with monkeypatch.context() as patch, pytest.raises(OSError, match=f"No space left.*{a}"):
        no_room_for(patch, a.name)
        common.write_atomic(a, "new")
    assert a.read_text() == "old"
    fake_dataset(tmp_path / "d", [4, 4])
    assert {p.name for p in tmp_path.iterdir()} == {"a.pt", "d", ".a.2.partial.pt", ".b.1.partial.pt", ".d.2.partial"}
    for file in busy:
        os.close(file)


def test_writers_of_the_same_file_do_not_disturb_each_other(tmp_path):
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda i: common.write_atomic(tmp_path / "a.pt", "x" * 100), range(300)))
    assert contents(tmp_path) == {"a.pt": b"x" * 100}


def test_a_file_without_permission_is_not_called_damaged(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        common.read(tmp_path / "a", mock.Mock(side_effect=PermissionError))


def test_a_loss_that_is_no_number_is_an_error():
    with pytest.raises(UserError, match="loss is .* at step"):
        wm.train_vae(wm.VAE(2), np.zeros((8, 64, 64, 3), np.uint8), 5, lr=1e12)


def test_nothing_moves_from_one_episode_to_the_next(monkeypatch):
    seen, frames = set(), np.tile(np.r_[:40, 200:240].astype(np.uint8)[:, None, None, None], (1, 64, 64, 3))
    recorded = lambda x, before: (seen.update((255 * (x - before))[:, 0, 0, 0].round().tolist()), x[:, :1])[1]  # noqa: E731
    monkeypatch.setattr(wm, "moving", recorded)
    wm.train_vae(wm.VAE(2), frames, 2, focus=1.0, starts=[0, 40])
    assert seen == {0, 1}  # of first frames, and of those that have one before them


def test_workers_keep_the_order_and_one_that_dies_is_reported():
    with processes.Workers(1) as pool:
        assert list(pool.map(abs, range(-5, 5))) == [5, 4, 3, 2, 1, 0, 1, 2, 3, 4]
        with pytest.raises(UserError, match="worker process died"):
            list(pool.map(os._exit, range(4)))


# -- lib/pointmaze.py ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("maze", ["UMaze", "Medium", "Large"])
def test_pointmaze_is_the_packages_maze_with_five_physics_steps(maze):
    env, rng = pointmaze.PointMaze(maze), np.random.default_rng(0)
    reference = gym.make(f"PointMaze_{maze}-v3").unwrapped.point_env
    reference.reset(seed=0)
    reference.frame_skip = 5
    state = env.sample_state(rng)
    env.set_state(state)
    reference.set_state(state[:2], state[2:])
    for action in rng.uniform(-1, 1, (300, 1)) * [1, -1] + rng.uniform(-0.3, 0.3, (300, 2)):  # into the walls, too
        env.step(action, render=False)
        reference.step(action)
        np.testing.assert_allclose(env.state, np.r_[reference.data.qpos, reference.data.qvel], atol=1e-12)


def test_rendered_and_threaded_simulation_equal_stepping():
    env, rng = pointmaze.PointMaze(), np.random.default_rng(1)
    starts, actions = np.stack([env.sample_state(rng) for _ in range(5)]), rng.uniform(-1.5, 1.5, (5, 25, 2))
    for start, sequence, threaded in zip(starts, actions, env.simulate(starts, actions), strict=True):
        ends = []
        for render in (False, True):
            env.set_state(start)
            for action in sequence:
                env.step(action, render)
            ends.append(env.state)
        np.testing.assert_array_equal(*ends)
        np.testing.assert_allclose(threaded, ends[0], atol=1e-9)


@pytest.mark.parametrize("name", ["pointmaze", "pointmaze-d4rl"])
@pytest.mark.parametrize("shift", pointmaze.SHIFTS)
def test_another_appearance_is_seen_and_not_felt(shift, name):
    plain, other = worlds.make_env(name), worlds.make_env(name, shift=shift)
    state, frames = plain.sample_state(np.random.default_rng(0)), []
    for env in (plain, other):
        env.set_state(state)
        frames.append([env.render().astype(int) for _ in range(2)])
        for action in np.random.default_rng(1).uniform(-1, 1, (30, 2)):
            env.step(action, render=action[0] > 0)
    assert (plain.state == other.state).all()
    assert np.abs(frames[0][0] - frames[1][0]).max() > 20 and (frames[0][0] == frames[0][1]).all()
    assert (frames[1][0] == frames[1][1]).all() == (shift in ("colours", "light", "camera"))  # the others change
    if shift in ("camera", "distractor", "noise"):  # the maze is still there, and most of it where it was
        assert (np.abs(frames[0][0] - frames[1][0]).max(-1) > 60).mean() < 0.2
    if shift == "distractor":  # the second ball is red, and in the maze
        red = (np.array(frames[1]) - frames[0][0])[..., 0] > 60
        assert red.any((1, 2)).all()


@pytest.mark.parametrize("maze", ["UMaze", "Large"])
def test_sampled_states_are_clear_of_the_walls_and_everywhere_else(maze):
    env, rng = pointmaze.PointMaze(maze), np.random.default_rng(0)
    xy = np.stack([env.sample_state(rng) for _ in range(2000)])[:, :2]
    blocks = [i for i in range(env.model.ngeom) if env.model.geom(i).name.startswith("block")]
    outside = np.abs(xy[:, None] - env.model.geom_pos[blocks][None, :, :2]) - env.model.geom_size[blocks][None, :, :2]
    assert np.linalg.norm(outside.clip(min=0), axis=-1).min() > env.BALL_RADIUS
    rows, cols = env.free.shape
    assert {(int(rows / 2 - y), int(x + cols / 2)) for x, y in xy} == set(map(tuple, np.argwhere(env.free)))


def find_ball(frame, threshold):
    """(column, row) of the middle of what is green, in pixels."""
    frame = frame.astype(float)
    green = (frame[..., 1] - frame[..., [0, 2]].max(-1)).clip(min=threshold) - threshold
    rows, cols = np.indices(green.shape)
    return np.array([(green * cols).sum(), (green * rows).sum()]) / green.sum() + 0.5


def test_camera_sees_the_ball_where_it_is_and_no_goal_marker():
    env = pointmaze.PointMaze("UMaze", 64)
    for x, y in [(-1, 1), (1, 1), (1.2, -0.8), (-1.3, -1.2)]:
        env.set_state(np.array([x, y, 0, 0]))
        frame = env.observe()["visual"]
        np.testing.assert_allclose(find_ball(frame, 20), [(x + 2.5) / 5 * 64, (2.5 - y) / 5 * 64], atol=0.6)
        assert not (frame[..., 0] > 1.8 * frame[..., 1]).any()  # nothing red
        np.testing.assert_array_equal(frame[0, 0], frame[-1, -1])  # wall in every corner: the whole maze is in view


# -- lib/worlds.py ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, low, module", [("takecover", [-1], "vizdoom.gymnasium_wrapper"),
                                               ("carracing", [-1, 0, 0], "envpool"),
                                               ("carracing-gymnasium", [-1, 0, 0], "Box2D")])  # fmt: skip
def test_the_papers_environments_repeat_with_their_seed(name, low, module, one_process, monkeypatch):
    job = dict(who="hold", seed=(2**31 - 1) * 1_000_003, steps=30)  # the largest seed of vae_mdnrnn.py
    with worlds.EpisodePool(1, name, 64) as pool:
        one, two = pool.map([job, job])
    assert worlds._envs[0].action_space.low.tolist() == low
    assert one["frames"].shape == (30, 64, 64, 3) and one["frames"].dtype == np.uint8
    assert all(np.array_equal(one[array], two[array]) for array in data.Dataset.ARRAYS)
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    with pytest.raises(UserError, match="pip install"):
        worlds.make_env(name)


class MersenneTwister(np.random.RandomState):
    """Random numbers as libstdc++ makes them of std::mt19937, from which EnvPool draws its tracks."""

    def uniform(self, low, high):
        first, second = self.randint(0, 2**32, 2, np.uint64)
        return (first + second * 2.0**32) / 2.0**64 * (high - low) + low


def test_carracing_is_gymnasiums_on_the_same_track():
    fast, original = worlds.make_env("carracing"), worlds.make_env("carracing-gymnasium")
    original.env.unwrapped._np_random = MersenneTwister(3)
    fast.reset(seed=3), original.begin(None)
    for t in range(80):
        action = np.array([math.sin(t / 10), 0.5, 0])
        (ours, *outcome, _), (theirs, *expected, _) = fast.step(action), original.step(action)
        np.testing.assert_allclose(outcome, expected, atol=1e-3)
        difference = np.abs(ours["visual"].astype(int) - theirs["visual"])
        assert difference.mean() < 5 and fast.state == pytest.approx(original.state, abs=1e-2)
    assert fast.state > 5  # some tiles were visited


def test_a_game_that_dies_is_one_line():
    tasks = lambda: Path("/proc/self/task").glob("*/children")  # noqa: E731
    children = lambda: {child for task in tasks() for child in task.read_text().split()}  # noqa: E731
    before, env = children(), worlds.make_env("takecover")
    env.reset(seed=0)
    (engine,) = children() - before
    os.kill(int(engine), signal.SIGKILL)
    with pytest.raises(UserError, match="a game of takecover broke off .*: give the same command again"):
        for _ in range(5):
            env.step(np.zeros(1))


def test_takecovers_folder_is_there_before_several_games_would_make_it_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(worlds.gym, "make", lambda *_, **__: Path("_vizdoom").is_dir())
    assert worlds.TakeCover().env


def test_takecover_moves_left_and_right():
    env, walls = worlds.make_env("takecover"), []
    game = env.env.unwrapped.game
    for action, buttons in (-1.0, ["MOVE_LEFT"]), (0.0, []), (1.0, ["MOVE_RIGHT"]):
        env.reset(seed=0)
        obs = [env.step(np.array([action]))[0] for _ in range(15)][-1]
        walls.append(obs["visual"][25:40].mean((0, 2)))  # brightness by column
        pressed = zip(game.get_available_buttons(), game.get_last_action(), strict=True)
        assert [button.name for button, down in pressed if down] == buttons
    assert all(np.abs(a - b).sum() > 50 for a, b in itertools.combinations(walls, 2))


def test_random_policies_hold_their_actions_or_let_them_drift():
    space = gym.spaces.Box(-1, 1, (2,))
    hold, brownian = (worlds.random_actions(kind, space, np.random.default_rng(0)) for kind in ("hold", "brownian"))
    changes = np.diff(list(itertools.islice(hold, 2000)), axis=0)
    lengths = np.diff(np.flatnonzero(np.any(changes != 0, 1)))
    assert lengths.min() == 1 and 50 < lengths.max() < 100
    steps = np.diff(list(itertools.islice(brownian, 2000)), axis=0)
    assert 0.1 < steps[np.abs(steps).max(1) > 0].std() < 0.15  # sqrt(1 / 50) = 0.141, less at the bounds


class Counting:
    """A world that ends with the last of its rewards, and notes which of its frames were asked for. The agent of `play`
    counts its own steps, and each frame shows the seed and the last action."""

    observation_space = {"visual": np.zeros((2, 2, 3), np.uint8)}

    def __init__(self, *rewards):
        self.rewards, self.rendered, self.state, self.seen = rewards, [], np.zeros(1), {}

    def reset(self, seed):
        self.seed, self.left = seed, list(self.rewards)
        return {"visual": np.full((2, 2, 3), seed, np.uint8)}, {}

    def step(self, action, render):
        self.rendered.append(render)
        frame = np.full((2, 2, 3), self.seed + 10 * action[0], np.uint8)
        return {"visual": frame}, self.left.pop(0), not self.left, False, {}

    def begin(self, i, who, seed):
        self.seen[i] = who

    def __call__(self, frames):
        self.seen = {i: count + 1 for i, count in self.seen.items()}
        return np.array([[self.seen.get(i, -1)] for i in range(len(frames))])


def play(*rewards, **options):
    env = Counting(*rewards)
    (episode,) = worlds.play([env], env, [dict(who=-1, seed=0, steps=9, **options)])
    return episode, env.rendered


def test_a_row_is_frameskip_steps_and_one_frame_and_an_episode_ends_early_if_nothing_is_earned():
    for patience, steps in {math.inf: 9, 4: 9, 3: 8, 2: 3}.items():
        assert len(play(1, -1, 0, 1, 1, -1, -1, -1, 1, patience=patience)[0]["rewards"]) == steps
    episode, rendered = play(1, 2, 3, 4, 5, frameskip=3)
    assert episode["actions"].tolist() == [[0, 1, 2], [3, 4, 4]]  # the last action fills the row
    assert episode["rewards"].tolist() == [6, 9] and episode["dones"].tolist() == [False, True]
    assert rendered == [False, False, True, False, False] and episode["frames"].shape == (2, 2, 2, 3)
    assert "frames" not in play(1, 2, film=False)[0]


def test_where_an_episode_ends_the_next_begins():
    envs = [Counting(*[1] * length) for length in (2, 3)]
    jobs = [dict(who=100 * seed - 1, seed=seed, steps=steps) for seed, steps in enumerate((9, 1, 9, 9, 9))]
    episodes = worlds.play(envs, agents := Counting(), jobs)
    assert [len(e["rewards"]) for e in episodes] == [2, 1, 3, 2, 2]
    for job, episode in zip(jobs, episodes, strict=True):
        first = job["who"] + 1
        assert episode["actions"][:, 0].tolist() == [first + t for t in range(len(episode["actions"]))]
        assert episode["frames"][0, 0, 0, 0] == job["seed"] and len(agents.seen) == 2


def test_an_episode_is_the_same_alone_and_beside_others():
    """To the last bit: C's actions depend on all that V and M compute."""
    agents = wm.Agents(wm.VAE(4).eval(), wm.MDNRNN(4, 3, 8).eval(), c := wm.Controller(12, 3, squash="car"), False)
    envs = [worlds.make_env("carracing") for _ in range(3)]
    jobs = [dict(who=torch.randn(c.num_params).numpy(), seed=i, steps=5 + i) for i in range(5)]
    together, alone = worlds.play(envs, agents, jobs), [worlds.play(envs[:1], agents, [job])[0] for job in jobs]
    for one, other in zip(together, alone, strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in data.Dataset.ARRAYS)
    assert not np.array_equal(together[0]["actions"][:5], together[1]["actions"][:5])
    with pytest.raises(UserError, match="not a number, so V, M or C is broken"):
        worlds.play(envs, agents, [*jobs[:2], jobs[2] | {"who": jobs[2]["who"] * math.nan}])


# -- data.py ------------------------------------------------------------------------------------------------


def test_collection_is_consistent_and_does_not_depend_on_the_processes(dataset, tmp_path, one_process):
    alone = data.collect(tmp_path / "d", "pointmaze", 4, 6, 5, 64, seed=3)
    for name in data.Dataset.ARRAYS:
        np.testing.assert_array_equal(getattr(alone, name), getattr(dataset, name)[:24])
    env = pointmaze.PointMaze()
    env.set_state(dataset.states[0].astype(float))
    for action in dataset.actions[0].reshape(5, 2):
        obs, *_ = env.step(action)
    np.testing.assert_allclose(obs["proprio"], dataset.states[1], atol=1e-4)
    np.testing.assert_array_equal(obs["visual"], dataset.frames[1])


def test_windows_stay_in_their_episode_and_concatenate_actions(tmp_path):
    dataset = fake_dataset(tmp_path / "d", [3, 9, 25])
    windows = data.Windows(dataset, np.arange(3), num_frames=2, frameskip=4)
    assert len(windows) == 0 + 2 + 18  # episodes of 9 and 25 steps hold 9 - 8 + 1 and 25 - 8 + 1 windows
    batch = windows.batch(np.arange(len(windows)), np.arange(37)[:, None, None])
    assert batch["action"].shape == (20, 2, 8)
    batch = {name: tensor.numpy() for name, tensor in batch.items()}
    for visual, states, action in zip(batch["visual"], batch["proprio"], batch["action"], strict=True):
        assert len(set((action // 1000).ravel()) | set(states.ravel())) == 1  # one episode
        steps = action.reshape(-1, 2)[:, 0] % 1000
        assert (np.diff(steps) == 1).all() and visual[1, 0, 0] - visual[0, 0, 0] == 4
        assert visual[0, 0, 0] == steps[0] + dataset.episode_starts[int(action[0, 0] // 1000)]
    alone = fake_dataset(tmp_path / "alone", [9])
    with pytest.raises(UserError, match="has 1 episode: two are needed"):
        data.Windows(alone, alone.split()[0], 2, 1)
    with pytest.raises(UserError, match="there is no episode to write"):
        fake_dataset(tmp_path / "none", [])
    assert not (tmp_path / "none").exists()


def test_statistics_and_split_are_by_episode(tmp_path):
    dataset = fake_dataset(tmp_path / "d", [4] * 20, frameskip=2)
    train_episodes, val_episodes = dataset.split()
    assert len(val_episodes) == 2 and not set(train_episodes) & set(val_episodes)
    statistics = dataset.statistics(train_episodes)
    mean, std = statistics["proprio"]
    np.testing.assert_allclose(mean, train_episodes.mean(), rtol=1e-5)
    np.testing.assert_allclose(std, train_episodes.std(), rtol=1e-4)
    own = (1000 * train_episodes[:, None] + np.arange(8)).ravel()  # in each of the two dimensions
    np.testing.assert_allclose(statistics["action"], [[own.mean()] * 2, [own.std()] * 2], rtol=1e-3)


def put(value):
    return lambda array: np.where(np.arange(array.size).reshape(array.shape) == 5, value, array).astype(array.dtype)


DAMAGE = {
    "frames": [lambda a: a.astype("f4"), lambda a: a[..., 0], lambda a: a[:, :4], lambda a: a[:-1]],
    "states": [lambda a: a[:, 0], lambda a: a.astype(int), put(np.nan), put(np.inf), put(1e30)],
    "actions": [lambda a: a[:, :3], lambda a: a.astype(bool), lambda a: a[:, :0], put(np.nan), put(-np.inf), put(1e30)],
    "rewards": [lambda a: a[:, None], lambda a: a.astype("S9"), lambda a: a.astype(">f4"), put(np.nan), put(1e30)],
    "dones": [lambda a: a.astype("u1"), lambda a: a[:-1]],
    "episode_ends": [lambda a: a.astype("u1"), lambda a: a.astype("f8"), lambda a: a[::-1], lambda a: a[[0, 0, 1]],
                     lambda a: a + 1, lambda a: a[:1], lambda a: a[1], lambda a: a[:0], lambda a: a - [9, 0]],
    "meta": [{"frameskip": 0}, {"frameskip": -1}, {"frameskip": "5"}, {"frameskip": None}, {"frameskip": 3},
             {"img_size": "8"}, {"img_size": 9}, {"env": 3}, {"version": 0}, "[]", "[" * 100_000, "", '{"rows": 9}'],
}  # fmt: skip


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name, change", [(name, change) for name in DAMAGE for change in DAMAGE[name]])
def test_a_damaged_data_set_is_refused_in_one_line(name, change, tmp_path):
    dataset = fake_dataset(tmp_path / "d", [4, 5], frameskip=2)
    if name == "meta":
        text = change if isinstance(change, str) else json.dumps(dataset.meta | change)
        (dataset.path / "meta.json").write_text(text)
    else:
        np.save(dataset.path / f"{name}.npy", change(np.array(getattr(dataset, name))))
    with pytest.raises(UserError, match=f"^[^\n]*{dataset.path}[^\n]*$"):
        data.open_dataset(dataset.path)


@pytest.mark.filterwarnings("error")
def test_a_flipped_bit_in_a_header_is_refused_or_changes_nothing(tmp_path, dataset):
    copy, rng = Path(shutil.copytree(dataset.path, tmp_path / "d")), np.random.default_rng(0)
    for name in [*data.Dataset.ARRAYS, "episode_ends"]:
        path = copy / f"{name}.npy"
        whole = path.read_bytes()
        for byte, bit in zip(rng.integers(0, 80, 60), rng.integers(0, 8, 60), strict=True):
            path.write_bytes(whole[:byte] + bytes([whole[byte] ^ 1 << bit]) + whole[byte + 1 :])
            with contextlib.suppress(UserError):
                np.testing.assert_array_equal(getattr(data.Dataset(copy), name), getattr(dataset, name))
        path.write_bytes(whole)


def test_tokens_are_computed_once_and_those_of_another_shape_are_refused(tmp_path):
    dataset, mean_colour = fake_dataset(tmp_path / "d", [4, 5]), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(2))
    vars(mean_colour).update(name="mean", img_size=8, num_patches=3, dim=1)
    encode = partial(data.token_cache, mean_colour, dataset, "cpu", batch_size=2)
    tokens = encode()
    np.testing.assert_allclose(tokens[..., 0] * 255, [[0] * 3] * 4 + [[1] * 3] * 5, atol=1e-3)
    (cache,) = dataset.path.glob("*tokens*")
    before = cache.stat()
    assert np.array_equal(encode(), tokens) and cache.stat() == before
    for array in (np.zeros((9, 4, 1), "f"), np.zeros((9, 3), "f"), np.zeros((8, 3, 1), "f"), np.zeros((9, 3, 1), int)):
        np.save(cache, array)
        with pytest.raises(UserError, match=f"{cache}.*(remove it|make it again)"):
            encode()


def begin(target, *args):
    """A process that begins at once, because another one, from which it is forked, has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=target, args=args)
    process.start()
    return process


def test_a_killed_collection_leaves_nothing_and_its_workers_end(tmp_path, one_process):
    workers = []
    for moment in np.random.default_rng(0).uniform(0, 1, 2):
        process, frames = begin(data.collect, tmp_path / "d", "pointmaze", 5000, 4, 5, 64, 3, 1), []
        while not (frames and frames[0].stat().st_size > 10**5):
            assert process.is_alive()
            time.sleep(0.02)
            frames = list(tmp_path.glob(".d.*/frames.npy"))
        time.sleep(moment)
        workers += Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
        process.join()
        assert not (tmp_path / "d").exists()
    data.collect(tmp_path / "d", "pointmaze", 2, 2, 5, 64)
    assert [path.name for path in tmp_path.iterdir()] == ["d"] and workers
    deadline = time.time() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.time() < deadline, "orphaned workers"
        time.sleep(0.05)


def test_inspect_prints_a_table_and_draws_a_contact_sheet(workplace, script):
    code, out, _ = script("data", "--inspect", "datasets/pointmaze")
    assert code == 0 and "(180, 64, 64, 3)" in out
    assert imageio.imread("datasets/pointmaze/contact_sheet.png").shape == (8 * 66, 10 * 66, 3)


# -- cem.py -------------------------------------------------------------------------------------------------


def cem_by_hand(cost, mean, std, M, K, steps, draw, momentum=0.0, maxnorm=math.inf, keep=0):
    """The equations of `cem`, one problem after the other."""
    elites = [[]] * len(mean)
    for _ in range(steps):
        noise, mean, std = draw(len(mean), M, *mean.shape[1:]), mean.clone(), std.clone()
        for b in range(len(mean)):
            first = [mean[b], *elites[b][:keep]]
            candidates = [*first, *(mean[b] + std[b] * noise[b])[len(first) :]]
            elites[b] = sorted([c.clamp(-maxnorm, maxnorm) for c in candidates], key=lambda c: cost(c).item())[:K]
            best = torch.stack(elites[b])
            mean[b] = momentum * mean[b] + (1 - momentum) * best.mean(0)
            std[b] = momentum * std[b] + (1 - momentum) * best.std(0)  # over n - 1
    return mean


@pytest.mark.parametrize("options", [{}, dict(momentum=0.25), dict(maxnorm=0.5), dict(keep=2)])
@pytest.mark.parametrize("draw", [torch.randn, torch.rand])
def test_cem_does_what_its_equations_say(options, draw):
    cost = lambda a: (a - 2).square().sum((-1, -2))  # noqa: E731
    mean, std = torch.rand(2, 3, 2), 1 + torch.rand(2, 3, 2)
    ours, theirs = (torch.Generator().manual_seed(0) for _ in range(2))
    found = cem.cem(cost, mean, std, 20, 4, 3, ours, noise=draw, **options)
    close(found, cem_by_hand(cost, mean, std, 20, 4, 3, partial(draw, generator=theirs), **options))
    with pytest.raises(ValueError, match="topk must lie between"):
        cem.cem(cost, mean, std, num_samples=5, topk=6)


def test_coloured_noise_has_variance_one_and_neighbours_alike():
    white, red = (cem.coloured_noise(beta, 2)(3, 4000, 5, 10) for beta in (0.0, 2.0))
    for noise in (white, red):
        close(noise.var((0, 1)), torch.ones(5, 10), atol=0.06, rtol=0)
    alike = lambda x: (x[..., 2:] * x[..., :-2]).mean()  # noqa: E731  (one environment step apart: DoF is 2)
    assert abs(alike(white)) < 0.02 and alike(red) > 0.7
    ours, theirs = (torch.Generator().manual_seed(1) for _ in range(2))
    expected = torch.randn(1, 2, 25, 2, generator=theirs)
    close(cem.coloured_noise(0.0, 2)(1, 2, 5, 10, generator=ours).view(1, 2, 25, 2), expected)


def test_mppi_does_what_its_equations_say():
    cost = lambda a: (a - 1).square().sum((2, 3))  # noqa: E731
    mean, std = torch.randn(2, 2, 3), 0.5 + torch.rand(2, 2, 3)
    ours, theirs = (torch.Generator().manual_seed(0) for _ in range(2))
    found = cem.mppi(cost, mean, std, 30, 3, 0.5, ours)
    for _ in range(3):
        a = mean[:, None] + std[:, None] * torch.randn(2, 30, 2, 3, generator=theirs)
        a[:, 0] = mean
        J = cost(a)
        w = torch.exp(-(J - J.amin(1, keepdim=True)) / (0.5 * J.std(1, keepdim=True)))
        mean = (w[..., None, None] * a).sum(1) / w.sum(1)[:, None, None]
    close(found, mean, atol=1e-5, rtol=1e-5)


def test_gradient_descent_does_what_its_equations_say():
    start, target = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    cost = lambda a: (a - target[:, None]).square().sum((2, 3))  # noqa: E731
    ours, theirs = (torch.Generator().manual_seed(0) for _ in range(2))
    with torch.no_grad():  # as plan.py calls it
        after = cem.gradient_descent(cost, start, 1, lr=0.1, action_noise=0.3, generator=ours)
        held = cem.gradient_descent(cost, start, 50, 0.1, 0.0, torch.full((4,), -0.2), torch.full((4,), 0.3))
    close(after, start - 0.1 * 2 * (start - target) + 0.3 * torch.randn(3, 2, 4, generator=theirs))
    close(held, target.clamp(-0.2, 0.3))
    assert not after.requires_grad and not start.requires_grad


@pytest.mark.parametrize("new", [0.0, 7.0])
def test_mpc_warm_starts_and_leaves_solved_worlds_alone(new):
    position, means, acted = torch.zeros(3), [], []

    def plan_step(problems, mean):
        means.append(mean.flatten().tolist())
        return torch.arange(3.0).view(1, 3, 1).expand(len(problems), -1, -1) + 1

    def act(problems, actions):
        acted.append(list(problems))
        position[problems] += actions.sum((1, 2))
        return position[problems] >= torch.tensor([6.0, 3.0, 100.0])[problems]

    start = {"start": lambda *shape: torch.full(shape, new)} if new else {}
    success = cem.mpc(plan_step, act, 3, horizon=3, action_dim=1, n_taken_actions=2, max_iter=3, **start)
    assert acted == [[0, 1, 2], [0, 2], [2]]
    assert success.tolist() == [[False, True, False], [True, True, False], [True, True, False]]
    assert means[:2] == [[new] * 9, [3, new, new] * 2]  # what is left of the plan, then new steps


# -- vae_mdnrnn.py and lib/recipes.py -----------------------------------------------------------------------


def test_v_m_and_c_have_the_papers_number_of_parameters():
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    assert count(wm.VAE(32)) == 4_348_547 and count(wm.VAE(64)) == 4_446_915
    recon, mu, logvar = wm.VAE(7)(torch.rand(2, 3, 64, 64))
    assert recon.shape == (2, 3, 64, 64) and mu.shape == logvar.shape == (2, 7)
    car = wm.MDNRNN(32, 3, 256, mixture="dimension")
    doom = wm.MDNRNN(64, 1, 512, mixture="dimension", heads="done", restart=True)
    assert count(car) - 4 * 256 == 422_368 and count(doom) - 4 * 512 == 1_678_785
    for env, params in {"takecover": 1088, "carracing": 867, "pointmaze": 578}.items():
        assert wm.make_controller(wm.parse_args(["all", "--env", env], wm.STEPS, "")).num_params == params


def test_v_decodes_its_one_pixel_by_a_transposed_convolution_and_its_loss_is_squared_error_plus_kl():
    layer, pixel = wm.VAE(4).decoder[2], torch.randn(3, 1024, 1, 1)
    close(layer(pixel), F.conv_transpose2d(pixel, layer.weight, layer.bias, stride=2), atol=1e-5, rtol=1e-5)
    mu, logvar, x = torch.randn(5, 8), torch.randn(5, 8), torch.rand(5, 3, 4, 4)
    kl = kl_divergence(Normal(mu, (logvar / 2).exp()), Normal(0.0, 1.0)).sum(1)
    loss = wm.vae_loss(x + 0.1, x, mu, logvar, beta=2.0, kl_tolerance=0.0)
    close(loss, 4 * 4 * 3 * 0.01 + 2.0 * kl.mean())
    assert wm.vae_loss(x, x, 0 * mu, 0 * logvar, kl_tolerance=0.5).item() == pytest.approx(0.5 * 8)


@pytest.mark.parametrize("mixture", ["vector", "dimension"])
def test_mdn_nll_and_samples_are_those_of_torch_distributions(mixture):
    rnn, z, h = wm.MDNRNN(6, 2, 16, mixture=mixture), torch.randn(7, 6), torch.randn(7, 16)

    def library(logit, mu, logsigma, tau=1.0):
        normal = Independent(Normal(mu, tau**0.5 * logsigma.exp()), 1)
        return MixtureSameFamily(Categorical(logits=logit / tau), normal)

    logit, mu, logsigma = (part.detach() for part in rnn.mixture(h))
    expected = -library(logit, mu, logsigma).log_prob(z.unflatten(-1, mu.shape[1::2])).sum(-1)
    close(wm.mdn_nll(logit, mu, logsigma, z), expected, rtol=1e-5, atol=1e-5)
    one = logit[0], mu[0], logsigma[0]
    many = *(part.expand(200_000, *part.shape) for part in one), -torch.rand(200_000, *logit[0].shape).log().neg().log()
    many = *many, torch.randn(200_000, *mu.shape[1::2])
    for tau in (0.5, 1.0, 2.0):
        drawn, true = wm.mdn_sample(*many, tau), library(*one, tau)
        close(drawn.mean(0), true.mean.flatten(), atol=0.02, rtol=0.02)
        close(drawn.var(0), true.variance.flatten(), atol=0, rtol=0.05)
    most_likely = mu[0][torch.arange(len(mu[0])), logit[0].argmax(-1)].flatten()
    close(wm.mdn_sample(*(part[0] for part in many), tau=1e-9), most_likely, atol=1e-3, rtol=0)
    nn.init.constant_(rnn.mdn.bias, -100.0)
    wm.mdn_nll(*rnn.mixture(h), z).sum().backward()  # a tiny sigma
    assert rnn.mdn.weight.grad.isfinite().all()


def test_m_predicts_what_follows_the_steps_that_it_has_seen_and_nothing_that_is_not_there():
    """h_t, which has seen z_0..t and a_0..t, is for z_{t+1}, reward_t, done_t and a_{t+1}: one step at a time."""
    rnn = wm.MDNRNN(4, 2, 8, heads="done,reward,action", restart=True)
    z, a, reward, restart = torch.randn(2, 5, 4), torch.randn(2, 5, 2), torch.randn(2, 5), torch.rand(2, 5)
    done, lengths = torch.tensor([[0, 0, 0, 0, 1.0], [0, 0, 1, 0, 0]]), torch.tensor([5, 3])
    parts = {name: [] for name in ("nll", "done", "reward", "action")}
    for e, length in enumerate(lengths):
        state = None
        for t in range(length):
            h, state = rnn(z[e, None, t, None], a[e, None, t, None], restart[e, None, t, None], state)
            p = torch.sigmoid(rnn.heads["done"](h[0, 0])[0] + math.log(10.0))
            parts["done"].append(-(10.0 * p.log() if done[e, t] else (1 - p).log()))
            parts["reward"].append((rnn.heads["reward"](h[0, 0])[0] - reward[e, t]).square())
            if t < length - 1:
                parts["nll"].append(wm.mdn_nll(*rnn.mixture(h[0, 0]), z[e, t + 1]) / 4)
                parts["action"].append((rnn.heads["action"](h[0, 0]) - a[e, t + 1]).square().mean())
    expected = {name: torch.stack(values).mean() for name, values in parts.items()}
    losses = wm.mdnrnn_loss(rnn, z, a, reward, done, torch.arange(5) < lengths[:, None], restart)
    close(losses, {"loss": sum(expected.values()), **expected})


@pytest.mark.parametrize("cell", [False, True])
def test_an_agent_acts_before_m_sees_its_action(cell, monkeypatch):
    """Frame by frame: z = V(o), a = C(z, h), h = M(z, a, h); M is told of the first step alone that it is the first."""
    vae, rnn, seen = wm.VAE(4).eval(), wm.MDNRNN(4, 1, 8, restart=True).eval(), []
    controller, state = wm.Controller(12 + 8 * cell, 1), (torch.zeros(1, 1, 8), torch.zeros(1, 1, 8))
    monkeypatch.setattr(wm, "bfloat16", contextlib.nullcontext)
    encode = lambda x, encode=vae.encode: (encode(x)[0], torch.full((len(x), 4), 2 * math.log(3)))  # noqa: E731
    monkeypatch.setattr(vae, "encode", encode)
    recorded = lambda params, features: (seen.append(features), controller(params, features))[1]  # noqa: E731
    recorded.num_params = controller.num_params
    agents, frames = wm.Agents(vae, rnn, recorded, cell, size=3), np.random.default_rng(0)
    agents(np.zeros((3, 64, 64, 3), "B"))  # an earlier episode leaves nothing behind
    agents.begin(1, torch.randn(controller.num_params), 0)
    noise = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for t, frame in enumerate(frames.integers(0, 255, (3, 64, 64, 3), "B")):
            action = torch.from_numpy(agents(np.stack([0 * frame, frame, frame]))[1:2])
            z = encode(common.to_tensor(frame[None]))[0] + 3 * torch.randn(4, generator=noise)
            close(seen[t + 1][1:2], torch.cat([z, state[0][0], *([state[1][0]] if cell else [])], 1))
            _, state = rnn(z[None], action[None], torch.tensor([[float(t == 0)]]), state)


def test_m_sees_whole_episodes(tmp_path, monkeypatch):
    lengths, seen = [3, 40, 10], set()

    def loss(rnn, z, a, reward, done, valid, restart, bf16):
        for actions, real, begins in zip(a[..., 0], valid, restart, strict=True):
            episode = int(actions[0] // 1000)
            assert actions[real].tolist() == [1000 * episode + t for t in range(lengths[episode])]
            assert begins.tolist() == [1] + [0] * (len(begins) - 1)
            seen.add(episode)
        return {"loss": rnn.mdn.weight.sum()}

    monkeypatch.setattr(wm, "mdnrnn_loss", loss)
    dataset = fake_dataset(tmp_path / "d", lengths, dof=1)
    wm.train_mdnrnn(wm.MDNRNN(2, 1, 4), np.zeros((2, 53, 2), np.float32), dataset, [0, 2], 20, batch_size=2)
    assert seen == {0, 2}


def test_controller_is_one_linear_layer_for_each_row():
    controller = wm.Controller(5, 3, squash="car")
    params, features = torch.randn(4, controller.num_params), torch.randn(4, 5)
    for i, a in enumerate(controller(params, features)):
        raw = torch.tanh(params[i, :15].view(3, 5) @ features[i] + params[i, 15:])
        close(a, torch.stack([raw[0], (raw[1] + 1) / 2, raw[2].clamp(0, 1)]))


def tiny_dream(heads, max_steps=20):
    torch.manual_seed(0)
    rnn = wm.MDNRNN(4, 1, 8, heads=heads, restart=True).eval().requires_grad_(False)
    return wm.Dream(rnn, (torch.randn(6, 4), torch.zeros(6, 4)), 1.0, max_steps, cell=True)


def test_dream_scores_count_each_dream_to_its_own_end():
    """With a reward of 1 a score is the first step at which done has the odds of 1 to 10, as counted dream by dream."""
    dream, controller, params = tiny_dream("done", 300), wm.Controller(20, 1), torch.randn(2, 21)
    nn.init.normal_(dream.rnn.heads["done"].weight, std=5.0)
    nn.init.constant_(dream.rnn.heads["done"].bias, -4.0)
    scores, steps = wm.dream_scores(dream, controller, params.numpy(), 0, 200)
    dream.generator.manual_seed(0)
    trial, alive = torch.arange(200).repeat(2), torch.ones(400, dtype=torch.bool)
    features, each, lifetimes = dream.reset(trial), params.repeat_interleave(200, 0), torch.zeros(400)
    for _ in range(300):
        features, _, _ = dream.step(controller(each, features))
        lifetimes += alive
        logit = features[:, 4:12] @ dream.rnn.heads["done"].weight[0] + dream.rnn.heads["done"].bias
        alive &= logit.exp() * 10 <= 1
    assert scores.sum() == steps and scores.min() < 10 < scores.max() and len(np.unique(scores)) > 10
    close(torch.from_numpy(scores).flatten(), lifetimes, atol=0, rtol=0)


def test_dream_scores_give_each_candidate_its_own_weights():
    dream, params = tiny_dream("reward"), torch.zeros(3, 21)
    for parameter in dream.rnn.lstm.parameters():
        nn.init.zeros_(parameter)
    dream.rnn.lstm.weight_ih_l0[:, 4] = 1.0  # only the action reaches M
    nn.init.ones_(dream.rnn.heads["reward"].weight)
    params[:, -1] = torch.tensor([-2.0, 0.0, 2.0])
    scores = wm.dream_scores(dream, wm.Controller(20, 1), params, 0, 2)[0].mean(1)
    assert scores[0] < scores[1] < scores[2]


def test_a_dream_lasts_its_limit_and_repeats_with_its_seed():
    params = torch.randn(3, 21)
    scores = [wm.dream_scores(tiny_dream("reward"), wm.Controller(20, 1), params, seed, 4)[0] for seed in (1, 1, 2)]
    assert np.array_equal(scores[0], scores[1]) and not np.array_equal(scores[0], scores[2])
    scores, steps = wm.dream_scores(tiny_dream(""), wm.Controller(20, 1), params, 0, 4)
    assert (scores == 20).all() and steps == 12 * 20


def paraboloid(params, seed, trials):
    """Returns with their optimum at (0, .2, .4, .6, .8), and that each took a step."""
    return np.repeat(-np.square(params - np.arange(5) / 5).sum(1, keepdims=True), trials, 1), len(params) * trials


def evolve(path, steps, scores=paraboloid, popsize=(8,)):
    return wm.evolve(scores, np.zeros(5), path, list(popsize), 2, steps, 4, seed=2**31 - 1)


def test_evolve_finds_an_optimum_and_resumes_bit_for_bit(tmp_path):
    whole = evolve(tmp_path / "whole.pt", 1000)
    evolve(tmp_path / "parts.pt", 384)  # as many as 23 generations take, with four scores
    parts = evolve(tmp_path / "parts.pt", 1000)
    assert whole["score"] > -1e-3
    assert whole["log"][-1]["steps"] == 60 * 16 + 12 * 4 >= 1000 and len(whole["fitness"]) == 60
    assert torch.equal(parts["params"], whole["params"]) and parts["fitness"] == whole["fitness"]


def test_candidates_become_more_once_luck_decides_and_a_resumed_search_knows_it(tmp_path):
    def noisy(params, seed, trials):
        returns, steps = paraboloid(params, seed, trials)
        return returns + noise * np.random.default_rng(seed).standard_normal(returns.shape), steps

    for noise, expected in {0: [8] * 15, 100: [8] * 5 + [16] * 5 + [24] * 5}.items():
        runs = ("whole", 700), ("parts", 350), ("parts", 700)
        whole, _, parts = (evolve(tmp_path / f"{noise}_{name}.pt", steps, noisy, (8, 24)) for name, steps in runs)
        assert [row["popsize"] for row in whole["log"]][:15] == expected and parts["fitness"] == whole["fitness"]


@pytest.mark.parametrize("value", [3.0, math.nan])
def test_a_search_whose_candidates_are_all_equal_ends_and_loses_nothing(value, tmp_path):
    evolve(tmp_path / "c.pt", 100)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=f"all candidates of generation 7 earn {value:g}: train V and M longer"):
        evolve(tmp_path / "c.pt", 1000, lambda params, seed, trials: (np.full((len(params), trials), value), 1))
    assert contents(tmp_path) == before


SMALL = (
    "--env pointmaze --episodes 6 --max-steps 8 --v-steps 4 --sizes z_dim=4,hidden=8 --m-steps 6 "
    "--popsize 4 --trials 2 --c-steps 260 --score-trials 2 --test-episodes 2 --workers 1"
).split()


def run_all(path, last_write=None):
    """A whole run of World Models, as small as can be, in one process, with a checkpoint after every step. Instead of
    its write number `last_write` it kills itself, before the file gets its name."""
    clock, writes, replace = itertools.count(0, 100), itertools.count(), Path.replace

    def replace_or_die(*paths):
        if next(writes) == last_write:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worlds, "Workers", OneProcess)
        patch.setattr(common, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
        patch.setattr(Path, "replace", replace_or_die)
        wm.main(["all", *SMALL, "--out", str(path)])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    run_all(path)
    return path


@pytest.fixture
def wm_run(finished, tmp_path, script, one_process):
    """A copy of it to work on: wm_run("train-m", ...) runs a step there; the folder is wm_run.path."""
    path = Path(shutil.copytree(finished, tmp_path / "run"))
    run = lambda step, *flags: script("vae_mdnrnn", step, *SMALL, "--out", path, *flags)  # noqa: E731
    run.path = path
    return run


def test_a_run_that_is_killed_again_and_again_ends_as_one_that_was_not(finished, tmp_path):
    for last_write in [*np.random.default_rng(0).integers(0, 8, 12), None]:
        process = begin(run_all, tmp_path / "run", last_write)
        process.join(60)
        assert process.exitcode == (0 if last_write is None else -signal.SIGKILL)
    ours, theirs = contents(tmp_path / "run"), contents(finished)
    close(*(torch.load(io.BytesIO(files.pop("c_dream_tau1.pt"))) for files in (ours, theirs)), atol=0, rtol=0)
    assert ours == theirs  # and nothing is left over
    names = {path.name for path in finished.iterdir()}
    assert names >= {"data", "latents.npy", "test.json", "reconstructions.png", "dream.gif", "args.json"}
    assert names >= {"held_out.json", "c_dream_tau1.pt"}
    assert names >= {f"{model}.{kind}" for model in ("vae", "rnn", "c_dream_tau1") for kind in ("safetensors", "csv")}
    returns = json.loads((finished / "test.json").read_text())["returns"]
    assert len(returns["random"]["real"]) == len(returns["dream_tau1"]["dream"]) == 2


def test_c_learns_in_the_real_environment_and_in_dreams_of_several_temperatures(wm_run):
    assert wm_run("train-c", "--in", "real", "--c-steps", 70)[0] == 0
    assert len(common.load_tensors(wm_run.path / "c_real.pt")["fitness"]) == 2
    assert wm_run("train-c", "--c-steps", 70, "--tau", 0.5, 1.3)[0] == 0
    code, out, _ = wm_run("test")
    returns = json.loads((wm_run.path / "test.json").read_text())["returns"]
    assert code == 0 and set(returns) == {"random", "zero", "real", "dream_tau0.5", "dream_tau1", "dream_tau1.3"}
    assert all(name in out for name in returns)


def test_iterations_build_on_each_other(tmp_path, monkeypatch, script, one_process):
    means, begun, evolve, fit = [], [], wm.evolve, wm.fit

    def watched_fit(model, *args, **options):
        begun.append({k: v.clone() for k, v in model.state_dict().items()})
        return fit(model, *args, **options)

    monkeypatch.setattr(wm, "fit", watched_fit)
    monkeypatch.setattr(wm, "evolve", lambda _, mean, *a, **k: (means.append(mean), evolve(_, mean, *a, **k))[1])
    flags = [*SMALL, "--seed", 2**31 - 2, "--out", tmp_path]
    code, out, err = script("vae_mdnrnn", "iterate", "--iterations", 2, *flags, "--v-steps", 4, 3)
    assert code == 0, err
    first, second = (tmp_path / f"iteration{i}" for i in (1, 2))
    assert not means[0].any() and np.array_equal(means[1], load_file(first / "c_dream_tau1.safetensors")["params"])
    for name, model in zip(("vae", "rnn"), begun[2:], strict=True):  # V and M go on
        close(model, load_file(first / f"{name}.safetensors"), atol=0, rtol=0)
    before, after = (data.Dataset(path / "data") for path in (first, second))
    assert (before.meta["policy"], after.meta["policy"]) == ("hold", "C") and len(after) == 2 * len(before) == 12
    assert np.array_equal(after.frames[: len(before.frames)], before.frames)
    assert load_file(second / "rnn.safetensors").keys() >= {"heads.reward.weight", "heads.action.weight"}
    assert len((tmp_path / "iterations.csv").read_text().splitlines()) == 3
    assert vars(recipes.open_run(tmp_path)).items() >= {"run": second, "v_steps": 3}.items()
    assert "dream_tau1" in script("vae_mdnrnn", "test", *flags[:-1], second, "--v-steps", 3)[1]  # a run of its own


STEPS = [("train-v", "vae.safetensors"), ("train-m", "rnn.csv"), ("train-c", "c_dream_tau1.pt"), ("test", "test.json")]


@pytest.mark.parametrize("step, file", STEPS)
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(step, file, wm_run, finished, monkeypatch):
    for suffix in (Path(file).suffix, ".pt", ".csv", ".safetensors"):
        (wm_run.path / file).with_suffix(suffix).unlink(missing_ok=True)
    with monkeypatch.context() as patch:
        no_room_for(patch, file)
        assert_refused(wm_run(step), f"cannot write {wm_run.path / file}: No space left on device")
    assert not [name for name in contents(wm_run.path) if "partial" in name or name == file]
    assert wm_run(step)[0] == 0 and contents(wm_run.path) == contents(finished)


V, M, C, Z, A = "vae.safetensors", "rnn.safetensors", "c_dream_tau1.safetensors", "latents.npy", "args.json"
FITNESS = "c_dream_tau1.pt"
cut, keep = lambda path: os.truncate(path, 100), lambda path: None
copy_of = lambda name: lambda path: shutil.copy(path.with_name(name), path)  # noqa: E731
text = lambda content: lambda path: path.write_text(content)  # noqa: E731
nans = lambda *shape: lambda path: np.save(path, np.full(shape, np.nan, np.float32))  # noqa: E731
tensors = lambda change: lambda path: save_file(change(load_file(path)), path)  # noqa: E731
no_number = tensors(lambda state: {name: w * math.nan for name, w in state.items()})
no_search = lambda path: torch.save(torch.load(path) | {"params": torch.full((26,), math.inf)}, path)  # noqa: E731
WRONG = [
    ("train-v", "data/meta.json", [Path.unlink], "no data set at"),
    ("train-m", Z, [Path.unlink], "first run python vae_mdnrnn.py train-v --env pointmaze"),
    ("train-c", M, [Path.unlink], "first run python vae_mdnrnn.py train-m --env pointmaze"),
    ("test", C, [Path.unlink], "first run python vae_mdnrnn.py train-c --env pointmaze"),
    ("train-v", V, [no_number], "vae.safetensors is damaged: encoder.0.weight holds numbers that are not finite"),
    ("train-c", M, [no_number], "rnn.safetensors is damaged: lstm.weight_ih_l0 holds numbers that are not finite"),
    ("train-c", FITNESS, [no_search, lambda path: torch.save({}, path)], "not hold the search of a C of 26 weights"),
    ("train-c", FITNESS, [copy_of(M)], "c_dream_tau1.pt is damaged, or does not hold a dict"),
    ("test", C, [no_number, copy_of(M)], "does not hold the 26 weights of C"),
    ("train-c", M, [cut, copy_of(Z), copy_of(FITNESS)], "rnn.safetensors is damaged, or is not a safetensors file"),
    ("train-c", V, [copy_of(M)], "vae.safetensors does not fit the model"),
    ("train-c", M, [lambda path: save_file(wm.MDNRNN(4, 3, 8).state_dict(), path)], "rnn.safetensors does not fit"),
    ("train-m", "rnn.unfinished.pt", [copy_of(M)], "rnn.unfinished.pt"),
    ("train-m", Z, [cut], "latents.npy is damaged"),
    ("train-m", Z, [nans(2, 48, 5), nans(2, 48, 4)], "latents.npy does not fit"),
    ("train-m", A, [cut, text("[" * 100_000), text("5")], "args.json is damaged: remove it"),
    ("train-m --sizes z_dim=5,hidden=8", Z, [keep], "was begun with other flags (--sizes z_dim=4,hidden=8"),
    ("train-m --m-steps 9", Z, [keep], "was begun with other flags (--m-steps 6)"),
    ("test --env takecover", Z, [keep], "was begun with other flags"),
    ("test --sizes z_dim=5,hidden=8", Z, [keep], "was begun with other flags"),
    ("train-c --popsize 5", FITNESS, [keep], "was begun with {'popsize': [4]"),
    ("iterate --tau 1 2", Z, [keep], "one --tau"),
    ("train-m --m-steps 6 6", Z, [keep], "several numbers for --m-steps are for the step iterate"),
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("command, file, spoil, message", [(c, f, s, m) for c, f, spoils, m in WRONG for s in spoils])
def test_a_run_that_is_damaged_or_of_other_flags_is_refused(command, file, spoil, message, wm_run):
    step, *flags = command.split()
    spoil(wm_run.path / file)
    made = {"train-v": V, "train-m": M, "train-c": FITNESS}.get(step, file)
    if made != file:
        (wm_run.path / made).unlink()  # so that there is something to do
    before = contents(wm_run.path)
    assert_refused(wm_run(step, *flags), message)
    assert contents(wm_run.path) == before


# -- what wrong input gets ----------------------------------------------------------------------------------


REFUSED = """
data | unknown environment 'nowhere'; known: pointmaze | --env nowhere
data | not a whole number of at least | --episodes 0 / --episodes 99999999999999999999999 / --seed 2147483648
data | there is not enough memory | --img-size 9999999
data | no data set at missing | --inspect missing
data | cut/frames.npy is damaged, or not an array | --inspect cut
data | datasets/pointmaze is there: remove it, or choose another folder | --out datasets/pointmaze
data | cannot write | --out /proc/none/d / --episodes 1 --out cut/meta.json/d
vae_mdnrnn | invalid choice | learn / all --env nowhere / all --in sea
vae_mdnrnn | not a whole number of at least 0 | all --seed -1 / all --seed 4294967295
vae_mdnrnn | not a whole number of at least 1 | all --c-steps 1e3 / all --sizes z_dim=-3
vae_mdnrnn | not a whole number of at least 2 | all --trials 1
vae_mdnrnn | --popsize takes one number, or two of which the second is the larger | all --popsize 8 16 32
vae_mdnrnn | --popsize takes one number, or two of which the second is the larger | all --popsize 16 4
vae_mdnrnn | not a whole number of at least 4 | all --popsize 3 / all --popsize 1000000000
vae_mdnrnn | not a number above 0 | all --tau nan / all --tau inf / all --tau 0 / all --sigma0 1e200 / all --lr inf
vae_mdnrnn | --tau names the same temperature twice | all --tau 1.2 1.20
vae_mdnrnn | torch cannot use the device 'meta' here | all --device meta
vae_mdnrnn | z_dim, hidden, n_mix, mixture | all --sizes depth=2 / all --sizes hidden
vae_mdnrnn | vector, dimension | all --sizes mixture=both
vae_mdnrnn | unrecognized arguments: --pop 64 | all --pop 64
vae_mdnrnn | there is not enough memory | bench --sizes hidden=9999999
"""
ROWS = [line.split(" | ") for line in REFUSED.strip().splitlines()]


@pytest.mark.parametrize("name, message, flags", [(n, m, f) for n, m, flags in ROWS for f in flags.split(" / ")])
def test_what_wrong_input_to_data_and_world_models_gets(name, message, flags, script, workplace):
    shutil.copytree("datasets/pointmaze", "cut")
    cut(Path("cut/frames.npy"))
    before = contents(workplace)
    assert_refused(script(name, *flags.split()), message)
    assert contents(workplace) == before  # nothing half-written


# -- encoders.py, lib/weights.py, lib/vjepa.py, lib/tokenizers.py -------------------------------------------


encoders.VJEPA2_SIZES["tiny"] = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=2)  # fits into a test
SHAPES = {
    "pca": (1, 32), "vae": (1, 32), "vae_map": (16, 16), "vjepa_tiny": (16, 64), "patches": (16, 64),
    "dinov2": (196, 384), "dinov2_imagenet": (196, 384), "dino_cls": (1, 384), "dinov3": (196, 384),
    "vjepa2-tiny": (256, 48), "resnet18": (1, 512), "resnet18_map": (49, 512), "r3m": (1, 512),
    "efficientnet": (16, 112), "efficientnet_pool": (1, 112),
    "dino_tok": (196, 64), "dino_tok_vq": (196, 64), "vfm_vae": (196, 32),
}  # fmt: skip
IMAGES = torch.rand(1, 3, 230, 230, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def frames():
    """Frames with something to see: a square that moves over a gradient."""
    y, x = np.mgrid[:64, :64]
    frames = np.repeat(np.stack([x * 2, y * 2, x + y], -1)[None].astype(np.uint8), 24, axis=0)
    for i, frame in enumerate(frames):
        frame[8 * (i // 6) : 8 * (i // 6) + 16, 8 * (i % 6) : 8 * (i % 6) + 16] = (250, 20, 20)
    return frames


def randomised(model):
    """Every tensor of a model becomes nonzero and unlike the others, so that what is dropped or swapped shows."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(0.05 * torch.rand_like(tensor)) if tensor.dim() == 1 else tensor.uniform_(-0.03, 0.03)
    return model.eval()


def seen(size, mean=encoders.IMAGENET["mean"], std=encoders.IMAGENET["std"]):
    """IMAGES as a pretrained backbone sees them."""
    images = F.interpolate(IMAGES, (size, size), mode="bilinear", antialias=True)
    return (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def equal_states(a, b):
    """Whether two state dicts have the same names and the same numbers."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@contextlib.contextmanager
def refused(match):
    """What is done here ends with a UserError of one line that matches."""
    with pytest.raises(UserError, match=match) as error:
        yield
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize("name", SHAPES)
def test_encoders_are_frozen_and_do_not_mix_the_batch(name):
    encoder = encoders.build_encoder(name, weights="random")
    for buffer, tensor in encoder.named_buffers():
        if buffer.endswith(("axes", "codebooks")):  # as if fitted
            tensor.normal_()
    before = copy.deepcopy(encoder.state_dict())
    encoder.train()
    assert encoder.name == name and not any(m.training for m in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())
    images = torch.rand(2, 3, 80, 80, requires_grad=True)
    tokens = encoder(images)
    assert tokens.shape == (2, encoder.num_patches, encoder.dim) == (2, *SHAPES[name])
    assert not tokens.requires_grad and tokens.isfinite().all() and tokens.std() > 0
    close(tokens[1:2], encoder(images[1:2]), atol=1e-4, rtol=1e-4)
    assert equal_states(before, encoder.state_dict())  # batch-norm statistics included


def original_names(state):
    """Renames timm's tensors of a DINOv2 or DINOv3 to the original repository's names."""
    names = {"reg_token": "storage_tokens", "gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}
    for attn in [key.removesuffix("q_bias") for key in state if key.endswith(".q_bias")]:
        q, v = state.pop(f"{attn}q_bias"), state.pop(f"{attn}v_bias")
        state[f"{attn}qkv.bias"] = torch.cat([q, torch.full_like(v, 9.0), v])  # k's, which a mask hides
        state[f"{attn}qkv.bias_mask"] = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(len(q))
    return {re.sub("|".join(names), lambda name: names[name[0]], key): tensor for key, tensor in state.items()}


def sees(name, weights, expected):
    """The encoder with these weights gives these tokens."""
    encoder = encoders.build_encoder(name, weights=weights)
    close(encoder(IMAGES), expected, atol=1e-5, rtol=1e-5)
    return encoder


@torch.no_grad()
def test_dinov2_sees_the_same_in_all_its_formats(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    model = encoders.DINOV2.format("small")
    released = randomised(timm.create_model(model, num_classes=0))  # 518 px: 37 x 37 positions
    save_file(released.state_dict(), tmp_path / "model.safetensors")
    torch.save(original_names(released.state_dict()) | {"mask_token": torch.ones(1, 384)}, tmp_path / "dinov2.pth")
    # its own interpolation of the positions to 14 x 14 (dinov2/models/vision_transformer.py)
    grid = released.pos_embed[:, 1:].reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=(14.1 / 37, 14.1 / 37), mode="bicubic", antialias=False)
    positions = torch.cat([released.pos_embed[:, :1], grid.permute(0, 2, 3, 1).reshape(1, 196, 384)], 1)
    small = timm.create_model(model, num_classes=0, img_size=196).eval()
    small.load_state_dict(released.state_dict() | {"pos_embed": positions})
    dino_wm = small.forward_features(seen(196, (0.5,) * 3, (0.5,) * 3))
    sees("dinov2", str(tmp_path / "model.safetensors"), dino_wm[:, 1:])
    sees("dino_cls", str(tmp_path), dino_wm[:, :1])  # the folder
    encoder = sees("dinov2_imagenet", tmp_path / "dinov2.pth", small.forward_features(seen(196))[:, 1:])
    first, last = encoder.layers(IMAGES, (4, -1))
    close(first, small.forward_intermediates(seen(196), [3], output_fmt="NLC", intermediates_only=True)[0])
    close(last, encoder(IMAGES))

    hf = randomised(Dinov2Model(Dinov2Config(image_size=196, hidden_size=384, num_attention_heads=6)))
    hf.save_pretrained(tmp_path / "hf")
    sees("dinov2_imagenet", tmp_path / "hf", hf(seen(196)).last_hidden_state[:, 1:])


@torch.no_grad()
def test_dinov3_sees_the_same_in_all_its_formats(tmp_path):
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    model = encoders.DINOV3.format("small")
    original = randomised(timm.create_model(model.replace("dinov3.", "dinov3_qkvb."), num_classes=0, img_size=224))
    no_bias = randomised(timm.create_model(model, num_classes=0, img_size=224))  # timm's own: without q, k, v biases
    config = DINOv3ViTConfig(num_register_tokens=4, hidden_size=384, num_attention_heads=6, intermediate_size=1536)
    hf = randomised(DINOv3ViTModel(config))
    state = original_names(original.state_dict())
    state |= {"mask_token": torch.ones(1, 384), "rope_embed.periods": torch.ones(16)}
    torch.save(state, tmp_path / "dinov3.pth")
    save_file(no_bias.state_dict(), tmp_path / "timm.safetensors")
    hf.save_pretrained(tmp_path / "hf")  # the tokens stand behind the class token and four registers
    sees("dinov3", tmp_path / "dinov3.pth", original.forward_features(seen(224))[:, 5:])
    sees("dinov3", tmp_path / "timm.safetensors", no_bias.forward_features(seen(224))[:, 5:])
    sees("dinov3", tmp_path / "hf", hf(seen(224)).last_hidden_state[:, 5:])
    attention = load_file(tmp_path / "hf" / "model.safetensors")
    lost = [(state, "blocks.3.attn.qkv.bias"), (state, "blocks.3.attn.qkv.weight")]
    lost += [(attention, f"layer.3.attention.{name}") for name in ("k_proj.weight", "q_proj.bias", "o_proj.bias")]
    for whole, name in lost:
        torch.save({k: v for k, v in whole.items() if k != name}, tmp_path / "half.pth")
        with refused("1 missing, e.g. blocks.3.attn|2 missing, e.g. blocks.3.attn.q_bias"):
            load_weights(original, tmp_path / "half.pth", None, partial(vit_names, original))


@torch.no_grad()
def test_vjepa2_sees_the_same_in_both_formats(tmp_path):
    from transformers import VJEPA2Config, VJEPA2Model

    released = randomised(VJEPA2Model(VJEPA2Config(pred_num_hidden_layers=2, **encoders.VJEPA2_SIZES["tiny"])))
    released.save_pretrained(tmp_path / "hf")
    own, state = released.encoder.state_dict(), {"module.backbone.pos_embed": torch.ones(1, 8192, 48)}
    for key in [key for key in own if ".query." in key]:
        own[key.replace("query", "qkv")] = torch.cat(
            [own.pop(key.replace("query", x)) for x in ("query", "key", "value")]
        )
    for key, value in own.items():
        key = key.replace("embeddings.patch_embeddings.", "patch_embed.").replace("layer.", "blocks.")
        key = key.replace("attention.", "attn.").replace("layernorm.", "norm.")
        state[f"module.backbone.{key}"] = value
    assert "module.backbone.blocks.1.attn.qkv.bias" in state and "module.backbone.patch_embed.proj.weight" in state
    torch.save({"encoder": state, "predictor": {}, "epoch": 1, "lr": 1e-4}, tmp_path / "vitt.pt")
    expected = F.layer_norm(released.get_vision_features(seen(256)[:, None].repeat(1, 2, 1, 1, 1)), (48,))
    sees("vjepa2-tiny", tmp_path / "hf", expected)
    sees("vjepa2-tiny", tmp_path / "vitt.pt", expected)


@torch.no_grad()
def test_resnets_see_what_torchvisions_does(tmp_path):
    net = randomised(models.resnet18())
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2)
    state = net.state_dict()
    of_torchvision = {k: v for k, v in state.items() if "tracked" not in k}
    torch.save(of_torchvision, tmp_path / "resnet18.pth")
    save_file(state, tmp_path / "model.safetensors")
    r3m = {f"module.convnet.{k}": v for k, v in state.items() if not k.startswith("fc.")}
    r3m["module.lang_rew.pred.0.weight"] = torch.ones(2, 2)
    torch.save({"r3m": r3m, "global_step": 7}, tmp_path / "model.pt")
    net.fc = net.avgpool = nn.Identity()
    tokens = net(seen(224)).view(1, 512, 49).mT
    sees("resnet18_map", tmp_path / "resnet18.pth", tokens)
    for name, file in (("resnet18", "resnet18.pth"), ("resnet18", "model.safetensors"), ("r3m", "model.pt")):
        sees(name, tmp_path / file, tokens.mean(1, keepdim=True))


def test_weights_that_do_not_fit_are_named_and_nothing_is_half_loaded(tmp_path):
    vit, net = encoders.build_encoder("dinov2", weights="random").vit, timm.create_model("resnet18", num_classes=0)
    state, qkv, path = vit.state_dict(), "blocks.3.attn.qkv.weight", tmp_path / "x.pth"
    before, of_vit = copy.deepcopy(state), (vit, partial(vit_names, vit))
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    for match, content, *of_another in (
        ("another architecture: keys .* missing, .* unknown", net.state_dict()),
        ("another architecture", state, net, resnet_names),
        ("another architecture", state, net, vjepa2_names),
        ("does not hold the weights", {"encoder": torch.zeros(3)}, net, vjepa2_names),
        (f"1 missing, e.g. {qkv}$", {k: v for k, v in state.items() if k != qkv}),
        ("1 unknown, e.g. register_tokens$", state | {"register_tokens": torch.zeros(1, 4, 384)}),
        ("1 of another shape, e.g. norm.bias$", state | {"norm.bias": torch.zeros(5)}),
        (f"another shape, e.g. {qkv}$", state | {qkv: "not a tensor"}),
        ("does not hold the weights", state | {"pos_embed": "not a tensor"}),
        ("damaged, or does not hold a dict", ["a", "list"]),
        ("damaged, or is not a safetensors file", tmp_path / "x.safetensors"),
        ("no weights at missing.pth", "missing.pth"),
        ("no weights at some/where/x.pth", "some/where/x.pth"),
        ("neither a file nor a folder, nor the name of a repository", "weights/dinov2--small"),
    ):
        torch.save(content, path)
        model, names = of_another or of_vit
        with refused(match):
            load_weights(model, content if isinstance(content, str | Path) else path, "timm/x", names)
    (tmp_path / "x.safetensors").unlink()
    with refused("no weights at "):
        load_weights(vit, tmp_path, None, of_vit[1])
    assert equal_states(vit.state_dict(), before)
    torch.save(state | {qkv: torch.full_like(state[qkv], math.nan)}, path)
    with refused(f"x.pth is damaged: {qkv} holds numbers that are not finite"):
        load_weights(vit, path, None, of_vit[1])


def test_names_and_sizes_of_encoders_that_are_not_there_are_refused():
    assert {name.partition("-")[0] for name in SHAPES} | {"state"} == set(encoders.ENCODERS)  # each of them is tested
    for match, *args in (
        ("unknown encoder 'dino'; known: pca", "dino"),
        ("has no size 'huge'; its sizes: small, base, large", "dinov3-huge"),
        ("has no size 'base'; its sizes: only one", "pca-base"),
        ("patches has no pretrained weights: leave out --weights", "patches", None, "x.pth"),
        ("R3M's weights .* --weights", "r3m"),
        *((f"{name}.* 60 is not a multiple of its patch size {patch}", name, 60, "random") for name, patch in (
            ("dinov2", 14), ("vjepa2-tiny", 16), ("vfm_vae", 14), ("resnet18_map", 32), ("patches", 16))),
    ):  # fmt: skip
        with refused(match):
            encoders.build_encoder(*args)
    assert encoders.build_encoder("dinov3-base", weights="random").dim == 768


def test_weights_come_from_a_repository_which_is_named_if_it_is_out_of_reach(monkeypatch, tmp_path):
    import huggingface_hub as hub

    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    answers = [(None, "is not here, and the hub cannot be reached.*--weights PATH"), (404, "answers 404")]
    for code, match in answers + [(code, "is gated") for code in (401, 403)]:
        response = mock.Mock(status_code=code, headers={})
        error = hub.errors.HfHubHTTPError("", response=response) if code else OSError("no route")
        monkeypatch.setattr(hub, "get_hf_file_metadata", mock.Mock(side_effect=error))
        with refused(f"facebook/vjepa2-vitt-fpc64-256.*{match}"):
            encoders.build_encoder("vjepa2-tiny")
    state = encoders.build_encoder("dinov2", weights="random").vit.state_dict()
    save_file(state, tmp_path / "model.safetensors")
    download = mock.Mock(return_value=tmp_path / "model.safetensors")
    monkeypatch.setattr("lib.weights.download", download)
    assert torch.equal(encoders.build_encoder("dinov2").vit.norm.bias, state["norm.bias"])
    encoders.build_encoder("dino_tok", weights="me/mine")
    assert [call.args[0] for call in download.mock_calls] == ["timm/vit_small_patch14_dinov2.lvd142m", "me/mine"]


def test_the_table_of_encoders_shows_their_sizes_and_licences(script, monkeypatch):
    monkeypatch.setattr(time, "perf_counter", iter(range(99)).__next__)  # a second has passed at each reading
    _, *table = script("encoders", "--encoders", "patches,resnet18", "--batch-size", 1)[1].splitlines()
    assert table[0].split()[:4] == ["patches", "64", "16", "64"] and "BSD-3-Clause" in table[1]
    assert_refused(script("encoders", "--encoders", "patches,x"), "unknown x; known: pca")


def test_pca_is_numpys_svd(dataset):
    encoder = encoders.PCAEncoder(dim=8).fit(dataset.frames[:120])
    y = encoder.filtered(to_tensor(dataset.frames[:120])).flatten(1).double().numpy()
    u, s, _ = np.linalg.svd(y - y.mean(0), full_matrices=False)
    std = s / np.sqrt(len(y) - 1)
    tokens, expected = encoder(to_tensor(dataset.frames[:120]))[:, 0], u * s / (std + encoder.damping * std[0])
    np.testing.assert_allclose(np.abs(tokens.numpy()), np.abs(expected[:, :8]), atol=2e-3)


def test_the_spatial_v_learns_and_keeps_its_places(frames):
    encoder = encoders.build_encoder("vae_map")
    mu, logvar = encoder.vae.encode(torch.rand(2, 3, 64, 64))
    assert mu.shape == logvar.shape == (2, 256) and encoder.vae.decode(mu).shape == (2, 3, 64, 64)
    tokens = encoder.fit(frames, steps=4)(to_tensor(frames))
    change = (tokens - tokens.mean(0)).square().sum(2)  # (24, 16)
    assert tokens.shape == (24, 16, 16) and change[0, 0] > change[0, 15]  # the square is top left in the first frame
    x = encoder.contrast(to_tensor(frames))
    close((x.mean(0), (x - 0.5).abs().max()), (torch.full((3, 64, 64), 0.5), torch.tensor(0.5)), atol=1e-4, rtol=0)
    close(tokens.mean(0), torch.zeros(16, 16), atol=1e-4, rtol=0)
    close(tokens.std(0).max(), torch.tensor(1 / 1.1))  # damped by a tenth of the largest deviation


def test_patches_project_each_patch_by_itself():
    encoder, images = encoders.build_encoder("patches"), torch.rand(2, 3, 64, 64)
    close(encoder(images)[1, 7], images[1, :, 16:32, 48:64].flatten() @ encoder.projection)  # second row, last column
    tokens = encoder.fit((images.permute(0, 2, 3, 1) * 255).byte().numpy())((images * 255).byte() / 255)
    close(tokens.mean(0), torch.zeros(16, 64))
    close(tokens.square().mean(), torch.ones(()))
    assert torch.equal(encoder.projection, encoders.build_encoder("patches").projection)


def test_dino_tok_is_a_pca_of_each_branch_and_its_codes_are_centres_of_clusters(frames):
    frames = frames[::3]
    images, parts = to_tensor(frames), []
    encoder = encoders.build_encoder("dino_tok", 98, weights="random").fit(frames)  # 49 tokens
    for branch in encoder.features(encoder.resize(images)):  # by the singular values
        u, s, _ = torch.linalg.svd((branch - branch.mean((0, 1))).flatten(0, 1).double(), full_matrices=False)
        z = (u * s)[:, :32]
        parts.append(z / z.square().mean().sqrt())
    close(encoder(images).flatten(0, 1).abs(), torch.cat(parts, 1).abs().float(), atol=5e-3, rtol=5e-3)

    encoder, twin = (encoders.build_encoder("dino_tok_vq", 98, weights="random") for _ in range(2))
    twin.backbone.load_state_dict(encoder.backbone.state_dict())
    for one in (encoder, twin):
        one.tokenizer.codebooks = torch.zeros(2, 16, 32)
        one.fit(frames)
    tokens = encoder(images)
    assert torch.equal(twin(images), tokens)  # one seed, one result
    for half, codebook in zip(tokens.flatten(0, 1).split(32, 1), encoder.tokenizer.codebooks, strict=True):
        distance = torch.cdist(half, codebook, compute_mode="donot_use_mm_for_euclid_dist")
        assert distance.min(1).values.max() < 1e-5 and len(half.unique(dim=0)) > 8  # centres, and most are in use
    x = torch.cat([torch.tensor(c) + torch.rand(50, 2) for c in ([0.0, 0.0], [10.0, 0.0], [0.0, 10.0])])
    assert torch.cdist(x, tokenizers.kmeans(x, 12, seed=0)).min(1).values.max() < 2**0.5


def test_vfm_vae_learns_to_reconstruct(frames, monkeypatch):
    encoder = encoders.build_encoder("vfm_vae", 56, weights="random")  # 4 x 4 tokens
    backbone, images = copy.deepcopy(encoder.backbone.state_dict()), encoder.resize(to_tensor(frames))
    assert [p.shape[-1] for p in encoder.tokenizer.decoder(torch.zeros(1, 32, 4, 4))] == [4, 8, 16, 32]

    @torch.no_grad()
    def error():
        torch.manual_seed(0)
        return encoder.tokenizer.loss(images, encoder.features(images))["recon"]

    before, short = error(), functools.partialmethod(tokenizers.VFMVAE.fit, steps=20, batch_size=4)
    monkeypatch.setattr(tokenizers.VFMVAE, "fit", short)
    encoder.fit(frames)
    assert error() < 0.7 * before and not any(p.requires_grad for p in encoder.parameters())
    assert equal_states(encoder.backbone.state_dict(), backbone)
    tokens = encoder(images)
    assert tokens.shape == (24, 16, 32) and tokens.mean().abs() < 0.1 and 0.3 < tokens.std() < 1.2


# -- predictor.py, lib/decoders.py --------------------------------------------------------------------------


STATS = (torch.tensor([0.1, -0.1]), torch.tensor([0.5, 0.6])), (torch.zeros(4), torch.full((4,), 2.0))
WORLD = dict(env="pointmaze", img_size=64, data="datasets/pointmaze")
MODELS = {
    "vit": {},
    "vit_of_states": dict(encoder="state"),
    "vit_and_two_tokens": dict(concat_dim=0, emb_dim=6),
    "vit_of_one_and_two_tokens": dict(encoder=1, concat_dim=0, emb_dim=6),
    "vit_with_copies": dict(num_proprio_repeat=2, num_action_repeat=3, action_emb_dim=5),
    "vit_of_the_paper": dict(variant="paper"),
    "rwm": dict(name="rwm", encoder=1),
    "rwm_of_states": dict(name="rwm", encoder="state"),
    "vjepa2_ac": dict(name="vjepa2_ac"),
}


def tiny_model(name="vit", encoder=4, num_hist=3, world=WORLD, **options):
    """A world model with this transition, on an encoder by name or on one of so many tokens of 6 numbers."""
    torch.manual_seed(0)
    if isinstance(encoder, int):
        encoder = encoders.FrozenEncoder("tiny", 8 * math.isqrt(encoder), 6, patch=8)
    else:
        encoder = encoders.build_encoder(encoder, weights="random")
    sizes = dict(depth=2, heads=2, mlp_dim=16, dropout=0.0) if name == "vit" else dict(width=24, depth=2, mlp_dim=16)
    sizes |= dict(heads=2) if name == "vjepa2_ac" else {}
    return predictor.WorldModel(encoder, *STATS, num_hist, world=world, predictor=name, **sizes | options).eval()


def tiny_batch(model, length=7):
    visual = torch.randn(5, length, model.encoder.num_patches, model.encoder.dim)
    return {"visual": visual, "proprio": torch.randn(5, length, 4), "action": torch.rand(5, length, 10)}


@pytest.fixture(params=MODELS)
def model(request):
    return tiny_model(**MODELS[request.param])


def imagined_by_hand(model, z, actions):
    """What `imagine` should give: for each new frame one plain call of the transition, on all that it may see."""
    a, known = model.encode_action(actions), z
    for t in range(z.shape[1], actions.shape[1] + 1):  # t frames are known
        first = 0 if isinstance(model.predictor, predictor.RWMPredictor) else max(t - model.num_hist, 0)
        after, _ = model.predictor(known[:, first:t], a[:, first:t])
        known = torch.cat([known, after[:, -1:]], 1)
    return known


@torch.no_grad()
def test_every_transition_is_causal_by_frame_and_free_within_one(model):
    batch, N, d = tiny_batch(model, 3), model.encoder.num_patches, model.encoder.dim
    z, actions = model.pack(model.encode(batch)), model.encode_action(batch["action"])
    visual = lambda z, a: model.unpack(model.predictor(z, a)[0])["visual"]  # noqa: E731
    before = visual(z, actions)
    parts = [slice(n * d, n * d + d) for n in range(N)] + [slice(N * d, None)] * bool(model.proprio_dim)
    for t, part in itertools.product(range(3), [*parts, "action"]):
        moved, other = z.clone(), actions.clone()
        changed = other[:, t] if part == "action" else moved[:, t, part]
        changed += torch.randn(changed.shape)
        change = (visual(moved, other) - before).abs().amax((0, 3)) > 1e-6  # (3, N)
        assert change[t:].all() and not change[:t].any()
    close(visual(z[:, :2], actions[:, :2]), before[:, :2])  # a shorter window is a prefix


def test_a_rollout_is_its_steps_and_goes_on_from_several_frames(model):
    batch = tiny_batch(model)
    z0, actions = {name: latent[:, :1] for name, latent in model.encode(batch).items()}, batch["action"][:, :5]
    imagined, expected = model.rollout(z0, actions), model.unpack(imagined_by_hand(model, model.pack(z0), actions))
    assert imagined["visual"].shape == (5, 6, model.encoder.num_patches, model.encoder.dim)
    for name, latent in imagined.items():
        close(latent, expected[name], atol=1e-5, rtol=1e-5)  # of the proprio's copies the first token's
    if model.predictor.copies == 1:
        again = model.rollout({name: latent[:, :3] for name, latent in imagined.items()}, actions)
        close(again["visual"], imagined["visual"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, dict(concat_dim=0, emb_dim=6), dict(name="vjepa2_ac")], ids=str)
@torch.no_grad()
def test_planning_imagines_what_training_does_from_any_number_of_frames(options):
    for num_hist, known in ((1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (3, 3)):
        model = tiny_model(num_hist=num_hist, **options)  # without dropout
        batch = tiny_batch(model)
        z, actions = model.pack(model.encode(batch))[:, :known], batch["action"][:, :6]
        cached, plain = model.imagine(z, actions), model.train().imagine(z, actions)
        assert cached.shape == plain.shape and (cached - plain).abs().max() < 1e-5


def test_every_transition_has_the_losses_that_its_equations_say(model):
    batch, n, K = tiny_batch(model), model.encoder.num_patches * model.encoder.dim, 4
    recurrent, paper = isinstance(model.predictor, predictor.RWMPredictor), model.variant == "paper"
    power = 1 if isinstance(model.predictor, predictor.ACPredictor) else 2
    error = lambda a, b: (a - b).abs().pow(power).mean()  # noqa: E731
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = lambda loss: torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)  # noqa: E731

    # teacher forcing: nothing is learnt through the target
    z = model.pack(model.encode(batch))
    predicted, _ = model.predictor(z[:, :3], model.encode_action(batch["action"])[:, :3])
    first = 2 if paper else 0  # whose loss is that of the next frame alone
    predicted, after = predicted[:, first:], z.detach()[:, 1 + first : 4]
    teacher = error(predicted, after)
    loss, parts = model.loss(batch)
    close(loss, teacher)
    close(gradients(loss), gradients(teacher))
    close(parts["visual"], error(predicted[..., :n], after[..., :n]))
    close(parts["proprio"], error(predicted[..., n:], after[..., n:]) if z.shape[-1] > n else torch.zeros(()))
    other = batch | {"action": torch.cat([batch["action"][:, :3], -batch["action"][:, 3:]], 1)}
    assert torch.equal(model.loss(other, 1)[0], loss)  # no later action matters, and one step has no rollout

    # a rollout, in validation and in training, with a gradient through all of its frames
    start = model.context
    assert start == (3 if recurrent or paper else 1)
    for training in [False] if recurrent else [False, True]:
        model.train(training)
        z = model.pack(model.encode(batch))
        imagined = imagined_by_hand(model, z[:, :start], batch["action"][:, : start + K - 1])
        errors = [error(imagined[:, start + k], z.detach()[:, start + k]) for k in range(K)]
        rollout = sum(errors) / K
        loss, parts = model.loss(batch, K)
        close((loss, parts["rollout"]), (teacher + rollout, rollout.detach()))
        close(gradients(loss), gradients(teacher + rollout), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", predictor.PREDICTORS)
def test_a_gradient_goes_through_all_imagined_frames(name):
    model = tiny_model(name, 1 if name == "rwm" else 4, num_hist=2 if name == "rwm" else 1)
    batch = tiny_batch(model)
    actions, z = batch["action"][:, :5].requires_grad_(), model.pack(model.encode(batch))[:, :1].detach()
    (gradient,) = torch.autograd.grad(model.imagine(z, actions)[:, -1].square().sum(), actions)
    assert (gradient.abs().amax((0, 2)) > 0).all()  # of every action


def test_the_paper_knows_no_proprio_and_sees_actions_through_an_mlp():
    model = tiny_model(variant="paper")
    batch = tiny_batch(model, 3)
    w1, b1, w2, b2 = model.action_encoder.state_dict().values()
    a = (batch["action"] - torch.tensor([0.1, -0.1]).repeat(5)) / torch.tensor([0.5, 0.6]).repeat(5)
    psi = F.gelu(a @ w1.T + b1) @ w2.T + b2
    x = torch.cat([batch["visual"], psi[:, :, None].expand(-1, -1, 4, -1)], -1)  # (B, 3, N, d + a)
    out = model.predictor.transformer(x.flatten(1, 2))[0].view(x.shape)
    predicted, _ = model.predictor(model.pack(model.encode(batch)), model.encode_action(batch["action"]))
    close(predicted, out[..., :6].flatten(2))


def test_rwm_trains_on_samples_and_imagines_means():
    model = tiny_model("rwm", 1)
    batch = tiny_batch(model)
    z, action = model.pack(model.encode(batch))[:, :3], model.encode_action(batch["action"])[:, :3]
    mean, std, _ = model.predictor.distribution(z, action)
    low, high = np.exp(model.predictor.LOG_STD)
    assert mean.shape == std.shape == (5, 3, 10) and (std > low).all() and (std < high).all()
    close(model.predictor(z, action)[0], mean)
    close(mean, z + model.predictor.mean(model.predictor.gru(torch.cat([z, action], -1))[0]))  # a change of the state
    model.train()
    torch.manual_seed(1)
    noise = torch.randn(5, 3, 10)
    torch.manual_seed(1)
    close(model.predictor(z, action)[0], mean + std * noise)
    heads = [model.predictor.log_std[2].bias, model.predictor.mean[2].bias]
    assert all((g.abs() > 0).all() for g in torch.autograd.grad(model.loss(batch, 4)[0], heads))  # reparameterised


def test_the_state_itself_can_be_the_token():
    model = tiny_model("rwm", "state")
    frames = torch.zeros(5, 7, 8, 8, 3, dtype=torch.uint8)  # which planning has, and which are not looked at
    batch = tiny_batch(model) | {"visual": frames}
    z = model.encode(batch)
    close(z["visual"], batch["proprio"][:, :, None] / 2)
    assert z["proprio"].shape == (5, 7, 0) and model.encoder.dim == 4


def test_ac_predictor_has_the_releases_size_and_normalised_tokens():
    with torch.device("meta"):
        ac = predictor.ACPredictor(256, 2, 1408, 7, 7)
    ours = sum(p.numel() for p in ac.state_head.parameters())  # the release has an encoder of extrinsics instead
    assert sum(p.numel() for p in ac.parameters()) - ours == 305_220_992 - 7 * 1024
    model = tiny_model("vjepa2_ac")
    batch = tiny_batch(model, 3)
    z = model.encode(batch)
    after = model.unpack(model.predictor(model.pack(z), model.encode_action(batch["action"]))[0])
    for tokens in (z["visual"], after["visual"]):
        close(tokens.mean(-1), torch.zeros(5, 3, 4))
        close(tokens.var(-1, correction=0), torch.ones(5, 3, 4), atol=0.05, rtol=0)
    with refused("takes a square grid of tokens a frame, not 3"):
        predictor.ACPredictor(3, 2, 6)


def test_a_released_predictor_loads_whole_or_not_at_all(tmp_path):
    def make(**other):
        sizes = dict(num_hist=2, dim=6, proprio_dim=3, action_dim=3, width=24, depth=1, heads=2, mlp_dim=8) | other
        model = predictor.ACPredictor(4, **sizes)
        return model, {k: v for k, v in model.state_dict().items() if not k.startswith("state_head")}

    (ours, _), (_, released), path = make(), make(), tmp_path / "ac.pt"
    expected = copy.deepcopy(ours.state_dict() | released)  # the state head, which the release lacks, stays as it is
    extrinsics = {f"extrinsics_encoder.{kind}": torch.zeros(24) for kind in ("weight", "bias")}
    state = {f"module.{name}": tensor for name, tensor in (released | extrinsics).items()}
    torch.save({"predictor": state, "encoder": {}, "epoch": 3, "opt": {"state": {0: torch.zeros(1)}}}, path)
    ours.load_released(path)
    for content, message in (
        (make(depth=2)[1], "12 unknown, e.g. predictor_blocks.1.attn.proj.bias"),
        (make(action_dim=6)[1], "1 of another shape, e.g. action_encoder.weight"),
        (5, "does not hold the weights of a ACPredictor"),
    ):
        torch.save({"predictor": content}, path)
        with refused(message):
            ours.load_released(path)
    assert equal_states(ours.state_dict(), expected)


KEPT = [dict(encoder="vae_map"), dict(encoder="vjepa_tiny", name="vjepa2_ac"), dict(encoder="state", name="rwm")]
KEPT += [dict(encoder="vjepa2-tiny", action_emb_dim=5), dict(encoder="patches", concat_dim=0, emb_dim=64, num_hist=2)]
KEPT += [dict(encoder="patches", variant="paper", decoder=dict(img_size=64, channel=8))]
WORLDS = None, {}, 5, {"env": "pointmaze"}, WORLD | {"img_size": "64"}, WORLD | {"img_size": 0}, WORLD | {"data": 5}
CONFIGS = [{"world": world} for world in WORLDS]
CONFIGS += [{"num_hist": n} for n in (None, 0, -3)]
CONFIGS += [{"frameskip": 0}, {"frameskip": "5"}, {"predictor": "vit"}, {"predictor": "lstm"}]
CONFIGS += [{"sizes": 5}, {"sizes": {"width": -3}}, {"sizes": {"tau": 5}}, {"decoder": {"beta": None}}, {"encoder": 5}]


@pytest.mark.parametrize("options", KEPT, ids=lambda options: "-".join(map(str, options)))
def test_a_checkpoint_comes_back_as_it_was(options, tmp_path):
    model = tiny_model(**options)
    model.save_pretrained(tmp_path)
    again = predictor.WorldModel.from_pretrained(tmp_path)
    assert again.config == model.config and again.world == WORLD and not again.training
    assert equal_states(again.state_dict(), model.state_dict()) and type(again.predictor) is type(model.predictor)
    assert (again.variant, again.proprio_dim, again.context) == (model.variant, model.proprio_dim, model.context)
    images = torch.rand(2, 4) if options["encoder"] == "state" else torch.rand(2, 3, 64, 64)
    assert torch.equal(again.encoder(images), model.encoder(images))


class Malicious:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_a_checkpoint_that_is_not_ours_is_refused_and_runs_nothing(tmp_path, monkeypatch, recwarn):
    monkeypatch.chdir(tmp_path)
    tiny_model("rwm", "state").save_pretrained(tmp_path)
    path, state, gru = Path("model.safetensors"), load_file("model.safetensors"), "predictor.gru.weight_ih_l0"
    whole, damaged = path.read_bytes(), "is damaged, or is not a safetensors file"
    np.save("array.npy", np.zeros(3))
    for content, message in (
        (whole[: len(whole) // 2], damaged),
        (Path("array.npy").read_bytes(), damaged),
        (pickle.dumps(Malicious(), protocol=2), damaged),
        (pickle.dumps(Malicious()), damaged),
        (save({}), "is not a model of this version .'action_mean'"),
        (save(state | {gru: state[gru] * math.nan}), f"damaged: {gru} holds numbers that are not finite"),
        (save(state | {gru: state[gru][:-1]}), "model.safetensors does not fit the model"),
    ):
        path.write_bytes(content)
        with refused(message):
            predictor.WorldModel.from_pretrained(tmp_path)
    path.write_bytes(whole)
    path, config = Path("config.json"), json.loads(Path("config.json").read_text())
    other = [({"sizes": {"width": 8}}, "model.safetensors does not fit the model"), ({"world": 5}, "of this version")]
    for edit, message in [*other, *((edit, "is not a model of this version") for edit in CONFIGS)]:
        path.write_text(json.dumps(config | edit))
        with refused(message):
            predictor.WorldModel.from_pretrained(tmp_path)
    path.write_text("[" * 100_000)
    with refused("config.json is damaged"):
        predictor.WorldModel.from_pretrained(tmp_path)
    assert not Path("pwned").exists() and not recwarn.list


def test_decoders_paint_frames_of_every_size_and_teach_only_themselves():
    small = dict(channel=8, n_res_block=1, n_res_channel=4)
    one, many = dict(depth=2), small | dict(quantize=True, n_embed=5)
    for N, img_size, pixels, sizes in ((1, 64, 81, one), (1, 20, 27, one), (4, 32, 32, small), (9, 40, 48, many)):
        decoder, side = decoders.build_decoder(N, 6, img_size=img_size, **sizes), math.isqrt(N)
        z = torch.randn(2, 3, N, 6)
        images, distance = decoder(z)
        assert images.shape == (2, 3, 3, img_size, img_size) and (distance > 0) == (sizes is many)
        raw = decoder.network(z[0, 0]) if N == 1 else decoder.dec(decoder.upsample_b(torch.zeros(1, 6, side, side)))
        assert raw.shape[-1] == pixels
    with refused("square grid of tokens, not 3"):
        decoders.build_decoder(3, 6, img_size=64)
    model = tiny_model(decoder=small | dict(img_size=32))
    visual, frames = tiny_batch(model)["visual"].requires_grad_(), torch.randint(256, (5, 7, 32, 32, 3)).float()
    loss, reconstruction, codes = model.decoder_loss(visual, frames)
    images = model.decoder(visual)[0]
    close(reconstruction, (images - (frames.movedim(-1, 2) / 127.5 - 1)).square().mean())
    assert loss == reconstruction and codes == 0
    assert model.decode(visual)[3, 2, 4, 5, 0] == round((images[3, 2, 0, 4, 5].item() + 1) * 127.5)
    loss.backward()
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None} == {"decoder"}
    assert visual.grad is None


def test_codes_are_the_nearest_and_follow_by_a_moving_average():
    codebook, x = decoders.Quantize(3, 4, decay=0.9), torch.randn(2, 5, 3)
    before = codebook.embed.clone()
    chosen = (x[..., None, :] - before.T).square().sum(-1).argmin(-1)  # (2, 5)
    codes, distance = codebook.eval()(x)
    close((codes, distance), (before.T[chosen], (codes - x).square().mean()))
    assert torch.equal(codebook.embed, before)
    codebook.train()(x)
    count = torch.tensor([(chosen == k).sum() for k in range(4)]) * 0.1
    total = torch.stack([x[chosen == k].sum(0) for k in range(4)], 1) * 0.1 + 0.9 * before
    close(codebook.embed, total / ((count + 1e-5) / (count.sum() + 4e-5) * count.sum()))
    codes, _ = codebook.eval()(x)
    with torch.autocast("cpu", torch.bfloat16):  # as training on a GPU
        assert torch.equal(codebook(x)[0], codes)
        codebook.train()(x.bfloat16())


# -- train.py -----------------------------------------------------------------------------------------------


TINY = "--epochs 2 --sizes depth=1,heads=2,mlp_dim=16"
AC = "--epochs 9 --steps 2 --predictor vjepa2_ac --sizes width=24,depth=1,heads=2,mlp_dim=16"
RUNS = {
    "plain": f"{TINY},dropout=0.1",
    "seeing": f"{TINY},dropout=0.1 --decoder",
    "vit": f"{TINY} --rollout-steps 3",
    "rwm": "--epochs 2 --predictor rwm --encoder state --rollout-steps 2 --sizes width=16",
    "ac": AC,
    "pointmaze_pca_paper": f"{TINY} --variant paper",
}


def write_short_gif(path, film, duration=50, write=pictures.write_gif):
    """A whole film takes seconds."""
    write(path, film[::25])


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    """A folder with all RUNS, in which nothing may be written."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(dataset.path, folder / "datasets" / "pointmaze")
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "write_gif", write_short_gif)
        for name, flags in RUNS.items():  # a user's error would fail the fixture
            train.train(train.get_args((flags if "paper" in name else f"{flags} --name {name}").split()))
    return folder


@pytest.fixture
def runs(workplace, trained, monkeypatch):
    """The folder runs/ of a workplace with a copy of the RUNS."""
    monkeypatch.setattr(pictures, "write_gif", write_short_gif)
    return Path(shutil.copytree(trained / "runs", workplace / "runs"))


@pytest.fixture
def run(script):
    """run(command) -> what the command prints; run(command, message): it is refused and has written nothing."""

    def run(command, message=None):
        before = contents(Path())
        code, out, err = script(*command.split())
        if message is None:
            assert code == 0, err
            return out
        assert_refused((code, out, err), message)
        assert "Warning" not in err and contents(Path()) == before

    return run


def test_a_training_writes_its_run_learns_and_is_not_done_twice(runs, run):
    assert {path.name for path in runs.iterdir()} == RUNS.keys()  # the paper's has the name that it gave itself
    written = {"args.json", "config.json", "model.safetensors", "log.csv", "curves.png"}
    assert {path.name for path in (runs / "plain").iterdir()} == written
    for name in RUNS:
        log = np.genfromtxt(runs / name / "log.csv", delimiter=",", names=True)
        columns = "epoch train val val_visual val_proprio copy" + " val_rollout" * (name in ("vit", "rwm", "ac"))
        assert {*columns.split()} <= {*log.dtype.names} and np.isfinite(log.tolist()).all()
        assert len(log) == 2 and log["train"][1] < log["train"][0]
    before = contents(runs)
    assert "plain is trained already" in run(f"train {RUNS['plain']} --name plain") and contents(runs) == before


def test_a_decoder_changes_nothing_and_shows_what_is_imagined(runs):
    """The transition model is bit for bit the one that is trained without."""
    plain, seeing = (load_file(runs / name / "model.safetensors") for name in ("plain", "seeing"))
    assert equal_states(plain, {name: seeing[name] for name in plain})
    log = np.genfromtxt(runs / "seeing" / "log.csv", delimiter=",", names=True)
    assert log["recon"][1] < log["recon"][0] and (log["recon_pred"] > 0).all() and np.isfinite(log["ssim"]).all()
    assert imageio.imread(runs / "seeing" / "imagined.png").shape == (4 * 3 * 66, 6 * 66, 3)
    assert imageio.imread(runs / "seeing" / "imagined.gif").shape[1:] == (4 * 64, 4 * 130, 3)


@pytest.mark.parametrize("clip", [1, 4])
def test_encoders_are_fitted_to_clips_of_single_episodes(dataset, monkeypatch, clip):
    monkeypatch.setattr(train, "FIT_FRAMES", 20)
    episodes, encoder = dataset.split()[0], mock.Mock(clip_frames=clip)
    found = train.frames_to_fit(encoder, dataset, episodes, np.random.default_rng(0))
    ends, frames = dataset.episode_ends, dataset.frames[:]
    for frame in found.reshape(20 // clip, clip, *frames.shape[1:]):
        (first,) = np.flatnonzero((frames == frame[0]).all((1, 2, 3)))
        (episode,) = set(np.searchsorted(ends, [first, first + clip - 1], side="right"))
        assert episode in episodes and np.array_equal(frame, frames[first : first + clip])
    monkeypatch.setattr(dataset, "frames", np.zeros_like(frames))
    with refused("all frames of .* are the same"):
        train.frames_to_fit(encoder, dataset, episodes, np.random.default_rng(0))


def test_training_starts_from_a_released_predictor(workplace, run):
    """One that fits is where training starts; one of a robot's seven numbers is refused before anything is written."""
    for file, numbers in (("fits.pt", (4, 10)), ("robot.pt", (7, 7))):
        state = predictor.ACPredictor(1, 3, 32, *numbers, width=24, depth=1, heads=2, mlp_dim=16).state_dict()
        torch.save({"predictor": {k: v for k, v in state.items() if not k.startswith("state_head")}}, file)
    run(f"train {AC} --predictor-weights robot.pt", "2 of another shape, e.g. action_encoder.weight")
    run(f"train {AC} --lr 1e-12 --predictor-weights fits.pt --name fits")
    after = load_file("runs/fits/model.safetensors")
    assert all(after[f"{name}_std"].eq(1).all() for name in ("action", "proprio"))  # it takes the world's own units
    for name, tensor in torch.load("fits.pt")["predictor"].items():
        close(after[f"predictor.{name}"], tensor)  # it has hardly moved


def test_a_model_is_written_after_its_log_and_looked_at_before_its_training_goes_on(
    workplace, run, script, monkeypatch
):
    monkeypatch.setattr(common, "write_csv", mock.Mock(side_effect=(None, KeyboardInterrupt)))
    assert script("train", *TINY.split(), "--name", "tiny")[0] == 130
    path, bias = "runs/tiny/model.unfinished.pt", "predictor.norm.bias"
    unfinished = torch.load(path)
    assert len(unfinished["log"]) == 1  # and not two
    nan = {"model": unfinished["model"] | {bias: unfinished["model"][bias] * math.nan}}
    for broken, message in (
        ({"optimizer": {}}, "model.unfinished.pt does not go on with this version: remove runs/tiny"),
        (nan, f"model.unfinished.pt is damaged: {bias} holds numbers that are not finite"),
    ):
        torch.save(unfinished | broken, path)
        run(f"train {TINY} --name tiny", message)


KILLS = """
import os, random, sys, time, train
train.pictures.write_log_plot = lambda path, *_, **__: train.common.write_atomic(path, bytes(10**7))  # a quicker one
def training(name, seconds=None):
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        train.train(train.get_args(sys.argv[1:] + ["--name", name]))
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, 9)
    return os.waitpid(child, 0)[1]
begin, moments = time.time(), random.Random(0)
assert training("whole") == 0
seconds = time.time() - begin
os.system("rm datasets/pointmaze/tokens_*.npy")
kills = 0
for _ in range(30):  # until it has been killed twice, and between two epochs
    kills += training("killed", moments.uniform(0, 0.7 * seconds)) == 9
    if kills > 1 and os.path.exists("runs/killed/model.unfinished.pt"):
        break
    if not os.path.exists("runs/killed/model.unfinished.pt"):
        os.system("rm -rf runs/killed")  # it came to its end, or not to its first epoch's
print(kills, "killed")
assert training("killed") == 0
"""


def test_a_training_that_is_killed_at_any_moment_resumes_bit_for_bit_and_leaves_nothing(workplace):
    environment = os.environ | {"PYTHONPATH": str(Path(train.__file__).parent), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-c", KILLS, *RUNS["plain"].split(), "--epochs", "8", "--batch-size", "8"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert int(re.search(r"(\d) killed", result.stdout)[1]) > 1 and "going on after epoch" in result.stdout
    whole, killed = (load_file(f"runs/{name}/model.safetensors") for name in ("whole", "killed"))
    assert equal_states(whole, killed)
    assert not list(Path().rglob(".*")) and len(list(Path("datasets/pointmaze").glob("tokens_*"))) == 1
    assert {path.name for path in Path("runs/killed").iterdir()} == {path.name for path in Path("runs/whole").iterdir()}


# -- plan.py ------------------------------------------------------------------------------------------------


SEARCH = "--num-samples 20 --topk 5 --opt-steps 2"
BUDGET = f"--n-evals 3 --max-iter 1 {SEARCH}"


def results(name):
    return json.loads(Path(f"plan_outputs/{name}/results.json").read_text())


def some_states(env, count):
    return np.array([env.sample_state(np.random.default_rng(i)) for i in range(count)])


def test_plan_reports_success_intervals_and_controls_and_repeats_itself(runs, run):
    os.utime(runs / "vit" / "model.safetensors")  # the newest run is the default
    budget = f"--n-evals 3 --seed 0 1 --max-iter 2 {SEARCH}"
    run(f"plan {budget} --controls random,oracle")
    first, films = results("vit"), [f"problem_{i}.gif" for i in range(plan.FILMS)]
    written = {path.name for path in Path("plan_outputs/vit").iterdir()}
    assert written == {"table.md", "results.json", "success.png", *films}
    assert first["args"]["ckpt"] == "runs/vit" and first["n_evals"] == 6 and first["imagination"] is None
    assert len(first["success_by_iter"]) == len(first["interval"]) == 2
    assert {name: len(rates) for name, rates in first["controls"].items()} == {"random": 2, "oracle": 2}
    run(f"plan {budget} --goal-source dset --name dset")
    run(f"plan {budget} --name repeat")
    one, two = ([Path(f"plan_outputs/{name}/{film}").read_bytes() for film in films] for name in ("vit", "repeat"))
    assert one == two and results("repeat")["success_by_iter"] == first["success_by_iter"]


@pytest.mark.parametrize("name", ["rwm", "ac", "seeing"])
def test_each_transition_plans_and_a_decoder_shows_what_it_imagines(runs, run, name):
    out = run(f"plan --ckpt runs/{name} {BUDGET} --planner-args momentum=0.15,maxnorm=1")
    assert results(name)["n_evals"] == 3 and ("imagined against real frames: PSNR" in out) == (name == "seeing")
    if name == "seeing":
        assert imageio.imread("plan_outputs/seeing/imagined_1.png").shape == (2 * 66, 6 * 66, 3)
        assert imageio.imread("plan_outputs/seeing/problem_0.gif").shape == (2, 4 * 64, 4 * (4 * 64 + 6), 3)


def test_the_papers_variant_trains_and_plans_with_its_defaults(runs, run):
    sizes = {"--variant paper --encoder dinov2": 224, "--encoder dinov2": None, "--variant paper": None}
    for flags, size in sizes.items():
        assert train.encoder_img_size(train.get_args(flags.split())) == size
    command = f"plan --ckpt runs/pointmaze_pca_paper --n-evals 2 {SEARCH} --goal-H 3"
    run(command)
    args = results("pointmaze_pca_paper")["args"]
    assert [args[name] for name in ("n_taken_actions", "history", "max_iter")] == [1, 3, 30]
    run(f"{command} --history 1 --n-taken-actions 2 --max-iter 1 --name other")


def test_every_planner_plans_and_all_stand_in_one_table(runs, run):
    planners = ["cem", "gd", "mpc-gd", "mpc-icem", "mppi"]
    flags = f"--ckpt runs/plain --n-evals 2 --max-iter 2 {SEARCH} --planner {','.join(planners)}"
    out = run(f"plan {flags} --controls random,oracle")
    table = Path("plan_outputs/plain/table.md").read_text()
    assert "| search per plan | plans × model steps | success [95 %] | random | oracle | seconds" in table
    assert table in out and table.count("\n") == 2 + 3 + 2 * 2  # a row for each plan, of which two planners make two
    assert "| `gd` | 2 gradient steps | 1 × 5 |" in table and "| `mpc-icem` | 2 × 20 candidates | 2 × 5 |" in table
    for planner in planners:
        result = results(f"plain/{planner}")
        assert len(result["success_by_iter"]) == (2 if planner.startswith("mpc-") else 1)
        assert len(result["controls"]["oracle"]) == len(result["success_by_iter"])


def test_gradient_descent_comes_closer_to_the_goal_in_imagination(runs):
    model, env = predictor.WorldModel.from_pretrained("runs/plain"), make_env("pointmaze")
    device, costs = torch.device("cpu"), {}
    for kind, steps in (("randn", 1), ("randn", 40), ("zero", 40)):
        flags = f"--planner gd --opt-steps {steps} --planner-args lr=30,sample_type={kind} --n-evals 4"
        args = plan.settle(plan.get_args(flags.split()), "gd", model)
        worlds = plan.Worlds(env, *random_problems(env, args), films=4)
        cost_for = plan.latent_cost(model, worlds, device)
        cost = cost_for(np.arange(4))
        success = plan.solve(worlds, cost_for, model, args, device)
        actions = np.stack([plans[0][1] for plans in worlds.plans])
        assert success.shape == (1, 4) and abs(actions).max() <= 1
        costs[kind, steps] = cost(torch.from_numpy(actions).view(4, 1, 5, 10)).mean().item()
    assert costs["randn", 40] < 0.9 * costs["randn", 1] and costs["zero", 40] < costs["randn", 1]


def test_the_true_simulator_reaches_its_goals_and_frames_are_encoded_once_a_plan(monkeypatch):
    model, env = tiny_model(encoder="pca"), make_env("pointmaze")
    args = plan.get_args("--n-evals 8 --max-iter 3 --opt-steps 4 --num-samples 150".split())
    args = plan.settle(args, "mpc-cem", model)
    worlds = plan.Worlds(env, *random_problems(env, args), films=1)
    first, film = worlds.past["visual"][0, -1].copy(), worlds.films[0]
    success = plan.solve(worlds, plan.simulator_cost(worlds), model, args, "cpu")[-1].numpy()
    assert success.mean() >= 0.75 and (env.goal_reached(worlds.states, worlds.goals) == success).all()
    assert (film[0] == first).all() and (film[-1] == worlds.past["visual"][0, -1]).all() and len(film) % 25 == 1
    encode, forward = mock.Mock(wraps=model.encode), mock.Mock(wraps=model.predictor.forward)
    monkeypatch.setattr(model, "encode", encode)
    monkeypatch.setattr(model.predictor, "forward", forward)
    args.max_iter = 1
    plan.solve(worlds, plan.latent_cost(model, worlds, torch.device("cpu")), model, args, "cpu")
    assert [len(call.args[0]["visual"]) for call in encode.mock_calls] == 2 * [8]  # goals, then once a plan
    assert [len(call.args[0]) for call in forward.mock_calls] == [8 * 150] * (4 * 5)  # all candidates in one call


def test_worlds_remember_frames_and_actions():
    env, two = make_env("pointmaze"), np.array([0, 2])
    states = some_states(env, 3)
    worlds, whole = (plan.Worlds(env, states, states, films, history=3, frameskip=5) for films in (0, 1))
    seen = [worlds.past["visual"][:, -1].copy()]
    assert (worlds.past["visual"] == seen[0][:, None]).all() and not worlds.taken.any()
    actions = np.random.default_rng(0).uniform(-1, 1, (3, 3, 10)).astype(np.float32)
    for t in range(3):
        worlds.act(two, actions[two, t : t + 1])
        seen.append(worlds.past["visual"][:, -1].copy())
        assert (worlds.past["visual"][two] == np.stack([seen[0], *seen][-3:], axis=1)[two]).all()
    assert (worlds.taken.reshape(3, 2, 10)[two] == actions[two, 1:]).all()
    assert not worlds.taken[1].any() and (worlds.past["visual"][1] == seen[0][1]).all()
    whole.act(two, actions[two])  # all at once: the same, and one plan
    assert all((whole.past[name] == worlds.past[name]).all() for name in whole.past)
    assert (whole.plans[0][0][1][-15:] == actions[0].reshape(-1, 2)).all() and len(whole.plans[0]) == 1


def test_a_plan_costs_what_the_equations_say_from_a_history_of_frames():
    model, env, device = tiny_model(encoder="pca"), make_env("pointmaze"), torch.device("cpu")
    states, actions = some_states(env, 4), torch.rand(2, 3, 4, 10)
    worlds = plan.Worlds(env, states[:2], states[2:], history=3, frameskip=5)
    worlds.act(np.arange(2), np.full((2, 1, 10), 0.3, np.float32))
    before = torch.tensor([0.0, 0.3])[:, None].expand(2, 10)
    goal = model.encode({k: torch.from_numpy(o[:, None]) for k, o in worlds.goal_obs.items()})
    known = model.encode({k: torch.from_numpy(o) for k, o in worlds.past.items()})
    for b, m in ((0, 2), (1, 0)):
        z = model.rollout({k: v[b : b + 1] for k, v in known.items()}, torch.cat([before, actions[b, m]])[None])
        error = {k: (z[k][0, 2:] - goal[k][b]).flatten(1).square().mean(1) for k in z}
        J, w = error["visual"] + 0.5 * error["proprio"], torch.tensor([1.0, 3, 9, 27, 81]) / 121
        for objective, expected in (("last", J[-1]), ("all", (w * J).mean())):
            cost = plan.latent_cost(model, worlds, device, objective, 0.5, 3.0)(np.arange(2))(actions)
            assert cost.shape == (2, 3)
            close(cost[b, m], expected)


@pytest.mark.parametrize("shift", ["noise", "distractor"])
def test_filming_changes_nothing_that_is_seen(shift):
    env, seen = make_env("pointmaze", shift=shift), []
    states = np.array([[-1, 1, 0, 0], [1, 1, 0, 0]], float)
    for films in (0, 2):
        worlds = plan.Worlds(env, states, states, films)
        worlds.act(np.arange(2), np.ones((2, 1, 10), np.float32))
        seen.append(worlds.past["visual"])
    assert np.array_equal(*seen) and not np.array_equal(*worlds.films[0][1:3])


def test_goals_out_of_a_file_are_those_saved(runs, run):
    command, env = f"plan --ckpt runs/plain {BUDGET}", make_env("pointmaze")
    for source in ("random_action", "random_state"):
        run(f"{command} --goal-source {source} --save-targets goals.json --name first")
        saved = read_problems("goals.json", env, "pointmaze")
        assert saved[0].shape == saved[1].shape == (3, 4)
    assert np.array_equal(saved, random_problems(env, plan.get_args(["--n-evals", "3"])))
    run(f"{command} --goal-source goals.json --name second")
    first, second = results("first"), results("second")
    assert first["success_by_iter"] == second["success_by_iter"] and second["n_evals"] == 3
    content = json.loads(Path("goals.json").read_text())
    edits = [{"goals": content["goals"][:2]}, {"starts": [[0, 0]], "goals": [[1, 1]]}, {"starts": [], "goals": []}]
    edits += [{"goals": None}, {"goals": [[math.nan] * 4] * 3}, {"starts": "x"}, {"starts": 5, "goals": 5}]
    broken = [(json.dumps(content | edit), "goals.json is not a whole file of --save-targets") for edit in edits]
    broken += [(text, "goals.json is damaged") for text in ("[1]", "[" * 100_000, "x")]
    broken += [('{"env": "pointmaze-large"}', "goals.json holds problems of pointmaze-large")]
    for text, message in broken:
        Path("goals.json").write_text(text)
        run(f"{command} --goal-source goals.json --name third", message)
    run(f"{command} --goal-source no.json", "no.json: no such file; known sources are random_state, dset and random_ac")


# -- what wrong input gets ----------------------------------------------------------------------------------


WRONG_FLAGS = """
train --sizes width=64                                  | --predictor vit has no size width; it has depth, heads, dim
train --sizes depth                                     | depth is not one of NAME=VALUE with channels, deter
train --predictor rwm --sizes heads=2                   | --predictor rwm has no size heads; it has width, depth, mlp
train --predictor vjepa2_ac --sizes dropout=0.1         | --predictor vjepa2_ac has no size dropout
train --sizes concat_dim=2                              | 2 is not a whole number of at least 0 and at most 1
train --lr=-1                                           | -1 is not a number above 0 and at most 1
train --predictor lstm                                  | invalid choice: 'lstm'
train --predictor-weights x.pt                          | --predictor-weights is for --predictor vjepa2_ac, not vit
train --variant paper --predictor rwm                   | --variant paper is DINO-WM's, for --predictor vit, not rwm
train --device nowhere                                  | torch cannot use the device 'nowhere' here
train --device meta                                     | torch cannot use the device 'meta' here
plan --topk 400                                         | --topk 400 must lie between 2 and --num-samples 100
plan --planner cem --num-samples 20                     | --topk 30 must lie between 2 and --num-samples 20
plan --planner gd,mpc-icem --num-samples 5              | --topk 10 must lie between 2 and --num-samples 5
plan --dtype float16                                    | invalid choice: 'float16'
plan --n-taken-actions 6                                | --n-taken-actions 6 is more than the 5 that --goal-H plans
plan --controls magic                                  | unknown magic; known: random, oracle
plan --planner cem,sgd                                  | unknown sgd; known: cem, icem, mppi, gd, mpc-cem
plan --planner-args sample_type=ones                    | unknown ones; known: randn, zero
plan --planner ,                                        | no name is given; known: cem, icem, mppi
plan --planner mppi --num-samples 1                     | mppi weighs candidates against each other
plan --topk 9 --num-samples 9 --planner-args keep=9     | keep=9 leaves no new candidate of --num-samples 9
"""


FLOATS = ["train --lr=", "train --sizes dropout="]
FLOATS += [f"plan --planner-args {k}=" for k, (default, *_) in plan.PLANNER_ARGS.items() if isinstance(default, float)]
COUNTS = "num-hist rollout-steps epochs steps batch-size frameskip img-size encoder-img-size"
COUNTS = [f"train --{k}=" for k in COUNTS.split()] + ["plan --planner-args keep="]
COUNTS += [f"train --sizes {k}=" for k in "depth heads dim_head mlp_dim num_proprio_repeat num_action_repeat".split()]
COUNTS += [f"train --predictor vjepa2_ac --sizes {k}=" for k in "width depth heads mlp_dim".split()]
COUNTS += [f"plan --{k}=" for k in "n-evals goal-H n-taken-actions history max-iter num-samples topk opt-steps".split()]
SEEDS = ["train --seed=", "plan --seed "]


def test_a_wrong_flag_is_named_before_anything_is_read():
    wrong = [re.split(" +[|] ", line) for line in WRONG_FLAGS.strip().splitlines()]
    wrong += [(flag + x, "is not a number") for flag in FLOATS for x in ("nan", "inf", "-inf", "1e200", "1" * 9, "x")]
    wrong += [(flag + x, "is not a whole number") for flag in COUNTS for x in ("0", "-1", "0.5", "1" * 10, "9" * 23)]
    wrong += [(flag + x, "is not a whole number") for flag in SEEDS for x in ("0.5", "2147483648", "9" * 23)]
    for command, message in wrong:
        script, *argv = command.split()
        with refused(re.escape(message)):
            sys.modules[script].get_args(argv)
            pytest.fail(f"{command} is taken")
    plan.get_args("--planner mppi,gd --num-samples 5".split())  # neither has elites


WRONG_INPUT = """
train --encoder nowhere                                   | unknown encoder 'nowhere'; known: pca
train --env nowhere                                       | unknown environment 'nowhere'
train --data missing                                      | no data set at missing
train --img-size 32 --data datasets/pointmaze             | datasets/pointmaze has --img-size 64, and not 32
train --env pointmaze-large --data datasets/pointmaze     | has --env pointmaze, and not pointmaze-large
train --num-hist 10000000                                 | episodes of datasets/pointmaze is as long as a window of 1
train --rollout-steps 4                                   | as a window of 7 model steps, 7 rows; the longest has 6
train --predictor rwm --encoder state                     | 11 rows; the longest has 6: collect longer ones
train --encoder vjepa_tiny                                | as a window of 8 model steps, 8 rows; the longest has 6
train --frameskip 7                                       | --frameskip 7 is not a multiple of the data set's own 5
train --encoder dinov2 --weights missing.pth              | no weights at missing.pth
train --encoder vae --encoder-img-size 128                | sees 64 px
train --predictor vjepa2_ac --sizes heads=5               | width=128 is not a multiple of twice heads=5
train --predictor vjepa2_ac --predictor-weights x.pt      | no file at x.pt
train --predictor rwm --encoder patches --rollout-steps 1 | takes one token a frame, not 16: try --encoder pca or state
train --sizes concat_dim=0 --variant paper                | wants proprio (0) and action (32) to be 32 wide
train --decoder vq                                        | a frame has one token: use --decoder plain
train --name ..                                           | --name .. is not a folder below runs/: choose another --name
train --name /tmp/abs                                     | --name /tmp/abs is not a folder below runs/
plan --ckpt missing                                       | no model at missing: train one
plan                                                      | no trained model under runs/
plan --ckpt datasets/pointmaze --name .                   | --name . is not a folder below plan_outputs/
"""


@pytest.mark.parametrize("line", WRONG_INPUT.strip().splitlines())
def test_what_wrong_input_gets(line, run, workplace):
    run(*re.split(" +[|] ", line))


@pytest.fixture
def little_memory():
    """Three gigabytes more than are used now: what asks for more fails at once, before it fills any."""
    used, limits = int(Path("/proc/self/statm").read_text().split()[0]) * 4096, resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 3 * 2**30, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


TOO_LARGE = ["train --sizes heads=100000,dim_head=100000", "plan --num-samples 10000000", "plan --history 10000000"]


@pytest.mark.parametrize("command", TOO_LARGE)
def test_sizes_beyond_the_memory_are_one_line(command, runs, run, little_memory):
    run(command, "there is not enough memory")


def test_a_world_or_data_set_that_does_not_fit_a_run_is_named(runs, run, monkeypatch):
    run("plan --ckpt runs/rwm --planner-args alpha=0.5", "alpha weighs proprio, which runs/rwm does not")
    for edit, message in (
        ({"env": "carracing"}, "carracing cannot be put into a start and a goal state, so no plan can be tried in it"),
        ({"env": 5}, "num_hist, frameskip or world is not"),
    ):
        tiny_model("rwm", "state", world=WORLD | edit).save_pretrained(runs / "other")
        run("plan --ckpt runs/other", message)
    meta = json.loads(Path("datasets/pointmaze/meta.json").read_text()) | {"env": "pointmaze-medium"}
    Path("datasets/pointmaze/meta.json").write_text(json.dumps(meta))
    message = "datasets/pointmaze has env pointmaze-medium, the checkpoint has pointmaze"
    run("plan --ckpt runs/plain --goal-source dset --data datasets/pointmaze", message)
    monkeypatch.setattr(plan, "PointMaze", mock.Mock)  # now the world is another one that can be put into a state
    for flag in ("--controls oracle", "--waypoints", "--goal-source random_action"):
        given = flag + " graph" * (flag == "--waypoints")
        run(f"plan --ckpt runs/plain {given}", f"{flag} is for the mazes, and not for pointmaze")


def test_a_run_is_gone_on_with_by_its_own_flags_alone(runs, run):
    plain, path = f"train {RUNS['plain']} --name plain", runs / "plain" / "args.json"
    run(f"{plain} --lr 0.01", "runs/plain was begun with other flags (--lr by default)")
    run(f"{plain.removesuffix('plain')}./plain --lr 0.01", "was begun with other flags")
    run(f"train {AC} --name plain", "--predictor vit, --rollout-steps 1, --sizes depth=")
    args = json.loads(path.read_text())
    for name, value in {"lr": 0.5, "seed": "0", "num_hist": -3, "sizes": 5, "tau": 5}.items():
        path.write_text(json.dumps(args | {name: value}))
        run(plain, f"was begun with other flags (--{name.replace('_', '-')} {value}")
    for text in ("{", "5", "[1]", "[" * 100_000, "\x00", "[[1, 2]]"):
        path.write_text(text)
        run(plain, "args.json is damaged: remove it")


def test_a_validation_loss_that_is_not_finite_stops_the_training(workplace, run, script):
    run(f"train {TINY} --name old")
    (path,), dataset = Path("datasets/pointmaze").glob("tokens_pca_*.npy"), data.Dataset("datasets/pointmaze")
    tokens = np.load(path)
    for value in (math.nan, math.inf):
        tokens[dataset.rows(dataset.split()[1])[0]] = value
        np.save(path, tokens)
        assert_refused(script("train", *TINY.split(), "--name", "new"), "not finite")
        assert not Path("runs/new/model.safetensors").exists()
