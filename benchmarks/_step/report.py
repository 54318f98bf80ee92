"""What the rows say: the findings against their targets, and the table in the terminal."""

from __future__ import annotations

from typing import Any

from _measure import readable
from _script import OK

TIMES_PLAIN, PEAK_GROWTH = 1.5, 0.01  # targets: at least; at most


def findings(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per model and mode the figures that the benchmark is for, None where they were not measured."""
    subjects = dict.fromkeys((row["shape"], row["mode"]) for row in rows)
    return [_finding([row for row in rows if (row["shape"], row["mode"]) == subject]) for subject in subjects]


def _finding(rows: list[dict[str, Any]]) -> dict[str, Any]:
    fine = [row for row in rows if row["status"] == OK]
    found: dict[str, Any] = {"shape": rows[0]["shape"], "mode": rows[0]["mode"]}
    against = next((row for row in fine if row["measure"] == "against plain"), None)
    found["times_plain"] = against and against["times_plain"]
    found["times_plain_met"] = against and against["times_plain"] >= TIMES_PLAIN
    rates = {row["n_mc"]: row["mc_samples_per_second"] for row in fine if row["measure"] == "throughput"}
    best = max(rates, key=lambda n_mc: rates[n_mc]) if rates else None
    found["best_mc_samples_per_second"] = best and rates[best]
    shares = {row["n_mc"]: row["utilisation"] for row in fine if row["measure"] == "throughput"}
    found["utilisation"] = best and shares[best]
    peaks = {row["n_mc"]: row["above_weights_and_gradients_bytes"] for row in fine if row["measure"] == "memory"}
    found["peak_growth"] = peaks[max(peaks)] / peaks[min(peaks)] - 1 if len(peaks) > 1 else None
    found["peak_growth_met"] = None if found["peak_growth"] is None else found["peak_growth"] <= PEAK_GROWTH
    step = next((row for row in rows if row["measure"] == "optimizer step"), None)
    found["fits"] = step and step.get("fits")
    return found


def print_report(rows: list[dict[str, Any]]) -> None:
    """Every row in a line, then the findings."""
    for row in rows:
        print(f"{row['shape']:8} {row['mode']:19} {row['measure']:15} {row.get('n_mc', ''):>4}  {_figures(row)}")
    for found in findings(rows):
        print(f"{found['shape']}, {found['mode']}: {'; '.join(_sentences(found)) or 'nothing measured'}")


def _figures(row: dict[str, Any]) -> str:
    if row["status"] != OK:
        return f"{row['status']}: {row.get('message', '')}"
    if row["measure"] == "start":
        took = f"built in {row['build_seconds']:.1f} s, {row['micro_batch_tokens']} tokens at once"
        return f"{row['parameters'] / 1e9:.2f}e9 parameters, {row['trained'] / 1e9:.2f}e9 trained, {took}"
    if row["measure"] == "gemm":
        return f"{row['flops_per_second'] / 1e12:.0f} TFLOP/s at {row['tokens']} tokens"
    if row["measure"] == "memory":
        above = readable(row["above_weights_and_gradients_bytes"])
        return f"peak {readable(row['peak_bytes'])}, above weights and gradients {above}"
    if row["measure"] == "optimizer step":
        peak = readable(max(row["peak_bytes"].values()))
        return f"fits {readable(row['cap_bytes'])}: yes, peak {peak}, with {row['library']}"
    share = "" if row["utilisation"] is None else f", {row['utilisation']:.0%} of the GEMM rate"
    rate = row["mc_samples_per_second"]
    if row["measure"] == "throughput":
        return f"{rate:.2f} MC samples/s{share}"
    each = ", ".join(f"{name} {value:.2f}" for name, value in rate.items())
    return f"MC samples/s: {each}{share}"


def _sentences(found: dict[str, Any]) -> list[str]:
    said = []
    if found["times_plain"]:
        said.append(f"{found['times_plain']:.2f} times plain, target >= {TIMES_PLAIN} {_met(found['times_plain_met'])}")
    if found["peak_growth"] is not None:
        growth = f"peak above weights and gradients {found['peak_growth']:+.2%} from the least n_mc to the most"
        said.append(f"{growth}, target <= {PEAK_GROWTH:.0%} {_met(found['peak_growth_met'])}")
    if found["fits"] is not None:
        said.append(f"a whole step fits 80 GiB: {'yes' if found['fits'] else 'no'}")
    return said


def _met(met: bool) -> str:
    return "met" if met else "MISSED"
