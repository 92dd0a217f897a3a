"""The process of one dense rank: loads, listens to ingresses, runs the engine in its own thread.

Ray's threads only start, ask, hand over views and stop. The frame server has a thread that decodes
and queues; the engine's thread owns torch, the KV pages and the connections to the shards.
"""

import logging
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from remora.actors.actor_thread import ActorThread
from remora.actors.dense_engine import DenseEngine
from remora.actors.dense_errands import Errands
from remora.actors.dense_launch import DenseLaunch, Wish
from remora.actors.dense_limits import STATUS_STATS, limits_of
from remora.actors.dense_load import load_dense, look_at
from remora.actors.dense_model import DenseModel
from remora.actors.dense_rank import DenseRank, allocate_pages
from remora.actors.dense_state import DenseState
from remora.actors.draft import Known
from remora.actors.executor import Executor
from remora.actors.hardware import Hardware
from remora.actors.host_experts import on_host
from remora.actors.launch import Progress, advertised_ip, host_label, member_of, take_threads
from remora.actors.load_sharing import LoadSharing
from remora.actors.nccl_node import NcclNode
from remora.actors.routing_tap import RoutingTap, tap_of
from remora.actors.shard_links import connect_shards, no_view, peer_limits, traffic_of
from remora.actors.tp_experts import SplitExperts
from remora.actors.tp_group import gather_ranks
from remora.actors.tp_hold import GroupHold
from remora.actors.tp_leader import Leader, LeaderExecutor, LeaderRank
from remora.actors.tp_shuffle import TokenShuffle
from remora.actors.tp_surgery import whole_text
from remora.actors.trace_recorder import Recorded, TraceRecorder, header_of
from remora.actors.view_inbox import ViewInbox
from remora.comm.accounting import TrafficMeter
from remora.comm.connection import Connection, Frame
from remora.comm.dispatch import Dispatcher
from remora.comm.messages import EngineStats, Traffic
from remora.comm.peers import PeerSet
from remora.comm.rank_link import RankListener
from remora.comm.server import FrameServer
from remora.comm.trace import TraceHeader
from remora.comm.view import Endpoint, Member, View
from remora.kernels import phases
from remora.kernels.device import CPU
from remora.kernels.fingerprint import kernel_fingerprint

logger = logging.getLogger(__name__)


