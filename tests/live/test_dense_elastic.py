"""Dense groups die, come and go, and shards hang, while streams flow over real Ray."""

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

from remora.actors.launch import actor_name
from remora.cluster.bootstrap import (
    ClusterHandle,
    cluster_status,
    ensure_cluster,
    stop_cluster,
)
from remora.cluster.config import RemoraConfig
from remora.cluster.operation import ScaleTo

NAME = "dense-elastic"
HANG_S = 15.0  # two cores, shared: who gets on is not taken for one that hangs


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
        pid = await live.strike(actor_name(NAME, "shard-0", 1), signal.SIGSTOP)
        assert (await live.over(handle, "restore-shard-0.2"))["outcome"] == "done"
        await live.until(lambda: gone(pid))
        await streams.one_more()
        gap_s = streams.window(begun_s, time.perf_counter()).gap_max_ms / 1e3
        assert gap_s < HANG_S, "its experts have replicas: nobody waits until it is ended"
        status = await asyncio.to_thread(cluster_status, NAME)
        assert status["health"]["hung_total"] == 1, status["health"]
        assert "shard-0#1" in status["health"]["last"][0]
    assert streams.failed == [] and streams.num_different == 0
    assert streams.num_done > 0


async def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


async def both_serve(streams: Any) -> bool:
    return all(stats.num_running for stats in streams.engine.stats().values())
