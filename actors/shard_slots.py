"""Slots of a shard that serves: experts come, are checked and go, between the calls it answers.

Second copies come the same way, when nothing else is to be loaded and as long as the host has
memory to spare. Loading runs beside the serving thread, at idle priority, into slots that nobody is
served from. Whatever changes what is served, and the canaries, runs in the serving thread between
two calls.
"""

import logging
import threading
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Final, TypeVar

import torch
from blake3 import blake3

from remora.actors.copy_pace import Effort, Pace
from remora.actors.expert_copies import CopyTaker
from remora.actors.expert_state import SLOTS_TRIED_MAX, ExpertDigest, Pair, unusable
from remora.actors.host_memory import free_memory
from remora.actors.launch import CopyOrder, ShardLaunch, take_threads
from remora.actors.manifest import digest_expert
from remora.actors.shard_model import ShardExperts
from remora.actors.thread_policy import run_idle
from remora.comm.errors import ClusterError, DeadlineError, WeightsError

logger = logging.getLogger(__name__)

T = TypeVar("T")

Settle = Callable[[int, ExpertDigest, str], bool]

SETTLED_TOGETHER: Final = 32  # copies: the serving thread is asked once for so many
CANARY_BYTES: Final = 4 << 20  # of weights that canaries read between two calls, or one expert's
COPIES_FREE_BYTES: Final = 1 << 30  # that a host keeps free when second copies are made
COPIES_LEAST_BYTES: Final = 512 << 20  # with less than that they are given up
BETWEEN_CALLS_S: Final = 60.0  # for the serving thread to come to what it is asked
CANARY_ROWS: Final = 2


