"""The README's Python runs as printed, in order, in one namespace; its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_examples_run_as_printed(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert len(blocks) == 2
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "ELBO of the first answer" in printed and "nan" not in printed
    gradients = [p.grad for p in namespace["model"].parameters() if p.grad is not None]
    assert gradients and all(bool(torch.isfinite(g).all()) for g in gradients)
    assert any(bool((g != 0).any()) for g in gradients)


def test_ten_lines_are_ten_statements():
    first = re.findall(r"```python\n(.*?)```", README, flags=re.S)[0]
    statements = [line for line in first.splitlines() if line.strip() and not line.startswith(" ")]
    assert len(statements) <= 10


def test_links_exist():
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
