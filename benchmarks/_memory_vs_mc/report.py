"""What the main job says: the table in the terminal, the findings under it, and the JSON and CSV files."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from _measure import MIB, environment, readable
from rich.console import Console
from rich.table import Table

from _memory_vs_mc.data import Tokens
from _memory_vs_mc.methods import METHODS
from _memory_vs_mc.options import Options
from _memory_vs_mc.sweep import OK, OUT_OF_MEMORY, Point

AGREEMENT = ("reference", "cosine", "relative_max", "relative_l2")


def largest_fitting(points: Sequence[Point]) -> dict[str, tuple[int, bool]]:
    """Per method the largest n_mc of the sweep that fits (0: none), and whether a larger one was found not to."""
    fits: dict[str, tuple[int, bool]] = {}
    for point in points:
        largest, bounded = fits.get(point.method, (0, False))
        largest = max(largest, point.n_mc) if point.status == OK else largest
        fits[point.method] = (largest, bounded or point.status == OUT_OF_MEMORY)
    return fits


def growth(points: Sequence[Point], method: str) -> tuple[float, float] | None:
    """(bytes per Monte Carlo sample, R^2) of the straight line through a method's peaks; None below three points."""
    measured = [point for point in points if point.method == method and point.status == OK]
    if len(measured) < 3:
        return None
    n_mc, peaks = (np.array([getattr(p, name) for p in measured], dtype=float) for name in ("n_mc", "peak"))
    slope, intercept = np.polyfit(n_mc, peaks, 1)
    spread = np.square(peaks - peaks.mean()).sum()
    residual = np.square(peaks - slope * n_mc - intercept).sum()
    return float(slope), float(1 - residual / spread) if spread else 1.0


def findings(points: Sequence[Point]) -> dict[str, Any]:
    """The figures that the comparison is made for; a key is missing where the sweep did not measure what it needs."""
    measured = {(point.method, point.n_mc): point for point in points if point.status == OK}
    found: dict[str, Any] = {}
    fused = sorted(n_mc for method, n_mc in measured if method == "bgpo")
    if len(fused) > 1:
        first, last = measured["bgpo", fused[0]], measured["bgpo", fused[-1]]
        found["bgpo_peak_change"] = {"from": fused[0], "to": fused[-1], "share": last.peak / first.peak - 1}
    line = growth(points, "exact")
    if line is not None:
        found["exact_growth"] = {"bytes_per_sample": line[0], "r_squared": line[1]}
    both = [n_mc for n_mc in fused if ("exact", n_mc) in measured]
    if both:
        exact, ours = measured["exact", both[-1]], measured["bgpo", both[-1]]
        found["exact_over_bgpo"] = {
            "n_mc": both[-1],
            "memory": exact.peak / ours.peak,
            "time": exact.seconds_per_update / ours.seconds_per_update,
        }
        found["exact_over_bgpo_memory"] = {
            str(n_mc): measured["exact", n_mc].peak / measured["bgpo", n_mc].peak for n_mc in both
        }
    return found


def print_report(points: Sequence[Point], tokens: Tokens, options: Options, console: Console) -> None:
    """Print the table and the findings."""
    console.print(_table(points, tokens))
    for line in summary(points, options):
        console.print(line, highlight=False, soft_wrap=True)


def _table(points: Sequence[Point], tokens: Tokens) -> Table:
    table = Table(title="One policy update: memory above the model and its gradients, and time", title_justify="left")
    headings = ("n_mc", "method", "peak MiB", "s / update", "MC samples / s", "cosine", "rel. max", "rel. L2")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for n_mc in sorted({point.n_mc for point in points}):
        for point in (p for p in points if p.n_mc == n_mc):
            table.add_row(str(n_mc), METHODS[point.method].title, *_cells(point, len(tokens.input_ids)))
        table.add_section()
    return table


def _cells(point: Point, sequences: int) -> list[str]:
    if point.status != OK:
        return [point.status, *["-"] * 5]
    seconds = point.seconds_per_update
    cells = [f"{point.peak / MIB:.1f}", f"{seconds:.3f}", f"{sequences * point.n_mc / seconds:.2f}"]
    if point.cosine is None or point.relative_max is None or point.relative_l2 is None:
        return [*cells, "reference", "-", "-"]
    note = " *" if point.reference != "exact" else ""
    return [*cells, f"{point.cosine:.8f}{note}", f"{point.relative_max:.1e}", f"{point.relative_l2:.1e}"]


def summary(points: Sequence[Point], options: Options) -> list[str]:
    """The findings in sentences."""
    found, lines = findings(points), []
    if any(point.reference == "replay" for point in points):
        lines.append("* compared with the exact objective by replay: with its graphs kept it was not measured here")
    if change := found.get("bgpo_peak_change"):
        share = 100 * change["share"]
        lines.append(f"BGPO's peak at n_mc {change['to']} against n_mc {change['from']}: {share:+.2f} %")
    if line := found.get("exact_growth"):
        slope = readable(line["bytes_per_sample"])
        lines.append(f"exact, all graphs kept: {slope} more per Monte Carlo sample (R^2 {line['r_squared']:.5f})")
    if ratio := found.get("exact_over_bgpo"):
        memory, time = f"{ratio['memory']:.1f} times BGPO's memory", f"{ratio['time']:.1f} times its time"
        lines.append(f"at n_mc {ratio['n_mc']} it takes {memory} and {time}")
    if options.memory_budget is not None:
        fits = ", ".join(
            f"{METHODS[method].title} {largest if bounded else f'at least {largest}'}"
            for method, (largest, bounded) in largest_fitting(points).items()
        )
        lines.append(f"largest n_mc measured to fit {readable(options.memory_budget)}, model included: {fits}")
    return lines


def write_json(path: Path, points: Sequence[Point], tokens: Tokens, options: Options) -> None:
    """Every raw sample with all that is needed to repeat it."""
    document = {
        "benchmark": "memory_vs_mc",
        "environment": environment(options.device),
        "options": {name: str(v) if isinstance(v, Path) else v for name, v in asdict(options).items()},
        "batch": {
            "sequences": len(tokens.input_ids),
            "tokens": tokens.attention_mask.sum(axis=1).tolist(),
            "response_tokens": tokens.response_mask.sum(axis=1).tolist(),
            "advantages": tokens.advantages.tolist(),
            "records": [asdict(record) for record in tokens.records],
        },
        "findings": findings(points),
        "largest_fitting": {method: largest for method, (largest, _) in largest_fitting(points).items()},
        "points": [point.record() for point in points],
    }
    aside = path.with_name(path.name + ".part")
    aside.write_text(json.dumps(document, indent=1) + "\n")
    os.replace(aside, path)


def write_csv(path: Path, points: Sequence[Point], tokens: Tokens) -> None:
    """One line per point; what was not measured is left empty."""
    rows = []
    for point in points:
        row: dict[str, Any] = {"method": point.method, "n_mc": point.n_mc, "status": point.status}
        if point.status == OK:
            seconds = point.seconds_per_update
            row |= {"baseline_bytes": point.baseline_bytes, "peak_bytes": point.peak, "seconds_per_update": seconds}
            row |= {"mc_samples_per_second": len(tokens.input_ids) * point.n_mc / seconds}
        rows.append(row | {name: getattr(point, name) for name in AGREEMENT})
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(max(rows, key=len)))
        writer.writeheader()
        writer.writerows(rows)
