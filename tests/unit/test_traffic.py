"""What a dense rank tells of its traffic: counted tokens, bytes by level, ratios; and /metrics.

Legend: L MoE layers, T tokens, K top-k.
"""

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import make_checkpoint
from support.local_cluster import Ask, LocalCluster
from transformers import AutoModelForCausalLM

from remora.actors.trace_offline import watch_experts
from remora.cluster.metrics import IngressMetrics
from remora.comm.accounting import LinkCounters, TrafficMeter
from remora.comm.errors import ClusterError
from remora.comm.messages import EngineStats, PeerTraffic, SamplingParams, Traffic
from remora.comm.sketch import decode_sketch
from remora.comm.trace import join
from remora.comm.trace_reader import decode_record

PROMPT = (5, 9, 200, 31, 77)
ASK = Ask(PROMPT, SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    path = make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3_moe")
    made = LocalCluster(path, num_shards=2, dtype="float32", exact=False)
    yield made
    made.close()


def test_a_rank_counts_what_its_tokens_chose(cluster: LocalCluster) -> None:
    """The same bundles as transformers' own forward pass over prompt and answer."""
    with cluster.dense() as client:
        actor = client.actor
        actor.take_sketch()
        [answer] = client.ask([ASK])
        sketch = decode_sketch(actor.take_sketch())
        assert actor.take_sketch() == b""
        traffic = client.pong().traffic
    ids = [*PROMPT, *answer.token_ids[:-1]]  # the last token was never an input
    model = AutoModelForCausalLM.from_pretrained(cluster.spec.path, dtype=torch.float32).eval()
    taken = watch_experts(model)
    with torch.inference_mode():
        model(torch.tensor([ids]))
    wanted: Counter[tuple[int, ...]] = Counter()
    for layer, (index_TK, _) in enumerate(taken):
        for position, row in enumerate(index_TK.tolist()):
            wanted[(int(position >= len(PROMPT)), layer, *sorted(row))] += 1
    found: Counter[tuple[int, ...]] = Counter()
    for domain in sketch.domains:
        for cell in domain.cells:
            experts_BK, weight_B = cell.bundles(sketch.top_k)
            for row, weight in zip(experts_BK.tolist(), weight_B.tolist(), strict=True):
                found[(cell.phase, cell.layer, *row)] += weight
    assert found == wanted
    assert sketch.tokens_seen == sketch.tokens_counted == (5.0, 3.0)
    assert traffic is not None
    assert {peer.level for peer in traffic.peers} == {"host"}
    assert traffic.local_activation_ratio == 1.0
    assert traffic.remote_copies_per_token == 0.0
    counters = client.actor._peers.counters.total()  # type: ignore[union-attr]
    assert sum(peer.sent_bytes for peer in traffic.peers) == counters.sent_bytes > 0
    assert np.mean([peer.load_ratio for peer in traffic.peers]) == pytest.approx(1)


def test_what_is_recorded_of_a_rank_is_what_it_computed(cluster: LocalCluster) -> None:
    """Token ids, positions, phases and requests of two answers; after the limit, nothing more."""
    with cluster.dense(prefix_caching=False) as client:
        actor = client.actor
        with pytest.raises(ClusterError, match="nothing is being recorded"):
            actor.take_recorded("one")
        actor.start_recording(99, "another")
        header = actor.start_recording(14, "one")
        with pytest.raises(ClusterError, match="another recording"):
            actor.take_recorded("another")
        actor.stop_recording("another")  # which is over: this one goes on
        answers = client.ask([ASK, ASK])
        recorded = actor.take_recorded("one")
        blocks = [decode_record(header, data) for data in recorded.blocks]
        trace = join(blocks)
        assert (trace.num_tokens, recorded.tokens_left, recorded.tokens_left_out) == (14, 0, 0)
        client.ask([ASK])
        assert actor.take_recorded("one").blocks == []
        actor.stop_recording("one")
        with pytest.raises(ClusterError, match="nothing is being recorded"):
            actor.take_recorded("one")
    for number in np.unique(trace.request_T):
        rows = trace.select(trace.request_T == number)
        ids = [*PROMPT, *answers[0].token_ids][: rows.num_tokens]
        assert rows.token_T.tolist() == ids
        assert rows.position_T.tolist() == list(range(len(ids)))
        assert rows.phase_T.tolist() == [int(p >= len(PROMPT)) for p in range(len(ids))]
    assert len(np.unique(trace.request_T)) == 2


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 50), st.integers(0, 200)), min_size=3, max_size=3),
        min_size=1,
        max_size=8,
    )
)
def test_the_meter_against_a_recount(reads: list[list[tuple[int, int]]]) -> None:
    """Every row and pair counts half after `half_life` further pairs."""
    half_life, top_k, local = 100.0, 4, ["a"]
    links = {uid: LinkCounters() for uid in "abc"}
    meter = TrafficMeter(top_k, half_life)
    rows, pairs = dict.fromkeys("abc", 0.0), dict.fromkeys("abc", 0.0)
    for read in reads:
        fade = 0.5 ** (sum(p for _, p in read) / half_life)
        for uid, (new_rows, new_pairs) in zip("abc", read, strict=True):
            links[uid].sent_rows += new_rows
            links[uid].sent_pairs += new_pairs
            links[uid].sent_bytes += 10 * new_rows
            rows[uid] = rows[uid] * fade + new_rows
            pairs[uid] = pairs[uid] * fade + new_pairs
        found = meter.read(links, local)
    total = sum(pairs.values())
    assert [p.level for p in found.peers] == ["host", "remote", "remote"]
    assert [p.sent_bytes for p in found.peers] == [link.sent_bytes for link in links.values()]
    if not total:
        assert found.remote_copies_per_token == found.local_activation_ratio == 0
        return
    assert found.local_activation_ratio == pytest.approx(pairs["a"] / total)
    tokens = total / top_k
    assert found.remote_copies_per_token == pytest.approx((rows["b"] + rows["c"]) / tokens)
    for peer in found.peers:
        assert peer.load_ratio == pytest.approx(pairs[peer.uid] / (total / 3))


def test_metrics_name_levels_directions_and_shards() -> None:
    peers = [
        PeerTraffic(uid=uid, level=level, sent_bytes=sent, received_bytes=back, load_ratio=ratio)
        for uid, level, sent, back, ratio in (
            ("shard-0", "host", 10, 20, 0.5),
            ("shard-1", "remote", 300, 400, 1.0),
            ("shard-2", "remote", 5, 6, 1.5),
        )
    ]
    traffic = Traffic(peers=peers, remote_copies_per_token=1.25, local_activation_ratio=0.25)  # type: ignore[arg-type]
    text = IngressMetrics(lambda: {"dense-0": EngineStats()}, traffic=lambda: {"dense-0": traffic})
    lines = text.render().decode().splitlines()
    for line in (
        'remora_remote_copies_per_token{group="dense-0"} 1.25',
        'remora_local_activation_ratio{group="dense-0"} 0.25',
        'remora_alltoall_bytes_total{direction="out",group="dense-0",level="host"} 10.0',
        'remora_alltoall_bytes_total{direction="in",group="dense-0",level="remote"} 406.0',
        'remora_expert_load_ratio{group="dense-0",shard="shard-2"} 1.5',
    ):
        assert line in lines, line
