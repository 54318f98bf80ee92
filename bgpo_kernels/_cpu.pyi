"""Compiled from csrc/cpu/module.cpp: addresses and sizes only, which cpu.py of each op checks before it calls."""

from typing import Any

def __getattr__(name: str) -> Any: ...
