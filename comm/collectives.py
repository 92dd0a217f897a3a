"""Sums and gathers over the ranks of a tensor-parallel dense group.

    group.sum(part)                        the same on every rank
    group.gather_rows(rows, num_rows)      each rank has its run of the rows, all get all
    group.gather_columns(columns, width)   each rank has its run of the columns, rank 0 gets all

A sum is taken in float32 in the order of the ranks and rounded once: the same bits on every rank,
for one number of ranks always the same, whatever carries it. On one host that is shared memory
(`SharedGroup`, kernels/csrc/shared_group.h), between hosts gloo (`GlooGroup`), which is the slow
twin too, between GPUs NCCL (`nccl_group.NcclGroup`). `DryGroup` exchanges nothing: compilers and
warm-up steps see shapes.

Layers call the functions of this module with a group's number, so that they compile to opaque ops
and hold nothing that belongs to a process. Runs of rows and columns are `part_of`.

Legend: T rows, D columns.
"""

import datetime
import itertools
from collections.abc import Callable
from typing import Any, Final, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore

from remora.comm.accounting import COLLECTIVES, CollectiveBytes, collective_bytes
from remora.comm.arena import Memory
from remora.comm.errors import ClusterError, first_line
from remora.kernels.native import native_available

CAPACITY_BYTES_MAX: Final = 1 << 20  # of one rank's buffer; larger tensors go through in pieces
SPIN_US: Final = 50  # before a rank that waits sleeps; longer takes a core that a shard could use


