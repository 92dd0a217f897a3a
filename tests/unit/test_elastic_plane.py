"""Experts come, are checked and go while a dense rank asks: real shards, sockets and kernels."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from support.checkpoints import make_checkpoint
from support.copy_orders import order as copy_order
from support.local_cluster import Ask, DenseClient, LocalCluster

from remora.actors.expert_actor import ExpertActor
from remora.actors.expert_state import ExpertDigest
from remora.actors.launch import CopyOrder
from remora.comm.errors import ClusterError, WeightsError
from remora.comm.messages import SamplingParams
from remora.comm.view import Placement, View

PROMPTS = [(5, 9, 3, 7), (11, 2), (30, 31, 32, 33, 34)]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    """Two shards with four of eight experts each, in six slots of a layer."""
    path = make_checkpoint(tmp_path, "qwen3_moe")
    found = LocalCluster(path, num_shards=2, dtype="float32", exact=True, num_slots=6)
    yield found
    found.close()


def asks(num_tokens: int) -> list[Ask]:
    params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    return [Ask(prompt, params) for prompt in PROMPTS]


def tokens(client: DenseClient, num_tokens: int = 24) -> list[list[int]]:
    answers = client.ask(asks(num_tokens))
    assert [a.finish_reason for a in answers] == ["length"] * len(PROMPTS), answers
    return [a.token_ids for a in answers]


def pairs(cluster: LocalCluster, *experts: int) -> list[tuple[int, int]]:
    return [(layer, expert) for layer in cluster.spec.moe_layers for expert in experts]


def digests(cluster: LocalCluster) -> dict[tuple[int, int], str]:
    return {
        key: entry.digest
        for shard in cluster.shards
        for key, entry in shard.facts().manifest.by_expert().items()
    }


def order(wanted: list[tuple[int, int]], known: dict[tuple[int, int], str]) -> CopyOrder:
    """To load from the checkpoint."""
    return CopyOrder(digests={pair: known[pair] for pair in wanted})


def view_of(cluster: LocalCluster, epoch: int, **slots: tuple[int, ...]) -> View:
    """Of the shards that are named, with the same experts in every layer."""
    layers = cluster.spec.moe_layers
    names = {uid.replace("_", "-"): experts for uid, experts in slots.items()}
    placement = Placement(
        num_experts=cluster.spec.num_experts,
        moe_layers=layers,
        slots={uid: (experts,) * len(layers) for uid, experts in names.items()},
    )
    members = tuple(s.facts().member for s in cluster.shards if s.facts().member.uid in names)
    return View(epoch=epoch, members=members, placement=placement)


def test_views_change_under_streams_and_tokens_do_not(cluster: LocalCluster) -> None:
    """Copies, a third shard, a move and a retirement, each while sequences decode."""
    known = digests(cluster)
    first, second = cluster.shards
    with cluster.dense() as client:
        expected = tokens(client, 48)
        stop = threading.Event()
        seen: list[list[list[int]]] = []

        def stream() -> None:
            while not stop.is_set():
                seen.append(tokens(client, 48))

        with ThreadPoolExecutor(1) as pool:
            streaming = pool.submit(stream)
            try:
                assert first.load_experts(order(pairs(cluster, 5, 6), known)) == {
                    pair: known[pair] for pair in pairs(cluster, 5, 6)
                }
                kernels, here = first.canary(pairs(cluster, 5, 6))
                assert second.canary(pairs(cluster, 5, 6)) == (kernels, here)
                assert len(set(here.values())) == len(here), "every expert computes otherwise"
                third = view_of(cluster, 3, shard_0=(0, 1, 2, 3, 5, 6), shard_1=(4, 7))
                joiner = ExpertActor(
                    cluster.shard_launch(
                        "shard-2",
                        msgspec.structs.replace(
                            third.placement, slots={"shard-2": third.placement.slots["shard-0"]}
                        ),
                        load_idle=True,
                    )
                )
                facts = joiner.join()
                cluster.shards.append(joiner)
                assert {k: e.digest for k, e in facts.manifest.by_expert().items()} == {
                    pair: known[pair] for pair in pairs(cluster, 0, 1, 2, 3, 5, 6)
                }
                wide = view_of(
                    cluster, 2, shard_0=(0, 1, 2, 3, 5, 6), shard_1=(4, 5, 6, 7),
                    shard_2=(0, 1, 2, 3, 5, 6),
                )  # fmt: skip
                for view in (wide, third):
                    assert client.actor.offer_view(view) == view.view_hash
                    assert client.actor.adopt_view(view) == view.view_hash
                second.keep_experts({layer: (4, 7) for layer in cluster.spec.moe_layers})
                assert client.actor.status()["shards_connected"] == ["shard-0", "shard-1"]
            finally:
                stop.set()
            streaming.result(60)
        assert len(seen) >= 1 and all(found == expected for found in seen)
        assert tokens(client, 48) == expected
        assert second.status()["experts_per_layer"] == [2] * len(cluster.spec.moe_layers)


def test_load_says_what_is_wrong(cluster: LocalCluster) -> None:
    known = digests(cluster)
    first, second = cluster.shards
    with pytest.raises(ClusterError, match="no slot is free"):
        first.load_experts(order(pairs(cluster, 4, 5, 6), known))
    assert first.load_experts(order(pairs(cluster, 4), known)), "asking again is harmless"
    with pytest.raises(ClusterError, match="expert 4 is not held"):
        second.keep_experts({})
        second.canary(pairs(cluster, 4))


def test_a_slot_that_does_not_hold_what_is_written_is_not_used_again(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = digests(cluster)
    first, _ = cluster.shards
    shard = first._shard
    assert shard is not None
    layer = cluster.spec.moe_layers[0]
    packed = shard._layers[layer].packed
    export = packed.export_slot

    def damaged(slot: int) -> dict[str, torch.Tensor]:
        tensors = export(slot)
        if slot == 4:  # one bit of this slot is stuck
            tensors["down_proj"].view(torch.int32)[0, 0] ^= 1
        return tensors

    monkeypatch.setattr(packed, "export_slot", damaged)
    assert first.load_experts(order([(layer, 4)], known)) == {(layer, 4): known[layer, 4]}
    assert shard.state.slot_of(layer, 4) == 5
    assert (shard.state.free_slots(layer), shard.state.room(layer)) == ([], 5)
    with pytest.raises(ClusterError, match="no slot is free"):
        first.load_experts(order([(layer, 5)], known))
    last = cluster.spec.moe_layers[-1]
    with pytest.raises(WeightsError, match="is it another one"):
        first.load_experts(order([(last, 5)], {(last, 5): "0" * 64}))
    assert shard.state.free_slots(last) == [4, 5], "the slots are not to blame"


def test_a_copy_ends_when_it_is_told_meanwhile_what_to_keep(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its operation has been undone: what it copied would lie in its slots for good."""
    first, _ = cluster.shards
    shard = first._shard
    assert shard is not None
    fill, layers = shard.fill_slot, cluster.spec.moe_layers
    told: list[dict[int, int]] = []

    def filled(*args: Any) -> ExpertDigest:
        digest = fill(*args)
        told.append(first.keep_experts({layer: (0, 1, 2, 3) for layer in layers}))
        return digest

    monkeypatch.setattr(shard, "fill_slot", filled)
    with pytest.raises(ClusterError, match="not wanted any more"):
        first.load_experts(order(pairs(cluster, 4, 5), digests(cluster)))
    assert told == [dict.fromkeys(layers, 6)], "one copy, and the room that it found"
    assert [shard.state.free_slots(layer) for layer in layers] == [[4, 5]] * len(layers)


