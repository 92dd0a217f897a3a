"""What `remora status` prints for people."""

from pathlib import Path
from typing import Any

import pytest
import ray
from support.operations import world_operations

from remora.cluster import members
from remora.cluster.manage_command import status_text
from remora.cluster.operation import PlaceAs, ScaleTo
from remora.cluster.restore_tries import RESTORES_MAX

SHARD: dict[str, Any] = {
    "alive": True,
    "phase": "ready",
    "incarnation": 1,
    "weights_bytes": 12 << 20,
    "experts_per_layer": [16, 17],
    "calls_served": 153,
    "compute_s": 0.5,
    "peers": 1,
}
DENSE: dict[str, Any] = {
    "alive": True,
    "phase": "ready",
    "incarnation": 1,
    "why_not_serving": None,
    "fingerprint": "mode=fast",
    "step_s": 2.0,
    "num_running": 3,
    "num_waiting": 4,
    "kv_blocks_used": 5,
    "kv_blocks_total": 64,
    "steps_total": 20,
    "preemptions_total": 1,
    "executor": "compiled",
    "shards_connected": ["shard-0"],
}


def text(**members: dict[str, Any]) -> str:
    status = {
        "name": "demo",
        "phase": "serving",
        "model": "/models/demo",
        "numerics": "fast",
        "epoch": 1,
        "members": {uid.replace("_", "-"): member for uid, member in members.items()},
    }
    return status_text(status)


def test_each_member_has_a_line_of_its_role() -> None:
    lines = text(shard_0=SHARD, dense_0=DENSE).splitlines()
    assert lines[-2].split()[:3] == ["dense-0", "ready", "compiled,"]
    assert "3 running, 4 waiting, KV 5 of 64 blocks" in lines[-2]
    eager = DENSE | {"executor": "eager", "why_eager": "no C++ compiler found"}
    assert "eager (no C++ compiler found), 3 running" in text(dense_0=eager)
    assert lines[-1].split()[:2] == ["shard-0", "ready"]
    assert "16-17 experts in each of 2 layers (12.0 MiB), 153 calls" in lines[-1]
    more = SHARD | {"second_copies": 9, "second_copies_bytes": 3 << 20}
    assert "layers (12.0 MiB), 9 second copies (3.0 MiB), 153 calls" in text(shard_0=more)


def test_what_is_wrong_comes_first() -> None:
    dead = {"alive": False, "error": "The actor died"}
    stuck = DENSE | {"why_not_serving": "shard-1 cannot be reached"}
    lines = text(shard_1=dead, dense_0=stuck).splitlines()
    assert lines[-2].split(maxsplit=2) == ["dense-0", "degraded", "shard-1 cannot be reached"]
    assert lines[-1].split(maxsplit=2) == ["shard-1", "dead", "The actor died"]


def test_what_starts_is_neither_dead_nor_degraded() -> None:
    loads = SHARD | {"phase": "loading", "calls_served": 0}
    stuck = DENSE | {"phase": "compiling", "why_not_serving": "starting"}
    lines = text(shard_1={"alive": True, "phase": "starting"}, shard_0=loads, dense_0=stuck)
    assert [line.split() for line in lines.splitlines()[-3:]] == [
        ["dense-0", "compiling"],
        ["shard-0", "loading"],
        ["shard-1", "starting"],
    ]


class Silent:
    """An actor that gives no answer."""

    @property
    def status(self) -> Any:
        return self

    def remote(self) -> None:
        return None


