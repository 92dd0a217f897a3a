"""Commands that only ask a cluster import nothing of what serves: seconds before their answer."""

from pathlib import Path

from support.imports import HEAVY, imported_at_once
from support.light_commands import COSTLY, run_commands

from remora.cluster.placement_file import write_placement
from remora.comm.view import contiguous_placement

NOBODY = ("--ray-address", "127.0.0.1:1")  # nothing listens there
ANSWERS = (  # modules of what a coordinator or a dense group answers with, or has Ray import
    "remora.actors.dense_process",
    "remora.actors.trace_recorder",
    "remora.cluster.coordinator_process",
)


def test_who_only_asks_imports_nothing_that_serves(tmp_path: Path) -> None:
    """`placement export` and `trace record` took 2 s of torch before they asked."""
    file = tmp_path / "placement.yaml"
    placement = contiguous_placement(
        num_experts=4, moe_layers=(0, 1), shard_uids=("shard-0",), slots=4
    )
    write_placement(file, placement)
    trace = str(tmp_path / "trace")
    ask = [
        ("status", "one"),
        ("stop", "one"),
        ("scale", "one", "--shards", "3"),
        ("drain", "shard-0", "--deployment", "one"),
        ("cancel", "--deployment", "one"),
        ("rebalance", "one"),
        ("placement", "import", str(file), "--deployment", "one"),
        ("placement", "export", str(file), "--deployment", "one"),
        ("trace", "record", "--deployment", "one", "-o", trace),
    ]
    alone = [("placement", "check", str(file)), ("trace", "info", trace), ("status",)]
    environment = {"REMORA_RUNTIME_DIR": str(tmp_path)}
    found = run_commands([*alone, *((*command, *NOBODY) for command in ask)], environment)
    for command, done in zip([*alone, *ask], found, strict=True):
        assert done["costly"] == [], command
        if command in ask:
            assert done["status"] == 1 and "no Ray cluster answers" in done["said"], command
    assert [done["status"] for done in found[: len(alone)]] == [0, 2, 3]


def test_neither_do_answers() -> None:
    """Ray imports the class of an actor in whoever gets its handle."""
    for module in ANSWERS:
        assert not imported_at_once(module) & {*COSTLY, *HEAVY} - {"numpy"}, module
    heavy = imported_at_once("remora.cluster.coordinator") | imported_at_once(
        "remora.actors.dense_actor"
    )
    assert {"torch", "numba"} <= heavy, "the walk would see them"
