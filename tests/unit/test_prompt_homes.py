"""From routed tokens to the home of a prompt: samples, chances of hits, router, labels of domains.

Shape suffixes: L MoE layers, T tokens, K top-k, S shards, E experts, H hosts.
"""

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.router_rig import TOKEN, channel_to, running_router, view_of, wait_for
from support.router_traffic import sketch_of

from remora.actors.router_state import Prompt, RouteAsked, RouterState, ViewAdopted
from remora.actors.router_statistics import RouterStatistics
from remora.comm import router_pb2
from remora.comm.errors import ClusterError, FrameError
from remora.comm.grpc_base import unary_call
from remora.comm.predict import SCALE, Predictor
from remora.comm.prompt_copies import prompt_copies
from remora.comm.router_grpc import REPORT, ROUTE, credentials_of
from remora.comm.routing_counter import SAMPLE_RUN_MAX, RoutingCounter, Run
from remora.comm.sketch import RoutingSketch, TokenSample, decode_sketch, encode_sketch
from remora.comm.statistics import RoutingHistory
from remora.comm.topology import Topology, placement_from

LAYERS = (1, 2)


def counter() -> RoutingCounter:
    return RoutingCounter(num_experts=8, top_k=2, moe_layers=LAYERS)


def family_tokens(family: int, num_tokens: int, seed: int) -> tuple[list[int], np.ndarray]:
    """Ids of a family, and its experts: 0 to 3, or 4 to 7, in every layer."""
    rng = np.random.default_rng(seed)
    token_ids = (100 * (1 + family) + rng.integers(0, 20, num_tokens)).tolist()
    draw = rng.random((len(LAYERS), num_tokens, 4)).argsort(axis=2)[:, :, :2]
    return token_ids, draw + 4 * family


def family_sketch(
    family: int, num_tokens: int = 400, seed: int = 0, label: str | None = None
) -> RoutingSketch:
    one = counter()
    token_ids, ids_LTK = family_tokens(family, num_tokens, seed)
    for begin in range(0, num_tokens, SAMPLE_RUN_MAX):
        part = token_ids[begin : begin + SAMPLE_RUN_MAX]
        rows_LTK = ids_LTK[:, begin : begin + len(part)]
        one.count(rows_LTK, [Run(begin, 0, len(part), 0, part, label)])
    return decode_sketch(encode_sketch(one.take("a" if family == 0 else "b")))


# -- samples ----------------------------------------------------------------------------------


def test_a_sample_is_tokens_with_their_experts_in_order_of_ids() -> None:
    token_ids, ids_LTK = family_tokens(1, 50, seed=3)
    ids_LTK[1, 7, 1] = -1
    one = counter()
    one.count(ids_LTK, [Run(0, 0, 30, 0, token_ids[:30]), Run(1, 1, 20, 0, token_ids[30:])])
    sample = decode_sketch(encode_sketch(one.take("a"))).sample
    assert sample is not None
    found = sample.token_N().tolist()
    assert found == sorted(token_ids)
    experts_LNK = sample.experts_LNK(2, 2)
    given_ = sorted((i, ids_LTK[:, t].tolist()) for t, i in enumerate(token_ids))
    taken = sorted((i, experts_LNK[:, n].tolist()) for n, i in enumerate(found))
    assert taken == given_
    assert one.take("a").sample is None, "each token once"


def test_a_sample_is_bounded_and_then_no_ids_are_wanted() -> None:
    one = RoutingCounter(num_experts=8, top_k=2, moe_layers=LAYERS, bytes_max=1 << 14)
    room = (1 << 14) // 8 // 12
    token_ids, ids_LTK = family_tokens(0, 3 * SAMPLE_RUN_MAX, seed=0)
    assert one.wants_tokens
    one.count(ids_LTK, [Run(0, 0, len(token_ids), 0, token_ids)])
    assert not one.wants_tokens
    data = encode_sketch(one.take("a"))
    sample = decode_sketch(data).sample
    assert sample is not None and len(sample.token_N()) == min(room, SAMPLE_RUN_MAX)
    assert len(data) <= 1 << 14
    assert one.wants_tokens


