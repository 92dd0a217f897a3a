"""The first processes of a deployment: begun before its model is known, told what to be afterwards.

To look at a model takes `transformers` and seconds of a core. Every process that is to serve it
does that anyway, all side by side; the coordinator goes by what the first of them sees, and imports
neither `transformers` nor torch's compiler.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from remora.actors.dense_process import DenseProcess
from remora.actors.launch import actor_name
from remora.actors.manifest import Manifest
from remora.actors.model_spec import ModelSpec
from remora.actors.shard_facts import ShardFacts
from remora.actors.shard_process import ShardProcess
from remora.cluster.config import RemoraConfig
from remora.cluster.dense_groups import RankPlan, create_rank, rank_plans, start_ranks
from remora.cluster.launch import (
    FIRST_INCARNATION,
    copies_of,
    dense_options,
    first_groups,
    first_shards,
    shard_launch,
    shard_options,
)
from remora.cluster.members import all_answers
from remora.cluster.ray_calls import make_member
from remora.comm.view import Placement, View

Created = Callable[[str, Any, dict[str, Any]], None]  # is told uid, handle and Ray options of each


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstView:
    """What serves first."""

    view: View
    facts: dict[str, ShardFacts]  # by uid
    manifest: Manifest


def begin_processes(config: RemoraConfig, created: Created) -> dict[str, Any]:
    """Have processes start and look at the model; `join` and `start` tell each what to hold.

    Dense groups come first, as they have most to do. The ranks of one that has several wait for
    their places, and so for the model (`rank_plans`).

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
        handle = make_member(kind, name, options)
        created(uid, handle, options)
        looks[uid] = handle.warm_up.remote(config.model, idle=False)
    return looks


def plan_ranks(
    config: RemoraConfig, spec: ModelSpec, token: bytes, created: Created
) -> list[RankPlan]:
    """Of all dense groups; those that are not begun yet are created."""
    ranks: list[RankPlan] = []
    for uid in first_groups(config):
        ranks += rank_plans(config, uid, spec, token, incarnation=FIRST_INCARNATION)
    for plan in ranks:
        if config.dense.tensor_parallel > 1:
            created(plan.uid, create_rank(config, plan), plan.options)
    return ranks


def connect_all(
    config: RemoraConfig,
    token: bytes,
    spec: ModelSpec,
    placement: Placement,
    ranks: list[RankPlan],
    handles: Mapping[str, Any],
    router: Any,
    until_s: float,
) -> FirstView:
    """Have every actor load, check what the shards hold, and tell the dense ranks.

    Raises:
        LateError: some have not answered by then; else whatever one of them raised.
    """
    num_copies = copies_of(config, spec)
    pending = {
        uid: handles[uid].join.remote(
            shard_launch(config, uid, placement, token, num_copies=num_copies)
        )
        for uid in placement.slots
    }
    started = all_answers(pending | start_ranks(dict(handles), ranks), until_s)
    facts: dict[str, ShardFacts] = {uid: started[uid] for uid in placement.slots}
    members = [facts[u].member if u in facts else m for u, m in started.items() if m]
    manifest = functools.reduce(Manifest.merge, (f.manifest for f in facts.values()))
    view = View(epoch=1, members=tuple(members), placement=placement)
    dense_uids = [m.uid for m in members if m.role == "dense"]
    adopted = {uid: handles[uid].adopt_view.remote(view) for uid in dense_uids}
    if router is not None:
        adopted["router"] = router.adopt_view.remote(view)
    all_answers(adopted, until_s)
    return FirstView(view=view, facts=facts, manifest=manifest)
