"""One member's view of its communicator generations: events in, instructions out, pure.

    g in use -- Build(g+1) --> g in use, g+1 building --> g in use, g+1 ready
      -- first ticket of g+1 --> g+1 in use, g kept -- second ticket of g+1 --> g aborted

Up to three generations are known: the one in use, the one before it, and the next. The one before
is kept until a second ticket of the new one comes: only that says that the first was over for all.
Each belongs to one roster for good; a number is never used again.

Communicators end by abort, also those whose operations are over: NCCL's destroy waits for the other
ranks of the host, and one of them may be gone or have left.
"""

from dataclasses import dataclass
from typing import Literal

from remora.comm.nccl_messages import (
    Build,
    Built,
    Commit,
    NotBuilt,
    Stop,
    Ticket,
    TicketBroken,
    TicketOver,
    ToConductor,
)
from remora.comm.nccl_plan import Roster

# What the conductor says, and what became of a build or a ticket here, as it will be told.
Event = Build | Ticket | Stop | Commit | Built | NotBuilt | TicketOver | TicketBroken


@dataclass(frozen=True, slots=True)
class StartBuild:
    """Create the communicator on a side thread."""

    roster: Roster
    unique_id: bytes


@dataclass(frozen=True, slots=True)
class Abandon:
    """Whoever creates this communicator must abort it when he has it."""

    generation: int


@dataclass(frozen=True, slots=True)
class Run:
    """Enqueue a ticket and wait until it is over."""

    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Abort:
    """End a communicator without its peers. No effect on one that has ended itself."""

    generation: int
    why: str


@dataclass(frozen=True, slots=True)
class Emit:
    """Let what the step made leave."""

    step: int


@dataclass(frozen=True, slots=True)
class Reply:
    """Tell the conductor."""

    message: ToConductor


Instruction = StartBuild | Abandon | Run | Abort | Emit | Reply


class MemberState:
    """The machine.

    Args:
        uid: this member.
        incarnation: this life of it; rosters that name another are refused.
    """

    def __init__(self, uid: str, incarnation: int) -> None:
        self.uid = uid
        self.incarnation = incarnation
        self.newest = 0  # highest generation heard of
        self.phase: dict[int, Literal["building", "ready"]] = {}
        self.in_use: int | None = None
        self.before: int | None = None  # in use until `in_use` came, which is not proved yet
        self.running: Ticket | None = None

    def handle(self, event: Event) -> list[Instruction]:
        """Applies one event."""
        match event:
            case Build():
                out = self._build(event)
            case Built():
                out = self._build_over(event)
            case NotBuilt():
                self.phase.pop(event.generation, None)
                out = [Reply(event)]
            case Ticket():
                out = self._ticket(event)
            case TicketOver():
                out = self._run_over(event)
            case TicketBroken():
                out = self._run_broke(event)
            case Stop(generation, why):
                out = self._drop(generation, why)
            case Commit(step):
                out = [Emit(step)]
        self.check()
        return out

    def check(self) -> None:
        """Raises AssertionError, with the state, when an invariant is broken."""
        told = f"{self.phase}, in use {self.in_use}, before {self.before}, running {self.running}"
        assert len(self.phase) <= 3, f"more than three generations: {told}"
        for generation in (self.in_use, self.before):
            assert generation is None or self.phase.get(generation) == "ready", told
        assert self.before is None or (self.in_use or 0) > self.before, told
        assert self.running is None or self.running.generation == self.in_use, told

    def _build(self, build: Build) -> list[Instruction]:
        roster = build.roster
        generation = roster.generation
        if generation <= self.newest or not roster.has(self.uid, self.incarnation):
            return [Reply(NotBuilt(self.uid, generation, f"not mine: {self.newest} is newest"))]
        out: list[Instruction] = []
        for other in sorted(set(self.phase) - {self.in_use, self.before}):
            out += self._drop(other, f"generation {generation} takes its place")
        self.newest = generation
        self.phase[generation] = "building"
        return [*out, StartBuild(roster, build.unique_id)]

    def _build_over(self, built: Built) -> list[Instruction]:
        generation = built.generation
        if generation not in self.phase:  # abandoned while it was on its way to us
            return [Abort(generation, "abandoned")]
        self.phase[generation] = "ready"
        return [Reply(built)]

    def _ticket(self, ticket: Ticket) -> list[Instruction]:
        assert self.running is None, f"{ticket} while {self.running} runs"
        generation = ticket.generation
        if self.phase.get(generation) != "ready":
            why = f"generation {generation} is not there: {self.phase}"
            return [Reply(TicketBroken(self.uid, ticket.number, why))]
        if generation == self.before:  # the newer one failed elsewhere before it came to use here
            out = self._drop(self.in_use or 0, f"back to generation {generation}")
        else:
            out = self._drop(self.before or 0, f"generation {self.in_use} took its place")
            if generation != self.in_use:
                self.before, self.in_use = self.in_use, generation
        self.running = ticket
        return [*out, Run(ticket)]

    def _run_over(self, over: TicketOver) -> list[Instruction]:
        ticket = self._ran(over.number)
        if ticket.into is not None and ticket.into.has(self.uid, self.incarnation):
            self.newest = max(self.newest, ticket.into.generation)
            self.phase[ticket.into.generation] = "ready"
        return [Reply(over)]

    def _run_broke(self, broken: TicketBroken) -> list[Instruction]:
        ticket = self._ran(broken.number)
        out = self._drop(ticket.generation, broken.why)
        if ticket.into is not None:
            out.append(Abort(ticket.into.generation, broken.why))
        return [*out, Reply(broken)]

    def _ran(self, number: int) -> Ticket:
        ticket, self.running = self.running, None
        assert ticket is not None and ticket.number == number, f"{number} ended, {ticket} runs"
        return ticket

    def _drop(self, generation: int, why: str) -> list[Instruction]:
        """A generation is over for us. No effect on one that we do not know."""
        phase = self.phase.pop(generation, None)
        if phase is None:
            return []
        if generation == self.before:
            self.before = None
        if generation == self.in_use:
            self.in_use, self.before = self.before, None
        return [Abandon(generation)] if phase == "building" else [Abort(generation, why)]
