"""A deployment as operators see it: the real state machine and runner over a world without Ray."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.coordinator_rig import LAYERS, World

from remora.cluster.operation import Answer, PlaceAs, Stop, Target, Task
from remora.cluster.operation_runner import OperationRunner
from remora.cluster.wal import Wal
from remora.comm.errors import ClusterError
from remora.comm.view import View

SLOTS = {"shard-0": ((0, 1), (0, 1)), "shard-1": ((2, 3), (2, 3))}


class WorldOperations:
    """`Operations` over `World`: tasks are answered at once, or held until `release`."""

    def __init__(self, runner: OperationRunner, world: World) -> None:
        self.runner, self.world = runner, world
        self.asked: list[str] = []
        self.fails: Exception | None = None
        self.planning: threading.Event | None = None
        self.rebalanced = threading.Event()
        self.no_move: str | None = None  # why rounds cannot move anything

    def request(self, operation_id: str, target: Target) -> dict[str, Any]:
        self._note("request")
        return self.runner.request(operation_id, target)

    def wait(self, operation_id: str, timeout_s: float) -> dict[str, Any]:
        self._note("wait")
        return self.runner.wait(operation_id, timeout_s)

    def cancel(self, operation_id: str | None) -> dict[str, Any]:
        self._note("cancel")
        return self.runner.cancel(operation_id)

    def hold_rebalance(self) -> threading.Event:
        """Rounds from now on wait until this is set."""
        self.planning = threading.Event()
        return self.planning

    def rebalance(self, operation_id: str, *, dry_run: bool) -> dict[str, Any]:
        self._note("rebalance")
        try:
            assert self.planning is None or self.planning.wait(20)
            return self._rebalance(operation_id, dry_run)
        finally:
            self.rebalanced.set()

    def _rebalance(self, operation_id: str, dry_run: bool) -> dict[str, Any]:
        report: dict[str, Any] = {
            "reason": "asked for", "moved_experts": 4, "copies_before": 2.0, "copies_after": 1.0,
        }  # fmt: skip
        if dry_run:
            return report | {"verdict": "confirm"}
        if self.no_move is not None:
            return report | {"verdict": "move", "not_applied": self.no_move}
        swapped = {"shard-0": ((2, 1), (0, 1)), "shard-1": ((0, 3), (2, 3))}
        operation = self.runner.request(operation_id, PlaceAs(swapped))
        return report | {"verdict": "move", "operation": operation}

    def status(self) -> dict[str, Any]:
        self._note("status")
        return {
            "name": "world", "model": "none", "phase": "serving", "error": None,
            "epoch": self.view().epoch, "view_hash": self.view().view_hash, "uptime_s": 1.5,
            "members": {
                "shard-0": {"alive": True, "phase": "ready"},
                "dense-0": {"alive": False, "error": "killed"},
            },
            "operations": self.runner.status(),
        }  # fmt: skip

    def view(self) -> View:
        return self.world.published[-1]

    def _note(self, name: str) -> None:
        self.asked.append(name)
        if self.fails is not None:
            raise self.fails


@contextmanager
def world_operations(folder: Path) -> "Iterator[HeldOperations]":
    """Two shards with spare slots; nothing goes wrong unless a test has it so."""
    world = World(SLOTS, num_experts=4, room=4)
    held: list[tuple[Task, Future[Answer]]] = []

    def perform(task: Task) -> "Future[Answer]":
        pending: Future[Answer] = Future()
        if operations.holds:
            held.append((task, pending))
        else:
            _answer(world, task, pending)
        return pending

    wal, _ = Wal.open(folder)
    wal.replace(world.state.snapshot())
    runner = OperationRunner(world.state, wal, perform=perform, publish=world.published.append)
    operations = HeldOperations(runner, world, held)
    runner.start([])
    try:
        yield operations
    finally:
        runner.close()
        wal.close()


class HeldOperations(WorldOperations):
    """With `holds`, tasks wait until `release`."""

    def __init__(
        self, runner: OperationRunner, world: World, held: "list[tuple[Task, Future[Answer]]]"
    ) -> None:
        super().__init__(runner, world)
        self.holds = False
        self._held = held

    def release(self) -> None:
        self.holds = False
        while self._held:
            _answer(self.world, *self._held.pop(0))


def _answer(world: World, task: Task, pending: "Future[Answer]") -> None:
    done = world._do(task, "none")
    if done is None and not isinstance(task, Stop):
        pending.set_exception(ClusterError(f"{task.uid} is dead"))
    else:
        pending.set_result(done[0] if done is not None else None)


__all__ = ["LAYERS", "HeldOperations", "world_operations"]
