"""Dispatch and combine over real sockets, against computing every expert at home."""

import queue
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from support.comm_rig import (
    TOKEN,
    expert_output,
    random_batch,
    shards,
    toy_compute,
)
from torch import Tensor

from remora.comm import plan
from remora.comm.accounting import expected_call_bytes
from remora.comm.dispatch import Combine, Dispatcher
from remora.comm.errors import ClusterError, DeadlineError, PeerLostError
from remora.comm.expert_protocol import ExpertCall, NotMineError
from remora.comm.faulty import Faults, FaultyLink
from remora.comm.peer import PeerLimits
from remora.comm.peers import PeerSet
from remora.comm.view import Member, Placement, View

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
MODES = pytest.mark.parametrize("mode", ["ordered", "presummed"])
EVERYTHING = tuple(range(16))


def at_home(
    hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor, num_tokens: int, layer: int
) -> Tensor:
    """What `moe` must give: every expert computed here, summed in top-k order."""
    rows_TKD = torch.stack(
        [expert_output(hidden_TD, index_TK[:, k], layer) for k in range(index_TK.shape[1])], 1
    )
    weights_TK = weights_TK.float() * (index_TK >= 0)
    out_TD = plan.combine_naive(rows_TKD, weights_TK)
    out_TD[num_tokens:] = 0
    return out_TD


def everywhere(*uids: str) -> Placement:
    """Every shard holds every expert."""
    return Placement(
        num_experts=16, moe_layers=(0, 2), slots={uid: (EVERYTHING,) * 2 for uid in uids}
    )


@pytest.fixture
def peers() -> Iterator[PeerSet]:
    peers = PeerSet(token=TOKEN, self_host="a", limits=PeerLimits(region_bytes=1 << 20))
    yield peers
    peers.close()


def close_enough(got: Tensor, expected: Tensor, mode: Combine) -> bool:
    """Ordered is equal to the last bit. Presummed rounds once per shard and once at the end."""
    if mode == "ordered":
        return torch.equal(got, expected)
    step = 2.0**-7 if got.dtype is torch.bfloat16 else 2.0**-22
    return torch.allclose(got.float(), expected.float(), rtol=step, atol=step * 4)


@DTYPES
@MODES
@pytest.mark.parametrize("hosts", ["aa", "ab", "bb"])
def test_equals_computing_at_home(
    peers: PeerSet, dtype: torch.dtype, mode: Combine, hosts: str
) -> None:
    with shards(hosts=hosts) as rig:
        dispatcher = Dispatcher(view=rig.view, peers=peers, combine=mode, rows_per_call_max=100)
        for num_tokens, padding, width in ((0, 3, 64), (1, 0, 7), (8, 56, 1024), (333, 0, 65)):
            for layer in (0, 2):
                hidden_TD, index_TK, weights_TK = random_batch(
                    num_tokens + padding, width=width, dtype=dtype, seed=num_tokens
                )
                got = dispatcher.moe(layer, hidden_TD, index_TK, weights_TK, num_tokens)
                expected = at_home(hidden_TD, index_TK, weights_TK, num_tokens, layer)
                assert close_enough(got, expected, mode), (num_tokens, layer)


@MODES
def test_weights_of_any_dtype_skipped_pairs_and_views(peers: PeerSet, mode: Combine) -> None:
    with shards() as rig:
        dispatcher = Dispatcher(view=rig.view, peers=peers, combine=mode)
        hidden_TD, index_TK, weights_TK = random_batch(20, width=32)
        index_TK[3] = -1
        index_TK[4, 1] = -1
        expected = at_home(hidden_TD, index_TK, weights_TK.bfloat16(), 20, 2)
        strided = torch.stack([hidden_TD, hidden_TD], 2)[:, :, 0]
        assert not strided.is_contiguous()
        got = dispatcher.moe(2, strided, index_TK.T.contiguous().T, weights_TK.bfloat16(), 20)
        assert close_enough(got, expected, mode) and not got[3].any()


