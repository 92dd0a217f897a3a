"""What live tests share."""

from collections.abc import Iterator
from typing import Any

import pytest
from support.programs import benchmarks_on_path, program


@pytest.fixture(scope="module")
def live() -> Iterator[Any]:
    """`benchmarks/live_streams.py`, with a Ray of one node."""
    with benchmarks_on_path():
        found = program("live_streams")
        with found.one_node():
            yield found
