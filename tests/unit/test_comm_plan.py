"""Replica choice and layout against their slow twins."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from remora.comm import plan
from remora.comm.wire import dispatch_bytes


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, list[list[int]], set[int]]:
    num_shards = draw(st.integers(1, 7))
    num_experts = draw(st.integers(1, 20))
    top_k = draw(st.integers(1, min(16, num_experts)))
    shard = st.integers(0, num_shards - 1)
    holders = [sorted(draw(st.sets(shard, min_size=1, max_size=3))) for _ in range(num_experts)]
    token = st.permutations(range(num_experts)).map(lambda p: list(p)[:top_k])
    rows = draw(st.lists(token, min_size=1, max_size=12))
    index_TK = np.array(rows, np.int64)
    if draw(st.booleans()):
        index_TK[draw(st.integers(0, len(rows) - 1)), 0] = -1
    return index_TK, holders, draw(st.sets(shard))


def tables(holders: list[list[int]]) -> np.ndarray:
    table_ER = np.full((len(holders), max(map(len, holders)) + 1), -1, np.int16)
    for expert, shards in enumerate(holders):
        table_ER[expert, : len(shards)] = shards
    return table_ER


def flags(shards: set[int], num_shards: int) -> np.ndarray:
    return np.array([s in shards for s in range(num_shards)], np.uint8)


def run_choose(
    index_TK: np.ndarray, holders: list[list[int]], local: set[int], usable: set[int]
) -> tuple[int, np.ndarray, np.ndarray]:
    num_shards = 1 + max(max(h, default=0) for h in holders)
    num_shards = max(num_shards, 1 + max(local | usable, default=0))
    shard_TK = np.full(index_TK.shape, -7, np.int32)
    call_TK = np.full(index_TK.shape, plan.PENDING, np.int32)
    missing = plan.choose(
        index_TK, len(index_TK), tables(holders), flags(local, num_shards),
        flags(usable, num_shards), shard_TK, call_TK,
    )  # fmt: skip
    return missing, shard_TK, call_TK


@settings(max_examples=40, deadline=None)
@given(problems())
def test_choice_equals_the_slow_twin(
    problem: tuple[np.ndarray, list[list[int]], set[int]],
) -> None:
    index_TK, holders, local = problem
    missing, shard_TK, call_TK = run_choose(index_TK, holders, local, set(range(7)))
    assert missing == -1
    chosen = plan.choose_naive(index_TK, holders, local)
    for t, row in enumerate(index_TK):
        for k, expert in enumerate(row):
            if expert < 0:
                assert call_TK[t, k] == plan.SKIPPED and chosen[t][k] == -1
            else:
                assert shard_TK[t, k] == chosen[t][k] and shard_TK[t, k] in holders[expert]


def test_local_first_then_fewest_shards() -> None:
    holders = [[0, 2], [1, 2], [2], [0, 1]]
    index_TK = np.array([[0, 1, 2, 3]], np.int64)
    everyone = {0, 1, 2}
    assert run_choose(index_TK, holders, set(), everyone)[1].tolist() == [[2, 2, 2, 0]]
    assert run_choose(index_TK, holders, {1}, everyone)[1].tolist() == [[2, 1, 2, 1]]
    assert run_choose(index_TK, holders, {0}, everyone)[1].tolist() == [[0, 2, 2, 0]]


def test_ties_spread_the_load() -> None:
    _, shard_TK, _ = run_choose(np.zeros((6, 1), np.int64), [[0, 1, 2]], set(), {0, 1, 2})
    assert shard_TK.ravel().tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    ("index", "usable", "missing"), [([0, 1], {0}, 1), ([0, 2], {0, 1}, 2), ([0, 1], set(), 0)]
)
def test_an_expert_without_a_usable_holder_is_named(
    index: list[int], usable: set[int], missing: int
) -> None:
    found, _, _ = run_choose(np.array([index], np.int64), [[0], [1]], set(), usable)
    assert found == missing


@settings(max_examples=40, deadline=None)
@given(problems(), st.integers(1, 5), st.integers(1, 9))
def test_layout_and_packed_bodies(
    problem: tuple[np.ndarray, list[list[int]], set[int]], rows_max: int, row_bytes: int
) -> None:
    """Every pair once, rows once a call, pairs sorted, bodies as `wire` says."""
    index_TK, holders, local = problem
    num_tokens, top_k = index_TK.shape
    _, shard_TK, call_TK = run_choose(index_TK, holders, local, set(range(7)))
    row_TK, pos_TK = np.zeros_like(call_TK), np.zeros_like(call_TK)
    call_3C = np.zeros((3, 7 + index_TK.size), np.int32)
    num_calls = plan.lay_out(
        index_TK, num_tokens, len(holders), 7, rows_max, 0, shard_TK,
        call_TK, row_TK, pos_TK, call_3C[0], call_3C[1], call_3C[2],
    )  # fmt: skip
    hidden = np.random.default_rng(0).integers(0, 256, (num_tokens, row_bytes), np.uint8)
    weight_TK = np.random.default_rng(1).random((num_tokens, top_k), np.float32)
    bodies = [
        np.zeros(dispatch_bytes(int(call_3C[1, c]), int(call_3C[2, c]), row_bytes) + 1, np.uint8)
        for c in range(num_calls)
    ]
    address_C = np.array([b.ctypes.data for b in bodies] or [0], np.int64)
    plan.pack(
        index_TK, weight_TK, num_tokens, hidden.ctypes.data, row_bytes, 0, num_calls,
        call_TK, row_TK, pos_TK, call_3C[1], call_3C[2], address_C,
    )  # fmt: skip
    for c, body in enumerate(bodies):
        shard, num_rows, num_pairs = call_3C[:, c].tolist()
        assert body[-1] == 0  # nothing beyond the end
        pairs_at = (num_rows * row_bytes + 3) & ~3
        columns = body[pairs_at:-1].tobytes()
        rows = np.frombuffer(columns, np.int32, num_pairs)
        experts = np.frombuffer(columns, np.int32, num_pairs, 4 * num_pairs)
        weights = np.frombuffer(columns, np.float32, num_pairs, 8 * num_pairs)
        expected = sorted(
            (int(index_TK[t, k]), int(row_TK[t, k]), float(weight_TK[t, k]), t)
            for t in range(num_tokens)
            for k in range(top_k)
            if call_TK[t, k] == c
        )
        assert 1 <= num_rows <= rows_max and len(expected) == num_pairs
        assert [(e, r, w) for e, r, w, _ in expected] == list(
            zip(experts.tolist(), rows.tolist(), weights.tolist(), strict=True)
        )
        assert len({t for *_, t in expected}) == num_rows == rows.max() + 1
        for _, row, _, t in expected:
            assert body[row * row_bytes : (row + 1) * row_bytes].tolist() == hidden[t].tolist()
        assert {int(s) for s in shard_TK[call_TK == c]} == {shard}
    assert ((call_TK >= 0) == (index_TK >= 0)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_combine_is_bit_equal_to_the_slow_twin(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    for num_tokens, top_k, width in ((1, 1, 1), (5, 8, 33), (17, 4, 128)):
        rows_TKD = torch.randn(num_tokens, top_k, width, generator=generator).to(dtype)
        if num_tokens == 5:
            rows_TKD[0, 0, :4] = torch.tensor([float("inf"), float("nan"), 3e38, -0.0])
        weight_TK = torch.rand(num_tokens, top_k, generator=generator)
        call_TK = np.zeros((num_tokens + 2, top_k), np.int32)
        pos_TK = np.arange(call_TK.size, dtype=np.int32).reshape(call_TK.shape)
        out_TD = torch.full((num_tokens + 2, width), 7.0).to(dtype)
        padded_TK = torch.cat([weight_TK, torch.ones(2, top_k)]).numpy()
        plan.combine(
            padded_TK, num_tokens, width, dtype is torch.bfloat16, False, call_TK, pos_TK, pos_TK,
            np.array([rows_TKD.data_ptr()]), out_TD.data_ptr(), num_tokens + 2,
        )  # fmt: skip
        expected = plan.combine_naive(rows_TKD, weight_TK)
        assert torch.equal(out_TD[:num_tokens].isnan(), expected.isnan())
        same = (out_TD[:num_tokens] == expected) | expected.isnan()
        assert bool(same.all()) and not out_TD[num_tokens:].any()
