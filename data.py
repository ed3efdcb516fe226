"""Trajectories: collected by a random policy, kept on disk, and read back in windows.

A data set is a folder of flat arrays with one row per *model step*, which is `frameskip` environment steps:

    frames   (S, H, W, 3) uint8     the observation at this row
    states   (S, P) float32         the true state at the row, which a world model sees as proprioception; P may be 0
    actions  (S, frameskip*DoF)     the environment actions taken from this row on, concatenated
    rewards  (S,), dones (S,)       what they earned, and whether they ended the episode (a time limit does not)
    episode_ends (E,)               the row after the last one of each episode
    meta.json                       environment, image size, frameskip, version; seed and policy, or the source

Frames between two rows are never rendered: with `frameskip=5` that makes collection five times as fast. The worlds
themselves are in lib/pointmaze.py and lib/worlds.py.

    python data.py --env pointmaze --episodes 2000        # collect into datasets/pointmaze
    python data.py --from PATH                            # import your own: lib/imports.py says what is known
    python data.py --inspect datasets/pointmaze           # shapes, statistics, contact_sheet.png
"""

import contextlib
import hashlib
import os
from pathlib import Path

import numpy as np
import torch

from lib import common, processes
from lib.common import RANK, WORLD_SIZE, NpyWriter, Parser, UserError, positive, to_tensor, tqdm
from lib.imports import KNOWN, open_source
from lib.pictures import write_strips
from lib.worlds import ENVIRONMENTS, EpisodePool

VERSION = 2  # of the format, and of how the mazes are drawn
EPISODES, STEPS = 2000, 20  # episodes of a data set and rows of an episode, where no flag says otherwise


def default_folder(env, img_size):
    return Path("datasets") / (env if img_size == 64 else f"{env}_{img_size}")


def collect(out, env, episodes, steps, frameskip, img_size, seed=0, workers=None):
    """Collects `episodes` random-policy episodes of at most `steps` rows into the folder `out`, in `workers` processes.

    Episode i depends on (seed, i) only, not on the number of workers.
    """
    jobs = [dict(who="uniform", seed=[seed, i], steps=steps, frameskip=frameskip) for i in range(episodes)]
    meta = dict(env=env, seed=seed, policy="uniform", img_size=img_size, frameskip=frameskip)
    with EpisodePool(workers or os.cpu_count(), env, img_size) as pool:
        return write_dataset(out, pool.map(jobs), episodes, meta)


def write_dataset(out, episodes, total, meta):
    """Writes episodes, dictionaries of arrays with one row per model step, into the folder `out` as they come.

    The folder gets its name when it is whole: a killed run or a full disk leaves no half data set.
    """
    out = Path(out)
    if out.exists():
        raise UserError(f"{out} is there: remove it, or choose another folder")
    with common.whole(out, folder=True) as temporary:
        writers, ends = {}, []
        for episode in tqdm(episodes, total=total, desc=f"write {out}", unit="episode"):
            for name, rows in episode.items():
                if name not in writers:
                    writers[name] = NpyWriter(temporary / f"{name}.npy", rows.shape[1:], rows.dtype)
                writers[name].append(rows)
            ends.append(writers["frames"].rows)
        if not ends:
            raise UserError(f"there is no episode to write into {out}")
        for writer in writers.values():
            writer.close()
        np.save(temporary / "episode_ends.npy", np.array(ends))
        common.write_json(temporary / "meta.json", {**meta, "version": VERSION, "rows": ends[-1]})
    return Dataset(out)


# ---- Reading -------------------------------------------------------------------------------------


def open_dataset(path):
    """The data set in a folder: one of ours, or DINO-WM's released point_maze."""
    if any((Path(path) / name).exists() for name in ("seq_lengths.pth", "obses")):
        from lib.released import ReleasedDataset

        return ReleasedDataset(path)
    return Dataset(path)


