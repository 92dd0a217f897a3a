"""A dense rank in step with the others over NCCL: its member, and the step that waits for a ticket.

    logits = source.step(num_tokens, run)   # the engine's thread; run(experts) may run again
    source.attend()                         # the same thread, while idle: what others have begun

The rank asks the conductor for a ticket and runs its model under it; a ticket that fails anywhere
is given again, and the model runs again: it writes the same keys and values into the same pages.
Tickets of others find it without rows of its own. Legend: T token rows, C capacity, K top-k, D
width.
"""

import logging
import queue
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from remora.actors.hardware import Hardware
from remora.actors.launch import NcclLaunch
from remora.actors.model_spec import ModelSpec
from remora.actors.step_context import ExpertsFn
from remora.comm.errors import ClusterError, DeadlineError, PeerLostError
from remora.comm.nccl_link import Link
from remora.comm.nccl_member import NcclMember
from remora.comm.nccl_messages import Built, Refused, Ticket, ToConductor, ToMember, Wants
from remora.comm.nccl_plan import DecodeShape, Roster, home_shards
from remora.comm.nccl_source import SourceExchange
from remora.comm.replicas import replica_tables
from remora.comm.view import View

log = logging.getLogger(__name__)

REFUSAL_LOOK_S = 0.2  # between two looks whether the conductor gave up, while nothing else comes
VIEWS_KEPT = 4  # newest; a communicator that is in use belongs to one of them
STEPS_S = 4  # times a step's deadline that a step may take, with the communicators it needs


@dataclass(slots=True)
class _Pending:
    """The step that this rank waits for."""

    num_tokens: int
    run: Callable[[ExpertsFn], Tensor]
    result: Tensor | None = None
    fault: Exception | None = None  # ours: the model's own
    is_over: bool = False


