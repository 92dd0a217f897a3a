"""Operations on a deployment that serves, and what the coordinator's state machine says and hears.

Plain data, and pure. An operation has an absolute target and an id of its caller's choice; the
machine (`coordinator_state.py`) walks it through its steps and asks the shell to do things
(`Ask`), each with a number that its answer carries. Answers to what is not waited for any more are
ignored by that number: nothing late can count.
"""

from collections.abc import Mapping
from typing import Literal

import msgspec

from remora.comm.errors import OperationIdTakenError
from remora.comm.view import Member, View

Step = Literal["plan", "prepare", "copy", "verify", "commit", "drain", "free", "undo", "over"]
BEFORE_COMMIT: tuple[Step, ...] = ("prepare", "copy", "verify", "commit")  # of the same round
Outcome = Literal["running", "done", "failed"]
Pair = tuple[int, int]  # decoder layer, logical expert
Held = dict[str, tuple[tuple[int, ...], ...]]  # as `Placement.slots`


class ScaleTo(msgspec.Struct, frozen=True, tag="scale"):
    """So many shards, so many dense groups (None: as many as there are); `retire` names some that
    are not to be among them.

    Attributes:
        gives_way: nobody asked for it: as long as it waits for who joins it is undone when another
            operation is asked for, or a member dies.
    """

    shards: int | None = None
    retire: tuple[str, ...] = ()
    dense_groups: int | None = None
    gives_way: bool = False


class PlaceAs(msgspec.Struct, frozen=True, tag="place"):
    """The shards that there are hold this."""

    slots: Held


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """These members are none any more: others hold what shards held, and take the requests of dense
    groups.

    Attributes:
        joiners: who joins instead: nobody; or as few as are needed for every expert to have a
            slot, and for one dense group to be there.
        within_s: the time that there is for it; None: as for other operations.
    """

    uids: tuple[str, ...]
    joiners: Literal["none", "needed"] = "none"
    within_s: float | None = None


class Restore(msgspec.Struct, frozen=True, tag="restore"):
    """Of the coordinator's own: members that died are members again, in a new life."""

    uids: tuple[str, ...]


class TakeOver(msgspec.Struct, frozen=True, tag="take-over"):
    """Of the coordinator's own: shards that died are no members for now, and others serve what
    these alone held, from their second copies."""

    uids: tuple[str, ...]


Target = ScaleTo | PlaceAs | Drain | Restore | TakeOver


def gives_way(target: Target) -> bool:
    """Whether it is undone for another one as long as it waits for who joins."""
    return isinstance(target, ScaleTo) and target.gives_way


def has_deadline(target: Target) -> bool:
    """Whether it must be over in time: a node goes away."""
    return isinstance(target, Drain) and target.within_s is not None


def is_dense(uid: str) -> bool:
    """Whether a member is a dense group, not a shard."""
    return uid.startswith("dense-")


class Operation(msgspec.Struct, kw_only=True):
    """One operation, as far as it has come."""

    operation_id: str
    target: Target
    outcome: Outcome = "running"
    step: Step = "plan"
    reason: str = ""  # why it failed, or what was odd about it
    is_unwanted: bool = False  # it is undone as soon as it may be
    gave_way: bool = False  # it failed for another one's sake, and may be asked for again
    slots: Held = {}  # what it leads to
    joiners: dict[str, int] = {}  # uid -> incarnation
    retirees: tuple[str, ...] = ()
    round: int = 0  # rounds committed
    num_rounds: int = 0
    moved: int = 0  # experts copied or loaded
    safe_to_delete: tuple[str, ...] = ()  # uids that hold nothing and have been stopped
    begun_s: float = 0.0  # of the machine's clock
    serving_s: float | None = None  # after `begun_s`: its first commit was acknowledged by all
    ended_s: float | None = None  # after `begun_s`

    def public(self) -> dict[str, object]:
        """Plain data for people and programs, without the placement (which may be megabytes)."""
        inner = {"slots", "begun_s", "is_unwanted", "gave_way"}
        if isinstance(self.target, PlaceAs):
            inner.add("target")
        told = {name: getattr(self, name) for name in self.__struct_fields__ if name not in inner}
        fields: dict[str, object] = msgspec.json.decode(msgspec.json.encode(told))
        return fields | {"kind": type(self.target).__struct_config__.tag}


def taken_by(operation_id: str, known: Mapping[str, object]) -> OperationIdTakenError:
    """What to raise where an id stands for another operation, `known` (`Operation.public`)."""
    return OperationIdTakenError(
        f"operation {operation_id!r} is another one: {known['kind']}, {known['outcome']};"
        " choose a new id"
    )


# -- what is asked of the shell ------------------------------------------------------------------


class StartShard(msgspec.Struct, frozen=True, kw_only=True):
    """Start a process, load, listen. Answer: `Started`."""

    uid: str
    incarnation: int
    experts: tuple[tuple[int, ...], ...]  # for each MoE layer
    num_slots: int  # of a layer
    replicas: dict[Pair, tuple[str, ...]] = {}  # shards to copy from, best first
    is_urgent: bool = False  # requests wait for it: not at idle priority
    yields: bool = True  # it takes no more of the machine than streams beside it can spare


