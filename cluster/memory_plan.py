"""What a deployment would be, without a cluster: placement, memory by process, bytes by step.

From the checkpoint's JSON and safetensors headers alone. Estimates say so: routing is taken as
uniform, and a process' memory is what it owns, without its interpreter and libraries.
"""

import math
from typing import Any

import torch

from remora.actors import model_build, model_probe, tp_surgery
from remora.actors.checkpoint_files import Checkpoint
from remora.actors.model_spec import ModelSpec, inspect_model, resolve_dtype
from remora.actors.tp_plan import check_heads, make_plan
from remora.cluster.config import RemoraConfig
from remora.cluster.launch import kv_bytes_per_token, placement_of
from remora.comm.wire import HEADER_BYTES, PAIR_BYTES

BATCHES = (1, 8, 32)  # decoding sequences that the traffic is estimated for


def plan_deployment(config: RemoraConfig) -> dict[str, Any]:
    """Plain data for `remora plan`; sizes in bytes.

    Raises:
        ConfigError: more shards than experts, or KV pages that cannot hold one sequence.
        UnsupportedModelError, WeightsError: as `inspect_model`.
    """
    spec = inspect_model(config.model)
    dtype = resolve_dtype(spec, config.dtype)
    placement = placement_of(config, spec)
    is_int8 = config.experts_dtype == "int8"
    expert_nbytes = spec.expert_nbytes(dtype, is_int8=is_int8)
    num_experts = len(spec.moe_layers) * spec.num_experts
    with Checkpoint.open(config.model) as checkpoint:
        parameters = sum(math.prod(entry.shape) for entry in checkpoint.tensors.values())
    dense_parameters = parameters - num_experts * spec.expert.num_elements
    max_model_len = config.dense.max_model_len or spec.max_positions
    ranks = config.dense.tensor_parallel
    check_heads(spec.attention, ranks)
    kv_token_nbytes = kv_bytes_per_token(config, spec)
    num_blocks = config.dense.num_kv_blocks(
        bytes_per_token=kv_token_nbytes, max_model_len=max_model_len
    )
    return {
        "model": config.model,
        "model_type": spec.model_type,
        "dtype": str(dtype).removeprefix("torch."),
        "experts_dtype": "int8" if is_int8 else str(dtype).removeprefix("torch."),
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
            uid: {
                "experts_per_layer": len(layers[0]),
                "experts": [layers[0][0], layers[0][-1]],
                "weights_bytes": sum(len(layer) for layer in layers) * expert_nbytes,
            }
            for uid, layers in placement.slots.items()
        },
        "decode_step": [_traffic(config, spec, dtype.itemsize, batch) for batch in BATCHES],
    }


def _rank_part(config: RemoraConfig, spec: ModelSpec, dtype: torch.dtype) -> dict[str, Any]:
    """What one rank of a tensor-parallel dense group holds; nothing for a group of one rank."""
    size = config.dense.tensor_parallel
    if size == 1:
        return {}
    model = model_build.build_meta(spec.config, dtype)
    model_build.compute_buffers(model)
    facts = tp_surgery.facts_of(model, model_probe.watch_one_pass(model))
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
        first, last = shard["experts"]
        lines.append(
            f"{uid}: experts {first} to {last} of every MoE layer,"
            f" weights {_size(shard['weights_bytes'])}"
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


def _traffic(config: RemoraConfig, spec: ModelSpec, itemsize: int, batch: int) -> dict[str, Any]:
    """Bytes of one decode step between a dense group and its shards, routing uniform."""
    shards, top_k = config.experts.shards, spec.top_k
    # One copy of a row per shard: a shard is left out when none of the K experts is on it.
    per_shard = spec.num_experts / shards
    missed = math.prod(
        max(0.0, spec.num_experts - per_shard - k) / (spec.num_experts - k) for k in range(top_k)
    )
    copies = shards * (1 - missed)
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
