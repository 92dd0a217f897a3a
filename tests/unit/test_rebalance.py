"""The online loop over real statistics and the real planner: decided, written, logged, measured."""

import itertools
import json
import threading
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from support.rebalance_rig import LAYERS, Direct, begun, lines, loop, no_room
from support.router_rig import TOKEN, channel_to, running_router, view_of, wait_for
from support.router_traffic import encoded, paired_tokens

from remora.actors.plan_outcome import PlanOutcome
from remora.autoscale.rebalance import RebalancePolicy, objective_of
from remora.cluster.cli import main
from remora.cluster.config import parse_config
from remora.cluster.decision_log import DecisionLog
from remora.cluster.placement_file import read_placement
from remora.cluster.rebalance_report import mixed_placement, moves_between, report_text
from remora.cluster.rebalancer import BEFORE, LATEST
from remora.comm import router_pb2
from remora.comm.errors import ClusterError, ConfigError
from remora.comm.grpc_base import unary_call
from remora.comm.objective import Objective
from remora.comm.router_grpc import PLAN, REPORT, credentials_of, placement_from_message
from remora.comm.trace import TraceHeader, TraceWriter, make_trace
from remora.comm.view import Placement


def test_a_pattern_is_found_written_and_measured_after_the_next_start(tmp_path: Path) -> None:
    planner = Direct(view_of())
    rebalancer, now = loop(planner, tmp_path, begun)
    with pytest.raises(ClusterError, match="0 tokens were reported"):
        rebalancer.step()
    planner.report()
    first = rebalancer.step()
    assert first["verdict"] == "confirm" and not (tmp_path / LATEST).exists()
    assert rebalancer.gauges() == {}
    second = rebalancer.step()
    assert second["verdict"] == "move" and second["written"] == str(tmp_path / LATEST)
    assert second["copies_after"] < 0.75 * second["copies_before"]
    assert second["load_after"] < second["load_before"] + 0.05
    placement = read_placement(tmp_path / LATEST)
    assert read_placement(tmp_path / BEFORE) == planner.view.placement
    for first_expert in range(4):  # what is picked together lies together
        holders = {
            uid
            for uid, layers in placement.slots.items()
            if {first_expert, first_expert + 4} <= set(layers[0])
        }
        assert len(holders) == 1
    assert len(second["moves"]) == second["moved_experts"] == 8, "two of four, on each shard"
    now[0] = 50.0
    status = rebalancer.status()
    assert status["gauges"] == rebalancer.gauges()
    assert (status["last"]["verdict"], status["last"]["age_s"]) == ("move", 50.0)
    assert "moves" not in status["last"]
    assert rebalancer.gauges() == {
        "remora_seconds_since_last_rebalance": 50.0,
        "remora_rebalance_predicted_gain_ratio": second["predicted_gain_ratio"],
    }

    served = Direct(view_of(epoch=1, placement=placement))  # the next start
    again, now = loop(served, tmp_path)
    assert again.gauges()["remora_rebalance_predicted_gain_ratio"] > 0
    served.report(tokens=200)
    assert again.step()["verdict"] == "wait"
    assert "remora_rebalance_achieved_gain_ratio" not in again.gauges(), "too little came yet"
    served.report(seed=1)
    assert again.step()["verdict"] == "keep", "nothing is left to gain"
    achieved = again.gauges()["remora_rebalance_achieved_gain_ratio"]
    assert achieved == pytest.approx(second["predicted_gain_ratio"], abs=0.05)
    kinds = [(line["kind"], line.get("verdict")) for line in lines(tmp_path)]
    assert kinds == [
        ("decision", "confirm"),
        ("decision", "move"),
        ("decision", "wait"),
        ("achieved", None),
        ("decision", "keep"),
    ]
    assert lines(tmp_path)[3]["achieved_gain_ratio"] == achieved
    third, _ = loop(served, tmp_path)
    assert third.gauges()["remora_rebalance_achieved_gain_ratio"] == achieved, "it is remembered"


def test_what_was_predicted_and_does_not_come_shows(tmp_path: Path) -> None:
    """The traffic turns after the move: the achieved gain says so, whatever was promised."""
    planner = Direct(view_of())
    planner.report()
    rebalancer, _ = loop(planner, tmp_path, begun, confirmations=1)
    predicted = rebalancer.step()["predicted_gain_ratio"]
    served = Direct(view_of(placement=read_placement(tmp_path / LATEST)))
    served.report(shift=1, seed=5)
    again, _ = loop(served, tmp_path)
    again.step()
    assert again.gauges()["remora_rebalance_achieved_gain_ratio"] < predicted - 0.2


