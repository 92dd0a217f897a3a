"""From a data plane that is up to a service connected to it: what an ingress starts with."""

import asyncio
import logging
import uuid
from collections.abc import Mapping
from pathlib import Path

from remora.actors.launch import host_label
from remora.actors.model_spec import inspect_model
from remora.actors.tokenizer import Tokenizer
from remora.autoscale.ingress_load import GroupLoad, LoadTotals
from remora.cluster.bootstrap import ClusterHandle
from remora.cluster.config import RemoraConfig
from remora.cluster.engine_client import EngineClient
from remora.cluster.metrics import IngressMetrics
from remora.cluster.model_source import local_checkpoint
from remora.cluster.request_plan import ModelInfo
from remora.cluster.router_client import RouterClient
from remora.cluster.service import Service, fingerprint_of, make_service
from remora.comm.errors import ClusterError, first_line
from remora.comm.messages import EngineStats, Traffic
from remora.comm.view import Member

logger = logging.getLogger(__name__)

GAUGES_EVERY_S = 10.0


async def connected_service(config: RemoraConfig, cluster: ClusterHandle) -> Service:
    """A service over a data plane that is up.

    Raises:
        ClusterError: no dense group can be reached.
    """

    async def members() -> list[Member]:
        return await asyncio.to_thread(cluster.dense_members)

    async def router_address() -> str | None:
        return await asyncio.to_thread(cluster.router_address)

    router = None
    if config.router.enabled:
        timeout_s = config.router.route_timeout_s
        router = RouterClient(router_address, token=cluster.token, timeout_s=timeout_s)
    engine = EngineClient(
        members,
        token=cluster.token,
        self_host=host_label(),
        router=router,
        hold_s=config.elastic.hold_s,
    )
    await engine.start()
    model = await asyncio.to_thread(_model_info, config)
    tokenizer = await asyncio.to_thread(Tokenizer, config.model)
    service = make_service(
        config, model=model, tokenizer=tokenizer, engine=engine, operations=cluster
    )
    metrics = service.serving.metrics
    every_s = GAUGES_EVERY_S
    if config.autoscale.policy is not None:
        metrics.load = LoadTotals()
        every_s = config.autoscale.sample_every_s
    service.watch = asyncio.ensure_future(_exchange(cluster, engine, metrics, every_s))
    return service


async def _exchange(
    cluster: ClusterHandle, engine: EngineClient, metrics: IngressMetrics, every_s: float
) -> None:
    """Tell the coordinator of the load, and take what it knows of its loops for `/metrics`."""
    source = uuid.uuid4().hex
    while True:
        load = None
        if metrics.load is not None:
            load = metrics.load.told(source, group_loads(engine.stats(), engine.traffic()))
        try:
            metrics.coordinator = await asyncio.to_thread(cluster.exchange, load)
        except Exception as error:  # it is gone or failed: what was known gets old, and is left out
            odd = not isinstance(error, ClusterError)
            logger.info("no figures of the coordinator: %s", first_line(error), exc_info=odd)
            metrics.coordinator = {}
        await asyncio.sleep(every_s)


def group_loads(
    stats: Mapping[str, EngineStats], traffic: Mapping[str, Traffic]
) -> dict[str, GroupLoad]:
    """Dense groups as this ingress knows them, for the autoscaler."""
    return {
        uid: GroupLoad(
            waiting=one.num_waiting,
            kv_used=one.kv_blocks_used,
            kv_total=one.kv_blocks_total,
            shard_load={p.uid: p.load_ratio for p in traffic[uid].peers} if uid in traffic else {},
        )
        for uid, one in stats.items()
    }


def _model_info(config: RemoraConfig) -> ModelInfo:
    path = local_checkpoint(config.model)
    spec = inspect_model(path)
    return ModelInfo(
        id=config.model_id,
        root=config.model,
        created_unix_s=int((Path(path) / "config.json").stat().st_mtime),
        max_model_len=config.dense.max_model_len or spec.max_positions,
        vocab_size=spec.vocab_size,
        fingerprint=fingerprint_of(config),
    )
