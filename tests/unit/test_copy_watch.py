"""Who copies is told a rate: less while the dense rank that is looked at gets slower."""

import threading
from typing import Any

import pytest

from remora.autoscale.copy_rate import FLOOR
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
        self.steps, self.seconds, self.each_s = 0, 0.0, 0.01
        self.status = Call(self._status)

    def _status(self) -> dict[str, Any]:
        self.steps += 10
        self.seconds += 10 * self.each_s
        return {"steps_total": self.steps, "step_s": self.seconds}


class Taker:
    """Remembers rates."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.changed = threading.Condition()
        self.set_copy_rate = Call(self._set)

    def _set(self, rate: float) -> None:
        with self.changed:
            self.rates.append(rate)
            self.changed.notify_all()

    def until(self, rate: float) -> bool:
        with self.changed:
            return self.changed.wait_for(lambda: rate in self.rates, SOON_S)


def test_takers_hear_of_slow_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy_watch, "LOOK_EVERY_S", 0.001)
    monkeypatch.setattr(copy_watch, "answers_within", lambda pending, _: dict(pending))
    dense, taker, other = Dense(), Taker(), Taker()
    members: dict[str, Any] = {"dense-0": dense, "shard-2": taker, "shard-1": other}
    watch = CopyWatch(1000.0, lambda: members)
    try:
        watch.begun("shard-2")
        assert taker.until(1000.0)
        dense.each_s = 0.1
        assert taker.until(1000.0 * FLOOR)
        dense.each_s = 0.01
        with taker.changed:
            taker.rates.clear()
        assert taker.until(1000.0)
        watch.ended("shard-2")
        assert other.rates == [], "it takes nothing"
    finally:
        watch.close()
    watch._thread.join(SOON_S)
    assert not watch._thread.is_alive()