Change = Callable[[TokenSample], TokenSample]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda s: msgspec.structs.replace(s, token_ids=s.token_ids[:-1]), "bytes of token ids"),
        (lambda s: msgspec.structs.replace(s, experts=s.experts[:-2]), "are due"),
        (lambda s: msgspec.structs.replace(s, experts=b"\x08\0" + s.experts[2:]), "out of range"),
    ],
    ids=["ids", "experts", "range"],
)
def test_samples_that_lie_are_refused(change: Change, complaint: str) -> None:
    sketch = family_sketch(0)
    assert sketch.sample is not None
    lie = msgspec.structs.replace(sketch, sample=change(sketch.sample))
    with pytest.raises(FrameError, match=complaint):
        decode_sketch(encode_sketch(lie))


# -- chances of hits --------------------------------------------------------------------------


@given(st.integers(0, 99), st.integers(1, 12))
def test_copies_of_a_prompt_against_loops(seed: int, num_tokens: int) -> None:
    rng = np.random.default_rng(seed)
    score_LVE = rng.integers(-200, SCALE + 200, (2, 5, 6)).astype(np.int16)
    held_L = []
    for _ in LAYERS:
        held_SE = rng.random((4, 6)) < 0.4
        held_SE[rng.integers(0, 4, 6), np.arange(6)] = True
        held_L.append(held_SE)
    topology = Topology(
        uids=("s0", "s1", "s2", "s3"), hosts=("a", "b", "c"), host_of_S=(0, 1, 1, 0),
        slots_S=(6,) * 4,
    )  # fmt: skip
    square = np.zeros((2, 6, 6), np.int16)
    predictor = Predictor(top_k=2, token_LVE=score_LVE, near_LEE=square, far_LEE=square)
    placement = placement_from(held_L, uids=topology.uids, moe_layers=LAYERS)
    table = prompt_copies(predictor, placement, topology)
    token_ids = rng.integers(0, 40, num_tokens).tolist()
    copies = [0.0] * 3
    for token in token_ids:
        for layer in range(2):
            for home in range(3):
                for host in {0, 1, 2} - {home}:
                    missed = 1.0
                    for expert in range(6):
                        shards = np.flatnonzero(held_L[layer][:, expert])
                        if any(topology.host_of_S[s] == host for s in shards):
                            chance = score_LVE[layer, token % 5, expert] / SCALE
                            missed *= 1 - min(max(chance, 0), 1)
                    copies[home] += (1 - missed) / 2 / num_tokens
    assert table.of(token_ids).tolist() == pytest.approx(copies, abs=1e-4)


# -- the router -------------------------------------------------------------------------------


def test_prompts_go_where_their_experts_are() -> None:
    """Contiguous runs: experts of family 0 are on host a, those of family 1 on host b."""
    statistics = RouterStatistics(slots=None, path=None)
    view = view_of()
    assert not statistics.homes_are_due(is_new_view=True)
    with pytest.raises(ClusterError, match="at least 256 are needed"):
        statistics.homes(view)
    for seed in range(3):
        for family in (0, 1):
            statistics.add(encode_sketch(family_sketch(family, seed=seed)))
    assert statistics.homes_are_due(is_new_view=False)
    homes = statistics.homes(view)
    assert not statistics.homes_are_due(is_new_view=False)
    assert statistics.homes_are_due(is_new_view=True)
    state = RouterState()
    state.handle(ViewAdopted(view, 0.0))
    state.handle(homes)
    prompts = []
    for seed, family in enumerate((0, 1, 1, 0, 1, 0)):
        token_ids = tuple(family_tokens(family, 60, seed=90 + seed)[0])
        prompts.append(Prompt(token_ids=token_ids, num_tokens=4000))
    choices = state.handle(RouteAsked(prompts=tuple(prompts), now_s=0.0))
    groups = [choice.group for choice in choices if choice is not None]
    assert groups == ["dense-0", "dense-1", "dense-1", "dense-0", "dense-1", "dense-0"]
    for choice in choices:
        assert choice is not None and 0 <= choice.expected_copies < 0.2


