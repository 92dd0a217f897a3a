"""A tensor-parallel group over NCCL: what NCCL adds to the contract of `test_collectives`.

The network is the fake one: it raises on mismatched counts or types, on a second stream and on
ranks that wait for each other in a ring, and a launch whose peer is gone leaves the stream stuck.
"""

import functools
import threading
from typing import Any

import pytest
import torch
from support.fake_nccl import CpuDevice, FakeNccl, World
from support.tp_engine import meet_over_nccl, nccl_groups, shared_groups, together

from remora.comm import nccl_group
from remora.comm.collectives import group_sum, part_of
from remora.comm.errors import ClusterError
from remora.comm.nccl_group import NcclGroup
from remora.kernels.native import native_available


def group_of(world: World, rank: int, size: int, **more: Any) -> NcclGroup:
    nccl = FakeNccl(world, f"rank-{rank}")
    options: dict[str, Any] = {"deadline_s": 10.0, **more}
    return NcclGroup(nccl, CpuDevice(nccl), rank=rank, size=size, name="dense-3", **options)


@pytest.mark.skipif(not native_available(), reason="C++ kernels not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_large_and_small_sums_have_the_bits_of_shared_memory(
    size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways to sum, with runs that are not even."""
    monkeypatch.setattr(nccl_group, "WHOLE_BYTES_MAX", 512)
    ours, theirs = nccl_groups(size), shared_groups(size)
    generator = torch.Generator().manual_seed(size)
    for rows, width in ((1, 5), (7, 61), (33, 129)):
        parts = [
            (torch.randn((rows, width), generator=generator) * 10.0**rank).to(dtype)
            for rank in range(size)
        ]
        calls = [
            functools.partial(group_sum, parts[g.rank], g.number, g.is_native)
            for g in (*ours, *theirs)
        ]
        sums = together(calls)
        assert all(torch.equal(total, sums[-1]) for total in sums)
    for group in (*ours, *theirs):
        group.close()


def test_a_large_sum_moves_what_an_all_reduce_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl_group, "WHOLE_BYTES_MAX", 64)
    world = World()
    groups = [group_of(world, rank, 4) for rank in range(4)]
    meet_over_nccl(groups)
    together([functools.partial(group.sum, torch.ones(1000)) for group in groups])
    assert world.num_copied_bytes == 2 * 3 * 1000 * 4  # of 4 * 3 * 1000 * 4 in whole parts
    counted = [group.counters()["sum"] for group in groups]
    assert all(count["calls"] == 1 for count in counted)
    for direction in ("sent_bytes", "received_bytes"):
        assert sum(count[direction] for count in counted) == world.num_copied_bytes


def test_an_asynchronous_error_ends_the_exchange_with_the_groups_name() -> None:
    reasons: list[str] = []
    groups = nccl_groups(2, reasons=reasons)

    def fails(group: Any) -> str:
        """A rank that had all it needed when the other one failed learns of it in the next step."""
        with pytest.raises(ClusterError) as caught:
            for _ in range(2):
                group.sum(torch.ones(3))
                group.settle()
        return str(caught.value)

    groups[1]._nccl.communicators[0].inject(2)
    told = together([functools.partial(fails, group) for group in groups])
    assert all("tensor-parallel group of dense-0" in text for text in told), told
    assert "SYSTEM_ERROR" in told[1]
    for group in groups:
        assert group.failure() is not None
        assert all(comm.is_gone for comm in group._nccl.communicators), "nobody aborted"
        with pytest.raises(ClusterError, match="dense-0"):
            group.sum(torch.ones(3))
    assert reasons and "dense-0" in reasons[0]
    reasons.clear()
    meet_over_nccl(groups)  # and it goes on
    sums = together([functools.partial(g.sum, torch.full((2,), g.rank + 1.0)) for g in groups])
    assert [total.tolist() for total in sums] == [[3.0, 3.0]] * 2
    for group in groups:
        group.settle()
        assert group.failure() is None


def test_an_abort_reaches_a_rank_that_waits() -> None:
    """The first reason is every rank's; the one that waits gets it from `settle`."""
    groups = nccl_groups(2)
    failed = threading.Event()

    def waits() -> None:
        with pytest.raises(ClusterError, match="no shard answers"):
            groups[0].sum(torch.ones(3))
            groups[0].settle()
        failed.set()

    waiting = threading.Thread(target=waits)
    waiting.start()
    groups[1].abort("no shard answers")
    groups[1].abort("a second reason")
    assert failed.wait(timeout=10)
    waiting.join()
    assert groups[1].failure() == "no shard answers"


def test_a_rank_that_hangs_is_found_by_the_deadline() -> None:
    world = World()
    groups = [group_of(world, rank, 2, deadline_s=0.2) for rank in range(2)]
    meet_over_nccl(groups)
    world.patience_s = 0.05  # as on a GPU: the launch returns, the stream stays busy
    groups[0].sum(torch.ones(3))
    with pytest.raises(ClusterError, match=r"group of dense-3 did not finish in 0\.2 s"):
        groups[0].settle()


def test_a_rank_that_never_joins() -> None:
    """The communicator that nobody waits for any more is aborted by the thread that made it."""
    world = World()
    first, second = (group_of(world, rank, 2, deadline_s=0.1) for rank in range(2))
    unique_id = first.make_id()
    with pytest.raises(ClusterError, match="not all ranks came"):
        first.connect(unique_id)
    nccl: Any = second._nccl
    late = nccl.NcclCommunicator(2, unique_id, 1)
    with world.changed:
        assert world.changed.wait_for(lambda: late._clique.ranks[0].is_gone, timeout=10)


def test_a_rank_that_is_gone_while_the_group_meets() -> None:
    group = group_of(World(), 0, 2, gone=lambda: "dense-3.1 is gone")
    with pytest.raises(ClusterError, match=r"dense-3\.1 is gone"):
        group.connect(group.make_id())


def test_a_rank_that_cannot_join_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is: cupy has errors beside NcclError, and KeyError(7) for "in progress"."""
    group = group_of(World(), 0, 2)

    def fails(*_: Any) -> Any:
        raise KeyError(7)

    monkeypatch.setattr(group._nccl, "NcclCommunicator", fails)
    with pytest.raises(ClusterError, match=r"rank 0 does not join: KeyError: 7"):
        group.connect(bytes(128))


def test_dry_and_empty_exchanges_move_nothing() -> None:
    world = World()
    groups = [group_of(world, rank, 3) for rank in range(3)]
    with pytest.raises(ClusterError, match="not connected"):
        groups[0].sum(torch.ones(1))
    groups[1].set_dry(True)
    assert groups[1].sum(torch.ones(2, 3)).tolist() == [[1.0] * 3] * 2
    assert groups[1].gather_rows(torch.ones(1, 3), 3).shape == (3, 3)
    groups[1].set_dry(False)
    meet_over_nccl(groups)

    def empty(group: NcclGroup) -> list[tuple[int, ...]]:
        begin, end = part_of(group.rank, 3, 8)
        return [
            tuple(group.sum(torch.ones(0, 4)).shape),
            tuple(group.gather_rows(torch.ones(0, 4), 0).shape),
            tuple(group.gather_columns(torch.ones(0, end - begin), 8).shape),
        ]

    assert together([functools.partial(empty, g) for g in groups]) == [[(0, 4), (0, 4), (0, 8)]] * 3
    assert world.num_copied_bytes == 0
