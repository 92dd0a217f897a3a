"""What is kept of warm standbys, without processes; live: test_elastic.py, test_warm_dense.py."""

from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, cast

import pytest
from support.serving import DEMO_MODEL

from remora.cluster import standbys as module
from remora.cluster.config import parse_config
from remora.cluster.elastic import Elastic
from remora.cluster.standbys import FAILURES_MAX, Standbys
from remora.cluster.wal import Wal

SOON_S = 30.0


class Process:
    """A standby's handle: `warm_up.remote(model).future()`."""

    def __init__(self) -> None:
        self.warm: Future[None] = Future()
        self.end: Future[None] = Future()
        self.warm_up = self

    def remote(self, model: str) -> "Process":
        return self

    def future(self) -> "Future[None]":
        return self.warm


CONFIG = parse_config(
    {"model": str(DEMO_MODEL), "experts": {"slots": 32}, "elastic": {"warm_standby": 1}}
)


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> "SimpleQueue[Process]":
    """Processes that were started, and not looked at yet."""
    found: SimpleQueue[Process] = SimpleQueue()

    def make(*_: Any) -> Process:
        found.put(process := Process())
        return process

    monkeypatch.setattr(module, "make_member", make)
    monkeypatch.setattr(module, "end_of", lambda process: process.end)
    monkeypatch.setattr(module.ray, "kill", lambda *_, **__: None)
    return found


def test_one_on_a_node_that_goes_away_is_replaced_without_an_operation(
    begun: "SimpleQueue[Process]", monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no member was on the node none came, and there were fewer standbys from then on."""
    elastic = Elastic(
        CONFIG, b"", cast("Wal", None), publish=lambda _: None, changed=lambda *_: None
    )
    elastic.standbys.fill()
    begun.get(timeout=SOON_S).warm.set_result(None)
    assert elastic.standbys.status()["warm"] == 1
    monkeypatch.setattr(module, "node_of", lambda _: "a")
    elastic._leave({"a"}, False)
    assert begun.empty(), "who leaves the node may need the place"
    elastic._leave({"a"}, True)
    begun.get(timeout=SOON_S).warm.set_result(None)
    assert elastic.standbys.status()["warm"] == 1


def test_who_fails_again_and_again_is_told_and_tried_after_an_operation(
    begun: "SimpleQueue[Process]",
) -> None:
    """Three failures in a row ended it for good, and nothing but the log said so."""
    standbys = Standbys(CONFIG, "shard")
    standbys.fill()
    for number in range(FAILURES_MAX):
        assert not standbys.status()["given_up"]
        process = begun.get(timeout=SOON_S)
        if number == 0:
            process.end.set_result(None)
            assert standbys.status()["error"] == "it died"
        else:
            process.warm.set_exception(RuntimeError("no memory\nand a traceback"))
    status = standbys.status()
    assert status["given_up"] and status["error"] == "no memory" and status["starting"] == 0
    standbys.fill()  # an operation has ended
    begun.get(timeout=SOON_S).warm.set_result(None)
    expected = {"wanted": 1, "warm": 1, "starting": 0, "error": None, "given_up": False}
    assert standbys.status() == expected
    assert standbys.take() is not None
