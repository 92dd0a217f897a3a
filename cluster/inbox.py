"""Where the outputs of one request's sequences wait for its task: one wake-up per step message."""

import asyncio

from remora.comm.messages import SequenceOutput


class Inbox:
    """Outputs of all sequences of one request; one task takes, the engine client puts."""

    __slots__ = ("_failure", "_items", "_waiter")

    def __init__(self) -> None:
        self._items: list[SequenceOutput] = []
        self._waiter: asyncio.Future[None] | None = None
        self._failure: BaseException | None = None

    def put(self, output: SequenceOutput) -> None:
        """Add one output. Called on the event loop."""
        self._items.append(output)
        self._wake()

    def fail(self, error: BaseException) -> None:
        """Everything after what is in already is this failure; the first one counts."""
        if self._failure is None:
            self._failure = error
        self._wake()

    async def take(self) -> list[SequenceOutput]:
        """All outputs that are in, at least one; raises what `fail` was told once they are out."""
        while not self._items:
            if self._failure is not None:
                raise self._failure
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        items, self._items = self._items, []
        return items

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
