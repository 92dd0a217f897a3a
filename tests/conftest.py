"""What holds for every test: which are live, and that the others start no cluster."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# No test fails because it was slow: a first example may compile, and machines are shared.
settings.register_profile("remora", deadline=None)
settings.load_profile("remora")

# Triton's kernels run in Python on CPU tensors. Triton looks when it is first imported, whoever
# imports it (torch's compiler does, too), so it is said before anybody can.
os.environ["TRITON_INTERPRET"] = "1"

LIVE = Path(__file__).parent / "live"


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--record` writes what golden scenarios give now into their files; review it as a diff."""
    parser.addoption("--record", action="store_true", help="re-record the golden scenarios")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything under tests/live is live: `make check` and `make test` split the suite by it."""
    for item in items:
        if LIVE in item.path.parents:
            item.add_marker("live")


@pytest.fixture(autouse=True)
def no_cluster_by_accident(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """`ray.init` raises in a test that is not live: a unit test that needs Ray is no unit test."""
    if request.node.get_closest_marker("live") is None:
        import ray

        def refuse(*args: object, **kwargs: object) -> None:
            raise AssertionError("a test that is not marked live may not start Ray")

        monkeypatch.setattr(ray, "init", refuse)
    yield


@pytest.fixture(autouse=True)
def torch_has_its_own_linear() -> Iterator[None]:
    """A dense model diverts `F.linear` for the life of its process; a test process lives on."""
    yield
    patch = sys.modules.get("remora.actors.row_linear_patch")
    if patch is not None:
        patch.uninstall()
