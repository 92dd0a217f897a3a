"""One rank's communicator in use: groups of sends and receives, waiting, failing, ending.

Everything runs on torch's current stream, so computing and sending are ordered by the stream and
the host waits only where it reads. The thread that enqueues is the one that waits and aborts:
NCCL's manual forbids `abort` under a running call.
"""

import threading
import time
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

from torch import Tensor

from remora.comm import nccl_api as api
from remora.comm.errors import DeadlineError, PeerLostError

POLL_S: Final = 50e-6  # between two looks at a mark; well below a step


class Move(NamedTuple):
    """One send or receive of a contiguous tensor; an empty one is no operation."""

    is_send: bool
    tensor: Tensor
    peer: int  # rank


class Channel:
    """A communicator of one rank, and how it ends.

    Used by the thread that enqueues; `note_lost` by any.

    Args:
        nccl: `load_nccl()` (or the tests' fake).
        comm: communicator of this rank; the channel aborts it.
        device: where buffers lie and which stream is in use.
        name: of the communicator, for errors.
        uid: of this rank, for errors.
        watch: looked at while waiting: why this rank must leave, None while it need not.
    """

    def __init__(
        self,
        nccl: api.Nccl,
        comm: api.Communicator,
        device: api.Device,
        *,
        name: str,
        uid: str,
        watch: Callable[[], str | None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.nccl = nccl
        self.device = device
        self.name = name
        self.uid = uid
        self._comm: api.Communicator | None = comm
        self._watch = watch
        self._clock = clock
        self._lost = threading.Event()
        self._why_lost = ""

    @property
    def comm(self) -> api.Communicator:
        """The communicator. Raises PeerLostError after its end."""
        if self._comm is None:
            raise PeerLostError(f"{self.name} is over: {self._why_lost}")
        return self._comm

    def move(self, moves: Iterable[Move]) -> None:
        """Enqueues sends and receives as one group.

        Raises:
            PeerLostError: NCCL refused or failed; the communicator is aborted.
        """
        comm, stream = self.comm, self.device.stream()
        try:
            with api.group(self.nccl):
                for is_send, tensor, peer in moves:
                    enqueue = api.send if is_send else api.recv
                    enqueue(self.nccl, comm, tensor, peer, stream)
        except self.nccl.NcclError as error:
            raise self.failed(error) from error

    def wait(self, deadline_s: float) -> None:
        """Until everything enqueued is over, polling for what NCCL and the cluster know.

        The loop that NCCL's manual asks for: a stream is queried, not synchronised, since
        an operation whose peer is gone never ends by itself.

        Raises:
            PeerLostError: NCCL reports an error, `watch` has a reason, or `note_lost` was called.
            DeadlineError: neither, and not done in time. In all cases the communicator is aborted.
        """
        mark = self.device.mark()
        until = self._clock() + deadline_s
        while not mark.ready():
            self.check()
            if self._clock() > until:
                why = f"{self.name} did not finish in {deadline_s} s"
                self.abort(why)
                raise DeadlineError(why)
            self._lost.wait(POLL_S)

    def check(self) -> None:
        """Raises PeerLostError, and aborts, when NCCL or the cluster knows of a failure."""
        comm = self.comm
        if not self._lost.is_set() and (why := self._watch()) is not None:
            self.note_lost(why)
        if self._lost.is_set():
            self.abort(self._why_lost)
            raise PeerLostError(self._why_lost)
        try:
            comm.check_async_error()
        except self.nccl.NcclError as error:
            raise self.failed(error) from error

    def failed(self, error: Exception) -> PeerLostError:
        """Aborts; what to raise for an error of NCCL's."""
        self.abort(f"{self.uid}: {error}")
        return PeerLostError(f"{self.name}: {error}")

    def note_lost(self, why: str) -> None:
        """A member is gone: whoever waits stops waiting. From any thread."""
        self._why_lost = self._why_lost or why
        self._lost.set()

    def abort(self, why: str) -> None:
        """Ends what is enqueued; the communicator is over. No effect on one that is."""
        self.note_lost(why)
        comm, self._comm = self._comm, None
        if comm is not None:
            comm.abort()
