"""The study: which encoder makes an action-conditioned world model plan best?

Every encoder gets the same frames, transition model, gradient steps, goals and budget of CEM. PointMaze-UMaze hardly
tells encoders apart when there is time to replan (DINO-WM, arXiv:2411.04983: 0.94 to 0.98). So they are also compared
after a single plan, in a larger maze, and in a world that looks different than in training. Each run measures

    success       the share of the problems that are solved within 1, 2, ... MPC iterations; with each shift, within one
    latent error  the error of the predicted next latent, divided by the error of predicting no change
    drift         the error of the latent imagined h steps ahead, divided by its variance (extras/horizon.py)
    probe         R^2 of (x, y, vx, vy), read off the tokens of one frame by ridge regression
    train, plan   the seconds that train.py takes, fitting the encoder included, and planning takes without a shift

    python -m extras.representation                  # the laptop set: no download, 75 minutes on two cores
    python -m extras.representation --encoder dinov2,dinov2@random,r3m@r3m.pth --steps 20000 --n-evals 50    # on a GPU

Writes runs/NAME/: a run of train.py for each maze, encoder and seed, with its measurements in study.json; the controls
for each maze and seed; table.md and study.png. The same command continues a study, and it may name
more encoders, mazes or seeds than before.
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
from lib import common, pictures, processes
from lib.common import UserError, positive
from lib.pointmaze import SHIFTS
from lib.worlds import ENVIRONMENTS, make_env
from predictor import WorldModel

SHIFTED, CONTROLS = "pointmaze", "controls"  # the maze that is shifted; what a job names instead of an encoder
TRAINING = dict(img_size=64, steps=3000, batch_size=32)  # flags of train.py that are passed on, with other defaults
PLANNING = dict(n_evals=32, max_iter=3, num_samples=64, topk=8, opt_steps=5)  # and flags of plan.py


def run_path(args, env, encoder, seed):
    return Path("runs", args.name, f"{env}_{encoder.replace('/', '-')}_{seed}")


def flags(args, options, **own):
    """The command line for another script: the flags `own`, and the values of our own flags `options` and --device."""
    own |= {name: getattr(args, name) for name in [*options, "device"]}
    return [f"--{name.replace('_', '-')}={value}" for name, value in own.items() if value != ""]


def train_args(args, env, encoder, seed):
    """train.py's arguments for one run. Every encoder gets the transition model that train.py gives a single token."""
    own = dict(env=env, seed=seed, name=run_path(args, env, encoder, seed).relative_to("runs"))
    own["encoder"], _, own["weights"] = encoder.partition("@")
    own["sizes"] = ",".join(f"{name}={value}" for name, value in (train.LAPTOP | {"depth": args.depth}).items())
    return train.get_args(flags(args, TRAINING, **own))


def plan_args(args, seed):
    return plan.get_args(flags(args, PLANNING, seed=seed, baselines="random,oracle"))


