"""From the JSON of a part to its lines of the table: one small function a part, which looks at nothing else."""

from __future__ import annotations

import operator
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from _gpu_suite.suite import NO_TIME, read_json, status_of

GIB = 1 << 30
_RELATIONS = {">=": operator.ge, "<=": operator.le}
_QUIET = (": repeats bit for bit", ": extra MiB")  # targets of the head that make one line a case when all are met


@dataclass(frozen=True)
class Figure:
    """One line: what was measured in which case, and against which target."""

    part: str
    case: str
    name: str
    value: str
    target: str = ""
    met: bool | None = None

    @property
    def verdict(self) -> str:
        """ "met", "MISSED", or "-" without a target."""
        return "-" if self.met is None else "met" if self.met else "MISSED"


def figures(folder: Path, parts: Iterable[str], dry_run: bool) -> list[Figure]:
    """All lines of a folder of results. A file of the other kind (dry run or not) is left out, and a line says so.

    Numbers of a dry run are judged by no target; that a case failed is.
    """
    found: list[Figure] = []
    for part in parts:
        document = read_json(folder / f"{part}.json")
        if document is None:
            continue
        if document.get("dry_run", dry_run) != dry_run:
            found.append(Figure(part, "", "left out", "a dry run" if document["dry_run"] else "not of this dry run"))
            continue
        try:
            lines = [Figure(part, *line) for line in GATHER[part](document)]
        except (KeyError, TypeError, ValueError) as error:
            found.append(Figure(part, "", "not understood", f"{type(error).__name__}: {error}", "", False))
            continue
        judging = part in ("build", "tests", "sanitizer") or not dry_run
        found += [line if judging or line.target[:2] not in _RELATIONS else replace(line, met=None) for line in lines]
    return found


Line = tuple[Any, ...]  # a Figure without its part


def judged(case: str, name: str, value: float, shown: str, relation: str, target: float) -> Line:
    """A line with its verdict."""
    return case, name, shown, f"{relation} {target:.4g}", bool(_RELATIONS[relation](value, target))


def unmeasured(rows: Iterable[Mapping[str, Any]], case: Callable[[Mapping[str, Any]], str]) -> Iterator[Line]:
    """A line for every row that is not ok, one for all without time; a failed one misses what it should have been."""
    waiting = 0
    for row in rows:
        if status_of(row) == NO_TIME:
            waiting += 1
        elif row["status"] != "ok":
            met = False if row["status"] == "failed" else None
            yield case(row), row["status"], row.get("message", "")[:160], "ok" if met is False else "", met
    if waiting:
        yield "all", NO_TIME, f"{waiting} cases"


def build(document: Mapping[str, Any]) -> Iterator[Line]:
    for row in document["rows"]:
        text = row.get("message", "").split("\n")[0]
        needed = row["status"] in ("ok", "failed")
        yield row["check"], row["status"], text, "there" if needed else "", row["status"] == "ok" if needed else None


def tests(document: Mapping[str, Any]) -> Iterator[Line]:
    statuses = [row["status"] for row in document["rows"]]
    failed, waiting = statuses.count("failed"), statuses.count("no time left")
    yield judged("all", "failed", failed, f"{failed} of {len(statuses)}", "<=", 0)
    yield judged("all", "not run for want of time", waiting, str(waiting), "<=", 0)
    passed = statuses.count("ok")
    yield judged(
        "all", "passed", passed, f"{passed} in {sum(r.get('seconds', 0.0) for r in document['rows']):.0f} s", ">=", 1
    )
    for reason, count in count_by(row.get("message", "") for row in document["rows"] if row["status"] == "skipped"):
        yield "all", "skipped", f"{count}: {reason[:160]}"
    yield from unmeasured((row for row in document["rows"] if row["status"] == "failed"), lambda row: row["test"])


def sanitizer(document: Mapping[str, Any]) -> Iterator[Line]:
    for row in document["rows"]:
        case = f"{row['tool']} on {row['program']}"
        if row["status"] not in ("ok", "failed") or row["tool"] == "none":
            yield case, row["status"], row.get("message", "")[:160]
        elif row["program"] == "kernels" and "errors" in row:
            yield judged(case, "errors", row["errors"], f"{row['errors']} {row['first']}"[:160].strip(), "<=", 0)
        else:
            target = "found" if row["program"] != "kernels" else "0 errors"
            yield case, row["status"], row["message"][:160], target, row["status"] == "ok"


def mask(document: Mapping[str, Any]) -> Iterator[Line]:
    def case(row: Mapping[str, Any]) -> str:
        return f"{row['B']} x {row['n_mc']} x {row['T']} {row['scheme']}, {row['backend']}"

    for row in document["rows"]:
        if row["status"] != "ok":
            continue
        ratios, call = row["ratios"], statistics.median(row["seconds"]["call"])
        first = ratios["call / memcpy"]
        shown = f"{first:.2f} ({call * 1e6:.1f} us)"
        yield judged(case(row), "call / memcpy of its output", first, shown, "<=", row["target"]["call / memcpy"])
        for name in ("GPU of call / GPU of memcpy", "loop / call"):
            if ratios[name] is not None:
                yield case(row), name, f"{ratios[name]:.2f}"
    yield from unmeasured(document["rows"], case)


