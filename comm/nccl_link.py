"""A generation's communicator in use by one rank: the operations of a plan, and the end of a step.

A step that fails is worthless from its first operation to its last: `finish` says so before any
token leaves.
"""

import time
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from remora.comm import nccl_api as api
from remora.comm.errors import FencedError
from remora.comm.nccl_channel import Channel, Move
from remora.comm.nccl_plan import Op, Part, Roster, phase


class Link(Channel):
    """One rank's communicator and its place in the roster.

    Args:
        nccl, comm, device: as `Channel`.
        roster: members.
        uid: this member.
        watch: as `Channel`.
    """

    def __init__(
        self,
        nccl: api.Nccl,
        comm: api.Communicator,
        device: api.Device,
        roster: Roster,
        uid: str,
        *,
        watch: Callable[[], str | None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        name = f"generation {roster.generation}"
        super().__init__(nccl, comm, device, name=name, uid=uid, watch=watch, clock=clock)
        self.roster = roster
        self.rank = roster.rank_of(uid)
        self._faults: list[Tensor] = []

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
        self.move(Move(op.is_send, tensor_of[op.part, op.peer], op.peer) for op in ops)

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
            raise self.failed(error) from error
        if child is None:
            return None
        watch, clock = self._watch, self._clock
        return Link(self.nccl, child, self.device, into, self.uid, watch=watch, clock=clock)

    def finish(self, deadline_s: float) -> None:
        """End of a step: all of it is over and none of it failed.

        Raises:
            PeerLostError, DeadlineError: as `wait`.
            FencedError: a message of another generation, layer or placement: the members disagree.
        """
        self.wait(deadline_s)
        self.check()
        for fault_1 in self._faults:
            if int(fault_1.item()):
                why = f"{self.uid}: a message of another generation, layer or placement than ours"
                self.abort(why)
                raise FencedError(why)
