"""Which slot of an expert shard holds which expert, and which may be filled. Pure.

A slot is free, holds a published expert, or is known to be bad: what it was filled with was not
what it held afterwards. Filling a free slot changes nothing here; `settle` decides by the digest of
what the slot holds whether the expert is served from it or nobody uses the slot again.

Slots beyond those that a view may fill are for *second copies*: experts that are held for the day
on which whoever serves them is lost, and that nobody is served from. Any slot may hold one, their
number is what is bounded: so one that is to be served is where it is already.
"""

from collections.abc import Container, Iterable, Mapping, Sequence
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
        num_slots: decoder layer -> slots that a view may fill.
        num_copies: slots of each layer beside them, for second copies.

    Attributes:
        digests: of what is held.
        copies: digests of second copies; the same experts are in no other slot.
        copies_turn: how often it was told which second copies are wanted.
        term: of the coordinator that was obeyed last.
        turn: how often it was told what to keep. A copy that began before the last time is of an
            operation that is over: it is not wanted any more, and would take a slot for good.
    """

    def __init__(self, num_slots: Mapping[int, int], num_copies: int = 0) -> None:
        self._num_slots = dict(num_slots)
        self._num_copies = num_copies
        self._slot_of: dict[int, dict[int, int]] = {layer: {} for layer in num_slots}
        self._copy_of: dict[int, dict[int, int]] = {layer: {} for layer in num_slots}
        self._bad: dict[int, set[int]] = {layer: set() for layer in num_slots}
        self._copies_wanted: frozenset[Pair] = frozenset()
        self.digests: dict[Pair, ExpertDigest] = {}
        self.copies: dict[Pair, ExpertDigest] = {}
        self.turn = self.copies_turn = self.term = 0

    def obey(self, term: int) -> None:
        """A coordinator of this term gives an order. Raises ClusterError: another one has taken
        over since, and what it decided would be undone."""
        if term < self.term:
            raise ClusterError(
                f"an order of a coordinator of term {term}, but that of term {self.term} has taken"
                " over"
            )
        self.term = term

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
        taken = {*self._slot_of[layer].values(), *self._copy_of[layer].values(), *self._bad[layer]}
        num_slots = self._num_slots[layer] + self._num_copies
        return [slot for slot in range(num_slots) if slot not in taken]

    def num_slots(self, layer: int) -> int:
        """Slots of a decoder layer that a view may fill, and bad ones; 0 of an unknown layer."""
        return self._num_slots.get(layer, 0)

    def room(self, layer: int) -> int:
        """Slots of a decoder layer that a view may fill; 0 of an unknown layer. Bad ones are taken
        from those for second copies first."""
        return min(self._num_slots.get(layer, 0), self._num_sound(layer))

    def slot_for(self, layer: int, expert: int, filled: Container[tuple[int, int]] = ()) -> int:
        """The free slot to be filled with an expert.

        Args:
            filled: (layer, slot) of free ones that are filled, and not settled yet.

        Raises:
            ClusterError: there is none.
        """
        free = [slot for slot in self.free_slots(layer) if (layer, slot) not in filled]
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
        if not self._is_sound(slot, found, wanted):
            return False
        self._slot_of[found.layer][found.expert] = slot
        self.digests[found.layer, found.expert] = found
        return True

    def drop(self, layer: int, expert: int) -> int | None:
        """Hold an expert no more; its slot, free now, or None: it stays as a second copy."""
        found = self.digests.pop((layer, expert))
        slot = self._slot_of[layer].pop(expert)
        if (layer, expert) not in self._copies_wanted or not self.may_copy(layer):
            return slot
        self._copy_of[layer][expert] = slot
        self.copies[layer, expert] = found
        return None

    # -- second copies ------------------------------------------------------------------------

    def want_copies(self, wanted: Iterable[Pair]) -> list[Pair]:
        """Second copies of these, and no others, from now on; what is to be given up for that comes
        back."""
        self.copies_turn += 1
        self._copies_wanted = frozenset(wanted)
        return sorted(self.copies.keys() - self._copies_wanted)

    def check_copies_turn(self, turn: int) -> None:
        """Raises ClusterError: other second copies are wanted since `turn`."""
        if turn != self.copies_turn:
            raise ClusterError("other second copies are wanted by now")

    def may_copy(self, layer: int) -> bool:
        """Whether there is room for one more second copy of a decoder layer. What is held beyond
        `room` (second copies that a view names by now) counts as one still."""
        return self._num_beyond(layer) < 0

    def copies_beyond(self, layer: int) -> list[Pair]:
        """Second copies of a decoder layer that must be given up, since slots have gone bad."""
        held = sorted(self._copy_of[layer], reverse=True)
        return [(layer, expert) for expert in held[: max(0, self._num_beyond(layer))]]

    def settle_copy(self, slot: int, found: ExpertDigest, wanted: str) -> bool:
        """As `settle`, of a second copy."""
        if not self._is_sound(slot, found, wanted):
            return False
        self._copy_of[found.layer][found.expert] = slot
        self.copies[found.layer, found.expert] = found
        return True

    def adopt_copy(self, layer: int, expert: int) -> int | None:
        """Hold what has been a second copy; its slot, or None: there is none."""
        found = self.copies.pop((layer, expert), None)
        if found is None:
            return None
        slot = self._copy_of[layer].pop(expert)
        self._slot_of[layer][expert] = slot
        self.digests[layer, expert] = found
        return slot

    def give_up_copy(self, layer: int, expert: int) -> int:
        """Forget a second copy; its slot, free now."""
        del self.copies[layer, expert]
        return self._copy_of[layer].pop(expert)

    def slot_in_memory(self, layer: int, expert: int) -> int | None:
        """The slot of an expert that is held, or there is a second copy of; None of any other."""
        slot = self.slot_of(layer, expert)
        return self._copy_of.get(layer, {}).get(expert) if slot is None else slot

    def _num_sound(self, layer: int) -> int:
        if layer not in self._num_slots:
            return 0
        return self._num_slots[layer] + self._num_copies - len(self._bad[layer])

    def _num_beyond(self, layer: int) -> int:
        """Second copies beyond the slots that there are for them."""
        room, num_held = self.room(layer), len(self._slot_of[layer])
        return len(self._copy_of[layer]) + max(room, num_held) - self._num_sound(layer)

    def _is_sound(self, slot: int, found: ExpertDigest, wanted: str) -> bool:
        assert slot in self.free_slots(found.layer), f"layer {found.layer} slot {slot} is not free"
        if found.digest != wanted:
            self._bad[found.layer].add(slot)
        return found.digest == wanted

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
