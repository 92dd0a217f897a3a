"""Faults of the simulator: what can go wrong, where in an operation, and a file that says so.

    faults:
      - {kind: kill, who: shard, step: copy, when: during}
      - {kind: stop, who: dense, step: drain, when: before, operation: 2, for_s: 4}

A fault strikes once: when an operation comes to `step` (`before`: before anything of the step has
happened; `during`: while its tasks are under way; `after`: when the step is over).
"""

import random
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, get_args

import msgspec

from remora.cluster.sim_places import MORE
from remora.comm.checked import yaml_value
from remora.comm.errors import ConfigError

if TYPE_CHECKING:
    from remora.cluster.sim_deployment import Deployment

Kind = Literal[
    "kill", "stop", "block", "cut", "cut one way", "flip", "twice", "out of memory", "short memory",
    "full disk", "torn log", "drain node", "no place",
]  # fmt: skip
Who = Literal["shard", "joiner", "retiree", "dense", "coordinator"]
SimStep = Literal["plan", "prepare", "copy", "verify", "commit", "drain", "free", "undo", "over"]
When = Literal["before", "during", "after"]

FAULTS_MAX: Final = 64
FOR_S_MAX: Final = 3600.0
STEP_TAKES_S: Final[dict[str, float]] = {  # about; for a moment in the middle of it
    "prepare": 1.5, "copy": 0.3, "verify": 0.2, "commit": 0.3, "drain": 0.3, "free": 0.01,
}  # fmt: skip
OPERATIONS_DRAWN: Final = 3
# for a process or a link to be silent, seconds: under the time-out of a call, and over every other
SILENT_S: Final = ((0.1, 1.5), (4.0, 12.0))
BLOCKED_S: Final = ((0.1, 1.5), (30.0, 60.0))  # an engine: in the second it is found
PLACELESS_S: Final = ((1.0, 8.0), (8.0, 40.0), (180.0, 200.0))  # in the last it is given up


