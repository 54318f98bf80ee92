"""The table in the terminal and the record of a run."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _measure import environment, readable
from rich.console import Console
from rich.table import Table

from .worker import DIFFERS, OK

FAILED = "failed"


def ratios(row: dict[str, Any]) -> tuple[float, float]:
    """Plain over ours: peak memory, and time as the median of the rounds' ratios."""
    times = zip(row["seconds"]["plain"], row["seconds"]["ours"], strict=True)
    return row["peak_bytes"]["plain"] / row["peak_bytes"]["ours"], statistics.median(p / o for p, o in times)


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """One line a trainer."""
    table = Table(title="One update's log-probabilities and their gradient: the trainer's way and ours")
    for heading in ("trainer", "same result", "value error", "gradient error", "head rows", "peak memory", "time"):
        table.add_column(heading, justify="left" if heading in ("trainer", "same result") else "right")
    for row in rows:
        if row["status"] not in (OK, DIFFERS):
            table.add_row(row["trainer"], row["status"], row["message"])
            continue
        memory, speed = ratios(row)
        peak = row["peak_bytes"]
        table.add_row(
            row["trainer"], row["status"], f"{row['value_error']:.0e}", f"{row['gradient_error']:.0e}",
            f"{row['plain_rows']} -> {row['our_rows']}",
            f"{readable(peak['plain'])} -> {readable(peak['ours'])} ({memory:.1f}x less)", f"{speed:.2f}x faster",
        )  # fmt: skip
    Console().print(table)


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
