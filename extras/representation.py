"""The study: which encoder makes an action-conditioned world model plan best?

Every encoder gets the same frames, transition model, gradient steps, goals and budget of CEM. PointMaze-UMaze hardly
tells encoders apart when there is time to replan (DINO-WM, arXiv:2411.04983: 0.94 to 0.98). So they are also compared
after a single plan, in a larger maze, and in a world that appears otherwise than in training. Each run measures

    success       the share of the problems that are solved within 1, 2, ... MPC iterations; with each shift, within one
    latent error  the error of the predicted next latent, divided by the error of predicting no change
    drift         the error of the latent imagined h steps ahead, divided by its variance (extras/horizon.py)
    probe         R^2 of (x, y, vx, vy), read off the tokens of one frame by ridge regression

    python -m extras.representation                  # the laptop set: no download, 75 minutes on two cores
    python -m extras.representation --encoder dinov2,dinov2@random,r3m@r3m.pth --steps 20000 --n-evals 50    # on a GPU

Writes runs/NAME/: a run of train.py for each maze, encoder and seed, with its measurements in study.json; the controls
for each maze and seed; table.md and study.png. When the same command is given again, an interrupted study goes on.
Encoders, mazes and seeds can be added later.
"""

import contextlib
import os
import time
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from tqdm import tqdm

import data
import plan
import train
from encoders import build_encoder
from extras.horizon import horizon_error
from lib import common, pictures
from lib.pointmaze import SHIFTS
from lib.worlds import ENVIRONMENTS, make_env
from predictor import WorldModel

LAPTOP = "pca,vae,vae_map,patches,vjepa_tiny"
SHIFTED = "pointmaze"  # the maze in which the shifts are tried
CONTROLS = "controls"  # stands in the encoder's place where the random policy and the true simulator are measured

TRAINING = dict(img_size=64, steps=3000, batch_size=32)  # flags of train.py that are passed on, with other defaults
PLANNING = dict(n_evals=32, max_iter=3, num_samples=64, topk=8, opt_steps=5)  # and flags of plan.py


def run_path(args, env, encoder, seed):
    return Path("runs", args.name, f"{env}_{encoder.replace('/', '-')}_{seed}")


def passed_on(args, options):
    return [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in [*options, "device"]]


def train_args(args, env, encoder, seed):
    """train.py's arguments for one run. Every encoder gets the transition model that train.py gives a single token."""
    name, _, weights = encoder.partition("@")
    run = run_path(args, env, encoder, seed).relative_to("runs")
    sizes = ",".join(f"{size}={value}" for size, value in (train.LAPTOP | {"depth": args.depth}).items())
    own = [f"--env={env}", f"--encoder={name}", f"--seed={seed}", f"--sizes={sizes}", f"--name={run}"]
    own += [f"--weights={weights}"] * bool(weights)
    return train.get_args(own + passed_on(args, TRAINING))


def plan_args(args, seed):
    return plan.get_args([f"--seed={seed}", "--baselines=random,oracle", *passed_on(args, PLANNING)])


