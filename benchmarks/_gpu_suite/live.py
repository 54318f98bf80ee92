"""pytest with a record that survives whatever ends it: `python -m _gpu_suite.live EVENTS SECONDS [pytest's options]`.

Every event is a line of JSON in EVENTS, written before the next thing happens: the tests chosen, the start of each, its
outcome. A test whose start has no outcome is the one that took the process down. Tests named in the file EVENTS.done
are left out. After SECONDS, or once a failure has left the CUDA context dead, so that every later test would fail for
it, no further test begins.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
DETAIL = 6000  # characters of a traceback that are kept, from its end


class Live:
    """The plugin."""

    def __init__(self, events: Path, seconds: float) -> None:
        self._events = events
        self._end = time.monotonic() + seconds
        done = events.with_name(events.name + ".done")
        self._done = set(done.read_text().splitlines()) if done.exists() else set()
        self._reports: list[pytest.TestReport] = []

    def _write(self, **event: Any) -> None:
        with self._events.open("a") as file:
            file.write(json.dumps(event) + "\n")

    @pytest.hookimpl(trylast=True)  # after `-m` has chosen
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Leave out what is done, and say what will run."""
        dropped = [item for item in items if item.nodeid in self._done]
        items[:] = [item for item in items if item.nodeid not in self._done]
        config.hook.pytest_deselected(items=dropped)
        self._write(event="chosen", tests=[item.nodeid for item in items])

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that does not import is a failure, and the others run."""
        if report.failed:
            self._write(event="start", test=report.nodeid)
            self._write(event="end", test=report.nodeid, **_outcome([report]))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._reports = []
        self._write(event="start", test=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._reports.append(report)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        """Without time left a test counts as dealt with, and the session stops after it."""
        if time.monotonic() <= self._end:
            return None
        item.session.shouldstop = "no time left"
        return True

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        outcome = _outcome(self._reports)
        self._write(event="end", test=nodeid, **outcome)
        if outcome["status"] == "failed" and _context_is_dead():
            pytest.exit("the CUDA context is dead; the other tests need a new process", returncode=1)


def _outcome(reports: list[Any]) -> dict[str, Any]:
    """One row from the reports of set-up, call and tear-down."""
    seconds = sum(getattr(report, "duration", 0.0) for report in reports)
    bad = next((report for report in reports if report.failed), None)
    if bad is not None:
        crash = getattr(bad.longrepr, "reprcrash", None)
        message = crash.message if crash is not None else str(bad.longrepr).strip().split("\n")[-1]
        return {"status": "failed", "seconds": seconds, "message": message[:500], "detail": bad.longreprtext[-DETAIL:]}
    skipped = next((report for report in reports if report.skipped), None)
    if skipped is not None:
        reason = skipped.longrepr[-1] if isinstance(skipped.longrepr, tuple) else str(skipped.longrepr)
        return {"status": "skipped", "seconds": seconds, "message": reason.removeprefix("Skipped: ")}
    return {"status": "ok", "seconds": seconds}


def _context_is_dead() -> bool:
    """Whether CUDA works no longer in this process."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


if __name__ == "__main__":
    events, seconds, *options = sys.argv[1:]
    os.chdir(ROOT)
    sys.exit(pytest.main(options, plugins=[Live(Path(events), float(seconds))]))
