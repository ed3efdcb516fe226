"""The systems side by side: how well does each kind of world model plan, with the same data, goals and search?

DINO-WM (Zhou et al., 2024, arXiv:2411.04983) compares itself with IRIS, DreamerV3 and TD-MPC2 (its tables 1 and 2) and
with AVDC (its table 9), and has released no code for them. Here they are trained on the same random motion, without
rewards, and plan to the same goal images: `dreamer`, `iris`, `tdmpc2`, `lewm` and `avdc` from lib/, and DINO-WM's
transition on the tokens of `pca` and `vae`. It alone is also told where the ball is and how fast (proprio). Each run
measures

    within k    the share of goals that are reached within k plans, with a 95 % interval (Wilson, 1927)
    PSNR h      the PSNR of frames imagined h model steps ahead, in dB, over validation windows; the row "copy" shows
                the last known frame again. avdc knows the true frame five steps ahead, its goal, and no actions
    train, plan the seconds of train.py's loop, without encoding and fitting, and of planning to all goals

    python -m extras.systems                                   # about two hours on two cores
    python -m extras.systems --env pointmaze --seeds 1         # one seed in the smallest maze

Writes runs/NAME/: a run of train.py for each maze, system and seed, with its measurements in study.json, results.json
and GIFs; table.md, systems.png, and imagined.png, each system's imagination below the true frames. The same command
goes on with what was interrupted, and it may name more systems, mazes or seeds than before.
"""

from pathlib import Path

import numpy as np
import torch

import data
import plan
import train
from extras.representation import CONTROLS, PLANNER, measure_controls, plan_args, pooled, run_jobs
from lib import common, pictures, processes, reports
from lib.common import CORES, RANK, positive, to_tensor
from lib.systems import SYSTEMS
from lib.worlds import ENVIRONMENTS
from predictor import load_model

ENCODERS = "pca", "vae"  # of DINO-WM's transition
PAPER = {"dreamer": "1.00", "iris": ".74", "tdmpc2": ".00", "pca": "(DINOv2: .98)", "vae": "(DINOv2: .98)"}  # table 1
PLANNING = dict(n_evals=50, max_iter=10, num_samples=100, topk=10, opt_steps=5)  # flags that plan.py gets, and defaults
KNOWN, AHEAD = 3, 10  # frames of a window that are known, and model steps imagined after them


# ---- One run -------------------------------------------------------------------------------------


def run_path(args, env, name, seed):
    return Path("runs", args.name, f"{env}_{name}_{seed}")


def train_args(args, env, name, seed):
    """train.py's arguments for one run, which has the budget that train.py gives it."""
    flags = dict(env=env, seed=seed, name=run_path(args, env, name, seed).relative_to("runs"), device=args.device)
    flags |= {"steps": args.steps} if args.steps else {}
    kind = ["--encoder", name, "--decoder"] if name in ENCODERS else ["--system", name]
    return train.get_args(kind + [f"--{flag}={value}" for flag, value in flags.items()])


def measure(args, env_name, name, seed):
    """Trains one run, plans with it, and returns what is measured. For CONTROLS it measures the controls."""
    if name == CONTROLS:
        return {"success": measure_controls(args, env_name, seed)}
    directory, device = run_path(args, env_name, name, seed), torch.device(args.device)
    train.train(train_args(args, env_name, name, seed))
    model = load_model(directory, device)
    env, settings = plan.open_world(model), plan.settle(plan_args(args, seed), PLANNER["planner"], model)
    settings.ckpt, settings.controls = str(directory), []
    planned = plan.run(model, env, *plan.get_problems(env, settings, model), settings, device, directory)
    log = np.atleast_1d(np.genfromtxt(directory / "log.csv", delimiter=",", names=True))
    real, imagined = imagine(model, 64, device)
    copied = np.repeat(real[:, KNOWN - 1 : KNOWN], AHEAD, axis=1)
    return {
        "success": planned["success_by_iter"],
        "psnr": psnr_by_step(imagined, real[:, KNOWN:]),
        "copy": psnr_by_step(copied, real[:, KNOWN:]),
        "variance": log["val_variance"].tolist() if "val_variance" in log.dtype.names else [],
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_seconds": log["seconds"].sum(),
        "plan_seconds": planned["seconds"],
    }


