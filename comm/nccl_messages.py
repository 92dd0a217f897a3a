"""What the conductor of a communicator says to its members, and they to it.

One small message to each member a step and one back: the layers themselves carry nothing of this.
Frozen and msgpack-able (`msgspec`); they travel on control connections, never through NCCL.
"""

from typing import Final

import msgspec

from remora.comm.nccl_plan import Mode, Roster

GENERATIONS_PER_EPOCH: Final = 1 << 16


class Build(msgspec.Struct, frozen=True, tag="build"):
    """Create the communicator of `roster` beside the one in use."""

    roster: Roster
    unique_id: bytes


class Ticket(msgspec.Struct, frozen=True, kw_only=True, tag="ticket"):
    """Enqueue this now. All members of `generation` get the same one.

    "warm" connects the ranks of a generation before its first step; "split" makes the generation
    `into` out of this one; "decode" and "exact" are step `step`.
    """

    number: int  # grows with every ticket; an attempt that failed keeps its number for itself
    generation: int
    mode: Mode
    step: int = 0
    capacity: int = 0  # decode: the bucket
    sources: tuple[str, ...] = ()  # dense ranks whose step this is; the others have no rows
    into: Roster | None = None


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """A generation is over, or will never be: stop waiting for its members."""

    generation: int
    why: str


class Commit(msgspec.Struct, frozen=True, tag="commit"):
    """Every member finished step `step`: what it made may leave."""

    step: int


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """No step runs by the view of this epoch, until a ticket comes.

    Steps fail at once; with `is_hold`, when they have waited as long as they may for members that
    come back.
    """

    why: str
    epoch: int
    is_hold: bool = False


class Wants(msgspec.Struct, frozen=True, tag="wants"):
    """A dense rank has a step to run; it is told by the ticket that names it."""

    uid: str
    num_tokens: int


class Built(msgspec.Struct, frozen=True, tag="built"):
    """The communicator is there."""

    uid: str
    generation: int


class NotBuilt(msgspec.Struct, frozen=True, tag="not_built"):
    """Creating the communicator failed."""

    uid: str
    generation: int
    why: str


class TicketOver(msgspec.Struct, frozen=True, tag="over"):
    """Everything of a ticket is over and nothing of it failed, here."""

    uid: str
    number: int


class TicketBroken(msgspec.Struct, frozen=True, tag="broken"):
    """A ticket failed here; this rank's communicator is aborted."""

    uid: str
    number: int
    why: str


ToMember = Build | Ticket | Stop | Commit | Refused
ToConductor = Wants | Built | NotBuilt | TicketOver | TicketBroken


def encode(message: ToMember | ToConductor) -> bytes:
    """msgpack bytes of one message."""
    return msgspec.msgpack.encode(message)


_to_member: Final = msgspec.msgpack.Decoder(ToMember)
_to_conductor: Final = msgspec.msgpack.Decoder(ToConductor)


def decode_to_member(data: bytes) -> ToMember:
    """Inverse of `encode` at a member. Raises `msgspec.DecodeError` (or its subclass)."""
    message: ToMember = _to_member.decode(data)
    return message


def decode_to_conductor(data: bytes) -> ToConductor:
    """Inverse of `encode` at the conductor. Raises `msgspec.DecodeError` (or its subclass)."""
    message: ToConductor = _to_conductor.decode(data)
    return message
