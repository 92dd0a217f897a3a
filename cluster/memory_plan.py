"""What a deployment would be, without a cluster: placement, memory by process, bytes by step.

From the checkpoint's JSON and safetensors headers alone. Estimates say so: routing is taken as
uniform, and a process' memory is what it owns, without its interpreter and libraries.
"""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from remora.actors import model_build, tp_surgery
from remora.actors.checkpoint_files import Checkpoint
from remora.actors.model_spec import ModelSpec, inspect_model, resolve_dtype
from remora.actors.tp_plan import check_heads, make_plan
from remora.cluster.config import RemoraConfig
from remora.cluster.launch import (
    copies_of,
    dense_threads,
    kv_bytes_per_token,
    longest_sequence,
    placement_of,
    shard_threads,
)
from remora.comm.bundles import NO_SOURCE
from remora.comm.replay import choose_all
from remora.comm.topology import held_of, replica_counts, uniform_topology
from remora.comm.view import Placement
from remora.comm.wire import HEADER_BYTES, PAIR_BYTES
from remora.kernels.quantization import held_as

BATCHES = (1, 8, 32)  # decoding sequences that the traffic is estimated for
SAMPLED = 2048  # tokens that the traffic of replicated placements is estimated from


def plan_deployment(config: RemoraConfig) -> dict[str, Any]:
    """Plain data for `remora plan`; sizes in bytes.

    Raises:
        ConfigError: what a start would refuse: more shards than experts, say, or KV pages that
            cannot hold one sequence.
        UnsupportedModelError, WeightsError: as `inspect_model`.
    """
    spec = inspect_model(config.model)
    dtype = resolve_dtype(spec, config.dtype)
    placement = placement_of(config, spec)
    expert_nbytes = spec.expert_nbytes(dtype, config.experts_dtype)
    num_experts = len(spec.moe_layers) * spec.num_experts
    with Checkpoint.open(config.model) as checkpoint:
        parameters = sum(math.prod(entry.shape) for entry in checkpoint.tensors.values())
    dense_parameters = parameters - num_experts * spec.expert.num_elements
    max_model_len = longest_sequence(config, spec)
    for threads in (dense_threads, shard_threads):
        threads(config)  # refuses what a start would refuse
    ranks = config.dense.tensor_parallel
    check_heads(spec.attention, ranks)
    kv_token_nbytes = kv_bytes_per_token(config, spec)
    num_blocks = config.dense.num_kv_blocks(
        bytes_per_token=kv_token_nbytes, max_model_len=max_model_len
    )
    copies = row_copies(placement, spec.top_k)
    return {
        "model": config.model,
        "model_type": spec.model_type,
        "dtype": str(dtype).removeprefix("torch."),
        "experts_dtype": held_as(config.experts_dtype, dtype),
        "numerics": config.numerics,
        "combine": config.combine,
        "layers": spec.num_layers,
        "moe_layers": len(spec.moe_layers),
        "experts_per_layer": spec.num_experts,
        "top_k": spec.top_k,
        "parameters": parameters,
        "max_model_len": max_model_len,
        "dense_groups": config.dense.groups,
        "dense": {
            "weights_bytes": max(0, dense_parameters) * dtype.itemsize,
            "kv_cache_bytes": num_blocks * config.dense.block_size * kv_token_nbytes,
            "kv_cache_tokens": num_blocks * config.dense.block_size,
            "kv_bytes_per_token": kv_token_nbytes,
            "tensor_parallel": ranks,
        }
        | _rank_part(config, spec, dtype),
        "shards": {
            uid: _shard_part(layers, config.experts.slots, expert_nbytes, copies_of(config, spec))
            for uid, layers in placement.slots.items()
        },
        "replicas": replica_counts(placement),
        "decode_step": [_traffic(config, spec, dtype.itemsize, batch, copies) for batch in BATCHES],
    }


def _shard_part(
    layers: tuple[tuple[int, ...], ...], slots: int | None, expert_nbytes: int, num_copies: int
) -> dict[str, Any]:
    """What one shard holds; empty slots take memory too, second copies at most so much more."""
    counts = [len(experts) for experts in layers]
    rooms = counts if slots is None else [slots] * len(layers)
    first = layers[0]
    is_run = len(set(layers)) == 1 and len(first) > 0
    is_run = is_run and first == tuple(range(first[0], first[0] + len(first)))
    return {
        "experts_per_layer": [min(counts), max(counts)],
        "slots_per_layer": [min(rooms), max(rooms)],
        "experts": [first[0], first[-1]] if is_run else None,
        "weights_bytes": sum(rooms) * expert_nbytes,
        "second_copies_bytes_max": num_copies * len(layers) * expert_nbytes,
    }


def row_copies(placement: Placement, top_k: int) -> float:
    """Shards that a token's row goes to, mean over the layers, routing uniform.

    Exact where no expert has a replica: a shard is left out when none of the K experts is on it.
    Otherwise the mean of `SAMPLED` draws, with replicas chosen as dispatch does.
    """
    uids = tuple(placement.slots)
    copies = []
    for held_SE in held_of(placement, uids):
        num_experts = placement.num_experts
        if held_SE.sum() == num_experts:
            counts = held_SE.sum(axis=1).tolist()
            missed = [
                math.prod(max(0, num_experts - c - k) / (num_experts - k) for k in range(top_k))
                for c in counts
            ]
            copies.append(len(uids) - sum(missed))
        else:
            copies.append(_sampled_copies(held_SE, top_k))
    return float(np.mean(copies))