def test_who_waits_for_a_place_is_not_dead(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A shard that joins has no process until Ray has found a place for it."""
    with world_operations(tmp_path) as operations:
        assert operations.runner.joiners() == set()
        operations.holds = True
        operations.request("up", ScaleTo(3))
        assert operations.runner.joiners() == {"shard-2"}
        operations.release()
        operations.wait("up", 20.0)
        assert operations.runner.joiners() == set(), "it is a member"

    def late(pending: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        return {uid: ray.exceptions.GetTimeoutError("late") for uid in pending}

    monkeypatch.setattr(members, "answers_within", late)
    told = members.status_of({"shard-0": Silent(), "shard-2": Silent()}, {"shard-2": "1 CPU"})
    lines = text(shard_0=told["shard-0"], shard_2=told["shard-2"]).splitlines()
    assert lines[-2].split(maxsplit=2) == ["shard-0", "dead", "it does not answer"]
    assert lines[-1].split(maxsplit=2)[:2] == ["shard-2", "starting"]
    assert "waits for a place (asks for 1 CPU)" in lines[-1]


def test_it_tells_how_many_experts_the_next_death_would_take(tmp_path: Path) -> None:
    with world_operations(tmp_path) as operations:
        runner = operations.runner
        assert runner.replicas_alive() == {"none": 0, "one": 8, "several": 0}
        runner.request("more", PlaceAs({"shard-0": ((0, 1, 2), (0, 1)), "shard-1": ((2, 3),) * 2}))
        runner.wait("more", 20.0)
        assert runner.replicas_alive() == {"none": 0, "one": 7, "several": 1}
        operations.holds = True  # it is not restored yet
        runner.lost("shard-1", 1)
        runner.come_round()
        told = runner.status()
    assert told["replicas"] == {"none": 3, "one": 5, "several": 0}
    status = {"name": "d", "phase": "serving", "model": "m", "numerics": "fast", "epoch": 2}
    lines = status_text(status | {"members": {}, "operations": told}).splitlines()
    assert "  experts of all layers: 3 lost, 5 with one replica, 0 with more" in lines


def test_who_is_away_is_missed_and_who_is_given_up_is_told(tmp_path: Path) -> None:
    """A shard that others had taken over from was neither a member nor lost: nothing said that it
    was to come back, or that it was not tried any more."""
    with world_operations(tmp_path) as operations:
        state = operations.runner._state
        state.former = dict(state.view.placement.slots) | {"shard-2": ((0,), (0,))}
        told = operations.runner.status()
        assert (told["lost"], told["given_up"]) == (["shard-2"], [])
        for _ in range(RESTORES_MAX):
            state._restores.failed("shard-2", 0.0)
        told = operations.runner.status()
    status = {"name": "d", "phase": "serving", "model": "m", "numerics": "fast", "epoch": 2}
    lines = status_text(status | {"members": {}, "operations": told}).splitlines()
    assert lines[-2:] == ["  lost: shard-2", "  not restored any more, scale or drain: shard-2"]


ROUTER: dict[str, Any] = {
    "alive": True,
    "address": "127.0.0.1:5000",
    "calls": {"Route": 9, "Report": 7, "Plan": 2},
    "routed": {"flows": 8, "sequences": 12, "alone": 3},
    "statistics": {"reports": 7, "tokens": 5000.0, "domains": 1, "labels": [], "shared_labels": []},
    "rebalance": {"last": None, "gauges": {}},
}


def router_text(router: dict[str, Any] | None) -> list[str]:
    status = {"name": "d", "phase": "serving", "model": "m", "numerics": "fast", "epoch": 1}
    return status_text(status | {"members": {}, "router": router}).splitlines()[2:]


def test_the_router_says_what_it_did_and_what_it_knows() -> None:
    lines = router_text(ROUTER)
    assert lines[0].split(maxsplit=2)[:2] == ["router", "ready"]
    assert lines[0].endswith("12 sequences routed, 3 by ingresses alone, 7 reports")
    assert lines[1].strip() == "knows 5000 tokens of 1 domain"
    named = ROUTER | {"statistics": ROUTER["statistics"] | {"domains": 2, "labels": ["a", "law"]}}
    assert router_text(named)[1].strip() == "knows 5000 tokens of 2 domains (named: a, law)"
    shared = named["statistics"] | {"shared_labels": [["a", "law"]]}
    text = router_text(ROUTER | {"statistics": shared})[1]
    assert text.endswith("(named: a, law); as one count a+law")
    nothing = {"reports": 0, "tokens": 0.0}
    silent = ROUTER | {"statistics": nothing}
    restored = ROUTER | {"statistics": ROUTER["statistics"] | {"reports": 0}}
    assert router_text(restored)[1].strip() == "knows 5000 tokens of 1 domain"
    assert len(router_text(silent)) == 1


def test_plans_and_their_gains_are_told() -> None:
    last = {"verdict": "keep", "reason": "too little", "predicted_gain_ratio": 0.012, "age_s": 4.4}
    gauges = {
        "remora_seconds_since_last_rebalance": 90.0,
        "remora_rebalance_predicted_gain_ratio": 0.2,
    }
    lines = router_text(ROUTER | {"rebalance": {"last": last, "gauges": gauges}})
    assert lines[2].strip() == "last plan 4 s ago: keep (too little), predicted gain 1.2%"
    refused = {"last": last | {"not_applied": "no slot is free"}, "gauges": {}}
    assert router_text(ROUTER | {"rebalance": refused})[2].endswith(
        ", not applied: no slot is free"
    )
    assert lines[3].strip().endswith("predicted gain 20.0%, achieved not known yet")
    gauges["remora_rebalance_achieved_gain_ratio"] = 0.15
    lines = router_text(ROUTER | {"rebalance": {"last": None, "gauges": gauges}})
    assert lines[2].strip() == "last move 90 s ago: predicted gain 20.0%, achieved 15.0%"


def test_a_router_that_is_off_or_dead_is_told() -> None:
    assert router_text(None)[0].split()[:2] == ["router", "off"]
    dead = {"alive": False, "error": "The actor died", "rebalance": None}
    assert router_text(dead)[0].split(maxsplit=2)[:2] == ["router", "dead"]
    assert "The actor died" in router_text(dead)[0]
