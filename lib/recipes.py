"""The flags of vae_mdnrnn.py, the recipe of each world (what holds where no flag is given), and the files of a run."""

import argparse
from pathlib import Path

import numpy as np

import data
from lib import common
from lib.common import CORES, RANK, WORLD_SIZE, UserError, positive
from lib.logs import LOGS, open_log
from lib.worlds import ENVIRONMENTS

# The paper's sizes (appendix A), with budgets for two CPU cores: with all iterations some two hours for takecover and
# three for carracing. Those of pointmaze are not tuned. `episodes`, `v_steps`, `m_steps` and `c_steps` have a budget
# for each iteration of `iterate`: the first is for a run without iterations, too, and the last for all that follow.
# `popsize` is the first and the largest number of candidates.
# Unlike the paper's M of CarRacing ours predicts the reward, which the dream needs. `restart` tells M when an episode
# begins, `cell` shows C the cell state, and `squash` turns C's outputs into actions. `patience` also ends the random
# episodes early, so that fewer frames show nothing but grass.
# Deviation: `beta` is a tenth of the paper's. With the paper's the KL term falls to its tolerance, and V leaves most of
# z unused: 40 of TakeCover's 64 numbers and 24 of CarRacing's 32 have a posterior about as wide as the prior. They are
# noise, and C would act on it.
RECIPES = {
    "takecover": dict(action_dim=1, squash="tanh", policy="hold", max_steps=2100, patience=2100, cell=True)
    | dict(z_dim=64, beta=0.1, focus=50.0, hidden=512, heads="done", restart=True, where="dream", tau=[1.3])
    | dict(episodes=[2400, 800], v_steps=[8000, 3000], m_steps=[6000, 4000], c_steps=[8_000_000, 30_000_000])
    | dict(bias=False, popsize=[64, 256], trials=4, score_trials=200, iterations=2),
    "carracing": dict(action_dim=3, squash="car", policy="brownian", max_steps=1000, patience=100, cell=False)
    | dict(z_dim=32, beta=0.1, focus=50.0, hidden=256, heads="reward", restart=False, where="real", tau=[1.0])
    | dict(episodes=[600, 240], v_steps=[8000, 6000], m_steps=[3000, 2000], c_steps=[1_000_000, 5_000_000])
    | dict(bias=True, popsize=[32, 256], trials=2, score_trials=64, iterations=2),
    "pointmaze": dict(action_dim=2, squash="tanh", policy="hold", max_steps=100, patience=100, cell=False)
    | dict(z_dim=32, beta=0.1, focus=0.0, hidden=256, heads="reward", restart=False, where="dream", tau=[1.0])
    | dict(episodes=[300], v_steps=[4000], m_steps=[1000], c_steps=[1_500_000])
    | dict(bias=True, popsize=[64], trials=8, score_trials=100, iterations=3),
}
SIZES = dict(z_dim=positive, hidden=positive, n_mix=positive, mixture=common.choice("vector", "dimension"))
BUDGETS = "episodes", "v_steps", "m_steps", "c_steps"
RUN_FLAGS = "env", "seed", "max_steps", "patience", "episodes", "sizes", "v_steps", "beta", "focus", "m_steps", "lr"


