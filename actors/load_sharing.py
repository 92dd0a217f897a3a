"""A dense group's pairs by shard, told to the router, and those of the others, heard from it.

Dispatchers belong to the engine's thread: both ways go through it, between two steps.

Shape suffixes: L MoE layers, S shards in ascending order of uid.
"""

from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from remora.actors.dense_engine import DenseEngine
from remora.comm.dispatch import Dispatcher
from remora.comm.errors import ClusterError

Sent = tuple[int, NDArray[np.int64]]  # epoch, [L, S]
NOTHING: Final[Sent] = (0, np.zeros((0, 0), np.int64))


class LoadSharing:
    """Used by the thread that reports.

    Args:
        dispatcher: the one in use, asked in the engine's thread; None while there is none.
        top_k: experts of a token.
        num_ranks: of a tensor-parallel group. Rank 0 counts its own slice of the rows, and reports
            for all: slices are of equal size.
        tell_ranks: (epoch, others' pairs, top_k) to the other ranks of the group, which price
            shards as rank 0 does; None where there are none.
    """

    def __init__(
        self,
        engine: DenseEngine,
        dispatcher: Callable[[], Dispatcher | None],
        top_k: int,
        num_ranks: int = 1,
        tell_ranks: Callable[[int, NDArray[np.int64] | None, int], None] | None = None,
    ) -> None:
        self._engine, self._dispatcher = engine, dispatcher
        self._top_k, self._num_ranks = top_k, num_ranks
        self._tell_ranks = tell_ranks

    def take(self) -> Sent:
        """Pairs sent since the last call, and the epoch of their view; NOTHING where none are
        counted, or the engine has stopped."""
        found = [NOTHING]

        def take() -> None:
            dispatcher = self._dispatcher()
            if dispatcher is not None:
                sent_LS = self._num_ranks * dispatcher.take_sent()
                found.append((dispatcher.view.epoch, sent_LS))

        try:
            self._engine.between_steps(take)
        except ClusterError:  # it has stopped, and this report is the last
            return NOTHING
        return found[-1]

    def note(self, epoch: int, others_LS: NDArray[np.int64] | None) -> None:
        """Price shards by what the others sent since the last note; None: nobody can tell."""

        def note() -> None:
            dispatcher = self._dispatcher()
            if dispatcher is None:
                return
            if others_LS is None or epoch == dispatcher.view.epoch:
                dispatcher.note_others(others_LS, self._top_k)
                if self._tell_ranks is not None:
                    self._tell_ranks(epoch, others_LS, self._top_k)

        self._engine.run_soon(note)