def measure(args, env_name, encoder, seed):
    """Trains one run, plans with it, and returns what is measured."""
    directory, device = run_path(args, env_name, encoder, seed), torch.device(args.device)
    start = time.perf_counter()
    train.train(train_args(args, env_name, encoder, seed))
    trained = time.perf_counter()
    model, env = WorldModel.load(directory, device), make_env(env_name, args.img_size)
    settings = plan.settle(plan_args(args, seed), "mpc-cem", model)
    problems = plan.get_problems(env, settings, model)

    def success(shift=None):  # within 1, 2, ... MPC iterations
        worlds = plan.Worlds(make_env(env_name, args.img_size, shift), *problems)
        reached = plan.solve(worlds, plan.latent_cost(model, worlds, device), model, settings, device)
        return reached.float().mean(1).tolist()

    result = {"tokens": model.encoder.num_patches, "dim": model.encoder.dim, "success": success()}
    result |= {"train_seconds": trained - start, "plan_seconds": time.perf_counter() - trained}
    settings.max_iter = 1
    result["shift"] = {shift: success(shift)[0] for shift in args.shift if env_name == SHIFTED}
    last = np.atleast_1d(np.genfromtxt(directory / "log.csv", delimiter=",", names=True))[-1]
    result["latent_error"] = float(last["val_visual"] / last["copy"])
    result["drift"] = horizon_error(env, {"": model}, args.drift, args.n_evals, [seed], device)[""]
    dataset = data.open_dataset(model.world["data"])
    rows = [r[:: -(-len(r) // most)] for r, most in zip(map(dataset.rows, dataset.split()), (4000, 1000), strict=True)]
    result["probe"] = linear_probe(data.token_cache(model.encoder, dataset, device), dataset.states, rows)
    return result


def linear_probe(tokens, states, rows, ridge=1e-4):
    """R^2 (P,) of states (S, P) that are read linearly off all numbers of a frame's tokens (S, N, d). A frame may have
    more numbers than there are rows, so ridge regression is solved in its dual form, X^T (X X^T + lambda I)^-1 Y.
    `rows` is a pair: the rows to learn from, and the rows to measure on."""
    x, x_val, y, truth = (torch.from_numpy(a[r].astype(float)).flatten(1) for a in (tokens, states) for r in rows)
    mean, center = x.mean(0), y.mean(0)
    gram = (x - mean) @ (x - mean).T
    gram.diagonal().add_(ridge * gram.trace())
    readout = (x - mean).T @ torch.linalg.solve(gram, y - center)
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
    processes.keep_freed_memory()
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


def stack(runs):
    """Turns dictionaries of numbers, one for each seed, into a dictionary of arrays (seeds, ...)."""
    return {k: stack([run[k] for run in runs]) for k in runs[0]} if isinstance(runs[0], dict) else np.array(runs)


def write_tables(args, results, path):
    """Writes a table for each maze. Every ± is a 95 % interval over seeds."""
    lines = []
    for env in args.env:
        shifts = results[env, args.encoder[0]]["shift"]
        header = ["encoder", "tokens", "within 1", f"within {args.max_iter}", *(f"with {shift}" for shift in shifts)]
        header += ["latent error", f"drift at {args.drift}", "probe x, y", "probe vx, vy", "train s", "plan s"]
        lines += [f"\n{env}, {args.n_evals} goals per seed\n", header, ["---"] * len(header)]
        for name, rates in results[env, CONTROLS].items():
            lines.append([name, "", cell(rates[:, 0]), cell(rates[:, -1]), *[""] * (len(header) - 4)])
        for encoder in args.encoder:
            run = results[env, encoder]
            row = [encoder, f"{run['tokens'][0]} × {run['dim'][0]}"]
            row += [cell(run["success"][:, 0]), cell(run["success"][:, -1]), *(cell(run["shift"][s]) for s in shifts)]
            row += [cell(run["latent_error"], 3), cell(run["drift"]["model"][:, -1])]
            row += [cell(run["probe"][:, :2].mean(1)), cell(run["probe"][:, 2:].mean(1))]
            lines.append(row + [f"{run[key].mean():.0f}" for key in ("train_seconds", "plan_seconds")])
    text = "\n".join(line if isinstance(line, str) else f"| {' | '.join(line)} |" for line in lines)
    common.write_atomic(path, text + "\n")
    print(text)


def draw(args, results, path):
    """Draws success by budget for each maze, drift by horizon, and success by shift, with intervals over seeds."""
    rows, shifted = (len(args.env) + 3) // 2, SHIFTED if SHIFTED in args.env else args.env[0]
    figure = pictures.new_figure((9, 3.2 * rows))
    *mazes, drift, shifts = (figure.add_subplot(rows, 2, i + 1) for i in range(len(args.env) + 2))

    def curve(ax, values, style, first=1, aside=0.0, label=None):
        mean, half = interval(values)
        x = np.arange(first, first + len(mean)) + 0.04 * aside  # a little apart, so that all intervals are seen
        ax.errorbar(x, mean, half, fmt=style, ms=3, capsize=2, label=label)

    for env, ax in zip(args.env, mazes, strict=True):
        for i, encoder in enumerate(args.encoder):
            curve(ax, results[env, encoder]["success"], f"C{i}o-", aside=i, label=encoder)
        for name, style in (("oracle", "k--"), ("random", "k:")):
            curve(ax, results[env, CONTROLS][name], style, label=plan.CONTROLS[name])
        ax.set(title=env, xlabel="MPC iterations", ylabel="success", ylim=(0, 1.05), xticks=range(1, args.max_iter + 1))
    for i, encoder in enumerate(args.encoder):
        for name, style in (("model", "-"), ("copy", ":")):
            curve(drift, results[args.env[0], encoder]["drift"][name], f"C{i}{style}")
        run = results[shifted, encoder]
        curve(shifts, np.column_stack([run["success"][:, 0], *run["shift"].values()]), f"C{i}o", first=0, aside=3 * i)
    drift.set(xlabel="model steps ahead (dotted: copied)", ylabel="latent error / variance", yscale="log")
    shifts.set(title=f"{shifted} with each shift", ylabel="success within 1", ylim=(0, 1.05))
    shifts.set_xticks(range(1 + len(run["shift"])), ["plain", *run["shift"]], rotation=20)
    figure.legend(*mazes[0].get_legend_handles_labels(), loc="outside lower center", ncols=7, frameon=False)
    pictures.save_figure(path, figure, dpi=120)


def main():
    parser = common.Parser(description=__doc__.split("\n")[0])
    add, mazes = parser.add_argument, [name for name in ENVIRONMENTS if name.startswith("pointmaze")]
    laptop = "pca,vae,vae_map,patches,vjepa_tiny"

    def several(parse):  # "a,b,c" becomes a list of what `parse` makes of each part, without repetitions
        return lambda text: list(dict.fromkeys(parse(part) for part in text.split(",") if part))

    add("--encoder", type=several(str), default=laptop, help="encoders, as ENCODER or ENCODER@WEIGHTS (see train.py)")
    add("--env", type=common.names(mazes), default="pointmaze,pointmaze-medium", help="mazes to compare them in")
    add("--seeds", type=several(common.seed_number), default="0,1,2", help="seeds of training, of problems and of CEM")
    add("--shift", type=common.names(SHIFTS), default=",".join(SHIFTS), help=f"shifts of {SHIFTED} to plan with")
    add("--depth", type=positive, default=2, help="layers of the transition model")
    add("--drift", type=positive, default=10, help="number of model steps over which imagination is followed")
    for name, default in (TRAINING | PLANNING).items():
        add(f"--{name.replace('_', '-')}", type=positive, default=default, help="is passed on to train.py or plan.py")
    add("--workers", type=positive, help="number of runs at a time (default: one per core; 1 on a GPU)")
    add("--name", default="study", help="name of the study under runs/")
    add("--device", type=common.available_device, default=common.default_device(), help="where to compute")
    args = parser.parse_args()
    args.workers = args.workers or (os.cpu_count() if args.device == "cpu" else 1)
    if not (args.encoder and args.env and args.seeds):
        raise UserError("--encoder, --env and --seeds each have to name at least one")
    root = common.output_folder("runs", args.name)
    fixed = {k: v for k, v in vars(args).items() if k not in ("encoder", "env", "seeds", "workers", "device")}
    common.same_flags(root, fixed)
    plan_args(args, args.seeds[0])
    for encoder in args.encoder:  # so that an unknown name or missing weights end the study before anything is trained
        settings = train_args(args, args.env[0], encoder, args.seeds[0])
        if settings.encoder == "state":
            raise UserError("the study compares what encoders make of frames, and --encoder state sees none")
        build_encoder(settings.encoder, train.encoder_img_size(settings), settings.weights)
    for env in args.env:
        train.open_or_collect(settings, env, args.img_size)
    common.write_json(root / "args.json", fixed)
    # One seed of everything, then the next. Within a seed short jobs come last: the first encoder, and the controls.
    jobs = [(env, name, seed) for seed in args.seeds for name in [*args.encoder[::-1], CONTROLS] for env in args.env]
    left = [(args, *job) for job in jobs if not (run_path(args, *job) / "study.json").exists()]
    with processes.Workers(min(args.workers, max(1, len(left)))) as pool:
        list(tqdm(pool.map(run_job, left, 1), "study", len(left), unit="run"))
    results = {}  # {(maze, encoder): what was measured, as arrays (seeds, ...)}
    for env, name in {(env, name) for env, name, _ in jobs}:
        paths = [run_path(args, env, name, seed) / "study.json" for seed in args.seeds]
        results[env, name] = stack([common.read_json(path) for path in paths])
    write_tables(args, results, root / "table.md")
    draw(args, results, root / "study.png")
    print(f"{root}/ holds table.md, study.png and the runs")


if __name__ == "__main__":
    common.run_script(main)
