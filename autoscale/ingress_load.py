"""What ingresses count, and the samples of a pool that come of it: pure.

Each ingress tells running totals (`IngressLoad`), so a report that is lost or late costs nothing
but time; the meter takes differences. Latencies are counted in bins of equal ratio: a percentile of
all ingresses together is known to within half a bin (2.5 %), which buckets of Prometheus are too
coarse for.
"""

from collections.abc import Mapping
from math import ceil, exp, log
from typing import Final

import msgspec

from remora.autoscale.autoscale_policy import Percentile
from remora.autoscale.autoscale_sample import Sample

LEAST_S: Final = 1e-4  # below: the first bin
BINS_MAX: Final = 360  # up to LEAST_S * RATIO ** 360, about 4,300 s
RATIO: Final = 1.05
PERCENTILES: Final[dict[Percentile, float]] = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
SOURCES_MAX: Final = 4096  # ingresses that are remembered; the one that was silent longest goes

_LOG_RATIO: Final = log(RATIO)
Bins = dict[int, int]  # bin -> count


class LatencyBins:
    """Counts of latencies, by bin; `counts` only grow."""

    def __init__(self) -> None:
        self.counts: Bins = {}

    def observe(self, seconds: float) -> None:
        """Count one."""
        index = 0
        if seconds > LEAST_S:
            index = min(BINS_MAX, int(log(seconds / LEAST_S) / _LOG_RATIO) + 1)
        self.counts[index] = self.counts.get(index, 0) + 1


def percentile_of(counts: Mapping[int, int], share: float) -> float | None:
    """Seconds that `share` of what is counted does not exceed; None of nothing.

    The nearest rank, told as the middle (by ratio) of its bin.
    """
    total = sum(counts.values())
    if total == 0:
        return None
    rank, seen = ceil(share * total), 0
    for index in sorted(counts):
        seen += counts[index]
        if seen >= rank:
            return LEAST_S * exp(max(0.0, index - 0.5) * _LOG_RATIO)
    raise AssertionError(f"{seen} counted of {total}, rank {rank}")


class GroupLoad(msgspec.Struct, frozen=True, kw_only=True):
    """A dense group as an ingress knows it now."""

    waiting: int
    kv_used: int  # blocks
    kv_total: int
    shard_load: dict[str, float] = {}  # shard uid -> pairs lately sent there over the mean


class IngressLoad(msgspec.Struct, frozen=True, kw_only=True):
    """Running totals of one ingress, and the dense groups as it knows them now."""

    source: str  # unique for the life of the ingress
    arrived: int  # sequences that came, refused ones included
    accepted: int
    prompt_tokens: int  # of accepted ones
    ended: int  # sequences
    generated_tokens: int
    ttft: Bins
    itl: Bins
    groups: dict[str, GroupLoad]


class LoadTotals:
    """What one ingress counts for the autoscaler; totals only grow."""

    def __init__(self) -> None:
        self.arrived = self.accepted = self.ended = 0
        self.prompt_tokens = self.generated_tokens = 0
        self.ttft, self.itl = LatencyBins(), LatencyBins()

    def told(self, source: str, groups: dict[str, GroupLoad]) -> IngressLoad:
        """As it is told."""
        return IngressLoad(
            source=source,
            arrived=self.arrived,
            accepted=self.accepted,
            prompt_tokens=self.prompt_tokens,
            ended=self.ended,
            generated_tokens=self.generated_tokens,
            ttft=dict(self.ttft.counts),
            itl=dict(self.itl.counts),
            groups=groups,
        )


