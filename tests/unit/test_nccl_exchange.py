"""Dispatch and combine over the fake NCCL, against computing every expert at home."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.comm_rig import TOKEN, at_home, close_enough, random_batch, shards
from support.fake_nccl import ContractError, FakeNccl, World
from support.nccl_rig import (
    decode_naive,
    random_placement,
    run_members,
    view_of,
)

from remora.comm import nccl_plan
from remora.comm.dispatch import Dispatcher
from remora.comm.errors import FencedError, PeerLostError
from remora.comm.nccl_link import Link
from remora.comm.nccl_messages import GENERATIONS_PER_EPOCH
from remora.comm.nccl_plan import Roster
from remora.comm.nccl_shard import ShardExchange
from remora.comm.nccl_source import SourceExchange
from remora.comm.peer import PeerLimits
from remora.comm.peers import PeerSet
from remora.comm.view import contiguous_placement

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
MODES = pytest.mark.parametrize("mode", ["ordered", "presummed"])
Exchange = SourceExchange | ShardExchange


def batch_of(uid: str, num_rows: int, **options: Any) -> tuple[torch.Tensor, ...]:
    """A source's own rows, a function of who it is."""
    return random_batch(num_rows, seed=int(uid.split("-")[1]) + 100 * num_rows, **options)


def decode_step(
    link: Link, exchange: Exchange, layers: tuple[int, ...], tokens: int, **options: Any
) -> list[torch.Tensor]:
    outs = []
    for layer in layers:
        if isinstance(exchange, ShardExchange):
            exchange.decode(layer)
            continue
        hidden, index, weights = batch_of(link.uid, exchange.shape.capacity, **options)
        index[tokens:] = -1
        outs.append(torch.full_like(hidden, float("nan")))
        exchange.decode(layer, hidden, index, weights, outs[-1])
    link.finish(30.0)
    return outs


