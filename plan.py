"""Put a trained world model into its world, plan to goal images, and report success as a function of budget.

Every problem is a start and a goal frame. A planner of cem.py searches action sequences whose imagined latents are
closest to the goal's (DINO-WM, arXiv:2411.04983, section 3.3; alpha, and "all", as in the released code):

    J_t(a) = ||z^_t - z_g||^2 + alpha ||p^_t - p_g||^2        (means over tokens and dimensions)
    J(a) = J_T(a)  "last",    or    mean_t w_t J_t(a),  w_t = base^t / sum_s base^s,  t = 0 .. T  "all"

`cem`, `icem`, `mppi` and `gd` make one plan and execute it whole. `mpc-cem` and so on execute n_taken_actions model
steps of frameskip environment steps each, observe, and plan again. A model that is trained on the absolute error
(V-JEPA 2-AC, arXiv:2506.09985) plans by it, too.

The release knows the last frame alone when it plans, and executes the whole plan. The paper has a history of frames,
and executes the first step: so does a checkpoint of `--variant paper`, or any with --history 3 --n-taken-actions 1.

    python plan.py                                             # the newest run
    python plan.py --ckpt runs/pointmaze_vae --seed 99 7 2024  # 3 x 50 problems
    python plan.py --baselines random,oracle                   # with its controls, on the same problems
    python plan.py --planner cem,gd,mpc-cem,mpc-gd             # the paper's comparison of planners, as a table
    python plan.py --goal-source file --goal-file goals.json   # problems that --save-targets goals.json wrote
    python plan.py --decode                                    # what was imagined beside what happened
    python plan.py --num-samples 400 --topk 10 --momentum 0.15 --maxnorm 1   # CEM as V-JEPA 2-AC has it
    python plan.py --horizon-error 20 --ckpt runs/a runs/b     # how imagination departs from the world, step by step

Writes plan_outputs/NAME/: results.json, success.png, and GIFs of a few problems: start, what happened, goal; of several
planners a folder each, and table.md; or horizon_error.json and horizon_error.png.
"""

import argparse
import hashlib
import json
import math
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
from tqdm import tqdm

import released
from cem import cem, coloured_noise, gradient_descent, mpc, mppi
from data import SHIFTS, Parser, UserError, make_env, natural, positive, read_json, run_script, write_atomic
from decoders import beside, likeness, write_gif, write_strips
from vae_mdnrnn import available_device

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CONTROLS = {"random": "random policy", "oracle": "true simulator"}
METHODS = ("cem", "icem", "mppi", "gd")
PLANNERS = METHODS + tuple(f"mpc-{method}" for method in METHODS)


