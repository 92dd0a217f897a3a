"""Views that the coordinator tells a dense rank, on their way to the thread that routes by them.

That thread takes them between two steps. A step that finds no replica of an expert waits here for a
view that has one, or until a shard that it could not use is back (its requests are *held*, not
failed), and connects meanwhile to whatever shards the coordinator offers: without that no such view
could be committed.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Final

from remora.comm.errors import DeadlineError
from remora.comm.view import View

GREET_S: Final = 60.0  # for a step to end, and for handshakes
LOOK_EVERY_S: Final = 0.5


class ViewInbox:
    """One dense rank's.

    Args:
        greet: connects to the shards of a view; in the routing thread.
        hold_s: longest wait of a layer for what is missing.
        told: there is something to `attend` to; in the thread that tells it.
    """

    def __init__(
        self,
        greet: Callable[[View], None],
        hold_s: float,
        told: Callable[[], None] = lambda: None,
    ) -> None:
        self._greet = greet
        self.hold_s = hold_s
        self._told = told
        self._changed = threading.Condition()
        self._newest: View | None = None
        self._offers: list[tuple[View, Future[None]]] = []
        self.is_holding = False  # a step waits here
        self._adoptions: list[tuple[int, Future[None]]] = []  # by epoch; some are settled

    # -- any thread ---------------------------------------------------------------------------

    def tell(self, view: View, adopted: "Future[None] | None" = None) -> View:
        """This view is committed; the newest that is (calls may come out of order).

        Args:
            adopted: settled by a hold that goes by the newest already: its step, which cannot end
                before somebody restores what is missing, sends nothing by an older view any more.
        """
        with self._changed:
            if self._newest is None or view.epoch > self._newest.epoch:
                self._newest = view
            self._adoptions = [each for each in self._adoptions if not each[1].done()]
            if adopted is not None:
                self._adoptions.append((self._newest.epoch, adopted))
            self._changed.notify_all()
            newest = self._newest
        self._told()
        return newest

    def offer(self, view: View, run_soon: Callable[[Callable[[], None]], None]) -> None:
        """Have the routing thread greet a view to come, between two steps or in a hold.

        Args:
            run_soon: runs something in that thread between two steps.

        Raises:
            ClusterError: what greeting raised.
            DeadlineError: the thread did not come to it.
        """
        done: Future[None] = Future()
        with self._changed:
            self._offers.append((view, done))
            self._changed.notify_all()
        self._told()
        run_soon(self.take_offers)
        try:
            done.result(GREET_S)
        except TimeoutError:
            raise DeadlineError(f"no step ended within {GREET_S:g} s") from None

    # -- the routing thread -------------------------------------------------------------------

    def newest(self, _epoch: int) -> View:
        """The newest view that was told."""
        with self._changed:
            assert self._newest is not None, "no view has been told yet"
            return self._newest

    def take_offers(self) -> None:
        """Greet what is offered."""
        with self._changed:
            offers, self._offers = self._offers, []
        for view, done in offers:
            try:
                self._greet(view)
            except Exception as failure:  # handed to whoever offered it
                done.set_exception(failure)
            else:
                done.set_result(None)

    def attend(self, epoch: int) -> View:
        """Greet what is offered and settle adoptions, in a step that goes by the view of `epoch`;
        the newest view."""
        self.take_offers()
        self._settle_adoptions(epoch)
        return self.newest(epoch)

    def hold(self, epoch: int, look: Callable[[], bool], held_s: float) -> View | None:
        """As `remora.comm.routes.Hold`."""
        self.is_holding = True
        try:
            return self._held(epoch, look, time.monotonic() + self.hold_s - held_s)
        finally:
            self.is_holding = False

    def _held(self, epoch: int, look: Callable[[], bool], until_s: float) -> View | None:
        look_at_s = time.monotonic() + LOOK_EVERY_S
        while True:
            if (newest := self.attend(epoch)).epoch > epoch:
                return newest
            now_s = time.monotonic()
            if now_s >= until_s:
                return None
            if now_s >= look_at_s:
                if look():
                    return newest
                look_at_s = time.monotonic() + LOOK_EVERY_S
                continue
            with self._changed:
                is_told = self._newest is not newest
                if not self._offers and not is_told and not self._has_adoption(epoch):
                    self._changed.wait(min(until_s, look_at_s) - now_s)

    def _has_adoption(self, epoch: int) -> bool:
        return any(told <= epoch and not adopted.done() for told, adopted in self._adoptions)

    def _settle_adoptions(self, epoch: int) -> None:
        with self._changed:
            adoptions = [each for each in self._adoptions if not each[1].done()]
            self._adoptions = [each for each in adoptions if each[0] > epoch]
        for told, adopted in adoptions:
            if told <= epoch:
                adopted.set_result(None)
