"""The conductor: who is in the next generation, and which ticket comes next. Pure.

One for a deployment, beside dense rank 0. It gives every member of a generation the same ticket
and waits for all of them before the next, so a swap or a failure falls between two steps for all:

* a view with other members: g+1 is built while tickets of g go on; when all have built it, its
  first ticket ("warm") is the swap; when they do not in time, it is given up;
* a member lost, or a ticket broken: the generation is stopped for all, the step is not committed,
  and runs again, under the same number, on the next generation: that of the members that live.
  Where they do not hold every expert there is none, and steps are held (`Hold`) until a view, or
  the members that come back, have one;
* with `split`, fewer members and all alive: the communicator is split at a step boundary, which
  needs no bootstrap but stops the steps while it lasts, and blocks all members if one hangs.

A new conductor takes over with a newer view: generation numbers start with the epoch, and members
let the higher one win.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import msgspec

from remora.comm.nccl_messages import (
    GENERATIONS_PER_EPOCH,
    Build,
    Built,
    Commit,
    NotBuilt,
    Stop,
    Ticket,
    TicketBroken,
    TicketOver,
    ToMember,
)
from remora.comm.nccl_plan import Mode, Roster
from remora.comm.view import View, uncovered

BUILDS_MAX: Final = 3  # generations of the same members in a row that fail before a step on one


@dataclass(frozen=True, slots=True)
class ViewCame:
    """The coordinator's newest view, or the same one after another look at who can be reached.
    `absent` says why of each member that cannot: all others live, whatever was lost before."""

    view: View
    absent: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class IdMade:
    """The unique id of a generation's communicator."""

    generation: int
    unique_id: bytes


@dataclass(frozen=True, slots=True)
class BuildLate:
    """A generation's members have had `within_s` since they were told to build it."""

    generation: int
    within_s: float


@dataclass(frozen=True, slots=True)
class MemberLost:
    """A member's process is gone, or is to be treated so."""

    uid: str
    incarnation: int
    why: str


@dataclass(frozen=True, slots=True)
class StepWanted:
    """The dense ranks have a step to run; one at a time, until its commit."""

    mode: Literal["decode", "exact"]
    capacity: int = 0
    sources: tuple[str, ...] = ()  # dense ranks that have rows


