"""The real data plane without Ray: shards and dense ranks as threads of this process.

Actors, sockets, handshakes, state machines and kernels are the product's own; only Ray's part
(who starts which process where) is left out. `tests/live` covers that part.
"""

import asyncio
import contextlib
import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from support.fake_nccl import CpuDevice, FakeNccl, World
from support.tp_engine import together

from remora.actors.dense_actor import DenseActor
from remora.actors.dense_launch import DenseLaunch
from remora.actors.expert_actor import ExpertActor
from remora.actors.hardware import Hardware
from remora.actors.launch import NcclLaunch, ShardLaunch
from remora.actors.model_spec import inspect_model
from remora.actors.tp_actor import RankActor
from remora.comm.aio import AsyncConnection, connect_async
from remora.comm.messages import (
    Ping,
    Pong,
    SamplingParams,
    SequenceOutput,
    StepOutputs,
    Submit,
    decode_to_ingress,
    encode,
)
from remora.comm.view import Member, Placement, View, contiguous_placement
from remora.kernels.device import CPU, INTERPRETED_GPU
from remora.kernels.experts_dtype import ExpertsDtype

TOKEN = b"a token for the tests, 32 bytes."
LIMITS: dict[str, Any] = dict(
    executor="eager",
    num_kv_blocks=256,
    max_num_seqs=64,
    max_tokens_per_step=512,
    max_model_len=256,
    max_waiting=1024,
    prefix_caching=True,
    call_timeout_s=30.0,
)


def pretended_gpu(world: World, name: str, device: torch.device = CPU) -> Hardware:
    """A process of a fake NCCL; `device` computes."""
    nccl = FakeNccl(world, name)
    return Hardware(device=device, nccl_device=CpuDevice(nccl), nccl=lambda: nccl)


@dataclass(frozen=True)
class Ask:
    """One request of a test."""

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    priority: int = 0


@dataclass
class Answer:
    """Everything that came back for one request."""

    token_ids: list[int] = field(default_factory=list)
    outputs: list[SequenceOutput] = field(default_factory=list)

    @property
    def finish_reason(self) -> str | None:
        return self.outputs[-1].finish_reason if self.outputs else None


class LocalCluster:
    """`num_shards` shards of one checkpoint that any number of dense ranks may use."""

    def __init__(
        self,
        model: Path,
        *,
        num_shards: int,
        dtype: str,
        exact: bool,
        world: World | None = None,
        slots: int | None = None,
        num_slots: int | None = None,
        experts_dtype: ExpertsDtype = "auto",
        num_copies: int = 0,
    ) -> None:
        """With `world`, rows travel over its NCCL between pretended GPUs (Triton interpreted).

        Args:
            slots: of a shard in a layer, for replicas; None: one copy of every expert.
            num_slots: that a shard has room for; None: as many as it is given experts.
            num_copies: second copies of a layer that a shard has room for.
        """
        self.spec = inspect_model(model)
        self.world = world
        self.processes: dict[str, Any] = {}  # of the fake NCCL
        nccl = NcclLaunch(capacity_max=8, step_timeout_s=20.0) if world else None
        self._common = dict(
            deployment="test",
            incarnation=1,
            model=str(model),
            dtype=dtype,
            exact=exact,
            token=TOKEN,
            num_threads=1,
            nccl=nccl,
            device="cuda" if world else "cpu",
        )
        uids = tuple(f"shard-{i}" for i in range(num_shards))
        placement = contiguous_placement(
            num_experts=self.spec.num_experts,
            moe_layers=self.spec.moe_layers,
            shard_uids=uids,
            slots=slots,
        )
        self._of_shards: dict[str, Any] = dict(
            num_slots=num_slots, num_copies=num_copies, experts_dtype=experts_dtype
        )
        self.shards = [
            ExpertActor(self.shard_launch(uid, placement), self._gpu(uid)) for uid in uids
        ]
        members = tuple(shard.start() for shard in self.shards)
        self.view = View(epoch=1, members=members, placement=placement)

    def shard_launch(self, uid: str, placement: Placement, **more: Any) -> ShardLaunch:
        """What shard `uid` is told, to hold what `placement` says."""
        return ShardLaunch(
            uid=uid,
            experts_by_layer=dict(zip(placement.moe_layers, placement.slots[uid], strict=True)),
            **(self._common | self._of_shards | more),
        )

    def launch(self, **limits: Any) -> DenseLaunch:
        """What a dense rank over the shards is told."""
        return DenseLaunch(**({"uid": "dense-0"} | self._common | LIMITS | limits))

    @contextlib.contextmanager
    def dense(
        self, *, num_ranks: int = 1, world: World | None = None, uid: str = "dense-0", **limits: Any
    ) -> Iterator["DenseClient"]:
        """A dense group over the shards, ready to be asked; its ranks are threads too.

        Args:
            world: ranks exchange over this NCCL and compute on the CPU.
        """
        launches = [
            msgspec.structs.replace(
                self.launch(**limits),
                uid=f"{uid}.{rank}" if rank else uid,
                rank=rank,
                num_ranks=num_ranks,
                device="cpu" if world is None else "cuda",
            )
            for rank in range(num_ranks)
        ]
        hardware = [pretended_gpu(world, launch.uid) if world else None for launch in launches]
        actor = DenseActor(launches[0], hardware[0])
        others = [
            RankActor(launch, own) for launch, own in zip(launches[1:], hardware[1:], strict=True)
        ]
        starts = [functools.partial(other.start, actor.listen()) for other in others]
        member, *_ = together([actor.start, *starts])
        try:
            actor.adopt_view(self.view)
            yield DenseClient(actor, member, others)
        finally:
            actor.stop()
            for other in others:
                other.stop()

    @contextlib.contextmanager
    def dense_over_nccl(self, *uids: str, **limits: Any) -> Iterator[list["DenseClient"]]:
        """Dense ranks in one communicator with the shards, ready to be asked."""
        actors = [self.more_dense(uid, **limits) for uid in uids]
        members = [actor.start() for actor in actors]
        view = msgspec.structs.replace(self.view, members=(*members, *self.view.members))
        try:
            together([functools.partial(actor.adopt_view, view) for actor in actors])
            yield [DenseClient(a, member) for a, member in zip(actors, members, strict=True)]
        finally:
            for actor in actors:
                actor.stop()

    def more_dense(self, uid: str, **limits: Any) -> DenseActor:
        """A dense rank of the communicator, not started."""
        return DenseActor(self.launch(uid=uid, **limits), self._gpu(uid))

    def _gpu(self, uid: str) -> Hardware | None:
        if self.world is None:
            return None
        hardware = pretended_gpu(self.world, uid, INTERPRETED_GPU)
        self.processes[uid] = hardware.nccl()
        return hardware

    def close(self) -> None:
        for shard in self.shards:
            shard.stop()


