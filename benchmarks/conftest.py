"""What the pytest benchmarks share: `--record`, the table of ratios with their targets, and the raw results as JSON."""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
from _measure import environment, median_ratio

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass
class Verdict:
    """One measured figure against its target."""

    source: str
    name: str
    figure: float
    relation: str | None  # "<=" or ">=", None without a target
    target: float | None
    samples: dict[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """Whether the figure meets its target, None without one."""
        if self.relation is None:
            return None
        return {"<=": operator.le, ">=": operator.ge}[self.relation](self.figure, self.target)

    def __str__(self) -> str:
        if self.relation is None:
            return f"{self.figure:8.3f}"
        return f"{self.figure:8.3f}  target {self.relation} {self.target:<6g} {'met' if self.met else 'MISSED'}"


_verdicts: list[Verdict] = []


class Judge:
    """Collects the figures of one benchmark file; each goes to the final table and, with --record, to the results."""

    def __init__(self, source: str) -> None:
        self.source = source

    def figure(
        self, name: str, figure: float, relation: str | None, target: float | None, samples: Mapping[str, Any]
    ) -> None:
        """Judge one figure. A missed target is reported, not raised: timing belongs to the machine it ran on."""
        _verdicts.append(Verdict(self.source, name, figure, relation, target, dict(samples)))

    def ratio(
        self,
        name: str,
        seconds: Mapping[str, list[float]],
        pair: tuple[str, str],
        relation: str | None = None,
        target: float | None = None,
    ) -> None:
        """Judge the median over rounds of seconds[pair[0]] / seconds[pair[1]]."""
        self.figure(name, median_ratio(seconds, *pair), relation, target, {"seconds": dict(seconds)})


@pytest.fixture
def judge(request: pytest.FixtureRequest) -> Judge:
    """The judge of the requesting file."""
    return Judge(Path(str(request.node.fspath)).stem)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --record."""
    parser.addoption("--record", action="store_true", help="write raw results to benchmarks/results/<file>.json")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print every figure beside its target, and record them when asked."""
    if not _verdicts:
        return
    terminalreporter.section("figures and targets")
    width = max(len(verdict.name) for verdict in _verdicts)
    for verdict in _verdicts:
        terminalreporter.write_line(f"{verdict.name:<{width}}  {verdict}")
    if config.getoption("--record"):
        for path in _record():
            terminalreporter.write_line(f"wrote {path}")


def _record() -> list[Path]:
    RESULTS.mkdir(exist_ok=True)
    written = []
    for source in sorted({verdict.source for verdict in _verdicts}):
        figures = [asdict(v) | {"met": v.met} for v in _verdicts if v.source == source]
        path = RESULTS / f"{source}.json"
        document = {"benchmark": source, "environment": environment(), "figures": figures}
        path.write_text(json.dumps(document, indent=1) + "\n")
        written.append(path)
    return written
