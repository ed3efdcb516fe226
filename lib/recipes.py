"""World Models' recipes and flags: what vae_mdnrnn.py is asked to do, and what it does if it is not asked otherwise."""

import argparse
import os
from pathlib import Path

from lib import common
from lib.common import UserError, positive

# The paper's sizes (appendix A), with budgets for two CPU cores: an hour for takecover, one or two for carracing.
# Those of pointmaze are not tuned. Unlike the paper's M of CarRacing ours predicts the reward, which the dream needs.
# `restart` tells M when an episode begins, `cell` shows C the cell state, and `squash` turns C's outputs into actions.
RECIPES = {
    "takecover": dict(action_dim=1, squash="tanh", policy="hold", max_steps=2100, episodes=2400)
    | dict(z_dim=64, v_steps=5000, beta=0.1, hidden=512, heads="done", restart=True, m_steps=6000)
    | dict(cell=True, bias=False, where="dream", tau=[3.0], popsize=64, trials=8, generations=25, score_trials=100),
    "carracing": dict(action_dim=3, squash="car", policy="brownian", max_steps=1000, episodes=60)
    | dict(z_dim=32, v_steps=3000, beta=1.0, hidden=256, heads="reward", restart=False, m_steps=1000)
    | dict(cell=False, bias=True, where="real", tau=[1.0], popsize=16, trials=2, generations=50, score_trials=16),
    "pointmaze": dict(action_dim=2, squash="tanh", policy="hold", max_steps=100, episodes=300)
    | dict(z_dim=32, v_steps=4000, beta=0.1, hidden=256, heads="reward", restart=False, m_steps=1000)
    | dict(cell=False, bias=True, where="dream", tau=[1.0], popsize=32, trials=8, generations=40, score_trials=100),
}
SIZES = dict(z_dim=positive, hidden=positive, n_mix=positive, mixture=common.choice("vector", "dimension"))
RUN_FLAGS = ("env", "seed", "max_steps", "episodes", "sizes", "v_steps", "beta", "m_steps", "lr")  # of V and M


def parse_args(argv, steps, description):
    """The flags of vae_mdnrnn.py, and the recipe's values where no flag is given. `steps` are its steps' names."""
    parser = common.Parser(description=description.split("\n")[0], argument_default=argparse.SUPPRESS)
    add = parser.add_argument
    add("step", choices=steps, metavar="step", help=", ".join(steps))
    add("--env", default="takecover", choices=RECIPES, help="the world; its recipe has the defaults of most flags")
    add("--out", dest="run", type=Path, metavar="OUT", help="the run's folder (default: runs/worldmodels_ENV)")
    add("--seed", type=common.seed_number, default=0, help="the same seed gives the same run")
    add("--device", type=common.available_device, default=common.default_device(), help="where V, M and dreams compute")
    add("--workers", type=positive, default=os.cpu_count(), help="number of processes with a real environment")
    add("--max-steps", type=positive, help="the most steps of an episode, real or dreamt")
    add("--episodes", type=positive, help="number of episodes to collect (the paper: 10,000)")
    add("--sizes", type=common.key_values(SIZES), default={}, help="z_dim, hidden (LSTM units), n_mix (Gaussians), "
        "mixture (vector: over the whole z; dimension: for each of its numbers), as z_dim=32,hidden=256")  # fmt: skip
    add("--v-steps", type=positive, help="steps of Adam for V")
    add("--beta", type=common.number(float, 0, 1e6), help="weight of V's KL term")
    add("--m-steps", type=positive, help="steps of Adam for M")
    add("--lr", type=common.above_zero, default=1e-3, help="learning rate of V and M at the start")
    add("--in", dest="where", choices=("dream", "real"), help="where C is trained")
    add("--tau", type=common.above_zero, nargs="+", help="temperature of the dream; several train a C for each")
    add("--popsize", type=common.number(int, 4, 10**5), help="candidates per generation of CMA-ES (the paper: 64)")
    add("--trials", type=positive, help="episodes per candidate (the paper: 16)")
    add("--generations", type=positive, help="generations of CMA-ES")
    add("--sigma0", type=common.above_zero, default=0.1, help="first standard deviation of CMA-ES")
    add("--score-trials", type=positive, help="episodes by which the best C is chosen")
    add("--test-episodes", type=positive, default=100, help="real episodes, and as many dreams, for each C")
    add("--iterations", type=positive, default=3, help="rounds of `iterate`")
    given = parser.parse_args(argv)
    default = dict(run=Path(f"runs/worldmodels_{given.env}"), n_mix=5, mixture="vector", previous=None)
    args = argparse.Namespace(**default | RECIPES[given.env] | vars(given) | given.sizes)
    args.sizes = ",".join(f"{name}={getattr(args, name)}" for name in SIZES)
    if len({f"{tau:g}" for tau in args.tau}) < len(args.tau):
        raise UserError("a temperature stands twice in --tau")
    return args