def get_args(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--ckpt", nargs="+", help="the run to plan with, ours or released by DINO-WM (default: the newest under runs/)")
    add("--weights", help="of a released run's encoder, which it lacks: as train.py's")
    add("--convert", metavar="OUT", help="do not plan: write the released --ckpt to OUT, as a run of ours")
    add("--seed", type=natural, nargs="+", default=[99], help="of the problems and of CEM; several are pooled")
    add("--n-evals", type=positive, default=50, help="problems per seed")
    add("--shift", choices=SHIFTS, help="another look of the world than the one trained on")
    add("--goal-source", choices=("random_state", "dset", "random_action", "file"), default="random_state",
        help="random start and goal states; both out of a validation episode, goal_H model steps apart; a start from "
        "there, and where goal_H random actions lead; or those in --goal-file")  # fmt: skip
    add("--goal-file", metavar="PATH", help="problems that --save-targets wrote")
    add("--save-targets", metavar="PATH", help="write the problems there")
    add("--data", help="the data set that episodes are taken from, and a released run's statistics (default: the one "
        "trained on)")  # fmt: skip
    add("--planner", default="mpc-cem", help=f"one or more of {', '.join(PLANNERS)}")
    add("--goal-H", type=positive, default=5, help="planning horizon in model steps")
    add("--n-taken-actions", type=positive, help="model steps executed before replanning (default: goal_H, of the "
        "paper's variant 1)")  # fmt: skip
    add("--history", type=positive, help="true frames that imagination starts from, with copies of the first before it "
        "(default: 1, of the paper's variant num_hist)")  # fmt: skip
    add("--max-iter", type=positive, help="MPC iterations (default: as many as make 10 goal_H model steps)")
    add("--objective", choices=("last", "all"), default="last", help="imagined frames that should be like the goal")
    add("--base", type=float, default=2.0, help="of all: weight of a frame, over that of the one before")
    add("--num-samples", type=positive, default=300, help="candidates of cem, icem, mppi")
    add("--topk", type=positive, default=30, help="elites of cem, icem")
    add("--opt-steps", type=positive, help="iterations per plan (default: 10, of gd 1000)")
    add("--var-scale", type=float, default=1.0, help="initial standard deviation, in units of the data's actions")
    add("--momentum", type=float, default=0.0, help="of CEM's mean and deviation; V-JEPA 2-AC: 0.15")
    add("--maxnorm", type=float, help="bound of CEM's candidates, in the unit of --var-scale (default: none)")
    add("--noise-beta", type=float, default=1.0, help="of icem: noise of spectrum 1 / f^beta")
    add("--keep", type=positive, default=9, help="of icem: elites that are candidates again")
    add("--temperature", type=float, default=0.1, help="of mppi, in standard deviations of the candidates' costs")
    add("--lr", type=float, default=1.0, help="of gd")
    add("--action-noise", type=float, default=0.003, help="of gd, in units of the data's actions")
    add("--sample-type", choices=("randn", "zero"), default="randn", help="of gd: what it starts from")
    add("--alpha", type=float, default=0.0, help="weight of proprio in the cost")
    add("--baselines", default="", help="controls on the same problems: random,oracle")
    add("--horizon-error", type=positive, metavar="T", help="do not plan: the error of T imagined model steps under "
        "random actions, for each --ckpt, averaged over n_evals trajectories a seed")  # fmt: skip
    add("--decode", action="store_true", help="show what was imagined, too, by the checkpoint's decoder")
    add("--n-gifs", type=natural, default=4, help="problems to film")
    add("--name", help="of the result, under plan_outputs/ (default: the run's)")
    add("--device", type=available_device, default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if unknown := set(args.planner.split(",")) - set(PLANNERS):
        raise UserError(f"unknown --planner {', '.join(sorted(unknown))}; known: {', '.join(PLANNERS)}")
    if (args.goal_source == "file") != (args.goal_file is not None):
        raise UserError("--goal-source file and --goal-file PATH go together")
    args.baselines = [name for name in args.baselines.split(",") if name]
    elites = any(planner.endswith("cem") for planner in args.planner.split(",")) or "oracle" in args.baselines
    if elites and not 2 <= args.topk <= args.num_samples:
        raise UserError(f"--topk {args.topk} must lie between 2 and --num-samples {args.num_samples}")
    if (args.n_taken_actions or 1) > args.goal_H:
        raise UserError(f"--n-taken-actions {args.n_taken_actions} is more than --goal-H {args.goal_H} plans")
    if min(args.var_scale, args.base, args.temperature, args.lr) <= 0 or min(args.alpha, args.action_noise) < 0:
        raise UserError(
            "--var-scale, --base, --temperature and --lr must be above 0, --alpha and --action-noise not below"
        )
    if "icem" in args.planner and args.keep >= args.num_samples:
        raise UserError(f"--keep {args.keep} leaves no new candidate of --num-samples {args.num_samples}")
    if not 0 <= args.momentum < 1 or args.maxnorm is not None and args.maxnorm <= 0:
        raise UserError("--momentum must be at least 0 and below 1, and --maxnorm above 0")
    if unknown := set(args.baselines) - CONTROLS.keys():
        raise UserError(f"unknown --baselines {', '.join(sorted(unknown))}; known: random, oracle")
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


def settle(args, model):
    """The arguments with what follows from the planner and the checkpoint's variant, where no flag says otherwise."""
    replans, paper = args.planner.startswith("mpc-"), model.variant == "paper"
    n_taken_actions = (args.n_taken_actions or (1 if paper else args.goal_H)) if replans else args.goal_H
    own = dict(
        n_taken_actions=n_taken_actions,
        max_iter=(args.max_iter or 10 * args.goal_H // n_taken_actions) if replans else 1,
        opt_steps=args.opt_steps or (1000 if args.planner.endswith("gd") else 10),
        history=args.history or (model.num_hist if paper else 1),
    )
    return argparse.Namespace(**vars(args) | own)


# ---------------------------------------------------------------------------------------------------------
# Problems, and the worlds in which they are solved


def open_world(model, shift):
    """The environment that a model was trained on, in which problems can be set."""
    env = make_env(model.world["env"], model.world["img_size"], shift)
    if not hasattr(env, "set_state"):
        raise UserError(f"{model.world['env']} cannot be put into a start and a goal state: plan in a PointMaze")
    return env


def read_problems(path, env, env_name):
    """Start and goal states of `env_name` in a file of --save-targets."""
    try:
        content = json.loads(Path(path).read_text())
        problems = tuple(np.array(content[name], np.float64) for name in ("starts", "goals"))
        if content["env"] != env_name:
            raise UserError(f"{path} holds problems of {content['env']}, the checkpoint is of {env_name}")
        for name, states in zip(("starts", "goals"), problems, strict=True):
            if states.shape != (len(problems[0]), env.state.size) or not states.size or not np.isfinite(states).all():
                raise ValueError(f"{name} of shape {states.shape}, or not finite")
    except FileNotFoundError:
        raise UserError(f"no file at {path}: write one with --save-targets") from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{path} is no file of --save-targets ({' '.join(str(error).split())[:100]})") from None
    return problems


def make_problems(env, args, frameskip, dataset=None):
    """Start and goal states, each (n_evals per seed, state_dim)."""
    problems = []
    if dataset is not None:
        train_episodes, episodes = dataset.split()
        mean, std = dataset.statistics(train_episodes)["action"]
        span = args.goal_H * frameskip // dataset.meta["frameskip"]
        lengths = dataset.episode_ends - dataset.episode_starts
        episodes = [e for e in episodes if lengths[e] > span]
        if not episodes:
            raise UserError(f"no validation episode of {dataset.path} is longer than {span} rows (--goal-H)")
    for seed in args.seed:
        rng = np.random.default_rng([seed, 1])
        for n in range(args.n_evals):
            if dataset is None and hasattr(env, "sample_problem"):  # the release's own
                problems.append(env.sample_problem(seed, n))
            elif dataset is None:
                problems.append((env.sample_state(rng), env.sample_state(rng)))
            else:
                episode = rng.choice(episodes)
                row = dataset.episode_starts[episode] + rng.integers(lengths[episode] - span)
                start, goal = dataset.states[row], dataset.states[row + span]
                if args.goal_source == "random_action":  # normal, as the data's actions spread
                    actions = rng.normal(mean, std, (1, args.goal_H * frameskip, len(mean)))
                    (goal,) = env.simulate(start[None], actions)
                problems.append((start, goal))
    return tuple(np.array(states, np.float64) for states in zip(*problems, strict=True))


class Worlds:
    """One simulation for all problems: a state each, and the last observation of each.

    With a `history`, the last so many observations `past` {name: (B, history, ...)}, and the actions `taken`
    (B, (history - 1) * frameskip, DoF) between them, of a ball at rest at first. Of the first `films` problems what
    happens is filmed, and the `plans` are kept: what was seen when each was made, and its actions.
    """

    def __init__(self, env, starts, goals, films=0, history=1, frameskip=1):
        self.env, self.states, self.goals = env, starts.copy(), goals
        env.chance, self.film_chance = map(np.random.default_rng, (0, 1))  # of --shift: the same for each planner
        self.dof, self.bounds = env.action_space.shape[0], (env.action_space.low, env.action_space.high)
        self.obs = self.observe(starts)
        self.goal_obs = self.observe(goals)
        self.films = [[frame] for frame in self.obs["visual"][:films].copy()]
        self.plans = [[] for _ in self.films]
        self.past = {name: np.repeat(o[:, None], history, axis=1) for name, o in self.obs.items()}
        self.taken = np.zeros((len(starts), (history - 1) * frameskip, self.dof), np.float32)

    def observe(self, states):
        """States (B, P) -> {"visual": (B, H, W, 3) uint8, "proprio": (B, P)}."""
        obs = []
        for state in states:
            self.env.set_state(state)
            obs.append(self.env.observe())
        return {name: np.stack([o[name] for o in obs]) for name in obs[0]}

    def act(self, problems, actions):
        """Executes actions (B, n, frameskip * DoF) in the worlds `problems` (B,), observes at the end, or with a
        history after every one of the n, and returns which of them now stand at their goals."""
        for i, sequence in zip(problems, actions, strict=True):
            if i < len(self.films):
                seen = {name: o[i].copy() for name, o in self.past.items()}
                self.plans[i].append((seen, np.concatenate([self.taken[i], sequence.reshape(-1, self.dof)])))
        for step in np.split(actions, actions.shape[1], axis=1) if self.taken.size else [actions]:
            self.execute(problems, step.reshape(len(actions), -1, self.dof))
        return self.env.goal_reached(self.states[problems], self.goals[problems])

    def film(self):
        """A frame that nobody plans with: it leaves the noise of those that follow as it is."""
        chance, self.env.chance = self.env.chance, self.film_chance
        frame, self.env.chance = self.env.render(), chance
        return frame

    def execute(self, problems, actions):
        """Executes environment actions (B, n, DoF) in the worlds `problems`, and observes."""
        for i, sequence in zip(problems, actions, strict=True):
            self.env.set_state(self.states[i])
            for action in sequence:
                self.env.step(action, render=False)
                if i < len(self.films):
                    self.films[i].append(self.film())
            self.states[i] = self.env.state
        for name, seen in self.observe(self.states[problems]).items():
            self.obs[name][problems] = seen
            self.past[name][problems] = np.concatenate([self.past[name][problems, 1:], seen[:, None]], axis=1)
        self.taken[problems] = np.concatenate([self.taken[problems], actions], axis=1)[:, actions.shape[1] :]


# ---------------------------------------------------------------------------------------------------------
# What a plan is judged by: the world model's imagination, or (the control) the true simulator


@torch.no_grad()
def latent_cost(model, worlds, alpha, device, objective="last", base=2.0):
    """Returns problems (B,) -> cost, where cost(actions (B, M, T, A)) -> (B, M) is J in the model's imagination.

    Goals are encoded once, observations once per plan. All candidates advance together, one call of the model per
    planner step; beyond max_tokens in pieces.
    """

    def encode(obs):
        return model.encode({name: torch.from_numpy(o).to(device) for name, o in obs.items()})

    # On a GPU a piece bounds the memory (3 GB at the paper's size); on a CPU it stays in the cache: 1.5 times as fast.
    max_tokens = 2**13 if device.type == "cpu" else 2**18
    piece = max(1, max_tokens // (model.num_hist * model.encoder.num_patches))
    goals = encode({name: o[:, None] for name, o in worlds.goal_obs.items()})

    def for_problems(problems):
        z0 = encode({name: o[problems] for name, o in worlds.past.items()})
        goal = {name: latent[problems] for name, latent in goals.items()}
        H = z0["visual"].shape[1]  # frames that are known
        taken = torch.from_numpy(worlds.taken[problems]).to(device).reshape(len(problems), H - 1, model.action_dim)

        def cost(actions):
            B, M = actions.shape[:2]
            owner = torch.arange(B, device=device).repeat_interleave(M)  # the problem of each candidate
            costs = []
            for index, chunk in zip(owner.split(piece), actions.flatten(0, 1).split(piece), strict=True):
                known = {name: latent[index] for name, latent in z0.items()}
                z = model.rollout(known, torch.cat([taken[index], chunk], dim=1))
                J = 0.0
                for part, weight in (("visual", 1.0), ("proprio", alpha)):
                    if weight:
                        frames = z[part][:, -1 if objective == "last" else H - 1 :]  # (n, 1 or T + 1, ...)
                        target = goal[part][index].expand_as(frames)
                        error = model.predictor.criterion(frames, target, reduction="none")
                        J = J + weight * error.flatten(2).mean(2)  # (n, 1 or T + 1)
                w = base ** torch.arange(J.shape[1], device=device)
                costs.append((J * (w / w.sum())).mean(1))
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
    """Plans and acts in all worlds at once -> success (max_iter, problems) bool. A planner's units are standard
    deviations of the data's actions, as in DINO-WM; what it proposes is clipped to what the world can do."""
    args = settle(args, model)
    method = args.planner.removeprefix("mpc-")
    generator = torch.Generator(device).manual_seed(args.seed[0])
    low, high = (torch.from_numpy(b).repeat(model.frameskip).to(device) for b in worlds.bounds)

    def to_world(actions):
        return (actions * model.action_std + model.action_mean).clamp(low, high)

    def start(*shape):
        if method != "gd":
            return torch.zeros(shape)
        if args.sample_type == "randn":
            return torch.randn(shape, generator=generator, device=device)
        return torch.zeros(shape, device=device) - model.action_mean / model.action_std  # no force

    @torch.no_grad()
    def plan(problems, mean):
        cost, std = cost_for(problems), torch.full_like(mean, args.var_scale)
        if method == "gd":
            free = lambda a: cost(a * model.action_std + model.action_mean)  # noqa: E731
            bounds = ((bound - model.action_mean) / model.action_std for bound in (low, high))
            return gradient_descent(free, mean, args.opt_steps, args.lr, args.action_noise, *bounds, generator)
        clipped = lambda a: cost(to_world(a))  # noqa: E731
        if method == "mppi":
            return mppi(clipped, mean, std, args.num_samples, args.opt_steps, args.temperature, generator)
        budget, maxnorm = (args.num_samples, args.topk, args.opt_steps), args.maxnorm or math.inf
        improved = dict(noise=coloured_noise(args.noise_beta, worlds.dof), keep=args.keep) if method == "icem" else {}
        return cem(clipped, mean, std, *budget, generator, args.momentum, maxnorm, **improved)

    def act(problems, actions):
        reached = worlds.act(problems, to_world(actions).cpu().numpy())
        if bar is not None:
            bar.update()
        return reached

    steps = args.n_taken_actions, args.max_iter
    return mpc(plan, act, len(worlds.states), args.goal_H, model.action_dim, *steps, device, start)


def solve_at_random(worlds, model, args):
    """The random policy in the same worlds for as long."""
    args = settle(args, model)
    rng = np.random.default_rng(args.seed[0])
    low, high = worlds.bounds

    def plan(problems, mean):
        shape = (*mean.shape[:2], model.frameskip, worlds.dof)
        return torch.from_numpy(rng.uniform(low, high, shape)).float().flatten(2)

    def act(problems, actions):
        return worlds.act(problems, actions.numpy())

    return mpc(plan, act, len(worlds.states), args.goal_H, model.action_dim, args.n_taken_actions, args.max_iter)


def controls(env, starts, goals, model, args):
    """Success rates by iteration of the controls asked for, of which "oracle" is CEM whatever the planner; kept in a
    file, since they depend on the problems and the budget alone."""
    as_cem = {"planner": "mpc-cem" if args.planner.startswith("mpc-") else "cem"}
    if args.planner.endswith("gd"):  # its --opt-steps are of another kind
        as_cem["opt_steps"] = None
    args = settle(argparse.Namespace(**vars(args) | as_cem), model)
    budget = {k: getattr(args, k) for k in (
        "seed", "goal_H", "n_taken_actions", "max_iter", "num_samples", "topk", "opt_steps", "var_scale",
        "momentum", "maxnorm",
    )}  # fmt: skip
    key = repr((model.world["env"], model.frameskip, budget)).encode() + starts.tobytes() + goals.tobytes()
    key += model.action_std.cpu().numpy().tobytes() + model.action_mean.cpu().numpy().tobytes()
    path = Path("plan_outputs") / f"controls_{hashlib.sha256(key).hexdigest()[:12]}.json"
    known = read_json(path) if path.is_file() else {}
    for name in set(args.baselines) - known.keys():
        worlds = Worlds(env, starts, goals)
        if name == "random":
            success = solve_at_random(worlds, model, args)
        else:
            with tqdm(total=args.max_iter, desc="oracle", unit="plan") as bar:
                success = solve(worlds, simulator_cost(worlds), model.cpu(), args, "cpu", bar)
        known[name] = success.float().mean(1).tolist()
        write_atomic(path, lambda p: p.write_text(json.dumps(known)))
    model.to(args.device)  # the simulator plans on the CPU
    return {name: known[name] for name in args.baselines}


# ---------------------------------------------------------------------------------------------------------
# The error of imagination by horizon

PERTURBATION = 0.01  # of a state, in standard deviations of the data's


def record(env, states, actions):
    """What is seen along actions (B, T, A) from states: the observations {name: (B, T + 1, ...)}, and the states."""
    worlds = Worlds(env, states, states)
    obs, visited = [{k: o.copy() for k, o in worlds.obs.items()}], [worlds.states.copy()]
    for t in tqdm(range(actions.shape[1]), desc="simulate", unit="step"):
        worlds.act(np.arange(len(states)), actions[:, t : t + 1])
        obs.append({k: o.copy() for k, o in worlds.obs.items()})
        visited.append(worlds.states.copy())
    return {k: np.stack([o[k] for o in obs], axis=1) for k in obs[0]}, visited


@torch.no_grad()
def horizon_error(env, models, T, count, seeds, device):
    """{run: {"model", "copy", "simulator": errors of steps 1 .. T}} of the models {run: model}, in their own visual
    latents, over `count` trajectories.

    A model knows the frames from which its training rollouts start and imagines T more under random actions. The error
    is mean ||z^ - z||^2 over the trajectories and numbers, divided by z's variance over them: 1 is as bad as always
    saying the mean. "copy" holds the last known frame; "simulator" is the true one, begun from that frame's state plus
    normal noise of 0.01 standard deviations: how far two worlds drift apart that were almost the same.
    """
    reference, rng = next(iter(models.values())), np.random.default_rng([*seeds, 2])
    before = max(model.context for model in models.values()) - 1  # true frames that come before the last known one
    starts = np.array([env.sample_state(rng) for _ in range(count)])
    shape = (count, before + T, reference.frameskip, *env.action_space.shape)
    actions = rng.uniform(env.action_space.low, env.action_space.high, shape).astype(np.float32).reshape(*shape[:2], -1)
    obs, states = record(env, starts, actions)
    noise = PERTURBATION * reference.proprio_std.cpu().numpy() * rng.normal(size=starts.shape)
    moved, _ = record(env, states[before] + noise, actions[:, before:])

    def encode(model, obs, first=0):
        """Latents of the frames from `first` on, one trajectory at a time: pretrained eyes need the memory."""
        each = ({k: torch.from_numpy(o[i : i + 1, first:]).to(device) for k, o in obs.items()} for i in range(count))
        z = [model.encode(o) for o in each]
        return {name: torch.cat([latent[name] for latent in z]) for name in z[0]}

    curves = {}
    for run, model in models.items():
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
    models = {run: released.load_model(run, device, args.data, args.weights) for run in args.ckpt}
    worlds = {(model.world["env"], model.world["img_size"], model.frameskip) for model in models.values()}
    if len(worlds) > 1:
        raise UserError("--horizon-error compares runs of one environment, --img-size and --frameskip")
    env, count = open_world(next(iter(models.values())), args.shift), len(args.seed) * args.n_evals
    curves = horizon_error(env, models, args.horizon_error, count, args.seed, device)
    out = Path("plan_outputs") / args.name
    result = {"args": vars(args), "curves": curves}
    write_atomic(out / "horizon_error.json", lambda path: path.write_text(json.dumps(result, indent=1)))
    write_atomic(out / "horizon_error.png", lambda path: draw_horizon_error(curves, path))
    print_horizon_error(curves, count)
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
        axes.plot(k, rates, "--", label=CONTROLS[name])
    axes.set(xlabel="MPC iterations", ylabel="success rate", ylim=(0, 1.02), title=f"{results['n_evals']} goals")
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=120)
    plt.close(figure)


@torch.no_grad()
def imagine(model, plans, device):
    """A filmed problem's plans -> what they were imagined to look like: frames (1 + model steps, H, W, 3)."""
    frames = []
    for seen, actions in plans:
        z = model.encode({name: torch.from_numpy(o)[None].to(device) for name, o in seen.items()})
        actions = torch.from_numpy(actions).to(device).reshape(1, -1, model.action_dim)
        known = z["visual"].shape[1] if frames else z["visual"].shape[1] - 1  # what the first plan started from, too
        frames.append(model.decode(model.rollout(z, actions)["visual"][:, known:])[0])
    return np.concatenate(frames)


def write_films(out, model, worlds, decode, device):
    """A GIF a problem: start, what happened, goal. With `decode` what was imagined, too, in strips (above what
    happened, below what was imagined) and GIFs; returns how alike they are."""
    pairs = []
    for i, film in enumerate(map(np.array, worlds.films)):
        panels, goal = [film[:1], film], worlds.goal_obs["visual"][i : i + 1]
        if decode:
            imagined, real = imagine(model, worlds.plans[i], device), film[:: model.frameskip]
            write_strips(out / f"imagined_{i}.png", real, imagined)
            panels.append(imagined.repeat(model.frameskip, axis=0)[: len(film)])
            pairs.append((imagined[1:], real[1:]))
        write_gif(out / f"problem_{i}.gif", beside(*panels, goal))
    return likeness(*map(np.concatenate, zip(*pairs, strict=True))) if pairs else None


def run(model, env, starts, goals, args, device, out):
    """Plans to all goals with one planner, writes what came of it to the folder `out`, and returns it."""
    out.mkdir(parents=True, exist_ok=True)
    settled = settle(args, model)
    worlds = Worlds(env, starts, goals, args.n_gifs, settled.history, model.frameskip)
    cost_for = latent_cost(model, worlds, args.alpha, device, args.objective, args.base)
    begin = time.perf_counter()
    with tqdm(total=settled.max_iter, desc=f"{args.planner} with {args.ckpt}", unit="plan") as bar:
        success = solve(worlds, cost_for, model, args, device, bar)
    seconds = time.perf_counter() - begin
    rates = success.float().mean(1).tolist()
    results = {
        "args": vars(settled),
        "success_by_iter": rates,
        "interval": [wilson(p, len(starts)) for p in rates],
        "n_evals": len(starts),
        "imagination": write_films(out, model, worlds, args.decode, device),
        "controls": controls(env, starts, goals, model, args),
        "seconds": seconds,
    }
    write_atomic(out / "results.json", lambda path: path.write_text(json.dumps(results, indent=1)))
    write_atomic(out / "success.png", lambda path: draw(results, path))
    print_table(results)
    if results["imagination"]:
        scores = ", ".join(f"{name.upper()} {value:.3f}" for name, value in results["imagination"].items())
        print(f"imagined against real frames: {scores}")
    print(f"\n{seconds:.0f} s of planning and acting; {out}/ holds results.json, success.png and the GIFs")
    return results


def compare_planners(results, path):
    """A table of planners: what they search, what they execute, and how often they end at the goal."""
    names = list(next(iter(results.values()))["controls"])
    header = ["planner", "search per plan", "plans × model steps", "success", *names, "seconds"]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for planner, result in results.items():
        args, (low, high) = result["args"], result["interval"][-1]
        search = "gradient steps" if planner.endswith("gd") else f"× {args['num_samples']} candidates"
        cells = [f"`{planner}`", f"{args['opt_steps']} {search}", f"{args['max_iter']} × {args['n_taken_actions']}"]
        cells += [f"{result['success_by_iter'][-1]:.2f} [{low:.2f}, {high:.2f}]"]
        cells += [f"{result['controls'][name][-1]:.2f}" for name in names] + [f"{result['seconds']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    write_atomic(path, lambda p: p.write_text("\n".join(lines) + "\n"))
    print("\n" + "\n".join(lines))


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
    if args.decode and model.decoder is None:
        raise UserError(f"--decode: {args.ckpt} has no decoder; train one with python train.py --decoder")
    env = open_world(model, args.shift)
    dataset = None
    if args.goal_source in ("dset", "random_action"):
        looks = {name: model.world[name] for name in ("env", "img_size")}
        dataset = released.open_dataset(args.data or model.world["data"], **looks)
    if args.goal_source == "file":
        starts, goals = read_problems(args.goal_file, env, model.world["env"])
    else:
        starts, goals = make_problems(env, args, model.frameskip, dataset)
    if args.save_targets:
        content = {"env": model.world["env"], "starts": starts.tolist(), "goals": goals.tolist()}
        write_atomic(args.save_targets, lambda path: path.write_text(json.dumps(content)))

    out, planners = Path("plan_outputs") / args.name, args.planner.split(",")
    results = {}
    for args.planner in planners:
        folder = out if len(planners) == 1 else out / args.planner
        results[args.planner] = run(model, env, starts, goals, args, device, folder)
    if len(planners) > 1:
        compare_planners(results, out / "table.md")


if __name__ == "__main__":
    run_script(main)
