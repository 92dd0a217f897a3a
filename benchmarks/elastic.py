"""Operations under streams: what users feel while shards come and go and experts move.

    .venv/bin/python benchmarks/elastic.py --quick

A real Ray cluster on this machine serves the demo model in `exact` numerics to streams that never
stop. Per operation (2 -> 4 -> 3 -> 2 shards, then every expert to the other shard, then a dense
group more and one less): seconds to serving and to done, experts copied, and tokens/s, 99th
percentile of gaps between a stream's tokens and the longest gap, during the operation and in a
window just before it. Every request's tokens are compared with those of its prompt before any
operation. What chance does to windows so short is told by windows as long in which nothing happens,
just before each operation. At the end the deployment is stopped and started with four shards, which
is what scaling up without elasticity costs. Last, deployments keep warm standbys, two of shards and
one of a dense group, and scale up once more.
"""

import asyncio
import gc
import itertools
import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import common
from engines_report import Bar, Spread
from live_streams import (
    AFTER_S,
    NUM_EXPERTS,
    NUM_LAYERS,
    Streams,
    Window,
    deployment,
    flowing,
    one_node,
    operate,
)

from remora.cluster.bootstrap import ClusterHandle, cluster_status, ensure_cluster, stop_cluster
from remora.cluster.config import RemoraConfig
from remora.cluster.operation import PlaceAs, ScaleTo, Target

NAME = "bench-elastic"
NUM_NEW = 128
JOINERS = 2  # shards of a scale-up
WARM_S, LOOK_S = 300.0, 0.5  # for standbys to start


def halves(first: str, second: str) -> PlaceAs:
    """Half of the experts of every layer in each of two shards."""
    half = NUM_EXPERTS // 2
    low, high = tuple(range(half)), tuple(range(half, NUM_EXPERTS))
    return PlaceAs({first: (low,) * NUM_LAYERS, second: (high,) * NUM_LAYERS})


COLD: list[tuple[str, Target]] = [
    ("settle", halves("shard-0", "shard-1")),
    ("2 to 4", ScaleTo(4)),
    ("4 to 3", ScaleTo(3)),
    ("3 to 2", ScaleTo(2)),
    ("halves", halves("shard-0", "shard-1")),
    ("turned", halves("shard-1", "shard-0")),
    ("dense added", ScaleTo(dense_groups=2)),
    ("dense retired", ScaleTo(dense_groups=1)),
]
WARM: list[tuple[str, Target]] = [
    ("settle", halves("shard-0", "shard-1")),
    ("2 to 4 warm", ScaleTo(4)),
]
WARM_DENSE: list[tuple[str, Target]] = [  # 0.2 s, some 20 tokens of a stream: more of them
    ("dense added warm", ScaleTo(dense_groups=2)),
    ("alone again", ScaleTo(dense_groups=1)),
]
PREPARING = ("settle", "halves", "alone again")  # these only make the next one what it is


async def operations(
    config: RemoraConfig,
    handle: ClusterHandle,
    steps: list[tuple[str, Target]],
    pause_s: float,
    rounds: int,
    ready: Callable[[], bool] = lambda: True,
) -> tuple[list[Any], Streams]:
    """A row for each operation, begun once it is `ready`, and what the streams have seen."""
    rows = []
    async with flowing(config, handle, num_new=NUM_NEW) as streams:
        for number, (name, target) in itertools.product(range(rounds), steps):
            await asyncio.to_thread(_until, ready)
            paused_s = time.perf_counter()
            await asyncio.sleep(pause_s)
            begin_s = time.perf_counter()
            found = await operate(handle, f"{name}-{number}", target)
            end_s = time.perf_counter()
            await asyncio.sleep(AFTER_S)
            paired = streams.window(paused_s, begin_s)
            during = streams.window(begin_s, end_s)
            calm = streams.window(begin_s - min(end_s - begin_s, pause_s), begin_s)
            if name not in PREPARING:
                rows.append(_row(name, found, paired, during, calm))
    return rows, streams


def _row(
    name: str, found: dict[str, Any], paired: Window, during: Window, calm: Window
) -> dict[str, Any]:
    return {
        "operation": name,
        "serving_s": round(found["serving_s"], 2),
        "done_s": round(found["ended_s"], 2),
        "experts": found["moved"],
        "tokens_per_s": round(paired.tokens_per_s, 1),
        "during": round(during.tokens_per_s, 1),
        "throughput_ratio": round(during.tokens_per_s / paired.tokens_per_s, 3),
        "calm_ratio": round(calm.tokens_per_s / paired.tokens_per_s, 3),
        "gap_p99_ms": round(paired.gap_p99_ms, 1),
        "p99_during_ms": round(during.gap_p99_ms, 1),
        "gap_max_ms": round(paired.gap_max_ms, 1),
        "max_during_ms": round(during.gap_max_ms, 1),
        "gap_ratio": round(during.gap_max_ms / paired.gap_max_ms, 2),
    }


