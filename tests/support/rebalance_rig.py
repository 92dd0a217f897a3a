"""The online loop over real statistics, without a process between."""

from pathlib import Path
from typing import Any

from support.router_traffic import encoded, paired_tokens

from remora.actors.plan_outcome import PlacementCost, PlanOutcome
from remora.actors.router_statistics import RouterStatistics
from remora.autoscale.rebalance import RebalancePolicy
from remora.cluster.decision_log import DecisionLog
from remora.cluster.rebalancer import Apply, Rebalancer
from remora.comm.errors import ConfigError
from remora.comm.objective import Objective
from remora.comm.view import Placement, View

LAYERS = (1, 2)


class Direct:
    """The router's statistics asked without a process between."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.statistics = RouterStatistics(slots=None, path=None)

    def report(self, *, shift: int = 0, tokens: int = 4000, seed: int = 0) -> None:
        for source in ("a", "b"):
            ids = paired_tokens(len(LAYERS), tokens, seed=seed, shift=shift)
            self.statistics.add(encoded(ids, source, LAYERS))

    def plan(self, seed: int, objective: Objective) -> PlanOutcome:
        self.asked = objective
        return self.statistics.plan(self.view, seed, objective)

    def fresh_cost(self, placement: Placement) -> PlacementCost:
        return self.statistics.fresh_cost(self.view, placement)


def no_room(operation_id: str, placement: Placement) -> dict[str, Any]:
    raise ConfigError("no slot is free to begin with")


def begun(operation_id: str, placement: Placement) -> dict[str, Any]:
    return {"outcome": "running"}  # by hand, or the deployment stops meanwhile


def loop(
    planner: Direct, folder: Path | None, apply: Apply = no_room, **policy: Any
) -> tuple[Rebalancer, list[float]]:
    now = [0.0]
    settings = {"confirmations": 2, "cooldown_s": 100.0, "tokens_min": 1000.0, **policy}
    rebalancer = Rebalancer(
        planner=planner,
        policy=RebalancePolicy(**settings),
        view=planner.view,
        apply=apply,
        expert_bytes=1000,
        row_bytes=64,
        folder=folder,
        clock=lambda: now[0],
        wall=lambda: 1_700_000_000.0 + now[0],
    )
    return rebalancer, now


def lines(folder: Path) -> list[dict[str, Any]]:
    return list(DecisionLog(folder).lines())
