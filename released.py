"""What DINO-WM's authors released, read as it lies on the disk: the PointMaze archive and the checkpoints.

Zhou et al., 2024, arXiv:2411.04983; the code and its formats: gaoyuezhou/dino_wm on GitHub. A checkpoint there is a
pickle of whole modules, and a pickle is a program that may call any function by its name. Here it can make

    containers    dict, set, OrderedDict, defaultdict
    tensors       a storage of the file, seen by (offset, size, stride)
    shells        where a module or an optimiser stood: what state it had, and no behaviour

and nothing else: no module is imported on its behalf, and any other name is an error that says the name.

    python released.py point_maze                      # the data set: shapes, statistics, contact_sheet.png
    python released.py outputs/point_maze              # the run: its settings and its tensors
    python train.py --data point_maze --encoder dinov2
    python plan.py --ckpt outputs/point_maze --data point_maze                             # converts in memory
    python plan.py --ckpt outputs/point_maze --data point_maze --convert runs/point_maze   # once and for all
"""

import json
import pickle
import zipfile
from collections import OrderedDict, defaultdict
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
import yaml

from data import Dataset, Parser, UserError, inspect, run_script, write_atomic
from predictor import WorldModel, build_eyes
from vae_mdnrnn import load_tensors
from weights import load_state, rename, vit_names

# ---------------------------------------------------------------------------------------------------------
# The data set

read_tensor = partial(load_tensors, kind=torch.Tensor, mmap=True)  # of a file


class ReleasedDataset(Dataset):
    """The unpacked `point_maze` folder, with the interface of `Dataset`: a row per environment step, no rewards.

    states.pth (E, T, 4), actions.pth (E, T, 2), seq_lengths.pth (E,), and obses/episode_000.pth, ..., each (T, H, W, 3)
    uint8. All but the frames is in memory. What is missing, too short or not finite raises a UserError.
    """

    ARRAYS = ("frames", "states", "actions")
    FILES = ("states.pth", "actions.pth", "seq_lengths.pth", "obses")

    def __init__(self, path):
        self.path = Path(path)
        states, actions, lengths = (read_tensor(self.path / name) for name in self.FILES[:3])
        if lengths.ndim != 1 or lengths.is_floating_point() or not len(lengths) or lengths.min() < 1:
            raise UserError(f"{self.path / 'seq_lengths.pth'} is not one whole number of steps for each episode")
        self.episode_ends = lengths.cumsum(0).numpy()
        self.episode_starts = self.episode_ends - lengths.numpy()
        for name, padded in (("states", states), ("actions", actions)):
            file = self.path / f"{name}.pth"
            if padded.ndim != 3 or len(padded) != len(lengths) or padded.shape[1] < lengths.max():
                raise UserError(
                    f"{file}: {tuple(padded.shape)} has no room for the {len(lengths)} episodes of up to "
                    f"{lengths.max()} steps of seq_lengths.pth"
                )
            inside = torch.arange(padded.shape[1]) < lengths[:, None]  # (E, T)
            rows = padded[inside].float()  # (S, 4) or (S, 2)
            if not (finite := rows.isfinite().all(1)).all():
                episode = inside.nonzero()[~finite][0, 0]
                raise UserError(f"{file}: {name} of episode {episode} are not finite numbers")
            setattr(self, name, rows.numpy())
        self.files = [self.path / "obses" / f"episode_{i:03d}.pth" for i in range(len(lengths))]
        self.meta = dict(env="pointmaze-d4rl", img_size=read_tensor(self.files[0]).shape[1], frameskip=1)

    @cached_property
    def frames(self):
        return EpisodeFrames(self.files, self.episode_starts, self.episode_ends)

    def split(self):
        """Episode numbers (train, validation), the release's: 90 % and the rest of a shuffle by seed 42."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(42)).numpy()
        cut = int(0.9 * len(self))
        return np.sort(order[:cut]), np.sort(order[cut:])

    def statistics(self, episodes=None):
        """Per-dimension (mean, std with n - 1) of action and state; as released over all episodes, the validation's
        among them."""
        values = {"action": torch.from_numpy(self.actions), "proprio": torch.from_numpy(self.states)}
        return {name: (v.mean(0).numpy(), v.std(0).numpy()) for name, v in values.items()}


class EpisodeFrames:
    """All frames (S, H, W, 3) uint8 of one file per episode; what is indexed is read, and no more."""

    dtype = np.dtype(np.uint8)

    def __init__(self, files, starts, ends):
        self.files, self.starts, self.ends = files, starts, ends
        shape = read_tensor(files[0]).shape[1:]
        for file, length in zip(files, ends - starts, strict=True):  # now, and not after hours of encoding
            frames = read_tensor(file)
            if frames.dtype != torch.uint8 or frames.shape[1:] != shape or shape[2:] != (3,):
                raise UserError(f"{file}: frames {tuple(frames.shape)} of {frames.dtype} are not (T, H, W, 3) of uint8")
            if len(frames) < length:
                raise UserError(f"{file}: {len(frames)} frames, where seq_lengths.pth says {length}")
        self.shape = (int(ends[-1]), *shape)

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, index):
        """Rows by a number, a slice or an array of numbers."""
        rows = np.arange(len(self))[index]
        episode = np.searchsorted(self.ends, rows, side="right")
        frames = np.empty((*rows.shape, *self.shape[1:]), np.uint8)
        for e in np.unique(episode):
            frames[episode == e] = read_tensor(self.files[e])[rows[episode == e] - self.starts[e]].numpy()
        return frames


def open_dataset(path, **wanted):
    """The data set in a folder, ours or the released one; UserError if its meta is not as `wanted`."""
    released = any((Path(path) / name).exists() for name in ReleasedDataset.FILES)
    dataset = ReleasedDataset(path) if released else Dataset(path)
    for name, value in wanted.items():
        if dataset.meta[name] != value:
            flag = name.replace("_", "-")
            raise UserError(f"{path} has --{flag} {dataset.meta[name]}, not the {value} that is asked for")
    return dataset


# ---------------------------------------------------------------------------------------------------------
# The checkpoint


SHELLS = ("models.", "dinov2.", "torch.nn.modules.", "torch.optim.", "torch.device", "accelerate.")


class Shell:
    """Where an object of the release stood; `state` is what it would have been given."""

    def __init__(self, *args):
        self.state = None

    def __setstate__(self, state):
        self.state = state


def read_pickle(path):
    """The contents of a file of torch.save, its modules and optimisers as shells. Executes nothing of it."""

    def rebuild_tensor(storage, offset, size, stride, *_):
        return storage.as_strided(size, stride, offset)

    def rebuild_parameter(tensor, *_):
        return tensor

    dtypes = {"Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16,
              "Long": torch.int64, "Int": torch.int32, "Bool": torch.bool, "Byte": torch.uint8}  # fmt: skip
    known = {
        "builtins.dict": dict,
        "builtins.set": set,
        "collections.OrderedDict": OrderedDict,
        "collections.defaultdict": defaultdict,
        "torch._utils._rebuild_tensor_v2": rebuild_tensor,
        "torch._utils._rebuild_parameter": rebuild_parameter,
        "torch._utils._rebuild_parameter_with_state": rebuild_parameter,
        **{f"torch.{name}Storage": dtype for name, dtype in dtypes.items()},
    }

    class Reader(pickle.Unpickler):
        storages = {}

        def find_class(self, module, name):
            full = f"{module.replace('__builtin__', 'builtins')}.{name}"  # pickle's protocol 2 has Python 2's name
            if full in known:
                return known[full]
            if full.startswith(SHELLS):
                return Shell
            raise UserError(f"{path} asks for {full}, which no checkpoint of DINO-WM needs: refused")

        def persistent_load(self, key):
            _, dtype, name, *_ = key  # ("storage", dtype, file in the archive, device, numbers)
            if name not in self.storages:
                content = bytearray(archive.read(f"{root}/data/{name}"))
                self.storages[name] = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
            return self.storages[name]

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
    """{name: tensor} of a module's shell, as nn.Module.state_dict has it."""
    own = {**shell.state["_parameters"], **shell.state["_buffers"]}
    tensors = {name: tensor for name, tensor in own.items() if torch.is_tensor(tensor)}
    for child, module in shell.state["_modules"].items():
        tensors |= {f"{child}.{name}": tensor for name, tensor in state_dict(module).items()}
    return tensors


