"""Sums and gathers of a tensor-parallel group against plain arithmetic, whatever carries them.

NCCL is the fake one with its rules of order (`support.fake_nccl`).

Ranks are threads here, and processes where one is killed.
"""

import functools
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tp_engine import gloo_groups, nccl_groups, shared_groups, together
from torch import Tensor

from remora.comm.arena import Memory
from remora.comm.collectives import DryGroup, SharedGroup, group_sum, part_of
from remora.kernels.native import native_available

KINDS = ["shared", "gloo", "nccl"] if native_available() else ["gloo", "nccl"]
needs_native = pytest.mark.skipif(not native_available(), reason="C++ kernels not built")
CAPACITY = 192  # bytes: everything of some size goes in pieces


@functools.cache
def kept_groups(kind: str, size: int) -> list[Any]:
    """Groups that examples share, as steps of an engine do."""
    if kind == "gloo":
        return gloo_groups(size)
    if kind == "nccl":
        return nccl_groups(size)
    return shared_groups(size, capacity=CAPACITY)


def on_all(groups: list[Any], call: Callable[[Any], Any]) -> list[Any]:
    """`call` of every rank's end, at once."""
    return together([functools.partial(call, group) for group in groups])


def ordered_sum(parts: list[Tensor]) -> Tensor:
    """In float32, in the order of the ranks, rounded once."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts[0].dtype)


sizes = st.sampled_from([2, 3, 4])
dtypes = st.sampled_from([torch.float32, torch.bfloat16])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25)
@given(
    size=sizes,
    dtype=dtypes,
    rows=st.integers(0, 9),
    width=st.integers(1, 200),
    seed=st.integers(0, 99),
)
def test_a_sum_is_the_same_everywhere(
    kind: str, size: int, dtype: torch.dtype, rows: int, width: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = [
        (torch.randn((rows, width), generator=generator) * 10.0**rank).to(dtype)
        for rank in range(size)
    ]
    groups = kept_groups(kind, size)
    sums = on_all(groups, lambda g: group_sum(parts[g.rank], g.number, g.is_native))
    assert all(torch.equal(total, ordered_sum(parts)) for total in sums)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25)
@given(size=sizes, dtype=dtypes, rows=st.integers(0, 17), width=st.integers(1, 200))
def test_rows_and_columns_come_to_their_places(
    kind: str, size: int, dtype: torch.dtype, rows: int, width: int
) -> None:
    whole = torch.arange(rows * width, dtype=torch.float32).view(rows, width).to(dtype)
    groups = kept_groups(kind, size)

    def gather(group: Any) -> tuple[Tensor, Tensor]:
        mine = whole[slice(*part_of(group.rank, size, rows))]
        columns = whole[:, slice(*part_of(group.rank, size, width))]
        return group.gather_rows(mine, rows), group.gather_columns(columns, width)

    answers = on_all(groups, gather)
    assert all(torch.equal(answer, whole) for answer, _ in answers)
    assert torch.equal(answers[0][1], whole)
    assert all(answer.shape[0] == 0 for _, answer in answers[1:])


def test_parts_are_even_and_one_row_is_rank_0s() -> None:
    for size in range(1, 9):
        assert part_of(0, size, 1) == (0, 1)
        for count in range(30):
            parts = [part_of(rank, size, count) for rank in range(size)]
            assert parts[0][0] == 0 and parts[-1][1] == count
            assert all(a[1] == b[0] for a, b in itertools.pairwise(parts))
            lengths = [end - begin for begin, end in parts]
            assert max(lengths) - min(lengths) <= 1


def test_not_a_number_stays_one() -> None:
    part = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0]).bfloat16()
    sums = on_all(kept_groups(KINDS[0], 2), lambda g: g.sum(part))
    assert torch.equal(sums[0].isnan(), torch.tensor([True, False, False, False]))
    assert sums[0][1:].tolist() == [float("inf"), -float("inf"), 2.0]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "nccl"])
def test_an_abort_reaches_a_rank_that_waits(kind: str) -> None:
    groups = gloo_groups(2) if kind == "gloo" else shared_groups(2)
    failed = threading.Event()

    def fails() -> None:
        with pytest.raises(RuntimeError):
            groups[0].sum(torch.ones(3))
        failed.set()

    waiting = threading.Thread(target=fails)
    waiting.start()
    groups[1].abort("no shard answers")
    assert failed.wait(timeout=10)
    waiting.join()
    assert groups[1].failure() == "no shard answers"
    assert groups[0].failure() is not None
    for group in groups:
        group.close()


@needs_native
def test_after_an_abort_the_group_goes_on() -> None:
    groups = shared_groups(2)
    on_all(groups, lambda g: g.sum(torch.ones(3)))
    groups[1].abort("first")
    groups[0].abort("second")
    with pytest.raises(RuntimeError, match="first"):
        groups[0].sum(torch.ones(3))
    assert groups[0].failure() == "first"
    groups[0].restart(groups[0].sequence + 10)
    groups[1].follow(groups[0].sequence)
    assert groups[1].failure() is None
    sums = on_all(groups, lambda g: g.sum(torch.full((3,), g.rank + 1.0)))
    assert [s.tolist() for s in sums] == [[3.0] * 3] * 2


@needs_native
def test_a_rank_that_never_comes_is_named() -> None:
    groups = shared_groups(3, deadline_s=0.05)
    with pytest.raises(RuntimeError, match=r"rank 1 did not come to exchange 1 within 50 ms"):
        groups[0].sum(torch.ones(3))
    assert "rank 1 did not come" in str(groups[2].failure())


@needs_native
def test_exchange_numbers_may_wrap() -> None:
    groups = shared_groups(2)
    groups[0].restart((1 << 32) - 3)
    groups[1].follow((1 << 32) - 3)
    for i in range(8):
        part = torch.tensor([float(i)])
        sums = on_all(groups, functools.partial(SharedGroup.sum, part=part))
        assert sums[0].item() == sums[1].item() == 2.0 * i


def test_a_dry_group_exchanges_nothing() -> None:
    group = DryGroup(1, 4)
    x = torch.randn(3, 8)
    assert torch.equal(group_sum(x, group.number, group.is_native), x)
    assert group.gather_rows(x, 11).shape == (11, 8)
    assert group.gather_columns(x, 32).shape == (0, 32)
    group.close()


CHILD = """
import socket, sys, torch
from remora.comm.arena import Memory
from remora.comm.collectives import SharedGroup
link = socket.socket(fileno=int(sys.argv[2]))
size = SharedGroup.bytes_needed(2, 4096)
group = SharedGroup(Memory.attach(int(sys.argv[1]), size), rank=1, size=2, capacity=4096,
                    deadline_s=30, peers={0: link.fileno()})
