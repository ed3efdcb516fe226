"""How much search does a plan need? Success by the number of candidates and iterations, for CEM, iCEM and MPPI.

Every planner gets the same problems with each budget, and a tenth of the candidates as its elites. A random policy does
not search, and the true simulator's success is measured at one budget: python plan.py --controls random,oracle.

    python -m extras.budget --seed $(seq 8000 8019)      # 1,000 problems, an hour on two cores

Writes plan_outputs/NAME/: a folder for each planner and budget as plan.py has it, table.md and budget.png. The same
command continues what was interrupted.
"""

import numpy as np

import plan
from lib import common, pictures, processes, reports
from lib.common import RANK
from predictor import load_model

BUDGETS = (16, 2), (32, 3), (64, 4), (100, 5), (150, 7), (300, 10)  # candidates and iterations
COLOURS = {"mpc-cem": "C0", "mpc-icem": "C1", "mpc-mppi": "C2"}


def solve_all(args):
    """The results of plan.py for each planner and budget, {(planner, candidates, iterations): results}."""
    results, device, ckpt = {}, processes.join(args.device), args.ckpt or plan.newest_run()
    processes.keep_freed_memory()
    model = load_model(ckpt, device)
    processes.use_threads(device, model.num_patches)
    env = plan.open_world(model)
    for planner in COLOURS:
        for candidates, iterations in BUDGETS:
            out = common.output_folder("plan_outputs", f"{args.name}/{planner}_{candidates}_{iterations}")
            flags = [f"--planner={planner}", f"--num-samples={candidates}", f"--opt-steps={iterations}"]
            flags += [f"--topk={max(2, candidates // 10)}", f"--max-iter={args.max_iter}", f"--device={args.device}"]
            flags += [f"--ckpt={ckpt}", f"--n-evals={args.n_evals}", "--seed", *map(str, args.seed)]
            settings = plan.settle(plan.get_args(flags), planner, model)
            done = processes.gather((out / "results.json").exists())[0]
            common.same_flags(out, vars(settings))
            if not done:
                if RANK == 0:
                    common.write_json(out / "args.json", vars(settings))
                plan.run(model, env, *plan.get_problems(env, settings, model), settings, device, out)
            processes.gather(None)  # the first process has written what came of it
            results[planner, candidates, iterations] = common.read_json(out / "results.json")
    return results


def report(results, max_iter, out):
    """Writes table.md, with 95 % intervals (Wilson), and budget.png, success by imagined candidate plans."""
    header = ["planner", "candidates × iterations", *(f"within {k + 1}" for k in range(max_iter)), "seconds in all"]
    rows = [header]
    for (planner, candidates, iterations), result in results.items():
        cells = reports.rate_cells(result["success_by_iter"], result["interval"])
        rows.append([f"`{planner}`", f"{candidates} × {iterations}", *cells, f"{result['seconds']:.0f}"])
    table = common.markdown_table(rows)
    common.write_atomic(out / "table.md", table)
    print(table)
    lines, bands, plans = [], [], [candidates * iterations for candidates, iterations in BUDGETS]
    for planner, colour in COLOURS.items():
        for k, style in {max_iter - 1: "o:", 0: "o-"}.items():
            found = [results[planner, *budget] for budget in BUDGETS]
            rates = [result["success_by_iter"][k] for result in found]
            lines.append((plans, rates, colour + style, f"{planner}, within {k + 1}"))
            bands.append((plans, *np.transpose([result["interval"][k] for result in found])))
    axes = dict(xlabel="candidates × iterations of a plan", ylabel="success rate", xscale="log", ylim=(0, 1.02))
    pictures.write_plot(out / "budget.png", lines, bands, legend="lower right", **axes)


def main():
    parser = common.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--ckpt", help="the run to plan with (default: the newest under runs/)")
    add("--seed", type=common.seed_number, nargs="+", default=[99], help="seeds of the problems")
    add("--n-evals", type=common.positive, default=50, help="number of problems per seed")
    add("--max-iter", type=common.positive, default=3, help="MPC iterations")
    add("--name", default="budget", help="name of the result under plan_outputs/")
    add("--device", type=common.available_device, default=common.default_device(), help="where to compute")
    args = parser.parse_args()
    results = solve_all(args)
    if RANK == 0:
        report(results, args.max_iter, common.output_folder("plan_outputs", args.name))


if __name__ == "__main__":
    common.run_script(main)
