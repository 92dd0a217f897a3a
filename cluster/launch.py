"""From a deployment's configuration to what each data-plane actor is told and how Ray places it."""

import logging
import os
from pathlib import Path
from typing import Any

import ray
import torch

from remora.actors.dense_launch import DenseLaunch
from remora.actors.launch import RAY_NAMESPACE, NcclLaunch, ShardLaunch, thread_environment
from remora.actors.model_spec import ModelSpec, resolve_dtype
from remora.actors.tp_plan import check_heads
from remora.cluster.config import DenseConfig, ExpertsConfig, RemoraConfig
from remora.cluster.placement_file import LATEST, check_fits, read_placement, whole_placement
from remora.comm.errors import ConfigError
from remora.comm.view import Placement, contiguous_placement

logger = logging.getLogger(__name__)

# start, progress, status, stop, changes, second copies (two orders), and one to spare
ACTOR_THREADS = 8

FIRST_INCARNATION = 1


# Torch cuts elementwise work into one piece a thread; with three or more, a piece can end inside a
# vector, and the scalar code that finishes it rounds otherwise (measured: gpt_oss, width 1000).
EXACT_THREADS_MAX = 2


def dense_threads(config: RemoraConfig) -> int:
    """Threads of one dense rank: all cores of its host, since it and its shards take turns on them.

    Raises:
        ConfigError: more than `exact` numerics can keep its promise with.
    """
    processes = config.dense.groups * config.dense.tensor_parallel
    return _threads(config, "dense", config.dense.threads, processes)


def shard_threads(config: RemoraConfig) -> int:
    """Threads of one shard: the cores shared out, since the shards of a host run at once.

    Raises:
        ConfigError: more than `exact` numerics can keep its promise with.
    """
    return _threads(config, "experts", config.experts.threads, config.experts.shards)


