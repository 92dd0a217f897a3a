"""The process of a rank other than 0 of a tensor-parallel dense group: loads its part, and follows.

It has no scheduler and listens to no ingress: rank 0 sends it every step (`rank_link.Order`) and
everything else that changes. Its loop ends with the connection to rank 0.
"""

import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from remora.actors.actor_thread import ActorThread
from remora.actors.collector import objects_that_stay
from remora.actors.dense_launch import DenseLaunch
from remora.actors.dense_model import DenseModel, build_dense
from remora.actors.dense_rank import allocate_pages
from remora.actors.executor import use_cache
from remora.actors.hardware import Hardware
from remora.actors.host_experts import on_host
from remora.actors.launch import Progress, host_label, take_threads
from remora.actors.model_spec import inspect_model, resolve_dtype
from remora.actors.process_log import keep_log
from remora.actors.shard_links import connect_shards, peer_limits
from remora.actors.step_context import ExpertsFn, StepContext
from remora.actors.tp_experts import SplitExperts
from remora.actors.tp_group import join_ranks
from remora.actors.tp_shuffle import TokenShuffle, token_shuffle
from remora.actors.warm import compile_and_warm, warm_up
from remora.comm.collectives import GlooGroup, SharedGroup
from remora.comm.dispatch import Dispatcher
from remora.comm.errors import ClusterError, FrameError, PeerLostError
from remora.comm.nccl_group import NcclGroup
from remora.comm.peers import PeerSet
from remora.comm.rank_link import (
    Adopt,
    Compile,
    Done,
    Link,
    Loads,
    Look,
    Order,
    Pairs,
    Recover,
    Sent,
    Shuffle,
    TakeSent,
    UseEager,
)
from remora.comm.view import Endpoint, View
from remora.kernels.attention import KVPages, build_plan

if TYPE_CHECKING:
    from remora.kernels.gpu_pages import GpuKVPages

logger = logging.getLogger(__name__)


class Follower:
    """Does what rank 0 says, in one thread. `run` returns when rank 0 has gone."""

    def __init__(
        self,
        *,
        model: DenseModel,
        pages: list["KVPages | GpuKVPages"],
        group: SharedGroup | GlooGroup | NcclGroup,
        link: Link,
        connect: Callable[[View, bool], ExpertsFn],
        dispatcher: Callable[[], Dispatcher | None],
        exact: bool,
        shuffle: TokenShuffle,
    ) -> None:
        self._model = model
        self._shuffle = shuffle
        self._pages = pages
        self._group = group
        self._link = link
        self._connect = connect
        self._dispatcher = dispatcher
        self._exact = exact
        self._epoch = 0
        self._experts: ExpertsFn | None = None
        self._error: str | None = None  # of our own, in the last step
        self.is_compiled = False
        self.steps_total = 0

    def run(self) -> None:
        """The loop."""
        while True:
            try:
                message = self._link.receive()
            except PeerLostError as gone:
                logger.info("rank 0 is gone: %s", gone)
                return
            match message:
                case Order():
                    self._step(message)
                case Adopt():
                    self._answer(functools.partial(self._adopt, message))
                case Look():
                    self._link.send(Done(lacks_experts=self._lacks_experts(look_again=True)))
                case TakeSent():
                    self._link.send(self._sent())
                case Loads():
                    self._note_others(message)
                case Compile():
                    self._answer(self._compile)
                case UseEager():
                    self._answer(self._use_eager)
                case Recover():
                    self._recover(message)

    def _recover(self, order: Recover) -> None:
        """Meet the other ranks again; what went wrong here is the answer."""
        error, self._error = self._error, None
        self._shuffle.recover()
        if isinstance(self._group, GlooGroup):
            self._group.connect(order.generation)
        elif isinstance(self._group, NcclGroup):
            self._group.connect(order.unique_id)
        self._link.send(Done(error=error, lacks_experts=self._lacks_experts()))

    def _lacks_experts(self, *, look_again: bool = False) -> bool:
        dispatcher = self._dispatcher()
        if dispatcher is None:
            return True
        return not (dispatcher.look_again() if look_again else dispatcher.is_complete)

    def _sent(self) -> Sent:
        dispatcher = self._dispatcher()
        if dispatcher is None:
            return Sent(epoch=0)
        return Sent(epoch=dispatcher.view.epoch, pairs=Pairs.of(dispatcher.take_sent()))

    def _note_others(self, loads: Loads) -> None:
        """Others' pairs count as load, where they are of the view in force."""
        dispatcher = self._dispatcher()
        if dispatcher is None or loads.epoch != dispatcher.view.epoch:
            return
        groups_LS = loads.groups.array() if loads.groups is not None else None
        ranks_LS = loads.ranks.array() if loads.ranks is not None else None
        dispatcher.note_others(groups_LS, loads.top_k, ranks_LS)

    def _answer(self, action: Callable[[], None]) -> None:
        error = None
        try:
            action()
        except Exception as failure:  # told to rank 0, which decides
            logger.exception("what rank 0 asked for failed")
            error = str(failure)
        self._link.send(Done(error=error))

    def _step(self, order: Order) -> None:
        """Run one step. What goes wrong aborts it for every rank.

        Counted as rank 0 counts its own, when taken up: a step whose tokens anybody has seen is
        one that every rank has counted.
        """
        self.steps_total += 1
        try:
            if isinstance(self._group, SharedGroup):
                self._group.follow(order.sequence)
            self._run(order)
        except Exception as failure:
            if self._group.failure() is None:  # ours; else another rank's, which tells it
                self._error = str(failure)
                if not isinstance(failure, ClusterError):
                    logger.exception("step failed")
            self._group.abort(f"rank {self._group.rank}: {failure}")

    def _run(self, order: Order) -> None:
        if self._experts is None or order.epoch != self._epoch:
            raise ClusterError(f"a step of view {order.epoch}, adopted is {self._epoch}")
        if order.is_compiled != self.is_compiled:
            raise ClusterError(f"a step with compiled = {order.is_compiled}, not as here")
        plan = build_plan(order.starts, order.lengths, order.block_tables, order.num_rows)
        context = StepContext(
            plan=plan,
            pages=self._pages,
            experts=self._experts,
            shuffle=self._shuffle,
            exact=self._exact,
            device=self._model.device,
        )
        token_ids_T = torch.tensor(order.token_ids, dtype=torch.int64)
        self._shuffle.begin_step(token_ids_T, plan.num_tokens)
        self._model.run(context, token_ids_T, torch.tensor(order.logit_rows, dtype=torch.int64))

    def _adopt(self, message: Adopt) -> None:
        self._experts = self._connect(message.view, message.or_none)
        self._shuffle.adopt(message.view, message.rank_hosts)
        self._epoch = message.view.epoch

    def _compile(self) -> None:
        use_cache()
        compile_and_warm(self._model, exact=self._exact)
        self.is_compiled = True

    def _use_eager(self) -> None:
        self.is_compiled = False
        self._model.use_eager()
        warm_up(self._model, exact=self._exact)


