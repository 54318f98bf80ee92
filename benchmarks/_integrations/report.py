"""The table in the terminal and the record of a run."""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _measure import ROOT, environment, readable
from rich.console import Console
from rich.table import Table

from .worker import DIFFERS, OK

FAILED = "failed"
WIDTH = 130  # where there is no terminal


def ratios(row: dict[str, Any]) -> tuple[float, float]:
    """Plain over ours: peak memory, and time as the median of the rounds' ratios."""
    times = zip(row["seconds"]["plain"], row["seconds"]["ours"], strict=True)
    peak = row["peak_bytes"]
    return peak["plain"] / max(1, peak["ours"]), statistics.median(p / o for p, o in times)


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """One line a trainer."""
    table = Table(title="One update's log-probabilities and their gradient: the trainer's way and ours")
    for heading in ("trainer", "same result", "value error", "gradient error", "head rows", "peak memory", "time"):
        table.add_column(heading, justify="left" if heading in ("trainer", "same result") else "right")
    for row in rows:
        if row["status"] not in (OK, DIFFERS):
            table.add_row(row["trainer"], row["status"])
            continue
        memory, speed = ratios(row)
        peak = row["peak_bytes"]
        table.add_row(
            row["trainer"], row["status"], f"{row['value_error']:.0e}", f"{row['gradient_error']:.0e}",
            f"{row['plain_rows']} -> {row['our_rows']}",
            f"{readable(peak['plain'])} -> {readable(peak['ours'])} ({memory:.1f}x less)", f"{speed:.2f}x faster",
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else WIDTH).print(table)
    for row in rows:
        if row["status"] == FAILED:
            print(f"{row['trainer']}: {row['message']}")


def figures(row: dict[str, Any]) -> str:
    """What a trainer's page says of a row."""
    memory, speed = ratios(row)
    peak, seconds = row["peak_bytes"], {way: statistics.median(times) for way, times in row["seconds"].items()}
    return (
        f"Measured on a CPU, {row['title']}: rows of the head {row['plain_rows']} → {row['our_rows']}, peak memory "
        f"above model and gradients {readable(peak['plain'])} → {readable(peak['ours'])} ({memory:.1f} times less), "
        f"time {seconds['plain']:.2f} s → {seconds['ours']:.2f} s ({speed:.2f} times as fast). "
        "[How](../../benchmarks/README.md#integrations)"
    )


def write_pages(rows: Sequence[dict[str, Any]]) -> None:
    """Put the figures under their mark in docs/integrations."""
    for row in rows:
        page = ROOT / "docs" / "integrations" / f"{row['trainer']}.md"
        mark = f"<!-- figures: {row['trainer']} -->"
        before, found, after = page.read_text().partition(mark)
        if not found:
            raise ValueError(f"{page} has no {mark}")
        rest = after.partition("\n\n")[2]
        page.write_text(f"{before}{mark}\n{figures(row)}\n" + (f"\n{rest}" if rest else ""))


def write_json(path: Path, rows: Sequence[dict[str, Any]], size: str) -> None:
    """Replace the file by one with all rows so far."""
    document = {
        "benchmark": "integrations",
        "size": size,
        "environment": environment("cpu"),
        "rows": list(rows),
    }
    aside = path.with_name(path.name + ".part")
    aside.write_text(json.dumps(document, indent=1) + "\n")
    os.replace(aside, path)
