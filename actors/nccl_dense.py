"""A dense rank in step with the others over NCCL: its member, and the step that waits for a ticket.

    logits = source.step(num_tokens, run)   # the engine's thread; run(experts) may run again
    source.attend()                         # the same thread, while idle: what others have begun

The rank asks the conductor for a ticket and runs its model under it; a ticket that fails anywhere
is given again, and the model runs again: it writes the same keys and values into the same pages.
Tickets of others find it without rows of its own. Where the members that live do not hold every
expert the step is held, and takes the view that has them again (`ViewInbox`). Legend: T token rows,
C capacity, K top-k, D width.
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
from remora.actors.view_inbox import ViewInbox
from remora.comm.errors import ClusterError, DeadlineError, PeerLostError
from remora.comm.nccl_link import Link
from remora.comm.nccl_member import NcclMember
from remora.comm.nccl_messages import Built, Refused, Ticket, ToConductor, ToMember, Wants
from remora.comm.nccl_plan import DecodeShape, Roster, home_shards
from remora.comm.nccl_source import SourceExchange
from remora.comm.replicas import replica_tables
from remora.comm.view import View, uncovered

log = logging.getLogger(__name__)

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
    """One dense rank. Everything but `take`, `lose_conductor` and `look_up` is the engine
    thread's.

    Args:
        hardware: the GPU.
        uid, incarnation: of this rank.
        spec, dtype, presummed: of what is sent.
        launch: sizes and deadlines.
        self_host: label of this host; its shards are asked first.
        reply: sends a message to the conductor; raises ClusterError without one.
        wake: has the engine's thread call `attend` soon. From any thread.
        views: asked by a step that waits for its ticket.
        adopt: called by that step with a view that is newer than those seen; it calls `see`.
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
        views: ViewInbox,
        adopt: Callable[[View], None],
    ) -> None:
        assert hardware.nccl_device is not None, "NCCL joins GPUs"
        self._uid = uid
        self._spec = spec
        self._dtype = dtype
        self._presummed = presummed
        self._launch = launch
        self._self_host = self_host
        self._reply = reply
        self._inbox = views
        self._adopt = adopt
        self._views: list[View] = []  # newest last
        self._offered: View | None = None  # to come
        self._view_by_generation: dict[int, View] = {}  # as far as it was looked for
        self._pending: _Pending | None = None
        self._asked = False  # the conductor knows of the step that waits
        self._refused: tuple[Refused, float] | None = None  # until a ticket comes; and since when
        self._exchanges: dict[tuple[int, int, int], SourceExchange] = {}
        self._untold: list[Built] = []  # of members that no view here names
        self.member = NcclMember(
            nccl=hardware.nccl(),
            device=hardware.nccl_device,
            uid=uid,
            incarnation=incarnation,
            reply=self._tell,
            work=self._work,
            emit=self._emit,
            step_deadline_s=launch.step_timeout_s,
            wake=wake,
        )

    def take(self, message: ToMember) -> None:
        """A message of the conductor's. From any thread."""
        if not isinstance(message, Refused):
            if isinstance(message, Ticket):
                self._refused = None
            self.member.post(message)
        elif message.epoch >= self._epoch:  # else a newer view has come since
            self._refuse(message)

    def lose_conductor(self, why: str) -> None:
        """Steps wait for another conductor. From any thread."""
        self._asked = False
        self.member.lose_conductor(why)
        self._refuse(Refused(why, self._epoch, is_hold=True))

    def look_up(self) -> None:
        """Has a step that waits look at its inbox. From any thread."""
        self.member.call_soon(lambda: None)

    def _refuse(self, refused: Refused) -> None:
        self._refused = refused, time.monotonic()
        self.look_up()

    @property
    def _epoch(self) -> int:
        return self._views[-1].epoch if self._views else 0

    def attend(self) -> None:
        """Handles what has come; what fails is told by the next step."""
        try:
            while self.member.serve_one(0):
                pass
        except queue.Empty:
            return
        except ClusterError as error:
            log.error("%s: %s", self._uid, error)
            self._refuse(Refused(str(error), self._epoch))
        except Exception as error:  # ours, in a ticket of others: they know that it broke
            log.exception("%s failed in a ticket without a step of its own", self._uid)
            self._refuse(Refused(f"{type(error).__name__}: {error}", self._epoch))

    def see(self, view: View) -> None:
        """`view` is committed; its communicator may be under way.

        Raises:
            ClusterError: it was seen before, and no step runs by it as yet.
        """
        if view.epoch > self._epoch:
            self._refused = None
            self._views = [*self._views, view][-VIEWS_KEPT:]
            self._look_for_views()
        elif self._refused is not None:
            raise ClusterError(self._refused[0].why)

    def expect(self, view: View) -> None:
        """`view` may be committed; its communicator may be needed before: a rank that is to conduct
        says that it serves when its members have one."""
        self._offered = view
        self._look_for_views()

    def _look_for_views(self) -> None:
        """Another view is known."""
        self._view_by_generation.clear()
        untold, self._untold = self._untold, []
        for built in untold:
            self.member.post(built)  # told, unless it has been stopped meanwhile

    def step(self, num_tokens: int, run: Callable[[ExpertsFn], Tensor]) -> Tensor:
        """What `run(experts)` made in the ticket that was committed.

        Raises:
            ClusterError: no ticket was committed in time, the conductor gave up, or an expert had
                no replica for as long as a step is held.
            Exception: `run`'s own.
        """
        pending = self._pending = _Pending(num_tokens, run)
        self._asked = False
        within_s = self._inbox.hold_s + STEPS_S * self._launch.step_timeout_s
        until_s = time.monotonic() + within_s
        try:
            while not pending.is_over and pending.fault is None:
                self._wait(num_tokens, until_s)
        finally:
            self._pending = None
            self._inbox.is_holding = False
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
            if self._find_view(roster) is None:
                self._untold.append(message)
                return
        self._reply(message)

    def _wait(self, num_tokens: int, until_s: float) -> None:
        """One event, and whatever else has come for a step that waits."""
        newest = self._inbox.attend(self._epoch)
        if newest.epoch > self._epoch:
            self._adopt(newest)
        if self._refused is None and not self._asked:
            self._ask(num_tokens)
        try:
            self.member.serve_one(self._left_s(until_s))
        except queue.Empty:
            return

    def _ask(self, num_tokens: int) -> None:
        self._asked = True
        try:
            self._reply(Wants(self._uid, num_tokens))
        except PeerLostError as error:
            self.lose_conductor(str(error))

    def _left_s(self, until_s: float) -> float:
        """How long the step may wait for the next event. Raises ClusterError: no longer."""
        now_s, refused = time.monotonic(), self._refused
        self._inbox.is_holding = refused is not None and refused[0].is_hold
        if refused is None:
            if now_s >= until_s:
                raise DeadlineError(f"{self._uid}: no step over NCCL was committed in time")
            return until_s - now_s
        message, since_s = refused
        left_s = since_s + (self._inbox.hold_s if message.is_hold else 0.0) - now_s
        if left_s <= 0:
            raise ClusterError(message.why)
        return left_s

    # -- under a ticket -----------------------------------------------------------------------

    def _work(self, link: Link, ticket: Ticket) -> None:
        pending = self._pending
        if pending is not None:
            pending.result = None  # an earlier ticket's, which another one makes void
        if pending is None or not self._is_for(pending, ticket):
            self._take_part(link, ticket)
            return
        try:
            pending.result = pending.run(self._experts(link, ticket))
        except ClusterError:
            raise
        except Exception as error:  # the others must not wait for us; the engine is told
            pending.fault = error
            why = f"{self._uid}: {type(error).__name__}: {error}"
            link.abort(why)
            raise PeerLostError(why) from error

    def _is_for(self, pending: _Pending, ticket: Ticket) -> bool:
        """Whether the step runs by this ticket: not by one for a step that was given up."""
        fits = ticket.mode == "exact" or pending.num_tokens <= ticket.capacity
        return self._uid in ticket.sources and pending.fault is None and fits

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
        view = self._find_view(roster)
        if view is None:
            raise PeerLostError(f"{self._uid} knows no view of generation {roster.generation}")
        return view

    def _find_view(self, roster: Roster) -> View | None:
        """The newest view that names all members of `roster`, whose shards hold every expert of it:
        others of its members are gone, or to come."""
        if roster.generation not in self._view_by_generation:
            lives = set(zip(roster.uids, roster.incarnations, strict=True))
            fits = [view for view in reversed(self._views) if _serves(lives, roster, view)]
            if not fits and self._offered is not None and lives == _lives_of(self._offered):
                fits = [self._offered]
            if not fits:
                return None
            self._view_by_generation[roster.generation] = fits[0]
        return self._view_by_generation[roster.generation]


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


def _lives_of(view: View) -> set[tuple[str, int]]:
    return {(member.uid, member.incarnation) for member in view.members}


def _serves(lives: set[tuple[str, int]], roster: Roster, view: View) -> bool:
    return lives <= _lives_of(view) and not uncovered(view.placement, roster.shard_uids)
