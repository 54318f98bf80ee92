"""Targets, and the table of a case. Everything here reads a row of the JSON file and nothing else.

A missed target is printed as missed and fails nothing: timing belongs to the machine. Ratios are medians over the
rounds of one run.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from _measure import GIB, MIB, median_ratio, readable

#: Fraction of the bare GEMMs' rate by (mode, workspace), from N = 4096 on.
FRACTIONS = {
    ("trained", GIB): 0.85,
    ("trained", 4 * GIB): 0.90,
    ("frozen", GIB): 0.90,
    ("frozen", 4 * GIB): 0.90,
    ("forward", GIB): 0.90,
    ("forward", 4 * GIB): 0.90,
}
LEAST_ROWS = 4096
RECOMPUTING = 1.25  # times slower than ours has to be what computes the logits again: 8NHV to 6NHV
_RELATIONS = {">=": operator.ge, "<=": operator.le}


def slack(row: Mapping[str, Any]) -> int:
    """Bytes that a call of ours may take beyond its workspace.

    The gathered rows of a chunk, a copy of them with dead rows cleared, and the gradients of all masked rows before
    they go to their positions: at most 3 N H of the inputs' dtype, N filled up to a panel of 512. 64 N: statistics,
    targets and coefficients of the rows. 16 MiB: the allocator's rounding of these blocks. The fp32 sum of a narrower
    d weight, 4 V H where N takes more than one chunk, is not in it: it is no smaller thing than the workspace.
    """
    itemsize = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}[row["dtype"]]
    return 3 * (row["N"] + 512) * row["H"] * itemsize + 64 * row["N"] + 16 * MIB


def targets(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every target of a case beside its figure."""
    found = []
    ours = [entry for entry in row["variants"] if entry["family"].startswith("ours") and entry["status"] == "ok"]
    masked = all(entry["rows"] == "masked" for entry in row["variants"])
    for entry in ours:
        wanted = FRACTIONS.get((row["mode"], entry["workspace"]))
        if masked and wanted is not None and row["N"] >= LEAST_ROWS and "fraction" in entry:
            found.append(_judged(f"{entry['name']}: fraction of the GEMMs", entry["fraction"], ">=", wanted))
        allowed = entry["workspace"] + slack(row)
        more = f"; an fp32 sum of d weight is {readable(4 * row['V'] * row['H'])}" if row["mode"] == "trained" else ""
        name = f"{entry['name']}: extra MiB (workspace + {readable(slack(row))}{more})"
        found.append(_judged(name, entry["extra_bytes"] / MIB, "<=", allowed / MIB))
        found.append(_judged(f"{entry['name']}: repeats bit for bit", float(entry["repeats"]), ">=", 1.0))
    first = next((entry for entry in ours if "seconds" in entry), None)  # what backend="auto" takes, by default
    peers = [e for e in row["variants"] if not e["family"].startswith(("ours", "gemm")) and "seconds" in e]
    for peer in peers if first is not None else []:
        ratio = median_ratio({"peer": peer["seconds"], "ours": first["seconds"]}, "peer", "ours")
        wanted = RECOMPUTING if peer["recomputes"] and row["mode"] == "trained" else 1.0
        found.append(_judged(f"{peer['name']} / {first['name']}, time", ratio, ">=", wanted))
    return found


def _judged(name: str, figure: float, relation: str, target: float) -> dict[str, Any]:
    met = bool(_RELATIONS[relation](figure, target))
    return {"name": name, "figure": figure, "relation": relation, "target": target, "met": met}


def title(row: Mapping[str, Any]) -> str:
    """The case in a few words."""
    rows = "" if row["rows"] == "masked" else ", peers on all positions"
    return f"{row['head']} ({row['H']} x {row['V']}), {row['N']} masked rows, {row['mode']}{rows}"


def lines(row: Mapping[str, Any]) -> list[str]:
    """A case as text: a line for every variant, a line for every target."""
    if "variants" not in row:
        return [title(row), f"  {row['status']}: {row.get('message', '')}"]
    width = max(len(entry["name"]) for entry in row["variants"])
    text = [f"{title(row)}; {row['rounds']} rounds, ceiling: {row['ceiling']}"]
    text.append(f"  {'':<{width}}  {'ms':>9} {'of GEMMs':>8} {'TFLOP/s':>8} {'extra':>10}  error / bound")
    for entry in row["variants"]:
        text.append(f"  {entry['name']:<{width}}  {_figures(entry)}")
    text += [f"  {_verdict(judged)}" for judged in row["targets"]]
    return text


def _figures(entry: Mapping[str, Any]) -> str:
    if "seconds" not in entry:
        return f"{entry['status']}: {entry.get('message', '')}"
    milliseconds = 1e3 * sorted(entry["seconds"])[len(entry["seconds"]) // 2]
    rate = f"{entry['fraction']:8.3f} {entry['tflops']:8.1f}" if "fraction" in entry else " " * 17
    plain = "" if entry["weighted"] else "  plain sum"
    return f"{milliseconds:9.3f} {rate} {readable(entry['extra_bytes']):>10}  {_largest_error(entry)}{plain}"


def _largest_error(entry: Mapping[str, Any]) -> str:
    """The error that comes nearest to its bound."""
    judged = {name: (entry["errors"][name], bound) for name, bound in entry["bounds"].items() if bound > 0.0}
    if not judged:
        return ""
    name = max(judged, key=lambda name: judged[name][0] / judged[name][1])
    error, bound = judged[name]
    return f"{error / bound:4.2f} {name} {error:.1e}"


def _verdict(judged: Mapping[str, Any]) -> str:
    state = "met" if judged["met"] else "MISSED"
    return f"{judged['name']}: {judged['figure']:.3f}, target {judged['relation']} {judged['target']:.3f}: {state}"
