"""The native client against the Python path: same bits, same counters, and clean hand-overs."""

import queue
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.comm_rig import (
    TOKEN,
    WAIT_S,
    Shards,
    answer,
    at_home,
    close_enough,
    counted,
    everywhere,
    member,
    random_batch,
    serving,
    shards,
)

from remora.comm import native
from remora.comm.connection import Connection, Frame
from remora.comm.dispatch import Combine, Dispatcher
from remora.comm.errors import DeadlineError, PeerLostError
from remora.comm.peer import PeerLimits
from remora.comm.peers import PeerSet
from remora.comm.server import ServerLimits
from remora.comm.view import Placement, View, contiguous_placement
from remora.comm.wire import HEADER_BYTES, Kind

pytestmark = pytest.mark.skipif(native.native_extension() is None, reason="not built")
MODES = pytest.mark.parametrize("mode", ["ordered", "presummed"])
HOSTS = pytest.mark.parametrize("host", ["a", "b"], ids=["unix", "tcp"])


def python_is_not_asked(dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test when a layer reaches the Python path."""

    def fail(*_: Any) -> None:
        raise AssertionError("the Python path was asked")

    monkeypatch.setattr(dispatcher._python, "begin", fail)
    monkeypatch.setattr(dispatcher._python, "finish", fail)


@settings(max_examples=200)
@given(data=st.binary(max_size=700), cut=st.integers(0, 63))
def test_crc_is_zlibs(data: bytes, cut: int) -> None:
    assert native.native_extension().crc32(data[cut:]) == zlib.crc32(data[cut:])


@pytest.fixture(scope="module")
def rigs() -> Iterator[dict[str, Shards]]:
    """Three shards on two hosts: every expert once, twice or thrice."""
    uids = tuple(f"shard-{i}" for i in range(3))
    single = contiguous_placement(num_experts=16, moe_layers=(0, 2), shard_uids=uids)
    some = {"shard-0": range(12), "shard-1": range(6, 16), "shard-2": (0, 3, 7, 15)}
    mixed = Placement(
        num_experts=16, moe_layers=(0, 2), slots={u: (tuple(e),) * 2 for u, e in some.items()}
    )
    with (
        shards(num_shards=3, hosts="aab", placement=single) as one,
        shards(num_shards=3, hosts="aab", placement=mixed) as two,
        shards(num_shards=3, hosts="aab", placement=everywhere(*uids)) as three,
    ):
        yield {"single": one, "mixed": two, "everywhere": three}


@MODES
@pytest.mark.parametrize("placement", ["single", "mixed", "everywhere"])
def test_same_bits_and_counters_as_python(
    rigs: dict[str, Shards], mode: Combine, placement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both route alike, too: what each shard heard is the same, frame by frame."""
    limits = PeerLimits(region_bytes=1 << 17, arena_bytes_min=4096)
    sets = [PeerSet(token=TOKEN, self_host="a", limits=limits) for _ in range(2)]
    pair = [
        Dispatcher(
            view=rigs[placement].view, peers=peers, combine=mode, rows_per_call_max=40, native=on
        )
        for peers, on in zip(sets, (True, False), strict=True)
    ]
    python_is_not_asked(pair[0], monkeypatch)
    for seed in range(24):
        num_rows = (1, 2, 8, 60)[seed % 4]
        padding, width = (0, 3)[seed % 2], (64, 64, 63)[seed % 3]
        dtype = (torch.float32, torch.bfloat16)[seed % 5 == 0]
        hidden_TD, index_TK, weights_TK = random_batch(
            num_rows + padding, width=width, dtype=dtype, seed=seed, top_k=1 + seed % 6
        )
        if seed % 7 == 3:
            index_TK[0] = -1
        weights_TK = weights_TK.to((torch.float32, torch.bfloat16)[seed % 3 == 1])
        got, twin = (d.moe(2 * (seed % 2), hidden_TD, index_TK, weights_TK, num_rows) for d in pair)
        assert torch.equal(got, twin), seed
        assert not got[num_rows:].any()
    for uid in pair[0].view.placement.slots:
        ours, twins = (counted(d.counters.link(uid)) for d in pair)
        assert ours == twins
    assert pair[0].counters.total().sent_frames >= 24
    for peers in sets:
        peers.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_not_a_number_and_infinities_come_through(
    rigs: dict[str, Shards], dtype: torch.dtype
) -> None:
    peers = PeerSet(token=TOKEN, self_host="a")
    dispatcher = Dispatcher(view=rigs["single"].view, peers=peers, combine="ordered")
    hidden_TD, index_TK, weights_TK = random_batch(4, dtype=dtype)
    hidden_TD[0, :5] = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38, -0.0])
    got = dispatcher.moe(0, hidden_TD, index_TK, weights_TK, 4)
    expected = at_home(hidden_TD, index_TK, weights_TK, 4, 0)
    assert torch.equal(got.isnan(), expected.isnan()) and got[0, 0].isnan()
    assert torch.equal(got.nan_to_num(), expected.nan_to_num())
    peers.close()


