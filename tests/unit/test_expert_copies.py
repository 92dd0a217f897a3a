"""Experts copied from a replica's memory: real shards and sockets, sources that lie and vanish."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.checkpoints import make_checkpoint
from support.copy_orders import held, order
from support.local_cluster import TOKEN, LocalCluster

from remora.actors import shard_slots
from remora.actors.copy_pace import Pace
from remora.actors.expert_actor import ExpertActor
from remora.comm.copies import PART_BYTES_MAX, CopyRefusedError, CopyService, CopySource, Part
from remora.comm.errors import AuthError, ClusterError, PeerLostError
from remora.comm.server import FrameServer
from remora.kernels.experts_dtype import ExpertsDtype

Pair = tuple[int, int]


@pytest.fixture(params=["float32", "bfloat16", "int8", "int4"])
def cluster(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[LocalCluster]:
    """Two shards with four of eight experts each, in eight slots of a layer."""
    path = make_checkpoint(tmp_path, "qwen3_moe")
    held: ExpertsDtype = request.param if request.param in ("int8", "int4") else "auto"
    dtype = request.param if held == "auto" else "bfloat16"
    found = LocalCluster(
        path, num_shards=2, dtype=dtype, exact=True, num_slots=8, experts_dtype=held
    )
    yield found
    found.close()


def counts(actor: ExpertActor) -> tuple[int, int]:
    status = actor.status()
    return status["experts_copied"], status["experts_loaded"]


def test_a_copy_is_the_replica_bit_for_bit(cluster: LocalCluster) -> None:
    taker, giver = cluster.shards
    wanted = order(cluster, 1, (5, 6), "shard-1")
    assert taker.load_experts(wanted) == wanted.digests
    assert counts(taker) == (len(wanted.digests), 0)
    for layer, expert in wanted.digests:
        here, there = held(taker).held_memory(layer, expert), held(giver).held_memory(layer, expert)
        assert here is not None and here == there
    given = giver.status()["copy_bytes_given"]
    assert given == sum(held(giver).nbytes_of(layer) for layer, _ in wanted.digests)
    kernels, here_out = taker.canary(list(wanted.digests))
    assert giver.canary(list(wanted.digests)) == (kernels, here_out)


def test_canaries_of_a_layer_are_those_of_each_expert(cluster: LocalCluster) -> None:
    shard = cluster.shards[0]
    pairs = list(order(cluster, 0, (0, 1, 2, 3)).digests)
    _, together = shard.canary(pairs)
    apart: dict[Pair, str] = {}
    for pair in pairs:
        apart |= shard.canary([pair])[1]
    assert together == apart and len(set(apart.values())) == len(pairs)
    with pytest.raises(ClusterError, match="not held"):
        shard.canary([*pairs, (0, 4)])


def test_the_serving_thread_is_asked_once_for_many_copies(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    taker, wanted = cluster.shards[0], order(cluster, 1, (4, 5, 6, 7))
    slots = taker._slots
    assert slots is not None
    asked: list[object] = []
    between_calls = slots.between_calls

    def counted(work: Callable[[], Any]) -> Any:
        asked.append(work)
        return between_calls(work)

    monkeypatch.setattr(slots, "between_calls", counted)
    monkeypatch.setattr(shard_slots, "SETTLED_TOGETHER", 3)
    assert taker.load_experts(wanted) == wanted.digests
    assert counts(taker) == (8, 0)
    assert len(asked) == 1 + 3, "whether the coordinator is obeyed; 3 copies, 3, 2"


def test_who_yields_rests_after_its_work(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    taker = cluster.shards[0]
    rests: list[tuple[float, float]] = []
    monkeypatch.setattr(Pace, "rest", lambda pace, s: rests.append((s, pace.share)))
    first, rest = order(cluster, 1, (5,)), order(cluster, 1, (6, 7))
    taker.load_experts(first)
    assert rests == [], "it takes all there is"
    taker.load_experts(msgspec.structs.replace(rest, share=1e-3))
    assert len(rests) >= len(rest.digests) - 1
    assert all(worked_s > 0 and share == 1e-3 for worked_s, share in rests)
    taker.set_copy_share(1.0)
    taker.keep_experts({}, 1)
    rests.clear()
    taker.load_experts(msgspec.structs.replace(rest, share=1.0))
    assert rests == []


def test_a_joiner_takes_what_it_is_to_hold_from_replicas(cluster: LocalCluster) -> None:
    empty = msgspec.structs.replace(
        cluster.view.placement, slots={"shard-2": ((),) * len(cluster.spec.moe_layers)}
    )
    joiner = ExpertActor(cluster.shard_launch("shard-2", empty, load_idle=True))
    cluster.shards.append(joiner)
    wanted = order(cluster, 1, (4, 7), "shard-1")
    facts = joiner.join(wanted)
    found = {p: e.digest for p, e in facts.manifest.by_expert().items()}
    assert found == wanted.digests
    assert counts(joiner) == (len(wanted.digests), 0)


@pytest.mark.parametrize("how", ["unknown", "not held", "gone", "fenced", "other layout"])
def test_the_next_source_is_taken_when_one_does_not_give(
    cluster: LocalCluster, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the end the checkpoint."""
    taker, giver = cluster.shards
    wanted = order(cluster, 1, (5,), "shard-9", "shard-1") if how == "unknown" else None
    wanted = wanted or order(cluster, 1, (5,), "shard-1")
    expected = (0, len(wanted.digests))
    if how == "unknown":  # a shard whose address nobody knows is passed over
        expected = (len(wanted.digests), 0)
    elif how == "not held":
        giver.keep_experts({})
    elif how == "gone":
        assert giver._copies is not None
        giver._copies.close()
    elif how == "fenced":  # the address is another life's by now
        old = msgspec.structs.replace(wanted.sources[0], incarnation=7)
        wanted = msgspec.structs.replace(wanted, sources=(old,))
    else:
        for layer in held(giver)._layers.values():
            monkeypatch.setattr(layer.packed, "slot_layout", lambda: "of another machine")
    assert taker.load_experts(wanted) == wanted.digests
    assert counts(taker) == expected