@torch.no_grad()
def imagine(model, count, device):
    """Validation windows that all models share, frames (count, KNOWN + AHEAD, H, W, 3) uint8, and what a model imagines
    after the KNOWN ones, given the actions: (count, AHEAD, H, W, 3). avdc has as many frames as it draws."""
    dataset = data.open_dataset(model.world["data"])
    windows = data.Windows(dataset, dataset.split()[1], KNOWN + AHEAD, model.frameskip)
    order = np.linspace(0, len(windows) - 1, count).astype(int)
    batch = windows.batch(order, dataset.frames, device)
    real = batch["visual"].byte()
    if hasattr(model, "plan"):
        steps = model.num_frames - model.context
        film = model.generate(real[:, KNOWN - model.context : KNOWN], real[:, KNOWN + steps - 1])
        return real.cpu().numpy(), model.decode(film.flatten(2)[:, :, None])
    first = KNOWN - model.context
    z = model.encode({"visual": real[:, first:KNOWN], "proprio": batch["proprio"][:, first:KNOWN]})
    visual = model.rollout(z, batch["action"][:, first:-1])["visual"]
    return real.cpu().numpy(), model.decode(visual[:, model.context :])


def psnr_by_step(frames, real):
    """The PSNR of frames (B, T', H, W, 3) at each of the T' steps that they have."""
    pairs = ((to_tensor(frames[:, h]), to_tensor(real[:, h])) for h in range(frames.shape[1]))
    return [pictures.psnr(*pair).item() for pair in pairs]


# ---- The table, the figure and the film ----------------------------------------------------------


def table_rows(args, env, results):
    """A row for each control and system in a maze; the runs of all seeds are taken together."""
    shown = [k for k in (1, 2, 3, 10) if k <= args.max_iter]
    header = ["", *(f"within {k}" for k in shown), "PSNR 1", f"PSNR {AHEAD}"]
    header += ["parameters", "train s", "plan s", "paper"]
    rows = [header]

    def row(name, rates, *rest):
        cells = reports.rate_cells(*pooled(np.array(rates)[:, [k - 1 for k in shown]], args.n_evals))
        rows.append([name, *cells, *rest, *[""] * (len(header) - 1 - len(cells) - len(rest))])

    for name in PLANNER["controls"].split(","):
        row(plan.CONTROLS[name], [run["success"][name] for run in results[env, CONTROLS]])
    copied = np.mean([run["copy"] for run in results[env, args.system[0]]], 0)
    rows.append(["copy", *[""] * len(shown), f"{copied[0]:.1f}", f"{copied[-1]:.1f}", *[""] * 4])
    for name in args.system:
        runs = results[env, name]
        psnr = np.mean([run["psnr"] for run in runs], 0)
        numbers = [f"{psnr[0]:.1f}", f"{psnr[-1]:.1f}" if len(psnr) == AHEAD else "", f"{runs[0]['parameters']:,}"]
        numbers += [f"{np.mean([run[key] for run in runs]):.0f}" for key in ("train_seconds", "plan_seconds")]
        row(name, [run["success"] for run in runs], *numbers, PAPER.get(name, ""))
    return rows


def write_tables(args, results, path):
    text = ""
    for env in args.env:
        title = f"{env}, {len(results[env, CONTROLS])} seeds of training with {args.n_evals} goals each"
        text += f"\n{title}\n\n{common.markdown_table(table_rows(args, env, results))}"
    common.write_atomic(path, text)
    print(text)


