"""A network of fake NCCL: threads as ranks, host memory as device memory, NCCL's rules enforced.

    world = World()
    nccl = FakeNccl(world, "shard-0")     # what `load_nccl()` is on a GPU; one for each member
    results = world.run({"dense-0": f, "shard-0": g})

Names, parameters and errors are cupy 14's (`test_nccl_signatures.py`). A launch is synchronous, as
with CUDA_LAUNCH_BLOCKING=1, until a peer is dead, aborted or stuck itself: then `groupEnd` returns,
as it does on a GPU, and the *stream* is stuck until the communicator is aborted. What the library
answers with an error raises `NcclError` here; what it answers with a hang or with garbage raises
`ContractError`: mismatched counts or types, a cycle of waiting ranks, a second stream, an abort
under a running call, a split with operations outstanding.
"""

import contextlib
import ctypes
import threading
from collections.abc import Iterator
from typing import Any

import torch
from support.fake_graph import ContractError, Graph, capturing
from support.fake_network import (
    INVALID_ARGUMENT,
    INVALID_USAGE,
    ITEM_BYTES,
    Clique,
    Killed,
    NcclError,
    Op,
    World,
)

__all__ = ["ContractError", "CpuDevice", "FakeNccl", "Graph", "Killed", "NcclError", "World"]


class FakeNccl:
    """The module, for one process."""

    NCCL_INT32 = 2
    NCCL_FLOAT16 = 6
    NCCL_FLOAT32 = 7
    NCCL_BFLOAT16 = 9
    NcclError = NcclError

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.num_calls = 0
        self.die_at: int | None = None  # the process ends at this call
        self._here = threading.local()
        self.communicators: list[NcclCommunicator] = []

    def step(self) -> None:
        """Counts a call; ends the process at the chosen one."""
        self.num_calls += 1
        if self.die_at is not None and self.num_calls >= self.die_at:
            self.world.kill(self.name)
        if self.name in self.world.dead:
            self.world.vanish()

    def NcclCommunicator(
        self, ndev: int, commId: bytes, rank: int, config: Any = None
    ) -> "NcclCommunicator":
        self.step()
        return NcclCommunicator._join(self, ndev, commId, rank)

    def get_unique_id(self) -> bytes:
        self.step()
        return next(self.world.ids).to_bytes(128, "little")

    def get_version(self) -> int:
        return 22501

    @property
    def group(self) -> list[tuple["NcclCommunicator", Op]] | None:
        """Of this thread: what was called since groupStart, or None outside a group."""
        return getattr(self._here, "group", None)

    @property
    def graph(self) -> "Graph | None":
        """The graph that this thread captures."""
        return getattr(self._here, "graph", None)

    def groupStart(self) -> None:
        self.step()
        if self.group is not None:
            raise ContractError("groups are not nested here")
        self._here.group = []

    def groupEnd(self) -> None:
        self.step()
        group = self.group
        if group is None:
            raise NcclError(INVALID_USAGE)
        self._here.group = None
        self.launch(group)

    def launch(self, group: list[tuple["NcclCommunicator", Op]]) -> None:
        """Runs a group, or has the graph that is being captured remember it."""
        if self.graph is not None:
            self.graph.calls.append(lambda: self._run(group))
        else:
            self._run(group)

    def _run(self, group: list[tuple["NcclCommunicator", Op]]) -> None:
        comms = {id(comm): comm for comm, _ in group}.values()
        assert len(comms) <= 1, "one communicator in a group"
        for comm in comms:
            comm._launch([op for _, op in group])

    @contextlib.contextmanager
    def capture(self) -> Iterator["Graph"]:
        """What this thread does inside is remembered, may not sync and may not allocate."""
        graph = Graph()
        self._here.graph = graph
        try:
            with capturing(graph):
                yield graph
        finally:
            self._here.graph = None