class StartDense(msgspec.Struct, frozen=True, kw_only=True):
    """Start all ranks of a dense group, load, listen. Answer: `Started`."""

    uid: str
    incarnation: int
    is_urgent: bool = False  # requests wait for it: not at idle priority


class Started(msgspec.Struct, frozen=True, kw_only=True):
    """A member that can serve, a dense group once it has adopted a view."""

    member: Member
    digests: dict[Pair, str] = {}  # of a shard
    room: tuple[int, ...] = ()  # of a shard: slots of each MoE layer


class Copy(msgspec.Struct, frozen=True, kw_only=True):
    """Take experts into spare slots. Answer: the digest of each as it is held now, by pair."""

    uid: str
    pairs: tuple[Pair, ...]
    replicas: dict[Pair, tuple[str, ...]] = {}  # shards to copy from, best first
    is_urgent: bool = False  # requests wait for it: not at idle priority
    yields: bool = True  # it takes no more of the machine than streams beside it can spare


class HoldCopies(msgspec.Struct, frozen=True, kw_only=True):
    """Have a shard hold second copies of these experts and no others, as far as it can. Answer: the
    digest of each that it holds, by pair."""

    uid: str
    pairs: tuple[Pair, ...]
    replicas: dict[Pair, tuple[str, ...]] = {}  # shards to copy from, best first


class Canary(msgspec.Struct, frozen=True, kw_only=True):
    """Compute fixed rows with some experts. Answer: `CanaryResult`."""

    uid: str
    pairs: tuple[Pair, ...]


class CanaryResult(msgspec.Struct, frozen=True, kw_only=True):
    """What fixed rows came to."""

    kernels: str  # what the last bits depend on; comparable only between equal ones
    outputs: dict[Pair, str]  # hash of the output


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """Have a dense rank connect to what it does not know of a view, and go on with its own.
    Answer: the hash of what it was offered."""

    uid: str
    view: View


class Adopt(msgspec.Struct, frozen=True, kw_only=True):
    """Have a dense rank, or the router, use a view from its next step on. Answer: its hash.

    With `or_none` a rank answers also where shards refuse it or cannot be reached: it uses no older
    view any more. So one that is fenced can be let in again.
    """

    uid: str
    view: View
    or_none: bool = False


class Fence(msgspec.Struct, frozen=True, kw_only=True):
    """Have a shard cut a dense rank off until it is let in again (`fenced` without it). Answer:
    None."""

    uid: str
    fenced: tuple[str, ...]


class Keep(msgspec.Struct, frozen=True, kw_only=True):
    """Have a shard free every slot with another expert than these. Answer: the slots of each MoE
    layer that it has: those that do not hold what is written into them are none any more."""

    uid: str
    experts: tuple[tuple[int, ...], ...]


class Quiesce(msgspec.Struct, frozen=True, kw_only=True):
    """Have a dense group take no more requests and finish those that it has, as far as it can
    within `within_s`. Answer: None, then."""

    uid: str
    within_s: float


class Stop(msgspec.Struct, frozen=True, kw_only=True):
    """End a shard or all ranks of a dense group, whatever it does. Answer: None."""

    uid: str
    incarnation: int


Task = (
    StartShard | StartDense | Copy | HoldCopies | Canary | Offer | Adopt | Fence | Keep | Quiesce
    | Stop
)  # fmt: skip
Answer = Started | CanaryResult | dict[Pair, str] | tuple[int, ...] | str | None


class Ask(msgspec.Struct, frozen=True):
    """Do this, and tell what came of it (`Answered` or `CallFailed`) under this number."""

    call: int
    task: Task


class Log(msgspec.Struct, frozen=True):
    """Make this durable; then `Logged`, or `LogFailed`. Nothing else happens meanwhile."""

    record: dict[str, object]


class Publish(msgspec.Struct, frozen=True):
    """This view is committed."""

    view: View


class Settled(msgspec.Struct, frozen=True):
    """An operation is over."""

    operation: Operation


class Alarm(msgspec.Struct, frozen=True):
    """An operator should hear this."""

    text: str


Effect = Ask | Log | Publish | Settled | Alarm


# -- what the machine hears ----------------------------------------------------------------------


class Answered(msgspec.Struct, frozen=True):
    """Of an `Ask`."""

    call: int
    answer: Answer


class CallFailed(msgspec.Struct, frozen=True):
    """Of an `Ask`."""

    call: int
    reason: str


class Logged(msgspec.Struct, frozen=True):
    """The last `Log` is on the disk."""


class LogFailed(msgspec.Struct, frozen=True):
    """The last `Log` is not on the disk."""

    reason: str


class MemberLost(msgspec.Struct, frozen=True):
    """This life of a process is over, and not because it was asked to end."""

    uid: str
    incarnation: int


class Tick(msgspec.Struct, frozen=True):
    """`next_time` has come."""


Event = Answered | CallFailed | Logged | LogFailed | MemberLost | Tick