class NcclSource:
    """One dense rank. Everything but `take` and `note_refused` is the engine thread's.

    Args:
        hardware: the GPU.
        uid, incarnation: of this rank.
        spec, dtype, presummed: of what is sent.
        launch: sizes and deadlines.
        self_host: label of this host; its shards are asked first.
        reply: sends a message to the conductor; raises ClusterError without one.
        wake: has the engine's thread call `attend` soon. From any thread.
    """

    def __init__(
        self,
        hardware: Hardware,
        *,
        uid: str,
        incarnation: int,
        spec: ModelSpec,
        dtype: torch.dtype,
        presummed: bool,
        launch: NcclLaunch,
        self_host: str,
        reply: Callable[[ToConductor], None],
        wake: Callable[[], None],
    ) -> None:
        assert hardware.nccl_device is not None, "NCCL joins GPUs"
        self._uid = uid
        self._spec = spec
        self._dtype = dtype
        self._presummed = presummed
        self._launch = launch
        self._self_host = self_host
        self._reply = reply
        self._wake = wake
        self._views: list[View] = []  # newest last
        self._pending: _Pending | None = None
        self._refused: str | None = None
        self._exchanges: dict[tuple[int, int, int], SourceExchange] = {}
        self._untold: list[Built] = []  # of views that have not reached us
        self.member = NcclMember(
            nccl=hardware.nccl(),
            device=hardware.nccl_device,
            uid=uid,
            incarnation=incarnation,
            reply=self._tell,
            work=self._work,
            emit=self._emit,
            step_deadline_s=launch.step_timeout_s,
        )

    def take(self, message: ToMember) -> None:
        """A message of the conductor's. From any thread."""
        if isinstance(message, Refused):
            self._refused = message.why
        else:
            self.member.post(message)
        self._wake()

    def attend(self) -> None:
        """Handles what has come; what fails is told by the next step."""
        try:
            while self.member.serve_one(0):
                pass
        except queue.Empty:
            return
        except ClusterError as error:
            log.error("%s: %s", self._uid, error)
            self._refused = str(error)

    def see(self, view: View) -> None:
        """`view` is the newest; its communicator may be under way."""
        self._refused = None
        self._views = [*self._views, view][-VIEWS_KEPT:]
        untold, self._untold = self._untold, []
        for built in untold:
            self.member.post(built)  # told, unless it has been stopped meanwhile

    def wait_for(self, view: View, timeout_s: float) -> None:
        """Returns when a communicator of the members of `view` is in use.

        Raises:
            ClusterError: there is none within `timeout_s`, or the conductor gave up.
        """
        until_s = time.monotonic() + timeout_s
        while not self._uses(view):
            self._wait_for_event(until_s, f"view {view.epoch}: no communicator")

    def step(self, num_tokens: int, run: Callable[[ExpertsFn], Tensor]) -> Tensor:
        """What `run(experts)` made in the ticket that was committed.

        Raises:
            ClusterError: no ticket was committed in time, or the conductor gave up.
            Exception: `run`'s own.
        """
        pending = self._pending = _Pending(num_tokens, run)
        until_s = time.monotonic() + STEPS_S * self._launch.step_timeout_s
        try:
            self._reply(Wants(self._uid, num_tokens))
            while not pending.is_over and pending.fault is None:
                self._wait_for_event(until_s, "no step over NCCL was committed")
        finally:
            self._pending = None
        if pending.fault is not None:
            raise pending.fault
        assert pending.result is not None, "committed, but not run"
        return pending.result

    def close(self) -> None:
        """Aborts every communicator."""
        self.member.end()

    def _tell(self, message: ToConductor) -> None:
        """Answers the conductor: with a communicator only once its view is here, as a ticket of it
        may come next. A view waits in the engine's inbox behind the step that handles the build."""
        if isinstance(message, Built):
            roster = self.member.roster_of(message.generation)
            assert roster is not None, f"{message}, but there is no communicator"
            if not any(_is_of(roster, view) for view in self._views):
                self._untold.append(message)
                return
        self._reply(message)

    def _wait_for_event(self, until_s: float, what: str) -> None:
        if self._refused is not None:
            raise ClusterError(self._refused)
        left_s = until_s - time.monotonic()
        if left_s <= 0:
            raise DeadlineError(f"{self._uid}: {what} in time")
        try:
            self.member.serve_one(min(left_s, REFUSAL_LOOK_S))
        except queue.Empty:
            return

    def _uses(self, view: View) -> bool:
        roster = self.member.roster_in_use
        return roster is not None and _is_of(roster, view)

    # -- under a ticket -----------------------------------------------------------------------

    def _work(self, link: Link, ticket: Ticket) -> None:
        pending = self._pending if self._uid in ticket.sources else None
        fits = pending is not None and (
            ticket.mode == "exact" or pending.num_tokens <= ticket.capacity
        )  # else the ticket is for a step that was given up
        if pending is None or pending.fault is not None or not fits:
            self._take_part(link, ticket)
            return
        pending.result = None
        try:
            pending.result = pending.run(self._experts(link, ticket))
        except ClusterError:
            raise
        except Exception as error:  # the others must not wait for us; the engine is told
            pending.fault = error
            why = f"{self._uid}: {type(error).__name__}: {error}"
            link.abort(why)
            raise PeerLostError(why) from error

    def _emit(self, step: int) -> None:
        if self._pending is not None and self._pending.result is not None:
            self._pending.is_over = True

    def _experts(self, link: Link, ticket: Ticket) -> ExpertsFn:
        """Experts that answer the rows of this ticket."""
        exchange = self._exchange_of(link, ticket)

        def exact(
            layer: int, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor, num_tokens: int
        ) -> Tensor:
            return exchange.exact(layer, hidden_TD, index_TK, weights_TK.float(), num_tokens)

        def decode(
            layer: int, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor, num_tokens: int
        ) -> Tensor:
            capacity = ticket.capacity
            hidden_CD = hidden_TD.new_zeros((capacity, hidden_TD.shape[1]))
            index_CK = index_TK.new_full((capacity, index_TK.shape[1]), -1)
            weight_CK = torch.zeros(index_CK.shape, dtype=torch.float32, device=hidden_TD.device)
            hidden_CD[:num_tokens] = hidden_TD[:num_tokens]
            index_CK[:num_tokens] = index_TK[:num_tokens]
            weight_CK[:num_tokens] = weights_TK[:num_tokens]
            out_CD = torch.empty_like(hidden_CD)
            exchange.decode(layer, hidden_CD, index_CK, weight_CK, out_CD)
            out_TD = torch.zeros_like(hidden_TD)
            out_TD[:num_tokens] = out_CD[:num_tokens]
            return out_TD

        return exact if ticket.mode == "exact" else decode

    def _take_part(self, link: Link, ticket: Ticket) -> None:
        """Every layer without a row: other ranks have work, this one has not."""
        experts = self._experts(link, ticket)
        at, top_k = link.device.torch_device, self._spec.top_k
        hidden = torch.zeros((0, self._spec.hidden_size), dtype=self._dtype, device=at)
        index = torch.zeros((0, top_k), dtype=torch.int64, device=at)
        weights = torch.zeros((0, top_k), dtype=torch.float32, device=at)
        for layer in self._spec.moe_layers:
            experts(layer, hidden, index, weights, 0)

    def _exchange_of(self, link: Link, ticket: Ticket) -> SourceExchange:
        view = self._view_of(link.roster)
        key = (link.roster.generation, ticket.capacity, view.epoch)
        if key not in self._exchanges:
            oldest = link.roster.generation - 1  # the one before is kept until this one is proved
            kept = self._exchanges.items()
            self._exchanges = {
                k: v for k, v in kept if k[0] >= oldest and k[2] >= view.epoch - VIEWS_KEPT
            }
            self._exchanges[key] = self._make_exchange(link, view, ticket.capacity)
        return self._exchanges[key]

    def _make_exchange(self, link: Link, view: View, capacity: int) -> SourceExchange:
        roster, spec = link.roster, self._spec
        host_of = {member.uid: member.endpoint.host for member in view.members}
        is_local = [host_of[uid] == self._self_host for uid in roster.shard_uids]
        tables = replica_tables(view, list(roster.shard_uids))
        return SourceExchange(
            link,
            shape_of(roster, spec, capacity, presummed=self._presummed),
            dtype=self._dtype,
            home_tables={i: home_shards(t, is_local, link.rank) for i, t in tables.items()},
            replica_tables=tables,
            local_S=np.array(is_local, np.uint8),
            deadline_s=self._launch.step_timeout_s,
        )

    def _view_of(self, roster: Roster) -> View:
        """The newest view whose members are those of `roster`."""
        for view in reversed(self._views):
            if _is_of(roster, view):
                return view
        raise PeerLostError(f"{self._uid} knows no view of generation {roster.generation}")


def shape_of(roster: Roster, spec: ModelSpec, capacity: int, *, presummed: bool) -> DecodeShape:
    """Sizes of a decode exchange; the same on all members."""
    return DecodeShape(
        num_sources=roster.num_sources,
        num_shards=roster.num_shards,
        num_experts=spec.num_experts,
        capacity=capacity,
        top_k=spec.top_k,
        width=spec.hidden_size,
        presummed=presummed,
    )


def _is_of(roster: Roster, view: View) -> bool:
    lives = {(member.uid, member.incarnation) for member in view.members}
    return lives == set(zip(roster.uids, roster.incarnations, strict=True))
