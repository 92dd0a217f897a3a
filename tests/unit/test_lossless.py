"""`exact`: the same tokens under every placement, choice of replicas, load and shuffle.

Real shards over real sockets hold every expert; views, drawn, say who is to be asked for which, and
on which host that is. Dense groups of one rank and of two, in every form of the token shuffle, stay
up and adopt one view after the other; loads of others, drawn too, push their choices about.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.checkpoints import VOCAB, make_checkpoint
from support.local_cluster import Ask, DenseClient, LocalCluster

from remora.comm.messages import SamplingParams
from remora.comm.view import Placement, View

NUM_SHARDS, NUM_EXPERTS = 3, 8
FORMS = ("none", "exact", "speculative")


def requests() -> list[Ask]:
    """Greedy and sampled ones, some with a prefix in common."""
    asks = []
    for i in range(6):
        shared = tuple(range(3, 20)) if i % 2 else ()
        prompt = (*shared, *((i * 97 + j * j * 13 + j) % VOCAB for j in range(4 + 3 * i)))
        temperature = 0.0 if i % 3 == 0 else 0.9
        params = SamplingParams(max_tokens=7, temperature=temperature, seed=i, ignore_eos=True)
        asks.append(Ask(prompt, params))
    return asks


class Rig:
    """Shards, dense groups by name, and what each request gives alone where nothing is chosen.

    A sum over two ranks rounds otherwise than one over one rank: they have answers of their own.
    """

    def __init__(self, cluster: LocalCluster, groups: Mapping[str, DenseClient]) -> None:
        self.cluster, self.groups = cluster, groups
        self.asks = requests()
        self.epoch = cluster.view.epoch
        self.expected = {}
        nowhere_else = [[{0}] * NUM_EXPERTS] * len(cluster.spec.moe_layers)
        for num_ranks, name in ((1, "one rank"), (2, "two ranks, none")):
            alone = groups[name]
            self.adopt(alone, nowhere_else, [""] * NUM_SHARDS)
            self.expected[num_ranks] = [alone.ask([ask])[0].token_ids for ask in self.asks]

    def adopt(self, group: DenseClient, holders: list[list[set[int]]], hosts: list[str]) -> None:
        """A view with these holders of each layer's experts."""
        self.epoch += 1
        slots = {
            f"shard-{s}": tuple(
                tuple(e for e in range(NUM_EXPERTS) if s in layer[e]) for layer in holders
            )
            for s in range(NUM_SHARDS)
        }
        placement = Placement(
            num_experts=NUM_EXPERTS, moe_layers=self.cluster.spec.moe_layers, slots=slots
        )
        placement.check()
        members = tuple(
            msgspec.structs.replace(m, endpoint=msgspec.structs.replace(m.endpoint, host=host))
            if host
            else m
            for m, host in zip(self.cluster.view.members, hosts, strict=True)
        )
        group.actor.adopt_view(View(epoch=self.epoch, members=members, placement=placement))


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    path: Path = make_checkpoint(tmp_path_factory.mktemp("model"), "olmoe")
    cluster = LocalCluster(
        path, num_shards=NUM_SHARDS, dtype="bfloat16", exact=True, slots=NUM_EXPERTS
    )
    with contextlib.ExitStack() as stack:
        groups = {"one rank": stack.enter_context(cluster.dense())}
        for number, form in enumerate(FORMS, 1):
            options: dict[str, Any] = {"num_ranks": 2, "token_shuffle": form}
            dense = cluster.dense(uid=f"dense-{number}", **options)
            groups[f"two ranks, {form}"] = stack.enter_context(dense)
        yield Rig(cluster, groups)
    cluster.close()


def test_answers_differ_from_each_other(rig: Rig) -> None:
    """Else equality below would prove nothing."""
    for expected in rig.expected.values():
        assert len({tuple(tokens) for tokens in expected}) == len(rig.asks)


holders = st.sets(st.integers(0, NUM_SHARDS - 1), min_size=1)
layers = st.lists(holders, min_size=NUM_EXPERTS, max_size=NUM_EXPERTS)
loads = st.lists(st.sampled_from([0, 40, 4000]), min_size=NUM_SHARDS, max_size=NUM_SHARDS)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_placement_choice_or_shuffle_changes_a_token(rig: Rig, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(list(rig.groups)), label="dense group")
    group, num_layers = rig.groups[name], len(rig.cluster.spec.moe_layers)
    placement = data.draw(
        st.lists(layers, min_size=num_layers, max_size=num_layers), label="placement"
    )
    hosts = data.draw(
        st.lists(st.sampled_from(["", "b", "c"]), min_size=NUM_SHARDS, max_size=NUM_SHARDS),
        label="hosts",
    )
    rig.adopt(group, placement, hosts)
    others_LS = np.array([data.draw(loads, label="others")] * num_layers)
    actor = group.actor
    assert actor._engine is not None and actor._dispatcher is not None
    dispatcher = actor._dispatcher
    actor._engine.between_steps(lambda: dispatcher.note_others(others_LS, 2))
    answers = group.ask(rig.asks)
    assert [answer.token_ids for answer in answers] == rig.expected[1 + len(group.others)]
    asked = {s for s in range(NUM_SHARDS) if dispatcher.counters.link(f"shard-{s}").sent_pairs}
    assert asked, "shards are asked"


def test_loads_do_move_the_choice(rig: Rig) -> None:
    """Else the property above would not have tried anything."""
    group = rig.groups["one rank"]
    everywhere = [[set(range(NUM_SHARDS))] * NUM_EXPERTS] * len(rig.cluster.spec.moe_layers)
    sent = []
    for busy in range(2):
        rig.adopt(group, everywhere, [""] * NUM_SHARDS)
        actor = group.actor
        assert actor._engine is not None and actor._dispatcher is not None
        dispatcher = actor._dispatcher
        others_LS = np.zeros((len(everywhere), NUM_SHARDS), np.int64)
        others_LS[:, busy] = 100_000
        actor._engine.between_steps(lambda d=dispatcher, o=others_LS: d.note_others(o, 2))
        dispatcher.take_sent()
        group.ask(rig.asks)
        sent.append(dispatcher.take_sent().sum(axis=0).tolist())
    assert sent[0][0] == sent[1][1] == 0 and sent[0][1] > 0 and sent[1][0] > 0