# The release's names -> ours
NAMES = [
    (r"^transformer\.layers\.(\d+)\.0\.to_out\.0\.", r"blocks.\1.0.to_out."),
    (r"^transformer\.layers\.(\d+)\.1\.net\.", r"blocks.\1.1."),
    (r"^transformer\.layers\.", "blocks."),
    (r"^transformer\.norm\.", "norm."),
    (r"^patch_embed\.", ""),
]
EYES = {"x_norm_patchtokens": "dinov2", "x_norm_clstoken": "dino_cls"}
BACKBONES = {"dinov2_vits14": "small", "dinov2_vitb14": "base", "dinov2_vitl14": "large"}


def read_run(run):
    """A released run's settings, the dictionary in hydra.yaml, and its tensors by part, {"predictor": {name: tensor},
    ...}: under our names but for those of the encoder, which it has if it was trained."""
    path = Path(run) / "hydra.yaml"
    if not path.is_file():
        raise UserError(f"no hydra.yaml in {run}, where a released run has it beside checkpoints/")
    try:
        settings = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        raise UserError(f"{path} is damaged, or not YAML") from None
    path = Path(run) / "checkpoints" / "model_latest.pth"
    content, parts = read_pickle(path), {}
    for part in ("predictor", "proprio_encoder", "action_encoder", "decoder", "encoder"):
        try:
            tensors = state_dict(content[part])
            parts[part] = tensors if part == "encoder" else rename(tensors, NAMES)
        except (KeyError, TypeError, AttributeError, RecursionError):
            if part not in ("decoder", "encoder"):
                raise UserError(f"{path} does not hold a module '{part}'") from None
    for part in ("proprio_encoder", "action_encoder"):
        if "weight" in parts[part]:
            parts[part]["weight"] = parts[part]["weight"].squeeze(-1)  # there a Conv1d's of kernel size 1
    return settings, parts


