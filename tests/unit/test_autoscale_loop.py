"""The autoscaler over the real state machine of operations: what it asks for, its log, replay."""

import json
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from support.autoscaling import policy_of, sample_of
from support.operations import HeldOperations, world_operations

from remora.autoscale.autoscale_sample import AutoscaleState
from remora.autoscale.autoscaler import decide
from remora.autoscale.decision_lines import Replay, replay
from remora.autoscale.ingress_load import GroupLoad, IngressLoad, LatencyBins
from remora.cluster import autoscale_loop
from remora.cluster.autoscale_command import autoscale_lines
from remora.cluster.autoscale_log import OLDER_MAX, AutoscaleLog
from remora.cluster.autoscale_loop import ACTION, Autoscaler
from remora.cluster.cli import main
from remora.cluster.manage_command import status_text
from remora.cluster.operation import ScaleTo
from remora.comm.errors import ClusterError


class Loop:
    """An autoscaler by hand: time passes when a test says so."""

    def __init__(self, operations: HeldOperations, folder: Path, **sections: Any) -> None:
        self.now_s = 1_000.0
        self.operations = operations
        policy = policy_of(**sections)
        self.scaler = Autoscaler(
            policy,
            sample_every_s=5.0,
            operations=operations,
            running=operations.runner.running,
            view=operations.view,
            log=AutoscaleLog(folder, policy),
            wall=lambda: self.now_s,
        )
        self.bins = LatencyBins()
        self.arrived = 0

    def pass_by(self, num_samples: int, *, waiting: int, ttft_s: float = 0.1) -> list[Any]:
        """So many samples, 5 s apart, of an ingress under some load."""
        made = []
        for _ in range(num_samples):
            self.now_s += 5.0
            self.arrived += 10
            self.bins.observe(ttft_s)
            hot = {"shard-0": 1.8, "shard-1": 0.2}
            groups = {"dense-0": GroupLoad(waiting=waiting, kv_used=1, kv_total=10, shard_load=hot)}
            self.scaler.report(
                IngressLoad(
                    source="a", arrived=self.arrived, accepted=self.arrived,
                    prompt_tokens=10 * self.arrived, ended=self.arrived,
                    generated_tokens=10 * self.arrived, ttft=dict(self.bins.counts), itl={},
                    groups=groups,
                )
            )  # fmt: skip
            made.append(self.scaler.step())
        return made


@contextmanager
def looping(folder: Path, **sections: Any) -> Iterator[Loop]:
    with world_operations(folder / "log") as operations:
        loop = Loop(operations, folder, **sections)
        try:
            yield loop
        finally:
            loop.scaler.close()


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "autoscale.jsonl").read_text().splitlines()]


def replayed(path: Path) -> Replay:
    with path.open() as lines:
        return replay(lines, source=path.name)


def shards(loop: Loop) -> int:
    return len(loop.operations.view().placement.slots)


def test_a_rising_load_scales_up_once_and_the_log_replays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with looping(tmp_path) as loop:
        assert {d.verdict for d in loop.pass_by(8, waiting=1)} == {"keep"}
        loop.operations.holds = True
        made = loop.pass_by(8, waiting=30)
        [up] = [d for d in made if d.verdict == "scale"]
        assert (up.units, up.target_units, up.effect) == (2, 3, "act")
        after = made[made.index(up) + 1 :]
        assert after and {d.verdict for d in after} == {"wait"}, "an operation runs"
        [operation] = loop.operations.runner.status()["last"]
        assert operation["operation_id"].startswith("autoscale-scale-")
        loop.operations.release()
        loop.operations.wait(operation["operation_id"], 20.0)
        assert shards(loop) == 3
        assert {d.verdict for d in loop.pass_by(4, waiting=1)} == {"keep"}
        status = loop.scaler.status()
        assert status["decided"] == {"up": 1, "down": 0, "rebalance": 0}
        assert status["action"]["outcome"] == "done", "it was running when it was asked for"
        gauges = loop.scaler.gauges()
        assert (gauges["remora_autoscale_units"], gauges["remora_autoscale_up"]) == (3.0, 1.0)
    kinds = [line["kind"] for line in logged(tmp_path)]
    assert kinds[0] == "autoscale_start" and kinds.count(ACTION) == 2
    assert kinds.count("autoscale_decision") == 20
    assert main(["autoscale", "replay", status["log"]]) == 0
    assert "20 decisions, 0 differ" in capsys.readouterr().out
    shown = {"name": "d", "phase": "serving", "model": "m", "numerics": "fast", "epoch": 2,
             "members": {}, "autoscale": status}  # fmt: skip
    text = status_text(shown)
    assert "autoscale  experts, mode act: keep 3 -> 3 units" in text
    assert f"{operation['operation_id']}: done" in text


