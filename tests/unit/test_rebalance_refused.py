"""Rounds of the online loop that come to nothing: refused, or of a view that is over."""

import threading
from pathlib import Path
from typing import Any

import pytest
from support.operations import world_operations
from support.rebalance_rig import Direct, begun, lines, loop, no_room
from support.router_rig import TOKEN, view_of, wait_for

from remora.actors.plan_outcome import PlanOutcome
from remora.cluster import beside
from remora.cluster.config import parse_config
from remora.cluster.operation import PlaceAs, ScaleTo
from remora.cluster.placement_file import read_placement
from remora.cluster.rebalancer import BEFORE, LATEST
from remora.comm.errors import ClusterError, OperationIdTakenError
from remora.comm.objective import Objective
from remora.comm.view import Placement


def test_a_move_that_is_refused_costs_the_next_one_nothing(tmp_path: Path) -> None:
    """Neither cooldown nor confirmations, nor what is known of the move before it."""
    planner = Direct(view_of())
    planner.report()
    answers: list[Any] = [no_room, begun, no_room]

    def move(operation_id: str, placement: Placement) -> dict[str, Any]:
        answer: dict[str, Any] = answers.pop(0)(operation_id, placement)
        return answer

    rebalancer, now = loop(planner, tmp_path, move, cooldown_s=1000.0)
    assert rebalancer.step()["verdict"] == "confirm"
    refused = rebalancer.step()
    assert refused["verdict"] == "move" and "no slot is free" in refused["not_applied"]
    assert rebalancer.gauges() == {}
    assert (tmp_path / LATEST).exists() and not (tmp_path / BEFORE).exists()
    now[0] = 10.0
    first = rebalancer.step()
    assert first["verdict"] == "move" and "not_applied" not in first, "at once"
    first_to = read_placement(tmp_path / LATEST)

    planner.view = view_of(epoch=2, placement=first_to)
    planner.statistics.start_fresh()
    rebalancer.adopt_view(planner.view)
    for seed in range(3):  # another pattern
        planner.report(shift=1, seed=seed)
    before = (tmp_path / BEFORE).read_text()
    assert "not_applied" in rebalancer.move("by hand", move)
    assert (tmp_path / BEFORE).read_text() == before
    assert read_placement(tmp_path / LATEST) != first_to, "decided, for the next start"
    now[0] = 20.0
    assert rebalancer.step()["verdict"] == "confirm", "the first of this pattern"
    assert rebalancer.step()["reason"].startswith("the last round was 10 s ago"), "begun, not asked"
    gauges = rebalancer.gauges()
    assert gauges["remora_seconds_since_last_rebalance"] == 10.0
    assert "remora_rebalance_achieved_gain_ratio" in gauges, "the move that serves is measured"
    assert loop(planner, tmp_path)[0].gauges() == gauges | {
        "remora_seconds_since_last_rebalance": 0.0
    }, "and so it stands in the log"


def test_a_move_by_hand_that_comes_to_nothing_costs_the_next_one_nothing(tmp_path: Path) -> None:
    """It counted from its beginning, though it failed or was cancelled: the loop cooled down, and
    the move before it was never measured."""
    planner = Direct(view_of())
    planner.report()
    over = threading.Event()
    outcome = {"outcome": "failed", "reason": "it was cancelled"}

    def ends(operation_id: str, _: Placement) -> dict[str, Any]:
        if not operation_id.startswith("by hand"):
            return {"outcome": "done", "ended_s": 0.5}
        assert over.wait(20.0)
        return outcome

    rebalancer, now = loop(planner, tmp_path, ends, cooldown_s=100.0, confirmations=1)
    assert rebalancer.step()["verdict"] == "move"
    first, before = rebalancer.gauges(), (tmp_path / BEFORE).read_text()
    planner.view = view_of(epoch=2, placement=read_placement(tmp_path / LATEST))
    planner.statistics.start_fresh()
    rebalancer.adopt_view(planner.view)
    for seed in range(3):  # another pattern
        planner.report(shift=1, seed=seed)
    now[0] = 200.0
    report = rebalancer.move("by hand", begun)
    assert "not_applied" not in report and (tmp_path / BEFORE).read_text() != before
    assert rebalancer.gauges()["remora_seconds_since_last_rebalance"] == 0.0
    assert rebalancer.step()["verdict"] == "wait", "as long as nobody knows"
    over.set()
    wait_for(lambda: lines(tmp_path)[-1]["kind"] == "failed")
    wait_for(lambda: (tmp_path / BEFORE).read_text() == before)
    assert rebalancer.gauges() == first | {"remora_seconds_since_last_rebalance": 200.0}
    again, _ = loop(planner, tmp_path)
    assert again.gauges() == first, "and so it stands in the log"
    assert rebalancer.step()["verdict"] == "move", "at once"
    assert rebalancer.gauges()["remora_seconds_since_last_rebalance"] == 0.0
    outcome["outcome"] = "done"
    now[0] = 400.0
    assert rebalancer.move("by hand, again", begun)["verdict"] == "move"
    assert rebalancer.gauges()["remora_seconds_since_last_rebalance"] == 0.0


