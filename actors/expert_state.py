"""Which slot of an expert shard holds which expert, and which may be filled. Pure.

A slot is free, holds a published expert, or is known to be bad: what it was filled with was not
what it held afterwards. Filling a free slot changes nothing here; `settle` decides by the digest of
what the slot holds whether the expert is served from it or nobody uses the slot again.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import msgspec

from remora.comm.errors import ClusterError, WeightsError

Pair = tuple[int, int]  # decoder layer, logical expert
SLOTS_TRIED_MAX: Final = 2  # for one expert


class ExpertDigest(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """One logical expert: `expert` of decoder layer `layer`."""

    layer: int
    expert: int
    digest: str  # 64 hex digits of blake3
    nbytes: int


class ExpertState:
    """The slots of one shard.

    Args:
        num_slots: decoder layer -> slots.

    Attributes:
        digests: of what is held.
        turn: how often it was told what to keep. A copy that began before the last time is of an
            operation that is over: it is not wanted any more, and would take a slot for good.
    """

    def __init__(self, num_slots: Mapping[int, int]) -> None:
        self._num_slots = dict(num_slots)
        self._slot_of: dict[int, dict[int, int]] = {layer: {} for layer in num_slots}
        self._bad: dict[int, set[int]] = {layer: set() for layer in num_slots}
        self.digests: dict[Pair, ExpertDigest] = {}
        self.turn = 0

    @property
    def layers(self) -> tuple[int, ...]:
        """Decoder layers with slots, ascending."""
        return tuple(sorted(self._slot_of))

    def slot_of(self, layer: int, expert: int) -> int | None:
        """The slot of an expert that is held; None of any other."""
        return self._slot_of.get(layer, {}).get(expert)

    def digest_of(self, layer: int, expert: int) -> str | None:
        """Digest of an expert that is held; None of any other."""
        found = self.digests.get((layer, expert))
        return None if found is None else found.digest

    def experts_of(self, layer: int) -> tuple[int, ...]:
        """Logical experts held of a decoder layer, in slot order; none of an unknown layer."""
        slot_of = self._slot_of.get(layer, {})
        return tuple(sorted(slot_of, key=slot_of.__getitem__))

    def not_mine(self, layer: int, experts: Iterable[int]) -> list[int]:
        """Those of `experts` that are not held, ascending."""
        return sorted(set(experts) - self._slot_of.get(layer, {}).keys())

    def free_slots(self, layer: int) -> list[int]:
        """Slots of a decoder layer that hold nothing, and are not known to be bad, ascending."""
        if layer not in self._num_slots:
            return []
        taken = {*self._slot_of[layer].values(), *self._bad[layer]}
        return [slot for slot in range(self._num_slots[layer]) if slot not in taken]

    def room(self, layer: int) -> int:
        """Slots of a decoder layer that may hold something; 0 of an unknown layer."""
        return self._num_slots.get(layer, 0) - len(self._bad.get(layer, ()))

    def slot_for(self, layer: int, expert: int) -> int:
        """The free slot to be filled with an expert. Raises ClusterError: there is none."""
        free = self.free_slots(layer)
        if not free:
            raise ClusterError(f"layer {layer}: no slot is free for expert {expert}")
        return free[0]

    def check_turn(self, turn: int) -> None:
        """Raises ClusterError: what is to be kept was told since the turn in which a copy began."""
        if turn != self.turn:
            raise ClusterError("what was being copied is not wanted any more")

    def settle(self, slot: int, found: ExpertDigest, wanted: str) -> bool:
        """A free slot has been filled and holds `found`: served from now on if that is what was
        wanted (True), else nobody uses the slot again."""
        assert slot in self.free_slots(found.layer), f"layer {found.layer} slot {slot} is not free"
        if found.digest != wanted:
            self._bad[found.layer].add(slot)
            return False
        self._slot_of[found.layer][found.expert] = slot
        self.digests[found.layer, found.expert] = found
        return True

    def drop(self, layer: int, expert: int) -> int:
        """Forget an expert that is held; its slot, free now."""
        del self.digests[layer, expert]
        return self._slot_of[layer].pop(expert)

    def keep(self, kept: Mapping[int, Sequence[int]]) -> list[Pair]:
        """Hold no more than `kept` (experts by decoder layer) from now on; what is to be dropped
        for that comes back."""
        self.turn += 1
        return [
            (layer, expert)
            for layer in self.layers
            for expert in sorted(self._slot_of[layer].keys() - set(kept.get(layer, ())))
        ]


def unusable(layer: int, expert: int, found: str, wanted: str) -> WeightsError:
    """For `SLOTS_TRIED_MAX` slots that did not hold what was written into them."""
    return WeightsError(
        f"layer {layer} expert {expert}: {SLOTS_TRIED_MAX} slots in turn held {found} after"
        f" loading, not {wanted}"
    )
