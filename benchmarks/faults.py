"""The fault matrix, live: what streams feel when a process dies or stops, and how soon it is back.

    .venv/bin/python benchmarks/faults.py --quick

A real Ray cluster on this machine serves the demo model in `exact` numerics from two shards that
hold every expert and one dense group (no other could take its sequences: they wait for its next
life), to streams that never stop. Each cell sends SIGKILL or SIGSTOP to the process of one role and
waits until what was lost is back. Longest gap between a stream's tokens in that time and in a
window just before; seconds until the member (or the coordinator, or the router) is there again;
requests that failed; whether every answer is token for token that of before. SIGSTOP is not taken
back: who hangs is found by its progress and ended (`elastic.hang_s`), a member or the router by the
coordinator, the coordinator by the dense group.

Two more deployments have no replicas: each of two shards serves half of the experts, without and
with second copies of the other half (`elastic.dram_copies_mib`). A shard of each is killed.
"""

import asyncio
import os
import signal
import time
from argparse import Namespace
from typing import Any, Final

import common
from engines_report import Bar, Spread
from live_streams import (
    NUM_EXPERTS,
    NUM_LAYERS,
    Streams,
    deployment,
    flowing,
    one_node,
    over,
    strike,
    until,
)

from remora.actors.launch import coordinator_name, router_name
from remora.actors.router_lookup import router_address
from remora.cluster.bootstrap import ClusterHandle, cluster_status, ensure_cluster, stop_cluster
from remora.cluster.config import RemoraConfig
from remora.comm.errors import ClusterError

NAME: Final = "bench-faults"
HANG_S: Final = 8.0
CALM_S: Final = 4.0  # the window before
ROLES: Final = ("shard", "dense", "coordinator", "router")
ALONE: Final = "shard, no replicas"
COPIED: Final = "shard, second copies"
COPIES_MIB: Final = 16  # of half of the demo model's experts: 12
SIGNALS: Final = (signal.SIGKILL, signal.SIGSTOP)


async def cell(
    handle: ClusterHandle, streams: Streams, role: str, fault: signal.Signals
) -> dict[str, Any]:
    """One row."""
    begin_s = time.perf_counter()
    await asyncio.sleep(CALM_S)
    before = streams.window(begin_s, time.perf_counter())
    failed, done, different = len(streams.failed), streams.num_done, streams.num_different
    replays = streams.engine.num_replays
    begin_s = time.perf_counter()
    await _strike(handle, role, fault)
    back_s = time.perf_counter() - begin_s
    await streams.one_more()
    during = streams.window(begin_s, time.perf_counter())
    return {
        "fault": fault.name,
        "role": role,
        "gap_ms": round(during.gap_max_ms, 1),
        "gap_before_ms": round(before.gap_max_ms, 1),
        "back_s": round(back_s, 2),
        "requests": streams.num_done - done,
        "failed_requests": len(streams.failed) - failed,
        "different": streams.num_different - different,
        "replays": streams.engine.num_replays - replays,
    }


async def _strike(handle: ClusterHandle, role: str, fault: signal.Signals) -> None:
    """Have it happen, and wait until all is as it was."""
    if role in ("shard", "dense"):
        uid = f"{role}-0"
        view = await asyncio.to_thread(handle.view)
        [member] = [m for m in view.members if m.uid == uid]
        await strike(member.actor_name, fault)
        found = await over(handle, f"restore-{uid}.{member.incarnation + 1}")
        if found["outcome"] != "done":
            raise RuntimeError(f"{uid} was not restored: {found['reason']}")
        return
    name = coordinator_name(NAME) if role == "coordinator" else router_name(NAME)
    pid = await strike(name, fault)

    async def gone() -> bool:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        return False

    await until(gone)

    async def answers() -> bool:
        try:
            if role == "router":
                return await asyncio.to_thread(router_address, NAME) is not None
            return bool(await asyncio.to_thread(handle.view))
        except ClusterError:
            return False

    await until(answers)