class DenseActor:
    """One dense rank. `cluster` wraps it with `ray.remote`; tests run it in their own process."""

    def __init__(
        self, launch: DenseLaunch, hardware: Hardware | None = None, known: Known | None = None
    ) -> None:
        self._launch, self._given, self._known = launch, hardware, known or Known()
        self._progress = Progress(phase="starting")
        self._server: FrameServer | None = None
        self._engine: DenseEngine | None = None
        self._state: DenseState | None = None
        self._peers: PeerSet | None = None
        self._executor: Executor | None = None
        self._dispatcher: Dispatcher | None = None
        self._rank: DenseRank | None = None
        self._node: NcclNode | None = None
        self._listener: RankListener | None = None
        if launch.num_ranks > 1:
            self._listener = RankListener(
                host_ip=launch.bind_ip, use_unix=launch.use_unix, token=launch.token
            )
        self._leader: Leader | None = None
        self._errands: Errands | None = None
        self._tap: RoutingTap | None = None
        self._meter: TrafficMeter | None = None
        self._shuffle: TokenShuffle | None = None  # of the ranks, where there are several
        self._views: ViewInbox | None = None
        self._whole, self._stopping = "", False
        self._dtype = launch.dtype  # resolved once the checkpoint has been looked at
        self._thread = ActorThread(f"remora-{launch.uid}", self._prepare)

    def listen(self) -> Endpoint:
        """Where the other ranks of this dense group find rank 0."""
        assert self._listener is not None, "a dense group of one rank"
        return self._listener.endpoint(host_label(), advertised_ip(self._launch.bind_ip))

    def start(self) -> Member:
        """Load, listen, and say where. Requests are served once a view has been adopted.

        Raises:
            WeightsError, UnsupportedModelError, ConfigError: as loading found them.
            OSError: the address cannot be bound.
        """
        self._thread.start()
        assert self._server and self._state and self._engine and self._rank
        top_k = self._rank.model.spec.top_k
        loads = LoadSharing(self._engine, lambda: self._dispatcher, top_k, self._leader)
        self._errands = Errands(self._launch, self._state.stats, self.take_sketch, loads)
        return member_of(self._launch, "dense", self._server.endpoint(host_label()))

    def offer_view(self, view: View) -> str:
        """Connect to the shards of a view to come, between two steps; the hash of that view.

        Raises:
            ClusterError: one cannot be reached.
        """
        assert self._engine is not None and self._views is not None, "offer_view before start"
        self._views.offer(view, self._engine.run_soon)
        return view.view_hash

    def adopt_view(self, view: View, or_none: bool = False) -> str:
        """Serve by `view`, or a newer one that was told, from the next step on (a call that fails
        before, by it too); the hash of `view`.

        Raises:
            ClusterError: an expert cannot be reached (`DenseEngine.adopt_view`).
        """
        assert self._engine and self._views and self._errands, "adopt_view before start"
        adopted: Future[None] = Future()
        newest = self._views.tell(view, adopted)
        self._errands.adopt_view(newest)
        self._engine.adopt_view(newest, or_none=or_none, adopted=adopted)
        if self._node is not None:
            self._node.wait_for(newest, or_none)
        return view.view_hash

    def quiesce(self, within_s: float) -> None:
        """Get no more requests, and return when those that there are have ended, or after
        `within_s`: what is left then goes on elsewhere once this process ends."""
        if self._engine is not None and not self._engine.quiesce(within_s):
            logger.warning("%s: not all requests ended within %g s", self._launch.uid, within_s)

    def heartbeat(self) -> tuple[int, int]:
        """As `DenseEngine.beat`; nothing waits while the step in flight is held for an expert that
        the coordinator restores. Over NCCL with signs of tickets, others' too."""
        done, waiting = self._engine.beat() if self._engine else (0, 0)
        is_held = self._views is not None and self._views.is_holding
        signs, behind = self._node.beat() if self._node else (0, 0)
        return done + signs, 0 if is_held else waiting + behind

    def until_end(self) -> None:
        """Returns when this rank serves no more."""
        self._thread.wait_until_end()

    def progress(self) -> Progress:
        """How far loading has come."""
        return self._progress

    def fingerprint(self) -> str:
        """What the last bits of this rank's results depend on (numerics contract)."""
        launch, executor = self._launch, self._executor
        return (
            f"mode={'exact' if launch.exact else 'fast'} "
            f"executor={executor.name if executor else '?'} dtype={self._dtype} "
            f"threads={launch.num_threads} tp={launch.num_ranks} {kernel_fingerprint()}"
        )

    def status(self) -> dict[str, Any]:
        """What `remora status` shows of this rank."""
        stats, peers = self._state.stats() if self._state else EngineStats(), self._peers
        return {
            "alive": self._thread.is_alive,
            "phase": self._progress.phase,
            "incarnation": self._launch.incarnation,
            "why_not_serving": self._engine.why_not_serving if self._engine else "starting",
            "fingerprint": self.fingerprint(),
            "step_s": self._engine.step_s if self._engine else 0.0,
            **{name: getattr(stats, name) for name in STATUS_STATS},
            "why_eager": self._executor.why_eager if self._executor else None,
            "shards_connected": self._node.shards if self._node else [],
            **(peers.status() if peers and not self._node else {}),
            "tensor_parallel": self._launch.num_ranks,
            "whole_on_every_rank": self._whole,
            "token_shuffle": self._shuffle.status() if self._shuffle else {},
            "shared_labels": self._tap.shared_labels if self._tap else [],
        }

    def phases(self) -> dict[str, Any]:
        """Running totals of steps and of where their time went, in nanoseconds, between two steps.

        `laps` add up to all time that the engine was not idle; `kernels` and `experts` are parts
        of it.

        Raises:
            ClusterError: the engine has stopped.
        """
        result: dict[str, Any] = {}
        assert self._engine is not None, "phases before start returned"
        self._engine.between_steps(lambda: result.update(self._phases()))
        return result

    def take_sketch(self) -> bytes:
        """What was routed since the last call (`comm/sketch.py`), encoded; empty: nothing."""
        return self._tap.take_sketch(host_label()) if self._tap else b""

    def start_recording(self, tokens_max: int, name: str) -> TraceHeader:
        """Record the routing of the next `tokens_max` tokens, for `take_recorded` by that name; in
        place of what was being recorded."""
        assert self._rank is not None and self._tap is not None, "before start returned"
        header = header_of(self._launch, self._rank.model.spec)
        self._tap.record(TraceRecorder(header, tokens_max, name))
        return header

    def take_recorded(self, name: str) -> Recorded:
        """What was recorded since the last call. Raises ClusterError: nothing is, by that name."""
        assert self._tap is not None, "take_recorded before start returned"
        return self._tap.take_recorded(name)

    def stop_recording(self, name: str) -> None:
        """Record no more by that name; what nobody took is gone."""
        if self._tap is not None:
            self._tap.stop_recording(name)

    def stop(self) -> None:
        """Leave after the step in flight and close every socket; returns when it is done."""
        self._stopping = True
        if self._errands is not None:
            self._errands.close()
        if self._engine is not None:  # else `_serve` sees that it is not wanted any more
            self._engine.stop()
        self._thread.join()

    # -- the rank's own thread ----------------------------------------------------------------

    def _prepare(self) -> Callable[[], None]:
        """Load and listen; returns the loop."""
        launch = self._launch
        take_threads(launch.num_threads)
        self._hardware = self._given or Hardware.of(launch.device)
        spec, dtype = look_at(launch, self._known.spec)
        self._dtype = str(dtype).removeprefix("torch.")
        self._leader = self._lead()
        form = self._leader.settle_form(launch, spec, dtype) if self._leader else "none"
        model = load_dense(
            launch,
            spec,
            dtype,
            device=self._hardware.device,
            leader=self._leader,
            slice_rows=form == "speculative",
            progress=self._note_progress,
            known=self._known,
        )
        if self._leader is not None:
            self._shuffle = self._leader.token_shuffle(form, model)
        self._progress = Progress(phase="compiling", bytes_done=1, bytes_total=1)
        self._executor = self._make_executor(model)
        self._peers = PeerSet(
            token=launch.token,
            self_host=host_label(),
            name=launch.uid,
            limits=peer_limits(model, launch),
        )
        if launch.nccl is not None:
            self._node = NcclNode(launch, self._hardware, model, self._wake)
        node = self._node
        self._views = node.views if node else ViewInbox(self._peers.greet, launch.hold_s)
        rank = self._rank = self._make_rank(model, self._executor, self._views)
        self._tap = rank.tap = tap_of(spec)
        self._meter = TrafficMeter(spec.top_k)
        self._state = DenseState(limits_of(model, launch))
        self._engine = DenseEngine(
            state=self._state,
            rank=rank,
            executor=self._executor,
            connect=self._connect,
            traffic=self._traffic,
        )
        self._server = FrameServer(
            host_ip=launch.bind_ip,
            token=launch.token,
            on_frame=self._on_frame,
            on_lost=self._on_lost,
            unix=launch.use_unix,
            incarnation=launch.incarnation,
            advertise_ip=advertised_ip(launch.bind_ip),
        )
        self._server.start(f"remora-{launch.uid}-server")
        self._progress = Progress(phase="ready", bytes_done=1, bytes_total=1)
        logger.info("%s holds %d bytes of dense weights", launch.uid, model.nbytes)
        return self._serve

    def _lead(self) -> Leader | None:
        """Meet the other ranks, if there are any."""
        if self._launch.num_ranks == 1:
            return None
        assert self._listener is not None
        ranks = gather_ranks(self._listener, self._launch, self._hardware)
        return Leader(self._launch.uid, ranks, self._launch.exchange_timeout_s)

    @property
    def _wish(self) -> Wish:
        """Layers are compiled for the CPU only."""
        return self._launch.executor if self._hardware.device == CPU else "eager"

    def _make_executor(self, model: DenseModel) -> Executor:
        launch = self._launch
        if self._leader is None:
            return Executor(model, wish=self._wish, exact=launch.exact)
        assert model.part is not None
        self._whole = whole_text(model.part.plan)
        logger.info("%s has %d ranks; %s", launch.uid, launch.num_ranks, self._whole)
        return LeaderExecutor(
            model,
            self._leader,
            wish=self._wish,
            exact=launch.exact,
            timeout_s=launch.start_timeout_s,
        )

    def _make_rank(self, model: DenseModel, executor: Executor, views: ViewInbox) -> DenseRank:
        pages = allocate_pages(model, self._launch.num_kv_blocks)
        exact = self._launch.exact
        if self._leader is None or self._shuffle is None:
            step = self._node.source.step if self._node else None
            return DenseRank(model=model, pages=pages, experts=no_view, exact=exact, step=step)
        return LeaderRank(
            leader=self._leader,
            executor=executor,
            model=model,
            pages=pages,
            experts=no_view,
            exact=exact,
            shuffle=self._shuffle,
            hold=GroupHold(views, self._leader, lambda: self._dispatcher, self._connect).wait,
        )

    def _serve(self) -> None:
        assert self._engine and self._server and self._peers
        try:
            if self._stopping:
                self._engine.stop()
            self._engine.run()
        finally:
            if self._node is not None:
                self._node.close()
            self._server.close()
            self._peers.close()
            if self._tap is not None:
                self._tap.close()
            if self._leader is not None:
                self._leader.close()

    def _connect(self, view: View, or_none: bool) -> None:
        rank, views = self._rank, self._views
        assert self._peers and rank and self._tap is not None, "a view before the rank"
        if self._node is not None:
            self._node.adopt(view)
            return
        if self._leader is not None:
            self._leader.adopt(view, or_none)
            views = None  # a group takes another one, and waits for it, between two steps
        self._dispatcher = connect_shards(
            self._peers, view, self._launch, self._dispatcher, views, or_none
        )
        rank.experts = on_host(self._dispatcher.moe, rank.model)
        if self._leader is not None and self._shuffle is not None:
            self._shuffle.adopt(view, self._leader.hosts)
            rank.experts = SplitExperts(rank.experts, self._leader.group, self._shuffle)
        elif self._leader is None and rank.model.device == CPU:
            rank.direct = self._dispatcher.step_experts
        rank.experts = self._tap.watch(rank.experts)

    def _traffic(self) -> Traffic | None:  # in the engine's thread
        if self._dispatcher is None or self._meter is None or self._peers is None:
            return None
        return traffic_of(self._meter, self._dispatcher.view, self._peers)

    def _on_frame(self, connection: Connection, frame: Frame) -> None:
        """In the server's thread: the conductor's are the node's, the others ingresses'."""
        assert self._engine is not None
        if self._node is None or not self._node.stream.takes(connection, frame):
            self._engine.on_frame(connection, frame)

    def _on_lost(self, connection: Connection) -> None:
        assert self._engine is not None
        if self._node is not None:
            self._node.stream.on_lost(connection)
        self._engine.on_lost(connection)

    def _wake(self) -> None:
        assert self._engine is not None and self._node is not None  # its conductor has sent
        self._engine.run_soon(self._node.source.attend)

    def _phases(self) -> dict[str, Any]:
        assert self._state is not None and self._rank is not None
        return {
            "steps": self._state.stats().steps_total,
            "executor": self._executor.name if self._executor else "eager",
            "laps": dict(self._rank.laps.spent_ns),
            "kernels": phases.snapshot(),
            "experts": self._dispatcher.phases() if self._dispatcher else {},
            "token_shuffle": self._shuffle.status() if self._shuffle else {},
        }

    def _note_progress(self, done: int, total: int) -> None:
        self._progress = Progress(phase="loading", bytes_done=done, bytes_total=total)
