"""Who copies is told a share: less while the dense rank that is looked at gets slower."""

import threading
from typing import Any

import pytest

from remora.autoscale.copy_rate import FLOOR, START
from remora.cluster import copy_watch
from remora.cluster.copy_watch import CopyWatch

SOON_S = 30.0


class Call:
    """An actor's method."""

    def __init__(self, method: Any) -> None:
        self.remote = method


class Dense:
    """Each look sees ten more steps."""

    def __init__(self) -> None:
        self.steps, self.seconds, self.each_s, self.running = 0, 0.0, 0.01, 1
        self.status = Call(self._status)

    def _status(self) -> dict[str, Any]:
        self.steps += 10
        self.seconds += 10 * self.each_s
        return {"steps_total": self.steps, "step_s": self.seconds, "num_running": self.running}


class Taker:
    """Remembers shares."""

    def __init__(self) -> None:
        self.shares: list[float] = []
        self.changed = threading.Condition()
        self.set_copy_share = Call(self._set)

    def _set(self, share: float) -> None:
        with self.changed:
            self.shares.append(share)
            self.changed.notify_all()

    def until(self, share: float) -> bool:
        with self.changed:
            return self.changed.wait_for(lambda: share in self.shares, SOON_S)


def test_takers_hear_of_slow_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy_watch, "LOOK_EVERY_S", 0.001)
    monkeypatch.setattr(copy_watch, "answers_within", lambda pending, _: dict(pending))
    dense, taker, other = Dense(), Taker(), Taker()
    members: dict[str, Any] = {"dense-0": dense, "shard-2": taker, "shard-1": other}
    watch = CopyWatch(lambda: members)
    try:
        watch.begun("shard-2")
        assert taker.until(1.0), "steps are calm"
        assert taker.shares[0] == START, "somebody decodes"
        dense.each_s = 0.1
        assert taker.until(FLOOR)
        dense.each_s = 0.01
        with taker.changed:
            taker.shares.clear()
        assert taker.until(1.0)
        watch.ended("shard-2")
        assert other.shares == [], "it takes nothing"
    finally:
        watch.close()
    watch._thread.join(SOON_S)
    assert not watch._thread.is_alive()