async def matrix(config: RemoraConfig, handle: ClusterHandle, rounds: int) -> list[dict[str, Any]]:
    """A row for each cell and round."""
    rows = []
    async with flowing(config, handle) as streams:
        for _ in range(rounds):
            for role in ROLES:
                for fault in SIGNALS:
                    rows.append(await cell(handle, streams, role, fault))
                    print(rows[-1], flush=True)
        for failure in streams.failed:
            print(f"FAILED {failure}")
    return rows


async def until_copied(num_experts: int) -> None:
    """Until every shard has so many second copies."""

    async def are_there() -> bool:
        members = (await asyncio.to_thread(cluster_status, NAME))["members"]
        shards = [m for uid, m in members.items() if uid.startswith("shard-")]
        return len(shards) > 1 and all(m.get("second_copies") == num_experts for m in shards)

    await until(are_there)


async def kills(
    config: RemoraConfig, handle: ClusterHandle, rounds: int, name: str, num_copies: int
) -> list[dict[str, Any]]:
    """Rows of a shard that is killed, and whose experts have no replicas."""
    rows = []
    async with flowing(config, handle) as streams:
        for _ in range(rounds):
            await until_copied(num_copies)
            rows.append(await cell(handle, streams, "shard", signal.SIGKILL) | {"role": name})
            print(rows[-1], flush=True)
        for failure in streams.failed:
            print(f"FAILED {failure}")
    return rows


def without_replicas(rounds: int) -> list[dict[str, Any]]:
    """Rows of two deployments of their own."""
    rows = []
    half = NUM_EXPERTS // 2 * NUM_LAYERS
    for name, mib, num_copies in ((ALONE, 0, 0), (COPIED, COPIES_MIB, half)):
        config = deployment(
            NAME, experts={"slots": None}, elastic={"hang_s": HANG_S, "dram_copies_mib": mib}
        )
        handle = ensure_cluster(config)
        try:
            rows += asyncio.run(kills(config, handle, rounds, name, num_copies))
        finally:
            stop_cluster(NAME)
    return rows


def bars(rows: list[dict[str, Any]]) -> list[Bar]:
    """The issue's, over all cells: sums, and worst ones."""

    def of(key: str, role: str, fault: str) -> Spread:
        return Spread.of([r[key] for r in rows if (r["role"], r["fault"]) == (role, fault)])

    failed = Spread.of([float(sum(row["failed_requests"] for row in rows))])
    same = all(row["different"] == 0 and row["requests"] > 0 for row in rows)
    identical = Spread.of([float(same)])
    gap = of("gap_ms", "shard", "SIGKILL")
    return [
        Bar(name="failed_requests", value=failed, unit="", op="<=", target=0.0),
        Bar(name="identical_tokens", value=identical, unit="", op=">=", target=1.0),
        Bar(name="shard_kill_gap_ms", value=gap, unit="ms", op="<=", target=300.0),
        Bar(name="shard_stop_gap_ms", value=of("gap_ms", "shard", "SIGSTOP"), unit="ms"),
        Bar(name="shard_kill_alone_gap_ms", value=of("gap_ms", ALONE, "SIGKILL"), unit="ms"),
        Bar(name="shard_kill_copies_gap_ms", value=of("gap_ms", COPIED, "SIGKILL"), unit="ms"),
        Bar(name="dense_kill_gap_ms", value=of("gap_ms", "dense", "SIGKILL"), unit="ms"),
        Bar(name="dense_kill_back_s", value=of("back_s", "dense", "SIGKILL"), unit="s"),
    ]


def main(args: Namespace) -> None:
    """Measure, print, write."""
    config = deployment(NAME, elastic={"hang_s": HANG_S})
    with one_node(8):
        handle = ensure_cluster(config)
        try:
            rows = asyncio.run(matrix(config, handle, 1 if args.quick else 3))
        finally:
            stop_cluster(NAME)
        rows += without_replicas(1 if args.quick else 3)
    common.finish("faults", args, rows, bars(rows))


if __name__ == "__main__":
    main(common.parser(__doc__).parse_args())
