"""`remora placement export | check`: the placement of a deployment as a file, and back."""

import json
from pathlib import Path
from typing import Any

from remora.cluster.instances import Instance, missing
from remora.cluster.manage_command import deployment_at, nothing_of
from remora.cluster.placement_file import check_fits, read_placement, write_placement
from remora.comm.topology import replica_counts
from remora.comm.view import Placement

OK = 0


def run_export(
    name: str, instance: Instance | None, ray_address: str | None, path: Path, *, as_json: bool
) -> int:
    """Write the placement of a running deployment. Returns the exit status: 3 when there is none.

    Raises:
        ClusterError: it has no view yet.
        ConfigError: the file cannot be written.
    """
    with deployment_at(name, instance.ray_address if instance else ray_address) as cluster:
        if cluster is None:
            return missing(nothing_of(name), as_json)
        view = cluster.view()
    write_placement(path, view.placement)
    facts = {"file": str(path), "deployment": name, "epoch": view.epoch} | _facts(view.placement)
    print(json.dumps(facts) if as_json else f"{path}: epoch {view.epoch}, {_text(facts)}")
    return OK


def run_check(
    path: Path, *, model: str | None, shards: int | None, slots: int | None, as_json: bool
) -> int:
    """Say what is in a placement file. Returns the exit status.

    Args:
        model, shards, slots: what it must fit; None: nothing in particular.

    Raises:
        ConfigError: it is none, or does not fit.
        UnsupportedModelError, WeightsError: as `inspect_model`.
    """
    placement = read_placement(path)
    num_experts, moe_layers = placement.num_experts, placement.moe_layers
    if model is not None:
        from remora.actors.model_spec import inspect_model  # torch, only where needed

        spec = inspect_model(model)
        num_experts, moe_layers = spec.num_experts, spec.moe_layers
    check_fits(
        placement,
        source=str(path),
        num_experts=num_experts,
        moe_layers=moe_layers,
        shard_uids=None if shards is None else tuple(f"shard-{i}" for i in range(shards)),
        slots=slots,
    )
    facts = {"file": str(path)} | _facts(placement)
    print(json.dumps(facts) if as_json else f"{path}: {_text(facts)}")
    return OK


def _facts(placement: Placement) -> dict[str, Any]:
    counts = [len(experts) for layers in placement.slots.values() for experts in layers]
    return {
        "experts_per_layer": placement.num_experts,
        "moe_layers": list(placement.moe_layers),
        "shards": len(placement.slots),
        "slots_used": [min(counts), max(counts)],  # of a shard in a layer
        "replicas": replica_counts(placement),
    }


def _text(facts: dict[str, Any]) -> str:
    least, most = facts["slots_used"]
    replicas = facts["replicas"]
    return (
        f"{facts['experts_per_layer']} experts of {len(facts['moe_layers'])} MoE layers on"
        f" {facts['shards']} shards, {least} to {most} slots of a shard and layer used,"
        f" {replicas['least']} to {replicas['most']} replicas of an expert"
    )