Event = (
    ViewCame | IdMade | BuildLate | MemberLost | StepWanted
    | Built | NotBuilt | TicketOver | TicketBroken
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class MakeId:
    """Call `get_unique_id` in the process of the generation's rank 0."""

    generation: int


@dataclass(frozen=True, slots=True)
class Send:
    """A message to each of `uids`."""

    uids: tuple[str, ...]
    message: ToMember


@dataclass(frozen=True, slots=True)
class Hold:
    """The members of the view that live are no generation: steps wait for others."""

    why: str


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The members come to no communicator; an operator must look. Steps go on by the one in use,
    where there is one."""

    why: str


Instruction = MakeId | Send | Hold | GiveUp


@dataclass(slots=True)
class _Next:
    """A generation on its way."""

    roster: Roster
    by_split: bool
    missing: set[str] = field(default_factory=set)  # have not built it yet


class ConductorState:
    """The machine. `split` allows shrinking by `commSplit`."""

    def __init__(self, *, split: bool = False) -> None:
        self._split = split
        self.current: Roster | None = None  # whole, as far as is known
        self.next: _Next | None = None
        self.running: Ticket | None = None
        self._roster: Roster | None = None  # of `running`
        self._waiting: set[str] = set()  # have not answered it
        self._void = False  # it failed somewhere
        self._why = ""
        self.wanted: StepWanted | None = None
        self.step = 1  # the next to be committed
        self._number = 0
        self._newest = 0
        self._failures = 0  # in a row
        self._view: View | None = None
        self._lost: dict[tuple[str, int], str] = {}  # lives, and why

    def handle(self, event: Event) -> list[Instruction]:
        """Applies one event."""
        match event:
            case ViewCame():
                out = self._view_came(event)
            case IdMade(generation, unique_id):
                out = self._id(generation, unique_id)
            case Built(uid, generation):
                if self.next is not None and self.next.roster.generation == generation:
                    self.next.missing.discard(uid)
                out = []
            case NotBuilt(uid, generation, why):
                out = self._not_built(generation, f"{uid}: {why}")
            case BuildLate(generation, within_s):
                out = self._late(generation, within_s)
            case MemberLost():
                out = self._member_lost(event)
            case StepWanted():
                assert self.wanted is None, f"{event} before {self.wanted} was committed"
                self.wanted = event
                out = []
            case TicketOver(uid, number):
                out = self._answer(uid, number, None)
            case TicketBroken(uid, number, why):
                out = self._answer(uid, number, f"{uid}: {why}")
        return out + self._advance()

    # -- generations ---------------------------------------------------------------------------

    def _view_came(self, came: ViewCame) -> list[Instruction]:
        view = self._view = came.view
        out: list[Instruction] = []
        for member in view.members:
            life = (member.uid, member.incarnation)
            if member.uid not in came.absent:
                self._lost.pop(life, None)
            elif life not in self._lost:
                out += self._lose(MemberLost(*life, came.absent[member.uid]))
        return [*out, *self._follow(view), *self._settle()]

    def _follow(self, view: View) -> list[Instruction]:
        """The members of the view that live are to be the generation in use, where they can."""
        living = tuple(m for m in view.members if (m.uid, m.incarnation) not in self._lost)
        shards = {member.uid for member in living if member.role == "shard"}
        gaps = uncovered(view.placement, shards)
        if gaps or len(shards) == len(living):
            what = "layer {} expert {} has no replica".format(*gaps[0]) if gaps else "no dense rank"
            gone = [self._lost.get((m.uid, m.incarnation)) for m in view.members]
            why = f"view {view.epoch}: {what}: {'; '.join(sorted(filter(None, gone)))}"
            return [*self._forget_next(why), Hold(why)]
        first = view.epoch * GENERATIONS_PER_EPOCH
        roster = Roster.of(
            msgspec.structs.replace(view, members=living), max(self._newest + 1, first)
        )
        known = self.next.roster if self.next is not None else self.current
        if known is not None and _members(known) == _members(roster):
            return []
        self._failures = 0  # of other members, or somebody has looked
        return self._begin(roster)

    def _begin(self, roster: Roster) -> list[Instruction]:
        gone = [uid for uid, life in _members(roster) if (uid, life) in self._lost]
        assert not gone, f"{roster} names {gone}, which are lost"
        out = self._forget_next(f"generation {roster.generation} takes its place")
        self._newest = roster.generation
        by_split = self._split and self._can_split(roster)
        self.next = _Next(roster, by_split, set(roster.uids))
        return out if by_split else [*out, MakeId(roster.generation)]

    def _can_split(self, roster: Roster) -> bool:
        """Whether all of `roster`, and others, are members of the generation in use."""
        current = self.current
        return current is not None and set(_members(roster)) < set(_members(current))

    def _id(self, generation: int, unique_id: bytes) -> list[Instruction]:
        if self.next is None or self.next.roster.generation != generation:
            return []
        return [Send(self.next.roster.uids, Build(self.next.roster, unique_id))]

    def _not_built(self, generation: int, why: str) -> list[Instruction]:
        if self.next is None or self.next.roster.generation != generation:
            return []
        return self._again(self.next.roster, why)

    def _late(self, generation: int, within_s: float) -> list[Instruction]:
        """Not tried again: each try would leave a thread in every member that waits for good."""
        coming = self.next
        if coming is None or coming.roster.generation != generation or not coming.missing:
            return []
        silent = ", ".join(sorted(coming.missing))
        why = f"no communicator within {within_s:g} s: no word of {silent}"
        return [*self._forget_next(why), GiveUp(why)]

    def _again(self, roster: Roster, why: str) -> list[Instruction]:
        """The same members under a new number, unless that has failed too often."""
        out = self._forget_next(why)
        self._failures += 1
        if self._failures >= BUILDS_MAX:
            return [*out, GiveUp(f"the communicator failed {BUILDS_MAX} times: {why}")]
        self._newest += 1
        return out + self._begin(_renumbered(roster, self._newest))

    def _forget_next(self, why: str) -> list[Instruction]:
        gone, self.next = self.next, None
        if gone is None or (self.running and self.running.generation == gone.roster.generation):
            return []
        return [self._stop(gone.roster, why)]

    def _stop(self, roster: Roster, why: str) -> Send:
        alive = [uid for uid, life in _members(roster) if (uid, life) not in self._lost]
        return Send(tuple(alive), Stop(roster.generation, why))

    def _member_lost(self, lost: MemberLost) -> list[Instruction]:
        if (lost.uid, lost.incarnation) in self._lost:
            return []
        out = self._lose(lost)
        if self._view is not None:
            out += self._follow(self._view)
        return [*out, *self._settle()]

    def _lose(self, lost: MemberLost) -> list[Instruction]:
        """Generations with this life are over."""
        life = (lost.uid, lost.incarnation)
        self._lost[life] = lost.why
        out: list[Instruction] = []
        if self.next is not None and self.next.roster.has(*life):
            out += self._forget_next(lost.why)
        if self._roster is not None and self._roster.has(*life):
            self._waiting.discard(lost.uid)
            out += self._void_running(lost.why)
        if self.current is not None and self.current.has(*life):
            out.append(self._stop(self.current, lost.why))
            self.current = None
        return out

    # -- tickets -------------------------------------------------------------------------------

    def _answer(self, uid: str, number: int, broken: str | None) -> list[Instruction]:
        if self.running is None or self.running.number != number:
            return []  # of a ticket that is settled
        self._waiting.discard(uid)
        out = self._void_running(broken) if broken is not None else []
        return out + self._settle()

    def _void_running(self, why: str) -> list[Instruction]:
        """The running ticket failed: nobody waits for it any more, its generation is over."""
        if self._void or self._roster is None:
            return []
        self._void = True
        if self.current is self._roster:
            self.current = None
        self._why = why
        return [self._stop(self._roster, why)]

    def _settle(self) -> list[Instruction]:
        """When all that live have answered, the running ticket is over."""
        ticket, roster = self.running, self._roster
        if ticket is None or roster is None or self._waiting:
            return []
        void, self.running, self._roster, self._void = self._void, None, None, False
        proving = self.next is not None and self.next.roster is roster
        if void:
            if proving:
                self.next = None
            whole = not any(life in self._lost for life in _members(roster))
            if whole and (self.next is None or self.next.by_split):
                return self._again(ticket.into or roster, self._why)
            return []
        if ticket.mode == "warm":
            old, self.current = self.current, roster
            if proving:  # else a newer view came meanwhile: what it began goes on
                self.next = None
            left = set(_members(old)) - {*_members(roster), *self._lost} if old else set()
            if old is None or not left:
                return []
            return [Send(tuple(sorted(uid for uid, _ in left)), Stop(old.generation, "left"))]
        if ticket.mode == "split":
            assert ticket.into is not None, f"{ticket}"
            if self.next is None or self.next.roster is not ticket.into:
                return [self._stop(ticket.into, "a newer view came while it was split off")]
            self.next.missing.clear()
            return []
        self.wanted = None
        if self.next is None:  # else these members have proved nothing of those to come
            self._failures = 0
        self.step += 1
        return [Send(roster.uids, Commit(ticket.step))]

    def _advance(self) -> list[Instruction]:
        """The next ticket, when there is one to give."""
        if self.running is not None:
            return []
        coming = self.next
        if coming is not None and coming.by_split and coming.missing:
            if not self._can_split(coming.roster):  # any more
                self.next, self._newest = None, self._newest + 1
                return self._begin(_renumbered(coming.roster, self._newest))
        if coming is not None and not coming.missing:
            return self._give(coming.roster, "warm")
        if self.current is None:
            return []
        if coming is not None and coming.by_split:
            return self._give(self.current, "split", into=coming.roster)
        if self.wanted is None:
            return []
        wanted = self.wanted
        return self._give(
            self.current,
            wanted.mode,
            step=self.step,
            capacity=wanted.capacity,
            sources=wanted.sources,
        )

    def _give(self, roster: Roster, mode: Mode, **more: Any) -> list[Instruction]:
        self._number += 1
        ticket = Ticket(
            number=self._number, generation=roster.generation, mode=mode, **more
        )  # fmt: skip
        self.running, self._roster, self._waiting = ticket, roster, set(roster.uids)
        return [Send(roster.uids, ticket)]


def _members(roster: Roster) -> Iterable[tuple[str, int]]:
    return tuple(zip(roster.uids, roster.incarnations, strict=True))


def _renumbered(roster: Roster, generation: int) -> Roster:
    return Roster(
        generation=generation,
        epoch=roster.epoch,
        uids=roster.uids,
        incarnations=roster.incarnations,
        num_sources=roster.num_sources,
    )