def test_a_first_move_by_hand_that_comes_to_nothing_leaves_nothing_known(tmp_path: Path) -> None:
    planner = Direct(view_of())
    planner.report()
    rebalancer, _ = loop(
        planner, tmp_path, lambda *_: {"outcome": "failed", "reason": "shard-1 died"}
    )
    rebalancer.move("by hand", begun)
    wait_for(lambda: not (tmp_path / BEFORE).exists())
    assert rebalancer.gauges() == {}
    last = rebalancer.status()["last"]
    assert (last["verdict"], last["not_applied"]) == ("move", "shard-1 died")
    assert loop(planner, tmp_path)[0].gauges() == {}


def test_a_cooldown_goes_on_when_a_coordinator_comes_back(tmp_path: Path) -> None:
    """It forgot the last move, and experts moved again at once."""
    planner = Direct(view_of())
    planner.report()
    first, _ = loop(planner, tmp_path, begun, confirmations=1)
    assert first.step()["verdict"] == "move"
    again, now = loop(planner, tmp_path, begun, confirmations=1)
    now[0] = 60.0
    told = again.step()
    assert (told["verdict"], told["reason"]) == ("wait", "the last round was 60 s ago, 40 s to go")
    now[0] = 100.0
    assert again.step()["verdict"] == "move"


def test_a_plan_for_another_view_is_not_applied() -> None:
    """Experts moved while it was made: what it leaves alone would go back to where it was."""
    planner = Direct(view_of())
    planner.report()
    rebalancer, _ = loop(planner, None, begun, confirmations=1)
    plan = planner.plan

    def slow(seed: int, objective: Objective) -> PlanOutcome:
        outcome = plan(seed, objective)
        rebalancer.adopt_view(view_of(epoch=planner.view.epoch + 1))
        return outcome

    planner.plan = slow  # type: ignore[method-assign]
    asked = (rebalancer.propose, rebalancer.step, lambda: rebalancer.move("a", begun))
    for epoch, ask in enumerate(asked, 1):
        planner.view = view_of(epoch=epoch)
        with pytest.raises(ClusterError, match="the view changed while a plan was made"):
            ask()
    rebalancer.adopt_view(planner.view)  # told late
    planner.plan, planner.view = plan, view_of(epoch=4)  # type: ignore[method-assign]
    assert rebalancer.step()["verdict"] == "move"


def test_an_id_that_stands_for_something_else_is_no_round(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A caller that reuses an id was told that its round had been made."""
    planner = Direct(view_of())
    rebalancer, _ = loop(planner, None)
    monkeypatch.setattr(beside, "make_rebalancer", lambda *_, **__: rebalancer)
    with world_operations(tmp_path) as operations:
        asked = beside.Beside(
            parse_config({"model": "m"}), TOKEN, operations, lambda: False,
            operations.runner.running,
        )  # fmt: skip
        spec: Any = None  # of which the rebalancer is made
        asked.serve(spec, object())
        swapped = {"shard-0": ((2, 1), (0, 1)), "shard-1": ((0, 3), (2, 3))}
        operations.request("moved", PlaceAs(swapped))
        moved = operations.wait("moved", 20.0)
        assert asked.rebalance("moved", dry_run=False)["operation"] == moved
        operations.request("up", ScaleTo(3))
        operations.wait("up", 20.0)
        with pytest.raises(OperationIdTakenError, match="'up' is another one: scale, done"):
            asked.rebalance("up", dry_run=False)
        asked.close()
