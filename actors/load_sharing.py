"""A dense group's pairs by shard, told to the router, and those of the others, heard from it.

Ranks of a tensor-parallel group choose replicas for slices of their own. Rank 0 asks the others
what they sent, reports the sum, and tells each rank what all the others of the group sent, together
with what it hears of other groups. Dispatchers belong to the engine's thread: everything goes
through it, between two steps.

Shape suffixes: L MoE layers, S shards in ascending order of uid, R ranks of the group.
"""

from collections.abc import Callable, Sequence
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from remora.actors.dense_engine import DenseEngine
from remora.comm.dispatch import Dispatcher
from remora.comm.errors import ClusterError

Pairs = NDArray[np.int64]  # [L, S]
Sent = tuple[int, Pairs]  # epoch
NOTHING: Final[Sent] = (0, np.zeros((0, 0), np.int64))


class OtherRanks(Protocol):
    """Of `Leader`."""

    def take_sent(self, epoch: int) -> list[Pairs] | None:
        """What each other rank sent under the view of `epoch`; None: they do not tell."""

    def note_others(
        self, epoch: int, groups_LS: Pairs | None, ranks_LS: Sequence[Pairs] | None, top_k: int
    ) -> None:
        """Tell each other rank what other groups and the ranks beside it sent."""


class LoadSharing:
    """Used by the thread that reports.

    Args:
        dispatcher: the one in use, asked in the engine's thread; None while there is none.
        top_k: experts of a token.
        ranks: the others of a tensor-parallel group; None: there are none.
    """

    def __init__(
        self,
        engine: DenseEngine,
        dispatcher: Callable[[], Dispatcher | None],
        top_k: int,
        ranks: OtherRanks | None = None,
    ) -> None:
        self._engine, self._dispatcher = engine, dispatcher
        self._top_k, self._ranks = top_k, ranks
        # Taken and not told to the ranks of this group yet; the engine thread's.
        self._epoch = 0
        self._fresh_RLS: NDArray[np.int64] = np.zeros((0, 0, 0), np.int64)

    def take(self) -> Sent:
        """Pairs sent since the last call, and the epoch of their view; NOTHING where none are
        counted, or the engine has stopped."""
        found = [NOTHING]

        def take() -> None:
            dispatcher = self._dispatcher()
            if dispatcher is not None:
                found.append((dispatcher.view.epoch, self._take(dispatcher)))

        try:
            self._engine.between_steps(take)
        except ClusterError:  # it has stopped, and this report is the last
            return NOTHING
        return found[-1]

    def note(self, epoch: int, others_LS: Pairs | None) -> None:
        """Price shards by what the others sent since the last note.

        Args:
            epoch: of the view that `take` spoke of.
            others_LS: of other dense groups; None: nobody can tell.
        """

        def note() -> None:
            dispatcher = self._dispatcher()
            if dispatcher is None or (others_LS is not None and epoch != dispatcher.view.epoch):
                return
            self._note(dispatcher, others_LS)

        self._engine.run_soon(note)

    def _take(self, dispatcher: Dispatcher) -> Pairs:
        """Of all ranks together."""
        epoch, own_LS = dispatcher.view.epoch, dispatcher.take_sent()
        if self._ranks is None:
            return own_LS
        others = self._ranks.take_sent(epoch)
        if others is None:  # a rank is gone, or has another view: nothing is known of it
            return own_LS
        taken_RLS = np.stack([own_LS, *others])
        if (self._epoch, self._fresh_RLS.shape) == (epoch, taken_RLS.shape):
            taken_RLS = taken_RLS + self._fresh_RLS
        fresh_LS: Pairs = np.sum([own_LS, *others], axis=0, dtype=np.int64)
        self._epoch, self._fresh_RLS = epoch, taken_RLS
        return fresh_LS

    def _note(self, dispatcher: Dispatcher, others_LS: Pairs | None) -> None:
        epoch, fresh_RLS = dispatcher.view.epoch, self._fresh_RLS
        beside: list[Pairs] | None = None
        if self._epoch == epoch:
            beside = list(fresh_RLS.sum(axis=0) - fresh_RLS)
            self._fresh_RLS = np.zeros_like(fresh_RLS)
        dispatcher.note_others(others_LS, self._top_k, beside[0] if beside else None)
        if self._ranks is not None:
            others = beside[1:] if beside else None
            self._ranks.note_others(epoch, others_LS, others, self._top_k)
