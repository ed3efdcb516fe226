"""The study: which encoder makes an action-conditioned world model plan best?

Every encoder gets the same frames, transition model, gradient steps, goals and budget of search. PointMaze-UMaze hardly
tells encoders apart when there is time to replan (DINO-WM, arXiv:2411.04983: 0.94 to 0.98). So they are also compared
after a single plan, in larger mazes, and in a world that looks different from the one in training. Each run measures

    success       which problems are solved within 1, 2, ... MPC iterations; with each shift, within one
    latent error  the error of the predicted next latent, divided by the error of predicting no change
    drift         the error of the latent imagined h steps ahead, divided by its variance (extras/horizon.py)
    probe         R^2 of the ball's place (x, y), read off the tokens of one frame by ridge regression
    distance      rank correlation of the distance between two frames' tokens with that of the balls, up to 2 m
    train, plan   the seconds of the training loop, without fitting and encoding, and of loading the model and planning
                  without a shift

Two encoders meet the same problems. Let the first alone solve b of them, and the second alone c. If neither is better,
b is drawn from Binomial(b + c, 1/2), which gives the p-value of a difference (McNemar, 1947, in its exact form).

    python -m extras.representation                  # the laptop set: no download, some three hours on two cores
    python -m extras.representation --quick          # one seed, the smallest maze: fifteen minutes on two cores
    python -m extras.representation --img-size 224 --curve dinov2 --steps 20000 --name pretrained \\
        --encoder dinov2,dinov2@random,dino_cls,dinov3,vjepa2,dino_tok,vfm_vae                       # on a GPU

Writes runs/NAME/: a run of train.py for each maze, encoder and seed, with its measurements in study.json; the controls
for each maze and seed; table.md and study.png. The same command continues a study, and it may name more encoders, mazes
or seeds than before. The token caches that it leaves with the data take 4 GB.
"""

import contextlib
import itertools
import time
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from scipy.spatial.distance import pdist

import data
import plan
import train
from encoders import build_encoder
from extras.horizon import horizon_error
from lib import common, pictures, processes, reports
from lib.common import CORES, RANK, WORLD_SIZE, UserError, positive, several, tqdm
from lib.pointmaze import SHIFTS
from lib.probe import ridge_regression
from lib.worlds import ENVIRONMENTS, make_env
from predictor import WorldModel

SHIFTED, CONTROLS = "pointmaze", "controls"  # the maze that is shifted; what a job names instead of an encoder
LOOKS = "colours", "light", "camera"  # the shifts that change how the whole frame looks, which are compared as one
TRAINING = dict(img_size=64, steps=2000, batch_size=32, lr=8e-3)  # flags of train.py that are passed on, and defaults
PLANNING = dict(n_evals=100, max_iter=3, num_samples=64, topk=16, opt_steps=4)  # and of plan.py
PLANNER = dict(planner="mpc-icem", controls="random,oracle")
QUICK = dict(env="pointmaze", seeds="0", steps=1000, n_evals=50, curve="none", name="study_quick")
CURVE = 0.25, 0.5, 1, 2  # the gradient steps of the curve's runs, as shares of --steps

# The question that each pair of encoders answers. A pair is compared if both are in the study, and so is every encoder
# with the first.
QUESTIONS = {
    "pretrained semantics": ("efficientnet/efficientnet@random", "dinov2/dinov2@random", "vjepa2/vjepa2@random"),
    "spatial tokens": ("efficientnet/efficientnet_pool", "vae_map/vae", "dinov2/dino_cls"),
    "predictive pretraining": ("vjepa_tiny/patches", "vjepa_tiny/vae_map", "vjepa2/dinov2"),
    "a reconstructive latent": ("vae/pca", "dino_tok/dinov2", "vfm_vae/dinov2"),
    "denser features": ("dinov3/dinov2",),
}


# ---- One run -------------------------------------------------------------------------------------


def run_path(args, env, encoder, seed, steps):
    name = f"{env}_{encoder.replace('/', '-')}_{seed}"
    return Path("runs", args.name, name if steps == args.steps else f"{name}_{steps}")