def _threads(config: RemoraConfig, section: str, asked: int | None, processes: int) -> int:
    exact = config.numerics == "exact"
    if asked is None:
        cores, hosts = _machines()
        shared = max(1, cores // -(-processes // hosts))
        return min(shared, EXACT_THREADS_MAX) if exact else shared
    if exact and asked > EXACT_THREADS_MAX:
        raise ConfigError(
            f"{section}.threads = {asked}: exact numerics allow at most {EXACT_THREADS_MAX} "
            "threads a process on the CPU (add shards or groups instead)"
        )
    return asked


def _machines() -> tuple[int, int]:
    """Cores of a host, and how many hosts there are, by what Ray knows of its nodes now.

    A node's CPUs are what its container may use. One of this machine may have been given more than
    there are. Hosts that come later are taken to be like those that are there.
    """
    here = os.cpu_count() or 1
    nodes = ray.nodes() if ray.is_initialized() else []
    cores = [int(node["Resources"].get("CPU", 0)) for node in nodes if node["Alive"]]
    cores = [count for count in cores if count > 0]
    if len(cores) <= 1:
        return min([here, *cores]), 1
    return max(cores), len(cores)


def first_shards(config: RemoraConfig) -> tuple[str, ...]:
    """Uids of the shards that a deployment starts with."""
    return tuple(f"shard-{index}" for index in range(config.experts.shards))


def first_groups(config: RemoraConfig) -> tuple[str, ...]:
    """Uids of the dense groups that a deployment starts with."""
    return tuple(f"dense-{index}" for index in range(config.dense.groups))


def placement_of(config: RemoraConfig, spec: ModelSpec) -> Placement:
    """Which shard holds what: equal contiguous runs, or what a placement file says.

    Spare slots (`experts.slots`) of contiguous runs get replicas; those of a file stay empty.

    Raises:
        ConfigError: more shards or experts than there is room for, experts of a dtype that they
            cannot be held in, or a placement file that is none or does not fit.
    """
    dtype = resolve_dtype(spec, config.dtype)
    if config.experts_dtype != "auto" and dtype != torch.bfloat16:
        raise ConfigError(
            f"experts_dtype = {config.experts_dtype}: rows must be bfloat16, but {config.model} is"
            f" served in {str(dtype).removeprefix('torch.')} (set dtype: bfloat16)"
        )
    experts = config.experts
    uids = first_shards(config)
    if isinstance(experts.placement, Path):
        return _placement_in(experts.placement, uids, experts.slots, spec)
    if experts.placement == "latest":
        found = _latest(config, uids, spec)
        if found is not None:
            return found
    if experts.shards > spec.num_experts:
        raise ConfigError(
            f"experts.shards = {experts.shards}: the model has {spec.num_experts} experts a layer"
        )
    try:
        return contiguous_placement(
            num_experts=spec.num_experts,
            moe_layers=spec.moe_layers,
            shard_uids=uids,
            slots=experts.slots,
        )
    except ValueError as wrong:
        raise ConfigError(f"experts.slots = {experts.slots}: {wrong}") from None


def _latest(config: RemoraConfig, uids: tuple[str, ...], spec: ModelSpec) -> Placement | None:
    """What was last decided, unless there is none or it is for another deployment's shape."""
    assert config.router.state_dir is not None, "the configuration was checked"
    path = config.router.state_dir / LATEST
    if not path.exists():
        return None
    try:
        return _placement_in(path, uids, config.experts.slots, spec)
    except ConfigError as misfit:
        logger.warning("%s does not fit any more, contiguous runs are taken: %s", path, misfit)
        return None


def _placement_in(
    path: Path, uids: tuple[str, ...], slots: int | None, spec: ModelSpec
) -> Placement:
    """The placement in a file; shards that it does not name hold nothing."""
    placement = read_placement(path)
    check_fits(
        placement,
        source=f"experts.placement {path}",
        num_experts=spec.num_experts,
        moe_layers=spec.moe_layers,
        shard_uids=uids,
        slots=slots,
    )
    return whole_placement(placement, uids)


def copies_of(config: RemoraConfig, spec: ModelSpec) -> int:
    """Second copies of each layer that a shard has room for by `elastic.dram_copies_mib`.

    Raises:
        ConfigError: room for not one.
    """
    mib = config.elastic.dram_copies_mib
    if not mib:
        return 0
    expert = spec.expert_nbytes(resolve_dtype(spec, config.dtype), config.experts_dtype)
    each = len(spec.moe_layers) * expert
    if mib * (1 << 20) < each:
        raise ConfigError(
            f"elastic.dram_copies_mib = {mib:g}: one expert of each layer takes"
            f" {each / (1 << 20):.1f} MiB; allowed is that, or 0"
        )
    return min(spec.num_experts, int(mib * (1 << 20) / each))


def shard_launch(
    config: RemoraConfig, uid: str, placement: Placement, token: bytes, *, num_copies: int = 0
) -> ShardLaunch:
    """What shard `uid` is told: which experts it holds, and how to serve them."""
    return ShardLaunch(
        **_common(config, uid, token),
        device=config.experts.computes_on,
        num_threads=shard_threads(config),
        experts_dtype=config.experts_dtype,
        num_slots=config.experts.slots,
        num_copies=num_copies,
        copy_bytes_per_s=config.elastic.copy_mib_per_s * (1 << 20),
        experts_by_layer=dict(zip(placement.moe_layers, placement.slots[uid], strict=True)),
    )


def kv_bytes_per_token(config: RemoraConfig, spec: ModelSpec) -> int:
    """Bytes of K and V of one token in one dense group, over all its ranks.

    Key/value heads that are fewer than the ranks are on several.
    """
    dtype, ranks = resolve_dtype(spec, config.dtype), config.dense.tensor_parallel
    return dtype.itemsize * sum(
        max(ranks, a.num_kv_heads) * (a.k_dim + a.v_dim) for a in spec.attention
    )


def longest_sequence(config: RemoraConfig, spec: ModelSpec) -> int:
    """Tokens of the longest sequence that is served.

    Raises:
        ConfigError: more than the model knows positions for.
    """
    asked = config.dense.max_model_len or spec.max_positions
    if asked > spec.max_positions:
        raise ConfigError(
            f"dense.max_model_len = {asked}: {config.model} knows positions up to "
            f"{spec.max_positions}"
        )
    return asked


def dense_launch(
    config: RemoraConfig, uid: str, spec: ModelSpec, token: bytes, *, rank: int = 0
) -> DenseLaunch:
    """What dense rank `uid` is told; the view comes later, when the shards are up.

    Raises:
        ConfigError: `max_model_len` beyond the model's, no room for one such sequence, or heads
            that do not divide by `tensor_parallel`.
    """
    dense = config.dense
    check_heads(spec.attention, dense.tensor_parallel)
    max_model_len = longest_sequence(config, spec)
    num_kv_blocks = dense.num_kv_blocks(
        bytes_per_token=kv_bytes_per_token(config, spec),
        max_model_len=max_model_len,
    )
    return DenseLaunch(
        **_common(config, uid, token),
        device=config.dense.computes_on,
        num_threads=dense_threads(config),
        executor=config.executor,
        num_kv_blocks=num_kv_blocks,
        max_num_seqs=dense.max_num_seqs,
        max_tokens_per_step=dense.max_tokens_per_step,
        max_model_len=max_model_len,
        max_waiting=dense.max_waiting,
        prefix_caching=dense.prefix_caching,
        hold_s=config.elastic.hold_s,
        hang_s=config.elastic.hang_s,
        call_timeout_s=config.experts.call_timeout_s,
        report_every_s=config.router.report_every_s if config.router.enabled else None,
        rank=rank,
        num_ranks=dense.tensor_parallel,
        token_shuffle=dense.token_shuffle,
        start_timeout_s=config.start_timeout_s,
        # A rank may wait for another one that waits for a shard.
        exchange_timeout_s=2 * config.experts.call_timeout_s + 5,
    )


def shard_options(config: RemoraConfig) -> dict[str, Any]:
    """Ray options of an expert shard."""
    return _options(config.experts, shard_threads(config))


def dense_options(config: RemoraConfig) -> dict[str, Any]:
    """Ray options of a dense rank."""
    return _options(config.dense, dense_threads(config))


def _common(config: RemoraConfig, uid: str, token: bytes) -> dict[str, Any]:
    return {
        "deployment": config.name,
        "uid": uid,
        "incarnation": FIRST_INCARNATION,
        "model": config.model,
        "dtype": config.dtype,
        "exact": config.numerics == "exact",
        "token": token,
        "bind_ip": config.bind_address,
        "use_unix": config.experts.transport != "tcp",
        "nccl": NcclLaunch(
            capacity_max=config.dense.max_num_seqs, step_timeout_s=config.experts.call_timeout_s
        )
        if config.experts.transport == "nccl"
        else None,
    }


def _options(placed: DenseConfig | ExpertsConfig, num_threads: int) -> dict[str, Any]:
    """Detached, never restarted by Ray: a supervisor starts a new incarnation instead."""
    options: dict[str, Any] = {
        "namespace": RAY_NAMESPACE,
        "lifetime": "detached",
        "max_restarts": 0,
        "max_concurrency": ACTOR_THREADS,
        "num_cpus": placed.num_cpus,
        "num_gpus": placed.num_gpus,
        "runtime_env": {"env_vars": thread_environment(num_threads)},
    }
    if placed.resources:
        options["resources"] = placed.resources
    if placed.labels:
        options["label_selector"] = placed.labels
    return options
