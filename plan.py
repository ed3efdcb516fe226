"""Put a trained world model into its world, plan to goal images, and report success as a function of budget.

Every problem is a start and a goal frame. CEM searches action sequences whose imagined last latent is closest
to the goal's (DINO-WM, arXiv:2411.04983, section 3.3; alpha weighs proprio as in the released code):

    J(a) = ||z^_T - z_g||^2 + alpha ||p^_T - p_g||^2          (means over tokens and dimensions)

MPC executes n_taken_actions model steps of frameskip environment steps each, observes, and plans again. A model that
is trained on the absolute error (V-JEPA 2-AC, arXiv:2506.09985) plans by it, too.

    python plan.py                                             # the newest run
    python plan.py --ckpt runs/pointmaze_vae --seed 99 7 2024  # 3 x 50 problems
    python plan.py --baselines random,oracle                   # with its controls, on the same problems
    python plan.py --num-samples 400 --topk 10 --momentum 0.15 --maxnorm 1   # CEM as V-JEPA 2-AC has it
    python plan.py --horizon-error 20 --ckpt runs/a runs/b     # how imagination departs from the world, step by step

Writes plan_outputs/NAME/: results.json, success.png, and GIFs of a few problems: start, what happened, goal; or
horizon_error.json and horizon_error.png.
"""

import argparse
import hashlib
import json
import math
import time
from pathlib import Path

import imageio.v3 as imageio
import matplotlib
import numpy as np
import torch
from tqdm import tqdm