def setting(path, settings, name):
    """settings["a"]["b"] of the name "a.b"; `path` is where they came from."""
    for key in name.split("."):
        if not isinstance(settings, dict) or key not in settings:
            raise UserError(f"{path} has no {name}")
        settings = settings[key]
    return settings


def load_model(run, device="cpu", data=None, weights=None):
    """The world model in a run's folder, ours or a released one, in eval mode.

    A released run lacks two things: its statistics, those of the data set `data` (default: where its hydra.yaml has
    it), and its frozen encoder, for which `weights` is what `build_encoder` takes.
    """
    run = Path(run)
    if not (run / "hydra.yaml").exists() and not (run / "checkpoints").exists():
        return WorldModel.load(run, device)
    settings, parts = read_run(run)
    get = partial(setting, run / "hydra.yaml", settings)
    for name, known in (("env.name", ["point_maze"]), ("encoder._target_", ["models.dino.DinoV2Encoder"]),
                        ("encoder.name", BACKBONES), ("encoder.feature_key", EYES), ("num_pred", [1])):  # fmt: skip
        if get(name) not in [*known]:
            raise UserError(f"{run}/hydra.yaml: {name} is {get(name)}, not {' or '.join(map(str, known))}")
    folder = data or get("env.dataset.data_path")
    if data is None and not Path(folder).exists():
        raise UserError(f"the data that {run} normalises by are not at {folder}: give --data, the folder point_maze")
    dataset = open_dataset(folder)
    stats = dataset.statistics(dataset.split()[0])
    if not get("env.dataset.normalize_action"):
        stats = {name: (np.zeros_like(mean), np.ones_like(std)) for name, (mean, std) in stats.items()}
    name = f"{EYES[get('encoder.feature_key')]}-{BACKBONES[get('encoder.name')]}"
    img_size = get("img_size") // 16 * 14  # a patch of 14 pixels for each 16 of the frame
    encoder = build_eyes(name, img_size, "random" if "encoder" in parts else weights)
    if "encoder" in parts:  # it was trained: else it is not in the checkpoint
        own = {name.removeprefix("base_model."): tensor for name, tensor in parts.pop("encoder").items()}
        load_state(encoder.vit, own, partial(vit_names, encoder.vit), run / "checkpoints" / "model_latest.pth")
    decoder = None
    if "decoder" in parts:
        vq = "channel", "n_res_block", "n_res_channel", "quantize", "n_embed"
        sizes = ("depth",) if encoder.num_patches == 1 else vq
        decoder = {"img_size": get("img_size"), **{name: get(f"decoder.{name}") for name in sizes}}
    model = WorldModel(
        encoder, stats["action"], stats["proprio"], get("num_hist"), get("num_pred"), get("frameskip"),
        get("proprio_emb_dim"), dict(env="pointmaze-d4rl", img_size=get("img_size"), data=str(folder)),
        decoder=decoder, action_emb_dim=get("action_emb_dim"),
        **{name: get(name) for name in ("concat_dim", "num_proprio_repeat", "num_action_repeat")},
        **{name: get(f"predictor.{name}") for name in ("depth", "heads", "mlp_dim", "dropout")},
    )  # fmt: skip
    try:
        for part, tensors in parts.items():
            getattr(model, part).load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:150]
        raise UserError(f"{run}: hydra.yaml and checkpoints/model_latest.pth do not agree ({reason})") from None
    return model.to(device).eval()


def save_converted(model, run, out):
    """Writes the model of the released `run` to the folder `out`, as a run of ours."""
    out = Path(out)
    if (Path(run) / "model.pt").exists():
        raise UserError(f"{run} is a run of ours: --convert takes a released one")
    if (out / "model.pt").exists():
        raise UserError(f"{out} is a run already: choose another --convert")
    write_atomic(out / "args.json", lambda path: path.write_text(json.dumps({"released": str(run)}, indent=1)))
    model.save(out)
    print(f"{run} is converted: python plan.py --ckpt {out}")


# ---------------------------------------------------------------------------------------------------------


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("path", type=Path, help="a released data set or run")
    path = parser.parse_args().path
    if any((path / name).exists() for name in ReleasedDataset.FILES):
        return inspect(ReleasedDataset(path))
    settings, parts = read_run(path)
    print(yaml.safe_dump(settings, sort_keys=False))
    print(f"{'tensor, by our name':44} {'shape':20} {'mean':>9} {'std':>9}")
    for part, tensors in parts.items():
        for name, tensor in tensors.items():
            shape, values = tuple(tensor.shape), tensor.float()
            print(f"{part + '.' + name:44} {str(shape):20} {values.mean():9.4f} {values.std(correction=0):9.4f}")


if __name__ == "__main__":
    run_script(main)
