"""Reads what DINO-WM's authors released, without changing the files: the PointMaze archive and the checkpoints.

Zhou et al., 2024, arXiv:2411.04983; the code and its formats are in gaoyuezhou/dino_wm on GitHub. A checkpoint there is
a pickle of whole modules, and a pickle is a program that may call any function by its name. Here it can only make

    containers    dict, set, OrderedDict, defaultdict
    tensors       a storage of the file, seen by (offset, size, stride)
    shells        they stand where a module or an optimiser stood, and keep its state but not its behaviour

No module is imported on its behalf, and a pickle that asks for any other name is refused.

    python -m lib.released point_maze            # describes the data set, and draws contact_sheet.png
    python -m lib.released outputs/point_maze    # describes the run: its settings and its tensors
    python -m lib.released outputs/point_maze --data point_maze --convert runs/point_maze    # makes it a run of ours
"""

import pickle
import zipfile
from collections import OrderedDict, defaultdict
from functools import partial, reduce
from pathlib import Path

import numpy as np
import torch
import yaml

from data import Dataset, inspect, open_dataset
from encoders import build_encoder
from lib import common
from lib.common import UserError
from lib.weights import load_renamed, rename, vit_names
from predictor import WorldModel

# ---- The data set --------------------------------------------------------------------------------

read_tensor = partial(common.load_tensors, kind=torch.Tensor, mmap=True)  # from a file


class ReleasedDataset(Dataset):
    """The unpacked folder `point_maze` as a `Dataset` without rewards, in which a row is one environment step. It holds
    states.pth (E, T, 4), actions.pth (E, T, 2), seq_lengths.pth (E,), and obses/episode_000.pth and so on, each
    (T, H, W, 3) uint8. States and actions are kept in memory, and frames are read when they are indexed."""

    ARRAYS, SUFFIX = ("frames", "states", "actions"), ".pth"

    def __init__(self, path):
        self.path = Path(path)
        lengths = read_tensor(self.path / "seq_lengths.pth")
        if lengths.ndim != 1 or lengths.is_floating_point() or not len(lengths) or lengths.min() < 1:
            raise UserError(f"{self.path / 'seq_lengths.pth'} is not one whole number of steps for each episode")
        self.episode_ends = lengths.cumsum(0).numpy()
        self.episode_starts = self.episode_ends - lengths.numpy()
        for name in ("states", "actions"):
            file, E, T = self.path / f"{name}{self.SUFFIX}", len(lengths), lengths.max()
            padded = read_tensor(file)
            if padded.ndim != 3 or len(padded) != E or padded.shape[1] < T:
                raise UserError(f"{file}: {tuple(padded.shape)} has no room for the {E} episodes of up to {T} steps")
            inside = torch.arange(padded.shape[1]) < lengths[:, None]  # (E, T)
            setattr(self, name, padded[inside].float().numpy())  # (S, 4) or (S, 2)
        self.frames = EpisodeFrames(self.path / "obses", self.episode_starts, self.episode_ends)
        self.meta = dict(env="pointmaze-d4rl", img_size=self.frames.shape[1], frameskip=1)
        self.check()

    def split(self):
        """Episode numbers (train, validation). As in the release, 90 % of a shuffle by seed 42 are for training."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(42)).numpy()
        return [np.sort(part) for part in np.split(order, [int(0.9 * len(self))])]

    def statistics(self, episodes=None):
        """Means and standard deviations by dimension, as in the release of all episodes, with n - 1 in the variance."""
        values = {"action": torch.from_numpy(self.actions), "proprio": torch.from_numpy(self.states)}
        return {name: (v.mean(0).numpy(), v.std(0).numpy()) for name, v in values.items()}


class EpisodeFrames:
    """The frames (S, H, W, 3) uint8 of all episodes, which have a file each. Only what is indexed is read."""

    def __init__(self, folder, starts, ends):
        self.starts, self.ends = starts, ends
        self.files = [folder / f"episode_{i:03d}.pth" for i in range(len(ends))]
        shape = tuple(read_tensor(self.files[0]).shape[1:2]) * 2 + (3,)  # square, and in three colours
        self.shape, self.dtype = (int(ends[-1]), *shape), np.dtype(np.uint8)
        for file, length in zip(self.files, ends - starts, strict=True):  # now, and not after hours of encoding
            frames = read_tensor(file)
            if frames.dtype != torch.uint8 or frames.shape[1:] != shape or len(frames) < length:
                raise UserError(f"{file}: {tuple(frames.shape)} of {frames.dtype}, not {length} uint8 frames {shape}")

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, index):
        rows = np.arange(len(self))[index]  # of a number, a slice or an array of numbers
        episode = np.searchsorted(self.ends, rows, side="right")
        frames = np.empty((*rows.shape, *self.shape[1:]), np.uint8)
        for e in np.unique(episode):
            frames[episode == e] = read_tensor(self.files[e])[rows[episode == e] - self.starts[e]].numpy()
        return frames


# ---- The checkpoint, which is read without executing it ------------------------------------------

SHELLS = ("models.", "dinov2.", "torch.nn.modules.", "torch.optim.", "torch.device", "accelerate.")


class Shell:
    """A placeholder for an object of the release. `state` is what that object would have been restored from."""

    def __init__(self, *args):
        self.state = None

    def __setstate__(self, state):
        self.state = state


def read_pickle(path):
    """Reads what torch.save wrote to a file, with shells in place of modules and optimisers, and executes nothing."""
    dtypes = {"Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16}
    dtypes |= {"Long": torch.int64, "Int": torch.int32, "Bool": torch.bool, "Byte": torch.uint8}
    known = {
        **{f"{kind.__module__}.{kind.__name__}": kind for kind in (dict, set, OrderedDict, defaultdict)},
        **{f"torch.{name}Storage": dtype for name, dtype in dtypes.items()},
        "torch._utils._rebuild_tensor_v2": lambda storage, at, size, stride, *_: storage.as_strided(size, stride, at),
        "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
        "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
    }

    class Reader(pickle.Unpickler):
        def find_class(self, module, name):
            full = f"{module.replace('__builtin__', 'builtins')}.{name}"  # pickle's protocol 2 has Python 2's name
            if full not in known and not full.startswith(SHELLS):
                raise UserError(f"{path} asks for {full}, which no checkpoint of DINO-WM needs: refused")
            return known.get(full, Shell)

        def persistent_load(self, key):
            _, dtype, name, *_ = key  # ("storage", dtype, file in the archive, device, numbers)
            content = bytearray(archive.read(f"{root}/data/{name}"))
            return torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)

    try:
        with zipfile.ZipFile(path) as archive:
            (root,) = (name[: -len("/data.pkl")] for name in archive.namelist() if name.endswith("/data.pkl"))
            with archive.open(f"{root}/data.pkl") as file:
                return Reader(file).load()
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}") from None
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise UserError(f"{path} is damaged, or no file of torch.save ({type(error).__name__})") from None


def state_dict(shell):
    """The tensors of a module's shell by name, as nn.Module.state_dict returns those of a module."""
    own = {**shell.state["_parameters"], **shell.state["_buffers"]}
    for child, module in shell.state["_modules"].items():
        own |= {f"{child}.{name}": tensor for name, tensor in state_dict(module).items()}
    return {name: tensor for name, tensor in own.items() if torch.is_tensor(tensor)}


