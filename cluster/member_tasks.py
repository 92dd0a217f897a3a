"""What the coordinator's machine asks for, as calls of Ray actors; and who of them has died."""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, Final

import msgspec
import ray

from remora.actors.health_state import Beat, Life
from remora.actors.host_memory import HostMemory
from remora.actors.launch import RAY_NAMESPACE, CopyOrder, ReplicaSource, actor_name
from remora.actors.model_spec import ModelSpec
from remora.actors.shard_facts import ShardFacts
from remora.actors.shard_process import ShardProcess
from remora.cluster.config import RemoraConfig
from remora.cluster.coordinator_calls import ROUTER
from remora.cluster.copy_watch import CopyWatch
from remora.cluster.dense_groups import (
    create_rank,
    rank_plans,
    rank_uids,
    remove_placement_group,
    start_ranks,
)
from remora.cluster.launch import copies_of, shard_launch, shard_options
from remora.cluster.members import answers_within, asked_of_ray
from remora.cluster.node_watch import node_of
from remora.cluster.operation import (
    Adopt,
    Answer,
    Canary,
    CanaryResult,
    Copy,
    Fence,
    HoldCopies,
    Keep,
    Offer,
    Pair,
    Quiesce,
    StartDense,
    Started,
    StartShard,
    Stop,
    Task,
    is_dense,
)
from remora.cluster.operation_plan import FreeMemory
from remora.cluster.placement_steps import pairs_of
from remora.cluster.ray_calls import answer_of, end_of, first_of_all, make_member
from remora.cluster.standbys import Standbys
from remora.comm.errors import ClusterError
from remora.comm.view import Endpoint, Member, Placement

logger = logging.getLogger(__name__)

Taking = StartShard | Copy | HoldCopies  # a shard that takes experts in

ROUTER_LIFE: Final[Life] = (ROUTER, 0)  # Ray starts it again by itself: no lives are told apart
MEMORY_S: Final = 2.0  # for shards to tell what their hosts have left


