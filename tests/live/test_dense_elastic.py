"""Dense groups die, come and go, and what hangs is ended, while streams flow over real Ray."""

import asyncio
import functools
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from remora.actors.launch import actor_name, coordinator_name, router_name
from remora.actors.router_lookup import router_address
from remora.cluster.bootstrap import (
    ClusterHandle,
    cluster_status,
    ensure_cluster,
    stop_cluster,
)
from remora.cluster.config import RemoraConfig
from remora.cluster.operation import ScaleTo
from remora.comm.errors import ClusterError
from remora.comm.view import View

NAME = "dense-elastic"
HANG_S = 15.0  # two cores, shared: who gets on is not taken for one that hangs


@pytest.mark.long
def test_streams_flow_while_dense_groups_die_come_and_go(live: Any, tmp_path: Path) -> None:
    config = live.deployment(NAME, elastic={"log_dir": str(tmp_path), "hang_s": HANG_S})
    handle = ensure_cluster(config)
    try:
        asyncio.run(story(live, config, handle))
    finally:
        stop_cluster(NAME)
    assert live.living(NAME) == set()


async def story(live: Any, config: RemoraConfig, handle: ClusterHandle) -> None:
    async with live.flowing(config, handle) as streams:
        await live.strike(actor_name(NAME, "dense-0", 1), signal.SIGKILL)  # the only one
        assert (await live.over(handle, "restore-dense-0.2"))["outcome"] == "done"
        await streams.one_more()
        assert streams.engine.num_replays == live.NUM_STREAMS

        grown = await live.operate(handle, "more", ScaleTo(dense_groups=2))
        assert grown["joiners"] == {"dense-1": 1} and grown["moved"] == 0
        await streams.one_more()
        await live.until(lambda: both_serve(streams))
        await streams.one_more()

        less = await live.operate(handle, "less", ScaleTo(dense_groups=1, retire=("dense-0",)))
        assert less["safe_to_delete"] == ["dense-0"]
        assert not live.living(NAME) & {"dense-0#2"}
        await streams.one_more()
        assert streams.engine.stats().keys() == {"dense-1"}

        begun_s = time.perf_counter()
        pids = [
            await live.strike(actor_name(NAME, "shard-0", 1), signal.SIGSTOP),
            await live.strike(router_name(NAME), signal.SIGSTOP),
        ]
        assert (await live.over(handle, "restore-shard-0.2"))["outcome"] == "done"
        for pid in pids:
            await live.until(functools.partial(gone, pid))
        await live.until(router_answers)
        await streams.one_more()
        gap_s = streams.window(begun_s, time.perf_counter()).gap_max_ms / 1e3
        assert gap_s < HANG_S, "its experts have replicas: nobody waits until it is ended"
        status = await asyncio.to_thread(cluster_status, NAME)
        assert status["health"]["hung_total"] == 2, status["health"]
        last = sorted(status["health"]["last"])
        assert last[0].startswith("router: ") and last[1].startswith("shard-0#1: "), last

        before, begun_s = await asyncio.to_thread(handle.view), time.perf_counter()
        pid = await live.strike(coordinator_name(NAME), signal.SIGSTOP)
        await live.until(lambda: gone(pid))  # dense-1 has ended it
        await live.until(lambda: adopted(handle, before))
        await streams.one_more()
        gap_s = streams.window(begun_s, time.perf_counter()).gap_max_ms / 1e3
        assert gap_s < HANG_S, "streams need no coordinator"
    assert streams.failed == [] and streams.num_different == 0
    assert streams.num_done > 0


async def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


async def router_answers() -> bool:
    return await asyncio.to_thread(router_address, NAME) is not None


async def adopted(handle: ClusterHandle, before: View) -> bool:
    """A coordinator answers, and goes by the view that there was."""
    try:
        return await asyncio.to_thread(handle.view) == before
    except ClusterError:  # Ray is starting it again
        return False


async def both_serve(streams: Any) -> bool:
    return all(stats.num_running for stats in streams.engine.stats().values())
