"""The fake NCCL refuses what a GPU answers with a hang or with garbage."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.fake_nccl import ContractError, CpuDevice, FakeNccl, NcclCommunicator, NcclError, World

INT32 = FakeNccl.NCCL_INT32


def pair(
    world: World, *bodies: Callable[[FakeNccl, NcclCommunicator, torch.Tensor], Any]
) -> dict[str, Any]:
    """Runs each body as a rank of one communicator, with a buffer of 8 int32."""
    unique_id = FakeNccl(world, "root").get_unique_id()

    def member(rank: int) -> Callable[[], Any]:
        def run() -> Any:
            nccl = FakeNccl(world, f"rank-{rank}")
            comm = nccl.NcclCommunicator(len(bodies), unique_id, rank)
            return bodies[rank](nccl, comm, torch.full((8,), rank, dtype=torch.int32))

        return run

    return world.run({f"rank-{rank}": member(rank) for rank in range(len(bodies))})


def grouped(*calls: Callable[[NcclCommunicator, int], None]) -> Callable[..., Any]:
    """A body that makes all calls in one group."""

    def body(nccl: FakeNccl, comm: NcclCommunicator, buffer: torch.Tensor) -> list[int]:
        nccl.groupStart()
        for call in calls:
            call(comm, buffer.data_ptr())
        nccl.groupEnd()
        return buffer.tolist()

    return body


def alone(*calls: Callable[[NcclCommunicator, int], None]) -> Callable[..., Any]:
    """A body that makes each call by itself."""

    def body(nccl: FakeNccl, comm: NcclCommunicator, buffer: torch.Tensor) -> None:
        for call in calls:
            call(comm, buffer.data_ptr())

    return body


def send(peer: int, count: int = 4, datatype: int = INT32, at: int = 0, stream: int = 5) -> Any:
    return lambda comm, address: comm.send(address + at, count, datatype, peer, stream)


def recv(peer: int, count: int = 4, datatype: int = INT32, at: int = 16, stream: int = 5) -> Any:
    return lambda comm, address: comm.recv(address + at, count, datatype, peer, stream)


def test_a_group_exchanges_both_ways_in_any_order() -> None:
    results = pair(World(), grouped(send(1), recv(1)), grouped(recv(0), send(0)))
    assert results["rank-0"] == [0] * 4 + [1] * 4 and results["rank-1"] == [1] * 4 + [0] * 4


def test_operations_of_a_pair_match_in_order() -> None:
    sends = grouped(send(1, 1, at=0), send(1, 2, at=0))
    results = pair(World(), sends, grouped(recv(0, 1, at=0), recv(0, 2, at=8)))
    assert results["rank-1"] == [0, 1, 0, 0, 1, 1, 1, 1]
    with pytest.raises(ContractError, match="does not match"):
        pair(World(), sends, grouped(recv(0, 2), recv(0, 1)))


def test_without_a_group_two_sends_wait_for_each_other() -> None:
    with pytest.raises(ContractError, match="nobody can go on"):
        pair(World(), alone(send(1), recv(1)), alone(send(0), recv(0)))
    pair(World(), alone(send(1), recv(1)), alone(recv(0), send(0)))


def test_a_send_without_its_receive_is_found() -> None:
    with pytest.raises(ContractError, match="rank-0 waits for 1 of 2"):
        pair(World(), grouped(send(1), send(1)), grouped(recv(0)))


@pytest.mark.parametrize("wrong", [recv(0, 3), recv(0, datatype=FakeNccl.NCCL_FLOAT32)])
def test_counts_and_types_must_match(wrong: Any) -> None:
    with pytest.raises(ContractError, match="does not match"):
        pair(World(), grouped(send(1)), grouped(wrong))


def test_one_stream_for_a_communicator() -> None:
    with pytest.raises(ContractError, match="streams 5 and 6"):
        pair(World(), grouped(send(1), recv(1, stream=6)), grouped(recv(0), send(0)))


@pytest.mark.parametrize("wrong", [send(2), send(-1), lambda c, _: c.send(0, 4, INT32, 1, 5)])
def test_arguments_that_nccl_checks(wrong: Any) -> None:
    def body(nccl: FakeNccl, comm: NcclCommunicator, buffer: torch.Tensor) -> None:
        with pytest.raises(NcclError) as caught:
            wrong(comm, buffer.data_ptr())
        assert caught.value.status == 4

    pair(World(), body, alone())


def test_after_its_end_a_communicator_answers_with_invalid_argument() -> None:
    def body(nccl: FakeNccl, comm: NcclCommunicator, buffer: torch.Tensor) -> None:
        comm.abort()
        comm.abort()
        for call in (comm.size, comm.check_async_error, lambda: comm.commSplit(0, 0)):
            with pytest.raises(NcclError) as caught:
                call()
            assert caught.value.status == 4
        with pytest.raises(NcclError):
            nccl.groupEnd()

    pair(World(), body, body)


def test_a_peer_that_is_gone_leaves_a_stuck_stream_until_abort() -> None:
    def stays(nccl: FakeNccl, comm: NcclCommunicator, buffer: torch.Tensor) -> None:
        mark = CpuDevice(nccl).mark()
        comm.recv(buffer.data_ptr(), 4, INT32, 1, 5)
        assert not mark.ready()
        comm.check_async_error()  # NCCL need not notice
        comm.abort()
        assert mark.ready()

    def dies(nccl: FakeNccl, comm: NcclCommunicator, buffer: torch.Tensor) -> None:
        nccl.die_at = nccl.num_calls + 1
        comm.send(buffer.data_ptr(), 4, INT32, 0, 5)

    assert pair(World(), stays, dies).keys() == {"rank-0"}


def test_an_injected_error_is_told_and_hangs_the_rest() -> None:
    def body(nccl: FakeNccl, comm: NcclCommunicator, buffer: torch.Tensor) -> None:
        comm.inject(6)
        comm.recv(buffer.data_ptr(), 4, INT32, 1, 5)
        with pytest.raises(NcclError) as caught:
            comm.check_async_error()
        assert caught.value.status == 6
        comm.abort()

    pair(World(), body, alone())


def test_split_renumbers_by_key_and_needs_everybody() -> None:
    def body(color: int, key: int) -> Any:
        def run(nccl: FakeNccl, comm: NcclCommunicator, buffer: torch.Tensor) -> Any:
            child = comm.commSplit(color, key)
            return child and (child.rank_id(), child.size())

        return run

    results = pair(World(), body(0, 9), body(-1, 0), body(0, 3))
    assert results == {"rank-0": (1, 2), "rank-1": None, "rank-2": (0, 2)}
    with pytest.raises(ContractError, match="splits with"):
        pair(World(), body(0, 0), alone())
    with pytest.raises(ContractError):
        pair(World(), body(0, 0), grouped(send(0)))


def test_init_waits_for_all_ranks_and_refuses_doubles() -> None:
    world = World()
    nccl = FakeNccl(world, "a")
    one = nccl.get_unique_id()
    with pytest.raises(ContractError, match="waits for ranks"):
        world.run({"a": lambda: nccl.NcclCommunicator(2, one, 0)})
    world = World()
    one, failed = FakeNccl(world, "a").get_unique_id(), threading.Event()

    def first() -> None:
        with pytest.raises(NcclError):
            FakeNccl(world, "a").NcclCommunicator(3, one, 0)
        failed.set()

    thread = threading.Thread(target=first)
    thread.start()
    with world.changed:
        assert world.changed.wait_for(lambda: one in world.cliques, 5.0)
    with pytest.raises(ContractError, match="rank 0 of 3"):
        FakeNccl(world, "b").NcclCommunicator(3, one, 0)
    world.close()
    thread.join(5.0)
    assert failed.is_set()
