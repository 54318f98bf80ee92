"""One command in a process group of its own: under a time limit, its output in a file, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

POLL_SECONDS = 0.1
GRACE_SECONDS = 10.0  # from SIGTERM to SIGKILL
TAIL_BYTES = 6000


class Stopped(SystemExit):
    """SIGINT or SIGTERM came: end what runs, write what there is, and go. Uncaught, it is exit status 1."""


@dataclass(frozen=True)
class Ended:
    """How a command ended: `exit_code` as subprocess gives it (negative: the signal), `in_time` unless we ended it."""

    exit_code: int
    in_time: bool
    seconds: float

    def __str__(self) -> str:
        if not self.in_time:
            return f"ended at its limit after {self.seconds:.0f} s"
        return died(self.exit_code) or f"exit status {self.exit_code}"


def died(exit_code: int) -> str | None:
    """ "killed by SIGSEGV" for the exit code of a process that a signal ended, else None."""
    if exit_code >= 0:
        return None
    try:
        return f"killed by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"killed by signal {-exit_code}"


def run(
    command: Sequence[str],
    limit: float,
    log: Path | None = None,
    environment: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    watch: Callable[[float], bool | None] | None = None,
    grace: float | None = None,
) -> Ended:
    """Run `command` for at most `limit` seconds, its output appended to `log` (or left where this process's goes).

    `watch(seconds so far)` is called while it runs; a true answer ends the command early, as the limit does. However
    this function is left, the command and every process of its group are gone.
    """
    with _sink(log, command) as sink:
        begin = time.monotonic()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT if sink else None, cwd=cwd,
            env=None if environment is None else dict(environment), start_new_session=True,
        )  # fmt: skip
        in_time = True
        try:
            while in_time and process.poll() is None:
                seconds = time.monotonic() - begin
                in_time = seconds < limit and not (watch is not None and watch(seconds))
                time.sleep(POLL_SECONDS)
        finally:
            _end_group(process, GRACE_SECONDS if grace is None else grace)
    return Ended(process.returncode, in_time, time.monotonic() - begin)


@contextmanager
def _sink(log: Path | None, command: Sequence[str]) -> Iterator[IO[bytes] | None]:
    if log is None:
        yield None
        return
    with log.open("ab") as file:
        file.write(f"$ {' '.join(command)}\n".encode())
        file.flush()
        yield file


def _end_group(process: subprocess.Popen[bytes], grace: float) -> None:
    """Ask whatever still runs to end, then kill it; a command that has ended may have left children behind."""
    if process.poll() is None:
        _signal_group(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    _signal_group(process.pid, signal.SIGKILL)
    process.wait()


def _signal_group(group: int, number: int) -> None:
    with suppress(ProcessLookupError):  # nobody is left
        os.killpg(group, number)


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """SIGINT and SIGTERM raise `Stopped` in here; only the first one, so that cleaning up is not cut short."""

    def stop(number: int, _: FrameType | None) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, lambda *_: None)  # not SIG_IGN, which children would inherit
        raise Stopped(signal.Signals(number).name)

    before = {each: signal.signal(each, stop) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def tail(log: Path, offset: int = 0, size: int = TAIL_BYTES) -> str:
    """The last bytes of a file as text, none of them before `offset`."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(offset, end - size))
        return file.read().decode(errors="replace")


def last_line(text: str) -> str:
    """The last line that is not empty; a progress bar writes its line again and again, and its last state counts."""
    lines = [line.strip() for line in text.replace("\r", "\n").split("\n")]
    return next((line for line in reversed(lines) if line), "")


class Progress:
    """What a part does now, told on a terminal four times a second and in a log file every half minute."""

    def __init__(self, label: str, limit: float, log: Path, offset: int) -> None:
        self._label, self._limit, self._log, self._offset = label, limit, log, offset
        self._terminal = sys.stdout.isatty()
        self._next = 0.0 if self._terminal else 30.0

    def __call__(self, seconds: float) -> None:
        if seconds < self._next:
            return
        self._next = seconds + (0.25 if self._terminal else 30.0)
        text = f"{self._label} {seconds:3.0f}/{self._limit:.0f} s  {last_line(tail(self._log, self._offset, 2000))}"
        if self._terminal:
            width = os.get_terminal_size().columns
            print(f"\r{text[: width - 1]:<{width - 1}}", end="", flush=True)
        else:
            print(text[:200], flush=True)

    def clear(self) -> None:
        """Leave an empty line for what is printed next."""
        if self._terminal:
            print(f"\r{'':<{os.get_terminal_size().columns - 1}}\r", end="", flush=True)
