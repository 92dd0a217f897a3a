"""The process of one expert shard: loads its slots, then answers dispatches from its own thread.

Ray's threads only start, ask and stop it. Loading, torch and the socket loop live in one thread of
ours, so no call of Ray's event loop ever stands between a request and its rows, and torch is called
from one thread. Order among waiting calls (few rows first) is the frame server's.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from remora.actors.actor_thread import ActorThread
from remora.actors.draft import Known
from remora.actors.expert_copies import CopyGiver
from remora.actors.hardware import Hardware
from remora.actors.launch import (
    CopyOrder,
    NcclLaunch,
    Progress,
    ShardLaunch,
    advertised_ip,
    host_label,
    member_of,
    take_threads,
)
from remora.actors.model_spec import inspect_model, resolve_dtype
from remora.actors.nccl_stream import ConductorStream
from remora.actors.shard_build import build_shard
from remora.actors.shard_facts import ShardFacts
from remora.actors.shard_model import ShardExperts
from remora.actors.shard_slots import ShardSlots
from remora.actors.thread_policy import let_senders_finish, run_idle
from remora.comm.arena import DTYPE_CODES
from remora.comm.connection import Connection, Frame
from remora.comm.errors import FrameError
from remora.comm.expert_protocol import ExpertCall, ExpertService, NotMineError
from remora.comm.native_pump import NativeCompute, NativePump
from remora.comm.server import FrameServer
from remora.comm.view import Member
from remora.kernels.fingerprint import kernel_fingerprint
from remora.kernels.native import start_team

if TYPE_CHECKING:
    from remora.actors.nccl_expert import NcclShard

logger = logging.getLogger(__name__)


class ExpertActor:
    """One expert shard; `shard_process` is the actor class around it."""

    def __init__(
        self, launch: ShardLaunch, hardware: Hardware | None = None, known: Known | None = None
    ) -> None:
        self._launch, self._known = launch, known or Known()
        self._given = hardware
        self._nccl: NcclShard | None = None
        self._stream: ConductorStream | None = None
        self._progress = Progress(phase="starting")
        self._server: FrameServer | None = None
        self._shard: ShardExperts | None = None
        self._pump: NativePump | None = None
        self._calls_served = 0  # by Python; the pump counts its own
        self._compute_s = 0.0
        self._stopping = False
        self._slots: ShardSlots | None = None
        self._copies: CopyGiver | None = None
        self._fenced: frozenset[str] = frozenset()
        self._thread = ActorThread(f"remora-{launch.uid}", self._prepare)

    def start(self) -> Member:
        """Load, listen, and say where. Returns when the shard can serve.

        Raises:
            WeightsError, UnsupportedModelError, ConfigError: as loading found them.
            OSError: the address cannot be bound.
        """
        self._thread.start()
        return self._member()

    def join(self, order: CopyOrder | None = None) -> ShardFacts:
        """`start`, take experts in (`load_experts`), and `facts`."""
        member = self.start()
        if order is not None:
            self.load_experts(order)
        return self._facts(member)

    def facts(self) -> ShardFacts:
        """What it holds, and has room for; only after `start`."""
        return self._facts(self._member())

    def progress(self) -> Progress:
        """How far loading has come."""
        return self._progress

    def load_experts(self, order: CopyOrder) -> dict[tuple[int, int], str]:
        """As `ShardSlots.load`."""
        return self._changing().load(order)

    def hold_copies(self, order: CopyOrder) -> dict[tuple[int, int], str]:
        """As `ShardSlots.hold_copies`."""
        return self._changing().hold_copies(order)

    def set_copy_share(self, share: float) -> None:
        """Of the machine that taking experts in may take, from now on. Nothing before it serves."""
        if self._slots is not None:
            self._slots.pace.set_share(share)

    def canary(self, pairs: Sequence[tuple[int, int]]) -> tuple[str, dict[tuple[int, int], str]]:
        """What the last bits depend on, and `ShardSlots.canary`."""
        kernels = f"exact={self._launch.exact} {kernel_fingerprint()}"
        return kernels, self._changing().canary(pairs)

    def keep_experts(self, experts: Mapping[int, Sequence[int]], term: int = 0) -> dict[int, int]:
        """As `ShardSlots.keep`; the room that there is in each MoE layer."""
        self._changing().keep(experts, term)
        return self.facts().room

    def fence(self, names: Sequence[str], term: int = 0) -> None:
        """Refuse dense ranks of these names, and no others, until told otherwise.

        Raises:
            ClusterError: another coordinator than that of this `term` has taken over.
        """
        server, shard, fenced = self._server, self._shard, frozenset(names)
        assert server is not None and shard is not None, "fence before start returned"

        def obey() -> None:
            shard.state.obey(term)
            self._fenced = fenced
            if self._nccl is None:  # else no row comes without the conductor's ticket
                server.fence(fenced)

        self._changing().between_calls(obey)

    def heartbeat(self) -> tuple[int, int]:
        """Answered by the thread that serves, between two calls (over NCCL also while it waits for
        others in a ticket): that it is, is the progress. Calls served, and nothing that waits."""
        if self._nccl is not None:
            return self._nccl.member.come_round()
        self._changing().between_calls(lambda: None)
        self._changing().mind_memory()
        return self._calls_served, 0

    def until_end(self) -> None:
        """Returns when the shard serves no more."""
        self._thread.wait_until_end()

    def held_bytes(self) -> tuple[int, int]:
        """Of one slot of every MoE layer, and of all second copies; 0 before it has loaded."""
        shard = self._shard
        if shard is None:
            return 0, 0
        return sum(shard.nbytes_of(layer) for layer in shard.state.layers), shard.copies_nbytes

    def status(self) -> dict[str, Any]:
        """What `remora status` shows of this shard."""
        shard, pump, launch, slots = self._shard, self._pump, self._launch, self._slots
        return {
            "alive": self._thread.is_alive,
            "phase": self._progress.phase,
            "incarnation": launch.incarnation,
            "weights_bytes": shard.nbytes if shard else 0,
            "experts_per_layer": [len(shard.state.experts_of(i)) for i in launch.experts_by_layer]
            if shard
            else [],
            "fenced": sorted(self._fenced),
            "slots_per_layer": launch.num_slots,
            "calls_served": self._calls_served + (pump.calls_served if pump else 0),
            "compute_s": self._compute_s + (pump.compute_s if pump else 0.0),
            "experts_copied": slots.num_copied if slots else 0,
            "experts_loaded": slots.num_loaded if slots else 0,
            "experts_adopted": slots.num_adopted if slots else 0,
            "second_copies": len(shard.state.copies) if shard else 0,
            "second_copies_bytes": shard.copies_nbytes if shard else 0,
            "copy_bytes_given": self._copies.service.bytes_sent if self._copies else 0,
            "tickets": self._nccl.tickets_total if self._nccl else 0,
            "peers": len(self._server.connections) if self._server else 0,
        }

    def stop(self) -> None:
        """Stop answering and close every socket; returns when the thread has ended."""
        self._stopping = True
        if self._nccl is not None:
            self._nccl.close()
        elif self._server is not None:  # else `_serve` sees that it is not wanted any more
            self._server.stop()
        self._thread.join()
        if self._copies is not None:
            self._copies.close()

    def _member(self) -> Member:
        assert self._server is not None, "asked before start returned"
        return member_of(self._launch, "shard", self._server.endpoint(host_label()))

    def _facts(self, member: Member) -> ShardFacts:
        shard = self._shard
        assert shard is not None, "asked before start returned"
        room = {layer: shard.state.room(layer) for layer in shard.spec.moe_layers}
        copies = self._copies.endpoint if self._copies is not None else None
        return ShardFacts(
            member=member,
            manifest=shard.manifest,
            room=room,
            copies=copies,
        )

    def _changing(self) -> ShardSlots:
        assert self._slots is not None, "asked before start returned"
        return self._slots

    # -- the shard's own thread ---------------------------------------------------------------

    def _prepare(self) -> Callable[[], None]:
        """Load and listen; returns the loop."""
        launch = self._launch
        take_threads(launch.num_threads)
        if launch.nccl is None:
            let_senders_finish(launch.uid)
        start_team()
        self._hardware = self._given or Hardware.of(launch.device)
        shard = self._shard = (
            run_idle("remora-load", self._load) if launch.load_idle else self._load()
        )
        if launch.nccl is not None:
            return self._prepare_nccl(shard, launch.nccl)
        service = ExpertService(
            self._compute, incarnation=launch.incarnation, native=_native_compute(shard)
        )
        self._pump = service.pump
        self._server = FrameServer(
            host_ip=launch.bind_ip,
            token=launch.token,
            on_frame=service.on_frame,
            unix=launch.use_unix,
            incarnation=launch.incarnation,
            pump=service.pump,
            advertise_ip=advertised_ip(launch.bind_ip),
        )
        self._slots = ShardSlots(shard, self._server.call_soon, launch)
        if launch.device == "cpu":
            self._copies = CopyGiver(shard, launch)
        self._progress = Progress(phase="ready", bytes_done=1, bytes_total=1)
        logger.info("%s holds %d bytes of experts", launch.uid, shard.nbytes)
        return self._serve

    def _load(self) -> ShardExperts:
        launch = self._launch
        take_threads(launch.num_threads)
        spec = self._known.spec or inspect_model(launch.model)
        return build_shard(
            launch.model,
            spec,
            launch.experts_by_layer,
            dtype=resolve_dtype(spec, launch.dtype),
            exact=launch.exact,
            experts_dtype=launch.experts_dtype,
            num_slots=launch.num_slots,
            num_copies=launch.num_copies,
            progress=self._note_progress,
            device=self._hardware.device,
            draft=self._known.take_draft(),
        )

    def _prepare_nccl(self, shard: ShardExperts, nccl: NcclLaunch) -> Callable[[], None]:
        """The same where rows come over NCCL: sockets carry the conductor's messages only."""
        from remora.actors.nccl_expert import NcclShard  # numba: 0.3 s of a shard's start

        launch = self._launch
        node = self._nccl = NcclShard(
            self._hardware,
            uid=launch.uid,
            incarnation=launch.incarnation,
            shard=shard,
            presummed=not launch.exact,
            launch=nccl,
            reply=lambda message: stream.reply(message),
        )
        stream = ConductorStream(launch.uid, node.take, node.member.lose_conductor)
        self._stream = stream
        self._server = FrameServer(
            host_ip=launch.bind_ip,
            token=launch.token,
            on_frame=self._on_control,
            on_lost=self._stream.on_lost,
            unix=launch.use_unix,
            incarnation=launch.incarnation,
            advertise_ip=advertised_ip(launch.bind_ip),
        )
        self._slots = ShardSlots(shard, node.member.call_soon, launch)
        self._server.start(f"remora-{launch.uid}-server")
        self._progress = Progress(phase="ready", bytes_done=1, bytes_total=1)
        logger.info("%s holds %d bytes of experts", launch.uid, shard.nbytes)
        return self._serve_nccl

    def _on_control(self, connection: Connection, frame: Frame) -> None:
        assert self._stream is not None
        if not self._stream.takes(connection, frame):
            raise FrameError(f"{self._launch.uid} takes rows over NCCL, not over sockets")

    def _serve_nccl(self) -> None:
        assert self._server is not None and self._nccl is not None
        try:
            if not self._stopping:
                self._nccl.serve()
        finally:
            self._server.close()

    def _serve(self) -> None:
        assert self._server is not None
        if self._stopping:
            self._server.stop()
        self._server.run()

    def _note_progress(self, done: int, total: int) -> None:
        self._progress = Progress(phase="loading", bytes_done=done, bytes_total=total)

    def _compute(self, call: ExpertCall) -> torch.Tensor:
        """Answer one dispatch.

        Raises:
            NotMineError: for experts that are held elsewhere; the requester looks again.
        """
        shard = self._shard
        assert shard is not None
        started = time.perf_counter()
        missing = shard.state.not_mine(call.layer, call.pair_expert_P.tolist())
        if missing:
            raise NotMineError(missing)
        rows = shard.forward(
            call.layer,
            call.rows_ND,
            call.pair_row_P,
            call.pair_expert_P,
            call.pair_weight_P,
            "presummed" if call.presummed else "ordered",
        )
        self._calls_served += 1
        self._compute_s += time.perf_counter() - started
        return rows


def _native_compute(shard: ShardExperts) -> NativeCompute | None:
    """The shard's kernel for the native loop; it refuses layers that only Python computes."""
    if shard.native is None:
        return None
    dtype = DTYPE_CODES[shard.dtype]
    return NativeCompute(shard.native.entry, shard.native.handle, shard.spec.hidden_size, dtype)