def head(document: Mapping[str, Any]) -> Iterator[Line]:
    def case(row: Mapping[str, Any]) -> str:
        return f"{row['head']} N {row['N']} {row['mode']}" + ("" if row["rows"] == "masked" else ", peers on all rows")

    absent: set[str] = set()
    for row in (row for row in document["rows"] if "variants" in row):
        entries = row["variants"]
        absent |= {entry["name"].split(", all positions")[0] for entry in entries if entry["status"] == "not installed"}
        targets = {target["name"]: target for target in row["targets"]}
        for entry in entries:
            yield from _variant(case(row), entry, targets)
        for suffix in _QUIET:
            quiet = [target for name, target in targets.items() if suffix in name]
            if quiet and all(target["met"] for target in quiet):
                met = f"{len(quiet)} of {len(quiet)}"
                yield (
                    case(row),
                    f"ours{suffix} within its bound" if "extra" in suffix else f"ours{suffix}",
                    met,
                    "all",
                    True,
                )
                targets = {name: target for name, target in targets.items() if suffix not in name}
        for name, target in targets.items():
            yield judged(
                case(row), name, target["figure"], f"{target['figure']:.3f}", target["relation"], target["target"]
            )
    yield from unmeasured(document["rows"], case)
    if absent:
        yield "all", "not installed", ", ".join(sorted(absent))


def _variant(case: str, entry: Mapping[str, Any], targets: dict[str, Any]) -> Iterator[Line]:
    """The rate of ours and of the ceiling, and whatever went wrong; takes the target of the rate out of `targets`."""
    name, ours = entry["name"], entry["family"].startswith("ours")
    if entry["status"] not in ("ok", "not installed"):
        bad = ours and entry["status"] in ("wrong", "failed")
        yield (
            case,
            name,
            f"{entry['status']}: {entry.get('message', '')}"[:160],
            "right" if bad else "",
            False if bad else None,
        )
    elif "fraction" in entry and (ours or entry["family"] == "gemm"):
        shown = f"{entry['fraction']:.3f} ({entry['tflops']:.0f} TFLOP/s)"
        target = targets.pop(f"{name}: fraction of the GEMMs", None)
        label = f"{name}: share of the GEMMs' rate"
        if target is None:
            yield case, label, shown
        else:
            yield judged(case, label, entry["fraction"], shown, target["relation"], target["target"])


def step(document: Mapping[str, Any]) -> Iterator[Line]:
    from _step.report import PEAK_GROWTH, TIMES_PLAIN, findings  # imports torch, and by now nothing is measured

    for found in findings(document["rows"]):
        case = f"{found['shape']}, {found['mode']}"
        if (times := found["times_plain"]) is not None:
            yield judged(case, "MC samples/s, times plain", times, f"{times:.2f}", ">=", TIMES_PLAIN)
        if (rate := found["best_mc_samples_per_second"]) is not None:
            share = found["utilisation"]
            at = "" if share is None else f" ({share:.0%} of the GEMM rate)"
            yield case, "MC samples/s, best n_mc", f"{rate:.2f}{at}"
        if (growth := found["peak_growth"]) is not None:
            yield judged(case, "peak, most n_mc / least - 1", growth, f"{growth:+.3%}", "<=", PEAK_GROWTH)
        if found["fits"] is not None:
            row = next(r for r in document["rows"] if r["measure"] == "optimizer step" and r["mode"] == found["mode"])
            peaks = row.get("peak_bytes")
            peak = f", peak {max(peaks.values()) / GIB:.1f} GiB" if peaks else ""
            yield case, f"a whole step fits {row['cap_bytes'] / GIB:.0f} GiB", ("yes" if found["fits"] else "no") + peak
    yield from unmeasured(
        document["rows"], lambda row: f"{row['shape']}, {row['mode']}: {row['measure']} {row.get('n_mc', '')}".strip()
    )


def main(document: Mapping[str, Any]) -> Iterator[Line]:
    found = document["findings"]
    if change := found.get("bgpo_peak_change"):
        yield "BGPO", f"peak at n_mc {change['to']} / n_mc {change['from']} - 1", f"{change['share']:+.3%}"
    if line := found.get("exact_growth"):
        shown = f"{line['bytes_per_sample'] / GIB:.3f} GiB (R^2 {line['r_squared']:.5f})"
        yield "exact, graphs kept", "growth per MC sample", shown
    if ratio := found.get("exact_over_bgpo"):
        yield "exact / BGPO", f"memory at n_mc {ratio['n_mc']}", f"{ratio['memory']:.1f}"
        yield "exact / BGPO", f"time at n_mc {ratio['n_mc']}", f"{ratio['time']:.2f}"
    for method, largest in document["largest_fitting"].items():
        yield method, "largest n_mc measured to fit", str(largest)
    yield from unmeasured(document["points"], lambda point: f"{point['method']} at n_mc {point['n_mc']}")


def count_by(words: Iterable[str]) -> list[tuple[str, int]]:
    """Every word with how often it occurs, most frequent first."""
    words = list(words)
    return sorted(((word, words.count(word)) for word in dict.fromkeys(words)), key=lambda pair: -pair[1])


GATHER: dict[str, Callable[[Mapping[str, Any]], Iterator[Line]]] = {
    "build": build,
    "tests": tests,
    "sanitizer": sanitizer,
    "mask": mask,
    "head": head,
    "step": step,
    "main": main,
}
