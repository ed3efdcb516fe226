"""Tests of lib/imports.py, of what can be done without an environment, and of the worlds as Gymnasium environments.

Run: python -m pytest -q lib/test_imports.py
"""

import json
import sys
from pathlib import Path

import gymnasium as gym
import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import data
import plan
import vae_mdnrnn as wm
from extras import horizon
from lib import pictures, worlds
from lib.imports import open_source
from lib.worlds import ENVIRONMENTS, can_be_set, make_env
from predictor import WorldModel
from test_all import assert_refused

TINY = "--steps 2 --batch-size 8 --sizes depth=1,heads=2,dim_head=4,mlp_dim=8"
RNG = np.random.default_rng(0)


@pytest.fixture
def run(script, tmp_path, monkeypatch):
    """run(command) -> what it prints. run(command, message): it is refused in one line, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))

    def files():
        return sorted(path for path in Path().rglob("*") if path.is_file())

    def run(command, message=None):
        before = files()
        code, out, err = script(*command.split())
        if message is None:
            assert code == 0, err
            return out
        assert_refused((code, out, err), message)
        assert files() == before

    return run


def film(T, height=48, width=64):
    """Frames (T, height, width, 3) in which every pixel says its time, row and column."""
    t, y, x = np.meshgrid(np.arange(T), np.arange(height), np.arange(width), indexing="ij")
    return np.stack([t, y, x], -1).astype(np.uint8)


# -- Minari -------------------------------------------------------------------------------------------------


def write_minari(name, episodes, **about):
    """Writes episodes (observations, actions, rewards) into Minari's local folder, with Minari's own writer."""
    minari = pytest.importorskip("minari")
    never = [np.zeros(len(actions), bool) for _, actions, _ in episodes]
    names = "observations", "actions", "rewards", "terminations", "truncations"
    parts = [zip(names, (*e, no, no), strict=True) for e, no in zip(episodes, never, strict=True)]
    buffers = [minari.data_collector.EpisodeBuffer(**dict(part)) for part in parts]
    credit = dict(algorithm_name="a", author="a", author_email="a", code_permalink="a", description="a")
    minari.create_dataset_from_buffers(name, buffers, **credit, **about)


@pytest.fixture
def robotics_maze():
    """Gymnasium-Robotics' maze, in which D4RL's data sets in Minari were recorded."""
    make_env("pointmaze").close()  # registers it
    return gym.make("PointMaze_UMaze-v3", continuing_task=True)


def wander(env, seed, T):
    """An episode of T random actions as Minari keeps it: the observations, the actions and the rewards."""
    rng, seen, rewards = np.random.default_rng(seed), [env.reset(seed=seed)[0]], []
    actions = rng.uniform(-1, 1, (T, 2)).astype(np.float32)
    for action in actions:
        obs, reward, *_ = env.step(action)
        seen.append(obs)
        rewards.append(reward)
    return {name: np.stack([obs[name] for obs in seen]) for name in seen[0]}, actions, np.array(rewards)


@pytest.mark.filterwarnings("ignore")
def test_a_maze_of_minari_is_imported_trained_on_and_planned_with(run, robotics_maze, monkeypatch):
    """Five of its actions are one of ours, its coordinates are ours, and our world says what comes next."""
    episodes, short = [wander(robotics_maze, seed, 188) for seed in range(5)], wander(robotics_maze, 5, 4)
    run("data --from D4RL/pointmaze/umaze-v2", "there is no D4RL/pointmaze/umaze-v2, neither here nor in")
    write_minari("D4RL/pointmaze/umaze-v2", [short, *episodes], env=robotics_maze)  # one is over at once
    run("data --from D4RL/pointmaze/umaze-v2 --img-size 32")
    imported, env = data.Dataset("datasets/umaze-v2_32"), make_env("pointmaze", 32)
    assert imported.meta["env"] == "pointmaze" and len(imported) == 5 and len(imported.frames) == 5 * 8
    for (seen, actions, rewards), end in zip(episodes, imported.episode_ends, strict=True):
        rows = slice(end - 8, end)
        np.testing.assert_array_equal(imported.states[rows], seen["observation"][:188:25].astype(np.float32))
        means = actions[:185].reshape(37, 5, 2).mean(1)
        np.testing.assert_allclose(imported.actions[rows].reshape(-1, 2), means[np.arange(40).clip(max=36)], atol=1e-6)
        np.testing.assert_allclose(imported.rewards[rows].sum(), rewards[:185].sum(), rtol=1e-5)
        starts, taken = imported.states[rows][:-1].astype(float), imported.actions[rows][:-1].reshape(7, 5, 2)
        distance = np.linalg.norm(env.simulate(starts, taken)[:, :2] - imported.states[rows][1:, :2], axis=1)
        assert distance.max() < 0.05  # metres; the mean of five actions is not quite the five
    env.set_state(imported.states[3])
    assert np.array_equal(imported.frames[3], env.render())
    assert "plan with it" in run(f"train --data datasets/umaze-v2_32 --name maze {TINY}")
    monkeypatch.setattr(pictures, "write_gif", lambda *_, **__: None)
    out = run("plan --ckpt runs/maze --n-evals 2 --goal-H 2 --max-iter 1 --num-samples 8 --topk 2 --opt-steps 1")
    assert "| `mpc-icem` |" in out


@pytest.mark.filterwarnings("ignore")
def test_minari_is_imported_with_images_and_without_an_environment(run):
    spaces = {"camera": gym.spaces.Box(0, 255, (48, 64, 3), np.uint8), "where": gym.spaces.Box(-9, 9, (3,), np.float32)}
    spaces |= {"desired_goal": gym.spaces.Box(-9, 9, (2,), np.float32)}
    where = RNG.normal(size=(7, 3)).astype(np.float32)
    seen = {"camera": film(7), "where": where, "desired_goal": np.zeros((7, 2), np.float32)}
    action, actions = gym.spaces.Box(-1, 1, (4,), np.float32), RNG.uniform(-1, 1, (6, 4)).astype(np.float32)
    about = dict(observation_space=gym.spaces.Dict(spaces), action_space=action, jpeg_encoding=False)
    write_minari("my/arm-v0", [(seen, actions, np.arange(6.0))], **about)
    for path in ("my/arm-v0", "minari/my/arm-v0", "minari/my/arm-v0/data"):  # an id, and folders
        episodes, total, meta = open_source(path, img_size=48, frameskip=2)
        (rows,) = episodes
        assert total == 1 and meta["env"] == "arm-v0"
        np.testing.assert_array_equal(rows["frames"], film(7)[:6:2, :, 8:56])
        np.testing.assert_array_equal(rows["states"], where[:6:2])
        np.testing.assert_array_equal(rows["actions"], actions.reshape(3, 8))
        assert rows["rewards"].tolist() == [1, 5, 9] and not rows["dones"].any()


# -- stable-worldmodel's HDF5 -------------------------------------------------------------------------------


def write_hdf5(path, episodes):
    """A file of stable-worldmodel, whose episodes are {column: rows}."""
    lengths = [len(episode["pixels"]) for episode in episodes]
    with pytest.importorskip("h5py").File(path, "w") as file:
        for name in episodes[0]:
            rows = np.concatenate([episode[name] for episode in episodes])
            file.create_dataset(name, data=rows, maxshape=(None, *rows.shape[1:]), chunks=(1, *rows.shape[1:]))
        file["ep_len"], file["ep_offset"] = np.array(lengths, np.int32), np.cumsum([0, *lengths[:-1]])


def recorded(T, height=48, width=64):
    """An episode of T actions as its World.collect writes it: in the first row nothing is earned yet, and in the last
    no action is taken."""
    actions, none = RNG.normal(size=(T, 2)), np.full((1, 2), np.nan)
    earned, ended = np.concatenate([[np.nan], np.arange(T)]), np.arange(T + 1) == T
    columns = dict(pixels=film(T + 1, height, width), action=np.concatenate([actions, none]).astype(np.float32))
    columns |= dict(proprio=RNG.normal(size=(T + 1, 3)), state=np.zeros((T + 1, 9)), reward=earned, terminated=ended)
    return columns | dict(step_idx=np.arange(T + 1), episode_idx=np.zeros(T + 1, int))


def test_hdf5_of_stable_worldmodel_is_imported_row_by_row(run):
    episodes = [recorded(7), recorded(4)]
    write_hdf5("push.h5", episodes)
    assert run("data --from push.h5 --frameskip 2 --img-size 24 --out d").endswith("2 episodes, 6 frames in d\n")
    imported, (first, second) = data.Dataset("d"), episodes
    assert imported.episode_ends.tolist() == [4, 6] and imported.meta["env"] == "push"
    np.testing.assert_allclose(imported.states[:4], first["proprio"][:8:2], rtol=1e-6)
    np.testing.assert_array_equal(imported.actions[4:], second["action"][:4].reshape(2, 4))
    np.testing.assert_array_equal(imported.actions[3], np.tile(first["action"][6], 2))  # the last one fills the row
    assert imported.rewards.tolist() == [0 + 1, 2 + 3, 4 + 5, 6, 0 + 1, 2 + 3]
    assert imported.dones.tolist() == [False, False, False, True, False, True]
    t, y, x = np.moveaxis(imported.frames[2].astype(int), -1, 0)  # the middle 48 of 64 columns, halved
    assert (t == 4).all() and set(y[:, 0] - 2 * np.arange(24)) <= {0, 1} and set(x[0] - 2 * np.arange(24)) <= {8, 9}


def test_a_world_that_nobody_can_plan_in_is_trained_on_measured_and_filmed(run):
    write_hdf5("push.h5", [recorded(14, 64, 64) for _ in range(5)])
    run("data --from push.h5 --frameskip 1")
    for name, flags in {"seen": "--decoder", "felt": "--encoder state"}.items():
        out = run(f"train --data datasets/push --frameskip 2 --name {name} {TINY} {flags}")
        assert f"see how far it imagines: python -m extras.horizon --ckpt runs/{name}" in out
    assert imageio.imread("runs/seen/imagined.gif").ndim == 4
    run("plan --ckpt runs/seen", "push cannot be put into a start and a goal state, so no plan can be tried in it")
    out = run("extras.horizon --ckpt runs/seen runs/felt --steps 4 --n-evals 6 --name error")
    assert out.count("  copy") == 2 and "simulator" not in out and Path("plan_outputs/error/horizon_error.png").exists()
    curves = json.loads(Path("plan_outputs/error/horizon_error.json").read_text())["curves"]
    assert all(curve.keys() == {"model", "copy"} and len(curve["copy"]) == 4 for curve in curves.values())
    copy = curves["runs/seen"]["copy"]
    assert copy == sorted(copy)  # the film becomes ever less like its beginning
    run("extras.horizon --ckpt runs/seen --steps 7", "have 7 model steps at most, and --steps 7 wants 8: give fewer")
    run("extras.horizon --ckpt runs/seen --shift light", "push has no other appearance: --shift is for the mazes")


def test_the_horizon_error_of_recorded_truth_is_zero(run, monkeypatch):
    """A model that reads the true states out of the data is always right, if actions and frames fit each other."""
    write_hdf5("push.h5", [recorded(14) | {"proprio": RNG.normal(size=(15, 3)).cumsum(0)} for _ in range(5)])
    run("data --from push.h5 --frameskip 1")
    dataset = data.Dataset("datasets/push")
    run(f"train --data datasets/push --frameskip 2 --encoder state --name truth {TINY}")
    model = WorldModel.from_pretrained("runs/truth")

    def look_up(z0, actions):
        pairs = dataset.actions.reshape(-1, 1, 2), actions[:, :, :2].numpy().reshape(1, -1, 2)
        row = np.abs(pairs[0] - pairs[1]).sum(-1).argmin(0).reshape(actions.shape[:2])
        after = np.concatenate([row, row[:, -1:] + 2], 1)
        proprio = (torch.from_numpy(dataset.states[after]) - model.proprio_mean) / model.proprio_std
        return {"visual": proprio[:, :, None]}

    monkeypatch.setattr(model, "rollout", look_up)
    curves = horizon.horizon_error(dataset, {"truth": model}, 3, 6, [99], torch.device("cpu"))["truth"]
    assert max(curves["model"]) < 1e-9 < 0.01 < min(curves["copy"])


# -- a folder of .npz ---------------------------------------------------------------------------------------


def write_npz(folder, *episodes):
    Path(folder).mkdir()
    for i, episode in enumerate(episodes):
        np.savez(Path(folder, f"episode_{i}.npz"), **episode)


def episode(T=8, **parts):
    return dict(frames=film(T, 64, 64), actions=np.zeros((T, 2), np.float32)) | parts


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_folder_of_npz_without_states_trains_every_transition(run):
    write_npz("mine", *[episode(actions=RNG.normal(size=(8, 2))) for _ in range(5)])
    run("data --from mine --frameskip 1")
    assert data.Dataset("datasets/mine").states.shape == (40, 0)
    assert "states   (40, 0)" in run("data --inspect datasets/mine")
    flags = "--data datasets/mine --frameskip 1 --rollout-steps 2 --steps 2 --batch-size 8"
    for kind in ("vit", "rwm", "vjepa2_ac"):
        run(f"train {flags} --predictor {kind} --name {kind}")
    run(f"train {flags} --encoder state", "--encoder state has nothing to see: datasets/mine has no states")
    run("train --data datasets/mine --frameskip 1 --num-hist 9", "the longest has 8: collect longer ones")


def test_without_frames_our_world_draws_them(run):
    states = np.array([make_env("pointmaze").sample_state(RNG) for _ in range(6)])
    without = dict(actions=np.zeros((6, 2)), states=states)
    write_npz("mine", without)
    run("data --from mine --env pointmaze-medium --frameskip 3")
    env = make_env("pointmaze-medium")
    env.set_state(states[3])
    assert np.array_equal(data.Dataset("datasets/mine").frames[1], env.render())


NAN = np.where(np.arange(16).reshape(8, 2) == 5, np.nan, 0.0)
WRONG = [
    ("there are no actions, only frames", "", dict(frames=film(8))),
    ("actions are float64 (8,), and not numbers (T, A) with T = 8", "", episode(actions=np.zeros(8))),
    ("actions are float64 (0, 2), and not numbers", "", episode(actions=np.zeros((0, 2)))),
    ("actions are <U1 (8, 2), and not", "", episode(actions=np.full((8, 2), "a"))),
    ("actions are not finite", "", episode(actions=NAN)),
    ("states are not finite", "", episode(states=NAN)),
    ("states are float64 (5, 2), and not numbers (T, P) with T = 8", "", episode(states=NAN[:5])),
    ("frames are float64 (8, 64, 64, 3), and not uint8", "", episode(frames=np.zeros((8, 64, 64, 3)))),
    ("frames are uint8 (8, 64, 64, 1), and not uint8 (T, H, W, 3)", "", episode(frames=film(8, 64, 64)[..., :1])),
    ("frames are uint8 (10, 48, 64, 3), and not", "", episode(frames=film(10))),
    ("is damaged, or not what it should be: ValueError('Object arrays", "", episode(states=np.array([{}]))),
    ("mine has no frames, and mine cannot draw them from the states: give --env", "", dict(actions=np.ones((8, 2)))),
    ("has 2 numbers in an action and 0 in a state, pointmaze has 2 numbers in an ac", "--env pointmaze", episode()),
]


@pytest.mark.parametrize("message, flags, wrong", WRONG)
def test_an_episode_that_is_not_what_it_should_be_is_refused(message, flags, wrong, run):
    write_npz("mine", wrong)
    run(f"data --from mine {flags}", message)


def test_what_else_is_refused(run, monkeypatch):
    write_npz("mine", episode(), episode(), episode(actions=np.zeros((8, 3))))
    first = "the first episode has 2 numbers in an action and 0 in a state"
    run("data --from mine", f"episode 2 of mine has 3 numbers in an action and 0 in a state, {first}")
    Path("mine/episode_1.npz").write_bytes(b"PK\x03\x04 and nothing more")
    run("data --from mine", "mine/episode_1.npz is damaged, or not what it should be")
    known = "a Minari id or folder, an .h5 file of stable-worldmodel, or a folder of episode_*.npz"
    Path("film.mp4").write_bytes(b"film")
    run("data --from film.mp4", f"film.mp4 has no format that is known here: {known}")
    run("data --from x-v0", f"there is no x-v0, neither here nor in {Path('minari').resolve()}: --from takes {known}")
    h5py = pytest.importorskip("h5py")
    Path("cut.h5").write_bytes(b"\x89HDF")
    run("data --from cut.h5", "cut.h5 is damaged, or not what it should be: OSError")
    write_hdf5("push.h5", [recorded(5)])
    with h5py.File("other.h5", "w") as file:
        file["ep_offset"] = np.zeros(0, int)
    run("data --from other.h5", "other.h5 is damaged, or not what it should be: KeyError")
    with h5py.File("other.h5", "a") as file:
        file["ep_len"] = np.zeros(0, int)
    run("data --from other.h5", "other.h5 holds no episode")
    Path("datasets/push").mkdir(parents=True)
    run("data --from push.h5", "datasets/push is there: remove it, or choose another folder")
    monkeypatch.setitem(sys.modules, "h5py", None)
    run("data --from push.h5", "push.h5 needs h5py: pip install -r extras/requirements.txt")
    Path("minari/x-v0/data").mkdir(parents=True)
    Path("minari/x-v0/data/metadata.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "minari", None)
    run("data --from x-v0", "minari/x-v0/data needs minari: pip install -r extras/requirements.txt")


# -- the worlds, as Gymnasium has them ----------------------------------------------------------------------

UNBOUNDED = r"ignore:.*A Box observation space (minimum|maximum) value"  # a speed has no bounds
NO_SPEC = r"ignore:.*Not able to test alternative render modes"  # they are made without Gymnasium's registry


@pytest.mark.filterwarnings("error", UNBOUNDED, NO_SPEC, "ignore:builtin type")
@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_every_world_is_a_gymnasium_environment(name):
    if name == "carracing":
        pytest.importorskip("envpool")
    env = make_env(name)
    check_env(env)
    assert can_be_set(name) == hasattr(env, "set_state")
    env.close()


@pytest.mark.filterwarnings("error", UNBOUNDED, NO_SPEC)
def test_the_dream_is_a_gymnasium_environment():
    rnn = wm.MDNRNN(4, 1, 8, heads="done,reward", restart=True).eval().requires_grad_(False)
    dream = wm.Dream(rnn, (torch.randn(6, 4), torch.zeros(6, 4)), max_steps=20)
    env = worlds.DreamEnv(dream, wm.VAE(4))
    check_env(env)
    assert env.render().shape == (64, 64, 3) and env.render().dtype == np.uint8


def test_a_world_of_ones_own_begins_in_a_random_state_and_shows_as_much_of_it_as_it_says():
    class Ramp(worlds.Screen):
        ROWS, screen = 8, np.zeros((8, 8, 3), np.uint8)

        def set_state(self, state):
            self.state = state

        def sample_state(self, rng):
            return rng.normal(size=3)

    ramp = Ramp(8, [-1], [1], proprio_dim=2)
    seen = [ramp.reset(seed=seed)[0]["proprio"] for seed in (1, 2, 1)]
    assert seen[0].tolist() == seen[2].tolist() == np.float32(ramp.state[:2]).tolist() != seen[1].tolist()
    planned = plan.Worlds(ramp, np.ones((2, 3)), np.zeros((2, 3)))  # a world model sees all of it, as in training
    assert planned.past["proprio"].tolist() == np.ones((2, 1, 3)).tolist()
