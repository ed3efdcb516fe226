"""All drawing (films, strips, plots, grids of pictures), and image metrics: PSNR, SSIM and LPIPS."""

import base64
import functools
import math
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import torch
import torch.nn.functional as F

from lib.common import write_atomic


def psnr(images, truth):
    """The peak signal-to-noise ratio of images (B, 3, H, W) in [0, 1], in dB. As in DINO-WM's release, it is computed
    over all images together."""
    return -10 * (images - truth).square().mean().log10()


def ssim(images, truth):
    """The structural similarity of images (B, 3, H, W) in [0, 1] (Wang et al., 2004), averaged over windows and images:

    (2 m_x m_y + c_1) (2 s_xy + c_2) / ((m_x^2 + m_y^2 + c_1) (s_x^2 + s_y^2 + c_2))

    m_x, s_x^2 and s_xy are means, variances and covariances in a Gaussian window of 11 x 11 pixels.
    """
    line = torch.exp(-((torch.arange(11.0, device=images.device) - 5) ** 2) / (2 * 1.5**2))
    window = (line[:, None] * line / line.sum() ** 2).expand(3, 1, 11, 11)
    mean = functools.partial(F.conv2d, weight=window, padding=5, groups=3)
    m_x, m_y = mean(images), mean(truth)
    s_x, s_y, s_xy = mean(images**2) - m_x**2, mean(truth**2) - m_y**2, mean(images * truth) - m_x * m_y
    c_1, c_2 = 0.01**2, 0.03**2
    return ((2 * m_x * m_y + c_1) * (2 * s_xy + c_2) / ((m_x**2 + m_y**2 + c_1) * (s_x + s_y + c_2))).mean()


@functools.cache
def perceptual_metric():
    """LPIPS (Zhang et al., 2018, arXiv:1801.03924) on VGG-16, as a function of two batches of images. None where
    torch's cache does not hold torchvision's weights of VGG-16."""
    if not Path(torch.hub.get_dir(), "checkpoints", "vgg16-397923af.pth").is_file():
        return None
    import lpips  # here, since the import takes seconds

    return lpips.LPIPS(net="vgg", verbose=False)


@torch.no_grad()
def likeness(frames, truth):
    """Compares uint8 frames (..., H, W, 3) with the true ones: {"psnr", "ssim"}, and "lpips" if VGG-16 is at hand."""
    x, y = (torch.from_numpy(f.reshape(-1, *f.shape[-3:])).permute(0, 3, 1, 2) / 255 for f in (frames, truth))
    scores = {"psnr": psnr(x, y).item(), "ssim": ssim(x, y).item()}
    if metric := perceptual_metric():
        scores["lpips"] = metric(x, y, normalize=True).mean().item()
    return scores


def beside(*panels):
    """Joins films (T, H, W, 3) side by side into one, (T, H, W', 3). A single picture (1, H, W, 3) stands still."""
    length, gap = max(map(len, panels)), np.full((1, panels[0].shape[1], 2, 3), 255, np.uint8)
    panels = [part for panel in panels for part in (panel, gap)][:-1]
    return np.concatenate([np.broadcast_to(part, (length, *part.shape[1:])) for part in panels], axis=2)


def write_gif(path, film, duration=50):
    """Writes a uint8 film (T, H, W, 3), `duration` milliseconds a frame. Small frames are enlarged."""
    scale = max(1, 256 // film.shape[1])
    film = film.repeat(scale, axis=1).repeat(scale, axis=2)
    write_atomic(path, imageio.imwrite("<bytes>", film, extension=".gif", duration=duration, loop=0))


def write_strips(path, *films):
    """Writes one picture with a row for each uint8 film (T, H, W, 3). Time runs to the right."""
    rows = [np.concatenate(np.pad(film, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255), 1) for film in films]
    write_atomic(path, imageio.imwrite("<bytes>", np.concatenate(rows), extension=".png"))


# ---- Plots ---------------------------------------------------------------------------------------


def new_figure(figsize):
    """A figure without pyplot: it draws with Agg, needs no display and does not have to be closed."""
    from matplotlib.figure import Figure  # here, since the import takes half a second

    return Figure(figsize=figsize, layout="constrained")


def save_figure(path, figure, dpi):
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=dpi))


def write_plot(path, lines, bands=(), figsize=(5, 3.2), legend="best", **axes):
    """Draws `lines` (x, y, matplotlib's style, label or None) over a count, such as steps or epochs.

    `bands` (x, low, high) have the colours of the lines in turn. `legend` is where it stands in the plot, or "outside"
    for the right of it, and `axes` is what `Axes.set` takes: xlabel, ylabel, yscale, ylim, title.
    """
    figure = new_figure(figsize)
    plot = figure.subplots()
    plot.xaxis.get_major_locator().set_params(integer=True)
    curves = [plot.plot(x, y, style, ms=3, label=label)[0] for x, y, style, label in lines]
    for (x, low, high), curve in zip(bands, curves, strict=False):
        plot.fill_between(x, low, high, color=curve.get_color(), alpha=0.2, lw=0)
    plot.set(**axes)
    if legend == "outside":
        figure.legend(frameon=False, fontsize="small", loc="outside right upper")
    else:
        plot.legend(frameon=False, loc=legend)
    save_figure(path, figure, dpi=120)


def write_log_plot(path, log, x, styles, **axes):
    """Draws columns of `log`, a list of dictionaries, over its column `x`. `styles` is {column: matplotlib's style}."""
    rows = {name: [row for row in log if name in row] for name in styles}
    lines = [([row[x] for row in rows[name]], [row[name] for row in rows[name]], styles[name], name) for name in styles]
    write_plot(path, lines, xlabel=x, **axes)


