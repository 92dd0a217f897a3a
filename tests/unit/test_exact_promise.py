"""`exact` numerics: a request's tokens depend on the request alone.

The same seeded requests are asked alone, whole, without prefix cache, of one shard, and must come
back token for token whatever the number of shards, the batch, the chunking, the prefix hits and
the preemptions. All of it over real sockets, with `ordered` combine.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.checkpoints import VOCAB, make_checkpoint
from support.local_cluster import Ask, LocalCluster

from remora.comm.messages import SamplingParams

# Grouped-query attention; MLA with shared experts; biases, sinks, windows and a clamped gate.
ARCHITECTURES = ("qwen3_moe", "deepseek_v2", "gpt_oss")
DTYPES = ("float32", "bfloat16")
SHARDS = (1, 2, 4)
NUM_REQUESTS = 32

WHOLE: dict[str, object] = dict(max_tokens_per_step=512, max_num_seqs=64)
CHUNKED: dict[str, object] = dict(max_tokens_per_step=24, max_num_seqs=16)
SCARCE: dict[str, object] = dict(
    num_kv_blocks=14, max_num_seqs=32, max_tokens_per_step=96, prefix_caching=False
)


def requests() -> list[Ask]:
    """Greedy and sampled requests; half of them share a long prefix, none of them ends early."""
    asks = []
    for i in range(NUM_REQUESTS):
        length = 5 + (i * 7) % 60
        shared = tuple((j * 31) % VOCAB for j in range(48)) if i % 2 else ()
        prompt = shared + tuple((i * 97 + j * j * 13 + j) % VOCAB for j in range(length))
        params = SamplingParams(
            max_tokens=18 + i % 9,
            temperature=0.0 if i % 3 == 0 else 0.9,
            top_p=0.95 if i % 4 == 1 else 1.0,
            seed=1000 + i,
            ignore_eos=True,
        )
        asks.append(Ask(prompt, params))
    return asks


class Checked:
    """One checkpoint in one dtype: shards kept alive, and the answers of requests asked alone."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.clusters = {
            n: LocalCluster(path, num_shards=n, dtype=dtype, exact=True) for n in SHARDS
        }
        self.asks = requests()
        with self.clusters[1].dense(prefix_caching=False, **WHOLE) as alone:
            self.expected = [alone.ask([ask])[0].token_ids for ask in self.asks]

    def close(self) -> None:
        for cluster in self.clusters.values():
            cluster.close()


ALL = [(a, d) for a in ARCHITECTURES for d in DTYPES]
LONG = [(a, "float32") for a in ARCHITECTURES[1:]]  # of the others, bfloat16 in CI


@pytest.fixture(
    scope="module",
    params=[pytest.param(each, marks=pytest.mark.long if each in LONG else ()) for each in ALL],
    ids=str,
)
def checked(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Checked]:
    architecture, dtype = request.param
    path = make_checkpoint(tmp_path_factory.mktemp(architecture), architecture)
    checked = Checked(path, dtype)
    yield checked
    checked.close()


def test_requests_alone_differ_from_each_other(checked: Checked) -> None:
    """Else equality below would prove nothing."""
    assert len({tuple(tokens) for tokens in checked.expected}) == NUM_REQUESTS
    assert all(len(set(tokens)) > 2 for tokens in checked.expected)


@pytest.mark.parametrize("num_shards", SHARDS)
@pytest.mark.parametrize("limits", [WHOLE, CHUNKED], ids=["whole", "chunked"])
def test_a_batch_of_32_changes_no_token(
    checked: Checked, num_shards: int, limits: dict[str, object]
) -> None:
    with checked.clusters[num_shards].dense(**limits) as dense:
        answers = dense.ask(checked.asks)
    assert [a.token_ids for a in answers] == checked.expected


def test_prefix_hits_change_no_token(checked: Checked) -> None:
    with checked.clusters[2].dense(**WHOLE) as dense:
        dense.ask(checked.asks)
        again = dense.ask(checked.asks)
    assert sum(a.outputs[0].num_cached_tokens for a in again) > 16 * NUM_REQUESTS
    assert [a.token_ids for a in again] == checked.expected


def test_preemptions_change_no_token(checked: Checked) -> None:
    with checked.clusters[2].dense(**SCARCE) as dense:
        answers = dense.ask(checked.asks)
        assert dense.actor.status()["preemptions_total"] > 0
    assert [a.token_ids for a in answers] == checked.expected


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_order_mixture_or_limit_changes_a_token(checked: Checked, data: st.DataObject) -> None:
    which = data.draw(st.lists(st.integers(0, NUM_REQUESTS - 1), min_size=1, max_size=24))
    num_seqs = data.draw(st.integers(1, 24), label="max_num_seqs")
    limits = dict(
        max_num_seqs=num_seqs,
        max_tokens_per_step=data.draw(st.integers(num_seqs, 200), label="max_tokens_per_step"),
        num_kv_blocks=data.draw(st.integers(10, 64), label="num_kv_blocks"),
        prefix_caching=data.draw(st.booleans(), label="prefix_caching"),
    )
    with checked.clusters[data.draw(st.sampled_from(SHARDS), label="shards")].dense(
        **limits
    ) as dense:
        answers = dense.ask([checked.asks[i] for i in which])
    assert [a.token_ids for a in answers] == [checked.expected[i] for i in which]
