"""The actors of the dense groups: their ranks, where Ray places them, and in which order they come.

A group of one rank is one actor. One of several has a placement group of its own, a bundle for each
rank, packed on as few nodes as can be: ranks of one host share memory. Rank 0 is `dense-0`, where
ingresses connect; the others are `dense-0.1`, `dense-0.2`, ... A group lives and dies as a whole:
its ranks share an incarnation, and when one of them ends all are started anew.
"""

from dataclasses import dataclass
from typing import Any

import msgspec
import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from remora.actors.dense_launch import DenseLaunch
from remora.actors.dense_process import DenseProcess
from remora.actors.launch import actor_name
from remora.actors.model_spec import ModelSpec
from remora.cluster.config import RemoraConfig
from remora.cluster.launch import dense_launch, dense_options
from remora.cluster.ray_calls import make_member

STRATEGY = "PACK"


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPlan:
    """One rank that is to be created."""

    uid: str
    group: str  # uid of its rank 0
    launch: DenseLaunch
    options: dict[str, Any]


def rank_plans(
    config: RemoraConfig, uid: str, spec: ModelSpec, token: bytes, *, incarnation: int
) -> list[RankPlan]:
    """The ranks of dense group `uid`, rank 0 first; with several, in a placement group made here.

    Raises:
        ConfigError: as `dense_launch`.
    """
    uids = rank_uids(config, uid)
    num_ranks = len(uids)
    launches = [
        msgspec.structs.replace(
            dense_launch(config, name, spec, token, rank=rank), incarnation=incarnation
        )
        for rank, name in enumerate(uids)
    ]
    options = [dense_options(config) for _ in uids]
    bundle = bundle_of(options[0])
    if num_ranks > 1 and bundle:
        labels = options[0].get("label_selector")
        placement_group = ray.util.placement_group(
            [bundle] * num_ranks,
            strategy=STRATEGY,
            name=_placement_group_name(config, uid, incarnation),
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


def rank_uids(config: RemoraConfig, uid: str) -> list[str]:
    """The ranks of dense group `uid`, rank 0 first."""
    return [uid, *(f"{uid}.{rank}" for rank in range(1, config.dense.tensor_parallel))]


def create_rank(config: RemoraConfig, plan: RankPlan) -> Any:
    """The actor of one rank, which does nothing yet."""
    name = actor_name(config.name, plan.uid, plan.launch.incarnation)
    kind: Any = DenseProcess
    if plan.launch.rank:
        from remora.actors.tp_actor import RankActor  # with it comes torch's compiler

        kind = RankActor
    return make_member(kind, name, plan.options, plan.launch)


def _placement_group_name(config: RemoraConfig, uid: str, incarnation: int) -> str:
    """Ray name of the placement group of one life of the dense group `uid`."""
    return f"remora/{config.name}/{uid}#{incarnation}"


def start_ranks(handles: dict[str, Any], plans: list[RankPlan]) -> dict[str, Any]:
    """Have ranks load and meet; what `start` of each will give, by uid."""
    endpoints = {
        plan.group: handles[plan.group].listen.remote() for plan in plans if plan.launch.rank
    }
    pending = {}
    for plan in plans:
        start = handles[plan.uid].start
        told = endpoints[plan.group] if plan.launch.rank else plan.launch
        pending[plan.uid] = start.remote(told)
    return pending


def remove_placement_group(config: RemoraConfig, uid: str, incarnation: int) -> None:
    """Give back what the ranks of one life of a dense group had been placed in."""
    if config.dense.tensor_parallel == 1:
        return
    try:
        found = ray.util.get_placement_group(_placement_group_name(config, uid, incarnation))
    except ValueError:  # it asked for nothing, or is given back
        return
    ray.util.remove_placement_group(found)


def remove_placement_groups(config: RemoraConfig) -> None:
    """Give back what any dense group of the deployment has been placed in."""
    if config.dense.tensor_parallel == 1:
        return
    for entry in ray.util.placement_group_table().values():
        if entry["name"].startswith(_placement_group_name(config, "dense-", 0).rpartition("#")[0]):
            uid, _, incarnation = entry["name"].rpartition("/")[2].partition("#")
            remove_placement_group(config, uid, int(incarnation))