def test_copies_end_with_the_one_under_way_when_they_are_not_wanted_any_more(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to 32 more were taken first, at whatever share of the machine there was; what the next
    operation asked for, to leave a node say, waited for that."""
    taker, _ = cluster.shards
    shard = taker._shard
    assert shard is not None
    copy, copied, layers = shard.copy_slot, [], cluster.spec.moe_layers

    def copy_and_tell(*args: Any) -> ExpertDigest | None:
        copied.append(args)
        taker.keep_experts({layer: (0, 1, 2, 3) for layer in layers}, 1)
        return copy(*args)

    monkeypatch.setattr(shard, "copy_slot", copy_and_tell)
    with pytest.raises(ClusterError, match="not wanted any more"):
        taker.load_experts(copy_order(cluster, 1, (4, 5), "shard-1"))
    assert len(copied) == 1


def test_a_fenced_rank_is_cut_off_and_let_in_again(cluster: LocalCluster) -> None:
    first, second = cluster.shards
    with cluster.dense() as client:
        expected = tokens(client)
        second.fence(["dense-0"])
        answers = client.ask(asks(4))
        assert {a.finish_reason for a in answers} == {"error"}
        assert first.status()["peers"] == 1 and second.status()["peers"] == 0
        newer = msgspec.structs.replace(cluster.view, epoch=2)
        assert client.actor.adopt_view(newer, or_none=True) == newer.view_hash
        second.fence([])
        client.actor.adopt_view(cluster.view)  # late: it is not gone back to
        assert client.actor._engine._view.epoch == 2
        assert tokens(client) == expected


def test_a_fenced_rank_holds_its_step_until_shards_let_it_in(cluster: LocalCluster) -> None:
    """No newer view comes for it: it has the newest one, and shards hear of that later."""
    _, second = cluster.shards
    with cluster.dense(hold_s=60.0) as client:
        expected = tokens(client)
        second.fence(["dense-0"])
        newer = msgspec.structs.replace(cluster.view, epoch=2)
        with ThreadPoolExecutor(1) as pool:
            held = pool.submit(tokens, client)
            assert client.actor.adopt_view(newer, or_none=True) == newer.view_hash
            client.wait_until_held()
            assert second.status()["peers"] == 0 and not held.done()
            second.fence([])
            assert held.result(60) == expected
        assert client.actor._engine.why_not_serving is None


def test_requests_are_held_while_an_expert_is_nowhere(cluster: LocalCluster) -> None:
    """A shard dies without a replica; offers are taken in the hold; the newer view ends it."""
    _, second = cluster.shards
    with cluster.dense(hold_s=60.0) as client:
        expected = tokens(client)
        second.stop()
        with ThreadPoolExecutor(1) as pool:
            held = pool.submit(tokens, client)
            again = ExpertActor(
                cluster.shard_launch("shard-1", cluster.view.placement, incarnation=2)
            )
            cluster.shards[1] = again
            member = again.join().member
            view = msgspec.structs.replace(
                cluster.view, epoch=2, members=(cluster.view.members[0], member)
            )
            client.actor.offer_view(view)
            # nobody need wait for the step to know that it goes by no older view
            assert client.actor.adopt_view(cluster.view) == cluster.view.view_hash
            assert not held.done()
            client.actor.adopt_view(view)
            assert held.result(60) == expected
