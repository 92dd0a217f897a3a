"""The token bucket of copies and the rest after work; and who waits hears of a new share."""

import threading

from remora.actors.copy_pace import BURST_S, REST_S_MIN, Effort, Pace


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
    pace.set_share(1e12)
    waiting.join(30)
    assert not waiting.is_alive()


class Clock:
    """Time that passes while somebody waits."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.waited: list[float] = []

    def __call__(self) -> float:
        return self.now_s

    def wait(self, timeout: float) -> bool:
        self.waited.append(timeout)
        self.now_s += timeout
        return True


def paced(clock: Clock, share: float) -> Pace:
    pace = Pace(None, share, clock=clock)
    pace._changed.wait = clock.wait  # type: ignore[assignment]
    return pace


def test_rest_makes_work_a_share_of_the_time() -> None:
    clock = Clock()
    pace = paced(clock, 0.25)
    pace.rest(0.5)
    assert clock.now_s == 1.5
    pace.set_share(1.0)
    pace.rest(0.5)
    assert clock.now_s == 1.5, "all of a core: no rest"


def test_who_rests_hears_of_a_new_share() -> None:
    clock = Clock()
    pace = paced(clock, 0.25)

    def half_way(timeout: float) -> bool:
        clock.wait(timeout / 2)
        pace._changed.wait = clock.wait  # type: ignore[assignment]
        pace._share = 0.5
        return True

    pace._changed.wait = half_way  # type: ignore[assignment]
    pace.rest(0.5)
    assert clock.waited == [0.75, 0.25], "half of it is paid for; the rest is at the new share"
    resting = Pace(None, 1e-6)
    thread = threading.Thread(target=resting.rest, args=(1.0,), daemon=True)
    thread.start()
    resting.set_share(1.0)
    thread.join(30)
    assert not thread.is_alive()


def test_little_work_is_put_together() -> None:
    clock, work = Clock(), Clock()
    pace = paced(clock, 0.5)
    effort = Effort(pace, clock=work)
    for _ in range(4):
        work.now_s += REST_S_MIN / 4
        effort.pause()
    assert clock.waited == [REST_S_MIN]
    effort.pause()
    assert clock.waited == [REST_S_MIN], "paid for"
