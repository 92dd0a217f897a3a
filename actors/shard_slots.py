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

from remora.actors.expert_state import SLOTS_TRIED_MAX, Pair, unusable
from remora.actors.idle_thread import run_idle
from remora.actors.launch import take_threads
from remora.actors.manifest import digest_expert
from remora.actors.shard_model import ShardExperts
from remora.comm.errors import ClusterError, DeadlineError, WeightsError

logger = logging.getLogger(__name__)

T = TypeVar("T")

BETWEEN_CALLS_S: Final = 60.0  # for the serving thread to come to what it is asked
CANARY_ROWS: Final = 2


class ShardSlots:
    """Used by Ray's threads.

    Args:
        call_soon: runs something in the serving thread, between two calls.
        num_threads: of torch, as in the serving thread.
    """

    def __init__(
        self, shard: ShardExperts, call_soon: Callable[[Callable[[], None]], None], num_threads: int
    ) -> None:
        self._shard = shard
        self._call_soon = call_soon
        self._num_threads = num_threads
        self._loading = threading.Lock()

    def load(self, pairs: Sequence[Pair], digests: Mapping[Pair, str]) -> dict[Pair, str]:
        """Load experts of the checkpoint into free slots; digests of what the slots hold.

        Args:
            digests: what each is to be. A slot that holds something else is not used again.

        Raises:
            ClusterError: no free slot, or none that holds what is written into it.
            WeightsError: the checkpoint is not what it was.
        """
        with self._loading:
            return run_idle("remora-slots", lambda: self._load(pairs, digests))

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

    def _load(self, pairs: Sequence[Pair], digests: Mapping[Pair, str]) -> dict[Pair, str]:
        take_threads(self._num_threads)
        try:
            return {pair: self._load_one(pair, digests[pair]) for pair in pairs}
        finally:
            self._shard.reader.close()

    def _load_one(self, pair: Pair, wanted: str) -> str:
        shard, (layer, expert) = self._shard, pair
        held = shard.state.digest_of(layer, expert)
        if held is not None:  # asked before, and the answer got lost
            return held
        tensors = shard.reader.read(layer, expert)
        found = wanted if shard.is_int8 else digest_expert(layer, expert, tensors).digest
        if found != wanted:  # int8 is known by what a slot holds
            raise WeightsError(
                f"layer {layer} expert {expert}: the checkpoint gives {found}, and gave {wanted}"
                " when the deployment started: is it another one?"
            )
        for _ in range(SLOTS_TRIED_MAX):
            slot = shard.state.slot_for(layer, expert)
            digest = shard.fill_slot(layer, expert, slot, tensors)
            if self.between_calls(partial(shard.settle, slot, digest, wanted)):
                return wanted
            logger.error("layer %d slot %d does not hold what was to be there", layer, slot)
        raise unusable(layer, expert, digest.digest, wanted)

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
        for pair in self._shard.state.besides(experts):
            self._shard.drop_expert(*pair)