# ---- The run -------------------------------------------------------------------------------------

# The values of these settings that can be read here. Those of the encoder come with our names for them.
KNOWN = {"env.name": ["point_maze"], "encoder._target_": ["models.dino.DinoV2Encoder"], "num_pred": ["1"]}
KNOWN["encoder.feature_key"] = {"x_norm_patchtokens": "dinov2", "x_norm_clstoken": "dino_cls"}
KNOWN["encoder.name"] = {"dinov2_vits14": "small", "dinov2_vitb14": "base", "dinov2_vitl14": "large"}
# Settings that are arguments of WorldModel here
SIZES = ["num_hist", "frameskip", "action_emb_dim", "concat_dim", "num_proprio_repeat", "num_action_repeat"]
SIZES += ["predictor.depth", "predictor.heads", "predictor.mlp_dim", "predictor.dropout"]
# From the release's names of tensors to ours
NAMES = [(r"^(transformer|base_model)\.|^patch_embed\.(?=weight|bias)", ""), (r"^layers\.", "blocks.")]
NAMES += [(r"\.0\.to_out\.0\.", ".0.to_out."), (r"\.1\.net\.", ".1.")]


def read_run(run):
    """Returns the settings in a released run's hydra.yaml, a dictionary; its tensors by part, under our names,
    {"predictor": {name: tensor}, ...}; and their file. There is a part "encoder" only if the encoder was trained."""
    path, checkpoint = Path(run, "hydra.yaml"), Path(run, "checkpoints", "model_latest.pth")
    try:
        settings = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        raise UserError(f"{path} is missing, damaged or not YAML; a released run has it beside checkpoints/") from None
    content, parts = read_pickle(checkpoint), {}
    for part in ("predictor", "proprio_encoder", "action_encoder", "decoder", "encoder"):
        try:
            tensors = rename(state_dict(content[part]), NAMES)
            parts[part] = {k: t.squeeze(-1) if k == "weight" else t for k, t in tensors.items()}  # there a Conv1d
        except (KeyError, TypeError, AttributeError, RecursionError):
            if part not in ("decoder", "encoder"):
                raise UserError(f"{checkpoint} does not hold a module '{part}'") from None
    return settings, parts, checkpoint


