"""Put a trained world model into its world, plan to goal images, and report success as a function of budget.

Every problem is a start and a goal frame. A planner of cem.py looks for the actions whose imagined latents are closest
to the goal's (DINO-WM, arXiv:2411.04983, section 3.3; alpha, and "all", as in the released code):

    J_t(a) = ||z^_t - z_g||^2 + alpha ||p^_t - p_g||^2        (means over tokens and dimensions)
    J(a) = J_T(a)  "last",    or    mean_t w_t J_t(a),  w_t = base^t / sum_s base^s,  t = 0 .. T  "all"

A model that is trained on the absolute error (V-JEPA 2-AC, arXiv:2506.09985) plans by it, too. `cem`, `icem`, `mppi`
and `gd` make one plan and execute it whole. `mpc-cem` and so on execute n_taken_actions model steps of frameskip
environment steps each, observe, and plan again. The release knows only the last frame when it plans, and executes the
whole plan; the paper, and a checkpoint of `--variant paper`, has a history of frames and executes the first step.

    python plan.py                                             # the newest run
    python plan.py --ckpt runs/pointmaze_vae --seed 99 7 2024  # 3 x 50 problems
    python plan.py --controls random,oracle                    # with controls, on the same problems
    python plan.py --planner cem,gd,mpc-cem,mpc-gd             # the paper's comparison of planners, as a table
    python plan.py --goal-source goals.json                    # problems that --save-targets goals.json wrote
    python plan.py --ckpt runs/pointmaze-large_pca --waypoints graph        # a maze that is longer than the horizon
    python plan.py --planner mpc-cem                           # with DINO-WM's planner and budget
    python plan.py --planner mpc-cem --num-samples 400 --topk 10 --planner-args momentum=0.15,maxnorm=1  # V-JEPA 2-AC's
    torchrun --nproc-per-node 2 plan.py --n-evals 500          # two processes share the problems

Writes plan_outputs/NAME/: table.md, results.json, success.png, and GIFs of a few problems: start, what happened, goal.
If the run has a decoder, they also show what was imagined. With waypoints, waypoints.png shows the same problems from
above: the graph, the path, and what the ball did. Several planners get a folder each, and share the table.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from cem import cem, coloured_noise, gradient_descent, mpc, mppi
from data import Windows, token_cache
from lib import common, processes, reports
from lib.common import RANK, UserError, positive
from lib.pointmaze import SHIFTS, PointMaze
from lib.problems import get_problems, open_episodes, open_world
from lib.speed import bench_planning
from lib.waypoints import Graph, Route
from predictor import WorldModel, load_model

CONTROLS = {"random": "random policy", "oracle": "true simulator"}
METHODS = ("cem", "icem", "mppi", "gd")
PLANNERS = METHODS + tuple(f"mpc-{method}" for method in METHODS)
# What a plan costs, if no flag says otherwise. That of cem is DINO-WM's; icem plans equally well with a sixth of it.
BUDGETS = {"cem": dict(num_samples=300, topk=30, opt_steps=10), "icem": dict(num_samples=100, topk=10, opt_steps=5)}
BUDGETS |= {"mppi": dict(num_samples=300, opt_steps=10), "gd": dict(num_samples=1, opt_steps=1000)}
FILMS = 4  # problems that are filmed


# ---- What a plan costs: in the model's imagination, or (a control) in the true simulator ---------


@torch.no_grad()
def latent_cost(model, worlds, device, objective="last", alpha=0.0, base=2.0):
    """Returns problems (B,) -> cost, where cost(actions (B, M, T, A)) -> (B, M) is J in the model's imagination.

    Goals are encoded once, and observations once per plan. A waypoint, if there is one, takes the place of a goal. All
    candidates advance together, with one call of the model per planner step; a batch of too many tokens is cut into
    pieces.
    """

    def encode(obs):
        return model.encode({name: torch.from_numpy(o).to(device) for name, o in obs.items()})

    # On a GPU a piece bounds the memory (3 GB at the paper's size); on a CPU it stays in the cache: 1.5 times as fast.
    piece = max(1, 2 ** (13 if device.type == "cpu" else 18) // (model.num_hist * model.num_patches))
    goals = encode({name: o[:, None] for name, o in worlds.goal_obs.items()})

    def for_problems(problems):
        z0 = encode({name: o[problems] for name, o in worlds.past.items()})
        goal = {name: latent[problems] for name, latent in goals.items()}
        if worlds.route:
            worlds.route.replace(problems, goal)
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
                        error = model.criterion(frames, target, reduction="none")
                        J = J + weight * error.flatten(2).mean(2)  # (n, 1 or T + 1)
                w = base ** torch.arange(J.shape[1], device=device)
                costs.append((J * (w / w.sum())).mean(1))
            return torch.cat(costs).view(B, M)

        return cost

    return for_problems


def simulator_cost(worlds):
    """What `latent_cost` returns, with MuJoCo as the model, and the distance in metres to the goal or waypoint as J."""

    def cost(problems, goals, actions):
        B, M = actions.shape[:2]
        starts = worlds.states[problems].repeat(M, axis=0)
        final = worlds.env.simulate(starts, actions.cpu().numpy().reshape(B * M, -1, worlds.dof))
        distance = np.linalg.norm(final[:, :2].reshape(B, M, 2) - goals[:, None, :2], axis=-1)
        return torch.from_numpy(distance).to(actions)

    def for_problems(problems):
        return partial(cost, problems, worlds.route.states(problems) if worlds.route else worlds.goals[problems])

    return for_problems


# ---- Planning and acting -------------------------------------------------------------------------


def solve(worlds, cost_for, model, args, device, group=0):
    """Plans and acts in all worlds at once -> success (max_iter, problems) bool. `args` comes from `settle`.

    A planner works in standard deviations of the data's actions, as in DINO-WM. What it proposes is clipped to what the
    world can do. Each `group` of problems has random numbers of its own.
    """
    method, options = args.planner.removeprefix("mpc-"), args.planner_args
    generator = torch.Generator(device).manual_seed(args.seed[0] + 2**32 * group)
    low, high = (torch.from_numpy(b).repeat(model.frameskip).to(device) for b in worlds.bounds)

    def to_world(actions):
        return (actions * model.action_std + model.action_mean).clamp(low, high)

    def start(*shape):
        if method != "gd":
            return torch.zeros(shape)
        if options["sample_type"] == "randn":
            return torch.randn(shape, generator=generator, device=device)
        return torch.zeros(shape, device=device) - model.action_mean / model.action_std  # no force

    @torch.no_grad()
    def plan(problems, mean):
        if cost_for is None:  # a system that generates its plan does not search for it
            return model.plan(worlds, problems, mean.shape[1])
        cost, std = cost_for(problems), torch.full_like(mean, options["var_scale"])
        if method == "gd":
            free = lambda a: cost(a * model.action_std + model.action_mean)  # noqa: E731
            bounds = ((bound - model.action_mean) / model.action_std for bound in (low, high))
            step = options["lr"], options["action_noise"]
            with torch.backends.cudnn.flags(enabled=False):  # its GRU has no gradient outside of training
                return gradient_descent(free, mean, args.opt_steps, *step, *bounds, generator)
        clipped = lambda a: cost(to_world(a))  # noqa: E731
        if method == "mppi":
            return mppi(clipped, mean, std, args.num_samples, args.opt_steps, options["temperature"], generator)
        budget, update = (args.num_samples, args.topk, args.opt_steps), (options["momentum"], options["maxnorm"])
        icem = dict(noise=coloured_noise(options["noise_beta"], worlds.dof), keep=options["keep"])
        return cem(clipped, mean, std, *budget, generator, *update, **(icem if method == "icem" else {}))

    def act(problems, actions):
        return worlds.act(problems, to_world(actions).cpu())

    limits = args.n_taken_actions, args.max_iter
    return mpc(plan, act, len(worlds.states), args.goal_H, model.action_dim, *limits, device, start)


def in_groups(solve_group, num_problems, planner, title):
    """Success (max_iter, problems) of all problems. `solve_group(group, problems)` solves some of them at a time. The
    size of the groups is fixed, so that the number of torchrun's processes changes no result."""
    size = 50 if planner.endswith("gd") else 10
    groups = list(enumerate(slice(i, i + size) for i in range(0, num_problems, size)))
    return torch.cat(processes.share(lambda group: solve_group(*group), groups, title), dim=1)


