"""A tensor-parallel group of two ranks beside one expert shard each: what its token shuffle moves.

    shuffle_live.measure(model, texts, quick=False) -> rows, a form each

Real actors over Ray on this machine, all on one host: ranks and shards are paired as devices of a
host would be. Steps decode `NUM_SEQUENCES` documents; what is counted is what the group and the
dispatchers counted between the first token of all and the last. Forms take turns in a round.
"""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import ray
from engines_report import Spread
from transformers import AutoTokenizer

from remora.actors.launch import RAY_NAMESPACE
from remora.cluster.bench_load import EngineLoad
from remora.cluster.bootstrap import (
    ClusterHandle,
    cluster_status,
    ensure_cluster,
    neutral_runtime_env,
    stop_cluster,
)
from remora.cluster.config import parse_config

FORMS: Final = ("none", "exact", "speculative")
NUM_SEQUENCES: Final = 32
PROMPT_TOKENS: Final = 64
WARM_BATCHES: Final = 4  # the ranks learn from them what rows want


def measure(model: Path, texts: Sequence[str], *, quick: bool) -> list[dict[str, Any]]:
    """One row a form: tokens/s with spread, far copies, bytes of the group and of the shards."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = [tokenizer(text)["input_ids"][:PROMPT_TOKENS] for text in texts]
    prompts = [ids for ids in prompts if len(ids) == PROMPT_TOKENS]
    batches = [prompts[i : i + NUM_SEQUENCES] for i in range(0, len(prompts), NUM_SEQUENCES)]
    batches = [batch for batch in batches if len(batch) == NUM_SEQUENCES]
    num_new, rounds = (16, 2) if quick else (64, 4)
    needed = WARM_BATCHES + rounds
    if len(batches) < needed:
        raise ValueError(f"{len(batches)} batches of {NUM_SEQUENCES} prompts, {needed} are needed")
    ray.init(num_cpus=4, namespace=RAY_NAMESPACE, runtime_env=neutral_runtime_env())
    try:
        return [_form(form, model, batches[:needed], num_new) for form in FORMS]
    finally:
        ray.shutdown()


def _form(
    form: str, model: Path, batches: Sequence[list[list[int]]], num_new: int
) -> dict[str, Any]:
    name = f"shuffle-{form}"
    small = {"num_cpus": 0.5, "threads": 1}
    handle = ensure_cluster(
        parse_config(
            {
                "name": name,
                "model": str(model),
                "executor": "eager",
                "dense": small
                | {"tensor_parallel": 2, "token_shuffle": form, "prefix_caching": False},
                "experts": small | {"shards": 2},
            }
        )
    )
    try:
        return asyncio.run(_run(form, name, handle, batches, num_new))
    finally:
        stop_cluster(name)


async def _run(
    form: str, name: str, handle: ClusterHandle, batches: Sequence[list[list[int]]], num_new: int
) -> dict[str, Any]:
    load = await EngineLoad.connect(handle)
    for batch in batches[:WARM_BATCHES]:
        await load.generate(batch, num_new)
    before = _counted(name)
    timings = [await load.generate(batch, num_new) for batch in batches[WARM_BATCHES:]]
    after = _counted(name)
    await load.close()
    num_tokens = sum(timing.num_tokens for timing in timings)
    grown = {key: after[key] - before[key] for key in after}
    return {
        "form": form,
        "tokens_per_s": Spread.of([t.num_tokens / t.seconds for t in timings]),
        "tokens": num_tokens,
        "far_copies_share": round(grown["far"] / grown["copies"], 4),
        "far_shard_KiB": round(grown["far_bytes"] / 1024),
        "near_shard_KiB": round(grown["near_bytes"] / 1024),
        "group_KiB": round(grown["group_bytes"] / 1024),
        "group_calls": grown["group_calls"],
    }


def _counted(name: str) -> dict[str, int]:
    """Sums over both ranks of what they have counted so far."""
    members = cluster_status(name)["members"]
    ranks = [members["dense-0"], members["dense-0.1"]]
    shuffles = [rank["token_shuffle"] for rank in ranks]
    shards = sorted(ranks[0]["shard_bytes"])
    moved = [op for shuffle in shuffles for op in shuffle["group_bytes"].values()]
    near = sum(rank["shard_bytes"][uid] for rank, uid in zip(ranks, shards, strict=True))
    every = sum(sum(rank["shard_bytes"].values()) for rank in ranks)
    return {
        "far": sum(shuffle["far_copies"] for shuffle in shuffles),
        "copies": sum(shuffle["copies"] for shuffle in shuffles),
        "near_bytes": near,
        "far_bytes": every - near,
        "group_bytes": sum(op["sent_bytes"] for op in moved),
        "group_calls": sum(op["calls"] for op in moved),
    }
