"""The error of imagination by horizon: how a world model departs from its world, step by step.

The world and the model start from the same frames and take the same random actions. After h of their T steps the world
shows a frame with the visual latent z_h, and the model has imagined z^_h:

    e_h = mean ||z^_h - z_h||^2 / Var z        over the trajectories and the numbers of a latent

At e_h = 1 imagination is as bad as always saying the mean. Each curve stands beside two others: "copy" says the last
known frame again, and "simulator" is the true world, begun from a state that was moved by a hundredth of the data's
standard deviation: it says how far two worlds drift apart that were almost the same.

    python -m extras.horizon --ckpt runs/a runs/b --steps 20

Writes plan_outputs/NAME/: horizon_error.json and horizon_error.png.
"""

from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from lib import common
from lib.common import UserError, positive
from lib.pictures import write_plot
from lib.pointmaze import SHIFTS
from plan import Worlds, newest_run, open_world
from predictor import load_model

PERTURBATION = 0.01  # of a state, in standard deviations of the data's


def record(env, states, actions):
    """Takes actions (B, T, A) from states (B, P). Returns the observations {name: (B, T + 1, ...)}, and a list of the
    T + 1 states."""
    worlds, obs, visited = Worlds(env, states, states), [], []
    for t in tqdm(range(actions.shape[1] + 1), desc="simulate", unit="step"):
        if t > 0:
            worlds.act(np.arange(len(states)), actions[:, t - 1 : t])
        obs.append({name: past[:, -1].copy() for name, past in worlds.past.items()})
        visited.append(worlds.states.copy())
    return {name: np.stack([o[name] for o in obs], axis=1) for name in obs[0]}, visited


@torch.no_grad()
def encode(model, obs, device, first=0):
    """The latents of the frames from `first` on. One trajectory at a time keeps the memory of a large encoder small."""
    latents = []
    for i in range(len(obs["visual"])):
        latents.append(model.encode({k: torch.from_numpy(o[i : i + 1, first:]).to(device) for k, o in obs.items()}))
    return {name: torch.cat([z[name] for z in latents]) for name in latents[0]}


@torch.no_grad()
def horizon_error(env, models, T, count, seeds, device):
    """The errors e_1 .. e_T of each of the models {run: model}, in its own latents, over `count` trajectories.

    A model knows as many frames as its training rollouts start from, and imagines the T frames after them. All models
    see the same trajectories. Returns {run: {"model": [e_1, ..., e_T], "copy": [...], "simulator": [...]}}.
    """
    reference, rng = next(iter(models.values())), np.random.default_rng([*seeds, 2])
    before = max(model.context for model in models.values()) - 1  # true frames that come before the last known one
    starts = np.array([env.sample_state(rng) for _ in range(count)])
    shape = (count, before + T, reference.frameskip, *env.action_space.shape)
    actions = rng.uniform(env.action_space.low, env.action_space.high, shape).astype(np.float32).reshape(*shape[:2], -1)
    obs, states = record(env, starts, actions)
    noise = PERTURBATION * reference.proprio_std.cpu().numpy() * rng.normal(size=starts.shape)
    moved, _ = record(env, states[before] + noise, actions[:, before:])

    curves = {}
    for run, model in models.items():
        first = before + 1 - model.context
        z = encode(model, obs, device, first)
        known = {name: latent[:, : model.context] for name, latent in z.items()}
        imagined = model.rollout(known, torch.from_numpy(actions[:, first:]).to(device))["visual"][:, model.context :]
        z = z["visual"][:, model.context - 1 :]  # (B, 1 + T, N, d): the last known frame, then what came
        z, last = z[:, 1:], z[:, :1]
        variance = (z - z.mean((0, 1))).square().mean()
        predictions = {"model": imagined, "copy": last, "simulator": encode(model, moved, device)["visual"][:, 1:]}
        curves[run] = {k: ((p - z).square().mean((0, 2, 3)) / variance).tolist() for k, p in predictions.items()}
    return curves


# ---------------------------------------------------------------------------------------------------------
# Reporting, and the script


def print_horizon_error(curves, count):
    steps = [h for h in (1, 2, 3, 5, 10, 15, 20, 30, 50) if h <= len(next(iter(curves.values()))["model"])]
    width = max(len(run) for run in [*curves, "  simulator"]) + 2
    print(f"\nerror of the visual latent over its variance, {count} trajectories, by model steps imagined")
    print(" " * width + "".join(f"{h:>9}" for h in steps))
    for run, by_name in curves.items():
        for name, curve in by_name.items():
            label = {"model": run, "copy": "  copying", "simulator": "  simulator"}[name]
            print(label.ljust(width) + "".join(f"{curve[h - 1]:9.4f}" for h in steps))


def draw_horizon_error(curves, path):
    """One colour for each run. Its copying is dotted and its moved simulator dashed, which the legend says in grey."""
    lines, styles = [], {"model": "-", "copy": ":", "simulator": "--"}
    for i, (run, by_name) in enumerate(curves.items()):
        for name, curve in by_name.items():
            steps = np.arange(1, len(curve) + 1)
            lines.append((steps, curve, f"C{i}{styles[name]}", run if name == "model" else None))
    for name, label in (("copy", "copying"), ("simulator", f"simulator, moved by {PERTURBATION} std")):
        lines.append(([], [], f"C7{styles[name]}", label))
    axes = dict(xlabel="model steps imagined", ylabel="squared error / variance", yscale="log")
    write_plot(path, lines, figsize=(6.5, 3.4), legend="outside", **axes)


def main():
    parser = common.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--ckpt", nargs="+", help="the runs to compare, ours or released by DINO-WM (default: the newest under runs/)")
    add("--steps", type=positive, default=20, help="number of model steps to imagine")
    add("--seed", type=common.seed_number, nargs="+", default=[99], help="seeds of the trajectories")
    add("--n-evals", type=positive, default=50, help="number of trajectories per seed")
    add("--shift", choices=SHIFTS, help="let the world appear otherwise than in training")
    add("--data", help="data set of a released run's statistics (default: the one trained on)")
    add("--weights", help="pretrained weights for the encoder of a released run, which lacks them; as in train.py")
    add("--name", help="name of the result under plan_outputs/ (default: the first run's)")
    add("--device", type=common.available_device, default=common.default_device(), help="where to compute")
    args = parser.parse_args()
    args.ckpt, device = args.ckpt or [newest_run()], torch.device(args.device)
    out = common.output_folder("plan_outputs", args.name or Path(args.ckpt[0]).resolve().name)
    models = {run: load_model(run, device, args.data, args.weights) for run in args.ckpt}
    worlds = {(model.world["env"], model.world["img_size"], model.frameskip) for model in models.values()}
    if len(worlds) > 1:
        raise UserError("only runs of one environment, --img-size and --frameskip can be compared")
    env, count = open_world(models[args.ckpt[0]], args.shift), len(args.seed) * args.n_evals
    curves = horizon_error(env, models, args.steps, count, args.seed, device)
    common.write_json(out / "horizon_error.json", {"args": vars(args), "curves": curves})
    draw_horizon_error(curves, out / "horizon_error.png")
    print_horizon_error(curves, count)
    print(f"\n{out}/ holds horizon_error.json and horizon_error.png")


if __name__ == "__main__":
    common.run_script(main)
