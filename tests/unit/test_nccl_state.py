"""The conductor's and the members' machines, simulated: any order of messages, deaths, failures."""

import copy
import random
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.nccl_cluster import thrice
from support.nccl_rig import view_of

from remora.comm import nccl_conductor_state as conductor
from remora.comm import nccl_member_state as member
from remora.comm.errors import UserError
from remora.comm.nccl_messages import (
    Build,
    Built,
    Commit,
    NotBuilt,
    Stop,
    Ticket,
    TicketBroken,
    TicketOver,
    decode_to_conductor,
    decode_to_member,
    encode,
)
from remora.comm.nccl_plan import Roster
from remora.comm.view import Placement, View, uncovered


@dataclass
class Process:
    """A member: its machine, its inbox, and what its NCCL does."""

    state: member.MemberState
    inbox: deque[Any] = field(default_factory=deque)
    building: dict[int, Roster] = field(default_factory=dict)
    abandoned: set[int] = field(default_factory=set)
    alive: set[int] = field(default_factory=set)  # generations whose communicator it has
    running: Ticket | None = None
    emitted: list[int] = field(default_factory=list)


class Simulation:
    """Everything in one thread; `chance` picks who moves next and what goes wrong."""

    def __init__(self, chance: random.Random, num_steps: int, split: bool) -> None:
        self.chance = chance
        self.num_steps = num_steps
        self.holds = 0
        self.conductor = conductor.ConductorState(split=split)
        self.inbox: deque[Any] = deque()
        self.processes: dict[str, Process] = {}
        self.dead: set[str] = set()
        self.rosters: dict[int, Roster] = {}
        self.begun: dict[int, set[str]] = {}  # generation -> who began to create it
        self.reached: dict[int, set[str]] = {}  # ticket -> who began it
        self.over: dict[int, set[str]] = {}  # ticket -> for whom nothing of it failed
        self.tickets: dict[int, Ticket] = {}
        self.commits: list[int] = []
        self.gave_up = False
        self.failures_left = 2
        self.view = self._publish(view_of(2, thrice(4), epoch=1))
        self.inbox.append(conductor.StepWanted("exact"))

    def _publish(self, view: View) -> View:
        for one in view.members:
            if one.uid not in self.processes:
                self.processes[one.uid] = Process(member.MemberState(one.uid, 1))
        self.inbox.append(conductor.ViewCame(view, dict.fromkeys(self.dead, "dead")))
        return view

    def _next_view(self, uids: set[str]) -> None:
        members = tuple(m for m in view_of(2, thrice(5)).members if m.uid in uids)
        placement = self._placement([m.uid for m in members if m.role == "shard"])
        self.view = self._publish(
            View(epoch=self.view.epoch + 1, members=members, placement=placement)
        )

    def _placement(self, shards: list[str]) -> Placement:
        """Everything everywhere, or one replica of each: then nobody can be spared."""
        whole = thrice(5)
        alone = self.chance.random() < 0.5
        experts = range(whole.num_experts)
        held = {
            uid: tuple(e for e in experts if not alone or e % len(shards) == i)
            for i, uid in enumerate(shards)
        }
        slots = {uid: (each,) * len(whole.moe_layers) for uid, each in held.items()}
        return Placement(num_experts=whole.num_experts, moe_layers=whole.moe_layers, slots=slots)

    def kill(self, uid: str) -> None:
        self.dead.add(uid)
        self.inbox.append(conductor.MemberLost(uid, 1, f"{uid} died"))

    def run(self) -> None:
        """Until nothing can move; each move is one event of one actor."""
        for _ in range(20_000):
            if not self._move():
                return
        raise AssertionError(f"no end: {self.conductor.running}, {self.conductor.next}")

    def _move(self) -> bool:
        moves = [lambda p=p, uid=uid: self._member(uid, p) for uid, p in self._movable()]
        moves += [self._conduct] if self.inbox else []
        if not moves:
            return False
        self.chance.choice(moves)()
        return True

    def _movable(self) -> list[tuple[str, Process]]:
        found = []
        for uid, process in self.processes.items():
            if uid in self.dead:
                continue
            if process.running is not None:
                if self._outcome(uid, process) is not None:
                    found.append((uid, process))
            elif process.inbox or any(self._built(g) for g in process.building):
                found.append((uid, process))
        return found

    def _built(self, generation: int) -> bool:
        """A communicator is there once every member has begun to create it, dead or not since."""
        return self.begun[generation] >= set(self.rosters[generation].uids)

    def _outcome(self, uid: str, process: Process) -> str | None:
        """How the running ticket ends for this member: "", a reason, or None for not yet."""
        ticket = process.running
        assert ticket is not None
        if any(isinstance(m, Stop) and m.generation == ticket.generation for m in process.inbox):
            return "stopped"
        peers = set(self.rosters[ticket.generation].uids)
        if self.failures_left and self.chance.random() < 0.02:
            self.failures_left -= 1
            return "an error that NCCL reports"
        if peers <= self.reached[ticket.number]:
            return ""
        gone = {p for p in peers if p in self.dead or self._gave_up_on(p, ticket)}
        return "the deadline" if gone - self.reached[ticket.number] else None

    def _gave_up_on(self, uid: str, ticket: Ticket) -> bool:
        return ticket.generation not in self.processes[uid].alive

    def _member(self, uid: str, process: Process) -> None:
        if process.running is not None:
            why, ticket = self._outcome(uid, process), process.running
            if why is None:
                return
            process.running = None
            if not why:
                self.over.setdefault(ticket.number, set()).add(uid)
                if ticket.into is not None and uid in ticket.into.uids:
                    self.rosters[ticket.into.generation] = ticket.into
                    process.alive.add(ticket.into.generation)
            done: Any = TicketOver(uid, ticket.number)
            self._apply(uid, process, TicketBroken(uid, ticket.number, why) if why else done)
            return
        built = [g for g in process.building if self._built(g)]
        if built and (not process.inbox or self.chance.random() < 0.5):
            generation = built[0]
            del process.building[generation]
            if generation in process.abandoned:
                return
            process.alive.add(generation)
            self._apply(uid, process, Built(uid, generation))
        elif process.inbox:
            self._apply(uid, process, process.inbox.popleft())

    def _apply(self, uid: str, process: Process, event: Any) -> None:
        for instruction in process.state.handle(event):
            match instruction:
                case member.StartBuild(roster, _):
                    self.rosters[roster.generation] = roster
                    self.begun.setdefault(roster.generation, set()).add(uid)
                    process.building[roster.generation] = roster
                case member.Abandon(generation):
                    process.abandoned.add(generation)
                case member.Run(ticket):
                    assert ticket.generation in process.alive, f"{uid} has no {ticket}"
                    process.running = ticket
                    self.reached.setdefault(ticket.number, set()).add(uid)
                case member.Abort(generation):
                    process.alive.discard(generation)
                case member.Emit(step):
                    process.emitted.append(step)
                case member.Reply(message):
                    self.inbox.append(decode_to_conductor(encode(message)))

    def _conduct(self) -> None:
        for instruction in self.conductor.handle(self.inbox.popleft()):
            match instruction:
                case conductor.MakeId(generation):
                    self.inbox.append(conductor.IdMade(generation, bytes(128)))
                case conductor.Hold():
                    shards = {m.uid for m in self.view.members if m.role == "shard"}
                    living = shards - self.dead
                    if uncovered(self.view.placement, living):  # else another view is under way
                        self.holds += 1
                        self._next_view({m.uid for m in self.view.members} - self.dead)
                case conductor.GiveUp():
                    self.gave_up = True
                case conductor.Send(uids, message):
                    if isinstance(message, Ticket):
                        self.tickets[message.number] = message
                    for uid in uids:
                        self.processes[uid].inbox.append(decode_to_member(encode(message)))
                    if isinstance(message, Commit):
                        self._committed(message.step)

    def _committed(self, step: int) -> None:
        ticket = self.tickets[max(self.tickets)]
        members = set(self.rosters[ticket.generation].uids)
        assert ticket.step == step and self.over[ticket.number] >= members - self.dead
        assert step == len(self.commits) + 1, f"step {step} after {self.commits}"
        self.commits.append(step)
        if step < self.num_steps:
            self.inbox.append(conductor.StepWanted("decode", 4))
        if self.chance.random() < 0.4:  # somebody comes or goes, as planned
            uids = {m.uid for m in self.view.members}
            uid = f"shard-{self.chance.randrange(5)}"
            shards = {u for u in uids if u.startswith("shard")} - self.dead
            if uid not in self.dead and (uid not in uids or len(shards) > 2):
                self._next_view((uids ^ {uid}) - self.dead)
        elif self.chance.random() < 0.2:
            victims = [m.uid for m in self.view.members if m.uid not in self.dead]
            shards = [u for u in victims if u.startswith("shard")]
            if len(shards) > 2:
                self.kill(self.chance.choice(shards))


