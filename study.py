"""The study: which visual representation makes an action-conditioned world model plan best?

Every encoder gets the same frames, the same transition model, the same number of gradient steps, and the same goals
with the same CEM budget; only the eyes differ. PointMaze-UMaze alone hardly separates them (DINO-WM,
arXiv:2411.04983: 0.94 to 0.98), so it is looked at where they should differ: after one MPC iteration, in a larger maze,
and in a world that looks otherwise than the one trained on. What is measured, for each encoder, maze and seed:

    success       of the problems, within 1, 2, ... MPC iterations; and by shift of the look, within one
    latent error  of the next frame, over that of predicting no change
    drift         error of the latent imagined h steps ahead, over its variance         (plan.py: horizon_error)
    probe         R^2 of (x, y, vx, vy), read off the tokens of one frame by ridge regression

    python study.py                                          # the laptop set: no download, 75 minutes on two cores
    python study.py --encoder dinov2,dinov2@random,r3m@r3m.pth --steps 20000 --n-evals 50    # ENCODER@WEIGHTS; a GPU

Writes runs/NAME/: a run for each (maze, encoder, seed) as train.py does, with its measurements in study.json; and of
all of them table.md and study.png. Interrupted, it goes on where it stopped; runs that are there are not made again, so
that encoders and seeds can be added.
"""

import contextlib
import csv
import functools
import itertools
import json
import math
import os
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
from tqdm import tqdm

import plan
import released
import train
from data import SHIFTS, Parser, UserError, Workers, make_env, natural, positive, read_json, run_script, write_atomic
from predictor import WorldModel, build_eyes
from vae_mdnrnn import available_device

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LAPTOP = "pca,vae,vae_map,patches,vjepa_tiny"
SHIFTED = "pointmaze"  # where other looks are planned in


def names(text):
    """An `argparse` type: each of a,b,c once."""
    return list(dict.fromkeys(name for name in text.split(",") if name))


def naturals(text):
    return list(dict.fromkeys(natural(number) for number in names(text)))