def test_a_pool_of_dense_groups_is_scaled_by_its_own_number(tmp_path: Path) -> None:
    with looping(tmp_path, pool="dense") as loop:
        units = sum(m.role == "dense" for m in loop.operations.view().members)
        loop.operations.holds = True
        made = loop.pass_by(8, waiting=30)
        [up] = [d for d in made if d.verdict == "scale"]
        assert (up.units, up.target_units) == (units, 3)
        [operation] = loop.operations.runner.status()["last"]
        assert operation["target"]["dense_groups"] == 3
        assert operation["target"]["shards"] is None


def test_what_finds_no_room_keeps_no_operator_waiting(tmp_path: Path) -> None:
    """A policy may allow more units than there is room for, and asks again and again."""
    with looping(tmp_path) as loop:
        loop.operations.holds = True  # nobody starts
        loop.pass_by(8, waiting=30)
        asked = loop.scaler.status()["action"]
        assert asked["outcome"] == "running"
        begun = loop.operations.request("mine", ScaleTo(1))
        assert begun["outcome"] == "running"
        loop.operations.release()
        assert loop.operations.wait("mine", 20.0)["outcome"] == "done"
        loop.pass_by(1, waiting=1)
        action = loop.scaler.status()["action"]
        assert (action["outcome"], action["reason"]) == ("failed", "it gives way to 'mine'")


@pytest.mark.parametrize("mode", ["observe", "advise"])
def test_other_modes_change_nothing(tmp_path: Path, mode: str) -> None:
    with looping(tmp_path, mode=mode) as loop:
        made = loop.pass_by(8, waiting=30)
        assert [d.effect for d in made if d.verdict == "scale"] == [
            {"observe": "none", "advise": "advise"}[mode]
        ]
        assert "request" not in loop.operations.asked and shards(loop) == 2
        assert made[-1].verdict == "wait", "its cooldown"
        text = "\n".join(autoscale_lines(loop.scaler.status()))
        [scale] = [n for n, d in enumerate(made) if d.verdict == "scale"]
        at = datetime.fromtimestamp(1_000.0 + 5.0 * (scale + 1), UTC).isoformat()
        told = f"advice of {at}: scale 2 -> 3 units (queue at 1.50 of its target)"
        assert (told in text) == (mode == "advise"), text


def test_an_imbalance_is_rebalanced_and_that_is_waited_for(tmp_path: Path) -> None:
    targets = {"imbalance": 1.2, "queue_per_unit": 10}
    with looping(tmp_path, targets=targets) as loop:
        planning = loop.operations.hold_rebalance()
        made = loop.pass_by(6, waiting=1)
        [first] = [d for d in made if d.verdict == "rebalance"]
        after = made[made.index(first) + 1 :]
        assert after and {d.verdict for d in after} == {"wait"}
        assert all("autoscale-rebalance-" in d.reason for d in after)
        planning.set()
        loop.operations.rebalanced.wait(20)
        operation_id = loop.operations.runner.status()["last"][-1]["operation_id"]
        assert operation_id.startswith("autoscale-rebalance-")
        loop.operations.wait(operation_id, 20.0)
        assert shards(loop) == 2
        loop.pass_by(1, waiting=1)
        assert loop.scaler.status()["action"]["outcome"] == "done"
    noted = [line["outcome"] for line in logged(tmp_path) if line["kind"] == ACTION]
    assert noted == ["running", "done"], "begun, and its end"
    assert replayed(tmp_path / "autoscale.jsonl").num_differences == 0