def part_of(rank: int, size: int, count: int) -> tuple[int, int]:
    """The run [begin, end) of `count` rows or columns that rank `rank` of `size` has.

    As even as can be, the first ranks have more: one row is rank 0's.
    """
    return -(-rank * count // size), -(-(rank + 1) * count // size)


class Group(Protocol):
    """One rank's end of a group. Every rank calls the same functions in the same order."""

    number: int  # in this process; layers know the group by it
    rank: int
    size: int
    is_native: bool  # layers call the C++ ops

    def sum(self, part: Tensor) -> Tensor:
        """Sum of all ranks' `part` (same shape, float32 or bfloat16) in its dtype."""

    def gather_rows(self, rows: Tensor, num_rows: int) -> Tensor:
        """[T, D] of this rank's `part_of` of the rows."""

    def gather_columns(self, columns: Tensor, width: int) -> Tensor:
        """[T, D] on rank 0 of this rank's `part_of` of the columns, [0, D] on the others."""

    def counters(self) -> CollectiveBytes:
        """Calls and bytes so far, by operation."""

    def settle(self) -> None:
        """Returns when what was exchanged is there for a host to read."""

    def set_dry(self, dry: bool) -> None:
        """While dry nothing is exchanged: shapes are right, values mean nothing."""

    def abort(self, reason: str) -> None:
        """Make every rank's exchange fail, now and until `restart`. The first reason stays."""

    def failure(self) -> str | None:
        """The reason, after an exchange has failed."""

    def close(self) -> None:
        """Let go of memory and sockets."""


_groups: dict[int, Group] = {}  # those that Python computes
_numbers = itertools.count(1)


def new_number() -> int:
    """A number that no group of this process has had."""
    return next(_numbers)


def group_sum(part: Tensor, number: int, is_native: bool) -> Tensor:
    """`Group.sum` as layers call it."""
    if is_native:
        total: Tensor = torch.ops.remora.group_sum(part, number)
        return total
    total = torch.ops.remora_group.sum(part, number)
    return total


class SharedGroup:
    """Ranks of one host, over memory that all of them have mapped.

    Args:
        memory: `bytes_needed` of zeroed memory, the same for all ranks.
        capacity: bytes of one buffer, as in `bytes_needed`.
        deadline_s: how long a rank waits for another one in an exchange.
        peers: descriptor of a socket that hangs up when the rank is gone, by rank.
    """

    is_native = True

    def __init__(
        self,
        memory: Memory,
        *,
        rank: int,
        size: int,
        capacity: int,
        deadline_s: float,
        peers: dict[int, int] | None = None,
        spin_us: int = SPIN_US,
    ) -> None:
        assert memory.num_bytes >= self.bytes_needed(size, capacity), f"{memory.num_bytes} bytes"
        peers = peers or {}
        self.number = new_number()
        self.rank = rank
        self.size = size
        self._memory = memory  # the ops use its address
        torch.ops.remora.group_open(
            self.number, memory.address, rank, size, capacity, spin_us, int(deadline_s * 1000),
            list(peers.values()), list(peers),
        )  # fmt: skip

    @staticmethod
    def bytes_needed(size: int, capacity: int) -> int:
        """Bytes of shared memory for `size` ranks."""
        return int(torch.ops.remora.group_bytes(size, capacity))

    def sum(self, part: Tensor) -> Tensor:
        """See `Group`."""
        total: Tensor = torch.ops.remora.group_sum(part, self.number)
        return total

    def gather_rows(self, rows: Tensor, num_rows: int) -> Tensor:
        """See `Group`."""
        out: Tensor = torch.ops.remora.group_gather_rows(rows, num_rows, self.number)
        return out

    def gather_columns(self, columns: Tensor, width: int) -> Tensor:
        """See `Group`."""
        out: Tensor = torch.ops.remora.group_gather_columns(columns, width, self.number)
        return out

    def counters(self) -> CollectiveBytes:
        """See `Group`."""
        return collective_bytes(torch.ops.remora.group_counters(self.number))

    def settle(self) -> None:
        """See `Group`."""

    def set_dry(self, dry: bool) -> None:
        """See `Group`."""
        torch.ops.remora.group_set_dry(self.number, dry)

    def abort(self, reason: str) -> None:
        """See `Group`."""
        torch.ops.remora.group_abort(self.number, reason)

    def failure(self) -> str | None:
        """See `Group`."""
        return torch.ops.remora.group_abort_text(self.number) or None

    @property
    def sequence(self) -> int:
        """Number of the last exchange."""
        return int(torch.ops.remora.group_sequence(self.number))

    def restart(self, sequence: int) -> None:
        """After a failure, on one rank, while no rank is in an exchange: nothing is aborted.

        The others follow with `follow` before their next exchange.
        """
        torch.ops.remora.group_reset(self.number, sequence)

    def follow(self, sequence: int) -> None:
        """Go on at `sequence`, as the rank that restarted says."""
        torch.ops.remora.group_set_sequence(self.number, sequence)

    def close(self) -> None:
        """See `Group`."""
        torch.ops.remora.group_close(self.number)


class PythonGroup:
    """What groups that Python computes have in common: layers find them by number."""

    is_native = False

    def __init__(self, rank: int, size: int) -> None:
        self.number = new_number()
        self.rank = rank
        self.size = size
        self.is_dry = False
        self._failure: str | None = None
        self._counts = dict.fromkeys(COLLECTIVES, (0, 0, 0))
        _groups[self.number] = cast(Group, self)

    def settle(self) -> None:
        """See `Group`."""

    def counters(self) -> CollectiveBytes:
        """See `Group`."""
        return collective_bytes([value for triple in self._counts.values() for value in triple])

    def note(self, operation: str, sent: int, received: int) -> None:
        """Counts one exchange and its bytes."""
        before = self._counts[operation]
        self._counts[operation] = (before[0] + 1, before[1] + sent, before[2] + received)

    def set_dry(self, dry: bool) -> None:
        """See `Group`."""
        self.is_dry = dry

    def failure(self) -> str | None:
        """See `Group`."""
        return self._failure

    def forget(self) -> None:
        """Layers find it no more."""
        _groups.pop(self.number, None)


class DryGroup(PythonGroup):
    """A group of one rank's imagination: the model of a compiler runs in it.

    Args:
        is_native: layers call the ops of a `SharedGroup`; None: where there are C++ kernels.
    """

    def __init__(self, rank: int, size: int, *, is_native: bool | None = None) -> None:
        super().__init__(rank, size)
        self.is_native = native_available() if is_native is None else is_native
        if self.is_native:
            self.forget()
            torch.ops.remora.group_open(self.number, 0, rank, size, 64, 0, 0, [], [])

    def sum(self, part: Tensor) -> Tensor:
        """See `Group`."""
        return part.clone()

    def gather_rows(self, rows: Tensor, num_rows: int) -> Tensor:
        """See `Group`."""
        return rows.new_zeros((num_rows, rows.shape[1]))

    def gather_columns(self, columns: Tensor, width: int) -> Tensor:
        """See `Group`."""
        return columns.new_zeros((columns.shape[0] if self.rank == 0 else 0, width))

    def abort(self, reason: str) -> None:
        """Nobody is there to be told."""

    def close(self) -> None:
        """See `Group`."""
        if self.is_native:
            torch.ops.remora.group_close(self.number)
        else:
            self.forget()


class GlooGroup(PythonGroup):
    """Ranks of any hosts, over gloo's TCP connections; bytes only, all arithmetic is here.

    Args:
        store: of torch.distributed, the same for all ranks; `generation` keeps lives apart.
        ip: address that this rank's connections use.
        deadline_s: of one exchange.

    Raises:
        ClusterError: the ranks do not find each other.
    """

    def __init__(
        self, store: Any, *, rank: int, size: int, ip: str, deadline_s: float, generation: int = 0
    ) -> None:
        super().__init__(rank, size)
        self._store, self._ip, self._deadline_s = store, ip, deadline_s
        self._gloo: Any = None
        self.connect(generation)

    def connect(self, generation: int) -> None:
        """Meet the other ranks, at first and again after an abort; all with one `generation`.

        Raises:
            ClusterError: they do not find each other within the deadline.
        """
        gloo: Any = dist.ProcessGroupGloo  # torch's stubs leave its options out
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=self._ip)]
        options._timeout = datetime.timedelta(seconds=self._deadline_s)
        prefixed = PrefixStore(str(generation), self._store)
        try:
            self._gloo = gloo(prefixed, self.rank, self.size, options)
        except RuntimeError as error:
            raise ClusterError(f"rank {self.rank} does not find its group: {error}") from error
        self._failure = None

    def sum(self, part: Tensor) -> Tensor:
        """See `Group`."""
        if self.is_dry:
            return part.clone()
        self.note("sum", *(part.nbytes * (self.size - 1),) * 2)
        parts = self._all(part)
        total = parts[0].float()
        for other in parts[1:]:
            total = total + other.float()
        return total.to(part.dtype)

    def gather_rows(self, rows: Tensor, num_rows: int) -> Tensor:
        """See `Group`."""
        if self.is_dry:
            return rows.new_zeros((num_rows, rows.shape[1]))
        most = part_of(0, self.size, num_rows)[1]
        padded = rows.new_zeros((most, rows.shape[1]))
        padded[: rows.shape[0]] = rows
        self.note("gather_rows", *(padded.nbytes * (self.size - 1),) * 2)
        parts = self._all(padded)
        spans = [part_of(rank, self.size, num_rows) for rank in range(self.size)]
        return torch.cat(
            [part[: end - begin] for part, (begin, end) in zip(parts, spans, strict=True)]
        )

    def gather_columns(self, columns: Tensor, width: int) -> Tensor:
        """See `Group`."""
        out = columns.new_zeros((columns.shape[0] if self.rank == 0 else 0, width))
        if self.is_dry:
            return out
        spans = [part_of(rank, self.size, width) for rank in range(self.size)]
        most = columns.new_zeros((columns.shape[0], spans[0][1]))
        most[:, : columns.shape[1]] = columns
        self.note("gather_columns", *(most.nbytes * (self.size - 1),) * 2)
        parts = self._all(most)
        if self.rank == 0:
            for part, (begin, end) in zip(parts, spans, strict=True):
                out[:, begin:end] = part[:, : end - begin]
        return out

    def all_to_all(self, sent: list[Tensor], sizes: list[int], operation: str) -> list[Tensor]:
        """Bytes (uint8) for every rank, this one too, against `sizes` bytes from each.

        Raises:
            RuntimeError: a rank is gone, late, or gives another number of bytes.
        """
        given = [len(part) for part in sent]
        received = torch.empty(sum(sizes), dtype=torch.uint8)
        self._run(lambda gloo: gloo.alltoall_base(received, torch.cat(sent), sizes, given))
        self.note(operation, sum(given) - given[self.rank], sum(sizes) - sizes[self.rank])
        return list(received.split(sizes))

    def _all(self, mine: Tensor) -> list[Tensor]:
        """`mine` of every rank, in their order; all of one shape."""
        mine = mine.contiguous()
        out = [torch.empty_like(mine) for _ in range(self.size)]
        if mine.numel() > 0:
            flat = [t.flatten().view(torch.uint8) for t in (mine, *out)]
            self._run(lambda gloo: gloo.allgather([flat[1:]], flat[:1]))
        return out

    def _run(self, begin: Callable[[Any], Any]) -> None:
        if self._gloo is None:
            raise RuntimeError(f"tensor-parallel group: {self._failure}")
        try:
            begin(self._gloo).wait()
        except RuntimeError as error:
            self._failure = self._failure or f"a rank is gone or late: {first_line(error)}"
            self._gloo = None  # the others must not wait for us
            raise

    def abort(self, reason: str) -> None:
        """See `Group`: the connections are closed, upon which the others' exchanges fail."""
        self._failure = self._failure or reason
        self._gloo = None

    def close(self) -> None:
        """See `Group`."""
        self._gloo = None
        self.forget()


_library = torch.library.Library("remora_group", "DEF")
_library.define("sum(Tensor part, int group) -> Tensor")
_library.impl("sum", lambda part, group: _groups[group].sum(part), "CompositeExplicitAutograd")


def _fake_sum(part: Tensor, group: int) -> Tensor:
    return torch.empty_like(part, memory_format=torch.contiguous_format)


torch.library.register_fake("remora_group::sum", _fake_sum, lib=_library)
if native_available():
    torch.library.register_fake("remora::group_sum", _fake_sum)
