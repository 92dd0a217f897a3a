"""The native loop of a shard: ordinary calls never reach Python (`csrc/pump.cpp`).

The pump owns *settled* connections: none of their bytes is received or queued in Python. It hands
one over, with its bytes, as soon as something is to be judged; the server gives it back once it is
settled again. It runs in the server's thread, in the place of `epoll.poll`.
"""

import ctypes
from typing import Any, Final, NamedTuple

from remora.comm.connection import Connection
from remora.comm.native import native_extension, park_address

SKIPS_MAX: Final = 4  # times that smaller frames of other connections may go ahead
# Waiting calls of one layer are computed together up to this many rows: one pass over the weights
# serves several ranks' decode, and none of them waits for another one's prefill.
MERGE_ROWS_MAX: Final = 128

Handed = tuple[int, int, bytes]  # bytes received, last call's sequence, unsent bytes of an answer


class NativeCompute(NamedTuple):
    """A kernel behind the C interface of `kernels/csrc/expert_call.h`."""

    entry: int  # address of a RemoraExpertsFn
    handle: int  # its first argument
    width: int  # D: elements of a row, in every layer
    dtype: int  # wire.Dtype of rows


class NativePump:
    """Serves one `FrameServer`. Its calls and their time are counted here, not by the handler.

    Args:
        compute: what computes.
        incarnation: of this shard; frames for another one are Python's.
    """

    def __init__(self, compute: NativeCompute, *, incarnation: int) -> None:
        self._pump: Any = native_extension().Pump(
            *compute, incarnation, SKIPS_MAX, MERGE_ROWS_MAX, park_address()
        )

    def set_epoch(self, epoch: int) -> None:
        """Epoch that answers carry from now on."""
        self._pump.set_epoch(epoch)

    def give(self, connection: Connection) -> None:
        """The pump owns `connection` from here on; it is settled."""
        grants = connection.grants
        assert grants is not None and connection.is_settled, f"{connection} is not settled"
        if grants.region_bytes % 64 and connection.arena is not None:
            return  # rows would not lie aligned: Python copes
        self._pump.give(
            connection.fd, connection.receive_memory.address, connection.receive_memory.num_bytes,
            connection.arena.address if connection.arena is not None else 0,
            grants.num_regions, grants.region_bytes, grants.frame_bytes_max,
            connection.last_call, ctypes.addressof(connection.counters),
        )  # fmt: skip

    def take(self, connection: Connection) -> Handed | None:
        """Takes it away; None when it was not the pump's."""
        handed: Handed | None = self._pump.take(connection.fd)
        return handed

    def poll(self, epoll_fd: int, timeout_s: float | None) -> list[tuple[int, int, Handed | None]]:
        """Serves until there is something for Python: (fd, events of epoll, what was handed over).

        With `timeout_s` 0 it serves one batch at most; None waits for ever.
        """
        found: list[tuple[int, int, Handed | None]] = self._pump.poll(
            epoll_fd, -1.0 if timeout_s is None else timeout_s
        )
        return found

    @property
    def calls_served(self) -> int:
        """Calls answered."""
        served: int = self._pump.totals()[0]
        return served

    @property
    def num_batches(self) -> int:
        """Calls of the kernel: fewer than calls answered when some were merged."""
        batches: int = self._pump.totals()[1]
        return batches

    @property
    def compute_s(self) -> float:
        """Seconds in the kernel."""
        nanoseconds: int = self._pump.totals()[2]
        return nanoseconds * 1e-9
