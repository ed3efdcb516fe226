"""Trajectories from elsewhere, as a data set of data.py: `python data.py --from PATH`. These formats are known:

    Minari      an id in Minari's local folder, such as D4RL/pointmaze/umaze-v2, or a data set's own folder. The frames
                are the first image of the observation, and the states are its vectors of numbers without the goals.
    HDF5        a file of stable-worldmodel (github.com/galilai-group/stable-worldmodel): `pixels` (S, H, W, 3) and
                `action` (S, A) hold all episodes, of which the i-th has `ep_len`[i] rows from `ep_offset`[i] on. The
                states are `proprio`, or else `state`. If there are `reward` and `terminated`, they are read, too.
    npz         a folder of files episode_*.npz with `frames` (T, H, W, 3) and `actions` (T, A). There may also be
                `states` (T, P), `rewards` (T,) and `dones` (T,).

An episode is T actions of A numbers each, with T frames and states, or T + 1 if it has what the last action led to (in
a data set there is no such row). A frame is uint8 and has three colours. If it is not square, its middle is taken; then
it is resized. Without frames, a world of ours draws them from the states. Without states, P is 0.

The mazes of D4RL in Minari are those of Gymnasium-Robotics, which `pointmaze` and its relatives are built from, with
the same coordinates (x, y, vx, vy). But an action there lasts for 0.01 s, and here for 0.05 s. Deviation: the mean of
five actions becomes one, since their order hardly matters: averaging shifts the ball by a median of 4 mm, and the
next step starts where the data have it.
"""

import contextlib
import os
import re
from pathlib import Path

import numpy as np
from PIL import Image

from lib.common import UserError
from lib.pointmaze import PointMaze
from lib.worlds import ENVIRONMENTS, can_be_set, make_env

KNOWN = "a Minari id or folder, an .h5 file of stable-worldmodel, or a folder of episode_*.npz"
MAZES = {"UMaze": "pointmaze", "Medium": "pointmaze-medium", "Large": "pointmaze-large"}  # Gymnasium-Robotics' to ours


def open_source(path, env=None, img_size=64, frameskip=5):
    """The episodes at `path`, as `data.write_dataset` takes them: a generator, their number, and what meta.json says.
    `env` is the world that they are from (default: what the data say). UserError if the format is not known."""
    folder, root = Path(path), Path(os.environ.get("MINARI_DATASETS_PATH", Path.home() / ".minari" / "datasets"))
    minari = [f for f in (folder, folder / "data", root / path / "data") if (f / "metadata.json").is_file()]
    if files := sorted(folder.glob("episode_*.npz")):
        name, total, episodes = folder.resolve().name, len(files), read_npz(files)
    elif folder.suffix in (".h5", ".hdf5") and folder.is_file():
        name, total, episodes = folder.stem, *read_hdf5(folder)
    elif minari:
        name, total, episodes = read_minari(minari[0])
    elif folder.exists():
        raise UserError(f"{path} has no format that is known here: {KNOWN}")
    else:
        raise UserError(f"there is no {path}, neither here nor in {root}: --from takes {KNOWN}")
    if not total:
        raise UserError(f"{path} holds no episode")
    meta = dict(env=env or name, source=str(path), img_size=img_size, frameskip=frameskip)
    return convert(path, episodes, meta["env"], img_size, frameskip), total, meta


# ---- The three readers: each yields {"frames", "states", "actions", "rewards", "dones"} of an episode ------


