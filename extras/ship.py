"""Keeps of a run what one needs to play with it: weights, as float16, and where dreams begin; no data.

    python -m extras.ship runs/worldmodels_takecover assets/models/takecover
    python -m extras.ship runs/pointmaze_pca assets/models/pointmaze

What it writes is a run again: `python -m extras.play --run`, and `plan.py --ckpt` take it.
"""

from pathlib import Path

import numpy as np

import vae_mdnrnn as wm
from lib import common
from lib.recipes import load_starts, open_run
from predictor import WorldModel, load_checkpoint


def world_model(run):
    """What a run of train.py keeps: {file: its content}."""
    WorldModel.load(run)  # it is whole
    return {"model.pt": {name: load_checkpoint(run)[name] for name in ("config", "model")}}


def dream(run):
    """What a run of vae_mdnrnn.py keeps. C goes without the course of its search."""
    args = open_run(run, wm.STEPS)
    wm.load_models(args)
    paths = [args.run / "vae.pt", args.run / "rnn.pt", *sorted(args.run.glob("c_*.pt"))]
    files = {path.name: common.load_tensors(path) for path in paths}
    for name in files.keys() - {"vae.pt", "rnn.pt"}:
        files[name] |= {"fitness": [], "log": []}
    return files | {"starts.npy": np.float16(load_starts(args))}


def half(model):
    return {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in model.items()}


def ship(run, out):
    run, out = Path(run), Path(out)
    if out.exists():
        raise common.UserError(f"{out} is there: remove it, or choose another folder")
    files = world_model(run) if (run / "model.pt").exists() else dream(run)
    with common.partial(out, folder=True) as folder:
        common.write_json(folder / "args.json", common.read_json(run / "args.json"))
        for name, content in files.items():
            if name == "starts.npy":
                np.save(folder / name, content)
            else:
                kept = {"model": half(content["model"])} if "model" in content else {}
                common.save_tensors(folder / name, content | kept)
    print(f"{out}: {sum(path.stat().st_size for path in out.iterdir()) / 1e6:.1f} MB")


def main():
    parser = common.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("run", help="a run of train.py or of vae_mdnrnn.py")
    parser.add_argument("out", help="folder to write")
    args = parser.parse_args()
    ship(args.run, args.out)


if __name__ == "__main__":
    common.run_script(main)
