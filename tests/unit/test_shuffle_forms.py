"""Every form of the token shuffle on tensor-parallel ranks: nothing but the traffic changes.

`exact` numerics: logits have the bits of ranks that do not shuffle, whatever is near what and
whatever the ranks have learned. One architecture for each kind of layer; `test_tp_parity.py` has
all of them without a shuffle. Ranks are threads over real shared memory.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.checkpoints import VOCAB, make_checkpoint
from support.local_engine import LocalEngine
from support.tp_engine import TpEngine, gloo_groups, nccl_groups

from remora.comm.shuffle import Form

# Dense layers between; shared experts with a gate of their own; latent attention with shared
# experts; a router that returns more; multipliers around the sums; norms behind attention.
KINDS = ("qwen3_moe", "qwen2_moe", "deepseek_v3", "gpt_oss", "granitemoe", "flex_olmo")
SLICED = {"qwen3_moe": [0, 2], "deepseek_v3": [1, 2], "gpt_oss": [0, 1, 2, 3]}


def prompts(count: int, seed: int = 5) -> torch.Tensor:
    """int64 [count, 11]."""
    return torch.randint(3, VOCAB, (count, 11), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("architecture", KINDS)
def test_all_forms_give_the_same_bits(architecture: str, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, architecture)
    whole = LocalEngine.load(path, dtype=torch.bfloat16)
    found: dict[Form, Any] = {}
    forms: tuple[Form, ...] = ("none", "exact", "speculative")
    for form in forms:
        ranks = TpEngine.load_ranks(path, whole, 2, form)
        found[form] = [ranks.greedy(prompts(5), 4), ranks.forced(prompts(3, seed=6))]
        if form == "speculative":
            layers = SLICED.get(architecture, [0, 1, 2])
            assert ranks.dense.sliced.layers == layers and not ranks.dense.sliced.others
        assert ranks.shuffle is not None and 0 < ranks.shuffle.copies_far
        ranks.close()
    for form in forms[1:]:
        for mine, plain in zip(found[form], found["none"], strict=True):
            assert torch.equal(mine, plain), form


def test_four_ranks_whatever_carries_them(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "qwen2_moe", num_key_value_heads=4)
    whole = LocalEngine.load(path, dtype=torch.float32)
    plain = TpEngine.load_ranks(path, whole, 4)
    expected = plain.greedy(prompts(3), 6)
    plain.close()
    for groups in (None, gloo_groups(4), nccl_groups(4)):
        ranks = TpEngine.load_ranks(path, whole, 4, "speculative", groups)
        assert torch.equal(ranks.greedy(prompts(3), 6), expected)
        ranks.close()


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Form, TpEngine]]:
    path = make_checkpoint(tmp_path_factory.mktemp("model"), "olmoe")
    whole = LocalEngine.load(path, dtype=torch.bfloat16)
    forms: tuple[Form, ...] = ("none", "exact", "speculative")
    made = {form: TpEngine.load_ranks(path, whole, 2, form) for form in forms}
    yield made
    for engine in made.values():
        engine.close()


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 999),
    holders=st.lists(st.sets(st.integers(0, 2), min_size=1), min_size=8, max_size=8),
    prices=st.lists(st.sampled_from([0, 1, 8]), min_size=6, max_size=6),
    learned=st.integers(0, 2),
    count=st.integers(1, 7),
)
def test_tokens_do_not_depend_on_placement_replicas_or_guesses(
    engines: dict[Form, TpEngine], seed: int, holders: list[set[int]], prices: list[int],
    learned: int, count: int,
) -> None:  # fmt: skip
    """Replicas, prices and what was learned decide who asks for a row, and nothing else."""
    table = np.full((8, 3), -1, np.int16)
    for expert, shards in enumerate(holders):
        table[expert, : len(shards)] = sorted(shards)
    price_RS = np.array(prices, np.int64).reshape(2, 3)
    forced = functools.partial(prompts, count)
    expected = engines["none"].forced(forced(seed))
    for form in ("exact", "speculative"):
        engine = engines[form]
        for rank in (engine, *engine.others):
            assert rank.shuffle is not None
            rank.shuffle.set_prices(price_RS, dict.fromkeys(range(3), table))
        for other in range(learned):
            engine.forced(forced(seed + 1 + other))
        assert torch.equal(engine.forced(forced(seed)), expected), form


def test_a_shuffle_keeps_rows_near_what_they_need(engines: dict[Form, TpEngine]) -> None:
    """The same text again: the exact form saves at once, the other one when it has seen it."""
    table = (np.arange(8) % 2).astype(np.int16)[:, None]
    price_RS = np.array([[0, 1], [1, 0]])
    far: dict[str, int] = {}
    for form, engine in engines.items():
        for rank in (engine, *engine.others):
            assert rank.shuffle is not None
            rank.shuffle.set_prices(price_RS, dict.fromkeys(range(3), table))
        for _ in range(3):
            before = sum(r.shuffle.copies_far for r in (engine, *engine.others) if r.shuffle)
            engine.forced(prompts(6, seed=77))
        far[form] = sum(r.shuffle.copies_far for r in (engine, *engine.others) if r.shuffle)
        far[form] -= before
    assert far["exact"] < far["none"] and far["speculative"] < far["none"]
    assert far["exact"] <= far["speculative"]