def test_a_round_that_cannot_move_is_told_with_its_reason(tmp_path: Path) -> None:
    with looping(tmp_path, targets={"imbalance": 1.2}) as loop:
        loop.operations.no_move = "shard-1 has no slot"
        made = loop.pass_by(5, waiting=1)
        assert [d.verdict for d in made].count("rebalance") == 1
        assert loop.operations.rebalanced.wait(20)
        while loop.scaler.status()["action"] is None:
            loop.pass_by(1, waiting=1)
        action = loop.scaler.status()["action"]
        assert (action["outcome"], action["reason"]) == ("refused", "shard-1 has no slot")


def test_the_next_life_of_a_coordinator_keeps_cooldowns_and_the_load_so_far(
    tmp_path: Path,
) -> None:
    """A pool that had just grown would grow again, and the season of a forecast be lost."""
    predictive = {"load_per_unit": 1e6, "step_s": 5, "horizon_s": 10, "season_s": 50}
    how: dict[str, Any] = {"predictive": predictive, "mode": "advise"}
    with looping(tmp_path, **how) as loop:
        [up] = [d for d in loop.pass_by(8, waiting=30) if d.verdict == "scale"]
        assert up.target_units == 3
    with (tmp_path / "autoscale.jsonl").open("a") as log:
        log.write('{"kind": "autoscale_deci')  # it died while it wrote
    with world_operations(tmp_path / "again") as operations:
        again = Loop(operations, tmp_path, **(how | {"mode": "observe"}))
        again.now_s = loop.now_s
        first = again.pass_by(1, waiting=30)[0]
        assert first.verdict == "wait" and "cooldown" in first.reason
        again.scaler.close()
        again.scaler._note("late", "done", "")
    lines = logged(tmp_path)
    assert len(lines[0]["state"]["series"]["means"]) == 7, "of 8 samples; the first has no load"
    assert [line["kind"] for line in lines[1:]] == ["autoscale_decision"], "nothing after its end"
    assert replayed(tmp_path / "autoscale.jsonl").num_differences == 0
    with world_operations(tmp_path / "other") as operations:
        other = Loop(operations, tmp_path, mode="advise")
        other.now_s = again.now_s
        assert other.pass_by(3, waiting=30)[-1].verdict == "scale", "of another policy: nothing"
        other.scaler.close()
    (tmp_path / "autoscale.jsonl").write_text("{\n{}\n")
    assert AutoscaleLog(tmp_path, policy_of()).recalled() == AutoscaleState(), "or of a damaged log"


def test_what_is_refused_is_told_and_not_asked_again_at_once(tmp_path: Path) -> None:
    with looping(tmp_path) as loop:
        loop.pass_by(2, waiting=30)
        loop.operations.fails = ClusterError("the disk is full")
        made = loop.pass_by(6, waiting=30)
        assert [d.verdict for d in made].count("scale") == 1
        assert loop.scaler.status()["action"]["reason"] == "the disk is full"
        assert [line["reason"] for line in logged(tmp_path) if line["kind"] == ACTION] == [
            "the disk is full"
        ]


def answers_meanwhile(loop: Loop, asked: list[Any]) -> None:
    """What `status` and `gauges` say while a decision is being made or logged; nothing for 5 s."""
    other = threading.Thread(
        target=lambda: asked.append([loop.scaler.status(), loop.scaler.gauges()]), daemon=True
    )
    other.start()
    other.join(5.0)


