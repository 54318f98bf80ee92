"""JSON lines of scored responses: one object {"task", "prompt", "response", "reward"} per line, UTF-8.

`task` is optional when reading (default "custom"); keys beyond these four are ignored. Blank lines are skipped. Every
error is a ValueError that names the file and the line.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Record:
    """One scored response. Records with the same task and prompt form one group."""

    task: str
    prompt: str
    response: str
    reward: float


def write_records(path: str | os.PathLike[str], records: Iterable[Record]) -> int:
    """Write `records` to `path`, one JSON object per line, replacing the file; returns how many were written."""
    count = 0
    with open(path, "w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(asdict(record), ensure_ascii=False) + "\n")
            count += 1
    return count


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """All records of `path`, in order.

    Raises ValueError naming the file and line for text that is not UTF-8 or not JSON, for a missing or mistyped
    field, for an empty prompt or response and for a reward that is not finite; FileNotFoundError when there is no
    such file.
    """
    records = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    records.append(_parse(line))
                except ValueError as error:
                    raise ValueError(f"{os.fspath(path)}, line {number}: {error}") from error
    if not records:
        raise ValueError(f"{os.fspath(path)}: holds no record")
    return records


def _parse(line: bytes) -> Record:
    try:
        fields = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg}, column {error.colno})") from error
    if not isinstance(fields, dict):
        raise ValueError(f"expected a JSON object, found {type(fields).__name__}")
    missing = [name for name in ("prompt", "response", "reward") if name not in fields]
    if missing:
        raise ValueError(f"missing field {', '.join(map(repr, missing))}; found {sorted(fields)}")
    fields.setdefault("task", "custom")
    for name in ("task", "prompt", "response"):
        if not isinstance(fields[name], str) or not fields[name]:
            raise ValueError(f"field {name!r} must be a non-empty string, found {fields[name]!r}")
    reward = fields["reward"]
    if isinstance(reward, bool) or not isinstance(reward, (int, float)) or not math.isfinite(reward):
        raise ValueError(f"field 'reward' must be a finite number, found {reward!r}")
    return Record(fields["task"], fields["prompt"], fields["response"], float(reward))
