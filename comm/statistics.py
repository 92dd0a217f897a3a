"""The router's memory of traffic: decayed bundle counts for each domain, bounded, saved, restored.

    history = RoutingHistory.of(sketch, limits)     # shapes from the first sketch
    history.add(sketch)                             # from any dense group, as often as they come
    layers = history.bundles(hosts)                 # list[LayerBundles]: what planners take

A domain remembers long (`half_life_tokens`, of its own tokens); which domains the traffic is made
of is forgotten fast (`share_half_life_tokens`, of all tokens, and no faster than everybody who
reports has reported). So when traffic turns to a domain
that was seen before, a plan for it does not wait until it has been seen again. Pure: what comes in
decides, and time is counted in tokens.

Shape suffixes: L MoE layers, B bundles, K top-k, E experts, H hosts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from remora.comm.bundle_table import NO_VALUE, BundleTable
from remora.comm.bundles import NO_EXPERT, NO_SOURCE, LayerBundles
from remora.comm.domains import Domains
from remora.comm.errors import FrameError
from remora.comm.sketch import PHASES, DomainSketch, RoutingSketch

SOURCES_MAX = 4096
GONE = ""  # the name of hosts whose names are forgotten; none has it


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryLimits:
    """Bounds and time constants of a history."""

    domains_max: int = 12
    bytes_max: int = 64 << 20  # of bundles; loads and centroids come on top
    half_life_tokens: float = 200_000  # of what a domain's tokens chose
    share_half_life_tokens: float = 1_000  # of which domains there are


@dataclass(slots=True)
class HistoryCell:
    """One (domain, phase, layer): rows of a table are (source, experts ascending)."""

    table: BundleTable
    load_E: NDArray[np.float64]

    def decay(self, factor: float) -> None:
        """Multiply every count."""
        self.table.weights[:] *= factor
        self.load_E *= factor


@dataclass(slots=True, kw_only=True)
class RoutingHistory:
    """See the head of this file. Not thread-safe."""

    num_experts: int
    top_k: int
    moe_layers: tuple[int, ...]
    limits: HistoryLimits = field(default_factory=HistoryLimits)
    domains: Domains = field(init=False)
    cells: dict[tuple[int, int, int], HistoryCell] = field(default_factory=dict)
    share: dict[int, float] = field(default_factory=dict)  # recent tokens by domain
    sources: list[str] = field(default_factory=list)
    reported: dict[str, float] = field(default_factory=dict)  # tokens of one's last sketch
    tokens_total: float = 0.0  # ever added

    def __post_init__(self) -> None:
        self.domains = Domains(
            domains_max=self.limits.domains_max, half_life_tokens=self.limits.half_life_tokens
        )

    @classmethod
    def of(cls, sketch: RoutingSketch, limits: HistoryLimits | None = None) -> "RoutingHistory":
        """An empty history for the model of a sketch."""
        return cls(
            num_experts=sketch.num_experts,
            top_k=sketch.top_k,
            moe_layers=sketch.moe_layers,
            limits=limits or HistoryLimits(),
        )

    @property
    def nbytes(self) -> int:
        """Memory of bundles."""
        return sum(cell.table.nbytes for cell in self.cells.values())

    def add(self, sketch: RoutingSketch, reporter: str | None = None) -> None:
        """Count what a dense group saw.

        Args:
            reporter: the group; None: the only one of its host.

        Raises:
            FrameError: a sketch of another model.
        """
        self.check(sketch)
        source = self._source(sketch.source)
        parts = [part for part in sketch.domains if part.tokens > 0]
        self._fade_shares(reporter or sketch.source, sum(part.tokens for part in parts))
        for part in parts:
            self._add_domain(part, source)

    def check(self, sketch: RoutingSketch) -> None:
        """Raises FrameError: a sketch of another model."""
        shape = (sketch.num_experts, sketch.top_k, sketch.moe_layers)
        if shape != (self.num_experts, self.top_k, self.moe_layers):
            raise FrameError(
                f"a sketch of top {sketch.top_k} of {sketch.num_experts} experts in"
                f" {len(sketch.moe_layers)} layers, kept are top {self.top_k} of"
                f" {self.num_experts} in {len(self.moe_layers)}"
            )

    def bundles(
        self,
        hosts: Sequence[str],
        *,
        shares: Mapping[int, float] | None = None,
        phase_weights: tuple[float, float] = (1.0, 1.0),
    ) -> list[LayerBundles]:
        """Unique bundles of every MoE layer, domains mixed as recent traffic is.

        Args:
            hosts: names by index, for `source_B`; dense groups elsewhere give NO_SOURCE.
            shares: another mix: weight by domain number.
            phase_weights: of prefill and decode tokens.
        """
        scale = self._scales(self.share if shares is None else shares)
        index = {name: number for number, name in enumerate(hosts)}
        source_S = np.array([*(index.get(s, NO_SOURCE) for s in self.sources), NO_SOURCE], np.int16)
        result = []
        for layer in range(len(self.moe_layers)):
            table = BundleTable(self.top_k + 1, 1 << 30)
            for number, factor in scale.items():
                for phase in range(len(PHASES)):
                    cell = self.cells.get((number, phase, layer))
                    if cell is not None and cell.table.num_rows:
                        rows = cell.table.rows.copy()
                        rows[:, 0] = source_S[rows[:, 0]].astype(np.uint16)
                        table.add(rows, cell.table.weights * (factor * phase_weights[phase]))
            result.append(_layer_bundles(table))
        return result

    def load_LE(self, shares: Mapping[int, float] | None = None) -> NDArray[np.float64]:
        """Tokens by layer and expert, in the same mix; exact where bundles are sampled."""
        scale = self._scales(self.share if shares is None else shares)
        load_LE = np.zeros((len(self.moe_layers), self.num_experts))
        for (number, _, layer), cell in self.cells.items():
            load_LE[layer] += scale.get(number, 0.0) * cell.load_E
        return load_LE

    def mix_tokens(self) -> float:
        """How many tokens the mix of `bundles` tells as much as: Kish's effective sample size.
        Less than are remembered where a domain that has been seen little has a large share."""
        scale = self._scales(self.share)
        weights = [(f, self.domains.by_number[n].tokens) for n, f in scale.items()]
        total = sum(factor * tokens for factor, tokens in weights)
        return total**2 / sum(f * f * t for f, t in weights) if total > 0 else 0.0

    def recent_shares(self) -> dict[int, float]:
        """Share of recent tokens by domain, adding up to 1."""
        total = sum(self.share.values())
        return {number: tokens / total for number, tokens in self.share.items()} if total else {}

    def labels(self) -> list[str]:
        """Names that clients gave to domains, ascending."""
        return sorted(set().union(*(d.labels for d in self.domains.by_number.values())))

    # -- inside -------------------------------------------------------------------------------

    def _source(self, name: str) -> int:
        if name not in self.sources:
            if len(self.sources) >= SOURCES_MAX:
                self._forget_sources()
            self.sources.append(name)
        return self.sources.index(name)

    def _forget_sources(self) -> None:
        """Of the half of the hosts that came first the names are forgotten, not what they sent:
        most are gone, since a machine has another name after each start of Ray. One that is not
        is named anew."""
        num_gone = SOURCES_MAX // 2
        self.sources = [GONE, *self.sources[num_gone:]]
        for cell in self.cells.values():
            rows, weights = cell.table.rows.copy(), cell.table.weights.copy()
            rows[:, 0] = np.maximum(rows[:, 0].astype(np.int64) - (num_gone - 1), 0)
            cell.table.clear()
            cell.table.add(rows, weights)

    def _add_domain(self, part: DomainSketch, source: int) -> None:
        histogram_FE = part.histogram_FE(self.num_experts)
        number, merged = self.domains.assign(histogram_FE, part.label)
        if merged is not None:
            self._merge(*merged)
        factor = self.domains.grow(number, histogram_FE, part.tokens)
        for key, cell in self.cells.items():
            if key[0] == number:
                cell.decay(factor)
        self.share[number] = self.share.get(number, 0.0) + part.tokens
        self.tokens_total += part.tokens
        for given in part.cells:
            cell = self._cell((number, given.phase, given.layer))
            experts_BK, weight_B = given.bundles(self.top_k)
            cell.table.add(_with_source(experts_BK, source), weight_B)
            cell.load_E += given.load_E()

    def _fade_shares(self, reporter: str, tokens: float) -> None:
        """Make room among recent tokens for a sketch. Once for all of its domains: they came side
        by side, and one after the other each would fade those that are noted before it."""
        if tokens <= 0:
            return
        time_constant = self._time_constant(reporter, tokens)
        recent = sum(self.share.values())
        fade = math.exp(-tokens / time_constant)
        if recent > time_constant:  # of larger sketches: no heavier than had they come in small
            fade *= time_constant / recent
        self.share = {number: fade * share for number, share in self.share.items()}

    def _time_constant(self, reporter: str, tokens: float) -> float:
        """In tokens. Where several report, each may have domains of its own: two rounds of
        reports at least, so that whoever came last does not stand for all of them."""
        round_tokens = tokens + sum(t for r, t in self.reported.items() if r != reporter)
        fade = math.exp(-tokens / (2 * round_tokens))  # who reports no more is forgotten
        least = round_tokens / SOURCES_MAX  # and no more than that many are remembered
        faded = {r: fade * t for r, t in self.reported.items() if r != reporter}
        self.reported = {r: t for r, t in faded.items() if t > least} | {reporter: tokens}
        alone = self.limits.share_half_life_tokens / math.log(2)
        if len(self.reported) == 1:
            return alone
        return max(alone, 2 * sum(self.reported.values()))

    def _cell(self, key: tuple[int, int, int]) -> HistoryCell:
        if key not in self.cells:
            rows_max = self._rows_max(len(self.cells) + 1)
            for cell in self.cells.values():
                cell.table.shrink(rows_max)
            table = BundleTable(self.top_k + 1, rows_max, salt=hash(key))
            self.cells[key] = HistoryCell(table, np.zeros(self.num_experts))
        return self.cells[key]

    def _rows_max(self, num_cells: int) -> int:
        """A row takes its values, its weight, and up to four slots of the hash."""
        return max(2, self.limits.bytes_max // num_cells // (2 * (self.top_k + 1) + 8 + 16))

    def _merge(self, gone: int, into: int) -> None:
        """Two domains have become one."""
        for key in [key for key in self.cells if key[0] == gone]:
            old = self.cells.pop(key)
            cell = self._cell((into, *key[1:]))
            cell.table.add(old.table.rows, old.table.weights)
            cell.load_E += old.load_E
        self.share[into] = self.share.get(into, 0.0) + self.share.pop(gone, 0.0)

    def _scales(self, shares: Mapping[int, float]) -> dict[int, float]:
        """What a domain's counts are multiplied with so that domains stand in these proportions
        and all together weigh what is remembered."""
        known = {n: s for n, s in shares.items() if n in self.domains.by_number and s > 0}
        total = sum(known.values())
        tokens = {n: self.domains.by_number[n].tokens for n in known}
        weight = sum(tokens.values())
        return {n: s / total * weight / tokens[n] for n, s in known.items() if tokens[n] > 0}


def _with_source(experts_BK: NDArray[np.uint16], source: int) -> NDArray[np.uint16]:
    rows = np.empty((len(experts_BK), experts_BK.shape[1] + 1), np.uint16)
    rows[:, 0] = source
    rows[:, 1:] = experts_BK
    return rows


def _layer_bundles(table: BundleTable) -> LayerBundles:
    order = np.lexsort(table.rows.T[::-1])
    rows = table.rows[order]
    experts_BK = rows[:, 1:].astype(np.int16)
    experts_BK[rows[:, 1:] == NO_VALUE] = NO_EXPERT
    return LayerBundles(
        experts_BK=experts_BK,
        source_B=rows[:, 0].astype(np.int16),
        weight_B=table.weights[order].copy(),
    )
