"""An expert shard in the simulator: the real table of slots, and bytes that can be damaged.

As in `actors/shard_slots.py` copies are made one after the other beside the calls that are
answered, second copies when nothing else is; what changes the table happens between two calls.
Calls of one sender begin in order and run side by side, as those of an actor with several threads.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

import msgspec

from remora.actors.expert_state import SLOTS_TRIED_MAX, ExpertDigest, ExpertState, unusable
from remora.cluster.operation import (
    Answer,
    Canary,
    CanaryResult,
    Copy,
    Fence,
    HoldCopies,
    Keep,
    Pair,
    Started,
    StartShard,
)
from remora.cluster.placement_steps import pairs_of
from remora.cluster.sim_model import LAYERS, digest_of, expert_output, weights_of
from remora.cluster.sim_network import Violation, uid_of
from remora.comm.errors import ClusterError, RemoraError
from remora.comm.view import Endpoint, Member

if TYPE_CHECKING:
    from remora.cluster.sim_deployment import Deployment

Reply = Callable[[Answer | Exception], None]
Order = Copy | HoldCopies | Canary | Fence | Keep
Asked = list[tuple[int, int, int]]  # row number, expert, row


class NotMine(msgspec.Struct, frozen=True):
    """Experts of a call that a shard does not hold."""

    experts: list[int]


Found = list[tuple[int, int]] | NotMine  # row number, output

PROCESS_S: Final = (0.5, 1.5)  # to start a process
EXPERT_S: Final = 0.04  # to read, write and read back one expert
CANARY_S: Final = 0.02


def member_of(uid: str, incarnation: int, host: str) -> Member:
    """A member as an actor says that it is."""
    role: str = "shard" if uid.startswith("shard") else "dense"
    name = f"{uid}#{incarnation}"
    endpoint = Endpoint(host=host, tcp_address=name)
    return Member(
        uid=uid,
        incarnation=incarnation,
        role="shard" if role == "shard" else "dense",
        endpoint=endpoint,
        actor_name=name,
    )


class SimShard:
    """One life of one shard; `start` brings it up."""

    def __init__(self, world: "Deployment", task: StartShard) -> None:
        self.member = member_of(task.uid, task.incarnation, world.nodes.place(task.uid))
        self.process = self.member.actor_name
        num_copies = world.limits.num_copies
        self.state = ExpertState(dict.fromkeys(LAYERS, task.num_slots), num_copies)
        self.fenced: frozenset[str] = frozenset()
        self.calls_answered = 0
        self._world = world
        self._task = task
        self._bytes: dict[tuple[int, int], int] = {}  # (layer, slot)
        self._copies: list[tuple[Copy, Reply, int]] = []  # under way, and those that wait for it

    def start(self, reply: Reply) -> None:
        """Load what it is to hold, and listen."""
        low, high = PROCESS_S
        pairs = pairs_of(self._task.experts, LAYERS)
        took_s = low + self._world.chance.random() * (high - low) + EXPERT_S * len(pairs)
        if self._world.faults.takes("out of memory", self.process):
            self._later(took_s / 2, partial(self._die_of_memory, reply))
        else:
            self._later(took_s, partial(self._loaded, pairs, reply))

    def load_now(self) -> None:
        """As `start`, long ago."""
        for pair in pairs_of(self._task.experts, LAYERS):
            self._write(pair, self.state.slot_for(*pair))

    def perform(self, task: Order, reply: Reply, term: int) -> None:
        """A task of a coordinator of this term."""
        try:
            self.state.obey(term)
        except ClusterError as stale:
            self._world.trace(f"{self.process} refuses {type(task).__name__}: {stale}")
            reply(stale)
            return
        match task:
            case HoldCopies(pairs=pairs):
                for pair in self.state.want_copies(pairs):
                    self.state.give_up_copy(*pair)
                self._second_copy(list(pairs), reply, self.state.copies_turn)
            case Copy():
                self._copies.append((task, reply, self.state.turn))
                if len(self._copies) == 1:
                    self._next_copy()
            case Canary(pairs=pairs):
                self._later(CANARY_S * len(pairs), partial(self._canary, pairs, reply))
            case Fence(fenced=fenced):
                self.fenced = frozenset(fenced)
                self._world.cut_off(self, self.fenced)
                reply(None)
            case Keep(experts=experts):
                for pair in self.state.keep(dict(zip(LAYERS, experts, strict=True))):
                    slot = self.state.drop(*pair)
                    what = "frees" if slot is not None else "keeps a second copy of"
                    self._world.trace(f"{self.process} {what} {pair}")
                self._check_room()
                reply(tuple(self.state.room(layer) for layer in LAYERS))

    def compute(self, layer: int, asked: Asked) -> Found:
        """What each pair comes to."""
        state = self.state
        missing = state.not_mine(layer, [expert for _, expert, _ in asked])
        if missing:
            return NotMine(missing)
        self.calls_answered += 1
        found = []
        for number, expert, row in asked:
            slot = state.slot_of(layer, expert)
            assert slot is not None
            found.append((number, expert_output(self._bytes[layer, slot], row)))
        return found

    def damaged(self) -> list[Pair]:
        """What is served from a slot that holds something else than the checkpoint, or there is a
        second copy of that does."""
        return [
            pair
            for pair in [*self.state.digests, *self.state.copies]
            if self._bytes[pair[0], self.state.slot_in_memory(*pair) or 0] != weights_of(*pair)
        ]

    def give_up_copies(self) -> None:
        """Memory is short."""
        for pair in list(self.state.copies):
            self.state.give_up_copy(*pair)

    # -- inside -------------------------------------------------------------------------------

    def _later(self, delay_s: float, work: Callable[[], None]) -> None:
        self._world.network.timer(self.process, delay_s, work)

    def _die_of_memory(self, reply: Reply) -> None:
        reply(ClusterError(f"{self.process}: out of memory while it loaded"))
        self._world.network.kill(self.process)

    def _loaded(self, pairs: list[Pair], reply: Reply) -> None:
        for pair in pairs:
            self._write(pair, self.state.slot_for(*pair))
        room = tuple(self.state.room(layer) for layer in LAYERS)
        digests = {pair: each.digest for pair, each in self.state.digests.items()}
        reply(Started(member=self.member, digests=digests, room=room))

    def _second_copy(self, todo: list[Pair], reply: Reply, turn: int) -> None:
        """One after the other, until other ones are wanted."""
        state = self.state
        while todo and (
            state.slot_in_memory(*todo[0]) is not None or not state.may_copy(todo[0][0])
        ):
            todo.pop(0)
        if not todo or state.copies_turn != turn:
            reply({pair: each.digest for pair, each in state.copies.items()})
            return
        self._later(EXPERT_S, partial(self._second_copied, todo, reply, turn))

    def _second_copied(self, todo: list[Pair], reply: Reply, turn: int) -> None:
        state, pair = self.state, todo[0]
        if self._copies:  # what is served goes first
            self._second_copy(todo, reply, turn)
            return
        is_wanted = state.copies_turn == turn and state.may_copy(pair[0])
        if is_wanted and state.slot_in_memory(*pair) is None:
            wanted = digest_of(weights_of(*pair))
            self._write(pair, state.slot_for(*pair), wanted, state.settle_copy)
        self._second_copy(todo[1:], reply, turn)

    def _write(
        self,
        pair: Pair,
        slot: int,
        wanted: str | None = None,
        settle: Callable[[int, ExpertDigest, str], bool] | None = None,
    ) -> bool:
        """Fill a slot, read it back, and see whether it holds `wanted` (None: whatever it is)."""
        layer, expert = pair
        weights = weights_of(layer, expert)
        if self._world.faults.takes("flip", self.process):
            weights ^= 1 << self._world.chance.randrange(60)
            self._world.trace(f"{self.process} has a flipped bit in {pair}, slot {slot}")
        self._bytes[layer, slot] = weights
        digest = digest_of(weights)
        found = ExpertDigest(layer=layer, expert=expert, digest=digest, nbytes=1)
        settle = settle or self.state.settle
        is_good = settle(slot, found, digest if wanted is None else wanted)
        for beyond in self.state.copies_beyond(layer):
            self.state.give_up_copy(*beyond)
        self._check_room()
        return is_good

    def _check_room(self) -> None:
        """Raises Violation: invariant 9."""
        state = self.state
        for layer in LAYERS:
            room, held = state.room(layer), len(state.experts_of(layer))
            if held + len(state.free_slots(layer)) < room:
                copies = sorted(expert for at, expert in state.copies if at == layer)
                raise Violation(
                    f"9: {self.process} says that a view may fill {room} slots of layer {layer};"
                    f" {held} are filled, and second copies of {copies} take what was free"
                )

    def _next_copy(self) -> None:
        if self._copies:
            task, reply, _ = self._copies[0]
            self._copy(task, reply, {}, SLOTS_TRIED_MAX)

    def _copy(self, task: Copy, reply: Reply, done: dict[Pair, str], tries: int) -> None:
        """One expert after the other, as `ShardSlots.load`."""
        todo = [pair for pair in task.pairs if pair not in done]
        if not todo:
            self._copied(reply, done)
            return
        layer, expert = pair = todo[0]
        held = self.state.digest_of(layer, expert)
        if held is None and self._is_in_turn() and self.state.adopt_copy(*pair) is not None:
            held = self.state.digest_of(*pair)
        if held is not None:
            self._copy(task, reply, {**done, pair: held}, SLOTS_TRIED_MAX)
            return
        wanted = digest_of(weights_of(layer, expert))
        if not tries:
            self._copied(reply, unusable(layer, expert, "other bytes", wanted))
            return
        try:
            slot = self.state.slot_for(layer, expert)
        except RemoraError as none:
            self._copied(reply, none)
            return
        self._later(EXPERT_S, partial(self._filled, task, reply, done, tries, slot))

    def _filled(
        self, task: Copy, reply: Reply, done: dict[Pair, str], tries: int, slot: int
    ) -> None:
        pair = next(pair for pair in task.pairs if pair not in done)
        wanted = digest_of(weights_of(*pair))
        try:
            self.state.check_turn(self._copies[0][2])
        except RemoraError as over:
            self._copied(reply, over)
            return
        if self._write(pair, slot, wanted):
            self._copy(task, reply, {**done, pair: wanted}, SLOTS_TRIED_MAX)
        else:
            self._copy(task, reply, done, tries - 1)

    def _is_in_turn(self) -> bool:
        """Whether the copy that runs is wanted still."""
        return self._copies[0][2] == self.state.turn

    def _copied(self, reply: Reply, answer: dict[Pair, str] | Exception) -> None:
        self._copies.pop(0)
        reply(answer)
        self._next_copy()

    def _canary(self, pairs: tuple[Pair, ...], reply: Reply) -> None:
        outputs: dict[Pair, str] = {}
        for layer, expert in pairs:
            slot = self.state.slot_of(layer, expert)
            if slot is None:
                reply(ClusterError(f"layer {layer} expert {expert} is not held"))
                return
            outputs[layer, expert] = digest_of(expert_output(self._bytes[layer, slot], 1))
        reply(CanaryResult(kernels="simulated", outputs=outputs))


def rank_name(process: str) -> str:
    """What a dense rank calls itself when it connects, and is fenced by."""
    return uid_of(process)
