"""Which sequences run in the next step, on which KV blocks. Pure.

Who is smaller in `Sequence.order` (priority, then arrival) goes first, everywhere:

- A step decodes one token of every running sequence, then spends what is left of its token budget
  on chunks of prompts, running and waiting ones merged in order. When the first of the waiting
  cannot start, nobody behind it does, so small prompts never starve a large one.
- A sequence gets blocks for all the tokens it knows when it starts, and one more block whenever
  its newest token needs one. When none is available it takes them from the last in order
  (preemption: the victim waits again and is recomputed). The last itself keeps its blocks and
  sits the step out; nobody waits for ever, as the first in order fits alone (`finish.refusal`) and
  may take everything.
- A waiting sequence starts only when every running one could still grow by a block after it, so
  that it is not preempted at once. It preempts running ones of a worse priority if that helps.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass, field

from remora.actors.blocks import BlockManager, extend_keys
from remora.actors.dense_events import DenseLimits, Slice
from remora.actors.sequence import Phase, Sequence


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.order


def _remove_sorted(sequences: list[Sequence], sequence: Sequence) -> None:
    index = bisect_left(sequences, sequence.order, key=_order)
    found = sequences[index : index + 1]
    assert found == [sequence], f"{sequence} is not where its order says, but {found}"
    del sequences[index]


@dataclass(slots=True)
class _Draft:
    """The step being planned."""

    num_tokens_left: int
    slices: list[Slice] = field(default_factory=list)
    keys: set[bytes] = field(default_factory=set)  # blocks that prompt chunks of the step complete


class Scheduler:
    """Waiting and running sequences and their blocks."""

    def __init__(self, limits: DenseLimits) -> None:
        self.limits = limits
        self.blocks = BlockManager(limits.num_blocks)
        self.waiting: list[Sequence] = []  # sorted by order; no blocks
        self.running: list[Sequence] = []  # sorted by order; len <= max_num_seqs
        self.num_preemptions = 0
        self.num_prefix_hit_tokens = 0

    def enqueue(self, sequence: Sequence) -> None:
        """A new sequence waits for its turn."""
        insort(self.waiting, sequence, key=_order)

    def finish(self, sequence: Sequence) -> None:
        """The sequence is over, wherever it stands; its blocks are available from now on."""
        assert sequence.phase is not Phase.FINISHED, f"{sequence} finishes twice"
        if sequence.phase is Phase.RUNNING:
            _remove_sorted(self.running, sequence)
            self._release(sequence)
        else:
            _remove_sorted(self.waiting, sequence)
        sequence.phase = Phase.FINISHED

    def advance(self, piece: Slice) -> None:
        """The tokens of a slice of a running sequence are computed: their blocks are shareable."""
        sequence = piece.sequence
        num_computed = piece.start + len(piece.token_ids)
        sequence.num_computed = num_computed
        num_full = num_computed // self.limits.block_size
        if num_full > sequence.num_published and self.limits.prefix_caching:
            keys = sequence.block_keys
            extend_keys(keys, sequence.token_ids, num_full, self.limits.block_size)
            for index in range(sequence.num_published, num_full):
                self.blocks.publish(sequence.block_table[index], keys[index])
            sequence.num_published = num_full

    def plan(self) -> list[Slice]:
        """Slices of the next step, decodes first. Empty only when nobody runs or waits."""
        draft = _Draft(self.limits.max_tokens_per_step)
        prefills = self._plan_decodes(draft)
        self._plan_prefills(draft, prefills)
        return draft.slices

    def _plan_decodes(self, draft: _Draft) -> list[Sequence]:
        """Adds every sequence with one token to compute; returns those with more, in order."""
        prefills: list[Sequence] = []
        block_size = self.limits.block_size
        slices = draft.slices
        index = 0
        while index < len(self.running):  # _grow shortens the list behind the index
            sequence = self.running[index]
            index += 1
            num_computed = sequence.num_computed
            token_ids = sequence.token_ids
            if len(token_ids) - num_computed > 1:
                prefills.append(sequence)
                continue
            if num_computed == len(sequence.block_table) * block_size and not self._grow(sequence):
                continue
            if sequence.output_ids:
                slices.append(
                    Slice(
                        sequence=sequence,
                        token_ids=token_ids[-1:],
                        start=num_computed,
                        block_table=sequence.block_table,
                        sample=True,
                    )
                )
                draft.num_tokens_left -= 1
            else:  # the last token of a prompt
                self._add_chunk(draft, sequence)
        return prefills

    def _plan_prefills(self, draft: _Draft, prefills: list[Sequence]) -> None:
        """Spends the budget on running and waiting prompts, merged in order."""
        index = 0
        head_can_start = True
        while draft.num_tokens_left > 0:
            running = prefills[index] if index < len(prefills) else None
            waiting = self.waiting[0] if self.waiting and head_can_start else None
            if waiting is not None and (running is None or waiting.order < running.order):
                head_can_start = self._start(draft, waiting)
            elif running is not None:
                index += 1
                if running.phase is Phase.RUNNING:  # not preempted by a start above
                    self._add_chunk(draft, running)
            else:
                return

    def _add_chunk(self, draft: _Draft, sequence: Sequence) -> None:
        start = sequence.num_computed
        end = min(start + draft.num_tokens_left, len(sequence.token_ids))
        num_prompt_logprobs = 0
        if sequence.needs_prompt_logprobs:
            num_prompt_logprobs = max(0, min(end, len(sequence.prompt_ids) - 1) - start)
        draft.slices.append(
            Slice(
                sequence=sequence,
                token_ids=sequence.token_ids[start:end],
                start=start,
                block_table=sequence.block_table,
                sample=end == len(sequence.token_ids) and sequence.params.max_tokens > 0,
                num_prompt_logprobs=num_prompt_logprobs,
            )
        )
        draft.num_tokens_left -= end - start
        block_size = self.limits.block_size
        draft.keys.update(sequence.block_keys[start // block_size : end // block_size])

    def _grow(self, sequence: Sequence) -> bool:
        """One more block; False when only those before it in order could give one."""
        while self.blocks.num_available == 0:
            victim = self.running[-1]
            if victim is sequence:
                return False
            self._preempt(victim)
        sequence.block_table.extend(self.blocks.allocate(1))
        return True

    def _start(self, draft: _Draft, sequence: Sequence) -> bool:
        """Moves the first of the waiting to the running and adds its first chunk, if it can."""
        block_size = self.limits.block_size
        matched: list[int] = []
        if self.limits.prefix_caching:
            keys = sequence.block_keys
            extend_keys(keys, sequence.token_ids, len(sequence.token_ids) // block_size, block_size)
            # The last token is always computed: its logits are what the next one is sampled from.
            num_matchable = (len(sequence.token_ids) - 1) // block_size
            if not sequence.needs_prompt_logprobs:
                matched = self.blocks.match(keys[:num_matchable])
                if len(matched) < num_matchable and keys[len(matched)] in draft.keys:
                    return False  # this very step computes its next block: a hit in the next one
        num_new = -(-len(sequence.token_ids) // block_size) - len(matched)
        victims = self._victims_for(sequence, num_new, matched)
        if victims is None:
            return False
        for victim in victims:
            self._withdraw(draft, victim)
            self._preempt(victim)
        _remove_sorted(self.waiting, sequence)
        self.blocks.acquire(matched)
        sequence.block_table = matched + self.blocks.allocate(num_new)
        sequence.num_computed = len(matched) * block_size
        sequence.num_published = len(matched)
        sequence.phase = Phase.RUNNING
        insort(self.running, sequence, key=_order)
        if sequence.num_preemptions == 0:
            sequence.num_cached_tokens = sequence.num_computed
            self.num_prefix_hit_tokens += sequence.num_computed
        self._add_chunk(draft, sequence)
        return True

    def _victims_for(
        self, sequence: Sequence, num_new: int, matched: list[int]
    ) -> list[Sequence] | None:
        """Whom to preempt so that a waiting sequence can start; None when that does not help."""
        running = self.running
        num_needed = num_new + self.blocks.num_cached_among(matched)

        def has_room(num_left: int, num_available: int) -> bool:
            if num_left == 0:  # alone it fits: `finish.refusal`
                return True
            return num_left < self.limits.max_num_seqs and num_available >= num_needed + num_left

        num_available = self.blocks.num_available
        if has_room(len(running), num_available):
            return []
        behind = running[bisect_left(running, sequence.order, key=_order) :]
        behind.reverse()
        tables = (victim.block_table for victim in behind)
        gains = self.blocks.reclaimable(tables, set(matched))
        for num_victims, gain in enumerate(gains, start=1):
            if has_room(len(running) - num_victims, num_available + gain):
                return behind[:num_victims]
        return None

    def _withdraw(self, draft: _Draft, victim: Sequence) -> None:
        """Takes a sequence out of the step being planned, if it is in it.

        Its keys stay in the draft: at worst somebody waits a step for a block that does not come.
        """
        kept = [piece for piece in draft.slices if piece.sequence is not victim]
        draft.num_tokens_left += sum(len(piece.token_ids) for piece in draft.slices)
        draft.num_tokens_left -= sum(len(piece.token_ids) for piece in kept)
        draft.slices = kept

    def _preempt(self, victim: Sequence) -> None:
        """The last of the running gives its blocks back and waits to be recomputed."""
        assert victim is self.running[-1], f"{victim} is preempted before {self.running[-1]}"
        self.running.pop()
        self._release(victim)
        if victim.needs_prompt_logprobs:
            victim.prompt_logprobs = []
        victim.num_preemptions += 1
        victim.phase = Phase.WAITING
        insort(self.waiting, victim, key=_order)
        self.num_preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.block_table)
        sequence.block_table = []  # a new list: a step in flight may still read the old one
        sequence.num_computed = 0

    def check_integrity(self) -> None:
        """Raises `AssertionError` with the broken equation and the sequence's story."""
        self.blocks.check_integrity(sequence.block_table for sequence in self.running)
        for name, phase in (("waiting", Phase.WAITING), ("running", Phase.RUNNING)):
            sequences: list[Sequence] = getattr(self, name)
            orders = [sequence.order for sequence in sequences]
            assert orders == sorted(set(orders)), f"{name} is out of order: {orders}"
            for sequence in sequences:
                assert sequence.phase is phase, f"{sequence} among the {name}"
                assert sequence.token_ids == sequence.prompt_ids + sequence.output_ids, (
                    f"{sequence}: {len(sequence.token_ids)} tokens are not its prompt and outputs"
                )
        num_running = len(self.running)
        assert num_running <= self.limits.max_num_seqs, (
            f"running {num_running} > max_num_seqs {self.limits.max_num_seqs}"
        )
        for sequence in self.running:
            room = len(sequence.block_table) * self.limits.block_size
            assert len(sequence.token_ids) - 1 <= room, (
                f"{sequence}: {len(sequence.token_ids)} tokens - 1 > room for {room}"
            )
            assert sequence.num_computed < len(sequence.token_ids), f"{sequence} has nothing to do"
        for sequence in self.waiting:
            assert not sequence.block_table and not sequence.num_computed, f"{sequence} has blocks"
