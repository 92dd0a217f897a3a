"""Placements of one model over hosts with one shard each, planned on texts, for `links.py`.

`b1`: contiguous, no spare slots. `b3`: EPLB on the same statistics, spare slots filled by it. `b6`:
Remora's grouping with the same slots, planned jointly with the homes of the planning requests; a
prompt's home is the host that holds most of what its first `PROBE` tokens pick (what the first
chunk of its prefill tells), under equal shares.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from remora.comm.bundles import count_bundles
from remora.comm.eplb import eplb_held
from remora.comm.joint_plan import homes_from_probe, plan_homes_and_placement
from remora.comm.layer_plan import expert_loads
from remora.comm.topology import Topology, placement_from, uniform_topology
from remora.comm.trace import Trace, join
from remora.comm.trace_reader import read_trace
from remora.comm.view import Placement, contiguous_placement

METHODS = ("b1", "b3", "b6")
PROBE = 32  # tokens of a prompt that its home is decided from
Held = Sequence[NDArray[np.bool_]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plans:
    """What was planned for one model; `held_L` of each method, `[S, E]` per layer."""

    topology: Topology
    moe_layers: tuple[int, ...]
    held: dict[str, Held]

    def placement(self, method: str) -> Placement:
        """As a deployment takes it."""
        held_L = list(self.held[method])
        return placement_from(held_L, uids=self.topology.uids, moe_layers=self.moe_layers)

    def homes(self, method: str, prompts: Trace) -> NDArray[np.int64]:
        """Host of each prompt: round robin, or by what its first tokens pick (`b6`)."""
        num_prompts = int(prompts.request_T.max()) + 1
        hosts = self.topology.num_hosts
        if method != "b6":
            return np.arange(num_prompts) % hosts
        early = prompts.select(np.flatnonzero(prompts.position_T < PROBE))
        return homes_from_probe(
            early.experts_LTK.transpose(1, 0, 2),
            early.request_T,
            np.bincount(prompts.request_T),
            self.held[method],
            self.topology,
            eps=0.0,
        )


def plan(planning: Trace, *, num_hosts: int, spare: float) -> Plans:
    """All methods.

    Args:
        planning: routing of planning texts.
        spare: slots over those that the experts need, as a share of these.
    """
    header = planning.header
    base = header.num_experts // num_hosts
    slots = round(base * (1 + spare))
    topology = uniform_topology(num_hosts=num_hosts, shards_per_host=1, slots=slots)
    contiguous = contiguous_placement(
        num_experts=header.num_experts, moe_layers=header.moe_layers, shard_uids=topology.uids
    )
    first_L = [np.zeros((num_hosts, header.num_experts), np.bool_) for _ in header.moe_layers]
    for shard, uid in enumerate(topology.uids):
        for held_SE, experts in zip(first_L, contiguous.slots[uid], strict=True):
            held_SE[shard, list(experts)] = True
    eplb_L = [
        eplb_held(
            expert_loads(count_bundles(ids_TK, planning.source_T), header.num_experts), topology
        )
        for ids_TK in planning.experts_LTK
    ]
    joint = plan_homes_and_placement(
        planning.experts_LTK.transpose(1, 0, 2),
        planning.request_T,
        topology,
        num_experts=header.num_experts,
        seed=0,
    )
    return Plans(
        topology=topology,
        moe_layers=header.moe_layers,
        held={"b1": first_L, "b3": eplb_L, "b6": joint.result.held_L},
    )


def record(checkpoint: Path, files: Sequence[Path], *, window: int, tokens_each: int) -> Trace:
    """Routing of texts as the model itself chooses; a window is a request.

    Args:
        tokens_each: of each file at most.
    """
    from remora.actors.trace_offline import RecordPlan, TextFile, record_texts

    traces: list[Trace] = []
    num_requests = 0
    with tempfile.TemporaryDirectory() as folder:
        plan = RecordPlan(window=window, tokens_max=tokens_each)
        for file in files:
            path = Path(folder) / file.name
            domain = file.name.split(".")[0]
            record_texts(str(checkpoint), [TextFile(path=file, domain=domain)], path, plan)
            trace = read_trace(path)
            trace = replace(trace, request_T=trace.request_T + num_requests)
            num_requests = int(trace.request_T.max()) + 1  # `join` keeps numbers as they are
            traces.append(trace)
    return join(traces)


def prompts_of(trace: Trace, count: int, num_tokens: int) -> Trace:
    """`count` requests of `num_tokens` tokens, domains in turn, numbered from 0."""
    lengths_Q = np.bincount(trace.request_T)
    domain_Q = np.zeros(len(lengths_Q), np.int64)
    domain_Q[trace.request_T] = trace.domain_T
    left = [
        np.flatnonzero((lengths_Q == num_tokens) & (domain_Q == domain)).tolist()
        for domain in np.unique(trace.domain_T)
    ]
    chosen: list[int] = []
    while len(chosen) < count:
        assert any(left), f"{len(chosen)} texts of {num_tokens} tokens, {count} are needed"
        chosen += [each.pop(0) for each in left if each][: count - len(chosen)]
    number_Q = np.full(len(lengths_Q), -1, np.int64)
    number_Q[chosen] = np.arange(count)
    kept_T = np.flatnonzero(number_Q[trace.request_T] >= 0)
    kept = trace.select(kept_T)
    return replace(kept, request_T=number_Q[kept.request_T].astype(kept.request_T.dtype))
