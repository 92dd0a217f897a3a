"""Golden scenarios of the dense rank's state machine; re-record them with `pytest --record`."""

from pathlib import Path

import pytest
from support.dense_scenario import replay

SCENARIOS = sorted(Path(__file__).parent.glob("dense_*.txt"))


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_scenario(path: Path, request: pytest.FixtureRequest) -> None:
    recorded = path.read_text()
    now = replay(recorded)
    if request.config.getoption("--record"):
        path.write_text(now)
    else:
        assert now == recorded


def test_there_are_scenarios() -> None:
    assert len(SCENARIOS) >= 10
