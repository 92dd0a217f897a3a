"""A dense group joins from a warm standby, and so does its next life, while streams flow."""

import asyncio
import signal
from pathlib import Path
from typing import Any

import pytest

from remora.cluster.bootstrap import ClusterHandle, cluster_status, ensure_cluster, stop_cluster
from remora.cluster.config import RemoraConfig
from remora.cluster.operation import ScaleTo

pytestmark = pytest.mark.long
NAME = "warm-dense"


def test_a_dense_group_and_its_next_life_are_taken_from_standbys(live: Any, tmp_path: Path) -> None:
    config = live.deployment(NAME, elastic={"log_dir": str(tmp_path), "warm_dense": 1})
    handle = ensure_cluster(config)
    try:
        asyncio.run(story(live, config, handle))
    finally:
        stop_cluster(NAME)
    assert live.living(NAME) == set(), "a standby ends with its deployment"


async def story(live: Any, config: RemoraConfig, handle: ClusterHandle) -> None:
    await live.until(is_warm)
    async with live.flowing(config, handle) as streams:
        grown = await live.operate(handle, "more", ScaleTo(dense_groups=2))
        assert grown["joiners"] == {"dense-1": 1}
        first = process_name(handle, "dense-1")
        assert first.startswith(f"remora/{NAME}/standby-")
        await live.until(lambda: both_serve(streams))

        await live.until(is_warm)  # the next one
        await live.strike(first, signal.SIGKILL)
        assert (await live.over(handle, "restore-dense-1.2"))["outcome"] == "done"
        second = process_name(handle, "dense-1")
        assert second.startswith(f"remora/{NAME}/standby-") and second != first
        await live.until(lambda: both_serve(streams))
        await streams.one_more()

        less = await live.operate(handle, "less", ScaleTo(dense_groups=1, retire=("dense-1",)))
        assert less["safe_to_delete"] == ["dense-1"]
        assert second.rpartition("/")[2] not in live.living(NAME)
        await streams.one_more()
    assert streams.failed == [] and streams.num_different == 0 and streams.num_done > 0


async def is_warm() -> bool:
    return bool((await asyncio.to_thread(cluster_status, NAME))["warm_dense"]["warm"] == 1)


def process_name(handle: ClusterHandle, uid: str) -> str:
    """Ray's name of the process that a member is."""
    [name] = [member.actor_name for member in handle.view().members if member.uid == uid]
    return name


async def both_serve(streams: Any) -> bool:
    stats = streams.engine.stats()
    return len(stats) == 2 and all(each.num_running for each in stats.values())
