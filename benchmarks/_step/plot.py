"""The plot, from the JSON alone: MC samples per second against the plain update's, and peak memory against n_mc."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from _measure import GIB
from _script import OK
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

# Colours that stay apart for colour-blind readers (Okabe and Ito).
BARS = {"ours": "#0072B2", "plain, no old pass": "#BBBBBB", "plain": "#7F7F7F"}
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK = "#333333"


def draw(document: dict[str, Any], path: Path) -> bool:
    """Write the two panels to `path`; False, and no file, when there is nothing to show."""
    rows = [row for row in document["rows"] if row["status"] == OK]
    against = [row for row in rows if row["measure"] == "against plain"]
    memory = [row for row in rows if row["measure"] == "memory"]
    if not against and not memory:
        return False
    figure, (speed, peak) = plt.subplots(1, 2, figsize=(12.5, 4.8), dpi=160)
    _speed(speed, against)
    _memory(peak, memory)
    device, dry = document["environment"]["device"], ", dry run: the figures mean nothing" * document["dry_run"]
    figure.suptitle(
        f"A policy update on {device}, random weights in bf16{dry}", x=0.01, ha="left", fontsize=9, color=INK
    )
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
    return True


def _speed(axes: Axes, rows: list[dict[str, Any]]) -> None:
    axes.set_title("Monte Carlo samples per second", loc="left", fontsize=11, color=INK)
    height = 0.8 / len(BARS)
    for place, (name, color) in enumerate(BARS.items()):
        rates = [row["mc_samples_per_second"][name] for row in rows]
        places = [number + place * height for number in range(len(rows))]
        bars = axes.barh(places, rates, height * 0.92, color=color, label=name)
        axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8, color=INK)
    labels = [f"{row['shape']}\n{row['mode']}" for row in rows]
    axes.set_yticks([number + 0.4 - height / 2 for number in range(len(rows))], labels, fontsize=9)
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=9)
    _plain_frame(axes)


def _memory(axes: Axes, rows: list[dict[str, Any]]) -> None:
    axes.set_title("Peak memory, GiB", loc="left", fontsize=11, color=INK)
    subjects = dict.fromkeys((row["shape"], row["mode"]) for row in rows)
    for number, subject in enumerate(subjects):
        points = sorted(
            (row["n_mc"], row["peak_bytes"] / GIB) for row in rows if (row["shape"], row["mode"]) == subject
        )
        n_mc, peaks = zip(*points, strict=True)
        axes.plot(n_mc, peaks, marker="o", color=LINES[number % len(LINES)], label=", ".join(subject))
    counts = sorted({row["n_mc"] for row in rows})
    if counts:
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.legend(frameon=False, fontsize=9)
    axes.set_ylim(0, 1.1 * max((row["peak_bytes"] / GIB for row in rows), default=1.0))
    axes.set_xlabel("Monte Carlo samples per sequence, n_mc; one at a time", color=INK)
    _plain_frame(axes)


def _plain_frame(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, which="both")