def principal_colours(tokens):
    """Tokens (B, N, d) -> images (B, side, side, 3) that show their first three principal components as red, green and
    blue. The components are those of all B * N tokens, each stretched from its 1st to its 99th percentile."""
    x = tokens.flatten(0, 1).double()
    _, vectors = torch.linalg.eigh(torch.cov(x.T))  # in ascending order
    x = (x - x.mean(0)) @ vectors.flip(1)[:, :3]
    low, high = x.quantile(0.01, 0), x.quantile(0.99, 0)
    side = math.isqrt(tokens.shape[1])
    return ((x - low) / (high - low).clamp(min=1e-9)).clamp(0, 1).view(-1, side, side, 3)


def write_rows(path, rows):
    """Draws a grid of pictures, one labelled row for each entry of `rows`, {label: pictures (count, H, W, 3)}."""
    count = len(next(iter(rows.values())))
    figure = new_figure((1.5 * count + 1, 1.5 * len(rows)))
    axes = figure.subplots(len(rows), count, squeeze=False)
    for line, (label, pictures) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(label, rotation=0, ha="right", va="center")
        for ax, picture in zip(line, pictures, strict=True):
            ax.imshow(picture)
            ax.set(xticks=[], yticks=[])
    save_figure(path, figure, dpi=100)


def write_maze(path, walls, nodes, edges, problems):
    """Draws a maze from above, in metres, once for each of `problems`, with a graph and the way through it.

    walls (W, 2) are the middles of cells, 1 m x 1 m each; nodes (n, 2); edges (e, 2) are pairs of nodes. A problem has
    "steps" (n,), how far each node is from its goal; "path" (p, 2), the shortest; "aims" (a, 2), the waypoints at which
    plans aimed; "track" (t, 2), where the ball was; and "goal" (2,).
    """
    from matplotlib.collections import LineCollection

    columns = min(2, len(problems))
    rows = -(-len(problems) // columns)
    figure = new_figure((4 * columns + 1, 3.2 * rows + 0.5))
    plots, steps = figure.subplots(rows, columns, squeeze=False), np.concatenate([p["steps"] for p in problems])
    colours = dict(cmap="viridis", alpha=0.5, vmin=0, vmax=steps[np.isfinite(steps)].max())  # the same in all panels
    for plot in plots.flat[len(problems) :]:
        plot.axis("off")
    for plot, problem in zip(plots.flat, problems, strict=False):
        plot.bar(walls[:, 0], 1, width=1, bottom=walls[:, 1] - 0.5, color="0.6")
        plot.add_collection(LineCollection(nodes[edges], colors="0.7", lw=0.1, zorder=1))
        dots = plot.scatter(*nodes.T, c=problem["steps"], s=3, lw=0, zorder=2, **colours)
        plot.plot(*problem["path"].T, "-", color="black", lw=1.5, label="path")
        plot.plot(*problem["track"].T, "-", color="tab:red", lw=1.5, label="ball")
        plot.plot(*problem["aims"].T, "o", color="tab:orange", mec="black", ms=5, label="waypoints")
        plot.plot(*problem["track"][0], "s", color="white", mec="black", label="start")
        plot.plot(*problem["goal"], "*", color="white", mec="black", ms=12, label="goal")
        plot.set(aspect="equal", xticks=[], yticks=[])
        plot.margins(0)
    figure.colorbar(dots, ax=plots, label="model steps to the goal", shrink=0.6)
    figure.legend(*plot.get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=2 * columns + 1)
    save_figure(path, figure, dpi=120)


# ---- What a page in the browser shows ------------------------------------------------------------


def data_uri(frame):
    """A frame (H, W, 3) uint8 as the source of an image."""
    png = imageio.imwrite("<bytes>", frame, extension=".png")
    return "data:image/png;base64," + base64.b64encode(png).decode()


def svg_lines(lines, size):
    """SVG that darkens a picture of `size` pixels and writes up to two lines over it."""
    style = 'fill="white" text-anchor="middle" font-family="Roboto, sans-serif"'
    rows = zip(lines, ((0.5, 0.08), (0.58, 0.05)), strict=False)  # how far down they stand, how large they are
    text = [f'<text x="50%" y="{size * y}" font-size="{size * h}" {style}>{line}</text>' for line, (y, h) in rows]
    return '<rect width="100%" height="100%" opacity="0.6"/>' + "".join(text) if lines else ""


def svg_plan(goal, clouds, way, size):
    """SVG over a picture of `size` pixels of where a plan leads. All places are in pixels, to the right and down.

    goal (2, 2) is its place, and one at the edge of what counts as reached; clouds, a list of (n, 2), are where the
    candidates of each iteration end, the newest last; way (t, 2) is that of the best candidate.
    """
    circle = '<circle cx="{:.2f}" cy="{:.2f}" r="{:.2f}"/>'
    edge = circle.format(*goal[0], np.linalg.norm(goal[1] - goal[0]))
    svg = f'<g fill="none" stroke="white" stroke-width="{size / 200:.2f}">{edge}</g>'
    for age, cloud in reversed(list(enumerate(reversed(clouds)))):
        colour = f'"white" opacity="{0.5 * 0.7**age:.2f}"' if age else '"#ff4f9a"'
        svg += f"<g fill={colour}>{''.join(circle.format(*place, size / 128) for place in cloud)}</g>"
    points = " ".join(f"{x:.2f},{y:.2f}" for x, y in way)
    return svg + f'<polyline points="{points}" fill="none" stroke="#ff4f9a" stroke-width="{size / 128:.2f}"/>'
