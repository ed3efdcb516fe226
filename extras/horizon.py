"""The error of imagination by horizon: how a world model departs from its world, step by step.

The world and the model start from the same frames and take the same random actions. After h of their T steps the world
shows a frame with the visual latent z_h, and the model has imagined z^_h:

    e_h = mean ||z^_h - z_h||^2 / Var z        over the trajectories and the numbers of a latent

At e_h = 1 imagination is no better than always predicting the mean. Each curve stands beside two others: "copy" repeats
the last known frame, and "simulator" is the true world from a state moved by a hundredth of the data's standard
deviation. If the world cannot be put into a state, or is not one of ours, the trajectories are windows of the
validation episodes of the model's data set, and there is no simulator.

    python -m extras.horizon --ckpt runs/a runs/b --steps 20

Writes plan_outputs/NAME/: horizon_error.json and horizon_error.png.
"""

from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import Dataset, Windows
from lib import common
from lib.pictures import write_plot
from lib.pointmaze import SHIFTS
from lib.worlds import can_be_set
from plan import Worlds, newest_run, open_episodes, open_world
from predictor import load_model


def record(env, states, actions, frameskip):
    """Takes actions (B, T, A) from states (B, P). Returns observations {name: (B, T + 1, ...)} and the T + 1 states."""
    T, visited = actions.shape[1], [states]
    worlds = Worlds(env, states, states, history=T + 1, frameskip=frameskip)
    for t in tqdm(range(T), desc="simulate", unit="step"):
        worlds.act(np.arange(len(states)), actions[:, t : t + 1])
        visited.append(worlds.states.copy())
    return worlds.past, visited


def encode(model, obs, device, first=0):
    """The latents of the frames from `first` on. One trajectory at a time keeps the memory of a large encoder small."""
    obs = {name: torch.from_numpy(o[:, first:]).split(1) for name, o in obs.items()}
    latents = [model.encode({name: o[i].to(device) for name, o in obs.items()}) for i in range(len(obs["visual"]))]
    return {name: torch.cat([z[name] for z in latents]) for name in latents[0]}


def simulated(env, model, before, T, count, rng):
    """`count` trajectories of random actions: observations {name: (count, before + 1 + T, ...)} and the actions between
    them. The third result is what is observed, from step `before` on, in a world that is moved a little there."""
    starts = np.array([env.sample_state(rng) for _ in range(count)])
    shape = (count, before + T, model.frameskip, *env.action_space.shape)
    actions = rng.uniform(env.action_space.low, env.action_space.high, shape).astype(np.float32).reshape(*shape[:2], -1)
    obs, states = record(env, starts, actions, model.frameskip)
    noise = 0.01 * model.proprio_std.cpu().numpy() * rng.normal(size=starts.shape)
    moved, _ = record(env, states[before] + noise, actions[:, before:], model.frameskip)
    return obs, actions, moved


def recorded(dataset, model, before, T, count, rng):
    """The same for windows of a data set's validation episodes, drawn at random. The third result is None, because a
    recording cannot start elsewhere."""
    episodes, length = dataset.split()[1], before + 1 + T
    longest = (dataset.episode_ends - dataset.episode_starts)[episodes].max() * dataset.meta["frameskip"]
    if length > longest // model.frameskip:
        have = f"the validation episodes of {dataset.path} have {longest // model.frameskip} model steps at most"
        raise common.UserError(f"{have}, and --steps {T} wants {length}: give fewer --steps")
    windows = Windows(dataset, episodes, length, model.frameskip)
    batch = windows.batch(rng.integers(len(windows), size=count), dataset.frames)
    obs = {"visual": batch["visual"].byte().numpy(), "proprio": batch["proprio"].numpy()}
    return obs, batch["action"][:, :-1].numpy(), None