class NcclCommunicator:
    """One rank."""

    def __init__(self, nccl: FakeNccl, clique: Clique, rank: int) -> None:
        self._nccl = nccl
        self._clique: Clique | None = clique
        self._rank = rank
        self._stream: int | None = None
        self._in_call = False
        self._over = False  # aborted: peers wait in vain
        self._async_status = 0
        self.stuck = False
        nccl.communicators.append(self)

    @property
    def is_gone(self) -> bool:
        """Aborted, or its process is dead."""
        return self._over or self._nccl.name in self._nccl.world.dead

    @staticmethod
    def _join(nccl: FakeNccl, ndev: int, commId: bytes, rank: int) -> "NcclCommunicator":
        _integers(ndev=ndev, rank=rank)
        if not isinstance(commId, bytes):
            raise TypeError(f"Argument 'commId' has incorrect type {type(commId)}")
        if len(commId) != 128:
            raise ValueError(f"commId length {len(commId)} != 128.")
        if not 0 <= rank < ndev:
            raise NcclError(INVALID_ARGUMENT)
        world = nccl.world
        with world.changed:
            clique = world.cliques.setdefault(commId, Clique(ndev))
            if clique.size != ndev or rank in clique.ranks:
                raise ContractError(f"rank {rank} of {ndev}: {clique.size} ranks, {clique.ranks}")
            comm = NcclCommunicator(nccl, clique, rank)
            clique.ranks[rank] = comm
            world.changed.notify_all()
            world.wait_for(
                lambda: len(clique.ranks) == ndev,
                lambda: f"{nccl.name} waits for ranks beside {sorted(clique.ranks)} of {ndev}",
                nccl.name,
            )
        return comm

    def send(self, sendbuf: int, count: int, datatype: int, peer: int, stream: int) -> None:
        self._enqueue(True, sendbuf, count, datatype, peer, stream)

    def recv(self, recvbuf: int, count: int, datatype: int, peer: int, stream: int) -> None:
        self._enqueue(False, recvbuf, count, datatype, peer, stream)

    def _enqueue(
        self, is_send: bool, address: int, count: int, datatype: int, peer: int, stream: int
    ) -> None:
        self._nccl.step()
        _integers(address=address, count=count, datatype=datatype, peer=peer, stream=stream)
        if count < 0:
            raise OverflowError("can't convert negative value to size_t")
        clique = self._alive()
        if not 0 <= peer < clique.size or datatype not in ITEM_BYTES or (count and not address):
            raise NcclError(INVALID_ARGUMENT)
        if self._stream is None:
            self._stream = stream
        if stream != self._stream:
            raise ContractError(f"streams {self._stream} and {stream}: their order is undefined")
        op = Op(is_send, address, count, datatype, peer)
        if self._nccl.group is not None:
            self._nccl.group.append((self, op))
        else:
            self._nccl.launch([(self, op)])

    def _alive(self) -> Clique:
        if self._clique is None:
            raise NcclError(INVALID_ARGUMENT)
        return self._clique

    def _launch(self, ops: list[Op]) -> None:
        world, clique = self._nccl.world, self._alive()
        with world.changed:
            if self.stuck:
                return  # behind an operation that never ends
            self._in_call = True
            left = [len(ops)]
            for op in ops:
                pair = (self._rank, op.peer) if op.is_send else (op.peer, self._rank)
                (clique.sends if op.is_send else clique.recvs)[pair].append((op, left))
                self._match(clique, pair)
            world.changed.notify_all()
            try:
                world.wait_for(
                    lambda: not left[0] or self._in_vain(clique),
                    lambda: f"{self._nccl.name} waits for {left[0]} of {len(ops)} operations",
                    self._nccl.name,
                    world.patience_s,
                )
            finally:
                self._in_call = False
            if left[0]:
                self.stuck = True
                world.changed.notify_all()

    def _match(self, clique: Clique, pair: tuple[int, int]) -> None:
        sends, recvs = clique.sends[pair], clique.recvs[pair]
        ends = [clique.ranks[rank] for rank in pair if rank in clique.ranks]
        if any(end.is_gone or end.stuck for end in ends):
            return  # its buffers may be gone, too
        while sends and recvs:
            (out, sender_left), (into, receiver_left) = sends.popleft(), recvs.popleft()
            if (out.count, out.datatype) != (into.count, into.datatype):
                self._nccl.world.broken = f"ranks {pair}: {out} does not match {into}"
                return
            num_bytes = out.count * ITEM_BYTES[out.datatype]
            ctypes.memmove(into.address, out.address, num_bytes)
            self._nccl.world.num_copied_bytes += num_bytes
            sender_left[0] -= 1
            receiver_left[0] -= 1

    def _in_vain(self, clique: Clique) -> bool:
        """Whether an operation of ours waits for a rank that will never post."""
        if self._async_status:
            return True
        me = self._rank
        for queues, mine in ((clique.sends, 0), (clique.recvs, 1)):
            for pair, queue in queues.items():
                peer = clique.ranks[pair[1 - mine]]
                if pair[mine] == me and queue:
                    if peer.stuck or peer.is_gone:
                        return True
        return False

    def commSplit(self, color: int, key: int, config: Any = None) -> "NcclCommunicator | None":
        self._nccl.step()
        _integers(color=color, key=key)
        world, clique = self._nccl.world, self._alive()
        with world.changed:
            if self.stuck or any(map(len, (*clique.sends.values(), *clique.recvs.values()))):
                raise ContractError("commSplit with operations outstanding")
            if not clique.splits or self._rank in clique.splits[-1]:
                clique.splits.append({})
            number = len(clique.splits) - 1
            asked = clique.splits[number]
            asked[self._rank] = (color, key)
            world.changed.notify_all()
            others = clique.ranks.values()
            world.wait_for(
                lambda: len(asked) == clique.size or any(other.is_gone for other in others),
                lambda: f"{self._nccl.name} splits with {sorted(asked)} of {clique.size}",
                self._nccl.name,
            )
            if len(asked) < clique.size:  # the bootstrap's sockets are closed
                raise NcclError(6)
            if color == -1:
                return None
            ranks = sorted((k, r) for r, (c, k) in asked.items() if c == color)
            part = clique.parts.setdefault((number, color), Clique(len(ranks)))
            rank = ranks.index((key, self._rank))
            part.ranks[rank] = child = NcclCommunicator(self._nccl, part, rank)
            world.changed.notify_all()
            world.wait_for(
                lambda: len(part.ranks) == part.size or any(other.is_gone for other in others),
                lambda: f"{self._nccl.name} waits for the parts of a split",
                self._nccl.name,
            )
            if len(part.ranks) < part.size:
                child._over = True
                raise NcclError(6)
        return child

    def check_async_error(self) -> None:
        self._nccl.step()
        self._alive()
        if self._async_status:
            raise NcclError(self._async_status)

    def inject(self, status: int) -> None:
        """From here on the operations of this rank hang, and `check_async_error` says why."""
        with self._nccl.world.changed:
            self._async_status = status
            self._nccl.world.changed.notify_all()

    def abort(self) -> None:
        if self._clique is not None:
            if self._in_call:
                raise ContractError("abort under a running call: NCCL's manual forbids it")
            with self._nccl.world.changed:
                self._clique, self._over, self.stuck = None, True, False
                self._nccl.world.changed.notify_all()

    def rank_id(self) -> int:
        self._alive()
        return self._rank

    def size(self) -> int:
        return self._alive().size


class CpuDevice:
    """`nccl_api.Device` of a fake process: a mark is ready unless a communicator is stuck."""

    torch_device = torch.device("cpu")

    def __init__(self, nccl: FakeNccl) -> None:
        self._nccl = nccl

    def stream(self) -> int:
        return id(self._nccl)

    def mark(self) -> "CpuDevice":
        return self

    def on_this_thread(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def ready(self) -> bool:
        if self._nccl.graph is not None:
            raise ContractError("a query of an event under capture")
        return not any(comm.stuck for comm in self._nccl.communicators)


def _integers(**values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, int):
            raise TypeError(f"an integer is required for {name}, got {type(value)}")
