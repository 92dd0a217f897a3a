"""Sampling against its slow twin, its distribution, and its edges."""

import numpy as np
import pytest
import torch

from remora.kernels.reference_attention import (
    kept_probabilities_reference,
    sample_reference,
)
from remora.kernels.sampling import RowParams, philox4x32, raw_logprobs, sample


def test_philox_known_answers() -> None:
    """Vectors published with the method's reference implementation (Random123)."""
    assert philox4x32((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    ones = 0xFFFFFFFF
    assert philox4x32((ones,) * 4, (ones,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)


def random_row(rng: np.random.Generator, vocabulary: int, position: int) -> RowParams:
    def sometimes(value: float, otherwise: float) -> float:
        return value if rng.random() < 0.4 else otherwise

    ids = rng.integers(vocabulary, size=12).tolist()
    return RowParams(
        temperature=sometimes(0.0, float(rng.uniform(0.2, 2.0))),
        top_p=sometimes(float(rng.uniform(0.01, 1.0)), 1.0),
        top_k=int(sometimes(float(rng.integers(1, vocabulary + 5)), 0)),
        min_p=sometimes(float(rng.uniform(0.0, 0.3)), 0.0),
        presence_penalty=sometimes(float(rng.uniform(-1, 1)), 0.0),
        frequency_penalty=sometimes(float(rng.uniform(-1, 1)), 0.0),
        repetition_penalty=sometimes(float(rng.uniform(0.5, 2)), 1.0),
        logit_bias={ids[0]: 3.0, ids[1]: -100.0} if rng.random() < 0.3 else {},
        masked_ids=tuple(ids[2:4]) if rng.random() < 0.3 else (),
        prompt_ids=ids[4:8],
        output_ids=ids[6:12] + ids[6:8],
        seed=int(rng.integers(2**63)),
        position=position,
    )


@pytest.mark.parametrize("vocabulary", [5, 97, 700, 3001])
def test_matches_the_twin(vocabulary: int) -> None:
    rng = np.random.default_rng(vocabulary)
    num_rows = 60
    logits = (rng.standard_normal((num_rows, vocabulary)) * 3).astype(np.float32)
    logits[::3] = np.round(logits[::3])  # many equal values
    rows = [random_row(rng, vocabulary, b) for b in range(num_rows)]
    batch = sample(torch.from_numpy(logits), rows)
    assert batch.failed_rows == ()
    assert batch.token_ids == [sample_reference(logits[b], row) for b, row in enumerate(rows)]
    alone = [sample(torch.from_numpy(logits[b : b + 1]), [rows[b]]) for b in range(num_rows)]
    assert batch.token_ids == [one.token_ids[0] for one in alone]


def test_distribution() -> None:
    """Chi-square over fixed seeds: draws follow the twin's filtered probabilities."""
    rng = np.random.default_rng(5)
    logits = rng.standard_normal(40).astype(np.float32) * 2
    row = RowParams(temperature=0.9, top_p=0.95, top_k=30, seed=11)
    kept = kept_probabilities_reference(logits, row)
    num_draws = 4000
    rows = [
        RowParams(temperature=0.9, top_p=0.95, top_k=30, seed=11, position=p)
        for p in range(num_draws)
    ]
    tokens = sample(torch.from_numpy(np.tile(logits, (num_draws, 1))), rows).token_ids
    counts = np.bincount(tokens, minlength=40)
    assert set(np.flatnonzero(counts)) <= set(kept)
    expected = np.array([kept[t] * num_draws for t in kept])
    statistic = float((((counts[list(kept)] - expected) ** 2) / expected).sum())
    degrees = len(kept) - 1
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5


def test_tied_logits_go_to_the_lowest_id() -> None:
    logits = torch.zeros(3, 1000)
    logits[1, 700:] = 1.0
    rows = [RowParams(temperature=0.0), RowParams(temperature=0.0), RowParams(top_p=1e-6)]
    assert sample(logits, rows).token_ids == [0, 700, 0]


def test_draws_depend_on_seed_and_position_alone() -> None:
    logits = torch.randn(1, 500, generator=torch.Generator().manual_seed(1))
    rows = [RowParams(seed=s, position=p) for s in (1, 2**62) for p in range(20)]
    tokens = sample(logits.expand(40, 500), rows).token_ids
    assert len(set(tokens)) > 20
    assert tokens == [sample(logits, [row]).token_ids[0] for row in rows]


@pytest.mark.parametrize("vocabulary", [3, 600, 5000])
def test_edges(vocabulary: int) -> None:
    """Every filter at its limit leaves the most likely token, or changes nothing."""
    rng = np.random.default_rng(9)
    logits = torch.from_numpy(rng.standard_normal((1, vocabulary)).astype(np.float32))
    best = int(logits.argmax())
    alone = [
        RowParams(top_k=1, seed=3),
        RowParams(top_p=1e-9, seed=3),
        RowParams(min_p=1.0, seed=3),
        RowParams(temperature=1e-30, seed=3),
        RowParams(temperature=5e-324, seed=3),
        RowParams(logit_bias={best: 100.0}, seed=3),
        RowParams(masked_ids=[t for t in range(vocabulary) if t != best], seed=3),
    ]
    assert {sample(logits, [row]).token_ids[0] for row in alone} == {best}
    plain = [RowParams(seed=3, position=p) for p in range(30)]
    wide = [RowParams(seed=3, position=p, top_k=vocabulary + 7, top_p=1.0) for p in range(30)]
    same = logits.expand(30, vocabulary)
    assert sample(same, plain).token_ids == sample(same, wide).token_ids
    hidden = logits.clone()
    hidden[0, 1:] = -torch.inf
    assert sample(hidden, [RowParams(seed=5)]).token_ids == [0]


def test_many_equal_values_at_the_border() -> None:
    """Top-k keeps all equals of the k-th; top-p takes equals from the lowest id on."""
    logits = torch.zeros(400, 2000)
    logits[:, 1500:] = 2.0
    tokens = sample(logits, [RowParams(top_k=3, seed=1, position=p) for p in range(400)]).token_ids
    assert min(tokens) >= 1500
    assert len(set(tokens)) > 200
    half = [RowParams(top_p=0.25, seed=1, position=p) for p in range(400)]
    kept = kept_probabilities_reference(logits[0].numpy(), half[0])
    tokens = sample(logits, half).token_ids
    assert set(tokens) <= set(kept)
    assert max(kept) < 1999  # the last equals are cut


def test_a_broken_row_fails_alone() -> None:
    logits = torch.zeros(6, 10)
    logits[0, 3] = torch.nan
    logits[1, 3] = torch.nan
    logits[2] = -torch.inf
    logits[3, 4] = torch.inf
    logits[4, 7] = 1.0
    rows = [RowParams(num_logprobs=1, temperature=t) for t in (0.0, 1.0, 1.0, 0.7, 0.0)]
    rows.append(RowParams(masked_ids=range(10)))
    batch = sample(logits, rows)
    assert batch.failed_rows == (0, 1, 2, 3, 5)
    assert batch.token_ids[4] == 7
    assert [x is None for x in batch.logprobs] == [True, True, True, True, False, True]


def test_logprobs_are_of_the_raw_distribution() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn((4, 300), generator=generator) * 4
    logits[3] = 0.0
    expected = torch.log_softmax(logits.double(), 1)
    rows = [
        RowParams(temperature=0.0, num_logprobs=5),
        RowParams(temperature=2.0, logit_bias={9: 50.0}, num_logprobs=0),
        RowParams(temperature=0.0),
        RowParams(temperature=0.0, num_logprobs=400),
    ]
    before = logits.clone()
    batch = sample(logits, rows)
    assert torch.equal(before, logits)
    assert batch.logprobs[2] is None
    assert batch.token_ids[1] == 9
    for b in (0, 1, 3):
        result, token = batch.logprobs[b], batch.token_ids[b]
        assert result is not None
        assert result.logprob == pytest.approx(float(expected[b, token]), abs=1e-5)
        order = torch.sort(logits[b], descending=True, stable=True).indices.tolist()
        assert result.rank == order.index(token) + 1
        num_top = min(rows[b].num_logprobs or 0, 300)
        assert result.top_ids == order[:num_top]
        assert result.top_logprobs == pytest.approx(expected[b, order[:num_top]].tolist(), abs=1e-5)
    (asked,) = raw_logprobs(logits[:1], [17], 2)
    assert asked.logprob == pytest.approx(float(expected[0, 17]), abs=1e-5)


def test_refuses_what_does_not_fit() -> None:
    logits = torch.zeros(1, 10)
    with pytest.raises(ValueError, match="one row each"):
        sample(logits, [])
    with pytest.raises(ValueError, match="bfloat16"):
        sample(logits.bfloat16(), [RowParams()])
    with pytest.raises(ValueError, match=r"10\.\.10: the vocabulary has 10"):
        sample(logits, [RowParams(logit_bias={10: 1.0})])
    with pytest.raises(ValueError, match="vocabulary"):
        raw_logprobs(logits, [-1], 0)