def warm_scale_up(pause_s: float, rounds: int) -> tuple[list[Any], Streams]:
    """Rows of a deployment of its own, whose standbys are warm before each operation.

    Args:
        rounds: of a dense group more.
    """
    config = deployment(NAME, elastic={"warm_standby": JOINERS, "warm_dense": 1})
    handle = ensure_cluster(config)
    try:
        _until(_are_warm)
        rows, streams = asyncio.run(operations(config, handle, WARM, pause_s, 1, _are_warm))
        more, seen = asyncio.run(operations(config, handle, WARM_DENSE, pause_s, rounds, _are_warm))
        streams.add(seen)
        return rows + more, streams
    finally:
        stop_cluster(NAME)


def _until(ready: Callable[[], bool]) -> None:
    until_s = time.monotonic() + WARM_S
    while not ready():
        if time.monotonic() > until_s:
            raise RuntimeError(f"standbys are not warm after {WARM_S:g} s")
        time.sleep(LOOK_S)


def _are_warm() -> bool:
    status = cluster_status(NAME)
    return status["standbys"]["warm"] == JOINERS and status["warm_dense"]["warm"] == 1


def main(args: Namespace) -> None:
    """Measure, print, write."""
    config = deployment(NAME)
    with one_node(8):
        handle = ensure_cluster(config)
        gc.freeze()  # a full pass over what is imported would be a gap of our own making
        try:
            pause_s, rounds = (4.0, 1) if args.quick else (10.0, 3)
            rows, streams = asyncio.run(operations(config, handle, COLD, pause_s, rounds))
            begin_s = time.perf_counter()
        finally:
            stop_cluster(NAME)
        ensure_cluster(deployment(NAME, shards=4))
        cold_s = time.perf_counter() - begin_s
        stop_cluster(NAME)
        for _ in range(rounds):
            more, seen = warm_scale_up(pause_s, rounds)
            rows += more
            streams.add(seen)
    for failure in streams.failed:
        print(f"FAILED {failure}")
    print(f"{streams.num_done} requests of {NUM_NEW} tokens; stop and start with 4: {cold_s:.1f} s")
    common.finish("elastic", args, rows, bars(rows, streams, cold_s))


def bars(rows: list[dict[str, Any]], streams: Streams, cold_s: float) -> list[Bar]:
    """The issue's, over all operations: worst ones are the range of a spread."""

    def of(key: str) -> Spread:
        return Spread.of([row[key] for row in rows])

    def serving(operation: str) -> Spread:
        return Spread.of([row["serving_s"] for row in rows if row["operation"] == operation])

    up, warm = serving("2 to 4"), serving("2 to 4 warm")
    ratio = Spread.of([cold_s / s for s in (up.median, up.max, up.min)])
    identical = float(streams.num_different == 0 and streams.num_done > 0)
    failed = float(len(streams.failed))
    during, calm = _by_operation(rows, "throughput_ratio"), _by_operation(rows, "calm_ratio")
    gap = Spread.of([max(row["gap_ratio"] for row in rows)])
    return [
        Bar(name="failed_requests", value=Spread.of([failed]), unit="", op="<=", target=0.0),
        Bar(name="identical_tokens", value=Spread.of([identical]), unit="", op=">=", target=1.0),
        Bar(name="throughput_during_ratio", value=during, unit="x", op=">=", target=0.85),
        Bar(name="throughput_during_ratio_calm", value=calm, unit="x"),
        Bar(name="throughput_during_ratio_all", value=of("throughput_ratio"), unit="x"),
        Bar(name="longest_gap_ratio", value=gap, unit="x", op="<=", target=2.0),
        Bar(name="longest_gap_ratio_all", value=of("gap_ratio"), unit="x"),
        Bar(name="scale_up_s_cold", value=up, unit="s"),
        Bar(name="scale_up_s_warm", value=warm, unit="s", op="<=", target=3.0),
        Bar(name="dense_up_s_cold", value=serving("dense added"), unit="s"),
        Bar(name="dense_up_s_warm", value=serving("dense added warm"), unit="s"),
        Bar(name="scale_up_vs_cold_restart", value=ratio, unit="x"),
    ]


def _by_operation(rows: list[dict[str, Any]], key: str) -> Spread:
    """The rounds of the operation whose median is the least."""
    of: dict[str, list[float]] = {}
    for row in rows:
        of.setdefault(row["operation"], []).append(row[key])
    return min((Spread.of(values) for values in of.values()), key=lambda spread: spread.median)


if __name__ == "__main__":
    main(common.parser(__doc__).parse_args())
