"""Sums and gathers of a tensor-parallel dense group whose ranks each have a GPU (`Group`).

    each rank's part to every other rank, one group of sends and receives -> summed here, in order

NCCL's own all-reduce adds in an order that depends on its algorithm and the size of a message;
here parts travel as they are and every rank adds them up as `SharedGroup` does, so the bits are
the same. A large part is cut: each rank adds up its run of the elements and all exchange the sums,
which is what all-reduce moves.

An exchange is enqueued and not waited for. `settle` waits, and must come before a host reads what
an exchange has touched: a stream whose peer is gone never becomes idle by itself.

Legend: T rows, D columns.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from remora.comm.collectives import PythonGroup, part_of
from remora.comm.errors import ClusterError, DeadlineError, PeerLostError
from remora.comm.nccl_api import Communicator, Device, Nccl
from remora.comm.nccl_channel import Channel, Move

log = logging.getLogger(__name__)

WHOLE_BYTES_MAX: Final = 1 << 18  # larger parts are summed in runs: bytes count there, not latency
WATCH_S: Final = 0.02  # between two looks at the other ranks while a communicator is made


class NcclGroup(PythonGroup):
    """One rank's end of a group over NCCL. `connect` comes first.

    Args:
        nccl, device: see `nccl_api`.
        rank, size: of the group.
        name: uid of the dense group, for errors.
        deadline_s: until exchanges are over, and until all ranks have come.
        watch: why this rank must leave an exchange (another failed, or is gone), or None.
        gone: why the others do not come to `connect`, or None. That one failed in an exchange
            before is no reason: it has all of them meet.
        tell: makes the other ranks' `watch` give a reason: NCCL itself does not tell them.
    """

    def __init__(
        self,
        nccl: Nccl,
        device: Device,
        *,
        rank: int,
        size: int,
        name: str,
        deadline_s: float,
        watch: Callable[[], str | None] = lambda: None,
        gone: Callable[[], str | None] = lambda: None,
        tell: Callable[[str], None] = lambda reason: None,
    ) -> None:
        super().__init__(rank, size)
        self._nccl = nccl
        self._device = device
        self._name = f"tensor-parallel group of {name}"
        self._deadline_s = deadline_s
        self._watch = watch
        self._gone = gone
        self._tell = tell
        self._failure = "not connected"
        self._channel: Channel | None = None
        self._others = [other for other in range(size) if other != rank]

    def make_id(self) -> bytes:
        """A new communicator's id, on one rank, for `connect` of all. Raises ClusterError."""
        try:
            return self._nccl.get_unique_id()
        except self._nccl.NcclError as error:
            raise ClusterError(f"{self._name}: no id: {error}") from error

    def connect(self, unique_id: bytes) -> None:
        """Meet the other ranks, at first and again after an abort; all with one id.

        Making a communicator blocks until all ranks do and cannot be interrupted, so a side thread
        does it; one that comes too late is aborted there.

        Raises:
            ClusterError: they do not meet within the deadline, or one is gone.
        """
        self._drop("it meets anew")
        made: queue.SimpleQueue[Communicator | Exception] = queue.SimpleQueue()
        given_up = threading.Lock()  # held by whoever decides what becomes of the communicator

        def make() -> None:
            try:
                with self._device.on_this_thread():
                    comm = self._nccl.NcclCommunicator(self.size, unique_id, self.rank)
            except Exception as error:  # cupy and torch have errors of their own
                made.put(error)
                return
            if given_up.acquire(blocking=False):
                made.put(comm)
            else:
                comm.abort()

        threading.Thread(target=make, name=f"nccl-{self._name}", daemon=True).start()
        got = self._made(made, given_up)
        if isinstance(got, Exception):
            why = f"{type(got).__name__}: {got}"
            raise ClusterError(f"{self._name}: rank {self.rank} does not join: {why}") from got
        self._channel = Channel(
            self._nccl, got, self._device,
            name=self._name, uid=f"rank {self.rank}", watch=self._watch,
        )  # fmt: skip
        self._failure = None

    def _made(
        self, made: "queue.SimpleQueue[Communicator | Exception]", given_up: threading.Lock
    ) -> Communicator | Exception:
        until_s = time.monotonic() + self._deadline_s
        while True:
            try:
                return made.get(timeout=WATCH_S)
            except queue.Empty:
                why = self._gone()
                if why is None and time.monotonic() < until_s:
                    continue
            if not given_up.acquire(blocking=False):
                return made.get()  # it came at this very moment
            if why is None:
                return DeadlineError(f"not all ranks came within {self._deadline_s:g} s")
            return PeerLostError(why)

    def sum(self, part: Tensor) -> Tensor:
        """See `Group`. Raises ClusterError."""
        if self.is_dry:
            return part.clone()
        if part.numel() == 0:
            return part.clone()
        flat = part.contiguous().flatten()
        if self.size == 2 or flat.nbytes <= WHOLE_BYTES_MAX:
            return _ordered_sum(self._all(flat)).view(part.shape)
        spans = [part_of(rank, self.size, flat.numel()) for rank in range(self.size)]
        begin, end = spans[self.rank]
        runs = [flat.new_empty(end - begin) for _ in range(self.size)]
        runs[self.rank] = flat[begin:end]
        self._exchange(
            None,
            [Move(True, flat[slice(*spans[peer])], peer) for peer in self._others],
            [Move(False, runs[peer], peer) for peer in self._others],
        )
        total = torch.empty_like(flat)
        total[begin:end] = _ordered_sum(runs)
        self._exchange(
            None,
            [Move(True, total[begin:end], peer) for peer in self._others],
            [Move(False, total[slice(*spans[peer])], peer) for peer in self._others],
        )
        own, rest = runs[self.rank].nbytes, flat.nbytes - runs[self.rank].nbytes
        both = rest + own * len(self._others)  # out to be summed, and the sums; in alike
        self.note("sum", both, both)
        return total.view(part.shape)

    def gather_rows(self, rows: Tensor, num_rows: int) -> Tensor:
        """See `Group`. Raises ClusterError."""
        out = rows.new_zeros((num_rows, rows.shape[1]))
        if self.is_dry:
            return out
        mine = rows.contiguous()
        spans = [part_of(rank, self.size, num_rows) for rank in range(self.size)]
        out[slice(*spans[self.rank])] = mine
        self._exchange(
            "gather_rows",
            [Move(True, mine, peer) for peer in self._others],
            [Move(False, out[slice(*spans[peer])], peer) for peer in self._others],
        )
        return out

    def gather_columns(self, columns: Tensor, width: int) -> Tensor:
        """See `Group`. Raises ClusterError."""
        num_rows = columns.shape[0]
        out = columns.new_zeros((num_rows if self.rank == 0 else 0, width))
        if self.is_dry:
            return out
        mine = columns.contiguous()
        if self.rank != 0:
            self._exchange("gather_columns", [Move(True, mine, 0)], [])
            return out
        spans = [part_of(rank, self.size, width) for rank in range(self.size)]
        parts = [mine.new_empty((num_rows, end - begin)) for begin, end in spans]
        parts[0] = mine
        self._exchange(
            "gather_columns", [], [Move(False, parts[peer], peer) for peer in self._others]
        )
        for part, (begin, end) in zip(parts, spans, strict=True):
            out[:, begin:end] = part
        return out

    def settle(self) -> None:
        """See `Group`. Raises ClusterError."""
        if not self.is_dry:
            self._guarded(lambda channel: channel.wait(self._deadline_s))
            self._guarded(Channel.check)

    def abort(self, reason: str) -> None:
        """See `Group`."""
        if self._failure is None:
            self._fail(reason)
            self._tell(reason)

    def close(self) -> None:
        """See `Group`."""
        self._drop("closed")
        self.forget()

    def _all(self, mine: Tensor) -> list[Tensor]:
        """`mine` of every rank, in their order; all of one shape."""
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        parts[self.rank] = mine
        self._exchange(
            "sum",
            [Move(True, mine, peer) for peer in self._others],
            [Move(False, parts[peer], peer) for peer in self._others],
        )
        return parts

    def _exchange(self, operation: str | None, sends: list[Move], receives: list[Move]) -> None:
        sent, received = (sum(m.tensor.nbytes for m in moves) for moves in (sends, receives))
        if operation is not None:  # else the caller counts
            self.note(operation, sent, received)
        self._guarded(lambda channel: channel.move((*sends, *receives)))

    def _guarded(self, action: Callable[[Channel], None]) -> None:
        """Runs `action`; a failure is the group's, and the other ranks are told."""
        if self._channel is None:
            raise ClusterError(f"{self._name}: {self._failure}")
        try:
            action(self._channel)
        except ClusterError as error:
            text = str(error)
            self.abort(text if text.startswith(self._name) else f"{self._name}: {text}")
            raise ClusterError(self._failure) from error

    def _fail(self, reason: str) -> None:
        self._failure = self._failure or reason
        self._drop(reason)

    def _drop(self, why: str) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.abort(why)


def _ordered_sum(parts: list[Tensor]) -> Tensor:
    """In float32, in the order of the ranks, rounded once."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts[0].dtype)
