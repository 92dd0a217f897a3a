"""How a tensor-parallel dense group holds a step for an expert that has no replica.

A dense rank alone waits in the middle of a layer (`ViewInbox.hold`). Ranks of a group cannot: each
of them would have to take the same view at the same layer, and the others wait for it in an
exchange. So the rank that finds no replica fails the step, all ranks leave it, rank 0 waits here,
between two tries, and the step is run again from its beginning, by the view that all ranks have
then. It writes the same keys and values to the same places: nothing of the first try is left.
"""

import logging
from collections.abc import Callable

from remora.actors.tp_leader import Leader
from remora.actors.view_inbox import ViewInbox
from remora.comm.dispatch import Dispatcher
from remora.comm.view import View

logger = logging.getLogger(__name__)


class GroupHold:
    """Of rank 0, used from the engine's thread.

    Args:
        views: tells newer views, and connects to shards that are offered meanwhile.
        dispatcher: rank 0's; None while there is none.
        connect: makes the shards of all ranks those of a view; with True also where an expert has
            no replica that can be reached.
    """

    def __init__(
        self,
        views: ViewInbox,
        leader: Leader,
        dispatcher: Callable[[], Dispatcher | None],
        connect: Callable[[View, bool], None],
    ) -> None:
        self._views, self._leader = views, leader
        self._dispatcher, self._connect = dispatcher, connect

    def wait(self, held_s: float) -> bool:
        """After a step that failed: whether it may be run again, once experts that some rank lacks
        are there.

        Args:
            held_s: waited before for the same step; all in all as long as the inbox allows.

        Returns:
            False: no rank lacks any, or they did not come in time.

        Raises:
            GroupLostError: a rank is gone.
        """
        dispatcher = self._dispatcher()
        if dispatcher is None or (dispatcher.is_complete and not self._leader.lacks_experts):
            return False
        epoch = self._leader.epoch
        logger.warning("the step waits for experts that no shard of view %d gives", epoch)
        view = self._views.hold(epoch, self._look, held_s)
        if view is None:
            return False
        if view.epoch > epoch:
            self._connect(view, True)
        return True

    def _look(self) -> bool:
        dispatcher = self._dispatcher()
        is_complete = dispatcher is not None and dispatcher.look_again()
        return self._leader.look() and is_complete