class ShardSlots:
    """Used by Ray's threads.

    Args:
        call_soon: runs something in the serving thread, between two calls.
        launch: of the shard.

    Attributes:
        pace: how fast experts are taken in, but by orders that yield to nobody.
        num_copied, num_loaded: experts taken from replicas, and from the checkpoint.
        num_adopted: experts that were here already, as second copies.
    """

    def __init__(
        self,
        shard: ShardExperts,
        call_soon: Callable[[Callable[[], None]], None],
        launch: ShardLaunch,
    ) -> None:
        self._shard = shard
        self._call_soon = call_soon
        self._launch = launch
        self.pace = Pace(launch.copy_bytes_per_s)
        self.num_copied = self.num_loaded = self.num_adopted = 0
        self._loading = threading.Lock()
        self._first = threading.Lock()  # held by loads: second copies wait for it
        self._turn = 0  # of the shard's state, when the load that runs was asked for

    def load(self, order: CopyOrder) -> dict[Pair, str]:
        """Take experts into free slots; digests of what the slots hold.

        A second copy is served where it lies. Anything else is copied from the first replica that
        gives it and whose bytes have the digest, else loaded from the checkpoint: then a slot that
        holds something else is not used again.

        Raises:
            ClusterError: no free slot; `keep` was called meanwhile; or another coordinator has
                taken over.
            WeightsError: the checkpoint is not what it was, or slots do not hold what is written
                into them.
        """
        self.between_calls(lambda: self._shard.state.obey(order.term))
        turn = self._shard.state.turn
        pace = self._pace_of(order)
        with self._first, self._loading:
            self._turn = turn
            if order.is_urgent:
                return self._load(order, pace)
            return run_idle("remora-slots", lambda: self._load(order, pace))

    def hold_copies(self, order: CopyOrder) -> dict[Pair, str]:
        """Have second copies of these experts, and no others, as far as there is room and the host
        has memory; digests of those that there are.

        Loads go between two experts; another call of this ends it.

        Raises:
            ClusterError: another coordinator has taken over, or others are wanted by now.
        """
        turn = self.between_calls(partial(self._want_copies, order))
        pace = self._pace_of(order)
        run_idle("remora-copies", lambda: self._copy_all(order, turn, pace))
        return {pair: each.digest for pair, each in list(self._shard.state.copies.items())}

    def mind_memory(self) -> None:
        """Give second copies up where the host has hardly any memory left."""
        copies = self._shard.state.copies
        if copies and free_memory() < COPIES_LEAST_BYTES:
            logger.warning("%d second copies are given up: memory is short", len(copies))
            self.between_calls(self._give_up_all)

    def canary(self, pairs: Sequence[Pair]) -> dict[Pair, str]:
        """Hashes of what each of some experts makes of fixed rows; calls are served in between.

        Raises:
            ClusterError: an expert is not held.
        """
        found: dict[Pair, str] = {}
        for layer, experts in self._canary_batches(pairs):
            found |= self.between_calls(partial(self._canary, layer, experts))
        return found

    def keep(self, experts: Mapping[int, Sequence[int]], term: int = 0) -> None:
        """Serve no other expert than those of `experts` (by decoder layer); second copies stay.

        Raises:
            ClusterError: another coordinator than that of this `term` has taken over.
        """
        self.between_calls(lambda: self._keep(experts, term))

    def between_calls(self, work: Callable[[], T]) -> T:
        """Run `work` in the serving thread when no call is computed; what it returns, or raises.

        Raises:
            DeadlineError: the thread did not come to it.
        """
        done: Future[T] = Future()

        def run() -> None:
            try:
                done.set_result(work())
            except Exception as failure:  # handed to whoever waits
                done.set_exception(failure)

        self._call_soon(run)
        try:
            return done.result(BETWEEN_CALLS_S)
        except TimeoutError:
            raise DeadlineError(
                f"the serving thread did not come to it within {BETWEEN_CALLS_S:g} s"
            ) from None

    # -- inside -------------------------------------------------------------------------------

    def _load(self, order: CopyOrder, pace: Pace) -> dict[Pair, str]:
        take_threads(self._launch.num_threads)
        taker, effort = CopyTaker(order.sources, self._launch), Effort(pace)
        state, copied = self._shard.state, Filled(self._settle_all)
        found: dict[Pair, str] = {}
        try:
            for pair, wanted in order.digests.items():
                effort.pause()
                state.check_turn(self._turn)  # the next load waits for the end of this one
                held = state.digest_of(*pair)  # asked before, the answer got lost
                if held is None and pair in state.copies:
                    held = self._adopted(pair)
                if held is None and self._copied(taker, pair, order, pace, copied):
                    held = wanted
                if held is None:
                    copied.settle()
                    held = self._loaded(pair, wanted, pace, self._settle)
                found[pair] = held
            copied.settle()
            return found
        finally:
            taker.close()
            self._shard.reader.close()

    def _want_copies(self, order: CopyOrder) -> int:
        state = self._shard.state
        state.obey(order.term)
        for pair in state.want_copies(order.digests):
            self._shard.give_up_copy(*pair)
        return state.copies_turn

    def _pace_of(self, order: CopyOrder) -> Pace:
        """That which others change, from the order's share on; or one of its own."""
        if order.share is None:
            return Pace(self._launch.copy_bytes_per_s)
        self.pace.set_share(order.share)
        return self.pace

    def _copy_all(self, order: CopyOrder, turn: int, pace: Pace) -> None:
        """One expert after the other, as long as nobody wants anything else."""
        take_threads(self._launch.num_threads)
        shard, taker = self._shard, CopyTaker(order.sources, self._launch)
        effort = Effort(pace)

        def settle(slot: int, digest: ExpertDigest, wanted: str) -> bool:
            shard.state.check_copies_turn(turn)
            return shard.settle_copy(slot, digest, wanted)

        try:
            for pair, wanted in order.digests.items():
                effort.pause()
                with self._first:  # whoever waits for it goes before the next expert
                    pass
                with self._loading:
                    if shard.state.copies_turn != turn:
                        return
                    if not shard.wants_copy(*pair):
                        continue
                    if free_memory() < COPIES_FREE_BYTES + shard.nbytes_of(pair[0]):
                        logger.warning("no more second copies: memory is short")
                        return
                    one = Filled(lambda filled: self._settle_each(settle, filled))
                    if self._copied(taker, pair, order, pace, one):
                        one.settle()
                    else:
                        self._loaded(pair, wanted, pace, settle)
        except WeightsError:  # nothing serves from it; who needs it loads it, and says so
            logger.exception("no more second copies")
        finally:
            taker.close()
            with self._loading:
                shard.reader.close()

    def _give_up_all(self) -> None:
        for pair in list(self._shard.state.copies):
            self._shard.give_up_copy(*pair)

    def _adopted(self, pair: Pair) -> str | None:
        """From a second copy in this shard; None: there is none any more."""
        digest = self.between_calls(partial(self._adopt, pair))
        self.num_adopted += digest is not None
        return digest

    def _adopt(self, pair: Pair) -> str | None:
        self._shard.state.check_turn(self._turn)
        return self._shard.adopt_copy(*pair)

    def _copied(
        self, taker: CopyTaker, pair: Pair, order: CopyOrder, pace: Pace, filled: "Filled"
    ) -> bool:
        """From the first replica that has it, for `filled` to settle; False: none has."""
        shard, (layer, expert) = self._shard, pair
        for uid in order.replicas.get(pair, ()):
            slot = shard.state.slot_for(layer, expert, filled)
            write = partial(taker.take, uid, pair, pace)
            digest = shard.copy_slot(layer, expert, slot, write)
            if digest is None:
                continue
            if digest.digest != order.digests[pair]:  # the slot may be sound: the checkpoint tells
                logger.error("layer %d expert %d: the copy from %s is another one", *pair, uid)
                continue
            filled.add(slot, digest)
            self.num_copied += 1
            return True
        return False

    def _loaded(self, pair: Pair, wanted: str, pace: Pace, settle: Settle) -> str:
        """From the checkpoint."""
        shard, (layer, expert) = self._shard, pair
        pace.take(shard.nbytes_of(layer))
        tensors = shard.reader.read(layer, expert)
        is_plain = shard.experts_dtype == "auto"
        found = digest_expert(layer, expert, tensors).digest if is_plain else wanted
        if found != wanted:  # what is quantised is known by what a slot holds
            raise WeightsError(
                f"layer {layer} expert {expert}: the checkpoint gives {found}, and gave {wanted}"
                " when the deployment started: is it another one?"
            )
        for _ in range(SLOTS_TRIED_MAX):
            slot = shard.state.slot_for(layer, expert)
            try:
                digest = shard.fill_slot(layer, expert, slot, tensors)
            except ValueError as wrong:
                raise WeightsError(f"layer {layer} expert {expert}: {wrong}") from None
            if self.between_calls(partial(settle, slot, digest, wanted)):
                self.num_loaded += 1
                return wanted
            logger.error("layer %d slot %d does not hold what was to be there", layer, slot)
        raise unusable(layer, expert, digest.digest, wanted)

    def _settle(self, slot: int, digest: ExpertDigest, wanted: str) -> bool:
        self._shard.state.check_turn(self._turn)
        return self._shard.settle(slot, digest, wanted)

    def _settle_all(self, filled: Sequence[tuple[int, ExpertDigest]]) -> None:
        self._settle_each(self._settle, filled)

    def _settle_each(self, settle: Settle, filled: Sequence[tuple[int, ExpertDigest]]) -> None:
        """Copies that hold what was wanted, in one go."""

        def work() -> None:
            for slot, digest in filled:
                settle(slot, digest, digest.digest)

        self.between_calls(work)

    def _canary_batches(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, list[int]]]:
        """What is computed in one go: of one layer, where rows do not depend on each other."""
        shard = self._shard
        by_layer: dict[int, list[int]] = {}
        for layer, expert in pairs:
            if shard.state.digest_of(layer, expert) is None:
                raise ClusterError(f"layer {layer} expert {expert} is not held")
            by_layer.setdefault(layer, []).append(expert)
        for layer, experts in by_layer.items():
            is_native = shard.native is not None and layer in shard.native
            size = max(1, CANARY_BYTES // shard.nbytes_of(layer)) if is_native else 1
            for start in range(0, len(experts), size):
                yield layer, experts[start : start + size]

    def _canary(self, layer: int, experts: list[int]) -> dict[Pair, str]:
        shard = self._shard
        missing = shard.state.not_mine(layer, experts)
        if missing:
            raise ClusterError(f"layer {layer}: experts {missing} are not held")
        count = CANARY_ROWS * shard.spec.hidden_size
        # multiples of 1/64 below 2: exact in bfloat16
        values = (torch.arange(count) * 7919 % 251 - 125).to(torch.float32) / 64
        rows_MD = values.view(CANARY_ROWS, -1).to(shard.dtype)
        row_N = torch.arange(CANARY_ROWS).repeat(len(experts))
        expert_N = torch.tensor(experts).repeat_interleave(CANARY_ROWS)
        one_N = torch.ones(len(row_N))
        out_ND = shard.forward(layer, rows_MD, row_N, expert_N, one_N, "ordered").contiguous()
        outputs = out_ND.view(len(experts), -1).view(torch.uint8).numpy()
        return {
            (layer, expert): blake3(output.tobytes()).hexdigest()
            for expert, output in zip(experts, outputs, strict=True)
        }

    def _keep(self, experts: Mapping[int, Sequence[int]], term: int) -> None:
        self._shard.state.obey(term)
        for pair in self._shard.state.keep(experts):
            self._shard.drop_expert(*pair)


class Filled(Container[tuple[int, int]]):
    """Slots that hold copies which nobody is served from yet, to be settled together.

    Args:
        settle: called with (slot, digest of what it holds) of each.
    """

    def __init__(self, settle: Callable[[Sequence[tuple[int, ExpertDigest]]], None]) -> None:
        self._settle = settle
        self._slots: dict[tuple[int, int], ExpertDigest] = {}

    def __contains__(self, place: object) -> bool:
        """Whether a (layer, slot) is one of them."""
        return place in self._slots

    def add(self, slot: int, digest: ExpertDigest) -> None:
        """One more; after `SETTLED_TOGETHER` they are settled."""
        self._slots[digest.layer, slot] = digest
        if len(self._slots) >= SETTLED_TOGETHER:
            self.settle()

    def settle(self) -> None:
        """Those that there are."""
        if self._slots:
            self._settle([(slot, digest) for (_, slot), digest in self._slots.items()])
            self._slots.clear()