def load_released_model(run, device="cpu", data=None, weights=None):
    """The world model in the folder of a released run, in eval mode. What the run lacks is given: the data set `data`,
    for its statistics (default: the one that hydra.yaml names), and the pretrained `weights` of its frozen encoder."""
    settings, parts, checkpoint = read_run(run)

    def get(name):  # settings["a"]["b"] for the name "a.b"
        try:
            return reduce(dict.__getitem__, name.split("."), settings)
        except (KeyError, TypeError):
            raise UserError(f"{run}/hydra.yaml has no {name}") from None

    for name, known in KNOWN.items():
        if str(get(name)) not in known:
            raise UserError(f"{run}/hydra.yaml: {name} is {get(name)}, not {' or '.join(known)}")
    folder, img_size = str(data or get("env.dataset.data_path")), get("img_size")
    if data is None and not Path(folder).exists():
        raise UserError(f"the data that {run} normalises by are not at {folder}: give --data, the folder point_maze")
    dataset = open_dataset(folder)
    stats = dataset.statistics(dataset.split()[0])
    if not get("env.dataset.normalize_action"):
        stats = {name: (np.zeros_like(mean), np.ones_like(std)) for name, (mean, std) in stats.items()}
    kind, size = (KNOWN[name][get(name)] for name in ("encoder.feature_key", "encoder.name"))
    side = img_size // 16 * 14  # the encoder has a patch of 14 pixels for each 16 of the frame
    encoder = build_encoder(f"{kind}-{size}", side, "random" if "encoder" in parts else weights)
    if "encoder" in parts:
        load_renamed(encoder.vit, parts.pop("encoder"), partial(vit_names, encoder.vit), checkpoint)
    sizes = {name.removeprefix("predictor."): get(name) for name in SIZES}
    sizes |= dict(emb_dim=get("proprio_emb_dim"), world=dict(env="pointmaze-d4rl", img_size=img_size, data=folder))
    if "decoder" in parts:
        names = ["depth"] if encoder.num_patches == 1 else "channel n_res_block n_res_channel quantize n_embed".split()
        sizes["decoder"] = {"img_size": img_size, **{name: get(f"decoder.{name}") for name in names}}
    model = WorldModel(encoder, stats["action"], stats["proprio"], **sizes)
    for part, tensors in parts.items():
        common.load_state(getattr(model, part), tensors, checkpoint)
    return model.to(device).eval()


def main():
    parser = common.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("path", type=Path, help="a released data set or run, which is described unless --convert is given")
    add("--convert", type=Path, metavar="DIR", help="write the released run to this new folder, as a run of ours")
    add("--data", help="data set whose statistics the converted run uses (default: the one that hydra.yaml names)")
    add("--weights", help="pretrained weights for the encoder of the converted run, as in train.py")
    args = parser.parse_args()
    if args.convert:
        if args.convert.exists():
            raise UserError(f"{args.convert} is there: remove it, or choose another folder for --convert")
        model = load_released_model(args.path, "cpu", args.data, args.weights)
        with common.whole(args.convert, folder=True) as folder:
            common.write_json(folder / "args.json", {"released": str(args.path)})
            model.save_pretrained(folder)
        print(f"{args.path} is converted: python plan.py --ckpt {args.convert}")
    elif (args.path / "obses").exists() or (args.path / "seq_lengths.pth").exists():
        inspect(ReleasedDataset(args.path))
    else:
        settings, parts, _ = read_run(args.path)
        print(yaml.safe_dump(settings, sort_keys=False))
        print("The tensors by our names, with shape, mean and standard deviation:")
        for name, x in [(f"{part}.{name}", x.float()) for part in parts for name, x in parts[part].items()]:
            print(f"{name:44} {str(tuple(x.shape)):20} {x.mean():9.4f} {x.std(correction=0):9.4f}")


if __name__ == "__main__":
    common.run_script(main)
