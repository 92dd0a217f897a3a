"""What `/metrics` tells of the router and of rebalancing."""

import asyncio
from typing import Any

import pytest
from support.fake_engine import HOST, TOKEN
from support.serving import DEMO_MODEL, make_engine

from remora.cluster import connect
from remora.cluster.config import parse_config
from remora.cluster.metrics import IngressMetrics


def test_the_router_and_rebalancing_are_told_once_something_is_known() -> None:
    routed = {"router": 0, "alone": 0}
    metrics = IngressMetrics(dict, lambda: routed)
    text = metrics.render().decode()
    assert 'remora_routed_sequences_total{by="router"} 0.0' in text
    assert "remora_rebalance" not in text, "absent before the first move"
    routed["alone"] = 3
    metrics.coordinator = {
        "remora_rebalance_predicted_gain_ratio": 0.25,
        "remora_seconds_since_last_rebalance": 12.0,
    }
    text = metrics.render().decode()
    assert 'remora_routed_sequences_total{by="alone"} 3.0' in text
    assert "remora_rebalance_predicted_gain_ratio 0.25" in text
    assert "remora_seconds_since_last_rebalance 12.0" in text
    assert "achieved" not in text, "not before enough traffic came"


def test_hung_members_are_told_without_a_router_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect, "host_label", lambda: HOST)
    config = parse_config({"model": str(DEMO_MODEL), "router": {"enabled": False}})

    async def told(cluster: Any) -> str:
        service = await connect.connected_service(config, cluster)
        try:
            await asyncio.wait_for(cluster.asked.wait(), 30)
            while not service.serving.metrics.coordinator:
                await asyncio.sleep(0)
            return service.serving.metrics.render().decode()
        finally:
            await service.close()

    with make_engine() as engine:

        class Cluster:
            token = TOKEN

            def __init__(self) -> None:
                self.asked = asyncio.Event()
                self._loop = asyncio.get_running_loop()

            def dense_members(self) -> list[Any]:
                return [engine.member()]

            def exchange(self, load: object) -> dict[str, float]:
                self._loop.call_soon_threadsafe(self.asked.set)
                return {"remora_members_hung": 2.0}

        async def run() -> str:
            return await told(Cluster())

        assert "remora_members_hung 2.0" in asyncio.run(run())