class DenseClient:
    """Asks one dense rank over its socket, as an ingress does."""

    def __init__(self, actor: DenseActor, member: Member, others: Sequence[RankActor] = ()) -> None:
        self.actor = actor
        self.others = others  # ranks beside the first
        self.member = member

    def ask(self, asks: Sequence[Ask]) -> list[Answer]:
        """All of `asks` at once; their answers in order."""
        return asyncio.run(self._ask(asks))

    def wait_until_held(self) -> None:
        """Until a step waits for an expert that has no replica."""
        until_s = time.monotonic() + 60.0
        while not (self.actor._views and self.actor._views.is_holding):
            assert time.monotonic() < until_s, "no step is held"
            time.sleep(0.005)

    def pong(self) -> Pong:
        """What it answers to a ping."""

        async def ask() -> Pong:
            endpoint = self.member.endpoint
            connection = await connect_async(endpoint, TOKEN, endpoint.host, name="test")
            connection.send(encode(Ping(1)))
            async for payload in connection:
                message = decode_to_ingress(payload)
                break
            await connection.close()
            assert isinstance(message, Pong)
            return message

        return asyncio.run(ask())

    async def _ask(self, asks: Sequence[Ask]) -> list[Answer]:
        connection = await connect_async(
            self.member.endpoint, TOKEN, self.member.endpoint.host, name="test"
        )
        try:
            return await self._ask_over(connection, asks)
        finally:
            await connection.close()

    async def _ask_over(self, connection: AsyncConnection, asks: Sequence[Ask]) -> list[Answer]:
        answers = {f"request-{i}": Answer() for i in range(len(asks))}
        for request_id, ask in zip(answers, asks, strict=True):
            submit = Submit(
                request_id=request_id,
                prompt_ids=list(ask.prompt_ids),
                params=ask.params,
                priority=ask.priority,
            )
            connection.send(encode(submit))
        waiting = set(answers)
        async for payload in connection:
            message = decode_to_ingress(payload)
            assert isinstance(message, StepOutputs)
            for output in message.outputs:
                answer = answers[output.request_id]
                answer.token_ids += output.token_ids
                answer.outputs.append(output)
                if output.finish_reason is not None:
                    waiting.remove(output.request_id)
            if not waiting:
                break
        return list(answers.values())