def parse_args(argv, steps, description):
    """The flags of vae_mdnrnn.py, and the recipe's values where no flag is given. `steps` are its steps' names."""
    parser = common.Parser(description=description.split("\n")[0], argument_default=argparse.SUPPRESS)
    add = parser.add_argument
    add("step", choices=steps, metavar="step", help=", ".join(steps))
    add("--env", default="takecover", choices=RECIPES, help="the world; its recipe has the defaults of most flags")
    add("--out", dest="run", type=Path, metavar="OUT", help="the run's folder (default: runs/worldmodels_ENV, "
        "and of iterate runs/worldmodels_ENV_iterate)")  # fmt: skip
    add("--seed", type=common.seed_number, default=0, help="the same seed gives the same run")
    device = "where V and M are trained, and where train-c dreams"
    add("--device", type=common.available_device, default=common.default_device(), help=device)
    add("--workers", type=positive, default=CORES, help="number of processes with a real environment")
    add("--max-steps", type=positive, help="the most steps of an episode, real or dreamt")
    add("--patience", type=positive, help="steps without a reward after which an episode ends, except in `test`")
    several = "; several numbers are for the iterations of `iterate`"
    add("--episodes", type=common.number(int, 2, 10**7), nargs="+",
        help=f"number of episodes to collect (the paper: 10,000){several}")  # fmt: skip
    add("--sizes", type=common.key_values(SIZES), default={}, help="z_dim, hidden (LSTM units), n_mix (Gaussians), "
        "mixture (vector: over the whole z; dimension: for each of its numbers), as z_dim=32,hidden=256")  # fmt: skip
    add("--v-steps", type=positive, nargs="+", help=f"steps of Adam for V{several}")
    add("--beta", type=common.number(float, 0, 1e6), help="weight of V's KL term")
    add("--focus", type=common.number(float, 0, 1e6), help="how much more an error weighs for V where things move")
    add("--m-steps", type=positive, nargs="+", help=f"steps of Adam for M{several}")
    add("--lr", type=common.above_zero, default=1e-3, help="peak learning rate of V and M")
    add("--in", dest="where", choices=("dream", "real"), help="where C is trained")
    add("--tau", type=common.above_zero, nargs="+", help="temperature of the dream; several train a C for each")
    add("--popsize", type=common.number(int, 4, 10**5), nargs="+",
        help="candidates per generation of CMA-ES, at first and at most (the paper: 64)")  # fmt: skip
    add("--trials", type=common.number(int, 2, 10**5), help="episodes per candidate (the paper: 16)")
    add("--c-steps", type=common.number(int, 1, 10**11), nargs="+", help="steps, real or dreamt, after which C's "
        f"search ends (the paper's CarRacing: 1,800 generations of about a million){several}")  # fmt: skip
    add("--sigma0", type=common.above_zero, default=0.1, help="first standard deviation of CMA-ES")
    add("--score-trials", type=positive, help="episodes by which the best C is chosen")
    add("--test-episodes", type=positive, default=100, help="real episodes, and as many dreams, for each C")
    add("--test-env", choices=ENVIRONMENTS, help="the world in which `test` plays, if not --env: carracing-gymnasium")
    add("--log", choices=LOGS, help="also send losses and returns to this service")
    add("--iterations", type=positive, help="rounds of `iterate`")
    given = parser.parse_args(argv)
    run = Path("runs", f"worldmodels_{given.env}" + "_iterate" * (given.step == "iterate"))
    default = dict(run=run, n_mix=5, mixture="dimension", previous=None, test_env=None, log=None)
    args = argparse.Namespace(**default | RECIPES[given.env] | vars(given) | given.sizes)
    args.in_dim = args.z_dim + args.hidden * (1 + args.cell)  # what C sees: [z h], or [z h c]
    args.sizes = ",".join(f"{name}={getattr(args, name)}" for name in SIZES)
    if len(args.popsize) > 2 or args.popsize[0] > args.popsize[-1]:
        raise UserError("--popsize takes one number, or two of which the second is the larger")
    if args.step == "iterate" and len(args.tau) > 1:
        raise UserError(f"iterate trains one C at a time: give one --tau, not {len(args.tau)}")
    if args.step != "iterate":
        for name in BUDGETS:
            if len(getattr(given, name, [0])) > 1:
                raise UserError(f"several numbers for --{name.replace('_', '-')} are for the step iterate")
            setattr(args, name, getattr(args, name)[0])
    if WORLD_SIZE > 1 and args.step != "train-c":
        raise UserError(f"the step {args.step} is for one process: torchrun shares train-c alone")
    if len({f"{tau:g}" for tau in args.tau}) < len(args.tau):
        raise UserError("--tau names the same temperature twice")
    return args


# ---- A run's files -------------------------------------------------------------------------------


def need(args, name, step):
    if not (args.run / name).exists():
        command = f"python vae_mdnrnn.py {step} --env {args.env} --out {args.run}"
        raise UserError(f"no {args.run / name}: first run {command}")
    return args.run / name


def run_flags(args):
    """The flags of a run's args.json, with which each of its steps has to agree."""
    return {name: getattr(args, name) for name in RUN_FLAGS}


def begin_run(args):
    """Writes a run's args.json. UserError if the run was begun with other flags."""
    common.same_flags(args.run, run_flags(args))
    if args.step != "test" and RANK == 0:
        common.write_json(args.run / "args.json", run_flags(args))