def test_bytes_that_are_not_the_expert_are_never_served(cluster: LocalCluster) -> None:
    taker, giver = cluster.shards
    wanted = order(cluster, 1, (5,), "shard-1")
    first = next(iter(wanted.digests))
    found = held(giver).held_memory(*first)
    assert found is not None
    found[1][0][3] ^= 1  # one bit of the replica's memory
    assert taker.load_experts(wanted) == wanted.digests
    assert counts(taker) == (len(wanted.digests) - 1, 1)
    assert held(taker).state.room(first[0]) == 8, "the slot is not to blame"


def test_a_source_that_vanishes_half_way(cluster: LocalCluster) -> None:
    taker, giver = cluster.shards
    wanted = order(cluster, 1, (4, 5, 6, 7), "shard-1")
    assert giver._copies is not None
    service, server = giver._copies.service, giver._copies._server
    read, asked = service._read, []

    def vanishing(part: Part) -> Sequence[memoryview]:
        asked.append(part)
        if len(asked) == 3:
            server.stop()
        return read(part)

    service._read = vanishing
    assert taker.load_experts(wanted) == wanted.digests
    copied, loaded = counts(taker)
    assert copied + loaded == len(wanted.digests) and copied >= 1 and loaded >= 1


class Rig:
    """A source of copies of 3 MB over TCP, whose bytes are checked."""

    def __init__(self) -> None:
        self.data = bytes(range(256)) * 12_000
        self.service = CopyService(self._read)
        self.server = FrameServer(
            host_ip="127.0.0.1", token=TOKEN, on_frame=self.service.on_frame, unix=False,
            incarnation=3,
        )  # fmt: skip
        self.server.start()

    def _read(self, part: Part) -> list[memoryview]:
        if part.layout != "L":
            raise CopyRefusedError("another layout")
        return [memoryview(self.data)[part.offset : part.offset + part.size_bytes]]

    def connect(self, token: bytes = TOKEN, incarnation: int = 3) -> CopySource:
        return CopySource(self.server.endpoint("there"), token, "here", "taker", incarnation)


@pytest.fixture
def rig() -> Iterator[Rig]:
    found = Rig()
    yield found
    found.server.close()


def test_parts_over_tcp_make_the_whole(rig: Rig) -> None:
    peer = rig.connect()
    first, second = bytearray(PART_BYTES_MAX + 7), bytearray(1_500_000)
    taken: list[int] = []
    peer.read_into(1, 2, "L", [memoryview(first), memoryview(second)], taken.append)
    assert bytes(first + second) == rig.data[: len(first) + len(second)]
    assert max(taken) == PART_BYTES_MAX and sum(taken) == len(first) + len(second)
    assert rig.service.bytes_sent == sum(taken)
    with pytest.raises(CopyRefusedError, match="another layout"):
        peer.read_into(1, 2, "M", [memoryview(first)])
    peer.read_into(1, 2, "L", [memoryview(first)])
    assert first[:9] == rig.data[:9], "a refusal leaves the connection as it was"
    peer.close()


def test_strangers_and_the_dead_are_no_sources(rig: Rig) -> None:
    with pytest.raises(AuthError):
        rig.connect(token=b"the token of another cluster....")
    peer = rig.connect(incarnation=4)
    with pytest.raises(PeerLostError, match="incarnation 3"):
        peer.read_into(1, 2, "L", [memoryview(bytearray(8))])
    peer.close()
    peer = rig.connect()
    rig.server.close()
    with pytest.raises(PeerLostError):
        peer.read_into(1, 2, "L", [memoryview(bytearray(8))])
    peer.close()


def test_frames_that_no_asker_sends_close_the_connection(rig: Rig) -> None:
    for part in (Part(1, 2, "L", 0, PART_BYTES_MAX + 1), Part(1, 2, "L", -1, 8)):
        peer = rig.connect()
        with pytest.raises(PeerLostError):
            peer._one(part, [memoryview(bytearray(8))])
        peer.close()