def controls(env, starts, goals, model, args, graph=None):
    """Success rates by iteration of the controls in args.controls, on the same problems and for as long."""
    # The simulator has no gradient for gd to follow, and a system that draws its plans has no search budget. In both
    # cases the control plans with icem.
    instead = BUDGETS["icem"] | {"planner": "icem"} if args.planner.endswith("gd") or not args.opt_steps else {}
    oracle = argparse.Namespace(**vars(args) | instead)
    device, limits = model.action_mean.device, (args.n_taken_actions, args.max_iter)

    def random_policy(group, problems):
        worlds, rng = Worlds(env, starts[problems], goals[problems]), np.random.default_rng([args.seed[0], group])

        def draw(unsolved, mean):
            low, high = env.action_space.low, env.action_space.high
            actions = rng.uniform(low, high, (*mean.shape[:2], model.frameskip, len(low)))
            return torch.from_numpy(actions).float().flatten(2)

        return mpc(draw, worlds.act, len(worlds.states), args.goal_H, model.action_dim, *limits)

    def true_simulator(group, problems):
        worlds = Worlds(env, starts[problems], goals[problems], graph=graph)
        return solve(worlds, simulator_cost(worlds), model, oracle, device, group)

    solvers = {"random": random_policy, "oracle": true_simulator}
    success = {name: in_groups(solvers[name], len(starts), "icem", CONTROLS[name]) for name in args.controls}
    return {name: reached.float().mean(1).tolist() for name, reached in success.items()}


