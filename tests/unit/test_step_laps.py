"""Laps of a step: nothing is counted twice, nothing is left out."""

from remora.actors.step_laps import LAPS, Laps


def test_laps_add_up_to_what_passed_without_what_was_skipped() -> None:
    moments = iter([100, 110, 130, 1000, 1004, 1005])
    laps = Laps(now_ns=lambda: next(moments))
    laps.lap("inbox")  # 10
    laps.lap("model")  # 20
    laps.skip()  # idle until 1000
    laps.lap("schedule")  # 4
    laps.lap("model")  # 1
    expected = dict.fromkeys(LAPS, 0) | {"inbox": 10, "model": 21, "schedule": 4}
    assert laps.spent_ns == expected