class Fault(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One fault. `operation` counts from 1; 0: the first that comes to the step. `for_s` is how
    long a process is stopped, an engine blocked, a link cut, frames come twice, or the disk is
    full; how long members may take to leave a host before it goes; and how long a member that dies
    finds no place anew, or of `joiner` who is more than there were."""

    kind: Kind
    who: Who = "shard"
    step: SimStep = "copy"
    when: When = "during"
    operation: Annotated[int, msgspec.Meta(ge=0)] = 0
    for_s: Annotated[float, msgspec.Meta(ge=0.0, le=FOR_S_MAX)] = 1.0

    def __str__(self) -> str:
        number = f" of operation {self.operation}" if self.operation else ""
        return f"{self.kind} {self.who} {self.when} {self.step}{number}, {self.for_s:.2f} s"


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    faults: list[Fault]


def read_faults(path: Path) -> tuple[Fault, ...]:
    """The faults of a YAML or JSON file. Raises ConfigError: it is none."""
    try:
        found = msgspec.convert(yaml_value(path.read_text(), str(path)), _File)
    except (OSError, UnicodeDecodeError, msgspec.ValidationError) as wrong:
        raise ConfigError(f"{path}: no file of faults: {wrong}") from None
    if len(found.faults) > FAULTS_MAX:
        raise ConfigError(f"{path}: {len(found.faults)} faults; {FAULTS_MAX} are allowed")
    return tuple(found.faults)


def draw_faults(chance: random.Random) -> tuple[Fault, ...]:
    """None to three of them, anywhere."""
    faults = []
    placeless_s = list(
        PLACELESS_S
    )  # streams are held through one that is long, and not through two
    for _ in range(chance.choice((0, 1, 1, 1, 2, 2, 3))):
        kind: Kind = chance.choice(get_args(Kind))
        lengths = {"no place": placeless_s, "block": BLOCKED_S}
        low, high = chance.choice(lengths.get(kind, SILENT_S))
        if (low, high) == PLACELESS_S[-1]:
            placeless_s.pop()
        faults.append(
            Fault(
                kind=kind,
                who=_draw_who(kind, chance),
                step=chance.choice(get_args(SimStep)),
                when=chance.choice(get_args(When)),
                operation=chance.randint(0, OPERATIONS_DRAWN),
                for_s=low + chance.random() * (high - low),
            )
        )
    return tuple(faults)


def _draw_who(kind: Kind, chance: random.Random) -> Who:
    if kind in ("full disk", "torn log"):
        return "coordinator"
    if kind == "short memory":
        return "shard"
    if kind == "block":
        return "dense"
    if kind in ("flip", "out of memory"):
        return "joiner" if chance.random() < 0.5 else "shard"
    if kind == "no place":
        return chance.choice(("joiner", "shard", "dense", "dense"))
    return chance.choice(("shard", "shard", "joiner", "retiree", "dense", "coordinator"))


class Faults:
    """The faults of one history, on their way."""

    def __init__(self, world: "Deployment", planned: tuple[Fault, ...]) -> None:
        self.planned = planned
        self.struck: list[Fault] = []
        self.disk_full_until_s = -1.0
        self.log_tears = False
        self.silent: list[tuple[str, float, float]] = []  # uid, from, until
        self._world = world
        self._left = list(planned)
        self._armed: dict[str, list[str]] = {}  # kind -> who it will strike
        self._healing: list[tuple[Any, ...]] = []
        self.is_over = False

    def at(self, number: int, step: str, when: When) -> None:
        """Operation `number` is before or after a step: what was planned for this strikes."""
        for fault in list(self._left):
            if self.is_over or fault.step != step or fault.operation not in (0, number):
                continue
            if when == "before" and fault.when == "during":
                self._left.remove(fault)
                delay_s = self._world.chance.random() * STEP_TAKES_S.get(step, 0.01)
                self._world.clock.after(delay_s, partial(self._strike, fault))
            elif fault.when == when:
                self._left.remove(fault)
                self._strike(fault)

    def takes(self, kind: Kind, process: str) -> bool:
        """Whether a fault of this kind is due at a process; it is over then."""
        armed = self._armed.get(kind)
        if not armed or (armed[0] != "*" and not process.startswith(f"{armed[0]}#")):
            return False
        armed.pop(0)
        return True

    def end(self) -> None:
        """No more faults; what is stopped or cut has its own end, and so has want of room."""
        self.is_over = True
        self._armed.clear()
        self.disk_full_until_s = -1.0
        self.log_tears = False

    # -- inside -------------------------------------------------------------------------------

    def _strike(self, fault: Fault) -> None:
        world = self._world
        if self.is_over:
            return
        match fault.kind:
            case "full disk":
                self.disk_full_until_s = world.clock.now_s + fault.for_s
            case "torn log":
                self.log_tears = True
            case "flip" | "out of memory":
                who = "*" if fault.who == "joiner" else self._uid(fault.who)
                if who is None:
                    return
                self._armed.setdefault(fault.kind, []).append(who)
            case "no place" if fault.who == "joiner":
                self._world.places.want(MORE, fault.for_s)
            case _:
                if not self._strike_process(fault):
                    return
        self.struck.append(fault)
        world.trace(f"FAULT {fault}")

    def _strike_process(self, fault: Fault) -> bool:
        world, network = self._world, self._world.network
        uid = self._uid(fault.who, may_be_last=fault.kind in ("kill", "no place"))
        if uid is None:
            return False
        process = world.process_of(uid)
        match fault.kind:
            case "kill":
                if uid == "coordinator":
                    world.coordinator.crash_soon()
                else:
                    network.kill(process)
            case "no place":
                world.places.want(uid, fault.for_s)
                network.kill(process)
            case "stop":
                network.stop(process)
                world.clock.after(fault.for_s, lambda: network.go_on(process))
            case "block":
                if uid not in world.ranks_alive():
                    return False
                world.ranks[process].block(fault.for_s)
            case "drain node":
                if uid == "coordinator":
                    return False
                world.nodes.drain(world.host_of(process), fault.for_s)
            case "short memory":
                if uid not in world.shards_alive():
                    return False
                world.shards[process].give_up_copies()
            case "twice":
                network.double(uid, True)
                world.clock.after(fault.for_s, lambda: network.double(uid, False))
            case "cut" | "cut one way":
                others = [u for u in world.uids() if u != uid and u[0] != uid[0]]
                other = world.chance.choice(others)
                pairs = [(uid, other)] + ([(other, uid)] if fault.kind == "cut" else [])
                for pair in pairs:
                    network.cut(*pair)
                    world.clock.after(fault.for_s, partial(network.heal, *pair))
                self._note_silence(other, fault.for_s)
        self._note_silence(uid, fault.for_s)
        world.trace(f"{fault.kind}: {uid}")
        return True

    def _note_silence(self, uid: str, for_s: float) -> None:
        now_s = self._world.clock.now_s
        self.silent.append((uid, now_s, now_s + for_s))

    def _uid(self, who: Who, *, may_be_last: bool = False) -> str | None:
        """Somebody of this kind; None: there is nobody, or nobody that may be spared."""
        world = self._world
        operation = world.coordinator.operation
        if who == "coordinator":
            return "coordinator"
        if who == "dense":
            ranks = [uid for uid in world.ranks_alive()]
            return world.chance.choice(ranks) if len(ranks) > (not may_be_last) else None
        shards = world.shards_alive()
        if operation is not None and who == "joiner":
            shards = [uid for uid in shards if uid in operation.joiners]
        elif operation is not None and who == "retiree":
            shards = [uid for uid in shards if uid in operation.retirees]
        return world.chance.choice(shards) if shards else None