def draw(args, results, path):
    """Draws success by the number of plans for each maze, and the variance of the latents as training goes on."""
    figure = pictures.new_figure((4 * len(args.env) + 4, 3.4))
    *mazes, variance = figure.subplots(1, len(args.env) + 1)
    plans = np.arange(1, args.max_iter + 1)
    for env, ax in zip(args.env, mazes, strict=True):
        curves = {name: [run["success"] for run in results[env, name]] for name in args.system}
        for name, style in (("oracle", "k--"), ("random", "k:")):
            rates = [run["success"][name] for run in results[env, CONTROLS]]
            ax.plot(plans, np.mean(rates, 0), style, label=plan.CONTROLS[name])
        for i, (name, rates) in enumerate(curves.items()):
            rate, bounds = pooled(rates, args.n_evals)
            ax.plot(plans, rate, f"C{i}o-", ms=3, label=name)
            ax.fill_between(plans, *bounds.T, color=f"C{i}", alpha=0.12, lw=0)
        ax.set(title=env, xlabel="plans", ylabel="success", ylim=(0, 1.05), xticks=plans)
    for i, name in enumerate(args.system):
        for run in results[args.env[0], name]:
            if run["variance"]:
                variance.plot(range(1, len(run["variance"]) + 1), run["variance"], f"C{i}o-", ms=3)
    variance.set(xlabel="epochs", ylabel="variance of the latents", yscale="log")
    figure.legend(*mazes[0].get_legend_handles_labels(), loc="outside lower center", ncols=9, frameon=False)
    pictures.save_figure(path, figure, dpi=120)


def draw_imagination(args, path):
    """Draws what happens in a validation window of the first maze, and below it what each system imagines of it."""
    rows = {}
    for name in args.system:
        real, imagined = imagine(load_model(run_path(args, args.env[0], name, 0), args.device), 3, args.device)
        missing = AHEAD - imagined.shape[1]
        rows["what happens"] = real[1, KNOWN:]
        rows[name] = np.pad(imagined[1], ((0, missing), *[(0, 0)] * 3), constant_values=255)
    pictures.write_rows(path, rows)


# ---- The script ----------------------------------------------------------------------------------


def get_args():
    parser = common.Parser(description=__doc__.split("\n")[0])
    add, mazes = parser.add_argument, [name for name in ENVIRONMENTS if name.startswith("pointmaze")]
    names = [*SYSTEMS, *ENCODERS]
    add("--system", type=common.names(names), default=",".join(names), help="systems, and encoders for DINO-WM")
    add("--env", type=common.names(mazes), default=",".join(mazes[:2]), help="mazes to compare them in")
    add("--seeds", type=positive, default=3, help="number of training seeds in the first maze; the others have one")
    add("--problems", type=common.seed_number, default=9000, help="seed of the goals, to which a run adds its own")
    add("--steps", type=positive, help="gradient steps of every run (default: what train.py gives each)")
    for name, default in PLANNING.items():
        add(f"--{name.replace('_', '-')}", type=positive, default=default, help="is passed on to plan.py")
    add("--workers", type=positive, help="number of runs at a time (default: one per core; 1 on a GPU)")
    add("--name", default="systems", help="name of the study under runs/")
    add("--device", type=common.available_device, default=common.default_device(), help="where to compute")
    args = parser.parse_args()
    args.workers = args.workers or (CORES if args.device == "cpu" else 1)
    args.img_size = 64
    return args


def main():
    args = get_args()
    args.device = str(processes.join(args.device))
    root = common.output_folder("runs", args.name)
    plan_args(args, 0)  # an impossible budget ends the study here
    fixed = {name: getattr(args, name) for name in ("problems", "steps", *PLANNING)}
    common.same_flags(root, fixed)
    for env in args.env:
        train.open_or_collect(train_args(args, env, ENCODERS[0], 0), env, args.img_size)
    if RANK == 0:
        common.write_json(root / "args.json", fixed)
    seeds = {env: range(args.seeds if env == args.env[0] else 1) for env in args.env}
    names = [*args.system, CONTROLS]
    jobs = [(env, name, seed) for seed in range(args.seeds) for env in args.env for name in names if seed in seeds[env]]
    measured = run_jobs(args, measure, {job: run_path(args, *job) for job in jobs}, "systems")
    if RANK:
        return  # the first process alone writes
    results = {(env, name): [measured[env, name, seed] for seed in seeds[env]] for env in args.env for name in names}
    write_tables(args, results, root / "table.md")
    draw(args, results, root / "systems.png")
    draw_imagination(args, root / "imagined.png")
    print(f"{root}/ holds table.md, systems.png, imagined.png and the runs")


if __name__ == "__main__":
    common.run_script(main)
