"""A whole communicator over the fake: conductor, members with their threads, a coordinator's part.

Steps run one after the other, `exact` and `decode` in turn, on rows that are a function of (source,
step); what sources emit is kept, to be compared with computing at home.
"""

import queue
from collections.abc import Callable
from typing import Any

import msgspec
import torch
from support.comm_rig import at_home, random_batch
from support.fake_nccl import CpuDevice, FakeNccl, World
from support.nccl_rig import LAYERS, shape_of, shard_of, source_of
from torch import Tensor

from remora.comm import nccl_conductor_state as conductor
from remora.comm.nccl_link import Link
from remora.comm.nccl_member import NcclMember
from remora.comm.nccl_messages import Commit, Ticket, TicketBroken, decode_to_member, encode
from remora.comm.nccl_plan import Roster
from remora.comm.nccl_shard import ShardExchange
from remora.comm.nccl_source import SourceExchange
from remora.comm.view import Placement, View

NUM_EXPERTS, TOP_K, WIDTH, CAPACITY = 12, 4, 8, 4


def thrice(num_shards: int) -> Placement:
    """Every expert on three neighbouring shards: any two of them may go."""
    held = [
        tuple(e for e in range(NUM_EXPERTS) if (s - e) % num_shards < 3) for s in range(num_shards)
    ]
    return Placement(
        num_experts=NUM_EXPERTS,
        moe_layers=LAYERS,
        slots={f"shard-{s}": (experts,) * len(LAYERS) for s, experts in enumerate(held)},
    )


def without(view: View, uid: str) -> View:
    """The next view, without a member."""
    slots = {u: s for u, s in view.placement.slots.items() if u != uid}
    placement = Placement(num_experts=NUM_EXPERTS, moe_layers=LAYERS, slots=slots)
    placement.check()
    members = tuple(m for m in view.members if m.uid != uid)
    return View(epoch=view.epoch + 1, members=members, placement=placement)