@settings(max_examples=25)
@given(data=st.data())
def test_both_ways_equal_computing_at_home(data: st.DataObject) -> None:
    """Random placements with duplicates and empty shards, top-k, rows, idle sources, masks."""
    num_sources, num_shards = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    num_experts = data.draw(st.integers(1, 12))
    top_k = data.draw(st.integers(1, min(4, num_experts)))
    capacity = data.draw(st.integers(1, 9))
    tokens = data.draw(st.lists(st.integers(0, capacity), min_size=3, max_size=3))
    presummed, seed = data.draw(st.booleans()), data.draw(st.integers(0, 1 << 30))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    view = view_of(num_sources, random_placement(num_shards, num_experts, seed))
    exact_first = data.draw(st.booleans())

    def body(link: Link, exchange: Exchange) -> Any:
        outs = []
        for exact in (exact_first, not exact_first):
            for layer in (0, 2):
                if isinstance(exchange, ShardExchange):
                    (exchange.exact if exact else exchange.decode)(layer)
                    continue
                num = tokens[link.rank]
                rows = random_batch(
                    capacity, num_experts=num_experts, top_k=top_k, width=16, dtype=dtype,
                    seed=seed + link.rank,
                )  # fmt: skip
                hidden, index, weights = rows
                index[num:] = -1
                index[: num // 3, 0] = -1
                if exact:
                    out = exchange.exact(layer, hidden, index, weights, num)
                else:
                    out = torch.full_like(hidden, float("nan"))
                    exchange.decode(layer, hidden, index, weights, out)
                outs.append((layer, *rows, num, out))
            link.finish(30.0)
        return outs

    results = run_members(
        view, body, dtype=dtype, capacity=capacity, top_k=top_k, presummed=presummed
    )
    for source in range(num_sources):
        for layer, hidden, index, weights, num, out in results[f"dense-{source}"]:
            expected = at_home(hidden, index, weights, num, layer)
            mode = "presummed" if presummed else "ordered"
            assert close_enough(out, expected, mode), (source, layer)


@DTYPES
def test_presummed_decode_equals_its_slow_twin_bit_by_bit(dtype: torch.dtype) -> None:
    view = view_of(2, random_placement(3, 12, seed=5))

    def body(link: Link, exchange: Exchange) -> Any:
        outs = decode_step(link, exchange, (2,), 8, num_experts=12, width=16, dtype=dtype)
        if isinstance(exchange, ShardExchange):
            return None
        return outs[0], exchange.home_tables[2].tolist()

    results = run_members(view, body, dtype=dtype, presummed=True)
    for uid in ("dense-0", "dense-1"):
        out, home = results[uid]
        rows = batch_of(uid, 8, num_experts=12, width=16, dtype=dtype)
        assert torch.equal(out, decode_naive(*rows, 2, home))


@MODES
@DTYPES
def test_exact_equals_the_framed_transport_bit_by_bit(dtype: torch.dtype, mode: Any) -> None:
    """The same rows to the same shards in the same order, over sockets and over NCCL."""
    placement = contiguous_placement(
        num_experts=16, moe_layers=(0, 2), shard_uids=("shard-0", "shard-1")
    )
    rows = random_batch(37, width=24, dtype=dtype)
    peers = PeerSet(token=TOKEN, self_host="0", limits=PeerLimits(region_bytes=1 << 20))
    try:
        with shards(placement=placement, hosts="01") as rig:
            dispatcher = Dispatcher(view=rig.view, peers=peers, combine=mode)
            framed = dispatcher.moe(2, *rows, 33)
    finally:
        peers.close()

    def body(link: Link, exchange: Exchange) -> Any:
        if isinstance(exchange, ShardExchange):
            exchange.exact(2)
            return link.finish(30.0)
        out = exchange.exact(2, *rows, 33)
        link.finish(30.0)
        return out

    view = view_of(1, placement)
    results = run_members(view, body, dtype=dtype, width=24, presummed=mode == "presummed")
    assert torch.equal(results["dense-0"], framed)


def test_generations_of_a_deployment_that_has_had_many_views() -> None:
    """They start with the view's epoch, and outgrow the int32 that messages carry."""
    view = view_of(1, random_placement(2, 6, seed=4))
    rows = random_batch(8, num_experts=6, width=16)

    def body(link: Link, exchange: Exchange) -> Any:
        if isinstance(exchange, ShardExchange):
            exchange.exact(2), exchange.decode(2)
            return link.finish(30.0)
        exact, decoded = exchange.exact(2, *rows, 8), torch.empty_like(rows[0])
        exchange.decode(2, *rows, decoded)
        link.finish(30.0)
        return exact, decoded

    results = run_members(view, body, generation=40_000 * GENERATIONS_PER_EPOCH + 3)
    for out in results["dense-0"]:
        assert close_enough(out, at_home(*rows, 8, 2), "ordered")


def test_bytes_on_the_wire_equal_the_formula() -> None:
    view, world = view_of(2, random_placement(3, 12, seed=1)), World()

    def body(link: Link, exchange: Exchange) -> int:
        decode_step(link, exchange, (0,), 5, num_experts=12, width=16)
        return exchange.shape.sent_bytes(4) if isinstance(exchange, SourceExchange) else 0

    results = run_members(view, body, world=world)
    assert world.num_copied_bytes == sum(results.values())


@pytest.mark.parametrize("presummed", [False, True])
def test_decode_is_captured_and_replayed(presummed: bool) -> None:
    """Under capture a host read or an allocation raises; the replay computes what is new."""
    view = view_of(2, random_placement(3, 12, seed=2))

    def body(link: Link, exchange: Exchange) -> Any:
        nccl = link.nccl
        assert isinstance(nccl, FakeNccl)
        source = isinstance(exchange, SourceExchange)
        hidden, index, weights = batch_of("dense-9", 8, num_experts=12, width=16)
        out = torch.zeros_like(hidden)

        def step() -> None:
            for layer in (0, 2):
                if source:
                    exchange.decode(layer, hidden, index, weights, out)
                else:
                    exchange.decode(layer)
                if source:
                    hidden.copy_(out)

        step()  # warm: NCCL connects and kernels load before a capture
        link.finish(30.0)
        with nccl.capture() as graph:
            step()
        expected, got = [], []
        for number in range(3):
            rows = batch_of(f"dense-{10 + link.rank + number}", 8, num_experts=12, width=16)
            if source:
                hidden.copy_(rows[0]), index.copy_(rows[1]), weights.copy_(rows[2])
                index[number:] = -1
                once = at_home(*(t.clone() for t in (hidden, index, weights)), 8, 0)
                expected.append(at_home(once, index.clone(), weights.clone(), 8, 2))
            graph.replay()
            link.finish(30.0)
            got.append(out.clone())
        return expected, got

    results = run_members(view, body, presummed=presummed)
    mode: Any = "presummed" if presummed else "ordered"
    for uid in ("dense-0", "dense-1"):
        for expected, got in zip(*results[uid], strict=True):
            assert close_enough(got, expected, mode)


def test_capture_sees_what_may_not_be_captured() -> None:
    nccl, x = FakeNccl(World(), "dense-0"), torch.zeros(3)
    for forbidden in (
        lambda: x + 1,
        lambda: x.sum().item(),
        lambda: x.tolist(),
        lambda: bool(x[0]),
        lambda: x.nonzero(),
        lambda: torch.zeros(2),
        lambda: x.cpu().numpy(),
    ):
        with pytest.raises(ContractError), nccl.capture():
            forbidden()
    with nccl.capture() as graph:
        x.add_(1).view(1, 3)[0].mul_(2)
    x.zero_()
    graph.replay()
    assert x.tolist() == [2, 2, 2]


def test_members_at_different_layers_are_found_out() -> None:
    view = view_of(1, random_placement(2, 6, seed=3))

    def body(exact: bool) -> Any:
        def run(link: Link, exchange: Exchange) -> None:
            rows = random_batch(8, num_experts=6, width=16)
            if isinstance(exchange, ShardExchange):
                with pytest.raises(FencedError):
                    exchange.exact(2) if exact else exchange.decode(2)
                    link.finish(30.0)
            elif exact:
                exchange.exact(0, *rows, 8)
            else:
                exchange.decode(0, *rows, torch.zeros_like(rows[0]))

        return run

    with pytest.raises(AssertionError, match="outstanding"):  # the source waits in vain
        run_members(view, body(exact=True))
    run_members(view, body(exact=False))


def test_the_host_reads_nothing_behind_a_peer_that_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a GPU a read or a copy from the host would wait for what never ends, and nobody aborts."""
    view = view_of(1, random_placement(1, 6, seed=3))

    def body(link: Link, exchange: Exchange) -> None:
        if isinstance(exchange, ShardExchange):
            return link.abort("gone")
        rows = random_batch(8, num_experts=6, width=16)
        enqueued, run = [], link.run
        monkeypatch.setattr(link, "run", lambda *args: (enqueued.append(1), run(*args))[1])
        from_host = torch.from_numpy

        def no_copy(array: Any) -> torch.Tensor:
            assert not enqueued, "copied behind what may never end"
            return from_host(array)

        monkeypatch.setattr(torch, "from_numpy", no_copy)
        exchange.exact(0, *rows, 8)
        assert enqueued
        link.note_lost("shard-0 is gone")
        with pytest.raises(PeerLostError, match="shard-0 is gone"):
            exchange.exact(2, *rows, 8)
        return None

    run_members(view, body)


def test_every_send_has_its_receive_in_order() -> None:
    roster = Roster.of(view_of(3, random_placement(4, 8, seed=0)), 1)
    for to_shards in (True, False):
        ends: dict[tuple[int, int], dict[bool, list[str]]] = {}
        for rank in range(7):
            for op in nccl_plan.phase(roster, rank, ("rows", "meta"), to_shards=to_shards):
                pair = (rank, op.peer) if op.is_send else (op.peer, rank)
                ends.setdefault(pair, {True: [], False: []})[op.is_send].append(op.part)
        assert len(ends) == 12
        assert all(both[True] == both[False] == ["rows", "meta"] for both in ends.values())


def test_capacity_buckets_hold_their_tokens() -> None:
    for limit in (1, 5, 32, 48):
        for tokens in range(limit + 1):
            bucket = nccl_plan.capacity_for(tokens, limit)
            assert bucket is not None and tokens <= bucket <= limit
        assert nccl_plan.capacity_for(limit + 1, limit) is None
        assert len({nccl_plan.capacity_for(n, limit) for n in range(limit + 1)}) <= 7


def test_home_shards_are_near_held_and_spread() -> None:
    table = np.full((8, 3), -1, np.int16)
    table[:, :2] = (0, 1)
    table[5] = (0, 1, 2)
    near = nccl_plan.home_shards(table, [False, False, True], 0)
    assert near[5] == 2 and near[8] == 3
    spread = nccl_plan.home_shards(table, [False] * 3, 0)
    other = nccl_plan.home_shards(table, [False] * 3, 1)
    assert sorted(spread[:5].tolist()) == [0, 0, 0, 1, 1] and (spread[:5] != other[:5]).all()
