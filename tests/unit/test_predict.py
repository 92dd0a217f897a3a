"""Predictors against dumb versions: counts, the fit, scores; and what they must have learned.

Shape suffixes as in comm/predict.py.
"""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from remora.comm.predict import (
    SCALE,
    Predictor,
    RoutingCounts,
    Use,
    device_scores,
    fit,
    top_experts,
)
from remora.comm.predict_devices import TwoLayerTable, device_masks

NUM_LAYERS, NUM_EXPERTS, TOP_K, VOCAB = 3, 7, 2, 11


def tokens_of(seed: int, num_tokens: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Token ids and experts that depend on them and on the layer before, with noise."""
    rng = np.random.default_rng(seed)
    token_T = rng.integers(0, VOCAB, num_tokens)
    experts = np.empty((NUM_LAYERS, num_tokens, TOP_K), np.int64)
    for layer in range(NUM_LAYERS):
        before_T = experts[layer - 1, :, 0] if layer else np.zeros(num_tokens, int)
        liking_TE = rng.random((num_tokens, NUM_EXPERTS))
        liking_TE[np.arange(num_tokens), (3 * token_T + layer) % NUM_EXPERTS] += 0.6
        liking_TE[np.arange(num_tokens), (before_T + 2) % NUM_EXPERTS] += 0.6 * (layer > 0)
        experts[layer] = np.argsort(-liking_TE, axis=1)[:, :TOP_K]
    return token_T, experts


def counts_of(token_T: NDArray[Any], experts_LTK: NDArray[Any]) -> RoutingCounts:
    counts = RoutingCounts(
        num_layers=NUM_LAYERS, num_experts=NUM_EXPERTS, top_k=TOP_K, vocab_size=VOCAB
    )
    counts.learn(token_T, experts_LTK)
    return counts


@settings(max_examples=30)
@given(st.integers(0, 1000), st.integers(0, 40), st.integers(0, 40))
def test_counts_add_up_whatever_the_parts(seed: int, first: int, second: int) -> None:
    token_T, experts_LTK = tokens_of(seed, first + second)
    experts_LTK[:, ::3, 1] = -1
    merged = counts_of(token_T[:first], experts_LTK[:, :first])
    merged.merge(counts_of(token_T[first:], experts_LTK[:, first:]))
    near_LEE = np.zeros((NUM_LAYERS, NUM_EXPERTS, NUM_EXPERTS))
    token_LVE = np.zeros((NUM_LAYERS, VOCAB, NUM_EXPERTS))
    for layer in range(NUM_LAYERS):
        for t, token in enumerate(token_T.tolist()):
            for e in experts_LTK[layer, t].tolist():
                if e < 0:
                    continue
                token_LVE[layer, token, e] += 1
                for f in experts_LTK[layer - 1, t].tolist() if layer else []:
                    near_LEE[layer, f, e] += f >= 0
    np.testing.assert_array_equal(merged.near_LEE, near_LEE)
    np.testing.assert_array_equal(merged.token_LVE, token_LVE)
    np.testing.assert_array_equal(merged.seen_V, np.bincount(token_T, minlength=VOCAB))
    assert merged.num_tokens == first + second
    merged.decay(0.5)
    assert merged.num_tokens == (first + second) / 2


def ridge_of(
    token_T: NDArray[np.int64],
    experts_LTK: NDArray[np.int64],
    layer: int,
    use: Use,
    ridges: tuple[float, float],
) -> NDArray[np.float64]:
    """[T, E]: the same model as one dense regression over indicator columns of every token."""
    num_tokens = len(token_T)
    columns, penalties = [np.zeros((num_tokens, 0))], [np.zeros(0)]
    if use.token:
        columns.append(np.eye(VOCAB)[token_T])
        penalties.append(np.full(VOCAB, ridges[0]))
    for back in range(1, min(use.layers, layer) + 1):
        one_TE = np.eye(NUM_EXPERTS)[experts_LTK[layer - back]].sum(axis=1)
        columns.append(one_TE - one_TE.mean(axis=0))
        penalties.append(np.full(NUM_EXPERTS, ridges[1]))
    x_TP, penalty_P = np.concatenate(columns, axis=1), np.concatenate(penalties)
    target_TE = np.eye(NUM_EXPERTS)[experts_LTK[layer]].sum(axis=1)
    base_E = target_TE.mean(axis=0)
    table_PE = np.linalg.solve(x_TP.T @ x_TP + np.diag(penalty_P), x_TP.T @ (target_TE - base_E))
    return base_E + x_TP @ table_PE


@pytest.mark.parametrize("use", [Use(), Use(layers=2), Use(layers=0), Use(token=False, layers=2)])
def test_the_fit_is_the_ridge_regression_over_all_tokens(use: Use) -> None:
    token_T, experts_LTK = tokens_of(1, 400)
    predictor = fit(counts_of(token_T, experts_LTK), use, token_ridge=3.0, near_ridge=5.0)
    for layer in range(NUM_LAYERS):
        previous = experts_LTK[layer - 1] if layer >= 1 and use.layers >= 1 else None
        before = experts_LTK[layer - 2] if layer >= 2 and use.layers >= 2 else None
        found_TE = predictor.scores(layer, token_T, previous, before) / SCALE
        wanted_TE = ridge_of(token_T, experts_LTK, layer, use, (3.0, 5.0))
        np.testing.assert_allclose(found_TE, wanted_TE, atol=0.01)


def test_more_tables_predict_better_on_tokens_not_seen() -> None:
    """The token table alone and the layers alone each miss what the other knows."""
    counts = counts_of(*tokens_of(1, 4000))
    token_T, experts_LTK = tokens_of(2, 1000)
    hits = {}
    for use in (Use(token=False, layers=0), Use(layers=0), Use(token=False), Use()):
        previous = experts_LTK[1] if use.layers else None
        best_TK, confidence_T = top_experts(fit(counts, use).scores(2, token_T, previous), TOP_K)
        hit_T = (best_TK[:, :, None] == experts_LTK[2][:, None, :]).any(axis=1).mean(axis=1)
        hits[use] = hit_T.mean()
        assert confidence_T.mean() == pytest.approx(hit_T.mean(), abs=0.05), "calibrated"
    none, token, layers, both = hits.values()
    assert none + 0.05 < min(token, layers)
    assert max(token, layers) + 0.05 < both


def test_token_ids_share_rows_where_memory_is_bounded() -> None:
    counts = RoutingCounts(
        num_layers=2, num_experts=8, top_k=2, vocab_size=10**6, token_bytes_max=4 * 2 * 8 * 100
    )
    assert counts.num_rows == 100
    ids_LTK = np.array([[[1, 2], [5, 6]], [[3, 4], [5, 6]]])
    counts.learn(np.array([777_777, 5]), ids_LTK)
    score_TE = fit(counts).scores(0, np.array([77, 78]))
    assert set(np.argsort(-score_TE[0])[:2].tolist()) == {1, 2}
    assert score_TE[0, 1] > score_TE[1, 1]


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 20))
def test_scores_and_devices_against_loops(seed: int, num_tokens: int) -> None:
    rng = np.random.default_rng(seed)
    square = (NUM_LAYERS, NUM_EXPERTS, NUM_EXPERTS)
    predictor = Predictor(
        top_k=TOP_K,
        token_LVE=rng.integers(-SCALE, SCALE, (NUM_LAYERS, VOCAB, NUM_EXPERTS), np.int16),
        near_LEE=rng.integers(-SCALE, SCALE, square, np.int16),
        far_LEE=rng.integers(-SCALE, SCALE, square, np.int16),
    )
    token_T = rng.integers(0, VOCAB, num_tokens)
    near_TK, far_TK = rng.integers(-1, NUM_EXPERTS, (2, num_tokens, TOP_K))
    score_TE = predictor.scores(2, token_T, near_TK, far_TK)
    held_ED = rng.integers(0, 2, (NUM_EXPERTS, 3))
    score_TD = device_scores(score_TE, held_ED)
    for t in range(num_tokens):
        wanted = predictor.token_LVE[2, token_T[t]].astype(int)
        for f in near_TK[t]:
            wanted = wanted + (predictor.near_LEE[2, f] if f >= 0 else 0)
        for f in far_TK[t]:
            wanted = wanted + (predictor.far_LEE[2, f] if f >= 0 else 0)
        assert score_TE[t].tolist() == wanted.tolist()
        assert score_TD[t].tolist() == (np.clip(wanted, 0, SCALE) @ held_ED).tolist()


def test_the_two_layer_table_knows_the_devices_before() -> None:
    rng = np.random.default_rng(3)
    first_T = rng.integers(0, 4, 500)
    device_LTK = np.stack([first_T, (first_T + 1) % 4])[:, :, None].repeat(2, axis=2)
    table = TwoLayerTable(num_layers=2, num_devices=4)
    table.learn(device_LTK)
    score_TD = table.scores(1, np.array([[0, 0], [2, 2], [-1, 3]]))
    assert score_TD.argmax(axis=1).tolist() == [1, 3, 0]
    assert score_TD[0, 1] == pytest.approx(2 * SCALE, rel=0.05)
    assert device_masks(np.array([[0, 2], [-1, 1], [-1, -1]])).tolist() == [5, 2, 0]
    assert table.scores(0, np.zeros((1, 2), int)).tolist() == [[0, 0, 0, 0]]
