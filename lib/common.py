"""What every script shares: how a user's error ends, how flags are read, how files are written whole or not at all,
how tensors are read without executing anything, and the plain training loop."""

import argparse
import contextlib
import errno
import functools
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import uuid
import warnings
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm as progress_bar

try:
    import fcntl
except ImportError:  # on Windows nothing is locked, and what a killed process has left behind stays
    fcntl = None

# torchrun tells a process its number, and how many there are. They are taken out of the environment, so that a worker
# process does not take itself for one of them.
RANK, WORLD_SIZE = (int(os.environ.pop(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))
CORES = max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))  # of this process
tqdm = functools.partial(progress_bar, disable=RANK > 0)  # the first process alone shows progress
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR}
DISK_ERRORS |= {errno.ENOENT, errno.EEXIST, errno.ENAMETOOLONG}


class UserError(Exception):
    """Something that the user can put right. Its text is one line that says what to do."""


def run_script(main):
    """Runs a script's `main`. An error that a user can cause becomes one line on stderr and exit code 2."""
    try:
        with open(os.devnull, "w") if RANK else contextlib.nullcontext(sys.stdout) as out:
            with contextlib.redirect_stdout(out):  # of several processes the first one alone prints
                return main()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        message = " ".join(str(error).split())
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            message = f"cannot write {error.filename or 'the output'}: {error.strerror}"
        elif isinstance(error, MemoryError | RuntimeError) and re.search("Memory|out of memory|allocate", repr(error)):
            message = f"there is not enough memory ({message[:100]}): choose smaller sizes or batches"
        elif not isinstance(error, UserError):
            raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if RANK:  # the first process reports an error that all meet, and torchrun ends the others while they sleep
        signal.signal(signal.SIGTERM, lambda *_: os._exit(2))
        time.sleep(10)
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


class Parser(argparse.ArgumentParser):
    """The parser of every script: --help shows the defaults, and a wrong flag is a UserError."""

    class Formatter(argparse.ArgumentDefaultsHelpFormatter):
        def _get_help_string(self, action):
            unsaid = str(action.default) in ("None", "False", "[]", "{}")
            return action.help if unsaid else super()._get_help_string(action)

    def __init__(self, **options):
        super().__init__(formatter_class=self.Formatter, allow_abbrev=False, **options)

    def error(self, message):
        raise UserError(message)


