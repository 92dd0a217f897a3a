"""What live tests share."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
from support.programs import benchmarks_on_path, program

# Ray starts workers in advance with the first driver, which waits for them. Ours have environments
# of their own and take none of those.
os.environ["RAY_prestart_worker_first_driver"] = "0"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share a Ray come last: a process is connected to one only."""
    items.sort(key=lambda item: "one_ray" in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session")
def one_ray() -> Iterator[None]:
    """A Ray of one node, for all modules that need no other; who uses it leaves nothing there."""
    with benchmarks_on_path():
        one_node = program("live_streams").one_node
    with one_node():
        yield


@pytest.fixture(scope="module")
def live(one_ray: None) -> Iterator[Any]:
    """`benchmarks/live_streams.py`, in a Ray of one node."""
    with benchmarks_on_path():
        yield program("live_streams")