class MemberTasks:
    """Performs tasks on the members of one deployment. Any thread; nothing here waits.

    Args:
        placement: for its layers.
        manifest: digest of every expert.
        soon: runs something in a thread of ours.
        lost: told of a life that is over without having been asked to end.
        changed: told of the handle of each uid that there is from now on (None: no more), and of
            what it asks of Ray.
        standbys: taken for shards that start; `warm_dense`: for dense groups.
        term: of this coordinator; what it orders is refused once another one has taken over.
    """

    def __init__(
        self,
        config: RemoraConfig,
        token: bytes,
        spec: ModelSpec,
        placement: Placement,
        manifest: Mapping[Pair, str],
        *,
        soon: Callable[[Callable[[], None]], None],
        lost: Callable[[str, int], None],
        changed: Callable[[str, Any, str], None],
        standbys: Standbys,
        warm_dense: Standbys,
        term: int,
    ) -> None:
        self._config, self._token, self._spec = config, token, spec
        self._placement = placement
        self._manifest = dict(manifest)
        self._soon, self._lost, self._changed = soon, lost, changed
        self._standbys, self._warm_dense = standbys, warm_dense
        self._term = term
        self._num_copies = copies_of(config, spec)
        self._lock = threading.Lock()
        self._lives: dict[tuple[str, int], Any] = {}
        self._newest: dict[str, int] = {}
        self._copies: dict[tuple[str, int], Endpoint] = {}
        self._router: Any = None
        self._closed = False
        self._copying = CopyWatch(self._living)

    def add(self, uid: str, incarnation: int, handle: Any) -> None:
        """A member that lives, or one rank of a dense group that does; its death is told, that of
        any rank as its group's."""
        with self._lock:
            self._lives[uid, incarnation] = handle
            self._newest[uid] = incarnation
        self._watch(uid, incarnation, handle)

    def know(self, facts: ShardFacts) -> None:
        """Where the experts of a shard are copied."""
        with self._lock:
            if facts.copies is not None:
                self._copies[facts.member.uid, facts.member.incarnation] = facts.copies

    def homes(self) -> dict[Life, set[str]]:
        """Ray nodes of the members that live, of all ranks of a dense group; asks Ray for each."""
        with self._lock:
            lives = dict(self._lives)
        found: dict[Life, set[str]] = {}
        for (uid, incarnation), handle in lives.items():
            node = node_of(handle)
            if node is not None:
                found.setdefault((uid.partition(".")[0], incarnation), set()).add(node)
        return found

    def free_memory(self, leaving: AbstractSet[str]) -> FreeMemory | None:
        """What hosts have left now, without those of nodes that go away; waits a moment. None: no
        shard has told what a slot takes."""
        shards = {u: h for u, h in self._living().items() if u.startswith("shard-")}
        asked = {uid: handle.host_memory.remote() for uid, handle in shards.items()}
        answers = answers_within(asked, MEMORY_S).values()
        told = [each for each in answers if isinstance(each, HostMemory)]
        slot_bytes = max((each.slot for each in told), default=0)
        if not slot_bytes:
            return None
        by_host: dict[str, int] = {}
        copies: dict[str, int] = {}
        for each in told:
            if each.host not in leaving:
                by_host[each.host] = each.free
                copies[each.host] = copies.get(each.host, 0) + each.copies
        hosts = {node["NodeID"] for node in ray.nodes() if node["Alive"]} - leaving
        others = len(hosts - by_host.keys())
        return FreeMemory(slot_bytes=slot_bytes, by_host=by_host, copies=copies, others=others)

    def ask_where(self, uid: str) -> None:
        """Have a living shard tell where its experts are copied; nobody waits for it."""
        answer_of(self._handle(uid).facts.remote(), self.know)

    def add_router(self, handle: Any) -> None:
        """The router; Ray starts it again when it dies."""
        self._router = handle

    def restart_router(self) -> None:
        """End the life of the router that there is; Ray begins the next."""
        ray.kill(self._router, no_restart=False)

    def ask_heat(self, told: Callable[[dict[Pair, float]], None]) -> None:
        """Have the router say how hot experts are, where there is one; nobody waits for it."""
        if self._router is not None:
            answer_of(self._router.heat.remote(), told)

    def heartbeat(self, uid: str, incarnation: int) -> "Future[Beat]":
        """Ask a life for a sign of progress. Raises ClusterError: there is no such life."""
        with self._lock:
            handle = self._lives.get((uid, incarnation))
        if (uid, incarnation) == ROUTER_LIFE:
            handle = self._router
        if handle is None:
            raise ClusterError(f"there is no {uid}#{incarnation}")
        return answer_of(handle.heartbeat.remote(), lambda answer: Beat(*answer))

    def close(self) -> None:
        """Deaths are told no more."""
        self._closed = True
        self._copying.close()

    def perform(self, task: Task) -> "Future[Answer]":
        """Begin a task.

        Raises:
            ClusterError: no such member.
        """
        match task:
            case StartShard():
                return self._start(task)
            case StartDense():
                return self._start_dense(task)
            case Quiesce(uid=uid, within_s=within_s):
                return answer_of(self._handle(uid).quiesce.remote(within_s))
            case Stop(uid=uid, incarnation=incarnation):
                return self._stop(uid, incarnation)
            case Adopt(uid=uid, view=view) if uid == ROUTER:
                return answer_of(self._router.adopt_view.remote(view))
            case Adopt(uid=uid, view=view, or_none=or_none):
                return answer_of(self._handle(uid).adopt_view.remote(view, or_none))
            case Offer(uid=uid, view=view):
                return answer_of(self._handle(uid).offer_view.remote(view))
            case Fence(uid=uid, fenced=fenced):
                return answer_of(self._handle(uid).fence.remote(fenced, self._term))
            case Copy(uid=uid):
                order = self._order(task, task.pairs)
                return self._taking(task, answer_of(self._handle(uid).load_experts.remote(order)))
            case HoldCopies(uid=uid):
                order = self._order(task, task.pairs)
                return self._taking(task, answer_of(self._handle(uid).hold_copies.remote(order)))
            case Canary(uid=uid, pairs=pairs):
                return answer_of(self._handle(uid).canary.remote(pairs), _canary_result)
            case Keep(uid=uid, experts=experts):
                by_layer = dict(zip(self._placement.moe_layers, experts, strict=True))
                kept = self._handle(uid).keep_experts.remote(by_layer, self._term)
                return answer_of(kept, self._room)

    # -- inside -------------------------------------------------------------------------------

    def _handle(self, uid: str) -> Any:
        with self._lock:
            handle = self._lives.get((uid, self._newest.get(uid, 0)))
        if handle is None:
            raise ClusterError(f"there is no {uid}")
        return handle

    def _start(self, task: StartShard) -> "Future[Answer]":
        config, uid = self._config, task.uid
        layers = self._placement.moe_layers
        empty = msgspec.structs.replace(self._placement, slots={uid: ((),) * len(layers)})
        launch = msgspec.structs.replace(
            shard_launch(config, uid, empty, self._token, num_copies=self._num_copies),
            incarnation=task.incarnation,
            num_slots=task.num_slots,
            load_idle=not task.is_urgent,
        )
        options = shard_options(config)
        handle: Any
        standby = self._standbys.take()
        if standby is not None:
            name, handle = standby
            launch = msgspec.structs.replace(launch, process_name=name)
            logger.info("%s: takes %s", uid, name)
        else:
            name = actor_name(config.name, uid, task.incarnation)
            handle = make_member(ShardProcess, name, options, launch)
        self.add(uid, task.incarnation, handle)
        self._changed(uid, handle, asked_of_ray(options))
        pairs = task.replicas or pairs_of(task.experts, layers)
        order = self._order(task, tuple(pairs))
        return self._taking(task, answer_of(handle.join.remote(launch, order), self._started))

    def _taking(self, task: Taking, answer: "Future[Answer]") -> "Future[Answer]":
        """Where it yields, somebody sees to its share until it is over."""
        if _yields(task):
            self._copying.begun(task.uid)
            answer.add_done_callback(lambda _: self._copying.ended(task.uid))
        return answer

    def _living(self) -> dict[str, Any]:
        with self._lock:
            newest = self._newest.items()
            return {u: h for u, n in newest if (h := self._lives.get((u, n))) is not None}

    def _order(self, task: Taking, pairs: Sequence[Pair]) -> CopyOrder:
        """What a shard is told to take in; sources are those whose address is known."""
        uids = {uid for each in task.replicas.values() for uid in each}
        with self._lock:
            sources = tuple(
                ReplicaSource(uid=uid, incarnation=life, endpoint=self._copies[uid, life])
                for uid in sorted(uids)
                if (uid, life := self._newest.get(uid, 0)) in self._copies
            )
        digests = {pair: self._manifest[pair] for pair in pairs}
        return CopyOrder(
            digests=digests,
            replicas=dict(task.replicas),
            sources=sources,
            term=self._term,
            share=self._copying.share if _yields(task) else None,
            is_urgent=not isinstance(task, HoldCopies) and task.is_urgent,
        )

    def _start_dense(self, task: StartDense) -> "Future[Answer]":
        uid, incarnation = task.uid, task.incarnation
        config = self._config
        plans = rank_plans(config, uid, self._spec, self._token, incarnation=incarnation)
        if not task.is_urgent and len(plans) == 1:  # ranks of one group load together
            launch = msgspec.structs.replace(plans[0].launch, load_idle=True)
            plans = [replace(plans[0], launch=launch)]
        standby = self._warm_dense.take() if len(plans) == 1 else None
        if standby is not None:
            name, handle = standby
            logger.info("%s: takes %s", uid, name)
            launch = msgspec.structs.replace(plans[0].launch, process_name=name)
            plans, handles = [replace(plans[0], launch=launch)], {uid: handle}
        else:
            handles = {plan.uid: create_rank(config, plan) for plan in plans}
        for plan in plans:
            self.add(plan.uid, incarnation, handles[plan.uid])
            self._changed(plan.uid, handles[plan.uid], asked_of_ray(plan.options))
        pending = start_ranks(handles, plans)
        return first_of_all({name: answer_of(pending[name], _dense_started) for name in pending})

    def _started(self, facts: ShardFacts) -> Started:
        self.know(facts)
        digests = {pair: entry.digest for pair, entry in facts.manifest.by_expert().items()}
        return Started(member=facts.member, digests=digests, room=self._room(facts.room))

    def _room(self, by_layer: Mapping[int, int]) -> tuple[int, ...]:
        return tuple(by_layer[layer] for layer in self._placement.moe_layers)

    def _stop(self, uid: str, incarnation: int) -> "Future[Answer]":
        for name in rank_uids(self._config, uid) if is_dense(uid) else [uid]:
            with self._lock:
                handle = self._lives.pop((name, incarnation), None)
                self._copies.pop((name, incarnation), None)
                is_newest = self._newest.get(name) == incarnation
            if handle is None:  # of a coordinator that is no more
                handle = find_actor(actor_name(self._config.name, name, incarnation))
            if handle is not None:
                ray.kill(handle, no_restart=True)
            if is_newest:
                self._changed(name, None, "")
        if is_dense(uid):
            remove_placement_group(self._config, uid, incarnation)
        done: Future[Answer] = Future()
        done.set_result(None)
        return done

    def _watch(self, uid: str, incarnation: int, handle: Any) -> None:
        """Have the end of a life told. Ray tells it in a thread from which nothing of Ray's may be
        waited for."""

        def ended(done: "Future[None]") -> None:
            with self._lock:
                is_known = (uid, incarnation) in self._lives
            if self._closed or not is_known:
                return
            failure = done.exception()
            if isinstance(failure, ray.exceptions.ActorUnavailableError):  # cut off for a while
                self._soon(lambda: self._watch(uid, incarnation, handle))
                return
            logger.error("%s (incarnation %d) died: %s", uid, incarnation, failure or "it ended")
            self._lost(uid.partition(".")[0], incarnation)

        end_of(handle).add_done_callback(ended)


def _yields(task: Taking) -> bool:
    return isinstance(task, HoldCopies) or task.yields


def find_actor(name: str) -> Any:
    """The living actor of a name in our namespace; None: there is none."""
    try:
        return ray.get_actor(name, namespace=RAY_NAMESPACE)
    except ValueError:
        return None


def _canary_result(answer: tuple[str, dict[Pair, str]]) -> CanaryResult:
    return CanaryResult(kernels=answer[0], outputs=answer[1])


def _dense_started(member: Member | None) -> Started | None:
    """Of one rank of a dense group: its first one is the member."""
    return None if member is None else Started(member=member)
