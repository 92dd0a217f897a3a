"""Tokens and bundles that there is something to plan from."""

import numpy as np

from remora.comm.bundles import LayerBundles, count_bundles


def topical(seed: int, *, tokens: int = 300, experts: int = 16, top_k: int = 3) -> np.ndarray:
    """Tokens of four topics that prefer four experts each: there is something to group."""
    rng = np.random.default_rng(seed)
    scores = rng.gumbel(size=(tokens, experts)) + rng.standard_normal(experts) * 0.3
    topic = rng.integers(0, 4, tokens)
    scores += 2.0 * (np.arange(experts) % 4 == topic[:, None])
    return np.argsort(-scores, axis=1)[:, :top_k]


def layer(seed: int, hosts: int, **shape: int) -> LayerBundles:
    ids_TK = topical(seed, **shape)
    return count_bundles(ids_TK, np.arange(len(ids_TK)) % hosts)
