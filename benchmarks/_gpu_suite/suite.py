"""Runs the parts one after another under one budget, and keeps OUT/suite.json true after every step.

A part may take the time that is left, in proportion to its share among the parts still to come: what one leaves over
goes to all later ones. It is told to begin nothing new somewhat before its limit and is ended at it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from _gpu_suite.parts import BENCHMARKS, ROOT, Call, Part
from _gpu_suite.process import Ended, Progress, Stopped, died, run, tail

OK, NOT_AVAILABLE = "ok", "not available"  # the two that a resumed run leaves alone
FAILED, CRASHED, OUT_OF_TIME, INCOMPLETE = "failed", "crashed", "out of time", "incomplete"
MISSING, STOPPED, NOT_RUN, RUNNING = "missing", "stopped", "not run", "running"
NO_TIME = "no time left"  # of a row
FINISHED = (OK, NOT_AVAILABLE)

LEAST_SECONDS = 5.0  # with less than this a part cannot even import torch
LAST_CASE = 30.0  # at most so long before its limit a part begins its last case, and at most this share of it:
LAST_CASE_SHARE = 0.25
PLOT_SECONDS = 20.0  # kept back for plots where there are some, at most this share of all:
PLOT_SHARE = 0.1


class Refused(ValueError):
    """These results cannot go into that folder; the message says why and what to do."""


@dataclass(frozen=True)
class Plan:
    """What was asked for."""

    out: Path
    parts: Sequence[Part]
    seconds: float
    dry_run: bool = False
    resume: bool = False
    force: bool = False


def probe(dry_run: bool) -> dict[str, Any]:
    """`_measure.environment` of the device that the parts will use, asked for in a process that is gone afterwards."""
    program = (
        "import json, torch, _measure\n"
        "device = 'cuda' if torch.cuda.is_available() else 'cpu'\n"
        "print(json.dumps(_measure.environment(device)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=BENCHMARKS, capture_output=True, text=True, check=False, timeout=120
    )
    if done.returncode != 0:
        raise Refused(f"torch does not work here:\n{done.stderr.strip()}")
    found = json.loads(done.stdout.splitlines()[-1])
    if found["device"] == "cpu" and not dry_run:
        raise Refused("torch finds no CUDA device here; --dry-run goes through every part without one")
    return found | {"command": " ".join([Path(sys.executable).name, *sys.orig_argv[1:]])}


def open_record(plan: Plan, environment: dict[str, Any]) -> dict[str, Any]:
    """The record to go on with, a new one in an empty folder; `Refused` where old results and new ones do not mix."""
    path, fresh = plan.out / "suite.json", {"suite": "gpu_suite", "dry_run": plan.dry_run}
    if not path.exists():
        taken = [part.name for part in plan.parts if (plan.out / f"{part.name}.json").exists()]
        if taken:
            raise Refused(f"{plan.out} holds {taken[0]}.json but no suite.json: choose another folder")
        plan.out.mkdir(parents=True, exist_ok=True)
        return fresh | {"environment": environment, "earlier_environments": [], "parts": {}}
    before = read_json(path)
    if before is None or before.get("suite") != "gpu_suite":
        raise Refused(f"{path} is not a record of this suite: choose another folder")
    if before["dry_run"] != plan.dry_run:
        kinds = ("a dry run", "measurements") if before["dry_run"] else ("measurements", "a dry run")
        raise Refused(f"{plan.out} holds {kinds[0]}; {kinds[1]} must go into another folder")
    earlier = before["environment"]
    if not plan.resume:
        raise Refused(f"{plan.out} holds results of {earlier['date']}: --resume goes on with them, or choose another")
    for name in ("commit", "device"):
        if earlier[name] != environment[name] and not plan.force:
            raise Refused(
                f"{plan.out} was measured at {name} {earlier[name]}, this is {environment[name]}: "
                "choose another folder, or --force to mix them"
            )
    environments = [*before["earlier_environments"], earlier]
    return fresh | {"environment": environment, "earlier_environments": environments, "parts": before["parts"]}


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file, None where there is no such file or no such object."""
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) else None