def test_a_server_learns_homes_from_reports_alone() -> None:
    """Over the wire: reports of a few thousand tokens, then a prompt of each family."""
    with running_router(view_of()) as server, channel_to(server) as channel:

        def call(method: Any, request: Any) -> Any:
            return unary_call(channel, method)(
                request, timeout=20.0, metadata=credentials_of(TOKEN)
            )

        for seed in range(3):
            for family in (0, 1):
                sketch = encode_sketch(family_sketch(family, seed=seed))
                report = router_pb2.ReportRequest(
                    group=f"dense-{family}", incarnation=1, sketch=sketch
                )
                call(REPORT, report)
        wait_for(lambda: server._learning is not None and server._learning.done(), 20.0)
        asked = [
            router_pb2.RoutePrompt(token_ids=family_tokens(f, 60, seed=7)[0], num_tokens=4000)
            for f in (1, 0)
        ]
        answer = call(ROUTE, router_pb2.RouteRequest(prompts=asked))
        assert [choice.group for choice in answer.choices] == ["dense-1", "dense-0"]
        assert server.status()["statistics"]["tokens_with_ids"] == 2400.0


def test_calls_that_are_ready_together_are_one_flow() -> None:
    with running_router(view_of()) as server:
        prompts = [[Prompt(token_ids=(n,), num_tokens=1)] * (1 + n % 2) for n in range(6)]

        async def ask() -> list[Any]:
            return await asyncio.gather(*(server._choices(lot) for lot in prompts))

        assert server._loop is not None
        answers = asyncio.run_coroutine_threadsafe(ask(), server._loop).result(20.0)
        assert [len(answer) for answer in answers] == [1, 2, 1, 2, 1, 2]
        groups = [choice.group for answer in answers for choice in answer]
        assert abs(groups.count("dense-0") - groups.count("dense-1")) == 1
        assert server.status()["routed"]["flows"] == 1


def test_token_counts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("remora.actors.router_statistics.TOKENS_KEPT_MAX", 1000.0)
    statistics = RouterStatistics(slots=None, path=None)
    for seed in range(6):
        statistics.add(encode_sketch(family_sketch(0, seed=seed)))
        assert statistics.status()["tokens_with_ids"] <= 1000.0


# -- labels -----------------------------------------------------------------------------------


def test_a_label_is_a_domain_of_its_own_whatever_its_tokens_choose() -> None:
    first, second = family_sketch(0, label="law"), family_sketch(0, label="medicine")
    assert [domain.label for domain in first.domains] == ["law"]
    history = RoutingHistory.of(first)
    for sketch in (first, second, family_sketch(0), first):
        history.add(sketch)
    assert history.labels() == ["law", "medicine"]
    assert sorted(d.tokens for d in history.domains.by_number.values()) == pytest.approx(
        [400, 400, 800], rel=0.01
    )


def test_requests_of_several_labels_are_counted_apart() -> None:
    one = counter()
    runs, parts = [], []
    for number, label in enumerate(("law", None, "code", "law")):
        token_ids, ids_LTK = family_tokens(0, 40, seed=number)
        runs.append(Run(number, 0, 40, 0, token_ids, label))
        parts.append(ids_LTK)
    one.count(np.concatenate(parts, axis=1), runs)
    found = {domain.label: domain.tokens for domain in one.take("a").domains}
    assert found == {"law": 80, None: 40, "code": 40}


def test_a_label_without_end_is_refused() -> None:
    sketch = sketch_of(family_tokens(0, 10, seed=0)[1], source="a", moe_layers=LAYERS)
    domain = msgspec.structs.replace(sketch.domains[0], label="x" * 65)
    with pytest.raises(FrameError, match="label of 65 characters"):
        decode_sketch(encode_sketch(msgspec.structs.replace(sketch, domains=[domain])))
