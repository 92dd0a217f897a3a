"""Programs of benchmarks/ as modules: they import each other as scripts do."""

import contextlib
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@contextlib.contextmanager
def benchmarks_on_path() -> Iterator[None]:
    """`import_module` finds the programs meanwhile; afterwards nothing is left of them."""
    before, names = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield
    finally:
        sys.path[:] = before
        for name in set(sys.modules) - names:
            if str(BENCHMARKS) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]


def program(name: str) -> Any:
    """A program of benchmarks/, while they are on the path."""
    return import_module(name)