@torch.no_grad()
def horizon_error(world, models, T, count, seeds, device):
    """The errors of the models {run: model}, each in its own latents, over `count` trajectories that all of them share:
    {run: {"model": [e_1, ..., e_T], "copy": [...], "simulator": [...]}}. A model knows as many frames as its training
    rollouts start from, and imagines the T frames after them. `world` is an environment, or a data set."""
    reference, rng = next(iter(models.values())), np.random.default_rng([*seeds, 2])
    before = max(model.context for model in models.values()) - 1  # true frames that come before the last known one
    trajectories = recorded if isinstance(world, Dataset) else simulated
    obs, actions, moved = trajectories(world, reference, before, T, count, rng)

    curves = {}
    for run, model in models.items():
        first = before + 1 - model.context
        z = encode(model, obs, device, first)
        known = {name: latent[:, : model.context] for name, latent in z.items()}
        imagined = model.rollout(known, torch.from_numpy(actions[:, first:]).to(device))["visual"][:, model.context :]
        last, z = z["visual"][:, model.context - 1 :].split([1, T], 1)  # the last known frame, and the T that came
        variance = (z - z.mean((0, 1))).square().mean()
        predictions = {"model": imagined, "copy": last}
        if moved:
            predictions["simulator"] = encode(model, moved, device)["visual"][:, 1:]
        curves[run] = {k: ((p - z).square().mean((0, 2, 3)) / variance).tolist() for k, p in predictions.items()}
    return curves


def report(curves, T, count, path):
    """Prints the curves at some steps, and draws them: a colour for each run, and a style for each kind of curve."""
    styles = {"model": "-", "copy": ":", "simulator": "--"}
    lines, shown = [], [h for h in (1, 2, 3, 5, 10, 15, 20, 30, 50) if h <= T]
    width = max(len(run) for run in [*curves, "  simulator"]) + 2
    print(f"\nerror of the visual latent over its variance, {count} trajectories, by model steps imagined")
    print(" " * width + "".join(f"{h:>9}" for h in shown))
    for i, (run, by_name) in enumerate(curves.items()):
        for name, curve in by_name.items():
            label = run if name == "model" else f"  {name}"
            print(label.ljust(width) + "".join(f"{curve[h - 1]:9.4f}" for h in shown))
            lines.append((range(1, T + 1), curve, f"C{i}{styles[name]}", run if name == "model" else None))
    lines += [([], [], f"C7{styles[name]}", name) for name in list(by_name)[1:]]  # in grey, for the legend
    axes = dict(xlabel="model steps imagined", ylabel="squared error / variance", yscale="log")
    write_plot(path, lines, figsize=(6.5, 3.4), legend="outside", **axes)


def main():
    parser = common.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--ckpt", nargs="+", help="the runs to compare, ours or released by DINO-WM (default: the newest under runs/)")
    add("--steps", type=common.positive, default=20, help="number of model steps to imagine")
    add("--seed", type=common.seed_number, nargs="+", default=[99], help="seeds for sampling the trajectories")
    add("--n-evals", type=common.positive, default=50, help="number of trajectories for each seed that is given")
    add("--shift", choices=SHIFTS, help="let the world look different from how it looked in training")
    data = "data set of a released run's statistics, and of a world that cannot be put into a state "
    add("--data", help=data + "(default: the one trained on)")
    add("--weights", help="pretrained weights for the encoder of a released run, which lacks them; as in train.py")
    add("--name", help="name of the result under plan_outputs/ (default: the first run's)")
    add("--device", type=common.available_device, default=common.default_device(), help="where to compute")
    args = parser.parse_args()
    args.ckpt, device = args.ckpt or [newest_run()], torch.device(args.device)
    out = common.output_folder("plan_outputs", args.name or Path(args.ckpt[0]).resolve().name)
    models = {run: load_model(run, device, args.data, args.weights) for run in args.ckpt}
    if drawn := [run for run, model in models.items() if not hasattr(model, "rollout")]:
        raise common.UserError(f"{drawn[0]} generates a video to the goal, and cannot predict the outcome of actions")
    if mixed := [run for run, model in models.items() if not getattr(model, "alone", True)]:
        raise common.UserError(f"a latent of {mixed[0]} depends on earlier frames, so an imagined one has no true one")
    if len({(model.world["env"], model.world["img_size"], model.frameskip) for model in models.values()}) > 1:
        raise common.UserError("only runs of one environment, --img-size and --frameskip can be compared")
    model, count = models[args.ckpt[0]], len(args.seed) * args.n_evals
    simulates = can_be_set(model.world["env"])
    if args.shift and not simulates:
        raise common.UserError(f"{model.world['env']} has no other appearance: --shift is for the mazes")
    world = open_world(model, args.shift) if simulates else open_episodes(args, model)
    curves = horizon_error(world, models, args.steps, count, args.seed, device)
    common.write_json(out / "horizon_error.json", {"args": vars(args), "curves": curves})
    report(curves, args.steps, count, out / "horizon_error.png")
    print(f"\n{out}/ holds horizon_error.json and horizon_error.png")


if __name__ == "__main__":
    common.run_script(main)