class Worlds:
    """All problems in one simulation, with a state for each.

    `past` {name: (B, history, ...)} are the last `history` observations of each, and `taken`
    (B, (history - 1) * frameskip, DoF) the actions between them. Before the start the first observation is repeated,
    and the actions are zero, although the ball may be moving. The first `films` problems are filmed, and their `plans`
    are kept: what was seen when a plan was made, and its actions. Their `tracks` say where the ball was. If there is a
    `graph` of waypoints, a `route` leads through it.
    """

    def __init__(self, env, starts, goals, films=0, history=1, frameskip=1, graph=None, group=0):
        self.env, self.states, self.goals = env, starts.copy(), goals
        env.shift_rng, self.film_rng = (np.random.default_rng([i, group]) for i in (0, 1))  # the same for each planner
        self.dof, self.bounds = env.action_space.shape[0], (env.action_space.low, env.action_space.high)
        obs = self.observe(starts)
        self.goal_obs = self.observe(goals)
        self.films = [[frame] for frame in obs["visual"][:films].copy()]
        self.plans, self.tracks = [[] for _ in self.films], [[state[:2]] for state in starts[:films]]
        self.past = {name: np.repeat(o[:, None], history, axis=1) for name, o in obs.items()}
        self.taken = np.zeros((len(starts), (history - 1) * frameskip, self.dof), np.float32)
        self.route = graph and Route(graph, self)

    def observe(self, states):
        """States (B, P) -> {"visual": (B, H, W, 3) uint8, "proprio": (B, P)}."""
        obs = []
        for state in states:
            self.env.set_state(state)
            obs.append(self.env.observe() | {"proprio": np.float32(self.env.state)})  # the whole state
        return {name: np.stack([o[name] for o in obs]) for name in obs[0]}

    def act(self, problems, actions):
        """Executes actions (B, n, frameskip * DoF) in the worlds `problems` (B,) and returns which of them have reached
        their goals. It observes at the end, or with a history after every one of the n."""
        actions = np.asarray(actions)
        for i, sequence in zip(problems, actions, strict=True):
            if i < len(self.films):
                seen = {name: o[i].copy() for name, o in self.past.items()}
                self.plans[i].append((seen, np.concatenate([self.taken[i], sequence.reshape(-1, self.dof)])))
        for part in np.split(actions, actions.shape[1], axis=1) if self.taken.size else [actions]:
            part = part.reshape(len(problems), -1, self.dof)  # environment actions
            for i, sequence in zip(problems, part, strict=True):
                self.env.set_state(self.states[i])
                for action in sequence:
                    self.env.step(action, render=False)
                    if i < len(self.films):
                        self.films[i].append(self.film())
                        self.tracks[i].append(self.env.state[:2])
                self.states[i] = self.env.state
            for name, seen in self.observe(self.states[problems]).items():
                self.past[name][problems] = np.concatenate([self.past[name][problems, 1:], seen[:, None]], axis=1)
            self.taken[problems] = np.concatenate([self.taken[problems], part], axis=1)[:, part.shape[1] :]
        return self.env.goal_reached(self.states[problems], self.goals[problems])

    def film(self):
        """A frame for the GIF. It has random numbers of its own, so that filming changes nothing for the planner."""
        rng, self.env.shift_rng = self.env.shift_rng, self.film_rng
        frame, self.env.shift_rng = self.env.render(), rng
        return frame


