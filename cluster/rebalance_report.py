"""A plan as a rebalance round shows it: which layers would change, what moves, what it is worth."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import msgspec
import numpy as np

from remora.actors.plan_outcome import LayerOutcome, PlanOutcome
from remora.autoscale.rebalance import LayerChange, Proposal, RebalancePolicy, propose
from remora.cluster.operation_command import operation_text
from remora.comm.view import Placement

if TYPE_CHECKING:  # torch, a second that the command line need not wait
    import torch

    from remora.actors.model_spec import ModelSpec
    from remora.kernels.experts_dtype import ExpertsDtype

MOVES_SHOWN = 20  # by the text for people


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """One expert that a shard must fetch."""

    layer: int
    expert: int
    to_shard: str
    from_shards: tuple[str, ...]  # that hold it now


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """What one round would do."""

    proposal: Proposal
    placement: Placement  # the old one, with the layers of the proposal changed
    moves: tuple[Move, ...]
    tokens: float
    copies_before: float  # means over all layers
    copies_after: float
    load_before: float
    load_after: float

    def fields(self) -> dict[str, Any]:
        """Numbers of it, as plain data; without the moves one by one."""
        proposal = self.proposal
        return {
            "tokens": round(self.tokens),
            "copies_before": self.copies_before,
            "copies_after": self.copies_after,
            "load_before": self.load_before,
            "load_after": self.load_after,
            "layers": list(proposal.layers),
            "moved_experts": proposal.moved,
            "moved_bytes": proposal.moved_bytes,
            "saved_bytes": proposal.saved_bytes,
            "predicted_gain_ratio": proposal.gain_ratio,
        }


class MoveSizes(TypedDict):
    """Bytes that a move is weighed by: of one expert's weights in one layer, and of one copy of a
    row, there and back."""

    expert_bytes: int
    row_bytes: int


def move_sizes(
    spec: "ModelSpec", dtype: "torch.dtype", experts_dtype: "ExpertsDtype" = "auto"
) -> MoveSizes:
    """Of a model as it is served."""
    return {
        "expert_bytes": spec.expert_nbytes(dtype, experts_dtype),
        "row_bytes": 2 * spec.hidden_size * dtype.itemsize,
    }


def round_of(
    policy: RebalancePolicy,
    outcome: PlanOutcome,
    before: Placement,
    *,
    expert_bytes: int,
    row_bytes: int,
) -> Round:
    """The round that a plan comes to under a policy.

    Args:
        before: the placement that the plan was made against.
    """
    changes = [LayerChange(**_fields(layer)) for layer in outcome.layers]
    proposal = propose(policy, changes, expert_bytes=expert_bytes, row_bytes=row_bytes)
    placement = mixed_placement(before, outcome.placement, proposal.layers)
    taken = set(proposal.layers)

    def mean(name: str, when: str) -> float:
        values = [
            getattr(layer, f"{name}_{when if layer.layer in taken else 'before'}")
            for layer in outcome.layers
        ]
        return float(np.mean(values))

    return Round(
        proposal=proposal,
        placement=placement,
        moves=moves_between(before, placement),
        tokens=outcome.tokens,
        copies_before=mean("copies", "before"),
        copies_after=mean("copies", "after"),
        load_before=mean("load", "before"),
        load_after=mean("load", "after"),
    )


def mixed_placement(old: Placement, new: Placement, layers: tuple[int, ...]) -> Placement:
    """`new` in the decoder layers `layers`, `old` in the others."""
    assert old.moe_layers == new.moe_layers and old.slots.keys() == new.slots.keys()
    slots = {
        uid: tuple(
            new.slots[uid][i] if layer in layers else old.slots[uid][i]
            for i, layer in enumerate(old.moe_layers)
        )
        for uid in old.slots
    }
    mixed = msgspec.structs.replace(old, slots=slots)
    mixed.check()
    return mixed


def moves_between(old: Placement, new: Placement) -> tuple[Move, ...]:
    """Experts that shards hold in `new` and not in `old`."""
    moves = []
    for index, layer in enumerate(old.moe_layers):
        holders: dict[int, list[str]] = {}
        for uid, layers in old.slots.items():
            for expert in layers[index]:
                holders.setdefault(expert, []).append(uid)
        for uid in new.slots:
            for expert in sorted(set(new.slots[uid][index]) - set(old.slots[uid][index])):
                sources = tuple(sorted(holders[expert]))
                moves.append(Move(layer=layer, expert=expert, to_shard=uid, from_shards=sources))
    return tuple(moves)


def report_text(report: dict[str, Any]) -> str:
    """A report of `remora rebalance` for people."""
    if "tokens" not in report:  # asked again under an id that is known
        return f"{report['reason']}: {operation_text(report['operation'])}"
    lines = [
        f"planned from {report['tokens']:,} tokens against epoch {report['epoch']}",
        f"  remote copies a token and layer  {report['copies_before']:.3f} ->"
        f" {report['copies_after']:.3f}",
        f"  load, largest over mean shard    {report['load_before']:.3f} ->"
        f" {report['load_after']:.3f}",
        f"  {report['moved_experts']} experts in {len(report['layers'])} layers to move,"
        f" {report['moved_bytes'] / 2**20:.1f} MiB;"
        f" saves {report['saved_bytes'] / 2**20:.1f} MiB over the horizon",
        f"  {report['verdict']}: {report['reason']}",
    ]
    for move in report["moves"][:MOVES_SHOWN]:
        lines.append(
            f"  layer {move['layer']:>3} expert {move['expert']:>4}:"
            f" {'|'.join(move['from_shards'])} -> {move['to_shard']}"
        )
    more = len(report["moves"]) - MOVES_SHOWN
    if more > 0:
        lines.append(f"  ... and {more} more (--json shows all)")
    if "applied_epoch" in report:
        took_s = report["operation"]["ended_s"]
        lines.append(f"done in {took_s:.1f} s: it serves since epoch {report['applied_epoch']}")
    if "not_applied" in report:
        lines.append(f"not applied: {report['not_applied']}")
    if report.get("written"):
        lines.append(_written_text(report["written"], from_trace="trace" in report))
    return "\n".join(lines)


def _written_text(file: str, *, from_trace: bool) -> str:
    if from_trace:  # of no deployment: nobody looks for it there
        return (
            f"written to {file}: start with --placement {file}, or remora placement import {file}"
        )
    return f"written to {file}, for starts with experts.placement: latest"


def _fields(layer: LayerOutcome) -> dict[str, Any]:
    return {name: getattr(layer, name) for name in LayerOutcome.__slots__}
