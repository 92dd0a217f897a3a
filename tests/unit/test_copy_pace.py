"""The token bucket of copies, on a clock of the test's; and who waits hears of a new rate."""

import threading

from remora.actors.copy_pace import BURST_S, Pace


def test_long_takes_are_paid_for_afterwards() -> None:
    now = [0.0]
    pace = Pace(100.0, clock=lambda: now[0])
    waited: list[float] = []

    def wait(timeout: float) -> bool:
        waited.append(timeout)
        now[0] += timeout
        return True

    pace._changed.wait = wait  # type: ignore[assignment]
    pace.take(50)
    assert waited == [], "nothing was owed"
    pace.take(25)
    assert waited == [0.5]
    now[0] += 100.0
    pace.take(1)
    pace.take(int(100 * BURST_S))
    pace.take(10)
    assert len(waited) == 2 and waited[1] < 0.02, "a long rest saves a burst, and no more"
    assert abs(sum(waited) - 0.51) < 1e-9


def test_without_a_rate_nobody_waits() -> None:
    pace = Pace(None)
    for _ in range(3):
        pace.take(1 << 40)
    assert pace.bytes_per_s is None


def test_a_new_rate_is_heard_by_who_waits() -> None:
    pace = Pace(1.0)
    pace.take(1 << 30)  # owed for 34 years
    waiting = threading.Thread(target=pace.take, args=(1,), daemon=True)
    waiting.start()
    pace.set_rate(None)
    waiting.join(30)
    assert not waiting.is_alive()
