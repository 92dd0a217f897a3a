"""Routing of a model that nobody has traced here: bundles with the skew of real ones.

    ids_TK = generate(num_tokens=100_000, num_experts=256, top_k=8, skew=FITTED, seed=0)

A token belongs to one of equally frequent *topics*. Its score for an expert is the
expert's popularity + the topic's liking of it + Gumbel noise; it takes the top k, which draws k
experts without replacement in proportion to exp(score). Two numbers fix the skew, and are fitted
(`python benchmarks/routing_generator.py`) so that two statistics agree with DeepSeek-V2-Lite's
routing in `../shared/data/routing`, mean over layers: the spread of the experts' loads (standard
deviation of their logarithm) and the lift of pairs (mean over picked pairs of the logarithm of how
much more often they are picked together than apart).

Shape suffixes: T tokens, K top-k, E experts, Z topics.
"""

from dataclasses import dataclass

import numpy as np
from locations import ROUTING
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Skew:
    """Standard deviations of popularity and of liking, in nats; number of topics."""

    popularity: float
    liking: float
    num_topics: int


FITTED = Skew(popularity=0.3, liking=4.0, num_topics=32)


def generate(
    *, num_tokens: int, num_experts: int, top_k: int, skew: Skew, seed: int
) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
    """(experts `[T, K]`, topic of each token); deterministic in its arguments."""
    rng = np.random.default_rng(seed)
    popularity_E = skew.popularity * rng.standard_normal(num_experts)
    liking_ZE = skew.liking * rng.standard_normal((skew.num_topics, num_experts))
    topic_T = rng.integers(0, skew.num_topics, num_tokens)
    ids_TK = np.empty((num_tokens, top_k), np.int16)
    for first in range(0, num_tokens, 8192):
        topic = topic_T[first : first + 8192]
        score = (popularity_E + liking_ZE[topic]).astype(np.float32)
        score += rng.gumbel(size=score.shape).astype(np.float32)
        ids_TK[first : first + 8192] = np.argpartition(-score, top_k, axis=1)[:, :top_k]
    return ids_TK, topic_T


def statistics(ids_TK: NDArray[np.integer], num_experts: int) -> tuple[float, float]:
    """(standard deviation of the log load, mean log lift of picked pairs) of one layer."""
    num_tokens, top_k = ids_TK.shape
    picked_TE = np.zeros((num_tokens, num_experts), np.float32)
    picked_TE[np.arange(num_tokens)[:, None], ids_TK.astype(np.int64)] = 1
    together_EE = (picked_TE.T @ picked_TE).astype(np.float64) / num_tokens
    load_E = together_EE.diagonal().copy()
    np.fill_diagonal(together_EE, 0)
    there = together_EE > 0
    expected_EE = np.outer(load_E, load_E) * (1 - 1 / top_k)  # k picks without replacement
    lift = np.log(together_EE[there] / expected_EE[there])
    spread = float(np.log(np.maximum(load_E, 1 / num_tokens)).std())
    return spread, float((lift * together_EE[there]).sum() / together_EE.sum())


def trial(skew: Skew, seed: int) -> tuple[float, float]:
    """Statistics of generated routing in the shape of the real one."""
    ids_TK, _ = generate(num_tokens=8000, num_experts=64, top_k=6, skew=skew, seed=seed)
    return statistics(ids_TK, 64)


def main() -> None:
    """Prints the statistics of the real routing and the skew that comes closest to them."""
    names = sorted(ROUTING.glob("*.npz"))
    if not names:
        print(f"no routing in {ROUTING}: nothing to fit to")
        return
    real = np.concatenate([np.load(name)["expert_ids"] for name in names])
    wanted = np.mean([statistics(real[:, layer], 64) for layer in range(real.shape[1])], axis=0)
    print(f"real: spread {wanted[0]:.3f}, lift {wanted[1]:.3f}")
    best = None
    for num_topics in (16, 32, 64, 128):
        for popularity in (0.0, 0.3, 0.6):
            for liking in (1.0, 2.0, 3.0, 4.0, 5.0):
                skew = Skew(popularity=popularity, liking=liking, num_topics=num_topics)
                found = np.mean([trial(skew, seed) for seed in range(2)], axis=0)
                distance = float(np.abs(found / wanted - 1).sum())
                if best is None or distance < best[0]:
                    best = (distance, skew, found)
                    print(f"{distance:.3f} {skew} spread {found[0]:.3f} lift {found[1]:.3f}")


if __name__ == "__main__":
    main()
