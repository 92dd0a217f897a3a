"""A tensor-parallel dense group whose ranks are threads of this process, over shards of it.

Rank 0 is driven as `LocalEngine` is; the others repeat its steps. Shared memory, collectives, the
plan and the loading of parts are the product's own.
"""

import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support.fake_nccl import CpuDevice, FakeNccl, World
from support.local_engine import LocalEngine
from torch import Tensor
from torch import distributed as dist

from remora.actors.dense_model import build_dense
from remora.actors.step_context import ExpertsFn
from remora.actors.tp_experts import SplitExperts
from remora.actors.tp_shuffle import token_shuffle
from remora.comm.arena import Memory
from remora.comm.collectives import GlooGroup, SharedGroup
from remora.comm.nccl_group import NcclGroup
from remora.comm.shuffle import Form, copy_prices
from remora.kernels.native import native_available

CAPACITY = 1 << 14  # small, so that larger tensors go in pieces
DEADLINE_S = 20.0


def groups_of(size: int) -> list[Any]:
    """The ends of one group, for `size` threads: what serves on one host of this machine."""
    return shared_groups(size) if native_available() else gloo_groups(size)


def gloo_groups(size: int, *, deadline_s: float = DEADLINE_S) -> list[GlooGroup]:
    """The ends of one group over gloo's connections, for `size` threads."""
    make = functools.partial(
        GlooGroup, dist.HashStore(), size=size, ip="127.0.0.1", deadline_s=deadline_s
    )
    return together([functools.partial(make, rank=rank) for rank in range(size)])


def nccl_groups(
    size: int, *, deadline_s: float = DEADLINE_S, reasons: list[str] | None = None
) -> list[NcclGroup]:
    """The ends of one group over the fake NCCL, for `size` threads that can tell each other.

    Args:
        reasons: what a rank tells the others goes there, and they look there.
    """
    world = World()
    reasons = [] if reasons is None else reasons

    def make(rank: int) -> NcclGroup:
        nccl = FakeNccl(world, f"rank-{rank}")
        return NcclGroup(
            nccl, CpuDevice(nccl), rank=rank, size=size, name="dense-0", deadline_s=deadline_s,
            watch=lambda: next(iter(reasons), None), tell=reasons.append,
        )  # fmt: skip

    groups = [make(rank) for rank in range(size)]
    meet_over_nccl(groups)
    return groups


def meet_over_nccl(groups: list[NcclGroup]) -> None:
    """All connect with an id of the first."""
    unique_id = groups[0].make_id()
    together([functools.partial(group.connect, unique_id) for group in groups])


def shared_groups(
    size: int, *, capacity: int = CAPACITY, deadline_s: float = DEADLINE_S
) -> list[SharedGroup]:
    """The ends of one group over shared memory, for `size` threads."""
    memory = Memory.anonymous(SharedGroup.bytes_needed(size, capacity))
    return [
        SharedGroup(memory, rank=rank, size=size, capacity=capacity, deadline_s=deadline_s)
        for rank in range(size)
    ]


def together(functions: Sequence[Callable[[], Any]]) -> list[Any]:
    """Runs every function in a thread of its own; their results, or the first failure.

    Each computes with one thread: teams of ranks that wait for each other would take turns.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _together(functions)
    finally:
        torch.set_num_threads(num_threads)


def _together(functions: Sequence[Callable[[], Any]]) -> list[Any]:
    results: list[Any] = [None] * len(functions)
    failures: list[BaseException] = []

    def run(index: int) -> None:
        try:
            results[index] = functions[index]()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return results


class _OneAtATime:
    """Shards that several ranks ask: a shard computes in one thread."""

    def __init__(self, experts: ExpertsFn) -> None:
        self._experts = experts
        self._lock = threading.Lock()

    def __call__(self, *args: Any) -> Tensor:
        with self._lock:
            return self._experts(*args)


@dataclass(slots=True)
class TpEngine(LocalEngine):
    """As `LocalEngine`: rank 0, and the other ranks that do the same steps."""

    others: list[LocalEngine] = field(default_factory=list)

    @classmethod
    def load_ranks(
        cls,
        path: Path,
        whole: LocalEngine,
        size: int,
        form: Form = "none",
        groups: list[Any] | None = None,
    ) -> "TpEngine":
        """The model of `whole` on `size` ranks, over the same shards.

        Its ranks are near experts by turns: rank r those whose number is r modulo the ranks.
        """
        shards = _OneAtATime(whole.experts)
        engines: list[tuple[Any, ...]] = []
        shuffles = []
        for group in groups or groups_of(size):
            part = build_dense(
                path,
                whole.spec,
                dtype=whole.dense.dtype,
                exact=whole.exact,
                group=group,
                slice_rows=form == "speculative",
            )
            shuffle = token_shuffle(form, group, whole.spec, part.sliced)
            hosts = [f"host-{rank}" for rank in range(size)]
            table = (np.arange(whole.spec.num_experts) % size).astype(np.int16)[:, None]
            tables = dict.fromkeys(whole.spec.moe_layers, table)
            shuffle.set_prices(copy_prices(hosts, hosts), tables)
            shuffles.append(shuffle)
            engines.append((part.spec, part, SplitExperts(shards, group, shuffle), whole.exact))
        first, *others = engines
        made = cls(*first, others=[LocalEngine(*other) for other in others])
        for engine, shuffle in zip((made, *made.others), shuffles, strict=True):
            engine.shuffle = shuffle
        return made

    def reset(self, num_sequences: int, num_tokens: int) -> None:
        """See `LocalEngine`."""
        LocalEngine.reset(self, num_sequences, num_tokens)
        for engine in self.others:
            engine.reset(num_sequences, num_tokens)

    def step(self, parts: Sequence[tuple[int, int, Sequence[int]]]) -> Tensor:
        """See `LocalEngine`."""
        own = functools.partial(LocalEngine.step, self)
        steps = [own, *(engine.step for engine in self.others)]
        logits: Tensor = together([functools.partial(step, parts) for step in steps])[0]
        return logits

    def close(self) -> None:
        """Let go of the groups."""
        for engine in (self, *self.others):
            if engine.dense.part is not None:
                engine.dense.part.group.close()