class Suite:
    """One run of a plan."""

    def __init__(self, plan: Plan, environment: dict[str, Any], begin: float) -> None:
        self.plan = plan
        self.record = open_record(plan, environment)
        plots = any(part.plot for part in plan.parts)
        self._end = begin + plan.seconds
        self._parts_end = self._end - (min(PLOT_SECONDS, PLOT_SHARE * plan.seconds) if plots else 0.0)
        self._device = "cpu" if environment["device"] == "cpu" else "cuda"
        self._environment = child_environment(interpreted=self._device == "cpu")

    def run(self) -> bool:
        """Run what is to be run, then the plots; True if all parts of the plan are finished. `Stopped` goes on up."""
        todo = [part for part in self.plan.parts if not self._finished(part)]
        for part in self.plan.parts:
            if part not in todo:
                print(f"{part.name}: kept from {self.record['parts'][part.name]['date']}", flush=True)
        entries = self.record["parts"]
        entries.update({part.name: {"status": NOT_RUN, "message": "its turn did not come"} for part in todo})
        self.write()
        try:
            for index, part in enumerate(todo):
                shares = sum(other.share for other in todo[index:])
                left = self._parts_end - time.monotonic()
                self._run_part(part, left * part.share / shares, f"[{index + 1}/{len(todo)}] {part.name}:")
            self._plots()
        finally:
            self.write()
        return all(entries[part.name]["status"] in FINISHED for part in self.plan.parts)

    def _finished(self, part: Part) -> bool:
        status = self.record["parts"].get(part.name, {}).get("status")
        return status in FINISHED and (self.plan.out / f"{part.name}.json").exists()

    def _run_part(self, part: Part, limit: float, label: str) -> None:
        entry: dict[str, Any] = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        entry |= {"commit": self.record["environment"]["commit"], "limit": round(limit, 1)}
        self.record["parts"][part.name] = entry
        if not part.needs.exists():
            entry |= {"status": MISSING, "message": f"there is no {part.needs}"}
        elif limit < LEAST_SECONDS:
            entry |= {"status": NOT_RUN, "message": NO_TIME}
        else:
            print(f"{label} {part.title}, at most {limit:.0f} s", flush=True)
            self._run_process(part, entry, limit, label)
        print(f"{label} {entry['status']}, {entry.get('seconds', 0.0):.0f} s  {entry['message']}", flush=True)
        self.write()

    def _run_process(self, part: Part, entry: dict[str, Any], limit: float, label: str) -> None:
        out, log = self.plan.out, self.plan.out / f"{part.name}.log"
        offset = log.stat().st_size if log.exists() else 0
        soft = limit - min(LAST_CASE, LAST_CASE_SHARE * limit)
        call = Call(
            out, soft, self._device, self.plan.dry_run, self.plan.resume and (out / f"{part.name}.json").exists()
        )
        command = part.command(call)
        entry |= {"status": RUNNING, "message": "", "command": " ".join(command)}
        self.write()
        progress, begin = Progress(label, limit, log, offset), time.monotonic()
        try:
            ended = run(command, limit, log, self._environment, BENCHMARKS, progress)
        except Stopped as reason:
            entry |= {"status": STOPPED, "message": f"{reason} came", "seconds": time.monotonic() - begin}
            raise
        except OSError as error:
            entry |= {"status": FAILED, "message": f"could not start: {error}"}
            return
        finally:
            progress.clear()
            entry["output_tail"] = tail(log, offset)
        status, message = verdict(ended, read_json(out / f"{part.name}.json"))
        entry |= {"status": status, "message": message, "seconds": ended.seconds, "exit_code": ended.exit_code}

    def _plots(self) -> None:
        """Draw what can be drawn; a plot that fails is said and changes nothing else."""
        problems = []
        for part in self.plan.parts:
            source, target = (self.plan.out / f"{part.name}.{kind}" for kind in ("json", "png"))
            if part.plot is None or not source.exists():
                continue
            if target.exists() and target.stat().st_mtime >= source.stat().st_mtime:
                continue
            log = self.plan.out / f"{part.name}.log"
            ended = run(part.plot(self.plan.out), max(LEAST_SECONDS, self._end - time.monotonic()), log,
                        self._environment, BENCHMARKS)  # fmt: skip
            if ended.exit_code != 0:
                problems.append(f"{part.name}.png: {ended}; see {log.name}")
                print(f"plot {problems[-1]}", flush=True)
        self.record["plot_problems"] = problems

    def write(self) -> None:
        """Replace suite.json."""
        aside = self.plan.out / "suite.json.part"
        aside.write_text(json.dumps(self.record, indent=1) + "\n")
        os.replace(aside, self.plan.out / "suite.json")


def verdict(ended: Ended, document: Mapping[str, Any] | None) -> tuple[str, str]:
    """Status and message of a part from how its process ended and what it wrote."""
    statuses = [status_of(row) for row in rows_of(document or {})]
    counts = ", ".join(f"{statuses.count(each)} {each}" for each in dict.fromkeys(statuses))
    if not ended.in_time:
        return OUT_OF_TIME, f"{ended}; rows kept: {counts or 'none'}"
    if (signal := died(ended.exit_code)) is not None:
        return CRASHED, f"{signal}; rows kept: {counts or 'none'}"
    if ended.exit_code != 0:
        return FAILED, f"{ended}; rows: {counts or 'none'}"
    if document is None:
        return FAILED, "ended well, but wrote no results"
    if FAILED in statuses:
        return FAILED, counts
    if NO_TIME in statuses:
        return INCOMPLETE, counts
    if statuses and set(statuses) == {NOT_AVAILABLE}:
        return NOT_AVAILABLE, next((row["message"] for row in document["rows"] if row.get("message")), "")
    return OK, counts


def rows_of(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a script measured; the main job calls its rows points."""
    return document.get("rows") or document.get("points") or []


def status_of(row: Mapping[str, Any]) -> str:
    """How a row ended; the main job says in a point's message that it was skipped for want of time."""
    return NO_TIME if row.get("message") == NO_TIME else row.get("status", FAILED)


def child_environment(interpreted: bool) -> dict[str, str]:
    """This environment; Triton interpreted where there is no GPU, the source tree where nothing is installed."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if interpreted:
        environment.setdefault("TRITON_INTERPRET", "1")
    if importlib.util.find_spec("bgpo_kernels") is None:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return environment
