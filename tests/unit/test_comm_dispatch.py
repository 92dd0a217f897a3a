"""Dispatch and combine over real sockets, against computing every expert at home."""

import queue
from collections.abc import Callable, Iterator

import pytest
import torch
from support.comm_rig import (
    TOKEN,
    at_home,
    close_enough,
    everywhere,
    random_batch,
    shards,
    toy_compute,
)
from torch import Tensor

from remora.comm.accounting import expected_call_bytes
from remora.comm.dispatch import Combine, Dispatcher
from remora.comm.expert_protocol import ExpertCall
from remora.comm.peer import PeerLimits
from remora.comm.peers import PeerSet

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
pytestmark = pytest.mark.usefixtures("plane")
MODES = pytest.mark.parametrize("mode", ["ordered", "presummed"])


@pytest.fixture
def peers() -> Iterator[PeerSet]:
    peers = PeerSet(token=TOKEN, self_host="a", limits=PeerLimits(region_bytes=1 << 20))
    yield peers
    peers.close()


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
        dispatcher.moe(0, *random_batch(5), 5)
        assert dispatcher.counters.link("shard-0").sent_frames == 0
        assert dispatcher.counters.link("shard-1").sent_rows == 5
        dispatcher.moe(0, *random_batch(100), 100)  # all of it here would be twice the mean
        sent = [dispatcher.counters.link(uid).sent_rows for uid in ("shard-0", "shard-1")]
        assert sum(sent) == 105 and 0 < sent[0] < sent[1]


def test_the_requester_may_work_between_dispatch_and_combine(peers: PeerSet) -> None:
    with shards() as rig:
        dispatcher = Dispatcher(view=rig.view, peers=peers, combine="ordered")
        batch = random_batch(30)
        sent = [dispatcher.dispatch(layer, *batch, 30) for layer in (0, 2)]
        for layer, each in zip((2, 0), reversed(sent), strict=True):
            assert torch.equal(dispatcher.combine(each), at_home(*batch, 30, layer))


@MODES
def test_bodies_between_hosts_without_checksums(mode: Combine) -> None:
    """The requester chooses; the shard's answers follow it."""
    limits = PeerLimits(checksums=False)
    peers = PeerSet(token=TOKEN, self_host="a", limits=limits)
    with shards(hosts="bb") as rig:
        dispatcher = Dispatcher(view=rig.view, peers=peers, combine=mode)
        batch = random_batch(50)
        assert close_enough(dispatcher.moe(0, *batch, 50), at_home(*batch, 50, 0), mode)
    peers.close()
