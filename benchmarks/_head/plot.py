"""Bars of every variant's fraction of the bare GEMMs' rate: one panel a case, from the JSON file alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from _head.report import FRACTIONS, title

INK = "#333333"
MODES = ("trained", "frozen", "forward")


def draw(source: Path, destination: Path) -> None:
    """Write the plot of a record. ValueError if it holds no timed case."""
    document = json.loads(source.read_text())
    rows = [row for row in document["rows"] if any("fraction" in entry for entry in row.get("variants", ()))]
    if not rows:
        raise ValueError(f"{source} holds no case that was timed")
    groups = list(dict.fromkeys((row["head"], row["N"], row["rows"]) for row in rows))
    modes = [mode for mode in MODES if any(row["mode"] == mode for row in rows)]
    longest = max(len(_bars(row)) for row in rows)
    figure, panels = plt.subplots(
        len(groups), len(modes), figsize=(6.2 * len(modes), (0.9 + 0.24 * longest) * len(groups) + 0.6), squeeze=False
    )
    for panel in panels.flat:
        panel.set_axis_off()
    for row in rows:
        panel = panels[groups.index((row["head"], row["N"], row["rows"]))][modes.index(row["mode"])]
        _panel(panel, row)
    machine = document["environment"]
    dry = "DRY RUN, numbers mean nothing; " if document["dry_run"] else ""
    subtitle = f"{dry}{machine['device']}, torch {machine['versions'].get('torch')}, commit {machine['commit']}"
    figure.suptitle(f"Fraction of the bare GEMMs' rate ({subtitle})", fontsize=10, x=0.01, ha="left", color=INK)
    figure.tight_layout(rect=(0, 0, 1, 0.99))
    figure.savefig(destination, dpi=130)
    plt.close(figure)


def _bars(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [entry for entry in row["variants"] if "fraction" in entry]


def _color(entry: dict[str, Any]) -> str:
    """Okabe and Ito's colours: ours blue, the ceiling grey, all others orange."""
    if entry["family"].startswith("ours"):
        return "#0072B2"
    return "#9A9A9A" if entry["family"] == "gemm" else "#E69F00"


def _panel(panel: Axes, row: dict[str, Any]) -> None:
    panel.set_axis_on()
    bars = _bars(row)
    places = range(len(bars))
    panel.barh(places, [entry["fraction"] for entry in bars], color=[_color(entry) for entry in bars], height=0.72)
    panel.set_yticks(places, [entry["name"] for entry in bars], fontsize=8, color=INK)
    panel.invert_yaxis()
    for place, entry in enumerate(bars):
        panel.annotate(f"{entry['fraction']:.2f}", (entry["fraction"], place), xytext=(3, 0), fontsize=7.5, color=INK,
                       textcoords="offset points", va="center")  # fmt: skip
    panel.axvline(1.0, color="#555555", linewidth=0.8)
    for wanted in {wanted for (mode, _), wanted in FRACTIONS.items() if mode == row["mode"]}:
        panel.axvline(wanted, color="#555555", linewidth=0.8, linestyle=":")
    panel.set_xlim(0, 1.12 * max(1.0, *(entry["fraction"] for entry in bars)))
    panel.set_title(title(row), fontsize=9, loc="left", color=INK)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(axis="x", labelsize=8, colors=INK)