class LoadMeter:
    """Samples from reports.

    Args:
        fresh_s: a report that is older says nothing any more.
    """

    def __init__(self, fresh_s: float) -> None:
        self._fresh_s = fresh_s
        self._last: dict[str, tuple[float, IngressLoad]] = {}  # by source, in order of arrival
        self._taken: dict[str, tuple[float, IngressLoad]] = {}  # what the last sample went up to
        self._rates: dict[str, float] = {}  # sequences a second, as told last

    def report(self, load: IngressLoad, at_s: float) -> None:
        """Take what an ingress tells."""
        before = self._last.pop(load.source, None)
        self._last[load.source] = (at_s, load)
        if before is None:
            # what it counted before it was known is not of this interval
            self._taken.setdefault(load.source, (at_s, load))
        while len(self._last) > SOURCES_MAX:
            oldest = next(iter(self._last))
            del self._last[oldest]
            self._taken.pop(oldest, None)
            self._rates.pop(oldest, None)

    @property
    def sources(self) -> int:
        """Ingresses that are remembered."""
        return len(self._last)

    def sample(self, at_s: float, *, units: int, operation: str | None) -> Sample:
        """What came since the last sample; without a fresh report nothing is known of the load.

        Args:
            at_s: of the clock of the reports.
            units: that the pool has now.
            operation: that runs.
        """
        taken, self._taken = self._taken, dict(self._last)
        pairs = [(taken[source][1], load) for source, (_, load) in self._last.items()]
        for source, (then_s, load) in self._last.items():
            from_s, before = taken[source]
            if then_s > from_s:  # else nothing came from it in this interval: as it was told last
                self._rates[source] = (load.arrived - before.arrived) / (then_s - from_s)
        known = [load for _, load in self._last.values()]
        for source, (then_s, _) in list(self._last.items()):
            if at_s - then_s > self._fresh_s:  # its last totals are in this sample
                del self._last[source], self._taken[source]
                self._rates.pop(source, None)
        fresh = [load for _, load in self._last.values()]
        if not fresh:
            return Sample(at_s=at_s, units=units, operation=operation)
        groups: dict[str, GroupLoad] = {}
        for load in fresh:  # who reported last knows best
            groups |= load.groups
        total = sum(group.kv_total for group in groups.values())
        # Ratios of shards stay as they were when the last token was computed: of an idle pool they
        # would be an imbalance for ever.
        has_worked = any(
            (old.accepted, old.generated_tokens) != (new.accepted, new.generated_tokens)
            for old, new in pairs
        )
        return Sample(
            at_s=at_s,
            units=units,
            operation=operation,
            ttft_s=_percentiles([(old.ttft, new.ttft) for old, new in pairs]),
            itl_s=_percentiles([(old.itl, new.itl) for old, new in pairs]),
            waiting=sum(group.waiting for group in groups.values()) if groups else None,
            kv_use=sum(g.kv_used for g in groups.values()) / total if total else None,
            imbalance=_imbalance(groups) if has_worked else None,
            load=_offered(list(self._rates.values()), known),
        )


def _percentiles(pairs: list[tuple[Bins, Bins]]) -> dict[Percentile, float]:
    merged: Bins = {}
    for old, new in pairs:
        for index, count in new.items():
            if more := count - old.get(index, 0):
                merged[index] = merged.get(index, 0) + more
    found = {name: percentile_of(merged, share) for name, share in PERCENTILES.items()}
    return {name: value for name, value in found.items() if value is not None}


def _imbalance(groups: Mapping[str, GroupLoad]) -> float | None:
    """Largest over mean load of a shard; groups count alike, whatever they sent."""
    told = [group.shard_load for group in groups.values() if group.shard_load]
    if not told:
        return None
    uids = {uid for loads in told for uid in loads}
    sums = [sum(loads.get(uid, 0.0) for loads in told) for uid in uids]
    mean = sum(sums) / len(sums)
    return max(1.0, max(sums) / mean) if mean > 0 else None


def _offered(rates: list[float], known: list[IngressLoad]) -> float | None:
    """Tokens a second that come: sequences that arrive, at the mean length of all so far.

    A pool that cannot keep up generates less than it is asked for, so what is generated is no
    measure of what is offered; and how much a sequence will be is not known when it arrives.
    """
    if not rates:
        return None
    accepted, ended = sum(load.accepted for load in known), sum(load.ended for load in known)
    prompt = sum(load.prompt_tokens for load in known) / max(1, accepted)
    # Those under way have had half of theirs, in the mean. Left out, the first sequences of a
    # deployment would make the length of one out of what all of them got so far.
    output = sum(load.generated_tokens for load in known) / max(1.0, (ended + accepted) / 2)
    return sum(rates) * (prompt + output)