def open_report(args):
    """Where --log sends the numbers of a step's training."""
    return open_log(args.log, args.run, run_flags(args))


def open_run(run):
    """The flags with which a run was begun, as `parse_args` returns them. For a run of `iterate` they are the flags of
    its last iteration that has a C."""
    run = Path(run)
    whole = [path for path in run.glob("iteration*[0-9]") if any(path.glob("c_*.safetensors"))]
    last = max(whole, key=lambda path: int(path.name.removeprefix("iteration")), default=run)
    flags = common.read_json(last / "args.json") if (last / "args.json").exists() else {}
    if not {*RUN_FLAGS} <= flags.keys() or isinstance(flags["episodes"], list):  # lists are `iterate`'s
        raise UserError(f"no run of World Models at {run}: make one with python vae_mdnrnn.py all --env takecover")
    given = [f"--{name.replace('_', '-')}={flags[name]}" for name in RUN_FLAGS]
    return parse_args(["test", f"--out={last}", *given], ["test"], __doc__)


def c_names(args):
    """The names of what train-c makes: one C for each temperature of the dream, or one for the real environment."""
    return [f"dream_tau{tau:g}" for tau in args.tau] if args.where == "dream" else ["real"]


def temperature(name):
    """The temperature of the dream in which the C called `name` has learned, or 1 if that was the real environment."""
    return float(name.removeprefix("dream_tau")) if name.startswith("dream") else 1.0


def load_data(args):
    """The data set, and mu and logvar of its frames, (2, S, z_dim)."""
    dataset = data.Dataset(need(args, "data", "collect"))
    latents = data.open_array(need(args, "latents.npy", "train-v"), 3, "f")
    if latents.shape != (2, len(dataset.frames), args.z_dim) or not np.isfinite(latents).all():
        raise UserError(f"{args.run}/latents.npy does not fit the frames and V: remove it, and give train-v again")
    return dataset, latents


def load_starts(args):
    """mu and logvar of the episodes' first frames, (2, E, z_dim), at which dreams begin. A run that extras.share wrote
    has no data, and keeps them in starts.npy."""
    path = args.run / "starts.npy"
    if not path.exists():
        dataset, latents = load_data(args)
        return latents[:, dataset.episode_starts]
    starts = np.array(data.open_array(path, 3, "f"))
    if starts.shape[::2] != (2, args.z_dim) or not starts.size or not np.isfinite(starts).all():
        raise UserError(f"{path} does not fit V: share this run again")
    return starts


def load_c(args, name=None):
    """The weights (n,) float32 of the C called `name`, or else of the first that --in and --tau name."""
    path = need(args, f"c_{name or c_names(args)[0]}.safetensors", "train-c")
    size = args.action_dim * (args.in_dim + args.bias)
    params = common.load_safetensors(path).get("params")
    if params is None or params.shape != (size,) or not params.isfinite().all():
        raise UserError(f"{path} does not hold the {size} weights of C: remove it, and give train-c again")
    return params.float().numpy()


def load_all_c(args):
    """{name: weights (n,)} of every C that train-c has made in this run, those that --in and --tau name first."""
    names = [path.stem.removeprefix("c_") for path in sorted(args.run.glob("c_*.safetensors"))]
    return {name: load_c(args, name) for name in sorted(names, key=lambda name: name not in c_names(args))}


def load_search(path, size, begun):
    """What `evolve` keeps in `path`, for a C of `size` weights. A search goes on as it was `begun`."""
    search = common.load_tensors(path)
    whole = {"begun", "fitness", "log", "params", "score"} <= search.keys()
    if not whole or len(search["params"]) != size or not search["params"].isfinite().all():
        raise UserError(f"{path} does not hold the search of a C of {size} weights: remove it, and give train-c again")
    if search["begun"] != begun:
        raise UserError(f"{path} was begun with {search['begun']} and not {begun}: remove it, or give these flags")
    return search


def save_search(path, search):
    """Writes what `evolve` goes on with to `path`, a .pt, and beside it C's weights and the log."""
    common.write_csv(path.with_suffix(".csv"), search["log"])
    common.save_safetensors(path.with_suffix(".safetensors"), {"params": search["params"]})
    common.save_tensors(path, search)


def first_held_out(dataset):
    """The number of the first episode that V and M never learn from: it and those after it are the last twentieth."""
    return len(dataset) - max(1, len(dataset) // 20)