def rows_of(uid: str, step: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """hidden, index, weights and number of tokens of a source's step."""
    seed = 1000 * int(uid.split("-")[1]) + step
    rows = random_batch(CAPACITY, num_experts=NUM_EXPERTS, top_k=TOP_K, width=WIDTH, seed=seed)
    num_tokens = step % (CAPACITY + 1)
    rows[1][num_tokens:] = -1
    return *rows, num_tokens


def expected_of(uid: str, step: int) -> list[Tensor]:
    """What a source must emit for a step: a row block a layer."""
    hidden, index, weights, num_tokens = rows_of(uid, step)
    return [at_home(hidden, index, weights, num_tokens, layer) for layer in LAYERS]


class Cluster:
    """Runs `num_steps` steps and ends.

    Args:
        view: the first view.
        everybody: a view that names every member that may come, all of which are started.
        at_commit: step -> a view to publish when that step is committed.
        split: a generation may be made by `commSplit`.
        patient: no step is asked for while the members in use are not those of the view.
        deadline_s: of a step, and of an exact layer.
    """

    def __init__(
        self,
        view: View,
        num_steps: int,
        *,
        everybody: View | None = None,
        at_commit: dict[int, View] | None = None,
        split: bool = False,
        patient: bool = False,
        deadline_s: float = 30.0,
    ) -> None:
        self._deadline_s = deadline_s
        self.patient = patient
        self._wanted: int | None = None
        self.world = World()
        self.world.on_kill = self._killed
        self.view = view
        self.num_steps = num_steps
        self.at_commit = at_commit or {}
        self.conductor = conductor.ConductorState(split=split)
        self.inbox: queue.SimpleQueue[conductor.Event | None] = queue.SimpleQueue()
        self.emitted: dict[str, dict[int, list[Tensor]]] = {}
        self.used: dict[int, int] = {}  # step -> generation of the attempt that was committed
        self.tickets: list[Ticket] = []
        self.broken: list[str] = []  # why tickets failed, as members said
        self.gave_up: str | None = None
        self.on_commit: Callable[[int], None] = lambda step: None
        self.on_work: Callable[[Link, Ticket], None] = lambda link, ticket: None
        self.processes: dict[str, FakeNccl] = {}
        self.members: dict[str, NcclMember] = {}
        self._root = FakeNccl(self.world, "root")
        self._everybody = everybody or view
        views = [view, *self.at_commit.values()]
        self._slots = {u: s for some in views for u, s in some.placement.slots.items()}
        for member in self._everybody.members:
            self._add(member.uid)

    def _add(self, uid: str) -> None:
        nccl = self.processes[uid] = FakeNccl(self.world, uid)
        exchanges: dict[int, SourceExchange | ShardExchange] = {}
        made: dict[int, list[Tensor]] = {}
        emitted = self.emitted.setdefault(uid, {})

        def exchange_of(link: Link) -> SourceExchange | ShardExchange:
            generation = link.roster.generation
            if generation not in exchanges:
                view = self._view_of(link.roster)
                options = {"top_k": TOP_K, "width": WIDTH, "presummed": False}
                shape = shape_of(view, link.roster, CAPACITY, **options)
                make = source_of if link.roster.is_source(link.rank) else shard_of
                exchanges[generation] = make(link, view, shape, torch.float32, self._deadline_s)
            return exchanges[generation]

        def work(link: Link, ticket: Ticket) -> None:
            self.on_work(link, ticket)
            exchange = exchange_of(link)
            outs = made[ticket.step] = []
            for layer in LAYERS:
                if isinstance(exchange, ShardExchange):
                    (exchange.decode if ticket.mode == "decode" else exchange.exact)(layer)
                    continue
                *rows, num_tokens = rows_of(uid, ticket.step)
                if ticket.mode == "exact":
                    outs.append(exchange.exact(layer, *rows, num_tokens))
                else:
                    outs.append(torch.zeros_like(rows[0]))
                    exchange.decode(layer, *rows, outs[-1])

        def emit(step: int) -> None:
            assert step not in emitted, f"{uid} emits step {step} twice"
            emitted[step] = made.pop(step)

        self.members[uid] = NcclMember(
            nccl=nccl, device=CpuDevice(nccl), uid=uid, incarnation=1, reply=self.inbox.put,
            work=work, emit=emit, step_deadline_s=self._deadline_s,
        )  # fmt: skip

    def _view_of(self, roster: Roster) -> View:
        """The part of a view that a roster stands for."""
        slots = {uid: self._slots[uid] for uid in roster.shard_uids}
        placement = Placement(num_experts=NUM_EXPERTS, moe_layers=LAYERS, slots=slots)
        members = tuple(m for m in self._everybody.members if m.uid in roster.uids)
        return View(epoch=roster.epoch, members=members, placement=placement)

    def run(self) -> None:
        """Until the last step is committed or the conductor gives up."""
        self.inbox.put(conductor.ViewCame(self.view))
        self._want(1)
        parts: dict[str, Callable[[], Any]] = {
            uid: member.serve for uid, member in self.members.items()
        }
        self.world.run({**parts, "conductor": self._conduct})

    def _killed(self, uid: str) -> None:
        """What a supervisor does; and a dead process has no main thread either."""
        self.inbox.put(conductor.MemberLost(uid, 1, f"{uid} was killed"))
        self.members[uid].close()

    def _want(self, step: int) -> None:
        mode: Any = "decode" if step % 2 else "exact"
        self.inbox.put(conductor.StepWanted(mode, CAPACITY))

    def _conduct(self) -> None:
        try:
            while (event := self.inbox.get(timeout=60.0)) is not None:
                if isinstance(event, TicketBroken):
                    self.broken.append(event.why)
                for instruction in self.conductor.handle(event):
                    self._carry_out(instruction)
                if self._wanted is not None and (not self.patient or self._is_as_viewed()):
                    step, self._wanted = self._wanted, None
                    self._want(step)
        finally:
            for member in self.members.values():
                member.close()

    def _carry_out(self, instruction: conductor.Instruction) -> None:
        match instruction:
            case conductor.MakeId(generation):
                self.inbox.put(conductor.IdMade(generation, self._root.get_unique_id()))
            case conductor.Hold(why):
                raise AssertionError(f"replicas are left: {why}")
            case conductor.GiveUp(why):
                self.gave_up = why
                self.inbox.put(None)
            case conductor.Send(uids, message):
                if isinstance(message, Ticket):
                    self.tickets.append(message)
                for uid in uids:
                    self.members[uid].post(decode_to_member(encode(message)))
                if isinstance(message, Commit):
                    self._committed(message.step)

    def _committed(self, step: int) -> None:
        assert step == len(self.used) + 1, f"step {step} after {sorted(self.used)}"
        self.used[step] = self.tickets[-1].generation
        self.on_commit(step)
        if step in self.at_commit:
            epoch = self.view.epoch + 1
            self.view = msgspec.structs.replace(self.at_commit.pop(step), epoch=epoch)
            self.inbox.put(conductor.ViewCame(self.view, dict.fromkeys(self.world.dead, "dead")))
        if step == self.num_steps:
            self.inbox.put(None)
        else:
            self._wanted = step + 1

    def _is_as_viewed(self) -> bool:
        current = self.conductor.current
        living = {m.uid for m in self.view.members} - self.world.dead
        return current is not None and set(current.uids) == living

    def check_emitted(self) -> None:
        """Every living source emitted every step, and each is what it must be."""
        for member in self.view.members:
            if member.role != "dense" or member.uid in self.world.dead:
                continue
            emitted = self.emitted[member.uid]
            assert sorted(emitted) == list(range(1, self.num_steps + 1)), member.uid
            for step, outs in emitted.items():
                for out, expected in zip(outs, expected_of(member.uid, step), strict=True):
                    assert torch.equal(out, expected), (member.uid, step)
