"""The plot: memory and time of one policy update against n_mc, both axes logarithmic, lines labelled where they end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from _measure import MIB, readable
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from _memory_vs_mc.methods import METHODS
from _memory_vs_mc.options import Options
from _memory_vs_mc.sweep import OK, OUT_OF_MEMORY, Point

# Colours that stay apart for colour-blind readers (Okabe and Ito); replay is dashed because it lies on BGPO's line.
STYLES = {
    "exact": {"color": "#D55E00", "marker": "o"},
    "plain": {"color": "#7F7F7F", "marker": "s"},
    "replay": {"color": "#009E73", "marker": "^", "linestyle": "--"},
    "bgpo": {"color": "#0072B2", "marker": "D", "linewidth": 2.4},
}
INK = "#333333"


def draw(points: Sequence[Point], options: Options, subtitle: str, path: Path) -> None:
    """Write the two-panel plot to `path`."""
    figure, (memory, time) = plt.subplots(1, 2, figsize=(11.5, 4.8), dpi=160)
    _panel(memory, points, lambda point: point.peak / MIB)
    _panel(time, points, lambda point: point.seconds_per_update)
    memory.set_title("Peak memory above the model and its gradients", loc="left", fontsize=11, color=INK)
    memory.yaxis.set_major_formatter(FuncFormatter(lambda size, _: readable(size * MIB)))
    time.set_title("Time per policy update", loc="left", fontsize=11, color=INK)
    time.yaxis.set_major_formatter(FuncFormatter(lambda seconds, _: f"{seconds:g} s"))
    if options.memory_budget is not None:
        _budget(memory, points, options.memory_budget)
    for axes in (memory, time):
        _axis(axes, options.n_mc)
        _label_ends(axes)
    figure.suptitle(subtitle, x=0.01, ha="left", fontsize=9, color="#666666")
    figure.tight_layout(rect=(0, 0, 1, 0.99), w_pad=3)
    figure.savefig(path)
    plt.close(figure)


def _panel(axes: Axes, points: Sequence[Point], value: Callable[[Point], float]) -> None:
    for method, style in STYLES.items():
        measured = [point for point in points if point.method == method and point.status == OK]
        if measured:
            n_mc, values = [point.n_mc for point in measured], [value(point) for point in measured]
            axes.plot(n_mc, values, label=METHODS[method].title, markersize=5, **{"linewidth": 1.8, **style})


def _budget(axes: Axes, points: Sequence[Point], budget: int) -> None:
    """The line that no process could cross, and a cross on it for every point that tried."""
    baselines = [point.baseline_bytes for point in points if point.status == OK]
    if not baselines:
        return
    left = (budget - max(baselines)) / MIB
    failed = [point for point in points if point.status == OUT_OF_MEMORY]
    if not failed and left > 4 * axes.get_ylim()[1]:
        return  # far above everything measured: it would only squeeze the lines
    axes.axhline(left, color="#999999", linewidth=1, linestyle=":")
    text = f"what the {readable(budget)} budget leaves"
    axes.annotate(text, (0.01, left), xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points",
                  fontsize=8, color="#777777")  # fmt: skip
    for point in failed:
        color = STYLES[point.method]["color"]
        axes.plot([point.n_mc], [left], marker="x", markersize=9, markeredgewidth=2.2, color=color, linestyle="none")
        axes.annotate("out of memory", (point.n_mc, left), xytext=(-8, 7), textcoords="offset points", ha="right",
                      fontsize=9, color=color)  # fmt: skip


def _axis(axes: Axes, n_mc: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=10)
    axes.set_xticks(list(n_mc), [str(count) for count in n_mc])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("Monte Carlo samples per sequence, n_mc", color=INK)
    low, high = axes.get_ylim()
    axes.set_ylim(low / 1.3, high * 1.3)
    axes.grid(True, which="major", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, which="both")


def _label_ends(axes: Axes, gap: float = 0.06) -> None:
    """Name every line right of its last point, names pushed apart so that lines which meet stay readable."""
    lines = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = sorted(
        (to_axes.transform((line.get_xdata()[-1], line.get_ydata()[-1]))[1], i) for i, line in enumerate(lines)
    )
    height = -1.0
    for end, i in ends:
        height = max(end, height + gap)
        axes.annotate(
            lines[i].get_label(),
            (1.01, height),
            xycoords="axes fraction",
            color=lines[i].get_color(),
            fontsize=9,
            va="center",
            annotation_clip=False,
        )