import released
from cem import cem, mpc
from data import SHIFTS, UserError, make_env, natural, positive, run_script, write_atomic
from predictor import available_device

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def get_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--ckpt", nargs="+", help="the run to plan with, ours or released by DINO-WM (default: the newest under runs/)")
    add("--weights", help="of a released run's encoder, which it lacks: as train.py's")
    add("--convert", metavar="OUT", help="do not plan: write the released --ckpt to OUT, as a run of ours")
    add("--seed", type=natural, nargs="+", default=[99], help="of the problems and of CEM; several are pooled")
    add("--n-evals", type=positive, default=50, help="problems per seed")
    add("--shift", choices=SHIFTS, help="another look of the world than the one trained on")
    add("--goal-source", choices=("random_state", "dset"), default="random_state",
        help="random start and goal states, or both out of a validation episode, goal_H model steps apart")  # fmt: skip
    add("--data", help="the data set that dset takes its episodes from, and a released run its statistics (default: "
        "the one trained on)")  # fmt: skip
    add("--goal-H", type=positive, default=5, help="planning horizon in model steps")
    add("--n-taken-actions", type=positive, help="model steps executed before replanning (default: goal_H)")
    add("--max-iter", type=positive, default=10, help="MPC iterations")
    add("--num-samples", type=positive, default=300, help="CEM candidates")
    add("--topk", type=positive, default=30, help="CEM elites")
    add("--opt-steps", type=positive, default=10, help="CEM iterations per plan")
    add("--var-scale", type=float, default=1.0, help="initial standard deviation, in units of the data's actions")
    add("--momentum", type=float, default=0.0, help="of CEM's mean and deviation; V-JEPA 2-AC: 0.15")
    add("--maxnorm", type=float, help="bound of CEM's candidates, in the unit of --var-scale (default: none)")
    add("--alpha", type=float, default=0.0, help="weight of proprio in the cost")
    add("--baselines", default="", help="controls on the same problems: random,oracle")
    add("--horizon-error", type=positive, metavar="T", help="do not plan: the error of T imagined model steps under "
        "random actions, for each --ckpt, averaged over n_evals trajectories a seed")  # fmt: skip
    add("--n-gifs", type=natural, default=4, help="problems to film")
    add("--name", help="of the result, under plan_outputs/ (default: the run's)")
    add("--device", type=available_device, default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    args.n_taken_actions = args.n_taken_actions or args.goal_H
    args.baselines = [name for name in args.baselines.split(",") if name]
    if not 2 <= args.topk <= args.num_samples:
        raise UserError(f"--topk {args.topk} must lie between 2 and --num-samples {args.num_samples}")
    if args.n_taken_actions > args.goal_H:
        raise UserError(f"--n-taken-actions {args.n_taken_actions} is more than --goal-H {args.goal_H} plans")
    if args.var_scale <= 0 or args.alpha < 0:
        raise UserError("--var-scale must be above 0, and --alpha not below")
    if not 0 <= args.momentum < 1 or args.maxnorm is not None and args.maxnorm <= 0:
        raise UserError("--momentum must be at least 0 and below 1, and --maxnorm above 0")
    if unknown := set(args.baselines) - {"random", "oracle"}:
        raise UserError(f"unknown --baselines {', '.join(unknown)}; known: random, oracle")
    if args.ckpt is None:
        runs = sorted(Path("runs").glob("*/model.pt"), key=lambda path: path.stat().st_mtime)
        if not runs:
            raise UserError("no trained model under runs/: python train.py first, or give --ckpt")
        args.ckpt = [str(runs[-1].parent)]
    args.name = args.name or Path(args.ckpt[0]).resolve().name
    if args.horizon_error is None:
        args.ckpt, *more = args.ckpt
        if more:
            raise UserError("one --ckpt at a time can plan; --horizon-error compares several")
    return args


# ---------------------------------------------------------------------------------------------------------
# Problems, and the worlds in which they are solved


def make_problems(env, args, frameskip, dataset=None):
    """Start and goal states, each (n_evals per seed, state_dim)."""
    problems = []
    for seed in args.seed:
        rng = np.random.default_rng([seed, 1])
        for n in range(args.n_evals):
            if dataset is None and hasattr(env, "sample_problem"):  # the release's own
                problems.append(env.sample_problem(seed, n))
            elif dataset is None:
                problems.append((env.sample_state(rng), env.sample_state(rng)))
            else:
                span = args.goal_H * frameskip // dataset.meta["frameskip"]
                lengths = dataset.episode_ends - dataset.episode_starts
                episodes = [e for e in dataset.split()[1] if lengths[e] > span]
                if not episodes:
                    raise UserError(f"no validation episode of {dataset.path} is longer than {span} rows (--goal-H)")
                episode = rng.choice(episodes)
                row = dataset.episode_starts[episode] + rng.integers(lengths[episode] - span)
                problems.append((dataset.states[row], dataset.states[row + span]))
    return tuple(np.array(states, np.float64) for states in zip(*problems, strict=True))


class Worlds:
    """One simulation for all problems: a state each, and the last observation of each."""

    def __init__(self, env, starts, goals, films=0):
        self.env, self.states, self.goals = env, starts.copy(), goals
        self.dof, self.bounds = env.action_space.shape[0], (env.action_space.low, env.action_space.high)
        self.obs = self.observe(starts)
        self.goal_obs = self.observe(goals)
        self.films = [[frame] for frame in self.obs["visual"][:films].copy()]

    def observe(self, states):
        """States (B, P) -> {"visual": (B, H, W, 3) uint8, "proprio": (B, P)}."""
        obs = []
        for state in states:
            self.env.set_state(state)
            obs.append(self.env.observe())
        return {name: np.stack([o[name] for o in obs]) for name in obs[0]}

    def act(self, problems, actions):
        """Executes actions (B, n, frameskip * DoF) in the worlds `problems` (B,), observes, and returns which
        of them now stand at their goals."""
        for i, sequence in zip(problems, actions.reshape(len(actions), -1, self.dof), strict=True):
            self.env.set_state(self.states[i])
            for action in sequence:
                self.env.step(action, render=False)
                if i < len(self.films):
                    self.films[i].append(self.env.render())
            self.states[i] = self.env.state
        seen = self.observe(self.states[problems])
        for name in seen:
            self.obs[name][problems] = seen[name]
        return self.env.goal_reached(self.states[problems], self.goals[problems])


# ---------------------------------------------------------------------------------------------------------
# What a plan is judged by: the world model's imagination, or (the control) the true simulator


@torch.no_grad()
def latent_cost(model, worlds, alpha, device):
    """Returns problems (B,) -> cost, where cost(actions (B, M, T, A)) -> (B, M) is J in the model's imagination.

    Observation and goal are encoded once per plan. All candidates advance together, one call of the model per
    planner step; beyond max_tokens in pieces.
    """

    def encode(obs):
        return model.encode({name: torch.from_numpy(o)[:, None].to(device) for name, o in obs.items()})

    # On a GPU a piece bounds the memory (3 GB at the paper's size); on a CPU it stays in the cache: 1.5 times as fast.
    max_tokens = 2**13 if device.type == "cpu" else 2**18
    piece = max(1, max_tokens // (model.num_hist * model.encoder.num_patches))
    goals = encode(worlds.goal_obs)

    def for_problems(problems):
        z0 = encode({name: o[problems] for name, o in worlds.obs.items()})
        goal = {name: latent[problems] for name, latent in goals.items()}

        def cost(actions):
            B, M = actions.shape[:2]
            owner = torch.arange(B, device=device).repeat_interleave(M)  # the problem of each candidate
            costs = []
            for index, chunk in zip(owner.split(piece), actions.flatten(0, 1).split(piece), strict=True):
                z = model.rollout({name: latent[index] for name, latent in z0.items()}, chunk)
                error = {
                    k: model.predictor.criterion(z[k][:, -1], goal[k][index, 0], reduction="none").flatten(1).mean(1)
                    for k in z if z[k].numel()
                }  # fmt: skip
                costs.append(error["visual"] + alpha * error.get("proprio", 0))
            return torch.cat(costs).view(B, M)

        return cost

    return for_problems


def simulator_cost(worlds):
    """The same interface, with MuJoCo as the model and the distance to the goal in metres as the cost."""

    def for_problems(problems):
        start, goal = worlds.states[problems], worlds.goals[problems]

        def cost(actions):
            B, M = actions.shape[:2]
            actions = actions.cpu().numpy().reshape(B * M, -1, worlds.dof)
            final = worlds.env.simulate(start.repeat(M, axis=0), actions).reshape(B, M, -1)
            return torch.from_numpy(np.linalg.norm(final[..., :2] - goal[:, None, :2], axis=-1))

        return cost

    return for_problems


def solve(worlds, cost_for, model, args, device, bar=None):
    """CEM-MPC in all worlds at once -> success (max_iter, problems) bool. CEM's units are standard deviations of
    the data's actions, as in DINO-WM; what it proposes is clipped to what the world can do."""
    generator = torch.Generator(device).manual_seed(args.seed[0])
    low, high = (torch.from_numpy(b).repeat(model.frameskip).to(device) for b in worlds.bounds)

    def to_world(actions):
        return (actions * model.action_std + model.action_mean).clamp(low, high)

    @torch.no_grad()
    def plan(problems, mean):
        cost, std = cost_for(problems), torch.full_like(mean, args.var_scale)
        budget, maxnorm = (args.num_samples, args.topk, args.opt_steps), args.maxnorm or math.inf
        return cem(lambda a: cost(to_world(a)), mean, std, *budget, generator, args.momentum, maxnorm)

    def act(problems, actions):
        reached = worlds.act(problems, to_world(actions).cpu().numpy())
        if bar is not None:
            bar.update()
        return reached

    count = len(worlds.states)
    return mpc(plan, act, count, args.goal_H, model.action_dim, args.n_taken_actions, args.max_iter, device)


def solve_at_random(worlds, model, args):
    """The random policy in the same worlds for as long."""
    rng = np.random.default_rng(args.seed[0])
    low, high = worlds.bounds

    def plan(problems, mean):
        shape = (*mean.shape[:2], model.frameskip, worlds.dof)
        return torch.from_numpy(rng.uniform(low, high, shape)).float().flatten(2)

    def act(problems, actions):
        return worlds.act(problems, actions.numpy())

    return mpc(plan, act, len(worlds.states), args.goal_H, model.action_dim, args.n_taken_actions, args.max_iter)


def controls(env, starts, goals, model, args):
    """Success rates by iteration of the controls asked for; kept in a file, since they depend on the problems and
    the budget alone."""
    budget = {k: getattr(args, k) for k in (
        "seed", "goal_H", "n_taken_actions", "max_iter", "num_samples", "topk", "opt_steps", "var_scale",
        "momentum", "maxnorm",
    )}  # fmt: skip
    key = repr((model.world["env"], model.frameskip, budget)).encode() + starts.tobytes() + goals.tobytes()
    key += model.action_std.cpu().numpy().tobytes() + model.action_mean.cpu().numpy().tobytes()
    path = Path("plan_outputs") / f"controls_{hashlib.sha256(key).hexdigest()[:12]}.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    for name in set(args.baselines) - known.keys():
        worlds = Worlds(env, starts, goals)
        if name == "random":
            success = solve_at_random(worlds, model, args)
        else:
            with tqdm(total=args.max_iter, desc="oracle", unit="plan") as bar:
                success = solve(worlds, simulator_cost(worlds), model.cpu(), args, "cpu", bar)
        known[name] = success.float().mean(1).tolist()
        write_atomic(path, lambda p: p.write_text(json.dumps(known)))
    return {name: known[name] for name in args.baselines}


# ---------------------------------------------------------------------------------------------------------
# The error of imagination by horizon

PERTURBATION = 0.01  # of a state, in standard deviations of the data's


def record(env, states, actions):
    """What is seen along actions (B, T, A) from states: the observations {name: (B, T + 1, ...)}, and the states."""
    worlds = Worlds(env, states, states)
    obs, visited = [{k: o.copy() for k, o in worlds.obs.items()}], [worlds.states.copy()]
    for t in tqdm(range(actions.shape[1]), desc="simulate", unit="step"):
        worlds.act(np.arange(len(states)), actions[:, t])
        obs.append({k: o.copy() for k, o in worlds.obs.items()})
        visited.append(worlds.states.copy())
    return {k: np.stack([o[k] for o in obs], axis=1) for k in obs[0]}, visited


@torch.no_grad()
def horizon_error(env, models, args, device):
    """{run: {"model", "copy", "simulator": errors of steps 1 .. T}}, in the run's own visual latent.

    A model knows the frames from which its training rollouts start and imagines T more under random actions. The error
    is mean ||z^ - z||^2 over the trajectories and numbers, divided by z's variance over them: 1 is as bad as always
    saying the mean. "copy" holds the last known frame; "simulator" is the true one, begun from that frame's state plus
    normal noise of 0.01 standard deviations: how far two worlds drift apart that were almost the same.
    """
    T, count, reference = args.horizon_error, len(args.seed) * args.n_evals, models[0]
    rng = np.random.default_rng([*args.seed, 2])
    before = max(model.context for model in models) - 1  # true frames that come before the last known one
    starts = np.array([env.sample_state(rng) for _ in range(count)])
    shape = (count, before + T, reference.frameskip, *env.action_space.shape)
    actions = rng.uniform(env.action_space.low, env.action_space.high, shape).astype(np.float32).reshape(*shape[:2], -1)
    obs, states = record(env, starts, actions)
    noise = PERTURBATION * reference.proprio_std.cpu().numpy() * rng.normal(size=starts.shape)
    moved, _ = record(env, states[before] + noise, actions[:, before:])

    def encode(model, obs, first=0):
        """Latents of the frames from `first` on, one trajectory at a time: pretrained eyes need the memory."""
        one_by_one = zip(*(torch.from_numpy(o[:, None, first:]) for o in obs.values()), strict=True)
        z = [model.encode(dict(zip(obs, (o.to(device) for o in each), strict=True))) for each in one_by_one]
        return {name: torch.cat([latent[name] for latent in z]) for name in z[0]}

    curves = {}
    for run, model in zip(args.ckpt, models, strict=True):
        first = before + 1 - model.context
        z = encode(model, obs, first)
        known = {name: latent[:, : model.context] for name, latent in z.items()}
        imagined = model.rollout(known, torch.from_numpy(actions[:, first:]).to(device))["visual"][:, model.context :]
        z = z["visual"][:, model.context - 1 :]  # (B, 1 + T, N, d): the last known frame, then what came
        z, last = z[:, 1:], z[:, :1]
        variance = (z - z.mean((0, 1))).square().mean()
        predictions = {"model": imagined, "copy": last, "simulator": encode(model, moved)["visual"][:, 1:]}
        curves[run] = {k: ((p - z).square().mean((0, 2, 3)) / variance).tolist() for k, p in predictions.items()}
    return curves


def print_horizon_error(curves, count):
    steps = [h for h in (1, 2, 3, 5, 10, 15, 20, 30, 50) if h <= len(next(iter(curves.values()))["model"])]
    width = max(len(run) for run in curves) + 2
    print(f"\nerror of the visual latent over its variance, {count} trajectories, by model steps imagined")
    print(" " * width + "".join(f"{h:>9}" for h in steps))
    for run, by_name in curves.items():
        for name, curve in by_name.items():
            label = {"model": run, "copy": "  copying", "simulator": "  simulator"}[name]
            print(label.ljust(width) + "".join(f"{curve[h - 1]:9.4f}" for h in steps))


def draw_horizon_error(curves, path):
    styles = {"model": "-", "copy": ":", "simulator": "--"}
    figure, axes = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
    for color, (run, by_name) in enumerate(curves.items()):
        for name, curve in by_name.items():
            axes.plot(np.arange(1, len(curve) + 1), curve, styles[name], color=f"C{color}")
        axes.plot([], [], color=f"C{color}", label=run)
    for name, label in (("copy", "copying"), ("simulator", f"simulator, moved by {PERTURBATION} std")):
        axes.plot([], [], styles[name], color="gray", label=label)
    axes.set(xlabel="model steps imagined", ylabel="squared error / variance", yscale="log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(frameon=False, fontsize="small", loc="outside right upper")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def compare_horizon_error(args, device):
    """`horizon_error` of the runs, as a table, a plot and a file."""
    models = [released.load_model(run, device, args.data, args.weights) for run in args.ckpt]
    if len({(model.world["env"], model.world["img_size"], model.frameskip) for model in models}) > 1:
        raise UserError("--horizon-error compares runs of one environment, --img-size and --frameskip")
    env = make_env(models[0].world["env"], models[0].world["img_size"], args.shift)
    curves = horizon_error(env, models, args, device)
    out = Path("plan_outputs") / args.name
    result = {"args": vars(args), "curves": curves}
    write_atomic(out / "horizon_error.json", lambda path: path.write_text(json.dumps(result, indent=1)))
    write_atomic(out / "horizon_error.png", lambda path: draw_horizon_error(curves, path))
    print_horizon_error(curves, len(args.seed) * args.n_evals)
    print(f"\n{out}/ holds horizon_error.json and horizon_error.png")


# ---------------------------------------------------------------------------------------------------------
# Reporting


def wilson(p, n, z=1.96):
    """95 % interval of a success rate p of n trials (Wilson, 1927)."""
    center, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [(center - half) / (1 + z * z / n), (center + half) / (1 + z * z / n)]


def print_table(results):
    rows = {"model": results["success_by_iter"], **results["controls"]}
    print(f"\nsuccess over {results['n_evals']} problems within k MPC iterations (95 % interval of the model's)")
    print("k".rjust(3) + "".join(name.rjust(8) for name in rows))
    for k, (low, high) in enumerate(results["interval"]):
        print(f"{k + 1:3}" + "".join(f"{rates[k]:8.2f}" for rates in rows.values()) + f"   [{low:.2f}, {high:.2f}]")


def draw(results, path):
    k = np.arange(1, len(results["success_by_iter"]) + 1)
    figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    axes.fill_between(k, *np.transpose(results["interval"]), alpha=0.2, lw=0)
    axes.plot(k, results["success_by_iter"], "o-", ms=3, label="world model")
    for name, rates in results["controls"].items():
        axes.plot(k, rates, "--", label={"oracle": "true simulator", "random": "random policy"}[name])
    axes.set(xlabel="MPC iterations", ylabel="success rate", ylim=(0, 1.02), title=f"{results['n_evals']} goals")
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_gif(path, film, goal, scale=4):
    """Start | what happened | goal, side by side, enlarged."""
    gap = np.full((len(goal), 2, 3), 255, np.uint8)
    frames = [np.concatenate([film[0], gap, frame, gap, goal], axis=1) for frame in film]
    frames = np.stack(frames).repeat(scale, axis=1).repeat(scale, axis=2)
    write_atomic(path, lambda p: imageio.imwrite(p, frames, duration=50, loop=0))


def main():
    args = get_args()
    device = torch.device(args.device)
    if args.horizon_error:
        return compare_horizon_error(args, device)
    model = released.load_model(args.ckpt, device, args.data, args.weights)
    if args.convert:
        return released.save_converted(model, args.ckpt, args.convert)
    if args.alpha and not model.proprio_dim:
        raise UserError(f"--alpha weighs proprio, which {args.ckpt} does not have beside its visual latent")
    env = make_env(model.world["env"], model.world["img_size"], args.shift)
    dataset = None
    if args.goal_source == "dset":
        dataset = released.open_dataset(args.data or model.world["data"])
        for key, what in (("env", "environment"), ("img_size", "image size")):
            if dataset.meta[key] != model.world[key]:
                raise UserError(f"{dataset.path} has {what} {dataset.meta[key]}, the checkpoint {model.world[key]}")
    starts, goals = make_problems(env, args, model.frameskip, dataset)
    worlds = Worlds(env, starts, goals, args.n_gifs)

    out = Path("plan_outputs") / args.name
    out.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    with tqdm(total=args.max_iter, desc=f"plan with {args.ckpt}", unit="plan") as bar:
        success = solve(worlds, latent_cost(model, worlds, args.alpha, device), model, args, device, bar)
    seconds = time.perf_counter() - begin
    rates = success.float().mean(1).tolist()
    results = {
        "args": vars(args),
        "success_by_iter": rates,
        "interval": [wilson(p, len(starts)) for p in rates],
        "n_evals": len(starts),
        "controls": controls(env, starts, goals, model, args),
        "seconds": seconds,
    }
    write_atomic(out / "results.json", lambda path: path.write_text(json.dumps(results, indent=1)))
    write_atomic(out / "success.png", lambda path: draw(results, path))
    for i, film in enumerate(worlds.films):
        write_gif(out / f"problem_{i}.gif", film, worlds.goal_obs["visual"][i])
    print_table(results)
    print(f"\n{seconds:.0f} s of planning and acting; {out}/ holds results.json, success.png and the GIFs")


if __name__ == "__main__":
    run_script(main)
