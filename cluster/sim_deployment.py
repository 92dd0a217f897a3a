"""A whole deployment in one thread: real machines on a virtual network, and what must hold of it.

The numbers are those of the design's list: 1 identical output, 2 no position lost or twice, 3 no
error of a planned operation, 4 every expert has a verified replica and an epoch one view, 5 no slot
is freed while a frame by a view that names it can arrive, 6 what is held is back at the baseline,
7 every operation ends and the next one succeeds, 8 no stream waits longer than a bound. To those
come 9: second copies take no slot that a view may fill, 10: a dense group that retires is not ended
while it has requests and time for them, 11: no member stays away longer than a bound once there is
room for it.
"""

import random
from functools import partial
from typing import Final

import msgspec

from remora.cluster.operation import StartDense, StartShard
from remora.cluster.sim_coordinator import LIMITS, SimCoordinator
from remora.cluster.sim_faults import Fault, Faults
from remora.cluster.sim_ingress import SimIngress
from remora.cluster.sim_model import LAYERS, NUM_EXPERTS, digest_of, weights_of
from remora.cluster.sim_network import Clock, Network, Violation, uid_of
from remora.cluster.sim_nodes import SimNodes
from remora.cluster.sim_operator import SimOperator
from remora.cluster.sim_places import SimPlaces
from remora.cluster.sim_rank import SimRank
from remora.cluster.sim_routes import SimLink
from remora.cluster.sim_shard import Asked, NotMine, Reply, SimShard, member_of
from remora.comm.view import Placement, View, contiguous_placement

TRACE_MAX: Final = 100_000  # lines
MANIFEST: Final = {(n, e): digest_of(weights_of(n, e)) for n in LAYERS for e in range(NUM_EXPERTS)}