def middle(names):
    return names[len(names) // 2]


def flags(args, options, **own):
    """The command line for another script: the flags `own`, and the values of our own flags `options` and --device."""
    own = {name: getattr(args, name) for name in [*options, "device"]} | own
    return [f"--{name.replace('_', '-')}={value}" for name, value in own.items() if value != ""]


def train_args(args, env, encoder, seed, steps):
    """train.py's arguments for one run. Every encoder gets the transition model that train.py gives a single token."""
    own = dict(env=env, seed=seed, steps=steps, name=run_path(args, env, encoder, seed, steps).relative_to("runs"))
    own["encoder"], _, own["weights"] = encoder.partition("@")
    own["sizes"] = ",".join(f"{name}={value}" for name, value in (train.LAPTOP | {"depth": args.depth}).items())
    return train.get_args(flags(args, TRAINING, **own))


def plan_args(args, seed):
    return plan.get_args(flags(args, PLANNING, seed=args.problems + seed, **PLANNER))


def measure(args, env_name, encoder, seed, steps):
    """Trains one run, plans with it, and returns what is measured. The curve's other runs are not probed. For CONTROLS
    it measures the controls."""
    if encoder == CONTROLS:
        return measure_controls(args, env_name, seed)
    directory, device = run_path(args, env_name, encoder, seed, steps), torch.device(args.device)
    train.train(train_args(args, env_name, encoder, seed, steps))
    start, log = time.perf_counter(), np.atleast_1d(np.genfromtxt(directory / "log.csv", delimiter=",", names=True))
    model, env = WorldModel.from_pretrained(directory, device), make_env(env_name, args.img_size)
    settings = plan.settle(plan_args(args, seed), PLANNER["planner"], model)
    problems = plan.get_problems(env, settings, model)

    def solved(shift=None):  # (MPC iterations, problems), 1 or 0
        worlds = plan.Worlds(make_env(env_name, args.img_size, shift), *problems)
        with common.bfloat16(device, settings.dtype == "bfloat16"):
            cost_for = plan.latent_cost(model, worlds, device)
            return plan.solve(worlds, cost_for, model, settings, device).int().tolist()

    result = {"tokens": model.encoder.num_patches, "dim": model.encoder.dim, "success": solved()}
    result |= {"train_seconds": log["seconds"].sum(), "plan_seconds": time.perf_counter() - start}
    if steps != args.steps:
        return result
    settings.max_iter = 1
    result["shift"] = {shift: solved(shift)[0] for shift in args.shift if env_name == SHIFTED}
    result["latent_error"] = float(log["val_visual"][-1] / log["copy"][-1])
    result["drift"] = horizon_error(env, {"": model}, args.drift, args.n_evals, settings.seed, device)[""]
    dataset = data.open_dataset(model.world["data"])
    rows = [r[:: -(-len(r) // most)] for r, most in zip(map(dataset.rows, dataset.split()), (4000, 1000), strict=True)]
    tokens = data.token_cache(model.encoder, dataset, device)
    result["probe"] = linear_probe(tokens, dataset.states[:, :2], rows)
    result["distance"] = distance_correlation(tokens[rows[1]], dataset.states[rows[1]])
    return result


def linear_probe(tokens, states, rows):
    """R^2 (P,) of states (S, P) that are read off all numbers of a frame's tokens (S, N, d) by ridge regression. `rows`
    is a pair: the rows to learn from, and the rows to measure on."""
    x, x_val, y, truth = (a[r].astype(float).reshape(len(r), -1) for a in (tokens, states) for r in rows)
    error = ridge_regression(x, y)(x_val) - truth
    return (1 - np.square(error).mean(0) / truth.var(0)).tolist()


def distance_correlation(tokens, states, within=2.0):
    """Spearman's correlation of |z_i - z_j| with the distance in metres, over all pairs of frames `within` that of each
    other. A plan is judged by |z_i - z_j| alone. tokens (S, N, d), states (S, 4)."""
    latent, metres = pdist(tokens.reshape(len(tokens), -1).astype(np.float32)), pdist(states[:, :2])
    return stats.spearmanr(latent[metres < within], metres[metres < within]).statistic


def measure_controls(args, env_name, seed):
    """Returns the controls' success rates on the problems of a maze and a seed, which all encoders share. The model
    here never imagines anything: it only knows how the data's actions are spread, from which CEM draws."""
    dataset = data.open_dataset(data.default_folder(env_name, args.img_size))
    statistics = dataset.statistics(dataset.split()[0])
    model = WorldModel(build_encoder("state"), statistics["action"], statistics["proprio"], depth=1)
    env, settings = make_env(env_name, args.img_size), plan.settle(plan_args(args, seed), PLANNER["planner"], model)
    return plan.controls(env, *plan.get_problems(env, settings, model), model, settings)


def run_jobs(args, measure, folders, title):
    """Returns {job: measure(args, *job)} for `folders`, {job: the folder of its run}. A job whose study.json is there
    is not done again. torchrun's processes share the others, and each does --workers of them at a time. UserError names
    the runs that failed, after all others are done."""
    left = [job for job, folder in folders.items() if not (folder / "study.json").exists()]
    left = [(args, measure, job, folders[job]) for job in processes.gather(left)[0][RANK::WORLD_SIZE]]
    with processes.Workers(min(args.workers, max(1, len(left)))) as pool:
        failed = [error for error in tqdm(pool.map(run_job, left), title, len(left), unit="run") if error]
    failed = list(itertools.chain(*processes.gather(failed)))
    if failed:
        raise UserError(f"{len(failed)} of {len(folders)} runs failed, and the others are done: {'; '.join(failed)}")
    return {job: common.read_json(folder / "study.json") for job, folder in folders.items()}


def run_job(task):
    """Measures one run with a worker's share of the cores. What is printed goes to a .log file. Returns why it failed,
    if a user can change that."""
    args, measure, job, folder = task
    processes.keep_freed_memory()
    torch.set_num_threads(max(1, CORES // args.workers))
    with open(f"{folder}.log", "w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            common.write_json(folder / "study.json", measure(args, *job))
        except UserError as error:
            return f"{folder.name}: {error}"


# ---- Tables and the figure -----------------------------------------------------------------------


def pooled(rates, n_evals):
    """Success rates of several seeds (seeds, columns), with n_evals problems each -> those of all problems together
    (columns,), and their 95 % intervals (columns, 2)."""
    n, solved = len(rates) * n_evals, (np.array(rates) * n_evals).round().astype(int).sum(0)
    return solved / n, np.array(reports.wilson(solved, n))


def stack(runs):
    """Turns dictionaries of numbers, one for each seed, into a dictionary of arrays (seeds, ...)."""
    return {k: stack([run[k] for run in runs]) for k in runs[0]} if isinstance(runs[0], dict) else np.array(runs)


def mcnemar(one, other):
    """The p-value of the difference between two encoders that met the same problems, which they solved (1) or not."""
    b, c = int(np.sum(one > other)), int(np.sum(one < other))
    return stats.binomtest(b, b + c).pvalue if b + c else 1.0


def success_rows(args, results):
    """A row for each control and encoder: which share of the goals of all seeds it reaches in each maze."""
    rates = {(who, ""): [results[env, CONTROLS][name] for env in args.env] for name, who in plan.CONTROLS.items()}
    for encoder in args.encoder:
        runs = [results[env, encoder] for env in args.env]
        rates[encoder, f"{runs[0]['tokens'][0]} × {runs[0]['dim'][0]}"] = [run["success"].mean(2) for run in runs]
    rows = [["encoder", "tokens", *(f"{env}, within {k}" for env in args.env for k in (1, args.max_iter))]]
    for names, mazes in rates.items():
        columns = np.concatenate([maze[:, [0, -1]] for maze in mazes], 1)  # (seeds, 2 * mazes)
        rows.append([*names, *reports.rate_cells(*pooled(columns, args.n_evals))])
    return rows


def shift_rates(run):
    """Each seed's success within one plan, plain and with each shift, (seeds, columns)."""
    return np.column_stack([solved.mean(1) for solved in (run["success"][:, 0], *run["shift"].values())])


def shift_rows(args, results):
    """A row for each encoder: its success within one plan in SHIFTED, plain and with each shift."""
    rows = [["encoder", "plain", *results[SHIFTED, args.encoder[0]]["shift"]]]
    for encoder in args.encoder:
        rates = shift_rates(results[SHIFTED, encoder])
        rows.append([encoder, *reports.rate_cells(*pooled(rates, args.n_evals))])
    return rows


def measure_rows(args, results):
    """A row for each encoder: what else was measured, as means over the seeds, one for each maze."""
    rows = [["encoder", "latent error", f"drift at {args.drift}", "probe", "distance", "train s", "plan s"]]
    for encoder in args.encoder:
        mazes = []
        for run in (results[env, encoder] for env in args.env):
            measured = run["latent_error"], run["drift"]["model"][:, -1], run["probe"], run["distance"]
            seconds = [f"{run[key].mean():.0f}" for key in ("train_seconds", "plan_seconds")]
            mazes.append([f"{values.mean():.2f}" for values in measured] + seconds)
        rows.append([encoder, *map(", ".join, zip(*mazes, strict=True))])
    return rows


def outcomes(args, results, encoder):
    """Which problems an encoder solves, by column: arrays (runs, problems) of 1 or 0. With another look each goal comes
    once for each of LOOKS, which McNemar's test takes for goals of their own, so that its p is too small there."""
    runs = {env: results[env, encoder] for env in args.env}
    solved = {f"{env}, within 1": run["success"][:, 0] for env, run in runs.items()}
    solved["all, within 1"] = np.concatenate(list(solved.values()))
    solved[f"all, within {args.max_iter}"] = np.concatenate([run["success"][:, -1] for run in runs.values()])
    shifts = runs[SHIFTED]["shift"] if SHIFTED in runs else {}
    if looks := [each for name, each in shifts.items() if name in LOOKS]:
        solved["with another look"] = np.concatenate(looks, 1)
    return solved | {f"with {name}": each for name, each in shifts.items() if name not in LOOKS}


def comparison_rows(args, results):
    """A row for each pair of encoders: by how much more the first solves, and p. Because p knows how the problems fell,
    but not how training might have gone, the last column counts the runs in which the first is ahead."""
    pairs = {(encoder, args.encoder[0]): "against the first" for encoder in args.encoder[1:]}
    pairs |= {tuple(pair.split("/")): question for question, listed in QUESTIONS.items() for pair in listed}
    rows = [["question", "encoders", *outcomes(args, results, args.encoder[0]), "runs ahead"]]
    for pair, question in pairs.items():
        if set(pair) <= set(args.encoder):
            one, other = (outcomes(args, results, encoder) for encoder in pair)
            row = [f"{one[c].mean() - other[c].mean():+.2f} (p {mcnemar(one[c], other[c]):.2g})" for c in one]
            ahead = one["all, within 1"].mean(1) > other["all, within 1"].mean(1)
            rows.append([question, " − ".join(pair), *row, f"{ahead.sum()} of {len(ahead)}"])
    return rows


def write_tables(args, results, curve, path):
    """Writes tables of what all runs measured, of the comparisons, and of success by the number of gradient steps."""
    goals = f"{args.n_evals} goals in each maze for each of {len(args.seeds)} seeds"
    tables = {f"Success, {goals}": success_rows(args, results)}
    if SHIFTED in args.env:
        tables[f"Success within 1 in {SHIFTED}, plain and with each shift"] = shift_rows(args, results)
    tables[f"Measured in {', '.join(args.env)}"] = measure_rows(args, results)
    compared = comparison_rows(args, results)
    if pairs := len(compared) - 1:
        tests = pairs * (len(compared[0]) - 3)  # columns with a p-value
        tables[f"Differences in success; Bonferroni asks of {tests} tests that p < {0.05 / tests:.2g}"] = compared
    if curve:
        rows = [[f"{n}", f"{rates[0]:.2f}", f"{rates[-1]:.2f}"] for n, rates in curve.items()]
        title = f"{args.curve} in {middle(args.env)} with seed {args.seeds[0]}, by the number of gradient steps"
        tables[title] = [["gradient steps", "within 1", f"within {args.max_iter}"], *rows]
    text = ""
    for title, rows in tables.items():
        text += f"\n{title}\n\n{common.markdown_table(rows)}"
    common.write_atomic(path, text)
    print(text)


def draw(args, results, path):
    """Draws success by budget for each maze, drift by horizon, and success by shift, with intervals over all goals."""
    rows, shifted = (len(args.env) + 3) // 2, SHIFTED if SHIFTED in args.env else args.env[0]
    figure = pictures.new_figure((9, 3.2 * rows))
    *mazes, drift, shifts = (figure.add_subplot(rows, 2, i + 1) for i in range(len(args.env) + 2))

    def curve(ax, rates, style, first=1, aside=0.0, label=None):
        mean, bounds = pooled(rates, args.n_evals)
        x = np.arange(first, first + len(mean)) + 0.04 * aside  # a little apart, so that all intervals are seen
        ax.errorbar(x, mean, np.abs(bounds.T - mean), fmt=style, ms=3, capsize=2, label=label)

    for env, ax in zip(args.env, mazes, strict=True):
        for i, encoder in enumerate(args.encoder):
            curve(ax, results[env, encoder]["success"].mean(2), f"C{i}o-", aside=i, label=encoder)
        for name, style in (("oracle", "k--"), ("random", "k:")):
            curve(ax, results[env, CONTROLS][name], style, label=plan.CONTROLS[name])
        ax.set(title=env, xlabel="MPC iterations", ylabel="success", ylim=(0, 1.05), xticks=range(1, args.max_iter + 1))
    for i, encoder in enumerate(args.encoder):
        for name, style in (("model", "-"), ("copy", ":")):
            mean = results[args.env[0], encoder]["drift"][name].mean(0)
            drift.plot(range(1, len(mean) + 1), mean, f"C{i}{style}")
        run = results[shifted, encoder]
        curve(shifts, shift_rates(run), f"C{i}o", first=0, aside=2 * i)
    drift.set(xlabel="model steps ahead (dotted: copied)", ylabel="latent error / variance", yscale="log")
    shifts.set(title=f"{shifted} with each shift", ylabel="success within 1", ylim=(0, 1.05))
    shifts.set_xticks(range(1 + len(run["shift"])), ["plain", *run["shift"]], rotation=20)
    figure.legend(*mazes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    pictures.save_figure(path, figure, dpi=120)


# ---- The script ----------------------------------------------------------------------------------


def get_args():
    parser = common.Parser(description=__doc__.split("\n")[0])
    add, mazes = parser.add_argument, [name for name in ENVIRONMENTS if name.startswith("pointmaze")]
    laptop = "pca,vae,vae_map,patches,vjepa_tiny,efficientnet,efficientnet@random,efficientnet_pool"
    add("--encoder", type=several(str), default=laptop, help="encoders, as ENCODER or ENCODER@WEIGHTS (see train.py)")
    add("--env", type=common.names(mazes), default=",".join(mazes[:3]), help="mazes to compare them in")
    add("--seeds", type=several(common.seed_number), default="0,1,2", help="seeds of training")
    add("--problems", type=common.seed_number, default=7100, help="seed of the problems, to which a run adds its own")
    curve = "encoder that also learns with other numbers of steps, in the middle one of the mazes"
    add("--curve", default="efficientnet", help=curve)
    add("--shift", type=common.names(SHIFTS), default=",".join(SHIFTS), help=f"shifts of {SHIFTED} to plan with")
    add("--depth", type=positive, default=2, help="layers of the transition model")
    add("--drift", type=positive, default=10, help="number of model steps over which imagination is followed")
    for name, default in (TRAINING | PLANNING).items():
        kind = common.above_zero if name == "lr" else positive
        add(f"--{name.replace('_', '-')}", type=kind, default=default, help="is passed on to train.py or plan.py")
    quick = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in QUICK.items())
    add("--quick", action="store_true", help=f"do with less, unless other flags say otherwise: {quick}")
    add("--workers", type=positive, help="number of runs at a time (default: one per core; 1 on a GPU)")
    add("--name", default="study", help="name of the study under runs/")
    add("--device", type=common.available_device, default=common.default_device(), help="where to compute")
    parser.set_defaults(**(QUICK if parser.parse_args().quick else {}))
    args = parser.parse_args()
    args.workers = args.workers or (CORES if args.device == "cpu" else 1)
    if not (args.encoder and args.seeds):
        raise UserError("--encoder and --seeds each have to name at least one")
    return args


def main():
    args = get_args()
    args.device = str(processes.join(args.device))
    root = common.output_folder("runs", args.name)
    free = "encoder", "env", "seeds", "curve", "quick", "workers", "device"
    fixed = {name: value for name, value in vars(args).items() if name not in free}
    common.same_flags(root, fixed)
    plan_args(args, args.seeds[0])
    for encoder in args.encoder:  # so that an unknown name or missing weights end the study before anything is trained
        settings = train_args(args, args.env[0], encoder, args.seeds[0], args.steps)
        if settings.encoder == "state":
            raise UserError("the study compares what encoders make of frames, and --encoder state sees none")
        build_encoder(settings.encoder, train.encoder_img_size(settings), settings.weights)
    for env in args.env:
        train.open_or_collect(settings, env, args.img_size)
    if RANK == 0:
        common.write_json(root / "args.json", fixed)
    # The curve comes first, because it has the longest run, then one seed of everything, and the next. Within a seed
    # short jobs come last: the first encoder, and the controls.
    names = [*args.encoder[::-1], CONTROLS]
    jobs = [(env, name, seed, args.steps) for seed in args.seeds for name in names for env in args.env]
    budgets = [round(share * args.steps) for share in CURVE] if args.curve in args.encoder else []
    budgets = {n: (middle(args.env), args.curve, args.seeds[0], n) for n in budgets if n}
    jobs = list(dict.fromkeys([*budgets.values(), *jobs]))
    measured = run_jobs(args, measure, {job: run_path(args, *job) for job in jobs}, "study")
    if RANK:
        return  # the first process alone writes
    results = {}  # {(maze, encoder): what was measured, as arrays (seeds, ...)}
    for env, name in {job[:2] for job in jobs}:
        results[env, name] = stack([measured[env, name, seed, args.steps] for seed in args.seeds])
    curve = {n: np.mean(measured[job]["success"], 1) for n, job in budgets.items()}
    write_tables(args, results, curve, root / "table.md")
    draw(args, results, root / "study.png")
    print(f"{root}/ holds table.md, study.png and the runs")


if __name__ == "__main__":
    common.run_script(main)