def _sampled_copies(held_SE: NDArray[np.bool_], top_k: int) -> float:
    num_shards, num_experts = held_SE.shape
    draws = np.random.default_rng(0).random((SAMPLED, num_experts))
    index_TK = np.argpartition(draws, top_k - 1, axis=1)[:, :top_k].astype(np.int64)
    topology = uniform_topology(num_hosts=num_shards, shards_per_host=1, slots=num_experts)
    nowhere_T = np.full(SAMPLED, NO_SOURCE)
    shard_TK = choose_all(index_TK, nowhere_T, held_SE, topology)
    ordered_TK = np.sort(shard_TK, axis=1)
    return 1.0 + float((np.diff(ordered_TK, axis=1) > 0).sum()) / SAMPLED


def _rank_part(config: RemoraConfig, spec: ModelSpec, dtype: torch.dtype) -> dict[str, Any]:
    """What one rank of a tensor-parallel dense group holds; nothing for a group of one rank."""
    size = config.dense.tensor_parallel
    if size == 1:
        return {}
    model = model_build.build_meta(spec.config, dtype)
    facts = tp_surgery.facts_of(model, spec.attention, spec.linears)
    plan = make_plan(facts, 0, size)
    shapes = {
        name: plan.cuts[name].shape(shape) if name in plan.cuts else shape
        for name, shape in facts.shapes.items()
    }
    return {
        "rank_weights_bytes": sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize,
        "whole_on_every_rank": tp_surgery.whole_text(plan),
    }


def plan_text(plan: dict[str, Any]) -> str:
    """The plan for people."""
    dense = plan["dense"]
    lines = [
        f"{plan['model']}: {plan['model_type']}, {plan['parameters']:,} parameters,"
        f" {plan['moe_layers']} MoE layers x {plan['experts_per_layer']} experts,"
        f" top {plan['top_k']}",
        f"served in {plan['dtype']}, experts in {plan['experts_dtype']},"
        f" {plan['numerics']} numerics ({plan['combine']} combine),"
        f" up to {plan['max_model_len']:,} tokens a sequence",
        "",
        f"{plan['dense_groups']} dense group(s), each: weights {_size(dense['weights_bytes'])},"
        f" KV pages {_size(dense['kv_cache_bytes'])} = {dense['kv_cache_tokens']:,} tokens",
    ]
    if dense["tensor_parallel"] > 1:
        lines.append(
            f"  on {dense['tensor_parallel']} ranks, each: weights"
            f" {_size(dense['rank_weights_bytes'])}; {dense['whole_on_every_rank']}"
        )
    for uid, shard in plan["shards"].items():
        most = shard["second_copies_bytes_max"]
        more = f", second copies up to {_size(most)}" if most else ""
        lines.append(f"{uid}: {_held_text(shard)}, weights {_size(shard['weights_bytes'])}{more}")
    replicas = plan["replicas"]
    if replicas["beyond_the_first"]:
        lines.append(
            f"{replicas['beyond_the_first']} slots hold replicas: {replicas['least']} to"
            f" {replicas['most']} of each expert"
        )
    lines += ["", "a decode step between one dense group and the shards (routing uniform):"]
    for step in plan["decode_step"]:
        lines.append(
            f"  batch {step['batch']:>3}: {step['row_copies_per_token_and_layer']:.2f} copies of a"
            f" row, {_size(step['bytes_out'])} out, {_size(step['bytes_back'])} back"
        )
    return "\n".join(lines)


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def _held_text(shard: dict[str, Any]) -> str:
    least, most = shard["experts_per_layer"]
    room = shard["slots_per_layer"][1]
    if shard["experts"] is not None:
        first, last = shard["experts"]
        held = f"experts {first} to {last} of every MoE layer"
    else:
        held = f"{least} experts" if least == most else f"{least} to {most} experts"
        held += " of every MoE layer"
    return held if (least, most) == (room, room) else f"{held}, in {room} slots"


def _traffic(
    config: RemoraConfig, spec: ModelSpec, itemsize: int, batch: int, copies: float
) -> dict[str, Any]:
    """Bytes of one decode step between a dense group and its shards, routing uniform."""
    shards, top_k = config.experts.shards, spec.top_k
    row = spec.hidden_size * itemsize
    back = copies if config.combine == "presummed" else float(top_k)
    frames = 2 * HEADER_BYTES * min(shards, batch * copies)
    out_bytes = batch * (copies * row + top_k * PAIR_BYTES)
    back_bytes = batch * back * row
    layers = len(spec.moe_layers)
    return {
        "batch": batch,
        "row_copies_per_token_and_layer": round(copies, 3),
        "bytes_out": round(layers * (out_bytes + frames / 2)),
        "bytes_back": round(layers * (back_bytes + frames / 2)),
    }