def measure(args, env_name, encoder, seed):
    """Trains one run, plans with it, and returns what is measured."""
    directory, device, start = run_path(args, env_name, encoder, seed), torch.device(args.device), time.perf_counter()
    train.train(train_args(args, env_name, encoder, seed))
    trained = time.perf_counter()
    model, env = WorldModel.load(directory, device), make_env(env_name, args.img_size)
    settings = plan.settle(plan_args(args, seed), "mpc-cem", model)
    problems = plan.get_problems(env, settings, model)
    result = {"tokens": model.encoder.num_patches, "dim": model.encoder.dim, "train_seconds": trained - start}
    result["success"] = success(model, env, problems, settings)
    result["plan_seconds"] = time.perf_counter() - trained

    settings.max_iter, result["shift"] = 1, {"plain": result["success"][0]}
    for shift in args.shift if env_name == SHIFTED else []:
        (result["shift"][shift],) = success(model, make_env(env_name, args.img_size, shift), problems, settings)
    last = np.atleast_1d(np.genfromtxt(directory / "log.csv", delimiter=",", names=True))[-1]
    result["latent_error"] = float(last["val_visual"] / last["copy"])
    result["drift"] = horizon_error(env, {"": model}, args.drift, args.n_evals, [seed], device)[""]

    dataset = data.open_dataset(model.world["data"])
    rows = [r[:: -(-len(r) // most)] for r, most in zip(map(dataset.rows, dataset.split()), (4000, 1000), strict=True)]
    result["probe"] = linear_probe(data.token_cache(model.encoder, dataset, device), dataset.states, rows)
    return result


def success(model, env, problems, settings):
    """Success rates within 1, 2, ... MPC iterations."""
    worlds, device = plan.Worlds(env, *problems), torch.device(settings.device)
    return plan.solve(worlds, plan.latent_cost(model, worlds, device), model, settings, device).float().mean(1).tolist()


def linear_probe(tokens, states, rows, ridge=1e-4):
    """R^2 (P,) of states (S, P) that are read linearly off all numbers of a frame's tokens (S, N, d). A frame may have
    more numbers than there are rows, so ridge regression is solved in its dual form, X^T (X X^T + lambda I)^-1 Y.
    `rows` are those to learn from, and those to measure on."""
    x, x_val, y, truth = (torch.from_numpy(a[r].astype(float)).flatten(1) for a in (tokens, states) for r in rows)
    mean, center = x.mean(0), y.mean(0)
    x -= mean
    gram = x @ x.T
    gram.diagonal().add_(ridge * gram.trace())
    readout = x.T @ torch.linalg.solve(gram, y - center)
    error = (x_val - mean) @ readout + center - truth
    return (1 - error.square().mean(0) / truth.var(0, unbiased=False)).tolist()


def measure_controls(args, env_name, seed):
    """Returns the controls' success rates on the problems of a maze and a seed, which all encoders share. The model
    here never imagines anything: it only knows how the data's actions are spread, from which CEM draws."""
    dataset = data.open_dataset(data.default_folder(env_name, args.img_size))
    spread = dataset.statistics(dataset.split()[0])
    model = WorldModel(build_encoder("state"), spread["action"], spread["proprio"], depth=1)
    env, settings = make_env(env_name, args.img_size), plan.settle(plan_args(args, seed), "mpc-cem", model)
    return plan.controls(env, *plan.get_problems(env, settings, model), model, settings)


def run_job(args_and_job):
    """Measures one run, or controls, with a worker's share of the cores. What is printed goes to a .log file."""
    args, env, encoder, seed = args_and_job
    path = run_path(args, env, encoder, seed)
    common.keep_freed_memory()
    if args.device == "cpu":
        torch.set_num_threads(max(1, os.cpu_count() // args.workers))
    with open(f"{path}.log", "w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        result = measure_controls(args, env, seed) if encoder == CONTROLS else measure(args, env, encoder, seed)
    common.write_json(path / "study.json", result)


def interval(values):
    """Means (...) of values (seeds, ...), and half the widths of their 95 % intervals (Student's t)."""
    values, n = np.array(values, float), len(values)
    return values.mean(0), stats.t.ppf(0.975, n - 1) * values.std(0, ddof=min(1, n - 1)) / np.sqrt(n)


def cell(values, digits=2):
    mean, half = interval(values)
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if np.isfinite(half) else "")


def table(title, header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join([title, "", *(f"| {' | '.join(line)} |" for line in lines), "", ""])


def write_tables(args, results, path):
    """Writes a table of all measurements for each maze, and one of the shifts. Every ± is over seeds."""
    header = ["encoder", "tokens", "within 1", f"within {args.max_iter}", "latent error", f"drift at {args.drift}"]
    header += ["probe x, y", "probe vx, vy", "train s", "plan s"]
    tables, shown = "", ["plain", *args.shift]
    for env in args.env:
        rows = []
        for control in plan.CONTROLS:
            rates = np.array([run[control] for run in results[env, CONTROLS]])
            rows.append([control, "", cell(rates[:, 0]), cell(rates[:, -1]), *[""] * 6])
        for encoder in args.encoder:
            runs = results[env, encoder]
            row = [encoder, f"{runs[0]['tokens']} × {runs[0]['dim']}"]
            row += [cell([run["success"][k] for run in runs]) for k in (0, -1)]
            row += [cell([run["latent_error"] for run in runs], 3), cell([run["drift"]["model"][-1] for run in runs])]
            row += [cell([np.mean(run["probe"][part]) for run in runs]) for part in (slice(2), slice(2, 4))]
            row += [cell([run[name] for run in runs], 0) for name in ("train_seconds", "plan_seconds")]
            rows.append(row)
        tables += table(f"{env}, {args.n_evals} goals per seed", header, rows)
    if SHIFTED in args.env:
        runs = {encoder: results[SHIFTED, encoder] for encoder in args.encoder}
        rows = [[name, *(cell([run["shift"][shift] for run in of]) for shift in shown)] for name, of in runs.items()]
        tables += table(f"{SHIFTED} with each shift, success within 1", ["encoder", *shown], rows)
    common.write_atomic(path, tables)
    print("\n" + tables, end="")


def draw(args, results, path):
    """Draws success by budget for each maze, drift by horizon, and success by shift, with intervals over seeds."""
    mazes, shown = len(args.env), ["plain", *args.shift]
    k, h = (np.arange(1, n + 1) for n in (args.max_iter, args.drift))
    figure = pictures.new_figure((9, 3.2 * ((mazes + 3) // 2)))
    axes = figure.subplots((mazes + 3) // 2, 2).ravel()
    drift, shifts = axes[mazes : mazes + 2]
    for i, encoder in enumerate(args.encoder):
        aside = 0.04 * (i - len(args.encoder) / 2)  # curves stand a little apart, so that their intervals are seen
        for env, ax in zip(args.env, axes, strict=False):
            mean, half = interval([run["success"] for run in results[env, encoder]])
            ax.errorbar(k + aside, mean, half, marker="o", ms=3, capsize=2, label=encoder)
        for of, style in (("model", "-"), ("copy", ":")):
            mean, half = interval([run["drift"][of] for run in results[args.env[0], encoder]])
            drift.plot(h, mean, style, color=f"C{i}")
            drift.fill_between(h, mean - half, mean + half, color=f"C{i}", alpha=0.15, lw=0)
        if SHIFTED in args.env:
            mean, half = interval([[run["shift"][shift] for shift in shown] for run in results[SHIFTED, encoder]])
            shifts.errorbar(np.arange(len(shown)) + 3 * aside, mean, half, fmt="o", ms=3, capsize=2)
    for env, ax in zip(args.env, axes, strict=False):
        for control, style in (("oracle", "--"), ("random", ":")):
            mean, _ = interval([run[control] for run in results[env, CONTROLS]])
            ax.plot(k, mean, style, color="gray", label=plan.CONTROLS[control])
        ax.set(title=env, xlabel="MPC iterations", ylabel="success", ylim=(0, 1.05), xticks=k)
    drift.set(title=f"{args.env[0]} as imagined (dotted: copied)", yscale="log")
    drift.set(xlabel="model steps ahead", ylabel="latent error / variance")
    shifts.set(title=f"{SHIFTED} with each shift", ylabel="success within 1", ylim=(0, 1.05))
    shifts.set_xticks(np.arange(len(shown)), shown, rotation=20)
    for ax in axes[mazes + 1 + (SHIFTED in args.env) :]:
        ax.axis("off")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=7, frameon=False)
    pictures.save_figure(path, figure, dpi=120)


def several(parse):
    """An `argparse` type: "a,b,c" becomes a list of what `parse` makes of each part, without repetitions."""
    return lambda text: list(dict.fromkeys(parse(part) for part in text.split(",") if part))


def get_args():
    parser = common.Parser(description=__doc__.split("\n")[0])
    add, mazes = parser.add_argument, [name for name in ENVIRONMENTS if name.startswith("pointmaze")]
    add("--encoder", type=several(str), default=LAPTOP, help="encoders, as ENCODER or ENCODER@WEIGHTS (see train.py)")
    add("--env", type=common.names(mazes), default="pointmaze,pointmaze-medium", help="mazes to compare them in")
    add("--seeds", type=several(common.seed_number), default="0,1,2", help="seeds of training, of problems and of CEM")
    add("--shift", type=common.names(SHIFTS), default=",".join(SHIFTS), help=f"shifts of {SHIFTED} to plan with")
    add("--depth", type=common.positive, default=2, help="layers of the transition model")
    add("--drift", type=common.positive, default=10, help="number of model steps over which imagination is followed")
    for script, options in (("train.py", TRAINING), ("plan.py", PLANNING)):
        for name, default in options.items():
            add(f"--{name.replace('_', '-')}", type=common.positive, default=default, help=f"as in {script}")
    add("--workers", type=common.positive, help="number of runs at a time (default: one per core; 1 on a GPU)")
    add("--name", default="study", help="name of the study under runs/")
    add("--device", type=common.available_device, default=common.default_device(), help="where to compute")
    args = parser.parse_args()
    args.workers = args.workers or (os.cpu_count() if args.device == "cpu" else 1)
    if not (args.encoder and args.env and args.seeds):
        raise common.UserError("--encoder, --env and --seeds each have to name at least one")
    return args


def main():
    args = get_args()
    root = common.output_folder("runs", args.name)
    fixed = {k: v for k, v in vars(args).items() if k not in ("encoder", "env", "seeds", "workers", "device")}
    common.same_flags(root, fixed)
    plan_args(args, args.seeds[0])
    for encoder in args.encoder:  # what is unknown or missing is said before anything is trained
        settings = train_args(args, args.env[0], encoder, args.seeds[0])
        if settings.encoder == "state":
            raise common.UserError("the study compares what encoders make of frames, and --encoder state sees none")
        build_encoder(settings.encoder, train.encoder_img_size(settings), settings.weights)
    for env in args.env:
        train.open_or_collect(settings, env, args.img_size)
    common.write_json(root / "args.json", fixed)

    # One seed of everything, then the next. Within a seed short jobs come last: the first encoder, and the controls.
    jobs = [(env, name, seed) for seed in args.seeds for name in [*args.encoder[::-1], CONTROLS] for env in args.env]
    left = [(args, *job) for job in jobs if not (run_path(args, *job) / "study.json").exists()]
    with common.Workers(min(args.workers, max(1, len(left)))) as pool:
        list(tqdm(pool.map(run_job, left, 1), "study", len(left), unit="run"))
    results = {}  # {(maze, encoder): what was measured, a dictionary for each seed}
    for env, name, seed in jobs:
        results.setdefault((env, name), []).append(common.read_json(run_path(args, env, name, seed) / "study.json"))
    write_tables(args, results, root / "table.md")
    draw(args, results, root / "study.png")
    print(f"{root}/ holds table.md, study.png and the runs")


if __name__ == "__main__":
    common.run_script(main)