for i in range(100):
    assert group.sum(torch.full((50,), 2.0 * i))[0] == 3.0 * i
print("done", flush=True)
group.sum(torch.ones(1)) if sys.argv[3] == "wait" else link.recv(1)
"""


@pytest.fixture
def child(request: pytest.FixtureRequest) -> Iterator[tuple[SharedGroup, subprocess.Popen[str]]]:
    """Rank 1 in a process of its own, after a hundred sums with us; it then waits."""
    memory, descriptor = Memory.create_shared(SharedGroup.bytes_needed(2, 4096))
    ours, theirs = socket.socketpair()
    group = SharedGroup(
        memory, rank=0, size=2, capacity=4096, deadline_s=30, peers={1: ours.fileno()}
    )
    command = [sys.executable, "-c", CHILD, str(descriptor), str(theirs.fileno()), request.param]
    process = subprocess.Popen(
        command, pass_fds=(descriptor, theirs.fileno()), stdout=subprocess.PIPE, text=True
    )
    theirs.close()
    os.close(descriptor)
    for i in range(100):
        assert group.sum(torch.full((50,), 1.0 * i))[0] == 3.0 * i
    assert process.stdout is not None and process.stdout.readline() == "done\n"
    with ours, process:
        yield group, process
        ours.close()
    group.close()


@needs_native
@pytest.mark.parametrize("child", ["idle"], indirect=True)
def test_a_killed_process_is_noticed_and_named(
    child: tuple[SharedGroup, subprocess.Popen[str]],
) -> None:
    group, process = child
    process.send_signal(signal.SIGKILL)
    with pytest.raises(RuntimeError, match="rank 1 is gone"):
        group.sum(torch.ones(3))


@needs_native
@pytest.mark.parametrize("child", ["wait"], indirect=True)
def test_a_process_that_waits_is_told(child: tuple[SharedGroup, subprocess.Popen[str]]) -> None:
    group, process = child
    group.abort("rank 0 gave up")
    assert process.wait(timeout=20) == 1