class Dataset:
    """A folder that `write_dataset` wrote, memory-mapped: `.frames`, `.states`, `.actions`, `.rewards`, `.dones`,
    `.episode_ends`, and `.meta`. UserError if it is missing, damaged or not a data set."""

    SUFFIX = ".npy"
    ARRAYS = {"frames": (4, "u"), "states": (2, "f"), "actions": (2, "f"), "rewards": (1, "f"), "dones": (1, "b")}

    def __init__(self, path):
        self.path = Path(path)
        if not (self.path / "meta.json").is_file():
            raise UserError(f"no data set at {path} (no meta.json there): python data.py --out {path}")
        self.meta = common.read_json(self.path / "meta.json")
        if self.meta.get("version") != VERSION:
            raise UserError(f"{path} is of format version {self.meta.get('version')}, not {VERSION}: collect it again")
        for name, (ndim, kind) in {**self.ARRAYS, "episode_ends": (1, "i")}.items():
            setattr(self, name, open_array(self.path / f"{name}.npy", ndim, kind))
        self.episode_starts = np.concatenate([[0], self.episode_ends[:-1]])
        self.check()

    def __len__(self):
        return len(self.episode_ends)

    def split(self):
        """Episode numbers (train, validation). As in DINO-WM they are the same whatever the seed of the run."""
        order = np.random.default_rng(42).permutation(len(self))
        cut = max(1, round(0.1 * len(self)))
        return np.sort(order[cut:]), np.sort(order[:cut])

    def rows(self, episodes):
        """All rows of these episodes."""
        return np.concatenate([np.arange(self.episode_starts[e], self.episode_ends[e]) for e in episodes])

    def statistics(self, episodes):
        """Mean and standard deviation, per dimension, of one environment action and of the state in these episodes."""
        rows = self.rows(episodes)
        actions = self.actions[rows].reshape(-1, self.actions.shape[1] // self.meta["frameskip"])
        values = {"action": actions, "proprio": self.states[rows]}
        return {name: (v.mean(0), v.std(0) + 1e-6) for name, v in values.items()}

    def check(self):
        """Raises a UserError unless the parts of the folder fit each other and are finite."""
        ends, rows, meta = self.episode_ends, len(self.states), self.meta
        sizes = [meta.get(name) for name in ("img_size", "frameskip")]
        known = isinstance(meta.get("env"), str) and all(isinstance(size, int) and size > 0 for size in sizes)
        problems = {
            "meta.json lacks the name env, or a positive whole number img_size or frameskip": not known,
            "episode_ends do not grow": not len(ends) or ends[0] < 1 or (np.diff(ends) < 1).any(),
            "the arrays have different numbers of rows": {len(getattr(self, name)) for name in self.ARRAYS} != {rows},
            f"episode_ends do not end with row {rows}": len(ends) and ends[-1] != rows,
            "frames are not square and in three colours": self.frames.shape[1:] != (meta.get("img_size"),) * 2 + (3,),
            "actions are empty": not self.actions.shape[1],
            "actions do not divide by frameskip": known and self.actions.shape[1] % meta["frameskip"] != 0,
        }
        if found := [problem for problem, true in problems.items() if true]:
            raise UserError(f"{self.path} is not a whole data set ({found[0]}): collect it again with data.py")
        for name in [name for name in self.ARRAYS if name in ("states", "actions", "rewards")]:
            good = (np.abs(getattr(self, name).reshape(rows, -1)) < 1e9).all(1)  # a NaN fails the comparison, too
            if not good.all():
                episode = np.searchsorted(ends, good.argmin(), side="right")
                raise UserError(f"{self.path / name}{self.SUFFIX}: {name} of episode {episode} are not finite numbers")


def open_array(path, ndim, kind):
    """A memory-mapped .npy file. UserError unless it holds an array of `ndim` dimensions and a dtype of this kind."""
    array = common.read(path, lambda path: np.load(path, mmap_mode="r"))
    whole = array is not None and array.offset + array.nbytes == path.stat().st_size
    if not whole or array.ndim != ndim or array.dtype.kind != kind or not array.dtype.isnative:
        raise UserError(f"{path} is damaged, or not an array of this project: remove it, and make it again")
    return array


class Windows:
    """Windows of `num_frames` model steps, `frameskip` environment steps apart, within single episodes.

    If the data set was recorded with a finer frameskip, every row starts a window, and the actions of the rows between
    two model steps are concatenated, as in DINO-WM's TrajSlicerDataset.
    """

    def __init__(self, dataset, episodes, num_frames, frameskip):
        recorded = dataset.meta["frameskip"]
        if frameskip % recorded:
            raise UserError(f"--frameskip {frameskip} is not a multiple of the data set's own {recorded}")
        self.dataset, self.stride, self.num_frames = dataset, frameskip // recorded, num_frames
        span = self.stride * num_frames
        if not len(episodes):
            raise UserError(f"{dataset.path} has {len(dataset)} episode: two are needed, one of them for validation")
        starts, ends = dataset.episode_starts[episodes], dataset.episode_ends[episodes] - span + 1
        if not (starts < ends).any():
            raise UserError(
                f"none of {len(episodes)} episodes of {dataset.path} is as long as a window of {num_frames} model "
                f"steps, {span} rows; the longest has {(ends - starts).max() + span - 1}: collect longer ones (python "
                "data.py --steps), or ask for fewer model steps"
            )
        self.starts = np.concatenate([np.arange(s, e) for s, e in zip(starts, ends, strict=True)])

    def __len__(self):
        return len(self.starts)

    def batch(self, indices, tokens, device="cpu", frames=0):
        """Windows `indices` as float tensors: visual (B, T, N, d) out of `tokens` (S, N, d), proprio (B, T, P), and
        action (B, T, frameskip*DoF). If `frames` is above 0, also the last `frames` frames (B, frames, H, W, 3)."""
        first = self.starts[indices]
        rows = first[:, None] + self.stride * np.arange(self.num_frames)  # (B, T)
        every = first[:, None] + np.arange(self.stride * self.num_frames)
        action = self.dataset.actions[every].reshape(*rows.shape, -1)
        batch = {"visual": tokens[rows], "proprio": self.dataset.states[rows], "action": action}
        if frames:
            batch["frames"] = self.dataset.frames[rows[:, -frames:]]
        return {name: torch.from_numpy(array).to(device, torch.float32) for name, array in batch.items()}

    def batches(self, order, tokens, batch_size, device, frames=0):
        """Yields the windows in the given order, a batch at a time. Under torchrun each process gets its share of every
        batch, and "weight" is how large that is, in units of an equal share."""
        for i in range(0, len(order), batch_size):
            whole = order[i : i + batch_size]
            part = whole[RANK::WORLD_SIZE]
            batch = self.batch(part if len(part) else whole[:1], tokens, device, frames)  # an empty part counts 0
            yield batch | {"weight": len(part) * WORLD_SIZE / len(whole)}


@torch.no_grad()
def token_cache(encoder, dataset, device, batch_size=256):
    """Tokens (S, N, d) of all frames, memory-mapped. They are computed once per encoder, and kept with the data set.
    Several processes encode a batch each at the same time, and the first one writes them all."""
    if encoder.name == "state":
        return dataset.states[:, None]
    digest = hashlib.sha256(f"{encoder.name} {encoder.img_size}".encode())
    for tensor in encoder.state_dict().values():
        digest.update(tensor.cpu().contiguous().numpy())
    path = dataset.path / f"tokens_{encoder.name}_{digest.hexdigest()[:12]}.npy"
    shape = (len(dataset.frames), encoder.num_patches, encoder.dim)
    if not all(processes.gather(path.is_file())):
        dtype = np.float32 if encoder.num_patches == 1 else np.float16  # 196 x 384 numbers a frame: halve them
        with common.whole(path) if RANK == 0 else contextlib.nullcontext(os.devnull) as temporary:
            writer = NpyWriter(temporary, shape[1:], dtype)
            starts = range(0, shape[0], batch_size * WORLD_SIZE)
            for i in tqdm(starts, desc=f"encode with {encoder.name}", unit="batch"):
                first = i + RANK * batch_size
                frames = dataset.frames[first : first + batch_size]
                encoded = encoder(to_tensor(frames, device)).cpu().numpy() if len(frames) else np.empty((0, *shape[1:]))
                writer.append(np.concatenate(processes.gather(encoded.astype(dtype))))
            writer.close()
        processes.gather(None)  # the first process has renamed it
    tokens = open_array(path, 3, "f")
    if tokens.shape != shape:
        raise UserError(f"{path} holds tokens of another shape, {tokens.shape} and not {shape}: remove it")
    return tokens


def inspect(dataset):
    """Prints shapes and statistics, and draws eight episodes into `contact_sheet.png`."""
    print("  ".join(f"{key} {value}" for key, value in dataset.meta.items()))
    lengths = dataset.episode_ends - dataset.episode_starts
    print(f"{len(dataset)} episodes of {lengths.min()} to {lengths.max()} rows (mean {lengths.mean():.1f})\n")
    print(f"{'array':8} {'shape':22} {'dtype':8} {'min':>8} {'mean':>8} {'std':>8} {'max':>8}")
    for name in dataset.ARRAYS:
        array = getattr(dataset, name)
        sample = array[:: max(1, len(array) // (500 if name == "frames" else 5000))].astype(np.float32)
        stats = " ".join(f"{f(sample):8.3f}" for f in (np.min, np.mean, np.std, np.max) if sample.size)
        print(f"{name:8} {str(array.shape):22} {str(array.dtype):8} {stats}")
    spans = list(zip(dataset.episode_starts, dataset.episode_ends, strict=True))[:8]
    films = [dataset.frames[np.linspace(start, end - 1, 10).round().astype(int)] for start, end in spans]
    write_strips(dataset.path / "contact_sheet.png", *films)
    print(f"\ncontact sheet (one episode a row, time to the right): {dataset.path / 'contact_sheet.png'}")


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--env", help=f"the world: {', '.join(ENVIRONMENTS)} (default: pointmaze; with --from, what the data say)")
    add("--from", dest="source", metavar="PATH", help=f"import episodes instead of collecting: {KNOWN}")
    add("--episodes", type=positive, default=EPISODES, help="number of episodes to collect")
    add("--steps", type=positive, default=STEPS, help="model steps (rows) per episode")
    add("--frameskip", type=positive, default=5, help="environment steps per model step")
    size = "side of the frames in pixels; those of --from are cropped to their middle square, and resized"
    add("--img-size", type=positive, default=64, help=size)
    add("--seed", type=common.seed_number, default=0, help="the same seed gives the same data set")
    add("--workers", type=positive, help="number of processes (default: one per core)")
    name = "datasets/NAME, where NAME is --env or that of what is imported; datasets/NAME_SIZE if --img-size is not 64"
    add("--out", help=f"folder to write (default: {name})")
    add("--inspect", metavar="DIR", help="describe this data set instead of collecting one")
    args = parser.parse_args()
    if args.inspect:
        return inspect(open_dataset(args.inspect))
    if args.source:
        out = args.out or default_folder(Path(args.source).resolve().stem, args.img_size)
        dataset = write_dataset(out, *open_source(args.source, args.env, args.img_size, args.frameskip))
    else:
        env, sizes = args.env or "pointmaze", (args.episodes, args.steps, args.frameskip, args.img_size)
        out = args.out or default_folder(env, args.img_size)
        dataset = collect(out, env, *sizes, args.seed, args.workers)
    print(f"{len(dataset)} episodes, {len(dataset.frames)} frames in {out}")


if __name__ == "__main__":
    common.run_script(main)
