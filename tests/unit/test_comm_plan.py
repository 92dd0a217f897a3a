"""Layout and packing against their slow twins."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.choice_rig import problems, run_choose

from remora.comm import plan
from remora.comm.wire import dispatch_bytes


@settings(max_examples=40)
@given(problems(), st.integers(1, 5), st.integers(1, 9))
def test_layout_and_packed_bodies(
    problem: tuple[np.ndarray, list[list[int]], set[int]], rows_max: int, row_bytes: int
) -> None:
    """Every pair once, rows once a call, pairs sorted, bodies as `wire` says."""
    index_TK, holders, local = problem
    num_tokens, top_k = index_TK.shape
    _, shard_TK, call_TK, _ = run_choose(index_TK, holders, local, set(range(7)))
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