# ---- One planner, all problems --------------------------------------------------------------------


def open_graph(args, model, device):
    """The graph of waypoints over the training episodes, or None without --waypoints."""
    if args.waypoints:
        dataset = open_episodes(args, model)
        pairs = Windows(dataset, dataset.split()[0], 2, model.frameskip)
        return Graph(model, pairs, token_cache(model.encoder, dataset, device), args.goal_H)


def run(model, env, starts, goals, args, device, out, graph=None):
    """Plans to all goals with one planner, writes what came of it to the folder `out`, and returns it."""
    n, begin, filmed, counts = len(starts), time.perf_counter(), None, []
    objective = args.objective, args.planner_args["alpha"], args.planner_args["base"]

    def solve_group(group, problems):
        nonlocal filmed
        films = 0 if group else FILMS
        worlds = Worlds(env, starts[problems], goals[problems], films, args.history, model.frameskip, graph, group)
        filmed = filmed or worlds
        with common.bfloat16(device, args.dtype == "bfloat16"):
            cost_for = latent_cost(model, worlds, device, *objective) if args.opt_steps else None
            success = solve(worlds, cost_for, model, args, device, group)
        counts.append(worlds.route and worlds.route.count())
        return success

    success = in_groups(solve_group, n, args.planner, f"{args.planner} with {args.ckpt}")
    seconds, rates = time.perf_counter() - begin, success.float().mean(1).tolist()
    results = {
        "args": vars(args),
        "success_by_iter": rates,
        "interval": reports.wilson(success.sum(1), n),
        "n_evals": n,
        "controls": controls(env, starts, goals, model, args, graph),
        "seconds": seconds,
    }
    if graph:
        plans, lost = np.sum(sum(processes.gather(counts), []), axis=0).tolist()
        results["waypoints"] = {"plans": plans, "without": lost}
        print(f"{lost} of {plans} plans went without waypoints: the graph had no neighbour, or no path")
    if RANK:
        return results  # the first process alone writes
    if graph:
        filmed.route.draw(out / "waypoints.png")
    results["imagination"] = reports.write_films(out, model, filmed, device)
    common.write_json(out / "results.json", results)
    reports.write_success(out / "success.png", results, CONTROLS)
    if results["imagination"]:
        scores = ", ".join(f"{name.upper()} {value:.3f}" for name, value in results["imagination"].items())
        print(f"imagined against real frames: {scores}")
    print(f"{seconds:.0f} s for {n} problems; {out}/ holds results.json, success.png and the GIFs")
    return results


# ---- The script ----------------------------------------------------------------------------------


