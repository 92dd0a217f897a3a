"""Second copies in a real shard: taken, given, served without a byte moved, and given up."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.checkpoints import make_checkpoint
from support.copy_orders import held, order, source
from support.local_cluster import LocalCluster

from remora.actors import shard_slots
from remora.actors.expert_actor import ExpertActor
from remora.actors.expert_copies import CopyTaker
from remora.actors.launch import CopyOrder
from remora.comm.errors import ClusterError

LOW, HIGH = (0, 1, 2, 3), (4, 5, 6, 7)
SOON_S = 30.0


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    """Two full shards with four of eight experts each, and room for four second copies."""
    path = make_checkpoint(tmp_path, "qwen3_moe")
    found = LocalCluster(path, num_shards=2, dtype="bfloat16", exact=True, num_copies=4)
    yield found
    found.close()


def counts(actor: ExpertActor) -> tuple[int, int, int, int]:
    status = actor.status()
    keys = ("second_copies", "experts_adopted", "experts_copied", "experts_loaded")
    return tuple(status[key] for key in keys)  # type: ignore[return-value]


def serves(actor: ExpertActor) -> list[tuple[int, ...]]:
    state = held(actor).state
    return [tuple(sorted(state.experts_of(layer))) for layer in state.layers]


def test_a_second_copy_is_served_where_it_lies_and_stays_one_afterwards(
    cluster: LocalCluster,
) -> None:
    taker, giver = cluster.shards
    wanted = order(cluster, 1, HIGH)
    weights = taker.status()["weights_bytes"]
    assert taker.hold_copies(wanted) == wanted.digests
    assert counts(taker) == (8, 0, 8, 0) and serves(taker) == [LOW, LOW]
    status = taker.status()
    assert status["second_copies_bytes"] == status["weights_bytes"] == weights
    assert taker.facts().room == dict.fromkeys(cluster.spec.moe_layers, 4)
    given = giver.status()["copy_bytes_given"]
    assert taker.load_experts(wanted) == wanted.digests
    assert counts(taker) == (0, 8, 8, 0) and serves(taker) == [LOW + HIGH] * 2
    assert giver.status()["copy_bytes_given"] == given, "no byte has moved"
    assert taker.canary(list(wanted.digests)) == giver.canary(list(wanted.digests))
    taker.keep_experts(dict.fromkeys(cluster.spec.moe_layers, LOW), 1)
    assert counts(taker) == (8, 8, 8, 0) and serves(taker) == [LOW, LOW]
    assert taker.hold_copies(order(cluster, 1, (4,))).keys() == {(0, 4), (2, 4)}
    assert taker.hold_copies(CopyOrder(digests={}, term=1)) == {}
    assert counts(taker) == (0, 8, 8, 0), "what is not wanted any more is given up"


def test_who_serves_has_gone_and_a_second_copy_is_the_source(cluster: LocalCluster) -> None:
    keeper, gone = cluster.shards
    wanted = order(cluster, 1, HIGH)
    keeper.hold_copies(wanted)
    gone.stop()
    empty = msgspec.structs.replace(
        cluster.view.placement, slots={"shard-1": ((),) * len(cluster.spec.moe_layers)}
    )
    joiner = ExpertActor(
        cluster.shard_launch("shard-1", empty, incarnation=2, num_slots=4, load_idle=True)
    )
    cluster.shards[1] = joiner
    again = msgspec.structs.replace(
        wanted, replicas=dict.fromkeys(wanted.digests, ("shard-0",)), sources=(source(keeper),)
    )
    facts = joiner.join(again)
    assert {p: e.digest for p, e in facts.manifest.by_expert().items()} == wanted.digests
    assert counts(joiner) == (0, 0, 8, 0)
    assert keeper.status()["copy_bytes_given"] == joiner.status()["weights_bytes"]


def test_damaged_bytes_make_no_second_copy(cluster: LocalCluster) -> None:
    taker, giver = cluster.shards
    wanted = order(cluster, 1, HIGH)
    found = held(giver).held_memory(0, 5)
    assert found is not None
    found[1][0][3] ^= 1
    assert taker.hold_copies(wanted) == wanted.digests
    assert counts(taker) == (8, 0, 7, 1), "that one is the checkpoint's"


def test_memory_that_is_short(cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    taker = cluster.shards[0]
    wanted = order(cluster, 1, HIGH)
    free = [shard_slots.COPIES_FREE_BYTES + (1 << 30)] * 3
    monkeypatch.setattr(shard_slots, "free_memory", lambda: free.pop() if free else 0)
    assert len(taker.hold_copies(wanted)) == 3, "as far as there is memory to spare"
    free.append(shard_slots.COPIES_LEAST_BYTES)
    taker.heartbeat()
    assert counts(taker)[0] == 3
    taker.heartbeat()
    assert counts(taker)[0] == 0
    monkeypatch.undo()
    assert taker.hold_copies(wanted) == wanted.digests


def test_a_load_goes_before_second_copies(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    taker = cluster.shards[0]
    first, rest = order(cluster, 1, (4,)), order(cluster, 1, (5, 6, 7))
    take = CopyTaker.take
    begun, waits, let_go = (threading.Event() for _ in range(3))
    order_of_experts: list[int] = []

    def noted(self: CopyTaker, uid: str, pair: tuple[int, int], *args: Any) -> bool:
        order_of_experts.append(pair[1])
        begun.set()
        assert let_go.wait(SOON_S)
        return take(self, uid, pair, *args)

    monkeypatch.setattr(CopyTaker, "take", noted)

    class Told:
        """The lock that loads hold; tells when it is held."""

        def __init__(self, lock: Any) -> None:
            self.lock = lock

        def __enter__(self) -> None:
            self.lock.acquire()
            waits.set()

        def __exit__(self, *_: object) -> None:
            self.lock.release()

    copying = threading.Thread(target=taker.hold_copies, args=(rest,))
    copying.start()
    assert begun.wait(SOON_S)
    slots: Any = taker._slots
    slots._first = Told(slots._first)
    loading = threading.Thread(target=taker.load_experts, args=(first,))
    loading.start()
    assert waits.wait(SOON_S)
    let_go.set()
    for thread in (copying, loading):
        thread.join(SOON_S)
    assert order_of_experts[:4] == [5, 4, 4, 6], "the one that was under way, the load, the others"
    assert counts(taker)[0] == 6 and serves(taker) == [(*LOW, 4)] * 2


def test_a_slot_that_goes_bad_costs_a_second_copy_and_no_room(cluster: LocalCluster) -> None:
    taker = cluster.shards[0]
    taker.hold_copies(order(cluster, 1, HIGH))
    taker.keep_experts(dict.fromkeys(cluster.spec.moe_layers, (0, 1, 2)), 1)
    shard = held(taker)
    [slot] = shard.state.free_slots(0)
    digest = shard.fill_slot(0, 3, slot, shard.reader.read(0, 3))
    assert not shard.settle(slot, digest, "another digest")
    assert shard.state.room(0) == 4 and counts(taker)[0] == 7
    again = CopyOrder(digests={(0, 3): digest.digest}, term=1)
    assert taker.load_experts(again) == again.digests


def test_orders_of_a_coordinator_that_is_over_are_refused(cluster: LocalCluster) -> None:
    taker = cluster.shards[0]
    layers = cluster.spec.moe_layers
    taker.hold_copies(order(cluster, 1, HIGH, term=2))
    for stale in (
        lambda: taker.keep_experts(dict.fromkeys(layers, (0,)), 1),
        lambda: taker.load_experts(order(cluster, 1, HIGH, term=1)),
        lambda: taker.hold_copies(order(cluster, 1, (), term=1)),
        lambda: taker.fence(["dense-0"], 1),
    ):
        with pytest.raises(ClusterError, match="term 1, but that of term 2 has taken over"):
            stale()
    assert serves(taker) == [LOW, LOW] and counts(taker)[0] == 8
    assert taker.status()["fenced"] == []
    taker.keep_experts(dict.fromkeys(layers, (0,)), 2)
    assert serves(taker) == [(0,), (0,)]
