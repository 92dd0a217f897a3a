"""Slots of a shard that serves: experts come, are checked and go, between the calls it answers.

Second copies come the same way, when nothing else is to be loaded and as long as the host has
memory to spare. Loading runs beside the serving thread, at idle priority, into slots that nobody is
served from. Whatever changes what is served, and the canaries, runs in the serving thread between
two calls.
"""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Final, TypeVar

import torch
from blake3 import blake3

from remora.actors.copy_pace import Pace
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
        pace: how fast experts are taken in.
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
        with self._first, self._loading:
            self._turn = turn
            if order.is_urgent:
                return self._load(order)
            return run_idle("remora-slots", lambda: self._load(order))

    def hold_copies(self, order: CopyOrder) -> dict[Pair, str]:
        """Have second copies of these experts, and no others, as far as there is room and the host
        has memory; digests of those that there are.

        Loads go between two experts; another call of this ends it.

        Raises:
            ClusterError: another coordinator has taken over, or others are wanted by now.
        """
        turn = self.between_calls(partial(self._want_copies, order))
        run_idle("remora-copies", lambda: self._copy_all(order, turn))
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
        return {pair: self.between_calls(partial(self._canary, pair)) for pair in pairs}

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

    def _load(self, order: CopyOrder) -> dict[Pair, str]:
        take_threads(self._launch.num_threads)
        taker = CopyTaker(order.sources, self._launch)
        found: dict[Pair, str] = {}
        try:
            for pair, wanted in order.digests.items():
                held = self._shard.state.digest_of(*pair)  # asked before, the answer got lost
                found[pair] = held or (
                    self._adopted(pair)
                    or self._copied(taker, pair, order, self._settle)
                    or self._loaded(pair, wanted, self._settle)
                )
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

    def _copy_all(self, order: CopyOrder, turn: int) -> None:
        """One expert after the other, as long as nobody wants anything else."""
        take_threads(self._launch.num_threads)
        shard, taker = self._shard, CopyTaker(order.sources, self._launch)

        def settle(slot: int, digest: ExpertDigest, wanted: str) -> bool:
            shard.state.check_copies_turn(turn)
            return shard.settle_copy(slot, digest, wanted)

        try:
            for pair, wanted in order.digests.items():
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
                    if not self._copied(taker, pair, order, settle):
                        self._loaded(pair, wanted, settle)
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
        """From a second copy in this shard; None: there is none."""
        digest = self.between_calls(partial(self._adopt, pair))
        self.num_adopted += digest is not None
        return digest

    def _adopt(self, pair: Pair) -> str | None:
        self._shard.state.check_turn(self._turn)
        return self._shard.adopt_copy(*pair)

    def _copied(self, taker: CopyTaker, pair: Pair, order: CopyOrder, settle: Settle) -> str | None:
        """From the first replica that has it; None: none has."""
        shard, (layer, expert) = self._shard, pair
        wanted = order.digests[pair]
        for uid in order.replicas.get(pair, ()):
            slot = shard.state.slot_for(layer, expert)
            write = partial(taker.take, uid, pair, self.pace)
            digest = shard.copy_slot(layer, expert, slot, write)
            if digest is None:
                continue
            if digest.digest != wanted:  # the slot may be sound: the checkpoint will tell
                logger.error("layer %d expert %d: the copy from %s is another one", *pair, uid)
                continue
            self.between_calls(partial(settle, slot, digest, wanted))
            self.num_copied += 1
            return wanted
        return None

    def _loaded(self, pair: Pair, wanted: str, settle: Settle) -> str:
        """From the checkpoint."""
        shard, (layer, expert) = self._shard, pair
        self.pace.take(shard.nbytes_of(layer))
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

    def _canary(self, pair: Pair) -> str:
        shard, (layer, expert) = self._shard, pair
        if shard.state.digest_of(layer, expert) is None:
            raise ClusterError(f"layer {layer} expert {expert} is not held")
        count = CANARY_ROWS * shard.spec.hidden_size
        # multiples of 1/64 below 2: exact in bfloat16
        values = (torch.arange(count) * 7919 % 251 - 125).to(torch.float32) / 64
        rows_MD = values.view(CANARY_ROWS, -1).to(shard.dtype)
        row_N = torch.arange(CANARY_ROWS)
        expert_N = torch.full((CANARY_ROWS,), expert)
        out_ND = shard.forward(layer, rows_MD, row_N, expert_N, torch.ones(CANARY_ROWS), "ordered")
        return blake3(out_ND.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()

    def _keep(self, experts: Mapping[int, Sequence[int]], term: int) -> None:
        self._shard.state.obey(term)
        for pair in self._shard.state.keep(experts):
            self._shard.drop_expert(*pair)
