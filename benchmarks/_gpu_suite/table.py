"""A folder of results as text: the table in the terminal, and the markdown for `docs/performance.md`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _gpu_suite.figures import GATHER, Figure, figures
from _gpu_suite.suite import FINISHED, Refused, read_json

COLUMNS = ("part", "case", "figure", "value", "target", "")
WIDEST = (9, 44, 60, 48, 8, 6)  # in the terminal; markdown and JSON have all of it
DRY = "dry run: numbers mean nothing"


def load(folder: Path) -> tuple[dict[str, Any], list[Figure]]:
    """The record of a folder and its figures; `Refused` where there is none."""
    record = read_json(folder / "suite.json")
    if record is None or record.get("suite") != "gpu_suite":
        raise Refused(f"{folder} holds no results of this suite (no suite.json)")
    return record, figures(folder, GATHER, record["dry_run"])


def text(folder: Path) -> str:
    """What the terminal shows."""
    record, found = load(folder)
    cells = [_clipped(f.part, f.case, f.name, f.value, f.target, f.verdict) for f in found]
    widths = [max(len(row[i]) for row in [COLUMNS, *cells]) for i in range(len(COLUMNS))]
    lines = [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [COLUMNS, *cells]
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*heading(folder, record), "", *lines, "", *_parts(record), _summary(record, found)])


def _clipped(*cells: str) -> tuple[str, ...]:
    """On one line and no wider than the terminal's columns."""
    flat = (cell.replace("\n", " ") for cell in cells)
    return tuple(
        cell if len(cell) <= most else cell[: most - 3] + "..." for cell, most in zip(flat, WIDEST, strict=True)
    )


def markdown(folder: Path) -> str:
    """A table for every part under a heading that says where the figures come from."""
    record, found = load(folder)
    lines = [f"{line}  " for line in heading(folder, record)]
    for part in dict.fromkeys(figure.part for figure in found):
        rows = [figure for figure in found if figure.part == part]
        lines += ["", f"### {part}", "", "| case | figure | value | target | |", "|---|---|---|---|---|"]
        lines += [_row(f.case, f.name, f.value, f.target, f.verdict) for f in rows]
    return "\n".join([*lines, "", *(f"- {line}" for line in _parts(record)), "", _summary(record, found), ""])


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', '/').replace(chr(10), ' ') for cell in cells)} |"


def heading(folder: Path, record: Mapping[str, Any]) -> list[str]:
    """Device, versions, commit and date of every run that figures of this folder come from."""
    lines = [DRY.upper()] if record["dry_run"] else []
    runs = [record["environment"], *reversed(record["earlier_environments"])]
    documents = (read_json(folder / f"{part}.json") or {} for part in GATHER)
    runs += [document["environment"] for document in documents if document.get("environment")]
    origins = dict.fromkeys(_origin(run) for run in runs)
    lines += origins
    if len({(run["commit"], run["device"]) for run in runs}) > 1:
        lines.append("Figures of more than one commit or device: each part's JSON says whose they are.")
    return [*lines, f"Command: {record['environment']['command']}"]


def _origin(run: Mapping[str, Any]) -> str:
    """One run in a line; runs of one day and state make one line."""
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    gpu = run.get("gpu", {})
    driver = f", driver {gpu['driver_version']}" if "driver_version" in gpu else ""
    cuda = f", CUDA {gpu['cuda']}" if "cuda" in gpu else ""
    device = run["cpu"] if run["device"] == "cpu" else run["device"]
    return f"{device}{driver}{cuda}; {versions}; commit {run['commit']}; {run['date'][:10]}"


def _parts(record: Mapping[str, Any]) -> list[str]:
    """A line for every part that did not end well, and for plots that were not drawn."""
    lines = [
        f"{name}: {entry['status']}: {entry['message']}"
        for name, entry in record["parts"].items()
        if entry["status"] != "ok"
    ]
    return lines + [f"plot {problem}" for problem in record.get("plot_problems", [])]


def _summary(record: Mapping[str, Any], found: Sequence[Figure]) -> str:
    verdicts = [figure.verdict for figure in found]
    finished = sum(entry["status"] in FINISHED for entry in record["parts"].values())
    counts = f"{verdicts.count('met')} targets met, {verdicts.count('MISSED')} missed"
    return f"{finished} of {len(record['parts'])} parts finished; {counts}" + (f" ({DRY})" if record["dry_run"] else "")