@contextlib.contextmanager
def reading(path):
    """Makes whatever fails in this block a UserError: a missing package, or a damaged file."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(f"{path} needs {error.name}: pip install -r extras/requirements.txt") from None
    except Exception as error:  # a damaged file can fail in any way
        raise UserError(f"{path} is damaged, or not what it should be: {error!r:.150}") from None


def read_npz(files):
    for file in files:
        with reading(file), np.load(file) as content:
            yield dict(content)


def read_hdf5(path):
    """The number of episodes in a file of stable-worldmodel, and their generator. There an action stands in the row of
    the frame that it was taken at, and its reward in the next row. The last frame of an episode has a NaN as action."""

    def episodes():
        with reading(path), h5py.File(path) as file:
            theirs = dict(frames="pixels", states="proprio" if "proprio" in file else "state", actions="action")
            theirs |= dict(rewards="reward", dones="terminated")
            for start, length in zip(offsets, lengths, strict=True):
                episode = {ours: file[name][start : start + length] for ours, name in theirs.items() if name in file}
                if "actions" in episode and np.isnan(episode["actions"][-1:]).all():
                    episode["actions"] = episode["actions"][:-1]
                    episode |= {name: episode[name][1:] for name in ("rewards", "dones") if name in episode}
                yield episode

    with reading(path):
        import h5py
        import hdf5plugin  # noqa: F401  (lets h5py read what is compressed with Blosc or Zstd)

        with h5py.File(path) as file:
            lengths, offsets = file["ep_len"][:], file["ep_offset"][:]
    return len(lengths), episodes()


def read_minari(path):
    """The name of the world, the number of episodes in a Minari data set, and their generator."""

    def episodes():
        with reading(path):
            for episode in dataset.iterate_episodes():
                seen = episode.observations if isinstance(episode.observations, dict) else {"": episode.observations}
                images = [x for x in seen.values() if x.ndim == 4]
                vectors = [x for name, x in seen.items() if x.ndim == 2 and not name.endswith("_goal")]
                parts = {"frames": images[0]} if images else {}
                parts |= {"states": np.concatenate(vectors, 1)} if vectors else {}
                parts |= dict(actions=episode.actions, rewards=episode.rewards, dones=episode.terminations)
                if not maze or len(episode) >= steps:  # an episode may be shorter than a step of ours
                    yield slower(parts, steps) if maze else parts

    with reading(path):
        import minari

        dataset = minari.MinariDataset(path)
        spec = dataset.env_spec.id if dataset.env_spec else dataset.id.split("/")[-1]
        maze, steps = re.match("PointMaze_(UMaze|Medium|Large)", spec), PointMaze.PHYSICS_STEPS
    return MAZES[maze[1]] if maze else spec.replace("/", "-"), dataset.total_episodes, episodes()


def slower(episode, n):
    """The same episode with one action in place of n: their mean. What is left over at its end is dropped."""
    T = len(episode["actions"]) // n
    how = {"actions": np.mean, "rewards": np.sum, "dones": np.any}
    parts = {name: f(episode[name][: T * n].reshape(T, n, *episode[name].shape[1:]), axis=1) for name, f in how.items()}
    return parts | {name: episode[name][::n][: T + 1] for name in ("frames", "states") if name in episode}


# ---- From an episode to the rows of a data set -------------------------------------------------------------

SHAPES = {  # of an episode with T actions: number of dimensions, kinds of numbers, how much longer it may be
    "actions": (2, "fiu", 0, "numbers (T, A)"),
    "frames": (4, "u", 1, "uint8 (T, H, W, 3)"),
    "states": (2, "fiu", 1, "numbers (T, P)"),
    "rewards": (1, "fiu", 0, "numbers (T,)"),
    "dones": (1, "bfiu", 0, "truth values (T,)"),
}


def convert(path, episodes, env, img_size, frameskip):
    """Yields the rows of each episode, as `data.write_dataset` takes them. UserError if it is not what it should be."""
    world = make_env(env, img_size) if can_be_set(env) else None
    widths = world and (world.action_space.shape[0], world.observation_space["proprio"].shape[0])
    for number, episode in enumerate(episodes):
        if problem := find_problem(episode):
            raise UserError(f"episode {number} of {path}: {problem}")
        actions, T, drawn = episode["actions"], len(episode["actions"]), "frames" not in episode
        states = episode.get("states", np.zeros((T, 0)))
        found = actions.shape[1], states.shape[1]
        widths = widths or found
        if found != widths:
            what, who = "{} numbers in an action and {} in a state", env if world else "the first episode"
            raise UserError(f"episode {number} of {path} has {what.format(*found)}, {who} has {what.format(*widths)}")
        if drawn and not world:
            drawing = ", ".join(filter(can_be_set, ENVIRONMENTS))
            raise UserError(f"{path} has no frames, and {env} cannot draw them from the states: give --env, {drawing}")
        rows = np.arange(0, T, frameskip)
        every, states = np.arange(len(rows) * frameskip).clip(max=T - 1), states[rows]  # the last action fills its row
        frames = [draw(world, state) for state in states] if drawn else to_square(episode["frames"][rows], img_size)
        yield dict(
            frames=np.stack(frames),
            states=states.astype(np.float32),
            actions=actions[every].reshape(len(rows), -1).astype(np.float32),
            rewards=np.add.reduceat(episode.get("rewards", np.zeros(T)), rows).astype(np.float32),
            dones=np.logical_or.reduceat(episode.get("dones", np.zeros(T)), rows),
        )


def find_problem(episode):
    """What is wrong with an episode that a reader yields, or None."""
    if "actions" not in episode:
        return f"there are no actions, only {', '.join(episode) or 'nothing'}"
    for name, (ndim, kinds, longer, what) in SHAPES.items():
        if name in episode:
            array, T = episode[name], len(np.atleast_1d(episode["actions"]))
            wrong = array.ndim != ndim or array.dtype.kind not in kinds or not T <= len(array) <= T + longer
            if wrong or not array.size or name == "frames" and (array.dtype != np.uint8 or array.shape[3] != 3):
                return f"{name} are {array.dtype} {array.shape}, and not {what} with T = {T}"
            if array.dtype.kind == "f" and not (np.abs(array) < 1e9).all():  # a NaN fails the comparison, too
                return f"{name} are not finite numbers"


def draw(world, state):
    """The frame (H, W, 3) that is seen in a state (P,)."""
    world.set_state(state)
    return world.render()


def to_square(frames, img_size):
    """The middle squares of frames (n, H, W, 3), `img_size` pixels a side. A pixel is the mean of what it covers."""
    H, W = frames.shape[1:3]
    side = min(H, W)
    top, left = (H - side) // 2, (W - side) // 2
    images = (Image.fromarray(f[top : top + side, left : left + side]) for f in frames)
    return [np.asarray(image.resize((img_size, img_size), Image.Resampling.BOX)) for image in images]
