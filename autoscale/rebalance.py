"""When experts move: a plan against its cost. Pure: what was measured and the time are arguments.

    proposal = propose(policy, changes)              # which layers are worth their moves
    decision, memory = decide(policy, memory, proposal, tokens=..., now_s=...)

Layers are independent: a round takes those that save most a moved byte, up to `moves_max` moves,
and leaves the others as they are. A round moves when what it saves over the horizon is more than
what moving costs (docs/router.md, The online loop), when several plans one after the other say so
(hysteresis), and not soon after the last one (cooldown).

Units: copies are rows to remote hosts, per token, one way; load is the largest over the mean load
of a shard; a copy takes `row_bytes` of the wire, there and back.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from remora.comm.objective import Objective

Verdict = Literal["move", "confirm", "wait", "keep"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RebalancePolicy:
    """Bounds of the online loop."""

    horizon_tokens: float = 1e6  # that the new placement is expected to serve
    gain_min: float = 0.05  # share of the cost that a round must save
    margin: float = 1.0  # saved bytes over moved bytes: more than this
    load_copies: float = 0.5  # copies a token that one unit of load is worth; chosen, not measured
    confirmations: int = 2  # plans in a row that must say so
    cooldown_s: float = 600.0  # after a round
    tokens_min: float = 5_000.0  # of statistics
    moves_max: int = 4096  # experts fetched in one round, over all layers


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerChange:
    """What a plan would change in one MoE layer."""

    layer: int  # decoder layer
    copies_before: float
    copies_after: float
    load_before: float
    load_after: float
    moved: int  # experts that some shard must fetch

    def saved_copies(self, policy: RebalancePolicy) -> float:
        """Copies a token that it saves, load included at its price."""
        load = self.load_before - self.load_after
        return self.copies_before - self.copies_after + policy.load_copies * load

    def cost_before(self, policy: RebalancePolicy) -> float:
        """Copies a token that it costs now, load beyond an even one included."""
        return self.copies_before + policy.load_copies * max(0.0, self.load_before - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """The layers of one round."""

    layers: tuple[int, ...]  # decoder layers that would change
    moved: int
    moved_bytes: int
    saved_bytes: float  # over the horizon
    gain_ratio: float  # of the cost of all layers


@dataclass(frozen=True, slots=True, kw_only=True)
class RebalanceMemory:
    """What the loop remembers between rounds."""

    confirmed: int = 0  # plans in a row that were worth it
    last_move_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to do now, and why."""

    verdict: Verdict
    reason: str


def objective_of(policy: RebalancePolicy, *, expert_bytes: int, row_bytes: int) -> Objective:
    """What a plan is judged by: moves at the price that `propose` asks of them. Else a search would
    leave out moves that are worth it, or make some for which the whole layer is then refused.

    Args:
        expert_bytes, row_bytes: as of `propose`.
    """
    move_rows = policy.margin * expert_bytes / row_bytes
    return Objective(nu=move_rows, horizon_tokens=policy.horizon_tokens)


def propose(
    policy: RebalancePolicy,
    changes: Sequence[LayerChange],
    *,
    expert_bytes: int,
    row_bytes: int,
) -> Proposal:
    """The layers that are worth their moves, best saving a moved expert first, within `moves_max`.

    Args:
        changes: of every MoE layer.
        expert_bytes: one expert's weights in one layer.
        row_bytes: of one copy, there and back.
    """
    worth = []
    for change in changes:
        saved_bytes = change.saved_copies(policy) * row_bytes * policy.horizon_tokens
        if saved_bytes > policy.margin * change.moved * expert_bytes:
            worth.append(change)
    worth.sort(key=lambda c: (-c.saved_copies(policy) / max(c.moved, 1), c.layer))
    taken: list[LayerChange] = []
    moved = 0
    for change in worth:
        if moved + change.moved <= policy.moves_max:
            taken.append(change)
            moved += change.moved
    saved = sum(change.saved_copies(policy) for change in taken)
    cost = sum(change.cost_before(policy) for change in changes)
    return Proposal(
        layers=tuple(sorted(change.layer for change in taken)),
        moved=moved,
        moved_bytes=moved * expert_bytes,
        saved_bytes=saved * row_bytes * policy.horizon_tokens,
        gain_ratio=saved / cost if cost > 0 else 0.0,
    )


def decide(
    policy: RebalancePolicy,
    memory: RebalanceMemory,
    proposal: Proposal,
    *,
    tokens: float,
    now_s: float,
) -> tuple[Decision, RebalanceMemory]:
    """Whether to move now, and what to remember until the next plan.

    Args:
        tokens: weight of the statistics that the plan was made from.
        now_s: of any clock that does not go backwards.
    """
    forget = RebalanceMemory(last_move_s=memory.last_move_s)
    if tokens < policy.tokens_min:
        reason = f"{tokens:.0f} tokens seen, {policy.tokens_min:.0f} are needed"
        return Decision(verdict="wait", reason=reason), forget
    if not proposal.layers or proposal.gain_ratio < policy.gain_min:
        reason = f"gain {proposal.gain_ratio:.1%}, {policy.gain_min:.1%} is needed"
        return Decision(verdict="keep", reason=reason), forget
    confirmed = RebalanceMemory(confirmed=memory.confirmed + 1, last_move_s=memory.last_move_s)
    if confirmed.confirmed < policy.confirmations:
        reason = f"plan {confirmed.confirmed} of {policy.confirmations} that must say so"
        return Decision(verdict="confirm", reason=reason), confirmed
    if memory.last_move_s is not None and now_s - memory.last_move_s < policy.cooldown_s:
        left_s = policy.cooldown_s - (now_s - memory.last_move_s)
        reason = f"the last round was {now_s - memory.last_move_s:.0f} s ago, {left_s:.0f} s to go"
        return Decision(verdict="wait", reason=reason), confirmed
    reason = (
        f"saves {proposal.saved_bytes:.3g} bytes over {policy.horizon_tokens:.3g} tokens for"
        f" {proposal.moved_bytes:.3g} moved"
    )
    return Decision(verdict="move", reason=reason), RebalanceMemory(last_move_s=now_s)
