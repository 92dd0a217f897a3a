"""Golden scenarios of the router and of its rebalance policy; re-record with `pytest --record`."""

from pathlib import Path

import pytest
from support.rebalance_scenario import replay as replay_rebalance
from support.router_scenario import replay as replay_router

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    ("name", "replay"),
    [("router_routing", replay_router), ("rebalance_rounds", replay_rebalance)],
    ids=["routing", "rebalance"],
)
def test_scenario(name: str, replay: object, request: pytest.FixtureRequest) -> None:
    path = HERE / f"{name}.txt"
    recorded = path.read_text()
    assert callable(replay)
    now = replay(recorded)
    if request.config.getoption("--record"):
        path.write_text(now)
    else:
        assert now == recorded
