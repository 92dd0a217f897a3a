"""A shard whose experts nobody else serves is killed: another one takes over, and gives it back."""

import asyncio
import signal
from typing import Any

import pytest

from remora.cluster.bootstrap import ClusterHandle, cluster_status, ensure_cluster, stop_cluster
from remora.cluster.config import RemoraConfig

pytestmark = pytest.mark.long

NAME = "copies"
EACH = 16 * 8  # experts that one of two shards serves, over all layers
MIB = 16  # enough for as many second copies


def test_shards_take_over_from_one_that_dies(live: Any) -> None:
    config = live.deployment(NAME, experts={"slots": None}, elastic={"dram_copies_mib": MIB})
    handle = ensure_cluster(config)
    try:
        asyncio.run(dies(live, config, handle))
    finally:
        stop_cluster(NAME)
    assert live.living(NAME) == set()


async def until_copied(live: Any) -> None:
    """Every shard has a second copy of what the other one serves."""

    async def are_there() -> bool:
        members = (await asyncio.to_thread(cluster_status, NAME))["members"]
        shards = [m for uid, m in members.items() if uid.startswith("shard-")]
        return len(shards) == 2 and all(m.get("second_copies") == EACH for m in shards)

    await live.until(are_there)


async def dies(live: Any, config: RemoraConfig, handle: ClusterHandle) -> None:
    before = handle.view()
    assert all(len(experts) == 16 for experts in before.placement.slots["shard-0"])
    await until_copied(live)
    async with live.flowing(config, handle) as streams:
        [victim] = [m for m in before.members if m.uid == "shard-0"]
        await live.strike(victim.actor_name, signal.SIGKILL)
        taken = await live.over(handle, "take-over-shard-0.1")
        assert (taken["outcome"], taken["moved"]) == ("done", EACH)
        await streams.one_more()
        assert (await live.over(handle, "restore-shard-0.2"))["outcome"] == "done"
        await streams.one_more()
        after = handle.view()
        assert after.placement == before.placement and after.epoch == before.epoch + 2
        await until_copied(live)
        members = (await asyncio.to_thread(cluster_status, NAME))["members"]
        assert members["shard-1"]["experts_adopted"] == EACH, "no byte moved"
        assert members["shard-0"]["experts_loaded"] == 0, "nothing came from the checkpoint"
    assert streams.failed == [] and streams.num_different == 0 and streams.num_done > 0
