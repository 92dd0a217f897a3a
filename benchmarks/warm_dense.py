"""Seconds to a dense group more, with and without a warm standby of one.

    .venv/bin/python benchmarks/warm_dense.py --quick

Two deployments of the demo model (2 shards, 1 dense group) on one Ray cluster, one of which keeps a
standby (`elastic.warm_dense`). In turn each is scaled to two dense groups and back; nothing else
runs and no requests flow, so the figure is what a start takes. `serving_s` is until every dense
group has acknowledged the view with the new one.
"""

import time
from argparse import Namespace
from typing import Any, Final

import common
from engines_report import Bar, Spread
from live_streams import deployment, one_node

from remora.cluster.bootstrap import ClusterHandle, cluster_status, ensure_cluster, stop_cluster
from remora.cluster.operation import ScaleTo

KINDS: Final = {"without": 0, "with": 1}  # standbys
WARM_S, LOOK_S = 120.0, 0.2  # for a standby to start


def main(args: Namespace) -> None:
    """Measure, print, write."""
    rounds = 3 if args.quick else 7
    rows = []
    with one_node(8):
        handles: dict[str, ClusterHandle] = {}
        try:
            for kind, standbys in KINDS.items():
                config = deployment(_name(kind), elastic={"warm_dense": standbys})
                handles[kind] = ensure_cluster(config)
            for number in range(rounds):
                order = list(KINDS) if number % 2 else list(reversed(KINDS))
                rows += [added(handles[kind], kind, number) for kind in order]
        finally:
            for kind in handles:
                stop_cluster(_name(kind))
    common.finish("warm_dense", args, rows, bars(rows))


def added(handle: ClusterHandle, kind: str, number: int) -> dict[str, Any]:
    """A row of one dense group more, which is retired again."""
    until_warm()
    up = _done(handle, f"up-{number}", ScaleTo(dense_groups=2))
    [uid] = up["joiners"]
    _done(handle, f"down-{number}", ScaleTo(dense_groups=1, retire=(uid,)))
    return {
        "standby": kind,
        "round": number,
        "serving_s": round(up["serving_s"], 2),
        "done_s": round(up["ended_s"], 2),
    }


def until_warm() -> None:
    """Wait until the standby is there, also before the other deployment's turn: it starts alone.

    Raises:
        RuntimeError: it does not come.
    """
    until_s = time.monotonic() + WARM_S
    while cluster_status(_name("with"))["warm_dense"]["warm"] != KINDS["with"]:
        if time.monotonic() > until_s:
            raise RuntimeError(f"the standby is not warm after {WARM_S:g} s")
        time.sleep(LOOK_S)


def bars(rows: list[dict[str, Any]]) -> list[Bar]:
    """Medians and ranges, and how many times faster."""
    found = {
        kind: Spread.of([row["serving_s"] for row in rows if row["standby"] == kind])
        for kind in KINDS
    }
    ratio = Spread.of([found["without"].median / found["with"].median])
    return [
        Bar(name="dense_up_s_cold", value=found["without"], unit="s"),
        Bar(name="dense_up_s_warm", value=found["with"], unit="s"),
        Bar(name="cold_vs_warm", value=ratio, unit="x", op=">=", target=1.0),
    ]


def _done(handle: ClusterHandle, operation_id: str, target: ScaleTo) -> dict[str, Any]:
    operation = handle.done(operation_id, target)
    if operation["outcome"] != "done":
        raise RuntimeError(f"{operation_id}: {operation['reason']}")
    return operation


def _name(kind: str) -> str:
    return f"bench-{kind}-standby"


if __name__ == "__main__":
    main(common.parser(__doc__).parse_args())