@HOSTS
def test_prefill_in_slices_is_native(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several calls a shard, as many as there are credits, answered in order."""
    with shards(hosts=host) as rig:
        peers = PeerSet(token=TOKEN, self_host="a")
        dispatcher = Dispatcher(
            view=rig.view, peers=peers, combine="presummed", rows_per_call_max=128
        )
        python_is_not_asked(dispatcher, monkeypatch)
        batch = random_batch(500)
        got = dispatcher.moe(0, *batch, 500)
        assert torch.allclose(got, at_home(*batch, 500, 0), rtol=2e-6, atol=2e-6)
        assert dispatcher.counters.link("shard-0").sent_frames == 4
        peers.close()


@pytest.mark.parametrize(("mode", "rows_max"), [("ordered", 63), ("presummed", 215)])
def test_calls_and_answers_fit_the_frames_that_shards_grant(
    mode: Combine, rows_max: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A region would hold more, and more rows are allowed; both twins cut alike."""
    batch, heard = random_batch(300), []
    with shards(num_shards=1, limits=ServerLimits(frame_bytes_max=1 << 16)) as rig:
        for on in (True, False):
            peers = PeerSet(token=TOKEN, self_host="a", limits=PeerLimits(num_regions=5))
            dispatcher = Dispatcher(view=rig.view, peers=peers, combine=mode, native=on)
            if on:
                python_is_not_asked(dispatcher, monkeypatch)
            got = dispatcher.moe(0, *batch, 300)
            assert close_enough(got, at_home(*batch, 300, 0), mode)
            heard.append(counted(dispatcher.counters.link("shard-0")))
            peers.close()
    assert heard[0] == heard[1]
    assert heard[0]["sent_frames"] == -(-300 // rows_max)


def test_phases_are_counted(rigs: dict[str, Shards]) -> None:
    for on in (True, False):
        peers = PeerSet(token=TOKEN, self_host="a")
        dispatcher = Dispatcher(view=rigs["single"].view, peers=peers, combine="ordered", native=on)
        assert set(dispatcher.phases().values()) == {0}
        for _ in range(3):
            dispatcher.moe(0, *random_batch(60), 60)
        phases = dispatcher.phases()
        assert phases["layers"] == 3 and min(phases.values()) > 0
        peers.close()


def test_two_phases_are_native_and_two_at_once_are_handed_over(
    rigs: dict[str, Shards], monkeypatch: pytest.MonkeyPatch
) -> None:
    peers = PeerSet(token=TOKEN, self_host="a")
    dispatcher = Dispatcher(view=rigs["mixed"].view, peers=peers, combine="ordered")
    batch = random_batch(30)
    with monkeypatch.context() as patch:
        python_is_not_asked(dispatcher, patch)
        for layer in (0, 2):
            sent = dispatcher.dispatch(layer, *batch, 30)
            assert torch.equal(dispatcher.combine(sent), at_home(*batch, 30, layer))
    first = dispatcher.dispatch(0, *batch, 30)
    second = dispatcher.moe(2, *batch, 30)  # another one while the first is under way
    assert torch.equal(second, at_home(*batch, 30, 2))
    assert torch.equal(dispatcher.combine(first), at_home(*batch, 30, 0))
    with monkeypatch.context() as patch:  # and it is settled again
        python_is_not_asked(dispatcher, patch)
        assert torch.equal(dispatcher.moe(0, *batch, 30), at_home(*batch, 30, 0))
    assert all(len(peers.peer(u).free_regions) == 4 for u in peers.live_uids)
    peers.close()


class Shard:
    """A shard that answers as a test tells it to."""

    def __init__(self) -> None:
        self.answers: queue.Queue[Any] = queue.Queue()

    def on_frame(self, connection: Connection, frame: Frame) -> None:
        connection.outstanding -= 1
        make = self.answers.get(timeout=WAIT_S)
        for part in make(frame):
            assert connection.transmit(part, 0, 0)


def one_shard(endpoint: Any, host: str, **options: Any) -> tuple[PeerSet, Dispatcher]:
    limits = PeerLimits(region_bytes=8 << 20, arena_bytes_min=1 << 30, num_regions=2)
    peers = PeerSet(token=TOKEN, self_host=host, limits=limits)
    view = View(epoch=1, members=(member(endpoint),), placement=everywhere("shard-0"))
    return peers, Dispatcher(view=view, peers=peers, combine="presummed", **options)


@HOSTS
@pytest.mark.parametrize("num_rows", [3, 3000], ids=["small", "large"])
def test_stale_and_foreign_answers_are_dropped_like_in_python(host: str, num_rows: int) -> None:
    """Before, behind and in the middle of the right ones; small and beyond a receive memory."""
    shard = Shard()
    with serving(shard.on_frame) as (server, _):
        heard = []
        for on in (True, False):
            peers, dispatcher = one_shard(
                server.endpoint("a"), host, native=on, rows_per_call_max=4000
            )
            batch = random_batch(num_rows)
            noises = [
                lambda f: [answer(f, sequence=10**9), answer(f)],
                lambda f: [answer(f, incarnation=2), answer(f)],
                lambda f: [answer(f), answer(f)],
                lambda f: [answer(f)],
                lambda f: [answer(f, sequence=10**9, body=bytes(2 << 20)), answer(f)],
                lambda f: [answer(f)],
            ]  # fmt: skip
            for noise in noises:
                shard.answers.put(noise)
                assert torch.equal(dispatcher.moe(0, *batch, num_rows), torch.ones(num_rows, 64))
            heard.append(counted(peers.counters.link("shard-0")))
            assert heard[-1]["stale_replies"] == 4
            peers.close()
        assert heard[0] == heard[1]


@HOSTS
@pytest.mark.parametrize(
    "case", ["wrong rows", "no answer kind", "too long", "garbage", "damaged body", "cut"]
)
def test_answers_that_cannot_be_end_the_connection(host: str, case: str) -> None:
    """As in Python: the connection is lost, the error says why, and the next layer connects."""
    made = {
        "wrong rows": lambda f: [answer(f, num_rows=4)],
        "no answer kind": lambda f: [answer(f, kind=int(Kind.DISPATCH))],
        "too long": lambda f: [answer(f, body=bytes(1 << 20))],
        "garbage": lambda f: [b"garbage " * 300],
        "damaged body": lambda f: [answer(f)[:-1] + b"\x01"],
        "cut": lambda f: [answer(f)[:100], _close(server)],
    }[case]
    if case == "damaged body" and host == "a":
        pytest.skip("Unix sockets do not checksum bodies")
    shard, outcomes = Shard(), []
    with serving(shard.on_frame) as (server, _):
        for on in (True, False):
            peers, dispatcher = one_shard(server.endpoint("a"), host, native=on)
            batch = random_batch(3)
            for _ in range(4):
                shard.answers.put(made)
            with pytest.raises(Exception) as caught:
                dispatcher.moe(0, *batch, 3)
            while not shard.answers.empty():
                shard.answers.get()
            shard.answers.put(lambda f: [answer(f)])
            assert torch.equal(dispatcher.moe(0, *batch, 3), torch.ones(3, 64))
            outcomes.append((type(caught.value), counted(peers.counters.link("shard-0"))))
            peers.close()
    assert outcomes[0] == outcomes[1]


def _close(server: Any) -> bytes:
    for connection in server.connections:
        connection.sock.shutdown(2)
    return b""


@HOSTS
@pytest.mark.parametrize("received", [0, 10, HEADER_BYTES, 500_000])
def test_a_deadline_in_the_middle_of_an_answer(host: str, received: int) -> None:
    """The rest comes late: dropped, counted, its credit back, and no byte of it is misread."""
    rows = 3000
    shard, parts = Shard(), []
    with serving(shard.on_frame) as (server, _):
        peers, dispatcher = one_shard(
            server.endpoint("a"), host, deadline_s=0.1, rows_per_call_max=4000
        )
        batch = random_batch(rows)

        def cut(frame: Frame) -> list[bytes]:
            parts.append(answer(frame)[received:])
            return [answer(frame)[:received]] if received else []

        shard.answers.put(cut)
        with pytest.raises(DeadlineError, match=r"shard-0 did not answer within 0.1 s"):
            dispatcher.moe(0, *batch, rows)
        link = peers.counters.link("shard-0")
        assert (link.deadlines, link.late_replies) == (1, 0)
        [connection] = server.connections
        assert connection.transmit(parts[0], 0, 0)
        patient = Dispatcher(view=dispatcher.view, peers=peers, combine="presummed",
                             rows_per_call_max=4000)  # fmt: skip
        for _ in range(5):
            shard.answers.put(lambda f: [answer(f)])
            assert torch.equal(patient.moe(0, *batch, rows), torch.ones(rows, 64))
        assert (link.deadlines, link.late_replies) == (1, 1)
        assert len(peers.peer("shard-0").free_regions) == 2
        peers.close()


def test_a_peer_that_stops_reading_is_a_deadline(rigs: dict[str, Shards]) -> None:
    """More than a socket takes: the rest of the call waits in the Python path, and is sent."""
    shard = Shard()
    with serving(shard.on_frame) as (server, _):
        peers, dispatcher = one_shard(server.endpoint("a"), "b", deadline_s=0.2,
                                      rows_per_call_max=20_000)  # fmt: skip
        batch = random_batch(16_000)  # 4 MB, and its answer
        for _ in range(2):  # over a region: two calls
            shard.answers.put(lambda f: [])
        with pytest.raises(DeadlineError):
            dispatcher.moe(0, *batch, 16_000)
        peers.close()


def test_a_lost_peer_is_not_chosen_and_is_connected_again(rigs: dict[str, Shards]) -> None:
    peers = PeerSet(token=TOKEN, self_host="a")
    dispatcher = Dispatcher(view=rigs["everywhere"].view, peers=peers, combine="ordered")
    batch = random_batch(20)
    for uid in ("shard-0", "shard-1", "shard-2"):
        dispatcher.moe(0, *batch, 20)
        peers.peer(uid).lose("cut by the test")
        assert torch.equal(dispatcher.moe(0, *batch, 20), at_home(*batch, 20, 0))
    peers.disconnect("shard-0")
    with pytest.raises(PeerLostError):
        peers.peer("shard-0")
    assert torch.equal(dispatcher.moe(0, *batch, 20), at_home(*batch, 20, 0))
    peers.close()
