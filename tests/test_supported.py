"""The README's tables of models, trainers and stacks: every row names functions, pages and tests that exist."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

import bgpo_kernels as bk

ROOT = Path(__file__).parent.parent
SECTION = (ROOT / "README.md").read_text().partition("## Models and trainers\n")[2].partition("\n## ")[0]
ROWS = [
    line
    for line in SECTION.splitlines()
    if line.startswith("| ") and not line.startswith(("| model", "| trainer", "| stack"))
]
TRAINERS = [row for row in ROWS if "tests/integrations/" in row]
MODULES = sorted(p.stem for p in (ROOT / "bgpo_kernels" / "integrations").glob("[a-z]*.py"))


@pytest.mark.parametrize("row", ROWS, ids=[row.split("|")[1].strip().split("]")[0].strip("[") for row in ROWS])
def test_a_row_leads_to_a_page_and_to_tests(row: str) -> None:
    links = re.findall(r"\]\(([^)]+)\)", row)
    tests = [link for link in links if link.startswith("tests/")]
    assert len(tests) == 1
    for link in links:
        assert (ROOT / link).is_file(), link
    assert re.search(r"^def test_", (ROOT / tests[0]).read_text(), flags=re.M)
    for name in re.findall(r"`bk\.([a-z_.]+)", row):
        found = bk
        for part in name.split("."):
            found = getattr(found, part)
        assert callable(found)


@pytest.mark.parametrize("row", TRAINERS, ids=[row.split("|")[1].strip().split("]")[0].strip("[") for row in TRAINERS])
def test_a_trainers_row_names_functions_that_its_tests_call(row: str) -> None:
    names = re.findall(r"`([a-z_0-9]+)\.([A-Za-z_]+)`", row)
    assert names
    for module, function in names:
        assert callable(getattr(importlib.import_module(f"bgpo_kernels.integrations.{module}"), function))
        test = ROOT / "tests" / "integrations" / f"test_{module}.py"
        assert str(test.relative_to(ROOT)) in row and function in test.read_text()


def test_every_integration_has_a_row_a_page_and_an_entry_of_the_script() -> None:
    listed = {module for row in TRAINERS for module, _ in re.findall(r"`([a-z_0-9]+)\.([A-Za-z_]+)`", row)}
    assert listed == set(MODULES)
    for module in MODULES:
        page = "llada_eval" if module == "lm_eval" else module  # two doors to one computation
        assert (ROOT / "docs" / "integrations" / f"{page}.md").is_file()
        assert (ROOT / "benchmarks" / "_integrations" / f"{page}.py").is_file()