def number(kind, low, high, open_low=False):
    """An `argparse` type: a finite number of the type `kind` in [low, high], or in (low, high] with `open_low`."""

    def parse(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if low <= value <= high and not (open_low and value == low):  # a NaN fails every comparison
                return value
        what, above = "a whole number" if kind is int else "a number", "above" if open_low else "of at least"
        raise argparse.ArgumentTypeError(f"{text} is not {what} {above} {low:g} and at most {high:g}")

    return parse


positive = number(int, 1, 10**7)
seed_number = number(int, 0, 2**31 - 1)  # what NumPy, torch and CMA-ES all take
above_zero = number(float, 0, 1e6, open_low=True)


def several(parse):
    """An `argparse` type: "a,b,c" becomes a list of what `parse` makes of each part, without repetitions."""
    return lambda text: list(dict.fromkeys(parse(part) for part in text.split(",") if part))


def names(known):
    """An `argparse` type: "a,b,c" becomes ["a", "b", "c"], without repetitions. Each has to be in `known`."""

    def parse(text):
        chosen = several(str)(text)
        if unknown := [name for name in chosen if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}; known: {', '.join(known)}")
        if not chosen:
            raise argparse.ArgumentTypeError(f"no name is given; known: {', '.join(known)}")
        return chosen

    return parse


def choice(*known):
    """The type of a value that is one of the words `known`."""
    return lambda text: names(known)(text)[0]


def key_values(known):
    """An `argparse` type: "depth=2,heads=4" becomes {"depth": 2, "heads": 4}. `known` is {name: type of its value}."""

    def parse(text):
        values = dict(pair.partition("=")[::2] for pair in text.split(",") if pair)
        for name, value in values.items():
            if name not in known or not value:
                raise argparse.ArgumentTypeError(f"{name} is not one of NAME=VALUE with {', '.join(known)}")
        return {name: known[name](value) for name, value in values.items()}

    return parse


def available_device(text):
    """An `argparse` type: the name of a device on which torch can compute here."""
    try:
        torch.zeros(1, device=text).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise argparse.ArgumentTypeError(f"torch cannot use the device '{text}' here") from None
    return text


def has_bfloat16(device):
    """Whether a device computes with bfloat16 numbers, and does not only imitate it."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch do not tell
    return kind == "cpu" and any(known.get(name) for name in ("avx512_bf16", "amx_bf16"))


def fast_dtype(device):
    """The dtype bfloat16 if a device computes with it, and float32 if not."""
    return torch.bfloat16 if has_bfloat16(device) else torch.float32


def default_device():
    return "cuda" if torch.cuda.is_available() else "cpu"


# ---- Folders and files ---------------------------------------------------------------------------


def output_folder(root, name):
    """root/name as a path. UserError unless it is a folder strictly below `root`."""
    path = Path(root, name)
    if Path(root).resolve() not in path.resolve().parents:
        raise UserError(f"--name {name} is not a folder below {root}/: choose another --name")
    return path


def flag_text(name, value):
    """A flag as it is typed."""
    value = ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else value
    value = " ".join(map(str, value)) if isinstance(value, list) else value
    return f"--{name.replace('_', '-')} {value}"


def same_flags(directory, flags):
    """A run goes on with the flags that it was begun with. UserError names those that differ from its args.json."""
    path, now = Path(directory) / "args.json", json.loads(json.dumps(flags))
    before = read_json(path) if path.exists() else now
    if different := sorted(name for name in now.keys() | before.keys() if before.get(name) != now.get(name)):
        values = {name: "by default" if before.get(name) is None else before[name] for name in different}
        was = ", ".join(flag_text(name, value) for name, value in values.items())
        cure = "give these, remove it, or choose another folder"
        raise UserError(f"{directory} was begun with other flags ({was}): {cure}")


@contextlib.contextmanager
def whole(path, folder=False):
    """Yields a temporary file or folder beside `path`, which is renamed to `path` when the block has ended well.

    The temporary one is locked while it is written. One without a lock was left behind by a killed process, and the
    next writer of the same `path` removes it.
    """
    path, unique = Path(path), uuid.uuid4().hex[:8]
    new, temporary = path.with_name(f".{unique}.new"), path.with_name(f".{path.stem}.{unique}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{path.stem}.*.partial{path.suffix}") if fcntl else ():
            with contextlib.suppress(OSError), locked(left):
                remove(left)
        new.mkdir() if folder else new.touch()
        with locked(new):
            new.rename(temporary)  # nobody sees it under this name without the lock
            yield temporary
            if not (folder and path.exists()):  # another process may have made the same folder meanwhile
                temporary.replace(path)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        remove(temporary)


@contextlib.contextmanager
def locked(path):
    """Holds a lock on a file or folder. OSError if another process has it; a process that dies gives it back."""
    if fcntl is None:
        yield
        return
    file = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(file)


def remove(path):
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def write_atomic(path, content):
    """Writes `content`: bytes, text, or a function that writes to a temporary path. `path` is never half-written."""
    with whole(path) as temporary:
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content if isinstance(content, bytes | memoryview) else content.encode())


def write_json(path, content):
    write_atomic(path, json.dumps(content, indent=1))


def read(path, how):
    """`how(path)`, or None if the file is damaged. UserError if it is missing, or the user may not read it."""
    try:
        return how(path)
    except FileNotFoundError:
        raise UserError(f"no file at {path}") from None
    except PermissionError:
        raise UserError(f"cannot read {path}: you lack the permission") from None
    except Exception:  # a damaged file can fail in any way
        return None


def read_json(path):
    """The dictionary in a .json file of ours. UserError if it is damaged."""
    content = read(path, lambda path: json.loads(Path(path).read_text()))
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: remove it and give the command again")
    return content


def write_csv(path, rows):
    """Writes the dictionaries `rows` as a table. A cell is empty where a row lacks a value."""
    header = list(dict.fromkeys(name for row in rows for name in row))
    lines = [header] + [[str(row.get(name, "")) for name in header] for row in rows]
    write_atomic(path, "".join(",".join(line) + "\n" for line in lines))


def markdown_table(rows):
    """Rows of cells, of which the first is the header, as text."""
    return "".join(f"| {' | '.join(row)} |\n" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])


class NpyWriter:
    """A .npy file that grows by rows. `close` writes their number into its header, which has room for any."""

    def __init__(self, path, row_shape, dtype):
        self.file, self.shape, self.dtype, self.rows = open(path, "wb"), tuple(row_shape), np.dtype(dtype), 0
        self.write_header()

    def write_header(self):
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.rows, *self.shape)}
        np.lib.format.write_array_header_1_0(self.file, header)

    def append(self, rows):
        self.file.write(np.ascontiguousarray(rows, self.dtype))
        self.rows += len(rows)

    def close(self):
        self.file.seek(0)
        self.write_header()
        self.file.close()


# ---- Tensors and training ------------------------------------------------------------------------


def save_tensors(path, content):
    """Writes tensors and plain values, as torch.save does. A full disk is an OSError, which torch.save would hide."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomic(path, buffer.getbuffer())


def load_tensors(path, device="cpu", kind=dict, **options):
    """Reads the tensors and plain values that torch.save wrote to `path`, and never executes a pickle.

    UserError if the file is missing, unreadable, damaged or holds something other than a `kind`.
    """
    with warnings.catch_warnings(action="ignore"):
        content = read(path, lambda path: torch.load(path, map_location=device, weights_only=True, **options))
    if not isinstance(content, kind):
        raise UserError(f"{path} is damaged, or does not hold a {kind.__name__.lower()} of torch.save")
    return content


def save_safetensors(path, tensors):
    """Writes tensors by name in the form that the Hugging Face hub uses, which holds nothing that could be executed."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_atomic(path, safetensors.torch.save(tensors, {"format": "pt"}))


def load_safetensors(path, device="cpu"):
    """The tensors of a safetensors file by name. UserError if it is missing, unreadable or damaged."""
    tensors = read(path, lambda path: safetensors.torch.load_file(path, str(device)))
    if tensors is None:
        raise UserError(f"{path} is damaged, or is not a safetensors file")
    return tensors


def load_state(model, state, path):
    """Loads a `state_dict` that was read from `path`. UserError if it is of other sizes or not finite."""
    try:
        model.load_state_dict(state)
    except (RuntimeError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:150]
        raise UserError(f"{path} does not fit the model that is asked for ({reason})") from None
    check_finite(model, path)


def check_finite(model, path):
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise UserError(f"{path} is damaged: {name} holds numbers that are not finite")


def to_tensor(frames, device="cpu"):
    """uint8 frames (B, H, W, 3) -> float images (B, 3, H, W) in [0, 1]."""
    frames = torch.as_tensor(frames if torch.is_tensor(frames) else np.array(frames), device=device)
    return frames.permute(0, 3, 1, 2).float() / 255


def to_frames(images):
    """float images (B, 3, H, W) in [0, 1] -> uint8 frames (B, H, W, 3): the inverse of `to_tensor`."""
    return (images.permute(0, 2, 3, 1) * 255).round().byte().cpu().numpy()


def bfloat16(device, wanted=True):
    """A context in which torch computes with bfloat16 numbers, if that is wanted and the device does not imitate it."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=wanted and has_bfloat16(device))


def fit(model, loss, steps, lr, seed, name, path=None, clip=None, report=None):
    """Fits `model` in place by `steps` steps of Adam on `loss()["loss"]`. The learning rate follows a cosine, after it
    has risen over the first twentieth of the steps: with large first steps V can settle for the mean image for good.

    With a `path`, a .safetensors, the model is kept there when it is done, for `load_fitted`; and a run that was killed
    goes on. Its weights end as if it had not been killed, because step n draws from a generator seeded by (seed, n)
    alone. A .csv of the losses is written beside the model, and `report` is a function of lib/logs.py.
    """
    # Adam comes first even if it is not needed: it loads Triton, which crashes once a renderer has loaded Mesa's LLVM.
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    if path and path.exists():
        return load_fitted(model, path)
    first, log, saved_at, unfinished = 0, [], time.monotonic(), path and path.with_suffix(".unfinished.pt")
    if path and unfinished.exists():
        saved = load_tensors(unfinished)
        load_state(model, saved.get("unfinished"), unfinished)
        optimizer.load_state_dict(saved["optimizer"])  # of the same model, since its weights fit
        first, log = saved["step"], saved["log"]
    model.train()
    bar = tqdm(range(first, steps), desc=name, initial=first, total=steps)
    for step in bar:
        torch.manual_seed(seed * 1_000_003 + step)
        rise = min(1, (step + 1) / (0.05 * steps))
        optimizer.param_groups[0]["lr"] = lr * rise * (0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2)
        losses = loss()
        if not torch.isfinite(losses["loss"]):
            raise UserError(f"{name}: the loss is {losses['loss'].item()} at step {step}: try a smaller learning rate")
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        if clip:
            nn.utils.clip_grad_value_(model.parameters(), clip)
        optimizer.step()
        if step % 20 == 0 or step == steps - 1:
            log.append({"step": step, **{k: v.item() for k, v in losses.items()}})
            values = {k: v for k, v in log[-1].items() if k != "step"}
            bar.set_postfix({k: f"{v:.4g}" for k, v in values.items()})
            if report:
                report(name, step, values)
        if path and time.monotonic() - saved_at > 30:
            states = {"unfinished": model.state_dict(), "optimizer": optimizer.state_dict()}
            save_tensors(unfinished, {**states, "step": step + 1, "log": log})
            saved_at = time.monotonic()
    if path:
        write_csv(path.with_suffix(".csv"), log)
        save_safetensors(path, model.state_dict())
        remove(unfinished)
    return model.eval()


def load_fitted(model, path):
    """Loads what `fit` kept in `path` into `model`, and returns it in eval mode."""
    state = load_safetensors(path)
    remove(path.with_suffix(".unfinished.pt"))  # still there if a process was killed just before removing it
    load_state(model, state, path)
    return model.eval()
