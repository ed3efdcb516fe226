"""What plan.py and vae_mdnrnn.py show of their results: tables, figures and films."""

import numpy as np
import torch

from lib import common, pictures
from lib.worlds import play_alone

# ---- plan.py -------------------------------------------------------------------------------------


def wilson(solved, n):
    """The 95 % intervals (Wilson, 1927) of success rates, for each of the counts `solved` of n problems."""
    from scipy.stats import binomtest  # here, because its import takes a second

    return [list(binomtest(int(k), n).proportion_ci(method="wilson")) for k in solved]


def rate_cells(rates, intervals):
    return [f"{rate:.2f} [{low:.2f}, {high:.2f}]" for rate, (low, high) in zip(rates, intervals, strict=True)]


def write_success(path, results, controls):
    """Draws the success rate over MPC iterations, with its 95 % interval, beside `controls` {name: what it is}."""
    rates, k = results["success_by_iter"], np.arange(1, len(results["success_by_iter"]) + 1)
    lines = [(k, rates, "o-", "world model")]
    lines += [(k, control, "--", controls[name]) for name, control in results["controls"].items()]
    axes = dict(title=f"{results['n_evals']} goals", xlabel="MPC iterations", ylabel="success rate", ylim=(0, 1.02))
    pictures.write_plot(path, lines, [(k, *np.transpose(results["interval"]))], legend="lower right", **axes)


@torch.no_grad()
def decode_plans(model, plans, device):
    """What the plans of a filmed problem were imagined to look like: frames (1 + model steps, H, W, 3)."""
    frames = []
    for seen, actions in plans:
        z = model.encode({name: torch.from_numpy(o)[None].to(device) for name, o in seen.items()})
        actions = torch.from_numpy(actions).to(device).reshape(1, -1, model.action_dim)
        known = z["visual"].shape[1] if frames else z["visual"].shape[1] - 1  # what the first plan started from, too
        frames.append(model.decode(model.rollout(z, actions)["visual"][:, known:])[0])
    return np.concatenate(frames)


def write_films(out, model, worlds, device):
    """Writes a GIF for each filmed problem: start, what happened, goal. With a decoder it shows what was imagined, too,
    and in strips (above what happened, below what was imagined); then it returns how alike they are."""
    pairs = []
    for i, film in enumerate(map(np.array, worlds.films)):
        panels, goal = [film[:1], film], worlds.goal_obs["visual"][i : i + 1]
        if model.decoder is not None:
            imagined, real = decode_plans(model, worlds.plans[i], device), film[:: model.frameskip]
            pictures.write_strips(out / f"imagined_{i}.png", real, imagined)
            panels.append(imagined.repeat(model.frameskip, axis=0)[: len(film)])
            pairs.append((imagined[1:], real[1:]))
        pictures.write_gif(out / f"problem_{i}.gif", pictures.beside(*panels, goal))
    return pictures.likeness(*map(np.concatenate, zip(*pairs, strict=True))) if pairs else None


def write_table(results, path):
    """A row for each planner and number of plans: its search budget, and its success rate so far."""
    controls = next(iter(results.values()))["controls"]
    header = ["planner", "search per plan", "plans × model steps", "success [95 %]", *controls, "seconds in all"]
    rows = [header]
    for planner, result in results.items():
        args = result["args"]
        tried = "gradient steps" if planner.endswith("gd") else f"× {args['num_samples']} candidates"
        search = f"{args['opt_steps']} {tried}" if args["opt_steps"] else "none"
        for k, rate in enumerate(rate_cells(result["success_by_iter"], result["interval"])):
            row = [f"`{planner}`", search, f"{k + 1} × {args['n_taken_actions']}", rate]
            row += [f"{rates[k]:.2f}" for rates in result["controls"].values()]
            rows.append([*row, f"{result['seconds']:.0f}"])
    table = common.markdown_table(rows)
    common.write_atomic(path, table)
    print("\n" + table, end="")


# ---- vae_mdnrnn.py -------------------------------------------------------------------------------


def spread(returns, digits=1):
    """The mean of some returns ± their standard deviation (± the 95 % interval of the mean), as text."""
    mean, std = np.mean(returns), np.std(returns)
    return f"{mean:.{digits}f} ± {std:.{digits}f} (± {1.96 * std / len(returns) ** 0.5:.{digits}f})"


def print_returns(results):
    """Prints what each player of `results` {player: {"real" or "dream": returns (episodes,)}} earns."""
    print("return over all episodes: mean ± standard deviation (± 95 % interval of the mean)")
    for player, places in results.items():
        for where, returns in places.items():
            print(f"{player:16} {where:5} {spread(returns)}")


def show_reconstructions(path, x, recon, moves):
    """Prints the squared error of V's reconstructions of images x (B, 3, 64, 64), over all pixels and weighed by how
    much they move, `moves` (B, 1, 64, 64). Draws the twelve in which most moves."""
    error = (recon - x).square().mean(1, keepdim=True)
    most = moves.sum((1, 2, 3)).topk(12).indices.sort().values
    print(f"V, held out: squared error {error.mean():.5f}, {(error * moves).sum() / moves.sum():.5f} where things move")
    pictures.write_strips(path, common.to_frames(x[most]), common.to_frames(recon[most]))


def write_search(path, log):
    """Draws what the best, the mean and the worst candidate of each generation earn, and the score of the mean."""
    styles = {"best": "-", "mean": "-", "worst": "-", "score": "ko-"}
    pictures.write_log_plot(path, log, "steps", styles, ylabel="return")


def write_dream(path, dream, act, seed, steps, real):
    """Writes a GIF of what act(features (1, in_dim)) -> actions (1, A) does in `dream`, a DreamEnv, and beside it of a
    real episode (T, 64, 64, 3), every third step."""
    dreamt = play_alone(dream, lambda obs: act(torch.from_numpy(obs["proprio"])[None])[0], seed, steps)["frames"]
    length = min(len(dreamt), len(real))
    pictures.write_gif(path, pictures.beside(dreamt[:length:3], real[:length:3]), duration=85)