@settings(max_examples=150)
@given(st.integers(0, 1 << 32), st.booleans())
def test_every_step_is_committed_once_and_by_all(seed: int, split: bool) -> None:
    simulation = Simulation(random.Random(seed), 8, split)
    simulation.run()
    assert not simulation.gave_up
    assert simulation.commits == list(range(1, 9)), simulation.commits
    alive = {m.uid for m in simulation.view.members} - simulation.dead
    for uid in alive:
        process = simulation.processes[uid]
        assert process.emitted == sorted(set(process.emitted)), uid
        assert len(process.state.phase) <= 2 and process.running is None, uid


def roster_of(generation: int, num_shards: int = 3) -> Roster:
    return Roster.of(view_of(1, thrice(num_shards)), generation)


def test_rosters_are_made_alike_everywhere_and_need_both_roles() -> None:
    view = view_of(2, thrice(3))
    turned = View(epoch=1, members=view.members[::-1], placement=view.placement)
    assert Roster.of(view, 1) == Roster.of(turned, 1)
    assert Roster.of(view, 1).uids == ("dense-0", "dense-1", "shard-0", "shard-1", "shard-2")
    alone = View(epoch=1, members=view.members[2:], placement=view.placement)
    with pytest.raises(UserError, match="0 dense ranks and 3 shards"):
        Roster.of(alone, 1)


