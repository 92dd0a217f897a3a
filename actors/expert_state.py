"""What an expert shard decides: whom it serves, in which order, and whom it refuses. Pure.

    Loaded, EpochAnnounced, CallArrived, CallLost, CallDone --> handle() -> [Compute | Refuse, ...]

A shard is stateless per call: any call may be repeated. Calls wait in a bounded queue and the
smallest goes first, so that the few rows of a decode step never stand behind a sliced prefill
(architecture, section 2: "decode goes ahead of sliced prefill"). A call that has been passed over
`MAX_PASSED_OVER` times goes next whatever its size, so prefill cannot starve.
"""

from dataclasses import dataclass, field
from typing import Literal

Reason = Literal["not-ready", "not-mine", "fenced", "full"]

QUEUE_MAX = 1024  # calls; far above the credits of any sane number of requesters
MAX_PASSED_OVER = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class CallArrived:
    """A dense rank asks for expert outputs."""

    call_id: int  # the shell's own number of the call
    layer: int
    experts: frozenset[int]  # logical experts the call names
    num_rows: int
    epoch: int  # the requester's view
    incarnation: int  # the incarnation the requester means


@dataclass(frozen=True, slots=True)
class CallLost:
    """The requester's connection is gone: nobody waits for this call."""

    call_id: int


@dataclass(frozen=True, slots=True)
class CallDone:
    """The call under way is computed and answered (or its answer could not be sent)."""

    call_id: int


@dataclass(frozen=True, slots=True)
class Loaded:
    """Weights are in: which experts of which decoder layer this shard holds."""

    experts_by_layer: dict[int, frozenset[int]]


Event = CallArrived | CallLost | CallDone | Loaded


@dataclass(frozen=True, slots=True)
class Compute:
    """Run this call now; answer it; then say `CallDone`."""

    call_id: int


@dataclass(frozen=True, slots=True)
class Refuse:
    """Answer this call with a reason; nothing is computed."""

    call_id: int
    reason: Reason
    detail: str


Instruction = Compute | Refuse


@dataclass(slots=True)
class _Waiting:
    call: CallArrived
    passed_over: int = 0


@dataclass(slots=True)
class ExpertState:
    """The pure half of one expert shard. One call is under way at a time."""

    incarnation: int
    experts_by_layer: dict[int, frozenset[int]] | None = None  # None until loaded
    running: int | None = None
    waiting: list[_Waiting] = field(default_factory=list)
    calls_served: int = 0
    calls_refused: int = 0

    def handle(self, event: Event) -> list[Instruction]:
        """Feed one event; returns what the shell must do, in order."""
        match event:
            case Loaded(experts_by_layer):
                assert self.experts_by_layer is None, "a shard loads once in its life"
                self.experts_by_layer = experts_by_layer
                return []
            case CallArrived():
                return self._arrived(event)
            case CallLost(call_id):
                self.waiting = [w for w in self.waiting if w.call.call_id != call_id]
                return []
            case CallDone(call_id):
                assert self.running == call_id, f"call {call_id} is done, {self.running} runs"
                self.running = None
                self.calls_served += 1
                return self._start_next()

    def _arrived(self, call: CallArrived) -> list[Instruction]:
        refusal = self._refusal(call)
        if refusal is not None:
            self.calls_refused += 1
            return [refusal]
        self.waiting.append(_Waiting(call))
        return self._start_next()

    def _refusal(self, call: CallArrived) -> Refuse | None:
        if call.incarnation != self.incarnation:
            detail = f"this is incarnation {self.incarnation}, the call means {call.incarnation}"
            return Refuse(call.call_id, "fenced", detail)
        if self.experts_by_layer is None:
            return Refuse(call.call_id, "not-ready", "weights are still loading")
        missing = call.experts - self.experts_by_layer.get(call.layer, frozenset())
        if missing:
            detail = f"layer {call.layer}: experts {sorted(missing)} are not here"
            return Refuse(call.call_id, "not-mine", detail)
        if len(self.waiting) >= QUEUE_MAX:
            return Refuse(call.call_id, "full", f"{QUEUE_MAX} calls are waiting")
        return None

    def _start_next(self) -> list[Instruction]:
        if self.running is not None or not self.waiting:
            return []
        starved = next((w for w in self.waiting if w.passed_over >= MAX_PASSED_OVER), None)
        chosen = starved or min(self.waiting, key=lambda w: w.call.num_rows)  # first of equals
        self.waiting.remove(chosen)
        for other in self.waiting:
            other.passed_over += 1
        self.running = chosen.call.call_id
        return [Compute(chosen.call.call_id)]
