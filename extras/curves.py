"""The curves of several trainings in one figure: a plot for each column of their logs, a line for each run.

    python -m extras.curves runs/pointmaze_pca runs/pointmaze_vae
    python -m extras.curves runs/a runs/b --columns val,val_rollout
    python -m extras.curves runs/worldmodels_takecover runs/again    # V's, M's and C's logs of vae_mdnrnn.py
    python -m extras.curves runs/worldmodels_carracing assets/published --columns score

Writes runs/NAME.png. A run has log.csv, or vae.csv, rnn.csv and c_*.csv; what a log lacks is left out. assets/published
is the search of World Models' paper in CarRacing (github.com/hardmaru/WorldModelsExperiments), in which a generation is
64 x 16 episodes of at most 1,000 steps, all of which are counted.
"""

import csv
from pathlib import Path

from lib import common, pictures
from lib.common import UserError

COUNTS = "epoch", "step", "steps"  # what a log counts, and the numbers below are drawn over
LEFT_OUT = *COUNTS, "seconds", "generation", "agreement", "popsize"


def read_logs(run):
    """{(log, column): (count's name, counts, values)} of all logs in a run's folder."""
    curves = {}
    for path in sorted(Path(run).glob("*.csv")):
        rows = list(csv.DictReader(path.open()))
        for column in rows[0] if rows else ():
            found = [row for row in rows if row[column]]
            count = next((name for name in COUNTS if name in rows[0]), None)
            if count and column not in LEFT_OUT:
                x, y = ([float(row[name]) for row in found] for name in (count, column))
                curves[path.stem, column] = count, x, y
    if not curves:
        raise UserError(f"no log of a training in {run}: give the folder of a run, or of an iteration of iterate")
    return curves


def draw(logs, panels, path):
    """Draws the logs {run: curves of `read_logs`} with a plot for each of `panels`, (log, column)."""
    wide = min(3, len(panels))
    high = -(-len(panels) // wide)
    figure = pictures.new_figure((4 * wide, 2.8 * high))
    for panel, plot in zip(panels, figure.subplots(high, wide, squeeze=False).flat, strict=False):
        for i, (run, curves) in enumerate(logs.items()):
            if panel in curves:
                count, x, y = curves[panel]
                plot.plot(x, y, f"C{i}", lw=1, label=run)
                plot.set(title=panel[0].replace("log", ""), ylabel=panel[1], xlabel=count)
        numbers = [y for curves in logs.values() if panel in curves for y in curves[panel][2]]
        if 0 < 10 * min(numbers) < max(numbers):
            plot.set_yscale("log")
        ends = [curves[panel][1][-1] for curves in logs.values() if panel in curves]
        if max(ends) > 10 * min(ends):
            plot.set_xscale("log")
        else:
            plot.xaxis.get_major_locator().set_params(integer=True)
    lines = {line.get_label(): line for plot in figure.axes for line in plot.get_lines()}
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=3, frameon=False)
    for plot in figure.axes[len(panels) :]:
        plot.remove()
    pictures.save_figure(path, figure, dpi=110)


def main():
    parser = common.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("run", nargs="+", help="folders of runs")
    parser.add_argument("--columns", type=lambda text: text.split(","), help="the columns to draw (default: all)")
    parser.add_argument("--name", default="curves", help="name of the figure under runs/")
    args = parser.parse_args()
    logs = {run: read_logs(run) for run in args.run}
    known = list(dict.fromkeys(panel for curves in logs.values() for panel in curves))
    panels = [panel for panel in known if args.columns is None or panel[1] in args.columns]
    if unknown := set(args.columns or ()) - {column for _, column in known}:
        names = ", ".join(dict.fromkeys(column for _, column in known))
        raise UserError(f"no log has {', '.join(sorted(unknown))}; they have {names}")
    path = common.output_folder("runs", f"{args.name}.png")
    draw(logs, panels, path)
    print(f"{path}: {len(panels)} columns of {len(logs)} runs")


if __name__ == "__main__":
    common.run_script(main)
