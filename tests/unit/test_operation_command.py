"""What the command line makes of operations, and what it prints of them."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import pytest
from support.programs import benchmarks_on_path
from support.programs import program as module

from remora.cluster import manage_command
from remora.cluster.cli import main
from remora.cluster.cli import parser as cli_parser
from remora.cluster.manage_command import status_text
from remora.cluster.operation import (
    Drain,
    Operation,
    PlaceAs,
    Restore,
    ScaleTo,
    Target,
)
from remora.cluster.operation_command import body_of, operation_text, run_cancel
from remora.cluster.placement_file import write_placement
from remora.cluster.rebalance_command import run_rebalance
from remora.comm.errors import ClusterError, ConfigError
from remora.comm.view import contiguous_placement


@pytest.mark.parametrize(
    ("arguments", "target", "name"),
    [
        (["scale", "--shards", "3"], ScaleTo(3), None),
        (["scale", "--dense-groups", "1", "--retire", "dense-0"],
         ScaleTo(retire=("dense-0",), dense_groups=1), None),
        (["scale", "demo", "--shards", "2", "--retire", "shard-0", "shard-3"],
         ScaleTo(2, ("shard-0", "shard-3")), "demo"),
        (["drain", "shard-1", "--deployment", "demo"], Drain(("shard-1",)), "demo"),
    ],
)  # fmt: skip
def test_command_lines(arguments: list[str], target: Target, name: str | None) -> None:
    options = cli_parser().parse_args([*arguments, "--operation-id", "one"])
    body = body_of(options)
    assert (body.target, options.name) == (target, name)
    assert body.operation_id == "one"


def test_scale_without_a_number_says_which_flags_there_are() -> None:
    with pytest.raises(ConfigError, match="--shards N, --dense-groups N"):
        body_of(cli_parser().parse_args(["scale", "demo", "--retire", "shard-0"]))


def test_a_placement_file_is_a_target(tmp_path: Path) -> None:
    placement = contiguous_placement(num_experts=4, moe_layers=(1,), shard_uids=("shard-0",))
    write_placement(tmp_path / "p.yaml", placement)
    options = cli_parser().parse_args(["placement", "import", str(tmp_path / "p.yaml")])
    assert body_of(options).target == PlaceAs(placement.slots)
    options = cli_parser().parse_args(["placement", "import", str(tmp_path / "none.yaml")])
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        body_of(options)


def test_without_a_deployment_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scale", "no-such-one", "--shards", "2"]) == 3
    assert "no-such-one" in capsys.readouterr().err


class Dying:
    """A coordinator that dies in the middle of a move."""

    def rebalance(self, operation_id: str, *, dry_run: bool) -> dict[str, Any]:
        if dry_run:
            raise ClusterError("the router has no plan")
        return {"operation": {"operation_id": operation_id}}

    left: BaseException = ClusterError("the coordinator died")

    def over(self, operation_id: str) -> dict[str, Any]:
        raise self.left


def test_a_round_whose_end_is_not_known_says_how_to_ask_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(manage_command, "find_cluster", lambda _: Dying())
    monkeypatch.setattr(manage_command, "connected", lambda _: nullcontext(True))
    options = cli_parser().parse_args(["rebalance", "demo"])
    with pytest.raises(ClusterError, match=r"died \(operation id cli-\w+\)"):
        run_rebalance("demo", None, options)
    monkeypatch.setattr(Dying, "left", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run_rebalance("demo", None, options)
    assert " goes on: " in capsys.readouterr().err, "it is not given up by Ctrl-C"
    options = cli_parser().parse_args(["rebalance", "demo", "--dry-run"])
    with pytest.raises(ClusterError, match=r"no plan$"):
        run_rebalance("demo", None, options)


class Cancelled:
    """A deployment in which an operation runs that somebody cancels."""

    def __init__(self, outcome: Literal["done", "failed"]) -> None:
        self.outcome = outcome
        self.asked: list[str | None] = []

    def cancel(self, operation_id: str | None) -> dict[str, Any]:
        self.asked.append(operation_id)
        return {"operation_id": operation_id or "up"}

    def over(self, operation_id: str) -> dict[str, Any]:
        over = Operation(operation_id=operation_id, target=ScaleTo(40), outcome=self.outcome)
        over.ended_s, over.reason = 1.0, "it was cancelled"
        return over.public()


def test_what_runs_is_cancelled_unless_an_id_is_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def cancel(found: Cancelled, *arguments: str) -> int:
        monkeypatch.setattr(manage_command, "find_cluster", lambda _: found)
        options = cli_parser().parse_args(["cancel", "--deployment", "demo", *arguments])
        return run_cancel("demo", None, options)

    monkeypatch.setattr(manage_command, "connected", lambda _: nullcontext(True))
    found = Cancelled("failed")
    assert (cancel(found), cancel(found, "queued")) == (0, 0)
    assert found.asked == [None, "queued"]
    assert "up: scale failed in 1.0 s, 0 experts loaded (it was cancelled)" in (
        capsys.readouterr().out
    )
    with pytest.raises(ClusterError, match="up was done before"):
        cancel(Cancelled("done"))


def test_operations_for_people() -> None:
    operation = Operation(
        operation_id="up", target=ScaleTo(3), step="copy", round=1, num_rounds=3, begun_s=1.0
    )
    assert operation_text(operation.public()) == "up: scale running, step copy, round 2 of 3"
    operation.outcome, operation.ended_s, operation.moved = "done", 2.5, 12
    operation.safe_to_delete, operation.reason = ("shard-0",), "dense-1 fenced"
    assert operation_text(operation.public()) == (
        "up: scale done in 2.5 s, 12 experts loaded, safe to delete: shard-0 (dense-1 fenced)"
    )
    public: dict[str, Any] = operation.public()
    assert public["kind"] == "scale" and public["safe_to_delete"] == ["shard-0"]
    restore = Operation(operation_id="r", target=Restore(("shard-1",)))
    status = {
        "name": "demo", "phase": "serving", "model": "m", "numerics": "exact", "epoch": 2,
        "members": {},
        "operations": {
            "running": restore.public(), "last": [public], "fenced": ["dense-1"], "lost": [],
        },
    }  # fmt: skip
    text = status_text(status)
    assert "operation r: restore running, step plan" in text and "fenced: dense-1" in text
    assert "lost" not in text


def test_windows_of_the_benchmark() -> None:
    with benchmarks_on_path():
        window = module("live_streams").window
    tokens = [(0.5, 1, None), (1.0, 1, 0.5), (1.5, 2, 0.5), (2.2, 1, 0.7), (9.0, 1, 6.8)]
    found = window(tokens, 1.0, 2.0)
    assert found.tokens_per_s == 3.0
    assert found.gap_max_ms == pytest.approx(700.0), "a gap may end shortly after"