def test_a_dry_run_writes_and_remembers_nothing(tmp_path: Path) -> None:
    planner = Direct(view_of())
    planner.report()
    rebalancer, _ = loop(planner, tmp_path)
    reports = [rebalancer.propose() for _ in range(3)]
    assert {report["verdict"] for report in reports} == {"confirm"}
    assert reports[0] == reports[1], "the same statistics give the same plan"
    assert list(tmp_path.iterdir()) == []
    text = report_text(reports[0])
    assert "remote copies a token and layer" in text and "expert" in text


def test_by_hand_it_moves_at_once_or_says_why_not(tmp_path: Path) -> None:
    planner = Direct(view_of())
    planner.report()
    report = loop(planner, None)[0].move("a", no_room)
    assert "no slot is free" in report["not_applied"] and "written" not in report
    report = loop(planner, tmp_path)[0].move("b", no_room)
    assert "not applied: no slot is free" in report_text(report)
    assert report["verdict"] == "move" and (tmp_path / LATEST).exists()
    served = Direct(view_of(placement=read_placement(tmp_path / LATEST)))
    served.report()
    assert loop(served, tmp_path / "other")[0].move("c", no_room)["verdict"] == "keep"
    assert not (tmp_path / "other" / LATEST).exists()


def test_a_folder_that_cannot_be_made_is_said_and_ends_no_loop(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    planner = Direct(view_of())
    planner.report()
    rebalancer, _ = loop(planner, tmp_path / "file" / "state", confirmations=1)
    with pytest.raises(ConfigError, match=r"router\.state_dir .* cannot be made"):
        loop(planner, tmp_path / "file" / "state")[0].move("a", no_room)
    rounds, tried = itertools.count(), threading.Event()
    plan = planner.plan

    def counted(seed: int, objective: Objective) -> PlanOutcome:
        if next(rounds) >= 2:
            tried.set()
        return plan(seed, objective)

    planner.plan = counted  # type: ignore[method-assign]
    rebalancer.start(0.01)
    assert tried.wait(60), "rounds go on after one that failed"
    rebalancer.close()
    assert "a round of rebalancing failed" in caplog.text


def test_what_is_decided_serves_at_once_and_is_measured_on_traffic_since(tmp_path: Path) -> None:
    planner = Direct(view_of())
    planner.report()
    asked = []

    def move(operation_id: str, placement: Placement) -> dict[str, Any]:
        asked.append(operation_id)
        if len(asked) == 1:
            return {"outcome": "failed", "reason": "shard-1 died"}
        planner.view = view_of(epoch=2, placement=placement)
        planner.statistics.start_fresh()
        rebalancer.adopt_view(planner.view)
        return {"outcome": "done", "ended_s": 0.5}

    rebalancer, _ = loop(planner, tmp_path, move, cooldown_s=0.0)
    assert rebalancer.move("a", move)["not_applied"] == "shard-1 died"
    report = rebalancer.move("b", move)
    assert report["applied_epoch"] == 2 and "not_applied" not in report
    assert "done in 0.5 s: it serves since epoch 2" in report_text(report)
    assert asked == ["a", "b"]
    rebalancer.step()
    assert "remora_rebalance_achieved_gain_ratio" not in rebalancer.gauges(), "nothing came yet"
    planner.report(seed=1)
    assert rebalancer.step()["verdict"] == "keep"
    achieved = rebalancer.gauges()["remora_rebalance_achieved_gain_ratio"]
    assert achieved == pytest.approx(report["predicted_gain_ratio"], abs=0.05)


def test_what_a_move_by_hand_achieved_is_measured_where_there_are_no_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is the default: the log would never hear of it."""
    monkeypatch.setattr("remora.cluster.rebalancer.MEASURE_EVERY_S", 0.01)
    planner = Direct(view_of())
    planner.report()
    rebalancer, _ = loop(planner, tmp_path)
    report = rebalancer.move("a", begun)
    planner.view = view_of(epoch=2, placement=read_placement(tmp_path / LATEST))
    planner.statistics.start_fresh()
    rebalancer.adopt_view(planner.view)
    planner.report(seed=1)
    rebalancer.start(None)
    wait_for(lambda: len(lines(tmp_path)) > 1)
    rebalancer.close()
    decided, achieved = lines(tmp_path)
    assert (decided["verdict"], achieved["kind"]) == ("move", "achieved")
    gain = achieved["achieved_gain_ratio"]
    assert gain == pytest.approx(report["predicted_gain_ratio"], abs=0.05)
    assert rebalancer.gauges()["remora_rebalance_achieved_gain_ratio"] == gain


def test_a_round_changes_whole_layers_and_bounds_its_moves(tmp_path: Path) -> None:
    planner = Direct(view_of())
    planner.report()
    rebalancer, _ = loop(planner, tmp_path, moves_max=4, confirmations=1)
    report = rebalancer.step()
    assert report["moved_experts"] == 4 and len(report["layers"]) == 1
    placement = read_placement(tmp_path / LATEST)
    [layer] = report["layers"]
    untouched = 1 - LAYERS.index(layer)
    for uid, layers in placement.slots.items():
        assert layers[untouched] == planner.view.placement.slots[uid][untouched]


def test_mixed_placements_and_moves() -> None:
    old = view_of().placement
    turned = {"shard-0": old.slots["shard-1"], "shard-1": old.slots["shard-0"]}
    new = Placement(num_experts=8, moe_layers=LAYERS, slots=turned)
    mixed = mixed_placement(old, new, (2,))
    assert mixed.slots["shard-0"] == (old.slots["shard-0"][0], new.slots["shard-0"][1])
    moves = moves_between(old, mixed)
    assert {(m.layer, m.expert, m.to_shard, m.from_shards) for m in moves} == {
        (2, e, f"shard-{1 - e // 4}", (f"shard-{e // 4}",)) for e in range(8)
    }


def test_the_decision_log_is_bounded_and_rotated(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path, bytes_max=500)
    for number in range(40):
        log.append("decision", {"number": number}, 1_700_000_000.0 + number)
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes.keys() == {"decisions.jsonl", "decisions.jsonl.1"}
    assert max(sizes.values()) <= 500
    numbers = [line["number"] for line in log.lines()]
    assert numbers == list(range(numbers[0], 40)) and len(numbers) >= 6
    assert next(iter(log.lines()))["time"].startswith("2023-11-14T22:13:")
    with log.path.open("a") as file:
        file.write('{"kind": "dec')
    assert [line["number"] for line in log.lines()] == numbers, "a cut line is left out"
    log.append("decision", {"number": 40}, 1_700_000_040.0)
    assert [line["number"] for line in log.lines()][-2:] == [39, 40], "and no more than that"


def test_reports_and_plans_over_grpc() -> None:
    view = view_of()
    with running_router(view) as server, channel_to(server) as channel:
        report, plan = unary_call(channel, REPORT), unary_call(channel, PLAN)
        known = {"timeout": 60.0, "metadata": credentials_of(TOKEN)}
        for number, source in enumerate(("a", "b")):
            ids = paired_tokens(len(LAYERS), 2000, seed=number)
            report(
                router_pb2.ReportRequest(
                    group=f"dense-{number}",
                    incarnation=1,
                    num_running=3,
                    sketch=encoded(ids, source, LAYERS),
                ),
                **known,
            )
        status = server.status()
        assert status["groups"] == {"dense-0": 3, "dense-1": 3}
        assert status["statistics"]["tokens"] == pytest.approx(4000)
        answer = plan(router_pb2.PlanRequest(seed=3), **known)
        assert answer.epoch == 1 and answer.copies_after < 0.75 * answer.copies_before
        assert answer.moved_experts == 8
        found = placement_from_message(answer.placement)
        found.check()
        assert len(moves_between(view.placement, found)) == 8
        dear = plan(router_pb2.PlanRequest(seed=3, move_rows=1e9), **known)
        assert dear.moved_experts == 0 and dear.copies_after == dear.copies_before
        for wrong in ({"move_rows": -1.0}, {"horizon_tokens": float("nan")}):
            with pytest.raises(grpc.RpcError) as refused:
                plan(router_pb2.PlanRequest(**wrong), **known)
            assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_plans_and_decisions_price_a_move_alike() -> None:
    """Statistics of 4,000 tokens: eight moves save 1.2 copies a token."""
    planner = Direct(view_of())
    planner.report()
    for horizon_tokens, moved in ((50.0, 0), (1e6, 8)):
        rebalancer, _ = loop(planner, None, horizon_tokens=horizon_tokens)
        assert rebalancer.propose()["moved_experts"] == moved
        policy = RebalancePolicy(horizon_tokens=horizon_tokens)
        objective = objective_of(policy, expert_bytes=1000, row_bytes=64)
        assert planner.asked == objective
        assert planner.plan(0, objective).moved_experts == moved


def test_a_trace_is_planned_from_without_a_cluster(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], small_model: Path
) -> None:
    trace = tmp_path / "t.trace"
    num_experts, layers = _shape(small_model)
    ids = paired_tokens(len(layers), 3000, num_experts=num_experts).astype(np.int16)
    header = TraceHeader(
        model=str(small_model), num_experts=num_experts, top_k=2, moe_layers=layers
    )
    with TraceWriter(trace, header) as writer:
        writer.append(
            make_trace(header, experts_LTK=ids, request_T=np.arange(3000, dtype=np.int32) // 50)
        )
    asked = ["rebalance", "--trace", str(trace), "--hosts", "2", "--json"]
    assert main([*asked, "--dry-run"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["verdict"] == "move" and report["copies_after"] < report["copies_before"]
    assert len(report["moves"]) == report["moved_experts"] > 0
    assert main(asked) == 2
    assert "--output" in capsys.readouterr().out
    out = tmp_path / "new.yaml"
    assert main([*asked[:-1], "--output", str(out)]) == 0
    told = capsys.readouterr().out
    assert f"start with --placement {out}, or remora placement import {out}" in told
    assert "latest" not in told, "a trace's file is in nobody's state_dir"
    assert main([*asked, "--placement", str(out), "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "keep", "nothing is left to gain"
    assert main([*asked, "--dry-run", "--slots", "1"]) == 2
    assert "--slots 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--output", "new.yaml"], "--output: of use with --trace alone"),
        (["--dry-run", "--hosts", "4", "--slots", "9"], "--hosts, --slots: of use with --trace"),
        (["--trace", "t", "--dry-run", "prod"], "NAME: no deployment is asked"),
        (["--trace", "t", "--output", "o", "--operation-id", "a"], "--operation-id: no deployment"),
        (["--trace", "t", "--output", "o", "--dry-run"], "--output: --dry-run writes nothing"),
    ],
)
def test_an_option_that_would_be_dropped_is_refused(
    arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who forgot --trace wants a file, and not that experts move."""
    assert main(["rebalance", *arguments]) == 2
    assert word in capsys.readouterr().err


def test_a_trace_is_checked_against_model_and_placement(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], small_model: Path
) -> None:
    num_experts, layers = _shape(small_model)

    def asked(layers: tuple[int, ...], num_tokens: int, *arguments: str) -> tuple[int, str]:
        header = TraceHeader(
            model=str(small_model), num_experts=num_experts, top_k=2, moe_layers=layers
        )
        ids = paired_tokens(len(layers), num_tokens, num_experts=num_experts).astype(np.int16)
        with TraceWriter(tmp_path / "t", header, overwrite=True) as writer:
            requests_T = np.arange(num_tokens, dtype=np.int32)
            writer.append(make_trace(header, experts_LTK=ids, request_T=requests_T))
        status = main(["rebalance", "--trace", str(tmp_path / "t"), "--dry-run", *arguments])
        said = capsys.readouterr()
        return status, said.out + said.err

    assert asked(layers, 0) == (2, "remora: --trace: no tokens are in it to plan from\n")
    status, said = asked((*layers, 99), 300)
    assert status == 2 and f"{num_experts} in {len(layers) + 1}" in said
    assert asked(layers, 300, "--slots", "0")[0] == 2
    assert "--model: '/else', no folder" in asked(layers, 300, "--model", "/else")[1]
    all_on_one = [list(range(num_experts)) for _ in layers]
    one = {"num_experts": num_experts, "moe_layers": layers, "slots": {"shard-0": all_on_one}}
    (tmp_path / "one.yaml").write_text(json.dumps(one))
    known = ("--placement", str(tmp_path / "one.yaml"), "--slots", str(num_experts))
    status, said = asked(layers, 300, *known)
    assert status == 0 and "-> shard-1" in said, "a shard that is not named holds nothing"


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from support.checkpoints import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3_moe")


def _shape(model: Path) -> tuple[int, tuple[int, ...]]:
    from remora.actors.model_spec import inspect_model

    spec = inspect_model(model)
    return spec.num_experts, spec.moe_layers


def test_latest_wants_a_place_to_lie(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"router\.state_dir must say"):
        parse_config({"model": "m", "experts": {"placement": "latest"}})
    config = parse_config(
        {
            "model": "m",
            "experts": {"placement": "latest"},
            "router": {"state_dir": str(tmp_path), "rebalance": {"gain_min": 0.1}},
        }
    )
    assert parse_config(config.to_args()) == config
    assert RebalancePolicy(**config.router.rebalance.model_dump()).gain_min == 0.1