def test_ordered_is_bitwise_the_same_over_any_number_of_shards(peers: PeerSet) -> None:
    hidden_TD, index_TK, weights_TK = random_batch(64, dtype=torch.bfloat16)
    results = []
    for num_shards in (1, 2, 4):
        with shards(num_shards=num_shards, hosts="ab") as rig:
            dispatcher = Dispatcher(view=rig.view, peers=peers, combine="ordered")
            results.append(dispatcher.moe(0, hidden_TD, index_TK, weights_TK, 64))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@MODES
@pytest.mark.parametrize("hosts", ["aa", "bb"])
def test_bytes_rows_and_pairs_equal_the_formula(peers: PeerSet, mode: Combine, hosts: str) -> None:
    """Counted where frames are sent and taken; computed from the routing alone."""
    with shards(hosts=hosts) as rig:
        dispatcher = Dispatcher(view=rig.view, peers=peers, combine=mode)
        hidden_TD, index_TK, weights_TK = random_batch(50, width=33, dtype=torch.bfloat16)
        dispatcher.moe(0, hidden_TD, index_TK, weights_TK, 41)
        for shard, uid in enumerate(("shard-0", "shard-1")):
            mine_TK = (index_TK[:41] // 8) == shard
            num_rows, num_pairs = int(mine_TK.any(1).sum()), int(mine_TK.sum())
            out, back = expected_call_bytes(
                num_rows=num_rows, num_pairs=num_pairs, row_bytes=66, presummed=mode == "presummed"
            )
            link = dispatcher.counters.link(uid)
            assert (link.sent_frames, link.received_frames) == (1, 1)
            assert (link.sent_bytes, link.received_bytes) == (out, back)
            assert (link.sent_rows, link.sent_pairs) == (num_rows, num_pairs)
            assert link.received_rows == (num_rows if mode == "presummed" else num_pairs)
            [far] = rig.servers[uid].connections  # both ends of a link count alike
            assert (far.counters.received_bytes, far.counters.sent_bytes) == (out, back)
            assert (far.counters.received_rows, far.counters.sent_rows) == (
                link.sent_rows,
                link.received_rows,
            )
        total = dispatcher.counters.total()
        assert total.sent_pairs == 41 * 4


@MODES
def test_more_slices_than_credits(mode: Combine) -> None:
    """Answers are copied out of their regions when later slices need the credits."""
    limits = PeerLimits(region_bytes=1 << 16, num_regions=2)
    peers = PeerSet(token=TOKEN, self_host="a", limits=limits)
    most: queue.Queue[int] = queue.Queue()

    def counting(uid: str) -> Callable[[ExpertCall], Tensor]:
        def compute(call: ExpertCall) -> Tensor:
            most.put(call.rows_ND.shape[0])
            return toy_compute(call)

        return compute

    with shards(hosts="ab", compute=counting) as rig:
        dispatcher = Dispatcher(view=rig.view, peers=peers, combine=mode, rows_per_call_max=10)
        hidden_TD, index_TK, weights_TK = random_batch(300)
        got = dispatcher.moe(0, hidden_TD, index_TK, weights_TK, 300)
        assert close_enough(got, at_home(hidden_TD, index_TK, weights_TK, 300, 0), mode)
        sizes = [most.get_nowait() for _ in range(most.qsize())]
        assert len(sizes) > 50 and max(sizes) == 10
    peers.close()


def test_an_unused_shard_hears_nothing(peers: PeerSet) -> None:
    with shards() as rig:
        dispatcher = Dispatcher(view=rig.view, peers=peers, combine="ordered")
        hidden_TD, index_TK, weights_TK = random_batch(9, num_experts=8)
        dispatcher.moe(0, hidden_TD, index_TK, weights_TK, 9)
        assert dispatcher.counters.link("shard-0").sent_frames == 1
        assert dispatcher.counters.link("shard-1").sent_frames == 0


def test_local_replicas_are_used(peers: PeerSet) -> None:
    with shards(hosts="ba", placement=everywhere("shard-0", "shard-1")) as rig:
        dispatcher = Dispatcher(view=rig.view, peers=peers, combine="presummed")
        dispatcher.moe(0, *random_batch(9), 9)
        assert dispatcher.counters.link("shard-0").sent_frames == 0
        assert dispatcher.counters.link("shard-1").sent_rows == 9


def test_the_requester_may_work_between_dispatch_and_combine(peers: PeerSet) -> None:
    with shards() as rig:
        dispatcher = Dispatcher(view=rig.view, peers=peers, combine="ordered")
        batch = random_batch(30)
        sent = [dispatcher.dispatch(layer, *batch, 30) for layer in (0, 2)]
        for layer, each in zip((2, 0), reversed(sent), strict=True):
            assert torch.equal(dispatcher.combine(each), at_home(*batch, 30, layer))


@MODES
def test_not_mine_looks_again_at_the_view(peers: PeerSet, mode: Combine) -> None:
    """The view is stale: expert 3 has moved. One refresh, same result."""
    moved = Placement(
        num_experts=16,
        moe_layers=(0, 2),
        slots={"shard-0": ((0, 1, 2, 4, 5, 6, 7),) * 2, "shard-1": ((*range(8, 16), 3),) * 2},
    )
    asked: list[int] = []

    def holding(uid: str) -> Callable[[ExpertCall], Tensor]:
        def compute(call: ExpertCall) -> Tensor:
            held = moved.slots[uid][0]
            missing = sorted({e for e in call.pair_expert_P.tolist() if e not in held})
            if missing:
                raise NotMineError(missing)
            return toy_compute(call)

        return compute

    with shards(hosts="ab", compute=holding) as rig:

        def newer(epoch: int) -> View:
            asked.append(epoch)
            return View(epoch=2, members=rig.view.members, placement=moved)

        dispatcher = Dispatcher(view=rig.view, peers=peers, combine=mode, refresh_view=newer)
        batch = random_batch(40)
        got = dispatcher.moe(0, *batch, 40)
        assert close_enough(got, at_home(*batch, 40, 0), mode)
        assert asked == [1] and dispatcher.view.epoch == 2
        assert dispatcher.counters.link("shard-0").not_mine == 1
        assert close_enough(dispatcher.moe(2, *batch, 40), at_home(*batch, 40, 2), mode)
        assert asked == [1]


def test_not_mine_without_a_newer_view(peers: PeerSet) -> None:
    """Another replica serves; with none, the error says who disappointed. Bounded either way."""

    def unwilling(uid: str) -> Callable[[ExpertCall], Tensor]:
        def compute(call: ExpertCall) -> Tensor:
            if uid == "shard-0" and 5 in call.pair_expert_P.tolist():
                raise NotMineError([5])
            return toy_compute(call)

        return compute

    batch = random_batch(40)
    with shards(compute=unwilling, placement=everywhere("shard-0", "shard-1")) as rig:
        dispatcher = Dispatcher(view=rig.view, peers=peers, combine="ordered")
        assert torch.equal(dispatcher.moe(0, *batch, 40), at_home(*batch, 40, 0))
    with shards(compute=unwilling) as rig:
        dispatcher = Dispatcher(
            view=rig.view, peers=peers, combine="ordered", refresh_view=lambda epoch: rig.view
        )
        with pytest.raises(PeerLostError, match=r"shard-0 does not hold experts \[5\] of layer 0"):
            dispatcher.moe(0, *batch, 40)
        fine = (batch[0], batch[1] % 4, batch[2])  # and the dispatcher goes on
        assert torch.equal(dispatcher.moe(0, *fine, 40), at_home(*fine, 40, 0))


@MODES
def test_a_lost_shard_is_replaced_by_its_replicas(peers: PeerSet, mode: Combine) -> None:
    with shards(hosts="ab", placement=everywhere("shard-0", "shard-1")) as rig:
        dispatcher = Dispatcher(view=rig.view, peers=peers, combine=mode)
        batch = random_batch(40)
        dispatcher.moe(0, *batch, 40)
        rig.servers["shard-0"].close()
        got = dispatcher.moe(0, *batch, 40)
        assert close_enough(got, at_home(*batch, 40, 0), mode)
        assert dispatcher.counters.link("shard-0").losses == 1
        rig.servers["shard-1"].close()
        with pytest.raises(PeerLostError):
            dispatcher.moe(0, *batch, 40)


def test_a_cut_connection_is_made_again(peers: PeerSet) -> None:
    with shards() as rig:
        dispatcher = Dispatcher(view=rig.view, peers=peers, combine="ordered")
        batch = random_batch(40)
        for _ in range(3):
            for connection in rig.servers["shard-0"].connections:
                connection.sock.shutdown(2)
            assert torch.equal(dispatcher.moe(0, *batch, 40), at_home(*batch, 40, 0))
        assert dispatcher.counters.link("shard-0").losses == 3


def test_a_late_shard_is_a_suspect_until_the_next_epoch(peers: PeerSet) -> None:
    gate = threading.Event()

    def stuck(uid: str) -> Callable[[ExpertCall], Tensor]:
        def compute(call: ExpertCall) -> Tensor:
            if uid == "shard-0":
                gate.wait()
            return toy_compute(call)

        return compute

    with shards(compute=stuck, placement=everywhere("shard-0", "shard-1")) as rig:
        dispatcher = Dispatcher(view=rig.view, peers=peers, combine="ordered", deadline_s=0.05)
        batch = random_batch(40)
        for layer in (0, 2):
            assert torch.equal(dispatcher.moe(layer, *batch, 40), at_home(*batch, 40, layer))
        assert dispatcher.counters.link("shard-0").deadlines == 1
        gate.set()
        dispatcher.set_view(View(epoch=2, members=rig.view.members, placement=rig.view.placement))
        assert torch.equal(dispatcher.moe(0, *batch, 40), at_home(*batch, 40, 0))
        assert dispatcher.counters.link("shard-0").sent_frames == 2
    gate.clear()
    with shards(compute=stuck) as rig:
        dispatcher.set_view(View(epoch=3, members=rig.view.members, placement=rig.view.placement))
        with pytest.raises(DeadlineError, match="shard-0 did not answer"):
            dispatcher.moe(0, *batch, 40)
        gate.set()


def test_a_shard_that_fails_fails_the_call(
    peers: PeerSet, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(uid: str) -> Callable[[ExpertCall], Tensor]:
        def compute(call: ExpertCall) -> Tensor:
            if call.layer == 2:
                raise RuntimeError("out of luck")
            return toy_compute(call)

        return compute

    with shards(compute=broken) as rig:
        dispatcher = Dispatcher(view=rig.view, peers=peers, combine="ordered")
        batch = random_batch(5)
        for _ in range(10):  # and no credit is lost on the way
            with pytest.raises(ClusterError, match="RuntimeError: out of luck"):
                dispatcher.moe(2, *batch, 5)
        assert torch.equal(dispatcher.moe(0, *batch, 5), at_home(*batch, 5, 0))


def test_no_replica_at_all_is_named_at_once(peers: PeerSet) -> None:
    placement = Placement(num_experts=16, moe_layers=(0,), slots={"shard-0": (tuple(range(15)),)})
    with shards(num_shards=1, placement=placement) as rig:
        dispatcher = Dispatcher(view=rig.view, peers=peers, combine="ordered")
        hidden_TD, _, weights_TK = random_batch(1, top_k=1)
        with pytest.raises(PeerLostError, match="expert 15 of layer 0 has no live replica"):
            dispatcher.moe(0, hidden_TD, torch.tensor([[15]]), weights_TK, 1)


def test_credits_lost_with_late_calls_come_back_by_connecting_again() -> None:
    """Frames that vanish (they do not on real streams) must not use up a peer for ever."""
    peers = PeerSet(token=TOKEN, self_host="a", limits=PeerLimits(num_regions=2))
    with shards(num_shards=1, hosts="a") as rig:
        link = FaultyLink(
            rig.view.members[0].endpoint, self_host="a", seed=1,
            to_server=Faults(drop=1.0, skip_frames=1),
        )  # fmt: skip
        faulty = Member(
            uid="shard-0", incarnation=1, role="shard", endpoint=link.endpoint("a"), actor_name="-"
        )
        view = View(epoch=1, members=(faulty,), placement=rig.view.placement)
        dispatcher = Dispatcher(view=view, peers=peers, combine="ordered", deadline_s=0.02)
        batch = random_batch(4)
        answered = 0
        for epoch in range(2, 9):
            dispatcher.set_view(View(epoch=epoch, members=view.members, placement=view.placement))
            try:
                got = dispatcher.moe(0, *batch, 4)
            except DeadlineError:
                continue
            answered += 1
            assert torch.equal(got, at_home(*batch, 4, 0))
        assert answered == 3  # 1 answered, 2 credits lost, connected again, ...
        peers.close()
        link.close()


def test_a_peer_found_lost_between_two_dispatches(peers: PeerSet) -> None:
    with shards(placement=everywhere("shard-0", "shard-1")) as rig:
        dispatcher = Dispatcher(view=rig.view, peers=peers, combine="ordered")
        batch = random_batch(40)
        peers.disconnect("shard-0")
        assert torch.equal(dispatcher.moe(0, *batch, 40), at_home(*batch, 40, 0))
        peers.peer("shard-1").lose("cut by the test")
        assert torch.equal(dispatcher.moe(0, *batch, 40), at_home(*batch, 40, 0))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("host", ["a", "b"])
def test_faults_on_the_wire_never_change_a_result(seed: int, host: str) -> None:
    """Drops, duplicates, delays and cuts (and flips between hosts), seeded; printed on failure."""
    print(f"seed {seed}")
    flip = 0.0 if host == "a" else 0.05
    faults = Faults(drop=0.03, duplicate=0.1, cut=0.05, flip=flip, delay=0.05, delay_ms=2.0)
    peers = PeerSet(token=TOKEN, self_host="a", limits=PeerLimits(arena_bytes_min=0))
    with shards(hosts=host, placement=everywhere("shard-0", "shard-1")) as rig:
        link = FaultyLink(
            rig.view.members[0].endpoint, self_host="a", seed=seed,
            to_server=faults, to_client=faults,
        )  # fmt: skip
        faulty = Member(
            uid="shard-0", incarnation=1, role="shard", endpoint=link.endpoint(host), actor_name="-"
        )
        view = View(epoch=1, members=(faulty, rig.view.members[1]), placement=rig.view.placement)
        epoch = 1

        def forgiving(_: int) -> View:
            nonlocal epoch  # each look gives the faulty shard another chance
            epoch += 1
            return View(epoch=epoch, members=view.members, placement=view.placement)

        dispatcher = Dispatcher(
            view=view, peers=peers, combine="ordered", deadline_s=0.05, refresh_view=forgiving
        )
        answered = 0
        for step in range(60):
            batch = random_batch(6, seed=step)
            try:
                got = dispatcher.moe(0, *batch, 6)
            except (PeerLostError, DeadlineError):
                continue  # four faults in a row: an error, never a wrong row
            assert torch.equal(got, at_home(*batch, 6, 0))
            answered += 1
        assert answered >= 50 and sum(link.counts.values()) >= 5, link.counts
        peers.close()
        link.close()
