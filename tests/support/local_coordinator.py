"""The coordinator's machine, runner and log over the members of a `LocalCluster`; Ray is left out.

Its tasks are calls of the actors, in threads of a pool; processes that die are threads of this
process whose sockets and NCCL are gone.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
from support.local_cluster import DenseClient, LocalCluster, pretended_gpu

from remora.actors.dense_actor import DenseActor
from remora.actors.expert_actor import ExpertActor
from remora.actors.launch import CopyOrder
from remora.cluster.coordinator_calls import Limits
from remora.cluster.coordinator_state import CoordinatorState
from remora.cluster.operation import (
    Adopt,
    Answer,
    Canary,
    CanaryResult,
    Fence,
    Keep,
    Offer,
    StartDense,
    Started,
    StartShard,
    Stop,
    Task,
)
from remora.cluster.operation_runner import OperationRunner
from remora.cluster.placement_steps import pairs_of
from remora.cluster.wal import Wal
from remora.comm.view import View
from remora.kernels.device import INTERPRETED_GPU


class LocalCoordinator:
    """From a view that is in use to `close`.

    Args:
        dense: the view's dense groups.
        folder: of the log.
    """

    def __init__(
        self, cluster: LocalCluster, view: View, dense: Sequence[DenseClient], folder: Path
    ) -> None:
        assert cluster.world is not None, "rows travel over NCCL"
        self.cluster, self.world = cluster, cluster.world
        self.views = [view]
        self.members: dict[tuple[str, int], Any] = {
            (client.member.uid, client.member.incarnation): client.actor for client in dense
        }
        facts = [shard.facts() for shard in cluster.shards]
        for shard, fact in zip(cluster.shards, facts, strict=True):
            self.members[fact.member.uid, fact.member.incarnation] = shard
        self.manifest = {
            pair: entry.digest
            for fact in facts
            for pair, entry in fact.manifest.by_expert().items()
        }
        self.layers = view.placement.moe_layers
        state = CoordinatorState(
            view=view,
            room={fact.member.uid: self._room(fact.room) for fact in facts},
            manifest=self.manifest,
            incarnations={},
            limits=Limits(),
        )
        self._pool = ThreadPoolExecutor(8)
        self._wal, _ = Wal.open(folder)
        self._wal.replace(state.snapshot())
        self.runner = OperationRunner(
            state, self._wal, perform=self._perform, publish=self.views.append
        )
        self.world.on_kill = self._died
        self.runner.start(state.begin(time.monotonic()))

    def die(self, uid: str, incarnation: int = 1) -> None:
        """SIGKILL."""
        self.world.kill(_process(uid, incarnation))

    def close(self) -> None:
        """End all members, those that died too."""
        self.world.on_kill = lambda name: None
        self.runner.close()
        self._wal.remove()
        self.world.close()
        for _, member in sorted(self.members.items()):  # dense groups first
            member.stop()
        self._pool.shutdown()

    # -- inside -------------------------------------------------------------------------------

    def _died(self, name: str) -> None:
        """The sockets of a process are closed by the kernel, and Ray tells."""
        uid, _, incarnation = name.partition("#")
        life = (uid, int(incarnation or 1))
        member = self.members[life]
        member._server.stop()
        node = getattr(member, "_node", None)
        if node is not None and node._conductor is not None:
            node._conductor.close()
        self.runner.lost(*life)

    def _room(self, by_layer: dict[int, int]) -> tuple[int, ...]:
        return tuple(by_layer[layer] for layer in self.layers)

    def _of(self, uid: str) -> Any:
        return self.members[max(life for life in self.members if life[0] == uid)]

    def _perform(self, task: Task) -> "Future[Answer]":
        return self._pool.submit(self._do, task)

    def _do(self, task: Task) -> Answer:
        match task:
            case StartShard():
                return self._start_shard(task)
            case StartDense(uid=uid, incarnation=incarnation):
                launch = self.cluster.launch(uid=uid, incarnation=incarnation, hold_s=300.0)
                dense = DenseActor(launch, self._gpu(uid, incarnation))
                self.members[uid, incarnation] = dense
                return Started(member=dense.start())
            case Offer(uid=uid, view=view):
                return str(self._of(uid).offer_view(view))
            case Adopt(uid=uid, view=view, or_none=or_none):
                return str(self._of(uid).adopt_view(view, or_none))
            case Canary(uid=uid, pairs=pairs):
                kernels, outputs = self._of(uid).canary(pairs)
                return CanaryResult(kernels=kernels, outputs=outputs)
            case Fence(uid=uid, fenced=fenced):
                self._of(uid).fence(fenced, 1)
            case Keep(uid=uid, experts=experts):
                kept = dict(zip(self.layers, experts, strict=True))
                return self._room(self._of(uid).keep_experts(kept, 1))
            case Stop(uid=uid, incarnation=incarnation):
                self.die(uid, incarnation)
            case _:
                raise AssertionError(f"nobody asks for {task} where members only come back")
        return None

    def _start_shard(self, task: StartShard) -> Started:
        uid, incarnation = task.uid, task.incarnation
        placement = self.views[0].placement
        empty = msgspec.structs.replace(placement, slots={uid: ((),) * len(self.layers)})
        launch = self.cluster.shard_launch(
            uid, empty, incarnation=incarnation, num_slots=task.num_slots
        )
        shard = ExpertActor(launch, self._gpu(uid, incarnation))
        self.members[uid, incarnation] = shard
        pairs = pairs_of(task.experts, self.layers)
        order = CopyOrder(digests={p: self.manifest[p] for p in pairs}, is_urgent=task.is_urgent)
        facts = shard.join(order)
        digests = {pair: entry.digest for pair, entry in facts.manifest.by_expert().items()}
        return Started(member=facts.member, digests=digests, room=self._room(facts.room))

    def _gpu(self, uid: str, incarnation: int) -> Any:
        return pretended_gpu(self.world, _process(uid, incarnation), INTERPRETED_GPU)


def _process(uid: str, incarnation: int) -> str:
    """Name of a life in the fake NCCL: `LocalCluster` calls first ones by their uid."""
    return uid if incarnation == 1 else f"{uid}#{incarnation}"
