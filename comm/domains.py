"""Domains of traffic: requests whose tokens choose alike, told apart online and in bounded memory.

Leader clustering over expert histograms: a request (or another dense group's cluster) joins the
nearest centroid, or becomes one when it is farther than its own sampling noise explains; when there
are too many, the two nearest become one. Distance is Hellinger's, whose square between a
distribution of E values and a sample of n draws is about (E - 1) / 8n: short requests make no
domains of their own. Pure: what comes in decides.

Shape suffixes: F feature layers, E experts, D domains.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

DISTANCE_MAX = 0.2  # Hellinger; 0.1 to 0.24 do alike (benchmarks/notes/2026-11-28-statistics.md)
LABELS_MAX = 256
NOISE_SIGMAS = 2.0  # of the expected square of the distance to one's own domain


@dataclass(slots=True)
class Domain:
    """One centroid: decayed counts, so that it follows what its requests become."""

    histogram_FE: NDArray[np.float64]
    tokens: float
    labels: set[str] = field(default_factory=set)  # clients' own, at most LABELS_MAX

    @property
    def root_FE(self) -> NDArray[np.float64]:
        """Square roots of each feature layer's distribution."""
        return roots(self.histogram_FE)


def roots(histogram_FE: NDArray[np.float64]) -> NDArray[np.float64]:
    """Square roots of a histogram's rows as distributions; zeros where a row is empty."""
    total_F1 = histogram_FE.sum(axis=1, keepdims=True)
    result: NDArray[np.float64] = np.sqrt(histogram_FE / np.maximum(total_F1, 1e-30))
    return result


def distances(root_FE: NDArray[np.float64], root_DFE: NDArray[np.float64]) -> NDArray[np.float64]:
    """Hellinger distances to each of D centroids, averaged (in square) over feature layers."""
    affinity_D = np.einsum("fe,dfe->d", root_FE, root_DFE) / len(root_FE)
    distance_D: NDArray[np.float64] = np.sqrt(np.maximum(0.0, 1.0 - affinity_D))
    return distance_D


@dataclass(slots=True, kw_only=True)
class Domains:
    """At most `domains_max` domains, by number; a number is never given twice.

    Args:
        half_life_tokens: of a centroid, in tokens of its own domain.
    """

    domains_max: int
    half_life_tokens: float
    distance_max: float = DISTANCE_MAX
    by_number: dict[int, Domain] = field(default_factory=dict)
    next_number: int = 0

    def nearest(
        self, histogram_FE: NDArray[np.float64], label: str | None = None
    ) -> tuple[int, bool] | None:
        """The nearest domain and whether it is near enough; None when there is none to compare.

        A labelled histogram is near to the domain of its label alone, one without to any without.
        """
        if label is not None:
            found = [n for n, d in self.by_number.items() if label in d.labels]
            return (found[0], True) if found else None
        numbers = [n for n, d in self.by_number.items() if not d.labels]
        if not numbers:
            return None
        root_DFE = np.stack([self.by_number[n].root_FE for n in numbers])
        distance_D = distances(roots(histogram_FE), root_DFE)
        best = int(distance_D.argmin())
        draws = max(1.0, float(histogram_FE.sum(axis=1).mean()))
        noise = NOISE_SIGMAS * (histogram_FE.shape[1] - 1) / (8 * draws)
        near = bool(distance_D[best] ** 2 <= self.distance_max**2 + noise)
        return numbers[best], near

    def assign(
        self, histogram_FE: NDArray[np.float64], label: str | None = None
    ) -> tuple[int, tuple[int, int] | None]:
        """The domain of a histogram, made if need be; centroids change in `grow` alone.

        Returns:
            Its number; and (from, into) where two domains became one to make room.
        """
        nearest = self.nearest(histogram_FE, label)
        if nearest is not None and nearest[1]:
            return nearest[0], None
        merged = self._make_room() if len(self.by_number) >= self.domains_max else None
        if len(self.by_number) >= self.domains_max:  # one domain only: everybody's
            return next(iter(self.by_number)), None
        number, self.next_number = self.next_number, self.next_number + 1
        labels = set() if label is None else {label}
        # a little weight: without, it would be near to nobody until its first tokens are counted
        self.by_number[number] = Domain(1e-9 * histogram_FE, 0.0, labels)
        return number, merged

    def grow(self, number: int, histogram_FE: NDArray[np.float64], tokens: float) -> float:
        """Count tokens for a domain; returns what its older counts were multiplied with."""
        domain = self.by_number[number]
        factor = float(0.5 ** (tokens / self.half_life_tokens))
        domain.histogram_FE *= factor
        domain.histogram_FE += histogram_FE
        domain.tokens = factor * domain.tokens + tokens
        return factor

    def shared_labels(self) -> list[list[str]]:
        """Names that count for one domain, since there are more of them than domains; each list
        ascending."""
        return sorted(sorted(d.labels) for d in self.by_number.values() if len(d.labels) > 1)

    def _make_room(self) -> tuple[int, int] | None:
        """Make two domains one, if there are two: those whose union spreads least more (Ward,
        J. Am. Stat. Assoc. 58, 1963), so that a few strange requests go before a domain does."""
        numbers = list(self.by_number)
        if len(numbers) < 2:
            return None
        root_DFE = np.stack([self.by_number[n].root_FE for n in numbers])
        tokens_D = np.array([max(self.by_number[n].tokens, 1.0) for n in numbers])
        affinity_DD = np.einsum("afe,bfe->ab", root_DFE, root_DFE) / root_DFE.shape[1]
        weight_DD = tokens_D[:, None] * tokens_D / (tokens_D[:, None] + tokens_D)
        cost_DD = weight_DD * np.maximum(0.0, 1.0 - affinity_DD)
        labelled_D = np.array([bool(self.by_number[n].labels) for n in numbers])
        apart_DD = labelled_D[:, None] != labelled_D  # a name must not take what has none over
        if len(numbers) > 2:  # else there is no other pair
            cost_DD[apart_DD] = np.inf
        np.fill_diagonal(cost_DD, np.inf)
        a, b = np.unravel_index(int(cost_DD.argmin()), cost_DD.shape)
        first, second = numbers[int(a)], numbers[int(b)]
        if self.by_number[first].tokens < self.by_number[second].tokens:
            first, second = second, first
        gone = self.by_number.pop(second)
        self.by_number[first].histogram_FE += gone.histogram_FE
        self.by_number[first].tokens += gone.tokens
        room = LABELS_MAX - len(self.by_number[first].labels)
        self.by_number[first].labels |= set(sorted(gone.labels)[:room])
        return second, first
