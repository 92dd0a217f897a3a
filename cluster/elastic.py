"""Operations of one deployment: its log, its machine and who carries out what that asks for."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from functools import partial
from pathlib import Path
from typing import Any, Final

from remora.actors.health_state import HealthState, Life
from remora.actors.launch import actor_name
from remora.actors.manifest import Manifest
from remora.actors.model_spec import ModelSpec
from remora.actors.shard_facts import ShardFacts
from remora.cluster.config import RemoraConfig
from remora.cluster.coordinator_calls import Limits
from remora.cluster.coordinator_recovery import recovered
from remora.cluster.coordinator_state import CoordinatorState
from remora.cluster.dense_groups import rank_uids
from remora.cluster.health_watch import HealthWatch
from remora.cluster.launch import copies_of
from remora.cluster.log_folder import folder_below
from remora.cluster.member_tasks import ROUTER_LIFE, MemberTasks, find_actor
from remora.cluster.node_watch import NodeWatch, RayNodes
from remora.cluster.operation import Drain, Effect, Pair, ScaleTo, Target, is_dense
from remora.cluster.operation_plan import FreeMemory
from remora.cluster.operation_runner import OperationRunner
from remora.cluster.places import why_placeless
from remora.cluster.standbys import Standbys, end_strays
from remora.cluster.wal import Wal, WalError
from remora.comm.errors import ClusterError, ConfigError
from remora.comm.view import View

logger = logging.getLogger(__name__)

ENDING: Final = {"t": "ending"}  # all there is in the log once a deployment is being stopped
STALL_CALLS: Final = 4  # calls of a step that are late one after the other: it gets on, slowly


def log_folder(config: RemoraConfig) -> Path:
    """Where the coordinator of a deployment keeps its log."""
    return folder_below(config.elastic.log_dir, config.name)


def limits_of(config: RemoraConfig, spec: ModelSpec) -> Limits:
    """What operations of a deployment may take, and aim at."""
    slots = config.experts.slots
    return Limits(
        prepare_s=config.start_timeout_s,
        copy_s=config.start_timeout_s,
        drain_s=config.elastic.drain_timeout_s,
        replicas=1 if slots is None else 2,
        slots_of_joiners=slots or 1,
        num_copies=copies_of(config, spec) if config.experts.computes_on == "cpu" else 0,
    )


def unix_clock() -> Callable[[], float]:
    """Seconds that only go forwards, about Unix time: what an operation has in the log by the clock
    of one host is understood by a coordinator that comes back on another one."""
    offset_s = time.time() - time.monotonic()
    return lambda: offset_s + time.monotonic()


def _may_join(target: Target) -> bool:
    return isinstance(target, ScaleTo) or (isinstance(target, Drain) and target.joiners != "none")


class Elastic:
    """From the first view of a deployment to its end; also across lives of its coordinator.

    Args:
        wal: its log, open.
        publish: called with every view that is committed.
        changed: as `MemberTasks`.
    """

    def __init__(
        self,
        config: RemoraConfig,
        token: bytes,
        wal: Wal,
        *,
        publish: Callable[[View], None],
        changed: Callable[[str, Any, str], None],
    ) -> None:
        self._config, self._token, self._wal = config, token, wal
        self._publish, self._changed = publish, changed
        self._clock = unix_clock()
        self._tasks: MemberTasks | None = None
        self._view: View | None = None  # the committed one
        self._state: CoordinatorState | None = None
        self.standbys = Standbys(config, "shard")
        self.warm_dense = Standbys(config, "dense")
        self.runner: OperationRunner | None = None
        self.health: HealthWatch | None = None
        self.nodes: NodeWatch | None = None

    def begin(
        self, view: View, spec: ModelSpec, facts: Mapping[str, ShardFacts], manifest: Manifest,
        handles: Mapping[str, Any], router: Any,
    ) -> None:  # fmt: skip
        """Take over a deployment that has just come up.

        Raises:
            WalError: the log cannot be written.
        """
        layers = view.placement.moe_layers
        state = CoordinatorState(
            view=view,
            room={uid: tuple(f.room[layer] for layer in layers) for uid, f in facts.items()},
            manifest={pair: entry.digest for pair, entry in manifest.by_expert().items()},
            incarnations={},
            limits=limits_of(self._config, spec),
            has_router=router is not None,
        )
        self._wal.replace(state.snapshot())
        self._run(state, spec, handles, router, lambda: state.begin(self._clock()))

    def resume(self, records: list[dict[str, Any]], spec: ModelSpec, router: Any) -> View | None:
        """Take over from a coordinator that died, by its log; None: nothing of it lives.

        Raises:
            ClusterError: the log is none of ours, or another version's.
        """
        config = self._config
        limits = limits_of(config, spec)
        try:
            state, operation, leaving = recovered(records, limits, has_router=router is not None)
        except ClusterError as foreign:
            raise ClusterError(f"{self._wal.path}: {foreign}") from foreign
        members = (*state.view.members, *leaving)
        ranks = {m.uid: rank_uids(config, m.uid) if is_dense(m.uid) else [m.uid] for m in members}
        names = {
            uid: m.actor_name if uid == m.uid else actor_name(config.name, uid, m.incarnation)
            for m in members
            for uid in ranks[m.uid]
        }
        found = {uid: find_actor(name) for uid, name in names.items()}
        living = {uid: handle for uid, handle in found.items() if handle is not None}
        end_strays(config.name, set(names.values()))
        if not living:
            return None
        in_flight = operation.operation_id if operation else "none"
        logger.warning("adopting %s; operation in flight: %s", sorted(living), in_flight)
        for uid, handle in living.items():
            self._changed(uid, handle, "")

        def resumed() -> list[Effect]:
            memory = self._memory_for(state.accepted[0].target) if state.accepted else None
            return state.resume(operation, self._clock(), memory)

        self._run(state, spec, living, router, resumed)
        for m in members:
            if not living.keys() >= set(ranks[m.uid]):
                self.begun().lost(m.uid, m.incarnation)
        return state.view

    def request(self, operation_id: str, target: Target) -> dict[str, Any]:
        """Begin an operation, or find the one of that id.

        Raises:
            ConfigError, ClusterError: it cannot be; see `CoordinatorState.request`.
        """
        if self._config.experts.transport == "nccl":
            raise ConfigError(
                "experts.transport = nccl: members that died come back, but none comes or goes yet,"
                " and no expert moves: scale and move experts with transport auto or tcp"
            )
        return self.begun().request(operation_id, target, self._memory_for(target))

    def heartbeat(self) -> tuple[int, int]:
        """As `Coordinator.heartbeat`."""
        if self.runner is None or self.health is None:  # not begun, and the start has its own limit
            return 0, 0
        self.runner.come_round()
        return self.health.looks_total, 1

    def joining(self, uids: Iterable[str]) -> set[str]:
        """Those of some actors, ranks of dense groups included, that start."""
        if self.runner is None:
            return set(uids)
        joiners = self.runner.joiners()
        return {uid for uid in uids if uid.partition(".")[0] in joiners}

    def health_status(self) -> dict[str, object]:
        """Members that hung so far, and nodes that are being drained."""
        health = self.health.status() if self.health is not None else {}
        return health | ({"nodes": self.nodes.status()} if self.nodes is not None else {})

    def gauges(self) -> dict[str, float]:
        """For the `/metrics` of ingresses, by name."""
        if self.health is None or self.runner is None:
            return {}
        alive = self.runner.replicas_alive()
        return {
            "remora_members_hung": float(self.health.hung_total),
            "remora_experts_without_replica": float(alive["none"]),
            "remora_experts_with_one_replica": float(alive["one"]),
        }

    def close(self) -> None:
        """Stop; an operation that runs stays where it is. Idempotent."""
        self.standbys.close()
        self.warm_dense.close()
        if self.nodes is not None:
            self.nodes.close()
        if self.health is not None:
            self.health.close()
        if self._tasks is not None:
            self._tasks.close()
        if self.runner is not None:
            self.runner.close()

    def ending(self) -> None:
        """Write down that all of it is being ended: another life of the coordinator goes on with
        that."""
        try:
            self._wal.replace(ENDING)
        except WalError as failed:  # it is ended all the same
            logger.warning("%s", failed)

    def forget(self) -> None:
        """The deployment is over: there is nothing left to remember."""
        self._wal.remove()

    def let_go(self) -> None:
        """Let another life read the log."""
        self._wal.close()

    def _memory_for(self, target: Target) -> FreeMemory | None:
        """What hosts have left for who joins by an operation, if anybody may."""
        if self._tasks is None or not _may_join(target):
            return None
        return self._tasks.free_memory(self.nodes.nodes if self.nodes else frozenset())

    def _run(
        self, state: CoordinatorState, spec: ModelSpec, handles: Mapping[str, Any], router: Any,
        begin: Callable[[], list[Effect]],
    ) -> None:  # fmt: skip
        """`begin`: what there is to do, once members can be asked."""
        self._view = state.view
        tasks = MemberTasks(
            self._config,
            self._token,
            spec,
            state.view.placement,
            state.manifest,
            soon=lambda work: self.begun().soon(work),
            lost=lambda uid, incarnation: self.begun().lost(uid, incarnation),
            changed=self._changed,
            standbys=self.standbys,
            warm_dense=self.warm_dense,
            term=state.term,
        )
        self._tasks, self._state = tasks, state
        self.runner = OperationRunner(
            state,
            self._wal,
            perform=tasks.perform,
            publish=self._committed,
            settled=self._fill,
            clock=self._clock,
        )
        if router is not None:
            tasks.add_router(router)
        for uid, handle in handles.items():
            tasks.add(uid, state.incarnations[uid.partition(".")[0]], handle)
            if not is_dense(uid):
                tasks.ask_where(uid)
        timeout_s, hang_s = self._config.experts.call_timeout_s, self._config.elastic.hang_s
        self.health = HealthWatch(
            HealthState(hang_s=hang_s, stall_s=hang_s + STALL_CALLS * timeout_s),
            ask=tasks.heartbeat,
            hung=self._hung,
            others={ROUTER_LIFE} if router is not None else set(),
        )
        ray_nodes = RayNodes()
        self.nodes = NodeWatch(
            draining=ray_nodes.draining,
            homes=tasks.homes,
            members=self._members,
            history=self.begun().history,
            request=self.request,
            leave=self._leave,
            why_placeless=partial(why_placeless, self._config, ray_nodes, tasks.homes),
            give_up=self.begun().give_up,
        )
        self.runner.start(begin())
        self.health.start(state.view)
        self.nodes.start()
        if state.operation is None:
            self._fill()

    def _leave(self, nodes: AbstractSet[str], is_over: bool) -> None:
        """Standbys that end are replaced by the end of an operation; or here, where none comes."""
        for standbys in (self.standbys, self.warm_dense):
            standbys.leave(nodes)
            if is_over:
                standbys.start_next()

    def _fill(self) -> None:
        self.standbys.fill()
        self.warm_dense.fill()

    def _members(self) -> set[Life]:
        assert self._view is not None, "begun"
        return {(m.uid, m.incarnation) for m in self._view.members}

    def _hung(self, uid: str, incarnation: int) -> None:
        assert self._tasks is not None, "who hangs was asked"
        if (uid, incarnation) == ROUTER_LIFE:
            self._tasks.restart_router()
        else:
            self.begun().lost(uid, incarnation)

    def _committed(self, view: View) -> None:
        self._view = view
        if self._tasks is not None:  # in time for the second copies that follow an operation
            self._tasks.ask_heat(self._heated)
        if self.health is not None:
            self.health.adopt_view(view)
        self._publish(view)

    def _heated(self, heat: dict[Pair, float]) -> None:
        def note() -> None:
            assert self._state is not None
            self._state.heat = heat

        self.begun().soon(note)

    def running(self) -> str | None:
        """Id of the operation that runs."""
        return self.runner.running() if self.runner is not None else None

    def begun(self) -> OperationRunner:
        """What runs operations, once there is a view."""
        assert self.runner is not None, "before the first view"
        return self.runner