class RankActor:
    """A rank other than 0. `cluster` wraps it with `ray.remote`; tests run it in their process."""

    def __init__(self, launch: DenseLaunch, hardware: Hardware | None = None) -> None:
        assert launch.rank > 0, f"rank {launch.rank} is a DenseActor"
        keep_log()
        self._launch = launch
        self._given = hardware
        self._progress = Progress(phase="starting")
        self._endpoint: Endpoint | None = None
        self._peers: PeerSet | None = None
        self._dispatcher: Dispatcher | None = None
        self._follower: Follower | None = None
        self._token_shuffle: TokenShuffle | None = None
        self._link: Link | None = None
        self._thread = ActorThread(f"remora-{launch.uid}", self._prepare)

    def start(self, rank_0: Endpoint) -> None:
        """Join rank 0, and load; returns when this rank follows.

        Raises:
            WeightsError, UnsupportedModelError, ConfigError: as loading found them.
            ClusterError: rank 0 cannot be reached.
        """
        self._endpoint = rank_0
        with objects_that_stay():
            self._thread.start()

    def until_end(self) -> None:
        """Returns when this rank follows no more."""
        self._thread.wait_until_end()

    def progress(self) -> Progress:
        """How far loading has come."""
        return self._progress

    def status(self) -> dict[str, Any]:
        """What `remora status` shows of this rank."""
        follower = self._follower
        return {
            "alive": self._thread.is_alive,
            "phase": self._progress.phase,
            "incarnation": self._launch.incarnation,
            "rank": self._launch.rank,
            "tensor_parallel": self._launch.num_ranks,
            "steps_total": follower.steps_total if follower else 0,
            "executor": "compiled" if follower and follower.is_compiled else "eager",
            **(self._peers.status() if self._peers else {"shards_connected": []}),
            "token_shuffle": self._token_shuffle.status() if self._token_shuffle else {},
        }

    def stop(self) -> None:
        """Leave; rank 0 has stopped before. Returns when it is done."""
        if self._link is not None:
            self._link.shut_down()
        self._thread.join()

    # -- the rank's own thread ----------------------------------------------------------------

    def _prepare(self) -> Callable[[], None]:
        """Join and load; returns the loop."""
        launch = self._launch
        assert self._endpoint is not None
        take_threads(launch.num_threads)
        self.hardware = self._given or Hardware.of(launch.device)
        spec = inspect_model(launch.model)
        group, self._link = join_ranks(self._endpoint, launch, self.hardware)
        form = self._link.receive(launch.start_timeout_s)
        if not isinstance(form, Shuffle):
            raise FrameError(f"rank 0 sent {type(form).__name__}, expected is Shuffle")
        model = build_dense(
            launch.model,
            spec,
            dtype=resolve_dtype(spec, launch.dtype),
            exact=launch.exact,
            max_positions=launch.max_model_len,
            progress=self._note_progress,
            group=group,
            device=self.hardware.device,
            slice_rows=form.form == "speculative",
        )
        shuffle = token_shuffle(form.form, group, spec, model.sliced, alike=form.alike)
        self._token_shuffle = shuffle
        self._peers = PeerSet(
            token=launch.token,
            self_host=host_label(),
            name=launch.uid,
            limits=peer_limits(model, launch),
        )
        self._follower = Follower(
            model=model,
            pages=allocate_pages(model, launch.num_kv_blocks),
            group=group,
            link=self._link,
            connect=lambda view, or_none: SplitExperts(
                on_host(self._connect(view, or_none), model), group, shuffle
            ),
            dispatcher=lambda: self._dispatcher,
            exact=launch.exact,
            shuffle=shuffle,
        )
        self._progress = Progress(phase="ready", bytes_done=1, bytes_total=1)
        logger.info("%s holds %d bytes of dense weights", launch.uid, model.nbytes)
        return self._serve

    def _serve(self) -> None:
        assert self._follower is not None and self._peers is not None and self._link is not None
        try:
            self._follower.run()
        finally:
            self._peers.close()
            self._link.close()

    def _connect(self, view: View, or_none: bool) -> ExpertsFn:
        assert self._peers is not None
        self._dispatcher = connect_shards(
            self._peers, view, self._launch, self._dispatcher, or_none=or_none
        )
        return self._dispatcher.moe

    def _note_progress(self, done: int, total: int) -> None:
        self._progress = Progress(phase="loading", bytes_done=done, bytes_total=total)
