"""How much of the machine experts may take that are copied while streams flow.

A *share*, between `FLOOR` and 1: of a core's time for the thread that takes experts in, and of
`elastic.copy_mib_per_s`. A moved byte costs what its expert's size and the machine make of it, so
bytes/s alone bound nothing: small experts cost a whole core at a hundredth of the bytes/s of large
ones. Nobody decodes: all of it. Somebody does: `START`, and from there additive increase,
multiplicative decrease (Chiu and Jain, 1989) on the mean time of a step, which is what a stream
waits for its next token. What is calm is what steps took between the last operation and this one.
docs/elasticity.md, Copies.
"""

from collections.abc import Mapping
from typing import Final

import msgspec

SLOWER_MAX: Final = 1.15  # of a step, against calm: 0.87 of the tokens/s
LESS: Final = 0.5  # of the share, when steps are slower than that
MORE: Final = 1 / 16  # added to it, when they are not
FLOOR: Final = 1 / 64
# With somebody to disturb. An operation on small experts is over before a second look: it is this
# that it goes by (benchmarks/notes/2026-11-28-elastic.md).
START: Final = 1 / 16


class StepTotals(msgspec.Struct, frozen=True):
    """Of one dense rank, since it started."""

    steps: int
    seconds: float  # spent in them
    running: int = 0  # sequences, now


class CopyRate:
    """A share between `FLOOR` and 1.

    Attributes:
        share: for now.
    """

    def __init__(self) -> None:
        self.share = START
        self._seen: dict[str, StepTotals] = {}
        self._calm_s: dict[str, float] = {}  # of a step, by dense rank

    def begin(self, totals: Mapping[str, StepTotals]) -> float:
        """Copies begin; nothing was copied since the last `end`. The share to begin with."""
        for uid, mean_s in self._means(totals).items():
            self._calm_s[uid] = mean_s
        self._forget(totals)
        self.share = START if any(rank.running for rank in totals.values()) else 1.0
        return self.share

    def end(self, totals: Mapping[str, StepTotals]) -> None:
        """Copies are over, or have not begun: what follows is calm."""
        self._forget(totals)
        self.share = START  # of who is told before anybody has looked

    def observe(self, totals: Mapping[str, StepTotals]) -> float:
        """The share from now on. The dense rank that suffers most decides; one of which nothing
        calm is known does not suffer."""
        means = self._means(totals)
        slower = [s / self._calm_s[uid] for uid, s in means.items() if self._calm_s.get(uid)]
        was_idle = self.share == 1.0 and not any(rank.running for rank in self._seen.values())
        self._seen = dict(totals)
        if not means and not any(rank.running for rank in totals.values()):
            self.share = 1.0
        elif was_idle:
            self.share = START
        elif max(slower, default=0.0) > SLOWER_MAX:
            self.share = max(self.share * LESS, FLOOR)
        else:
            self.share = min(self.share + MORE, 1.0)
        return self.share

    def _forget(self, totals: Mapping[str, StepTotals]) -> None:
        """What is of ranks that are no more."""
        self._seen = dict(totals)
        self._calm_s = {uid: s for uid, s in self._calm_s.items() if uid in totals}

    def _means(self, totals: Mapping[str, StepTotals]) -> dict[str, float]:
        """Seconds of a step since the last look; of ranks that made one and were there then."""
        means = {}
        for uid, now in totals.items():
            before = self._seen.get(uid)
            if before is not None and now.steps > before.steps:
                means[uid] = (now.seconds - before.seconds) / (now.steps - before.steps)
        return means