# name: default, how its text is read, what it is
PLANNER_ARGS = {
    "alpha": (0.0, common.number(float, 0, 1e6), "weight of proprio in the cost"),
    "base": (2.0, common.above_zero, "with --objective all: weight of a frame over that of the one before"),
    "var_scale": (1.0, common.above_zero, "first standard deviation of the search; 1 is that of the data's actions"),
    "momentum": (0.0, common.number(float, 0, 0.999), "share of CEM's old mean and deviation that stays"),
    "maxnorm": (1e6, common.above_zero, "largest number in CEM's candidates, in the unit of var_scale"),
    "noise_beta": (1.0, common.number(float, 0, 10), "icem's noise has the spectrum 1 / f^beta"),
    "keep": (3, positive, "icem's elites that run again"),
    "temperature": (0.1, common.above_zero, "temperature of mppi, in standard deviations of the candidates' costs"),
    "lr": (1.0, common.above_zero, "learning rate of the gd planner"),
    "action_noise": (0.003, common.number(float, 0, 1e3), "noise that the gd planner adds at each step"),
    "sample_type": ("randn", common.choice("randn", "zero"), "what the gd planner starts from"),
}


def get_args(argv=None):
    parser = common.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--ckpt", help="the run to plan with, ours or released by DINO-WM (default: the newest under runs/)")
    add("--weights", help="pretrained weights for the encoder of a released run, which lacks them; as in train.py")
    data = "data set of --goal-source dset, --waypoints, and a released run's statistics (default: the run's own)"
    add("--data", help=data)
    seeds = "seeds of the problems; the planner uses the first"
    add("--seed", type=common.seed_number, nargs="+", default=[99], help=seeds)
    add("--n-evals", type=positive, default=50, help="number of problems per seed; those of all seeds are pooled")
    add("--shift", choices=SHIFTS, help="let the world look different from how it looked in training")
    sources = "random_state: random start and goal states; dset: both from a validation episode, goal_H model steps "
    sources += "apart; random_action: a start from there, and where random actions end; or a file of --save-targets"
    add("--goal-source", default="random_state", help=sources)
    add("--save-targets", metavar="PATH", help="write the problems to this file")
    add("--planner", type=common.names(PLANNERS), default="mpc-icem", help=f"one or more of {', '.join(PLANNERS)}")
    read = common.key_values({name: read for name, (_, read, _) in PLANNER_ARGS.items()})
    what = "; ".join(f"{name}={default}: {what}" for name, (default, _, what) in PLANNER_ARGS.items())
    add("--planner-args", type=read, default={}, help=f"settings of the planners, as K=V,K=V: {what}")
    add("--goal-H", type=positive, default=5, help="planning horizon in model steps")
    add("--n-taken-actions", type=positive, help="model steps before replanning (default: goal_H; paper's variant: 1)")
    history = "number of true frames from which a plan imagines (default: 1; paper's: num_hist; a system's own)"
    add("--history", type=positive, help=history)
    add("--max-iter", type=positive, help="MPC iterations (default: as many as make 10 goal_H model steps)")
    waypoints = "graph: plan to waypoints on the shortest path to the goal in a graph over the training frames"
    add("--waypoints", choices=("graph",), help=waypoints)
    add("--objective", choices=("last", "all"), default="last", help="imagined frames that should be like the goal")
    has = {name: [method for method in METHODS if name in BUDGETS[method]] for name in BUDGETS["cem"]}
    budget = {name: ", ".join(f"{method} {BUDGETS[method][name]}" for method in has[name]) for name in has}
    add("--num-samples", type=positive, help=f"number of candidates (default: {budget['num_samples']})")
    add("--topk", type=positive, help=f"number of elites (default: {budget['topk']})")
    add("--opt-steps", type=positive, help=f"iterations per plan (default: {budget['opt_steps']})")
    add("--controls", type=common.names(CONTROLS), default=[], help="controls on the same problems: random,oracle")
    add("--name", help="name of the result under plan_outputs/ (default: the run's)")
    dtype = "numbers in which the model sees and imagines (default: bfloat16 where that is faster, else float32)"
    add("--dtype", choices=("float32", "bfloat16"), help=dtype)
    add("--device", type=common.available_device, default=common.default_device(), help="where to compute")
    add("--bench", action="store_true", help="measure how fast models of two sizes imagine, and do nothing else")
    args = parser.parse_args(argv)
    args.planner_args = {name: default for name, (default, *_) in PLANNER_ARGS.items()} | args.planner_args
    if (args.n_taken_actions or 1) > args.goal_H:
        raise UserError(f"--n-taken-actions {args.n_taken_actions} is more than the {args.goal_H} that --goal-H plans")
    if args.dtype == "bfloat16" and not common.has_bfloat16(args.device):
        raise UserError(f"the device {args.device} has no arithmetic for bfloat16: take --dtype float32")
    for planner in args.planner:
        settle(args, planner)  # an impossible budget is reported before anything is opened
    return args


