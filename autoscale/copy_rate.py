"""How fast experts may be copied while streams flow: less when steps of decoding get slower.

Additive increase, multiplicative decrease (Chiu and Jain, 1989), on the mean time of a step, which
is what a stream waits for its next token. What is calm is what steps took between the last
operation and this one. Elasticity, "copy" (../shared/design/elasticity.md).
"""

from collections.abc import Mapping
from typing import Final

import msgspec

SLOWER_MAX: Final = 1.25  # of a step, against calm
LESS: Final = 0.5  # of the rate, when steps are slower than that
MORE: Final = 1 / 16  # of the ceiling, when they are not
FLOOR: Final = 1 / 64  # of the ceiling


class StepTotals(msgspec.Struct, frozen=True):
    """Of one dense rank, since it started."""

    steps: int
    seconds: float  # spent in them


class CopyRate:
    """A rate between `FLOOR` and 1 of a ceiling.

    Args:
        ceiling: bytes/s.

    Attributes:
        rate: bytes/s for now.
    """

    def __init__(self, ceiling: float) -> None:
        assert ceiling > 0, f"a ceiling of {ceiling} bytes/s"
        self._ceiling = ceiling
        self.rate = ceiling
        self._seen: dict[str, StepTotals] = {}
        self._calm_s: dict[str, float] = {}  # of a step, by dense rank

    def begin(self, totals: Mapping[str, StepTotals]) -> None:
        """Copies begin; nothing was copied since the last `end`."""
        for uid, mean_s in self._means(totals).items():
            self._calm_s[uid] = mean_s
        self.end(totals)

    def end(self, totals: Mapping[str, StepTotals]) -> None:
        """Copies are over, or have not begun: what follows is calm."""
        self._seen = dict(totals)
        self._calm_s = {uid: s for uid, s in self._calm_s.items() if uid in totals}

    def observe(self, totals: Mapping[str, StepTotals]) -> float:
        """The rate from now on. The dense rank that suffers most decides; one that makes no steps,
        or of which nothing calm is known, does not suffer."""
        slower = [
            mean_s / self._calm_s[uid]
            for uid, mean_s in self._means(totals).items()
            if self._calm_s.get(uid)
        ]
        self._seen = dict(totals)
        if max(slower, default=0.0) > SLOWER_MAX:
            self.rate = max(self.rate * LESS, self._ceiling * FLOOR)
        else:
            self.rate = min(self.rate + self._ceiling * MORE, self._ceiling)
        return self.rate

    def _means(self, totals: Mapping[str, StepTotals]) -> dict[str, float]:
        """Seconds of a step since the last look; of ranks that made one and were there then."""
        means = {}
        for uid, now in totals.items():
            before = self._seen.get(uid)
            if before is not None and now.steps > before.steps:
                means[uid] = (now.seconds - before.seconds) / (now.steps - before.steps)
        return means
