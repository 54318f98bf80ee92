"""The plot: memory and time of one policy update against n_mc, both axes logarithmic, lines labelled where they end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from _measure import MIB, readable
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

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
    time.set_title("Time per policy update", loc="left", fontsize=11, color=INK)
    if options.memory_budget is not None:
        _budget(memory, points, options.memory_budget)
    for axes in (memory, time):
        _axis(axes, options.n_mc)
        _label_ends(axes, max(options.n_mc))
    memory.set_yscale("log", base=2)
    memory.yaxis.set_major_formatter(FuncFormatter(lambda mebibytes, _: readable(mebibytes * MIB)))
    time.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    time.yaxis.set_major_formatter(FuncFormatter(lambda seconds, _: f"{seconds:g} s"))
    for axes in (memory, time):
        axes.yaxis.set_minor_locator(NullLocator())
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
    held = [point.baseline_bytes + point.gradient_bytes for point in points if point.status == OK]
    if not held:
        return
    left = (budget - max(held)) / MIB
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
    axes.set_xlabel("Monte Carlo samples per sequence, n_mc", color=INK)
    low, high = axes.get_ylim()
    axes.set_ylim(low / 1.3, high * 1.3)
    axes.grid(True, which="major", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, which="both")


def _label_ends(axes: Axes, last: int, gap: float = 0.06) -> None:
    """Name every line where it ends: at the last n_mc beside the axes, names pushed apart so that lines which meet stay
    readable; a line that ends earlier, beside its last point.
    """
    height = -1.0
    to_axes = axes.transData + axes.transAxes.inverted()
    lines = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
    for line in sorted(lines, key=lambda line: line.get_ydata()[-1]):
        style = {"color": line.get_color(), "fontsize": 9, "annotation_clip": False}
        end = (line.get_xdata()[-1], line.get_ydata()[-1])
        if end[0] < last:
            axes.annotate(line.get_label(), end, xytext=(-9, 5), textcoords="offset points", ha="right", **style)
            continue
        height = max(to_axes.transform(end)[1], height + gap)
        axes.annotate(line.get_label(), (1.01, height), xycoords="axes fraction", va="center", **style)
