"""The actors of the dense groups: their ranks, where Ray places them, and in which order they come.

A group of one rank is one actor. One of several has a placement group of its own, a bundle for each
rank, packed on as few nodes as can be: ranks of one host share memory. Rank 0 is `dense-0`, where
ingresses connect; the others are `dense-0.1`, `dense-0.2`, ...
"""

from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from remora.actors.dense_actor import DenseActor, DenseLaunch
from remora.actors.model_spec import ModelSpec
from remora.actors.tp_actor import RankActor
from remora.cluster.config import RemoraConfig
from remora.cluster.launch import dense_launch, dense_options

STRATEGY = "PACK"


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPlan:
    """One rank that is to be created."""

    uid: str
    group: str  # uid of its rank 0
    actor_class: type[DenseActor] | type[RankActor]
    launch: DenseLaunch
    options: dict[str, Any]


def rank_plans(config: RemoraConfig, group: int, spec: ModelSpec, token: bytes) -> list[RankPlan]:
    """The ranks of one dense group, rank 0 first; with several, in a placement group made here.

    Raises:
        ConfigError: as `dense_launch`.
    """
    uid, num_ranks = f"dense-{group}", config.dense.tensor_parallel
    uids = [uid, *(f"{uid}.{rank}" for rank in range(1, num_ranks))]
    launches = [
        dense_launch(config, name, spec, token, rank=rank) for rank, name in enumerate(uids)
    ]
    options = [dense_options(config) for _ in uids]
    bundle = bundle_of(options[0])
    if num_ranks > 1 and bundle:
        labels = options[0].get("label_selector")
        placement_group = ray.util.placement_group(
            [bundle] * num_ranks,
            strategy=STRATEGY,
            name=placement_group_name(config, uid),
            lifetime="detached",
            bundle_label_selector=[labels] * num_ranks if labels else None,
        )
        for rank, own in enumerate(options):
            own.pop("label_selector", None)
            own["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                placement_group, placement_group_bundle_index=rank
            )
    return [
        RankPlan(
            uid=name,
            group=uid,
            actor_class=RankActor if rank else DenseActor,
            launch=launches[rank],
            options=options[rank],
        )
        for rank, name in enumerate(uids)
    ]


def bundle_of(options: dict[str, Any]) -> dict[str, float]:
    """What one rank asks of Ray, as a bundle of a placement group."""
    amounts = {"CPU": options["num_cpus"], "GPU": options["num_gpus"]}
    amounts |= options.get("resources", {})
    return {name: amount for name, amount in amounts.items() if amount > 0}


def placement_group_name(config: RemoraConfig, uid: str) -> str:
    """Ray name of the placement group of the dense group `uid`."""
    return f"remora/{config.name}/{uid}"


def start_ranks(handles: dict[str, Any], plans: list[RankPlan]) -> dict[str, Any]:
    """Have ranks load and meet; what `start` of each will give, by uid."""
    endpoints = {
        plan.group: handles[plan.group].listen.remote()
        for plan in plans
        if plan.actor_class is RankActor
    }
    pending = {}
    for plan in plans:
        start = handles[plan.uid].start
        is_first = plan.actor_class is DenseActor
        pending[plan.uid] = start.remote() if is_first else start.remote(endpoints[plan.group])
    return pending


def remove_placement_groups(plans: list[RankPlan]) -> None:
    """Give back what ranks had been placed in."""
    removed = set()
    for plan in plans:
        strategy = plan.options.get("scheduling_strategy")
        if strategy is not None and plan.group not in removed:
            removed.add(plan.group)
            ray.util.remove_placement_group(strategy.placement_group)
