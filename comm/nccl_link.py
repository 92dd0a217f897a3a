"""A generation's communicator in use by one rank: groups, waiting, failing, ending.

Everything runs on torch's current stream, so computing and sending are ordered by the stream and
the host waits for nothing within a step, but for a shard's counts in `exact`. A step that fails is
worthless from its first operation to its last: `finish` says so before any token leaves.
"""

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Final

import torch
from torch import Tensor

from remora.comm import nccl_api as api
from remora.comm.errors import DeadlineError, FencedError, PeerLostError
from remora.comm.nccl_plan import Op, Part, Roster, phase

POLL_S: Final = 50e-6  # between two looks at a mark; well below a step


class Link:
    """One rank's communicator, its place in the roster, and how it ends.

    Used by the thread that enqueues the model; `note_lost` by any.

    Args:
        nccl: `load_nccl()` (or the tests' fake).
        comm: communicator of this rank; the link aborts or destroys it.
        device: where buffers lie and which stream is in use.
        roster: members.
        uid: this member.
    """

    def __init__(
        self,
        nccl: api.Nccl,
        comm: api.Communicator,
        device: api.Device,
        roster: Roster,
        uid: str,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.nccl = nccl
        self.device = device
        self.roster = roster
        self.uid = uid
        self.rank = roster.rank_of(uid)
        self._comm: api.Communicator | None = comm
        self._clock = clock
        self._lost = threading.Event()
        self._why_lost = ""
        self._faults: list[Tensor] = []

    @property
    def comm(self) -> api.Communicator:
        """The communicator. Raises PeerLostError after its end."""
        if self._comm is None:
            raise PeerLostError(f"generation {self.roster.generation} is over: {self._why_lost}")
        return self._comm

    def watch_fault(self, fault_1: Tensor) -> None:
        """`finish` reads this flag of the device and fails when it is not zero."""
        self._faults.append(fault_1)

    def run(self, ops: Iterable[Op], tensor_of: Mapping[tuple[Part, int], Tensor]) -> None:
        """Enqueues operations as one group.

        Args:
            ops: in the order of `nccl_plan.phase`.
            tensor_of: (part, peer) -> contiguous tensor; an empty one is no operation.

        Raises:
            PeerLostError: NCCL refused or failed; the communicator is aborted.
        """
        comm, stream = self.comm, self.device.stream()
        try:
            with api.group(self.nccl):
                for op in ops:
                    move = api.send if op.is_send else api.recv
                    move(self.nccl, comm, tensor_of[op.part, op.peer], op.peer, stream)
        except self.nccl.NcclError as error:
            raise self._failed(error) from error

    def connect(self) -> None:
        """One word with every partner, both ways, so that no later step pays for connecting."""
        here = self.roster.partners(self.rank)
        words = torch.zeros(2, len(here), dtype=torch.int32, device=self.device.torch_device)
        tensors: dict[tuple[Part, int], Tensor] = {}
        for i, peer in enumerate(here):
            tensors["ping", peer], tensors["pong", peer] = words[0, i : i + 1], words[1, i : i + 1]
        ping = phase(self.roster, self.rank, ("ping",), to_shards=True)
        pong = phase(self.roster, self.rank, ("pong",), to_shards=False)
        self.run((*ping, *pong), tensors)

    def split(self, into: Roster) -> "Link | None":
        """The link of generation `into` out of this one; collective, with nothing outstanding.

        Blocks until every member has come, and cannot be interrupted.

        Args:
            into: members that stay; those of ours that it does not name get None.

        Raises:
            PeerLostError: NCCL failed; this communicator is aborted.
        """
        stays = self.uid in into.uids
        try:
            child = self.comm.commSplit(
                0 if stays else api.NO_COLOR, into.rank_of(self.uid) if stays else 0
            )
        except self.nccl.NcclError as error:
            raise self._failed(error) from error
        if child is None:
            return None
        return Link(self.nccl, child, self.device, into, self.uid, clock=self._clock)

    def wait(self, deadline_s: float) -> None:
        """Until everything enqueued is over, polling for what NCCL and the cluster know.

        The loop that NCCL's manual asks for: a stream is queried, not synchronised, since
        an operation whose peer is gone never ends by itself.

        Raises:
            PeerLostError: NCCL reports an error, or `note_lost` was called.
            DeadlineError: neither, and not done in time. In all cases the communicator is aborted.
        """
        mark = self.device.mark()
        until = self._clock() + deadline_s
        while not mark.ready():
            self.check()
            if self._clock() > until:
                why = f"generation {self.roster.generation} did not finish in {deadline_s} s"
                self.abort(why)
                raise DeadlineError(why)
            self._lost.wait(POLL_S)

    def check(self) -> None:
        """Raises PeerLostError, and aborts, when NCCL or the cluster knows of a failure."""
        comm = self.comm
        if self._lost.is_set():
            self.abort(self._why_lost)
            raise PeerLostError(self._why_lost)
        try:
            comm.check_async_error()
        except self.nccl.NcclError as error:
            raise self._failed(error) from error

    def finish(self, deadline_s: float) -> None:
        """End of a step: all of it is over and none of it failed.

        Raises:
            PeerLostError, DeadlineError: as `wait`.
            FencedError: a message of another generation or layer came: the members disagree.
        """
        self.wait(deadline_s)
        self.check()
        for fault_1 in self._faults:
            if int(fault_1.item()):
                why = f"{self.uid}: a message of another generation or layer than expected"
                self.abort(why)
                raise FencedError(why)

    def _failed(self, error: Exception) -> PeerLostError:
        self.abort(f"{self.uid}: {error}")
        return PeerLostError(f"generation {self.roster.generation}: {error}")

    def note_lost(self, why: str) -> None:
        """A member is gone: whoever waits stops waiting. From any thread."""
        self._why_lost = self._why_lost or why
        self._lost.set()

    def abort(self, why: str) -> None:
        """Ends what is enqueued; the generation is over. No effect on one that is."""
        self._why_lost = self._why_lost or why
        self._lost.set()
        comm, self._comm = self._comm, None
        if comm is not None:
            comm.abort()

    def destroy(self) -> None:
        """Frees the communicator; its last step is over. No effect on one that is gone."""
        self._why_lost = self._why_lost or "retired"
        comm, self._comm = self._comm, None
        if comm is not None:
            comm.destroy()