def settle(args, planner, model=None):
    """The arguments of one planner. What no flag says follows from the planner and the checkpoint's variant."""
    args, method = argparse.Namespace(**vars(args) | {"planner": planner}), planner.removeprefix("mpc-")
    paper = model is not None and model.variant == "paper"
    for name, default in BUDGETS[method].items():
        setattr(args, name, getattr(args, name) or default)
    if method in ("cem", "icem") and not 2 <= args.topk <= args.num_samples:
        raise UserError(f"--topk {args.topk} must lie between 2 and --num-samples {args.num_samples}")
    if method == "icem" and min(args.planner_args["keep"], args.topk) >= args.num_samples:
        raise UserError(f"keep={args.planner_args['keep']} leaves no new candidate of --num-samples {args.num_samples}")
    if method == "mppi" and args.num_samples < 2:
        raise UserError("mppi weighs candidates against each other: --num-samples must be at least 2")
    if model is not None:
        args.history, wide = args.history or model.history, args.device.startswith("cuda") or model.wide
        args.dtype = args.dtype or ("bfloat16" if wide and common.has_bfloat16(args.device) else "float32")
        if hasattr(model, "plan"):
            args.num_samples = args.opt_steps = 0  # it does not search
    if planner.startswith("mpc-"):
        args.n_taken_actions = args.n_taken_actions or (1 if paper else args.goal_H)
        args.max_iter = args.max_iter or 10 * args.goal_H // args.n_taken_actions
    else:
        args.n_taken_actions, args.max_iter = args.goal_H, 1
    return args


def newest_run():
    runs = sorted(Path("runs").glob("*/model.safetensors"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise UserError("no trained model under runs/: python train.py first, or give --ckpt")
    return str(runs[-1].parent)


def main():
    args = get_args()
    if args.bench:
        return [bench_planning(size, torch.device(args.device)) for size in ("laptop", "paper")]
    args.ckpt = args.ckpt or newest_run()
    out = common.output_folder("plan_outputs", args.name or Path(args.ckpt).resolve().name)
    device = processes.join(args.device)
    model = load_model(args.ckpt, device, args.data, args.weights)
    if args.planner_args["alpha"] and not model.proprio_dim:
        raise UserError(f"alpha weighs proprio, which {args.ckpt} does not have beside its visual latent")
    processes.keep_freed_memory()
    if args.waypoints and not isinstance(model, WorldModel):
        raise UserError(f"--waypoints wants a model with a frozen encoder, and {args.ckpt} has none")
    processes.use_threads(device, model.num_patches)
    env = open_world(model, args.shift)
    of_mazes = {"--controls oracle": "oracle" in args.controls, "--waypoints": args.waypoints}
    of_mazes |= {"--goal-source random_action": args.goal_source == "random_action"}
    if not isinstance(env, PointMaze) and (given := [flag for flag, is_given in of_mazes.items() if is_given]):
        raise UserError(f"{given[0]} is for the mazes, and not for {model.world['env']}")
    graph, (starts, goals) = open_graph(args, model, device), get_problems(env, args, model)
    if args.save_targets and RANK == 0:
        content = {"env": model.world["env"], "starts": starts.tolist(), "goals": goals.tolist()}
        common.write_json(args.save_targets, content)
    results = {}
    for planner in args.planner:
        folder = out if len(args.planner) == 1 else out / planner
        results[planner] = run(model, env, starts, goals, settle(args, planner, model), device, folder, graph)
    if RANK == 0:
        reports.write_table(results, out / "table.md")


if __name__ == "__main__":
    common.run_script(main)
