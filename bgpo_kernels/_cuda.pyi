"""Compiled from csrc/cuda/module.cpp: addresses and sizes only, which cuda.py of each op checks before it calls."""

from typing import Any

def __getattr__(name: str) -> Any: ...
