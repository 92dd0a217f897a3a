"""Slots of a shard that serves: experts come, are checked and go, between the calls it answers.

Loading runs beside the serving thread, at idle priority, into slots that nobody is served from.
Whatever changes what is served, and the canaries, runs in the serving thread between two calls.
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
from remora.actors.launch import CopyOrder, ShardLaunch, take_threads
from remora.actors.manifest import digest_expert
from remora.actors.shard_model import ShardExperts
from remora.actors.thread_policy import run_idle
from remora.comm.errors import ClusterError, DeadlineError, WeightsError

logger = logging.getLogger(__name__)

T = TypeVar("T")

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
        self.num_copied = self.num_loaded = 0
        self._loading = threading.Lock()
        self._turn = 0  # of the shard's state, when the load that runs was asked for

    def load(self, order: CopyOrder) -> dict[Pair, str]:
        """Take experts into free slots; digests of what the slots hold.

        Each is copied from the first replica that gives it and whose bytes have the digest, else
        loaded from the checkpoint: then a slot that holds something else is not used again.

        Raises:
            ClusterError: no free slot; or `keep` was called meanwhile.
            WeightsError: the checkpoint is not what it was, or slots do not hold what is written
                into them.
        """
        turn = self._shard.state.turn
        with self._loading:
            self._turn = turn
            return run_idle("remora-slots", lambda: self._load(order))

    def canary(self, pairs: Sequence[Pair]) -> dict[Pair, str]:
        """Hashes of what each of some experts makes of fixed rows; calls are served in between.

        Raises:
            ClusterError: an expert is not held.
        """
        return {pair: self.between_calls(partial(self._canary, pair)) for pair in pairs}

    def keep(self, experts: Mapping[int, Sequence[int]]) -> None:
        """Free every slot with another expert than those of `experts` (by decoder layer)."""
        self.between_calls(lambda: self._keep(experts))

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
                    self._copied(taker, pair, order.replicas.get(pair, ()), wanted)
                    or self._loaded(pair, wanted)
                )
            return found
        finally:
            taker.close()
            self._shard.reader.close()

    def _copied(
        self, taker: CopyTaker, pair: Pair, replicas: Sequence[str], wanted: str
    ) -> str | None:
        """From the first replica that has it; None: none has."""
        shard, (layer, expert) = self._shard, pair
        for uid in replicas:
            slot = shard.state.slot_for(layer, expert)
            write = partial(taker.take, uid, pair, self.pace)
            digest = shard.copy_slot(layer, expert, slot, write)
            if digest is None:
                continue
            if digest.digest != wanted:  # the slot may be sound: the checkpoint will tell
                logger.error("layer %d expert %d: the copy from %s is another one", *pair, uid)
                continue
            self.between_calls(partial(self._settle, slot, digest, wanted))
            self.num_copied += 1
            return wanted
        return None

    def _loaded(self, pair: Pair, wanted: str) -> str:
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
            if self.between_calls(partial(self._settle, slot, digest, wanted)):
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

    def _keep(self, experts: Mapping[int, Sequence[int]]) -> None:
        for pair in self._shard.state.keep(experts):
            self._shard.drop_expert(*pair)