def test_nobody_waits_for_a_decision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forecast may take seconds: the calls of ingresses and operators do not wait for it."""
    asked: list[Any] = []

    def slow(*given: Any) -> Any:
        answers_meanwhile(loop, asked)
        return decide(*given)

    with looping(tmp_path) as loop:
        monkeypatch.setattr(autoscale_loop, "decide", slow)
        loop.pass_by(2, waiting=1)
        assert len(asked) == 2, "they had an answer before there was a decision"
        assert asked[0][1] == {} and asked[1][0]["last"]["verdict"] == "keep"


@pytest.mark.parametrize("line", ["decided", "noted"])
def test_nobody_waits_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    asked: list[Any] = []
    write = getattr(AutoscaleLog, line)

    def slow(*given: Any) -> None:
        answers_meanwhile(loop, asked)
        write(*given)

    with looping(tmp_path) as loop:
        monkeypatch.setattr(AutoscaleLog, line, slow)
        loop.operations.fails = ClusterError("no")
        loop.pass_by(3 if line == "noted" else 1, waiting=30)
        assert len(asked) == 1, "they had an answer while it was being written"


def test_without_an_ingress_nothing_is_known_and_nothing_done(tmp_path: Path) -> None:
    with looping(tmp_path) as loop:
        loop.pass_by(3, waiting=1)
        for _ in range(60):
            loop.now_s += 5.0
            assert loop.scaler.step().verdict == "keep"
        assert shards(loop) == 2


def filled(folder: Path, until: Callable[[int], bool], bytes_max: int) -> AutoscaleLog:
    policy = policy_of()
    log, state, number = AutoscaleLog(folder, policy, bytes_max=bytes_max), AutoscaleState(), 0
    while until(number):
        number += 1
        sample = sample_of(5.0 * number, waiting=40 if number % 40 > 30 else 0)
        decision, after = decide(policy, state, sample)
        log.decided(state, sample, decision)
        log.noted(ACTION, {"reason": "x"}, after)
        state = after
    log.close()
    return log


def test_the_log_is_bounded_and_every_file_of_it_replays(tmp_path: Path) -> None:
    filled(tmp_path, lambda number: number < 400, bytes_max=40_000)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 1 + OLDER_MAX
    numbers = []
    for path in files:
        assert path.stat().st_size <= 40_000 + 20_000, "a start line comes on top"
        found = replayed(path)
        assert found.num_differences == 0
        numbers.append(found.decisions)
    assert sum(numbers) < 400 and min(numbers[:-1]) > 10
    filled(tmp_path, lambda number: number < 3, bytes_max=40_000)
    assert replayed(tmp_path / "autoscale.jsonl").decisions == 3, "a new life, a new file"
    assert len(list(tmp_path.iterdir())) == 1 + OLDER_MAX


def test_a_disk_that_takes_nothing_costs_lines_and_no_decisions(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    log = filled(tmp_path / "file" / "folder", lambda number: number < 2, bytes_max=1000)
    assert not log.path.exists() and "a decision is not logged" in caplog.text


def test_a_full_disk_costs_no_line_that_was_written_before(tmp_path: Path) -> None:
    filled(tmp_path, lambda number: number < 400, bytes_max=40_000)
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # files can be made, and take nothing
    try:
        filled(tmp_path, lambda number: number < 10, bytes_max=40_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    after = {path.name: path.read_text() for path in tmp_path.glob("*.jsonl*")}
    assert {name: text for name, text in after.items() if text} == before
    filled(tmp_path, lambda number: number < 3, bytes_max=40_000)
    assert replayed(tmp_path / "autoscale.jsonl").decisions == 3, "there is room again"
    assert len(list(tmp_path.iterdir())) == 1 + OLDER_MAX


def test_a_file_that_a_full_disk_ended_replays_up_to_there(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # a line is written in part
    try:
        filled(tmp_path, lambda number: number < 40, bytes_max=40_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    ended = [path for path in tmp_path.glob("*.jsonl.*") if not path.read_text().endswith("\n")]
    assert ended, "or the disk was not full in the middle of a line"
    for path in ended:
        assert replayed(path).cut_off is not None