def get_args():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--encoder", type=names, default=LAPTOP, help="which, as ENCODER or ENCODER@WEIGHTS (train.py --weights)")
    add("--env", type=names, default="pointmaze,pointmaze-medium", help="the mazes")
    add("--seeds", type=naturals, default="0,1,2", help="of fitting, training, problems and CEM")
    add("--shift", type=names, default=",".join(SHIFTS), help=f"other looks of {SHIFTED} to plan in")
    add("--img-size", type=positive, default=64, help="side of the frames, in pixels")
    add("--episodes", type=positive, default=3000, help="of each maze's data set, if it is not there")
    add("--steps", type=positive, default=3000, help="gradient steps of the transition model")
    add("--batch-size", type=positive, default=32, help="windows per step")
    add("--depth", type=positive, default=2, help="its layers")
    add("--n-evals", type=positive, default=32, help="problems per seed")
    add("--max-iter", type=positive, default=3, help="MPC iterations")
    add("--num-samples", type=positive, default=64, help="CEM candidates")
    add("--topk", type=positive, default=8, help="CEM elites")
    add("--opt-steps", type=positive, default=5, help="CEM iterations per plan")
    add("--drift", type=positive, default=10, help="model steps ahead at which imagination is looked at")
    add("--workers", type=positive, help="runs at a time (default: one per core; 1 on a GPU)")
    add("--name", default="study", help="of the result, under runs/")
    add("--device", type=available_device, default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.workers = args.workers or (os.cpu_count() if args.device == "cpu" else 1)
    for option in ("encoder", "env", "seeds"):
        if not getattr(args, option):
            raise UserError(f"--{option} names nothing")
    if unknown := set(args.shift) - set(SHIFTS):
        raise UserError(f"unknown --shift {', '.join(unknown)}; known: {', '.join(SHIFTS)}")
    return args


# ---------------------------------------------------------------------------------------------------------
# One run: train, plan, measure


def flags(args, *options):
    """Our own `options`, as the scripts that are called take them."""
    return [f"--{option.replace('_', '-')}={getattr(args, option)}" for option in options]


def run_name(args, env, encoder, seed):
    return f"{args.name}/{env}_{encoder.replace('/', '-')}_{seed}"


def run_path(*run):
    return Path("runs") / run_name(*run)


def train_args(args, env, encoder, seed):
    """train.py's arguments for one run of the study: the laptop's transition model, whatever the tokens."""
    name, _, weights = encoder.partition("@")
    sizes = [f"--{k.replace('_', '-')}={v}" for k, v in train.LAPTOP.items() if k != "depth"]
    own = ["--env", env, "--encoder", name, "--seed", str(seed), "--name", run_name(args, env, encoder, seed)]
    own += ["--weights", weights] if weights else []
    return train.get_args(own + sizes + flags(args, "img_size", "episodes", "steps", "batch_size", "depth", "device"))


def plan_args(args, directory, seed):
    own = ["--ckpt", str(directory), "--seed", str(seed), "--baselines", "random,oracle"]
    budget = flags(args, "n_evals", "max_iter", "num_samples", "topk", "opt_steps", "device")
    return plan.get_args(own + budget)


def success(model, env, problems, settings):
    """Success rates within 1, 2, ... MPC iterations."""
    worlds = plan.Worlds(env, *problems)
    device = torch.device(settings.device)
    cost = plan.latent_cost(model, worlds, settings.alpha, device)
    return plan.solve(worlds, cost, model, settings, device).float().mean(1).tolist()


def linear_probe(tokens, states, train_rows, val_rows, ridge=1e-4):
    """R^2 (P,) on `val_rows` of states (S, P), read linearly off all numbers of a frame's tokens (S, N, d).

    Ridge regression in its dual form, X^T (X X^T + lambda I)^-1 Y: a frame may have more numbers than there are rows.
    """

    def features(rows):
        return torch.from_numpy(np.asarray(tokens[rows], np.float32)).flatten(1).double()

    x, y, truth = features(train_rows), *(torch.from_numpy(states[rows]).double() for rows in (train_rows, val_rows))
    mean, center = x.mean(0), y.mean(0)
    x -= mean
    gram = x @ x.T
    gram.diagonal().add_(ridge * gram.trace())
    weights = x.T @ torch.linalg.solve(gram, y - center)
    error = (features(val_rows) - mean) @ weights + center - truth
    return (1 - error.square().mean(0) / truth.var(0, unbiased=False)).tolist()


def measure(args, env_name, encoder, seed):
    """Trains one run, plans with it, and writes what was measured to its study.json."""
    directory, start = run_path(args, env_name, encoder, seed), time.perf_counter()
    train.train(train_args(args, env_name, encoder, seed))
    trained = time.perf_counter()
    model = WorldModel.load(directory, args.device)
    settings, env = plan_args(args, directory, seed), make_env(env_name, args.img_size)
    problems = plan.make_problems(env, settings, model.frameskip)
    result = {"tokens": model.encoder.num_patches, "dim": model.encoder.dim, "train_seconds": trained - start}
    result["success"] = success(model, env, problems, settings)
    result["plan_seconds"] = time.perf_counter() - trained
    result["controls"] = plan.controls(env, *problems, model, settings)
    settings.max_iter = 1
    result["shift"] = {
        shift: success(model, make_env(env_name, args.img_size, shift), problems, settings)[0]
        for shift in args.shift if env_name == SHIFTED
    }  # fmt: skip
    with open(directory / "log.csv") as file:
        last = list(csv.DictReader(file))[-1]
    result["latent_error"] = float(last["val_visual"]) / float(last["copy"])
    result["drift"] = plan.horizon_error(env, {"": model}, args.drift, args.n_evals, [seed], args.device)[""]
    dataset = released.open_dataset(model.world["data"])
    rows = [dataset.rows(episodes) for episodes in dataset.split()]
    rows = [r[:: -(-len(r) // most)] for r, most in zip(rows, (4000, 1000), strict=True)]
    tokens = train.token_cache(model.encoder, dataset, args.device)
    result["probe"] = linear_probe(tokens, dataset.states, *rows)
    write_atomic(directory / "study.json", lambda path: path.write_text(json.dumps(result, indent=1)))


def run_quietly(args, job):
    """`measure`, one thread of its own for each worker; what it prints goes to a file beside its folder."""
    if args.device == "cpu":
        torch.set_num_threads(max(1, os.cpu_count() // args.workers))
    with open(f"{run_path(args, *job)}.log", "w") as log:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            measure(args, *job)
    return job


# ---------------------------------------------------------------------------------------------------------
# All runs: table and figure

STUDENT_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # its 97.5 % quantile, 1 to 9 degrees of freedom


def interval(values):
    """Means (...) of values (seeds, ...), and the half widths of their 95 % intervals over seeds (Student's t)."""
    values, n = np.array(values, float), len(values)
    if n == 1:
        return values[0], np.full(values.shape[1:], np.nan)
    return values.mean(0), STUDENT_T[min(n - 2, 8)] * values.std(0, ddof=1) / math.sqrt(n)


def text(values, digits=2):
    mean, half = interval(values)
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if np.isfinite(half) else "")


def write_tables(args, results):
    """table.md: a table of all measurements for each maze, and one of the shifts. Every ± is over seeds."""
    last, lines = args.max_iter - 1, []
    for env in args.env:
        lines += [f"{env}, {args.n_evals} goals a seed", ""]
        lines += [f"| encoder | tokens | within 1 | within {args.max_iter} | latent error | drift at {args.drift} "
                  "| probe x, y | probe vx, vy | train s | plan s |", "|" + " --- |" * 10]  # fmt: skip
        first = results[env, args.encoder[0]]
        for control in ("random", "oracle"):
            rates = [[run["controls"][control][k] for run in first] for k in (0, last)]
            lines.append(f"| {control} | | {text(rates[0])} | {text(rates[1])} |" + " |" * 6)
        for encoder in args.encoder:
            runs = results[env, encoder]
            cells = [encoder, f"{runs[0]['tokens']} × {runs[0]['dim']}"]
            cells += [text([run["success"][k] for run in runs]) for k in (0, last)]
            cells += [text([run["latent_error"] for run in runs], 3), text([run["drift"]["model"][-1] for run in runs])]
            cells += [text([np.mean(run["probe"][part]) for run in runs]) for part in (slice(2), slice(2, 4))]
            cells += [f"{np.mean([run[k] for run in runs]):.0f}" for k in ("train_seconds", "plan_seconds")]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    if SHIFTED in args.env:
        lines += [f"{SHIFTED} in another look, within 1", "", f"| encoder | plain | {' | '.join(args.shift)} |"]
        lines.append("|" + " --- |" * (2 + len(args.shift)))
        for encoder in args.encoder:
            runs = results[SHIFTED, encoder]
            cells = [text([run["success"][0] for run in runs])]
            cells += [text([run["shift"][shift] for run in runs]) for shift in args.shift]
            lines.append(f"| {encoder} | " + " | ".join(cells) + " |")
    write_atomic(Path("runs") / args.name / "table.md", lambda path: path.write_text("\n".join(lines) + "\n"))
    print("\n" + "\n".join(lines))


def draw(args, results, path):
    """Success by budget for each maze, success by look, and drift by horizon; intervals over seeds."""
    panels = len(args.env) + (SHIFTED in args.env) + 1
    figure, axes = plt.subplots(-(-panels // 2), 2, figsize=(9, 3.2 * -(-panels // 2)), layout="constrained")
    axes = iter(axes.flat)
    for env, ax in zip(args.env, axes, strict=False):
        k = np.arange(1, args.max_iter + 1)
        for i, encoder in enumerate(args.encoder):
            mean, half = interval([run["success"] for run in results[env, encoder]])
            ax.errorbar(k + 0.03 * (i - len(args.encoder) / 2), mean, half, marker="o", ms=3, capsize=2, label=encoder)
        for control, style in (("oracle", "--"), ("random", ":")):
            mean, _ = interval([run["controls"][control] for run in results[env, args.encoder[0]]])
            ax.plot(k, mean, style, color="gray", label=plan.CONTROLS[control])
        ax.set(title=env, xlabel="MPC iterations", ylabel="success", ylim=(0, 1.05), xticks=k)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=7, frameon=False)
    if SHIFTED in args.env:
        ax, width = next(axes), 0.8 / len(args.encoder)
        for i, encoder in enumerate(args.encoder):
            runs = results[SHIFTED, encoder]
            mean, half = interval([[run["success"][0], *(run["shift"][s] for s in args.shift)] for run in runs])
            ax.bar(np.arange(len(mean)) + (i + 0.5) * width - 0.4, mean, width, yerr=half, capsize=2)
        ax.set(title=f"{SHIFTED} in another look", ylabel="success within 1", ylim=(0, 1.05))
        ax.set_xticks(np.arange(1 + len(args.shift)), ["plain", *args.shift], rotation=20)
    ax = next(axes)
    for i, encoder in enumerate(args.encoder):
        for name, style in (("model", "-"), ("copy", ":")):
            mean, half = interval([run["drift"][name] for run in results[args.env[0], encoder]])
            h = np.arange(1, len(mean) + 1)
            ax.plot(h, mean, style, color=f"C{i}")
            ax.fill_between(h, mean - half, mean + half, color=f"C{i}", alpha=0.15, lw=0)
    ax.set(title=f"{args.env[0]} imagined (dotted: copied)", yscale="log")
    ax.set(xlabel="model steps ahead", ylabel="latent error / variance")
    for ax in axes:
        ax.axis("off")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main():
    args = get_args()
    root = Path("runs") / args.name
    fixed = {k: v for k, v in vars(args).items() if k not in ("encoder", "env", "seeds", "workers", "device")}
    if (root / "args.json").exists():
        before = read_json(root / "args.json")
        if changed := [f"--{name.replace('_', '-')}" for name in fixed if before.get(name) != fixed[name]]:
            raise UserError(f"{root} was begun with other {', '.join(changed)}: choose a --name")
    jobs = list(itertools.product(args.env, args.encoder, args.seeds))
    for env, encoder, seed in jobs:  # what is unknown or not there is said before anything is trained
        settings = train_args(args, env, encoder, seed)
        plan_args(args, run_path(args, env, encoder, seed), seed)
        if settings.encoder == "state":
            raise UserError("the study compares what is seen: --encoder state sees nothing")
        if seed == args.seeds[0]:
            build_eyes(settings.encoder, settings.encoder_img_size, settings.weights)
    for env in args.env:
        train.open_dataset(train_args(args, env, args.encoder[0], 0))
    write_atomic(root / "args.json", lambda path: path.write_text(json.dumps(fixed, indent=1)))

    left = [job for job in jobs if not (run_path(args, *job) / "study.json").exists()]
    # A seed of everything, then the next; the encoder that is named first comes last: a short run to end with.
    left.sort(key=lambda job: (job[2], -args.encoder.index(job[1])))
    with Workers(min(args.workers, max(1, len(left)))) as pool:
        for job in tqdm(pool.map(functools.partial(run_quietly, args), left, 1), "study", len(left), unit="run"):
            tqdm.write("done: " + " ".join(map(str, job)))
    results = {}
    for env, encoder, seed in jobs:
        results.setdefault((env, encoder), []).append(read_json(run_path(args, env, encoder, seed) / "study.json"))
    write_tables(args, results)
    write_atomic(root / "study.png", lambda path: draw(args, results, path))
    print(f"\n{root}/ holds table.md, study.png and the runs")


if __name__ == "__main__":
    run_script(main)