def test_a_member_refuses_what_is_not_for_it() -> None:
    state = member.MemberState("shard-0", 2)  # its second life
    (reply,) = state.handle(Build(roster_of(5), b""))
    assert isinstance(reply, member.Reply) and isinstance(reply.message, NotBuilt)
    state = member.MemberState("shard-0", 1)
    state.handle(Build(roster_of(5), b""))
    (reply,) = state.handle(Build(roster_of(4), b""))
    assert isinstance(reply, member.Reply) and isinstance(reply.message, NotBuilt)
    (reply,) = state.handle(Ticket(number=1, generation=5, mode="warm"))
    assert isinstance(reply, member.Reply) and isinstance(reply.message, TicketBroken)


def test_the_generation_before_is_kept_until_the_new_one_has_proved_itself() -> None:
    state = member.MemberState("shard-0", 1)
    for generation in (1, 2):
        state.handle(Build(roster_of(generation), b""))
        assert state.handle(Built("shard-0", generation)) == [
            member.Reply(Built("shard-0", generation))
        ]
        state.handle(Ticket(number=generation, generation=generation, mode="warm"))
        state.handle(TicketOver("shard-0", generation))
    assert state.before == 1
    proved, once_more = copy.deepcopy(state), Ticket(number=3, generation=2, mode="exact")
    gone, _ = proved.handle(once_more)
    assert isinstance(gone, member.Abort) and gone.generation == 1 and proved.before is None
    back = state.handle(Ticket(number=3, generation=1, mode="exact"))  # it failed for another
    assert isinstance(back[0], member.Abort) and back[0].generation == 2
    assert isinstance(back[1], member.Run) and state.in_use == 1


def test_a_superseded_build_is_abandoned() -> None:
    state = member.MemberState("shard-0", 1)
    state.handle(Build(roster_of(1), b""))
    abandon, start = state.handle(Build(roster_of(2), b""))
    assert abandon == member.Abandon(1) and isinstance(start, member.StartBuild)
    assert state.handle(Built("shard-0", 1)) == [member.Abort(1, "abandoned")]
