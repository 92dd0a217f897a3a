"""Sampling against its slow twin, its distribution, and its edges."""

import numpy as np
import pytest
import torch

from remora.kernels.reference_attention import (
    kept_probabilities_reference,
    sample_reference,
)
from remora.kernels.sampling import RowParams, philox4x32, sample


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