class Deployment:
    """Shards, dense groups, clients and a coordinator, up since ever.

    Args:
        room: slots of a shard in each layer; `num_copies` more are for second copies.
        traced: keep what happens as lines.
    """

    def __init__(
        self,
        chance: random.Random,
        *,
        num_shards: int,
        num_dense: int,
        room: int,
        num_copies: int = 0,
        faults: tuple[Fault, ...] = (),
        traced: bool = False,
    ) -> None:
        self.chance = chance
        self.limits = msgspec.structs.replace(LIMITS, num_copies=num_copies)
        self.clock = Clock()
        self.network = Network(self.clock, chance)
        self.lines: list[str] | None = [] if traced else None
        self.shards: dict[str, SimShard] = {}  # every life
        self.ranks: dict[str, SimRank] = {}
        self.views: dict[int, View] = {}  # committed, by epoch
        self.faults = Faults(self, faults)
        self.nodes = SimNodes(self)
        self.places = SimPlaces(self)
        self.coordinator = SimCoordinator(self)
        self.ingress = SimIngress(self)
        self.view = self._first(num_shards, num_dense, room)
        self.operator = SimOperator(self, set(self.view.placement.slots))
        self.views[1] = self.view
        rooms = {uid: (room,) * len(LAYERS) for uid in self.view.placement.slots}
        self.coordinator.begin(self.view, rooms, MANIFEST)

    def trace(self, text: str) -> None:
        """One line of what happens."""
        if self.lines is not None and len(self.lines) < TRACE_MAX:
            self.lines.append(f"{self.clock.now_s:9.3f}  {text}")

    # -- who there is -------------------------------------------------------------------------

    def shards_alive(self) -> list[str]:
        """Uids of shards that have a living process."""
        return sorted({uid_of(p) for p in self.shards if p in self.network.alive})

    def ranks_alive(self) -> list[str]:
        """Uids of living dense groups."""
        return sorted(uid_of(p) for p in self.ranks if p in self.network.alive)

    def ranks_by_load(self) -> list[SimRank]:
        """Living dense groups that requests may go to, the least loaded first."""
        members = {m.actor_name for m in self.view.members} & self.network.alive
        ranks = [r for p, r in self.ranks.items() if p in members and not r.retires]
        return sorted(ranks, key=lambda r: (r.state.stats().num_running, r.process))

    def lives(self, process: str) -> bool:
        """Whether a process is there."""
        return process in self.network.alive

    def uids(self) -> list[str]:
        """Who has a link that can be cut."""
        return ["coordinator", *self.ranks_alive(), *self.shards_alive()]

    def process_of(self, uid: str) -> str:
        """The newest living process of a uid."""
        if uid == "coordinator":
            return self.coordinator.process
        every = [*self.shards, *self.ranks]
        return [p for p in every if uid_of(p) == uid and p in self.network.alive][-1]

    def host_of(self, process: str) -> str:
        """Where a process of a shard or a dense group is."""
        found = self.shards.get(process) or self.ranks[process]
        return found.member.endpoint.host

    # -- what they do to each other -----------------------------------------------------------

    def start(self, task: StartShard | StartDense, reply: Reply) -> str:
        """A new process, once there is room for it; its name."""
        process = f"{task.uid}#{task.incarnation}"
        is_known = process in self.shards or process in self.ranks
        assert not is_known and not self.places.is_waiting(process), f"{process} is started twice"
        self.places.start(process, partial(self._placed, task, reply))
        return process

    def end(self, process: str) -> None:
        """The coordinator ends a process; invariant 10."""
        self.places.forget(process)
        rank = self.ranks.get(process)
        if rank is not None and process in self.network.alive and not self.faults.struck:
            time_left = not rank.retires or self.clock.now_s < rank.quiet_until_s
            if rank.state.has_work and time_left:
                text = f"10: {process} is ended with requests, and there was time for them"
                self.clock.after(0.0, partial(self._violated, text))  # the runner would log it
        self.network.kill(process)

    def on_call(
        self, process: str, rank: SimRank, link: SimLink, call: int, layer: int, asked: Asked
    ) -> None:
        """A frame of a dense rank arrives at a shard. Raises Violation: invariant 5."""
        shard = self.shards[process]
        gone = partial(rank.dispatch.lose, shard.member.uid, link)
        lost = partial(self.network.timer, rank.process, 0.0, gone)  # both ends see it
        if link.is_closed:
            self.network.send(process, rank.process, gone, lost)
            return
        found = shard.compute(layer, asked)
        counts = rank.process in self.network.alive and rank.dispatch.is_waiting_for(call)
        if isinstance(found, NotMine) and counts:
            raise Violation(
                f"5: {process} holds no {found.experts} of layer {layer}, which {rank.process} asks"
                f" for by epoch {rank.routes.epoch}"
            )
        self.network.answer(
            process, rank.process, lambda: rank.dispatch.answered(call, found), lost
        )

    def cut_off(self, shard: SimShard, fenced: frozenset[str]) -> None:
        """A shard closes the connections of dense ranks that it refuses."""
        for rank in self.ranks.values():
            if rank.name in fenced and rank.process in self.network.alive:
                link = rank.routes.link_to(shard.member)
                if link is not None:
                    link.is_closed = True
                told = partial(rank.cut_off, shard, link)
                self.network.send(shard.process, rank.process, told)

    def published(self, view: View) -> None:
        """A view is committed. Raises Violation: invariant 4."""
        self.trace(f"epoch {view.epoch} is committed: {', '.join(sorted(view.placement.slots))}")
        known = self.views.setdefault(view.epoch, view)
        if known.view_hash != view.view_hash:
            raise Violation(f"4: epoch {view.epoch} has two views")
        self.view = view
        try:
            view.placement.check()
        except AssertionError as wrong:
            raise Violation(f"4: epoch {view.epoch}: {wrong}") from None
        for member in view.members:
            shard = self.shards.get(member.actor_name)
            if shard is None or member.actor_name not in self.network.alive:
                continue
            slots = view.placement.slots[member.uid]
            for layer, experts in zip(LAYERS, slots, strict=True):
                missing = shard.state.not_mine(layer, experts)
                if missing and known is view:
                    raise Violation(
                        f"4: epoch {view.epoch} says that {member.uid} holds {missing} of {layer}"
                    )
            if shard.damaged():
                raise Violation(f"4: epoch {view.epoch}: {member.uid} serves {shard.damaged()}")

    def on_error(self, rank: SimRank, number: int, error: str) -> None:
        """A request failed. Raises Violation: invariant 3."""
        raise Violation(f"3: request {number} of {rank.process} fails: {error}")

    # -- inside -------------------------------------------------------------------------------

    def _placed(self, task: StartShard | StartDense, reply: Reply) -> None:
        started: SimShard | SimRank
        if isinstance(task, StartShard):
            started = self.shards[f"{task.uid}#{task.incarnation}"] = SimShard(self, task)
        else:
            started = SimRank(self, task.uid, task.incarnation)
            self.ranks[started.process] = started
        self.network.start(started.process)
        started.start(reply)

    def _violated(self, text: str) -> None:
        raise Violation(text)

    def _first(self, num_shards: int, num_dense: int, room: int) -> View:
        uids = tuple(f"shard-{i}" for i in range(num_shards))
        placement: Placement = contiguous_placement(
            num_experts=NUM_EXPERTS, moe_layers=LAYERS, shard_uids=uids, slots=room
        )
        dense = [f"dense-{i}" for i in range(num_dense)]
        place = self.nodes.place
        members = tuple(member_of(uid, 1, place(uid)) for uid in (*dense, *uids))
        view = View(epoch=1, members=members, placement=placement)
        for uid in uids:
            experts = placement.slots[uid]
            task = StartShard(uid=uid, incarnation=1, experts=experts, num_slots=room)
            shard = SimShard(self, task)
            self.shards[shard.process] = shard
            self.network.start(shard.process)
            shard.load_now()
        for uid in dense:
            rank = SimRank(self, uid, 1)
            self.ranks[rank.process] = rank
            self.network.start(rank.process)
            rank.adopt_now(view)
        return view
