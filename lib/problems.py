"""The problems that plan.py solves: start and goal states, from where --goal-source says."""

import contextlib
from pathlib import Path

import numpy as np

from data import open_dataset
from lib import common
from lib.common import UserError
from lib.worlds import can_be_set, make_env


def open_world(model, shift=None):
    """The environment that a model was trained on, in which problems can be set."""
    name = model.world["env"]
    if not can_be_set(name):
        does = "python -m extras.horizon measures how well the model imagines it, train.py --decoder shows it"
        raise UserError(f"{name} cannot be put into a start and a goal state, so no plan can be tried in it; {does}")
    return make_env(name, model.world["img_size"], shift)


def open_episodes(args, model):
    """The data set that --data names, or the model's own. UserError if it is of another world."""
    dataset = open_dataset(args.data or model.world["data"])
    if dataset.meta["env"] != model.world["env"]:
        raise UserError(f"{dataset.path} has env {dataset.meta['env']}, the checkpoint has {model.world['env']}")
    return dataset


def get_problems(env, args, model):
    """Start and goal states (2, problems, state_dim) from where --goal-source says. Those of a data set start in its
    validation episodes; the goal is what came goal_H model steps later, or the state after as many random actions."""
    if args.goal_source == "random_state":
        return random_problems(env, args)
    if args.goal_source not in ("dset", "random_action"):
        return read_problems(args.goal_source, env, model.world["env"])
    dataset, steps = open_episodes(args, model), args.goal_H * model.frameskip
    recorded = dataset.meta["frameskip"]
    span, rest = divmod(steps, recorded)  # rows
    if rest:
        told = f"--goal-H {args.goal_H} is {steps} environment steps"
        raise UserError(f"{told}, which is no multiple of the {recorded} that a row of {dataset.path} has")
    train_episodes, episodes = dataset.split()
    lengths = dataset.episode_ends - dataset.episode_starts
    episodes = [e for e in episodes if lengths[e] > span]
    if not episodes:
        raise UserError(f"no validation episode of {dataset.path} is longer than {span} rows (--goal-H)")
    mean, std = dataset.statistics(train_episodes)["action"]

    def draw(rng):
        episode = rng.choice(episodes)
        row = dataset.episode_starts[episode] + rng.integers(lengths[episode] - span)
        start, goal = dataset.states[row], dataset.states[row + span]
        if args.goal_source == "random_action":  # normal, as the data's actions spread
            (goal,) = env.simulate(start[None], rng.normal(mean, std, (1, steps, len(mean))))
        return start, goal

    return random_problems(env, args, draw)


def random_problems(env, args, draw=None):
    """n_evals problems for every seed: random states, or what `draw(generator)` returns."""
    released = draw is None and hasattr(env, "sample_problem")  # DINO-WM's own problems
    draw, problems = draw or (lambda rng: (env.sample_state(rng), env.sample_state(rng))), []
    for seed in args.seed:
        rng = np.random.default_rng([seed, 1])
        problems += [env.sample_problem(seed, n) if released else draw(rng) for n in range(args.n_evals)]
    return np.array(problems, np.float64).swapaxes(0, 1)


def read_problems(path, env, env_name):
    """Start and goal states of `env_name` in a file of --save-targets."""
    if not Path(path).is_file():
        raise UserError(f"--goal-source {path}: no such file; known sources are random_state, dset and random_action")
    content = common.read_json(path)
    if content.get("env", env_name) != env_name:
        raise UserError(f"{path} holds problems of {content['env']}, the checkpoint is of {env_name}")
    with contextlib.suppress(ValueError, KeyError, TypeError):
        problems = np.array([content["starts"], content["goals"]], np.float64)
        shape = env.sample_state(np.random.default_rng(0)).shape
        if problems.size and problems.shape[2:] == shape and np.isfinite(problems).all():
            return problems
    raise UserError(f"{path} is not a whole file of --save-targets: write it again")
