"""The first processes of a deployment: begun before its model is known, told what to be afterwards.

To look at a model takes `transformers` and seconds of a core. Every process that is to serve it
does that anyway, all side by side; the coordinator goes by what the first of them sees, and imports
neither `transformers` nor torch's compiler.
"""

from collections.abc import Callable
from typing import Any

import ray

from remora.actors.dense_process import DenseProcess
from remora.actors.launch import actor_name
from remora.actors.shard_process import ShardProcess
from remora.cluster.config import RemoraConfig
from remora.cluster.launch import (
    FIRST_INCARNATION,
    dense_options,
    first_groups,
    first_shards,
    shard_options,
)


def begin_processes(
    config: RemoraConfig, created: Callable[[str, Any, dict[str, Any]], None]
) -> dict[str, Any]:
    """Have processes start and look at the model; `join` and `start` tell each what to hold.

    Dense groups come first, as they have most to do. The ranks of one that has several wait for
    their places, and so for the model (`rank_plans`).

    Args:
        created: is told uid, handle and Ray options of each.

    Returns:
        By uid, what will be a `ModelSpec` without its `config`.
    """
    looks: dict[str, Any] = {}
    kinds: list[tuple[str, Any, dict[str, Any]]] = []
    if config.dense.tensor_parallel == 1:
        kinds += [(uid, DenseProcess, dense_options(config)) for uid in first_groups(config)]
    kinds += [(uid, ShardProcess, shard_options(config)) for uid in first_shards(config)]
    for uid, kind, options in kinds:
        name = actor_name(config.name, uid, FIRST_INCARNATION)
        handle: Any = ray.remote(kind).options(name=name, **options).remote()
        created(uid, handle, options)
        looks[uid] = handle.warm_up.remote(config.model, idle=False)
    return looks
