"""Can a dream be trusted? Compares what simple players, and each C of a run, earn in the game and in dreams of it.

A dream teaches C about the game if it gives a player the same return as the game (section 4.5 of World Models, and its
table of temperatures). Two players need no training: a C of zeros, which never moves in TakeCover, and a random one.
The games are not those that `test` plays, so that a temperature may be chosen by them.

    python -m extras.calibration                                         # of runs/worldmodels_takecover
    python -m extras.calibration --run runs/other --tau 0.5 1 --episodes 200

Writes calibration.json with all returns, and calibration.md and calibration.png with their means and the 95 % intervals
of the means, into the folder of the run (of `iterate`: of its last iteration).
"""

import functools

import numpy as np
import torch

import vae_mdnrnn as wm
from lib import common, pictures, recipes, reports
from lib.common import tqdm
from lib.worlds import EpisodePool, make_env

SEED = 555_000_000  # of the first game


def returns_in_games(pool, args, weights, episodes):
    """What a player earns in `episodes` games, (episodes,)."""
    who = "uniform" if weights is None else weights
    jobs = [dict(who=who, seed=SEED + i, steps=args.max_steps) for i in range(episodes)]
    return [earned for earned, _ in pool.returns(jobs)]


def returns_in_dreams(dream, controller, space, weights, episodes):
    """What a player earns in `episodes` dreams, (episodes,)."""
    low, high = (torch.as_tensor(x, device=dream.device) for x in (space.low, space.high))
    act = controller
    if weights is None:
        weights, generator = np.zeros(1, np.float32), torch.Generator(dream.device).manual_seed(SEED)
        draw = functools.partial(torch.rand, generator=generator, device=dream.device)
        act = lambda own, _: low + (high - low) * draw(len(own), len(low))  # noqa: E731
    return wm.dream_scores(dream, act, weights[None], SEED, episodes)[0][0].tolist()


def measure(args, taus, episodes):
    """{player: {"game" or the temperature of the dream: returns (episodes,)}} of the run of `args`."""
    _, rnn, controller = wm.load_models(args)
    rnn = rnn.to(args.device, common.fast_dtype(args.device))
    zero = np.zeros(controller.num_params, np.float32)
    players = {"zero": zero, "random": None, **recipes.load_all_c(args)}
    env = make_env(args.env)
    env.close()
    results = {}
    with EpisodePool(args.workers, args.env, 64, wm.make_agents, args) as pool:
        for name, weights in tqdm(players.items(), "calibrate", unit="player"):
            results[name] = {"game": returns_in_games(pool, args, weights, episodes)}
            for tau in taus:
                dream = wm.make_dream(args, rnn, tau)
                results[name][f"{tau:g}"] = returns_in_dreams(dream, controller, env.action_space, weights, episodes)
    return results


def report(results, taus, run):
    """Writes the table, and the figure: what each dream grants (lines), and what the game does (dotted lines)."""
    columns = ["game", *(f"{tau:g}" for tau in taus)]
    rows, lines, bands = [["", "game", *(f"dream at {tau:g}" for tau in taus)]], [], []
    for i, (name, returns) in enumerate(results.items()):
        mean, std = (np.array([f(returns[column]) for column in columns]) for f in (np.mean, np.std))
        half = 1.96 * std / len(returns["game"]) ** 0.5
        game, around = mean[:1].repeat(len(taus)), half[:1].repeat(len(taus))
        rows.append([name, *(reports.spread(returns[column], digits=0) for column in columns)])
        lines += [(taus, mean[1:], f"C{i}o-", name), (taus, game, f"C{i}:", None)]
        bands += [(taus, mean[1:] - half[1:], mean[1:] + half[1:]), (taus, game - around, game + around)]
    table = common.markdown_table(rows)
    common.write_atomic(run / "calibration.md", table)
    print(f"mean ± standard deviation (± 95 % interval of the mean)\n\n{table}")
    axes = dict(xlabel="temperature of the dream", ylabel="return (dotted: in the game)")
    pictures.write_plot(run / "calibration.png", lines, bands, **axes)


def main():
    parser = common.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--run", default="runs/worldmodels_takecover", help="a run of vae_mdnrnn.py")
    add("--tau", type=common.above_zero, nargs="+", default=[0.5, 1.0, 1.5, 2.0, 3.0], help="temperatures of the dream")
    add(
        "--episodes",
        type=common.number(int, 2, 10**5),
        default=100,
        help="number of games, and of dreams at each --tau",
    )
    given = parser.parse_args()
    args, taus = recipes.open_run(given.run), sorted(set(given.tau))
    results = measure(args, taus, given.episodes)
    common.write_json(args.run / "calibration.json", results)
    report(results, taus, args.run)


if __name__ == "__main__":
    common.run_script(main)
