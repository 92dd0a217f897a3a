"""Counts what a dense group routes, into sketches: requests told apart by domain, memory bounded.

    counter.count(ids_LTK, runs)           # runs: which rows are of which request, in which phase
    sketch = counter.take("host-a")        # what was counted since the last time

Pure, and not thread-safe. Work in Python is per run, request and layer, not per token; the rest is
compiled and runs without the GIL.

Shape suffixes: L MoE layers, T tokens, K top-k, E experts, F feature layers, R requests.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import numba
import numpy as np
from numpy.typing import NDArray

from remora.comm.bundle_table import NO_VALUE, BundleTable, priority_sample, sort_rows
from remora.comm.domains import Domains
from remora.comm.sketch import (
    PHASES,
    SKETCH_BYTES_MAX,
    Cell,
    DomainSketch,
    RoutingSketch,
    TokenSample,
    feature_layers,
    rows_per_cell,
)

DOMAINS_MAX: Final = 12  # that one dense group tells apart; the router has its own
SAMPLE_TOKENS_MAX: Final = 1024  # of a sketch, with their ids
SAMPLE_RUN_MAX: Final = 256  # of one run of rows: a long prompt is not all that there is
REQUESTS_MAX: Final = 1024  # whose histograms are kept; those seen longest ago go
LOOKS_MAX: Final = 512  # tokens of a request after which it stays in its domain
TABLE_BYTES_MAX: Final = 32 << 20

_jit: Any = numba.njit(cache=True, nogil=True, boundscheck=False)


@_jit
def _add_histograms(ids_LTK, layer_F, slot_T, num_experts, histogram_RFE):  # type: ignore[no-untyped-def]
    for f in range(layer_F.shape[0]):
        for t in range(slot_T.shape[0]):
            for k in range(ids_LTK.shape[2]):
                e = ids_LTK[layer_F[f], t, k]
                if 0 <= e < num_experts:
                    histogram_RFE[slot_T[t], f, e] += 1.0


@_jit
def _add_load(rows_TK, load_E):  # type: ignore[no-untyped-def]
    for t in range(rows_TK.shape[0]):
        for e in rows_TK[t]:
            if e < load_E.shape[0]:
                load_E[e] += 1.0


class Run(msgspec.Struct, frozen=True):
    """Rows of one request that lie together."""

    request: int
    phase: int  # index into PHASES
    num_tokens: int
    start: int = 0  # position of the first
    token_ids: list[int] = []  # of each; empty where nobody asked for them
    domain: str | None = None  # the client's own name for it

    def part(self, begin: int, end: int) -> "Run":
        """Rows `begin` to `end`."""
        ids = self.token_ids[begin:end]
        return Run(self.request, self.phase, end - begin, self.start + begin, ids, self.domain)


@dataclass(slots=True)
class _Cell:
    table: BundleTable
    load_E: NDArray[np.float64]


class RoutingCounter:
    """See the head of this file.

    Args:
        moe_layers: decoder-layer indices.
        bytes_max: of one encoded sketch.
    """

    def __init__(
        self,
        *,
        num_experts: int,
        top_k: int,
        moe_layers: tuple[int, ...],
        bytes_max: int = SKETCH_BYTES_MAX,
    ) -> None:
        self.num_experts, self.top_k, self.moe_layers = num_experts, top_k, moe_layers
        self._layer_F = feature_layers(len(moe_layers))
        loads_bytes = len(moe_layers) * len(PHASES) * (4 * num_experts + 64)  # of a domain, exact
        domains_max = max(2, min(DOMAINS_MAX, bytes_max // 2 // loads_bytes))
        self._domains = Domains(domains_max=domains_max, half_life_tokens=100_000)
        shape = (len(self._layer_F), num_experts)
        self._histogram_RFE = np.zeros((REQUESTS_MAX, *shape))
        self._tokens_R = np.zeros(REQUESTS_MAX, np.int64)
        self._domain_R = np.full(REQUESTS_MAX, -1, np.int64)
        self._label_R: list[str | None] = [None] * REQUESTS_MAX
        self._slots: dict[int, int] = {}  # request -> row of the three, used longest ago first
        self._cells: dict[tuple[int, int, int], _Cell] = {}
        self._new_histogram: dict[int, NDArray[np.float64]] = {}  # by domain, since `take`
        self._new_tokens: dict[int, float] = {}
        self._seen = [0.0] * len(PHASES)
        self._counted = [0.0] * len(PHASES)
        token_bytes = 4 + 2 * len(moe_layers) * top_k
        self._sample_max = min(SAMPLE_TOKENS_MAX, bytes_max // 8 // token_bytes)
        self._bundles_bytes_max = bytes_max - self._sample_max * token_bytes
        self._sample: list[tuple[list[int], NDArray[np.int64]]] = []  # ids, [L, n, K]
        self._num_sampled = 0
        num_cells = len(moe_layers) * len(PHASES) * domains_max
        self._rows_max = max(64, min(4096, TABLE_BYTES_MAX // num_cells // (2 * top_k + 24)))

    def warm(self) -> None:
        """Compile what `count` and `take` call, by counting tokens with a twin of this one."""
        twin = RoutingCounter(
            num_experts=self.num_experts, top_k=self.top_k, moe_layers=self.moe_layers
        )
        ids_LTK = np.zeros((len(self.moe_layers), 5, self.top_k), np.int64)
        ids_LTK[:, 1:3] = -1
        twin.count(ids_LTK[:, :4], [Run(0, 0, 2), Run(0, 1, 2)])  # as views of a larger array
        for cell in twin._cells.values():
            cell.table.prune(1)
        twin.take("")

    @property
    def wants_tokens(self) -> bool:
        """Whether token ids of runs are of use now; may be asked by any thread."""
        return self._num_sampled < self._sample_max

    def skip(self, runs: Sequence[Run]) -> None:
        """These were routed and nobody looked: the rest stands for them."""
        for run in runs:
            self._seen[run.phase] += run.num_tokens

    def count(self, ids_LTK: NDArray[np.int64], runs: Sequence[Run]) -> None:
        """Count tokens.

        Args:
            ids_LTK: experts of the runs' tokens, one after another; negative: none.
        """
        assert sum(run.num_tokens for run in runs) == ids_LTK.shape[1], "rows of no run"
        for begin in range(0, len(runs), REQUESTS_MAX):  # a slot must not be given away in between
            part = runs[begin : begin + REQUESTS_MAX]
            num_tokens = sum(run.num_tokens for run in part)
            self._take_sample(ids_LTK, part)
            self._count(ids_LTK[:, :num_tokens], part)
            ids_LTK = ids_LTK[:, num_tokens:]

    def _count(self, ids_LTK: NDArray[np.int64], runs: Sequence[Run]) -> None:
        num_R = np.array([run.num_tokens for run in runs])
        slot_R = np.array([self._slot(run.request, run.domain) for run in runs], np.int64)
        phase_R = np.array([run.phase for run in runs], np.int64)
        slot_T, phase_T = np.repeat(slot_R, num_R), np.repeat(phase_R, num_R)
        _add_histograms(ids_LTK, self._layer_F, slot_T, self.num_experts, self._histogram_RFE)
        before_R = self._tokens_R.copy()
        np.add.at(self._tokens_R, slot_R, num_R)
        for slot in np.unique(slot_R).tolist():
            self._look(slot, int(before_R[slot]), int(self._tokens_R[slot]))
        domain_T = self._domain_R[slot_T]
        for domain in np.unique(domain_T).tolist():
            self._note_domain(domain, ids_LTK, domain_T == domain)
            for phase in range(len(PHASES)):
                rows_T = np.flatnonzero((domain_T == domain) & (phase_T == phase))
                if len(rows_T):
                    self._count_rows(domain, phase, ids_LTK, rows_T)
        for phase in range(len(PHASES)):
            num_tokens = float((phase_T == phase).sum())
            self._seen[phase] += num_tokens
            self._counted[phase] += num_tokens

    def _take_sample(self, ids_LTK: NDArray[np.int64], runs: Sequence[Run]) -> None:
        first = 0
        for run in runs:
            count = min(len(run.token_ids), SAMPLE_RUN_MAX, self._sample_max - self._num_sampled)
            if count > 0:
                part_LTK = ids_LTK[:, first : first + count].copy()
                self._sample.append((run.token_ids[:count], part_LTK))
                self._num_sampled += count
            first += run.num_tokens

    def _take_token_sample(self) -> TokenSample | None:
        """Tokens in order of their ids: of the texts that they came from nothing is left."""
        if not self._sample:
            return None
        token_T = np.concatenate([ids for ids, _ in self._sample])
        ids_LTK = np.concatenate([part_LTK for _, part_LTK in self._sample], axis=1)
        self._sample, self._num_sampled = [], 0
        ids_LTK[(ids_LTK < 0) | (ids_LTK >= self.num_experts)] = NO_VALUE
        order = np.argsort(token_T, kind="stable")
        return TokenSample(
            token_ids=token_T[order].astype("<u4").tobytes(),
            experts=ids_LTK[:, order].astype("<u2").tobytes(),
        )

    def shared_labels(self) -> list[list[str]]:
        """As `Domains.shared_labels`."""
        return self._domains.shared_labels()

    def take(self, source: str) -> RoutingSketch:
        """What was counted since the last call; the counts begin anew.

        Args:
            source: host of this dense group.
        """
        scale_P = [s / c if c else 0.0 for s, c in zip(self._seen, self._counted, strict=True)]
        num_rows = rows_per_cell(
            self._bundles_bytes_max,
            num_domains=len(self._new_tokens),
            num_cells=len(self._cells),
            num_layers=len(self.moe_layers),
            num_experts=self.num_experts,
            top_k=self.top_k,
        )
        domains = []
        for number, tokens in self._new_tokens.items():
            cells = [
                self._cell_sketch(key, cell, num_rows, scale_P[key[1]])
                for key, cell in self._cells.items()
                if key[0] == number
            ]
            histogram = self._new_histogram[number].astype("<f4").tobytes()
            # of names that share a domain one stands for all: without any it would be counted with
            # requests that have none
            label = min(self._domains.by_number[number].labels, default=None)
            domains.append(
                DomainSketch(tokens=tokens, histogram=histogram, cells=cells, label=label)
            )
        sketch = RoutingSketch(
            source=source,
            num_experts=self.num_experts,
            top_k=self.top_k,
            moe_layers=self.moe_layers,
            tokens_seen=(self._seen[0], self._seen[1]),
            tokens_counted=(self._counted[0], self._counted[1]),
            domains=domains,
            sample=self._take_token_sample(),
        )
        self._cells.clear()
        self._new_histogram.clear()
        self._new_tokens.clear()
        self._seen = [0.0] * len(PHASES)
        self._counted = [0.0] * len(PHASES)
        return sketch

    # -- inside -------------------------------------------------------------------------------

    def _slot(self, request: int, label: str | None) -> int:
        slot = self._slots.pop(request, None)
        if slot is None:
            if len(self._slots) < REQUESTS_MAX:
                slot = len(self._slots)
            else:
                slot = self._slots.pop(next(iter(self._slots)))
            self._histogram_RFE[slot] = 0.0
            self._tokens_R[slot] = 0
            self._domain_R[slot] = -1
            self._label_R[slot] = label
        self._slots[request] = slot
        return slot

    def _look(self, slot: int, before: int, now: int) -> None:
        """Decide a request's domain at its first tokens, and whenever they have doubled."""
        domain = int(self._domain_R[slot])
        known = domain in self._domains.by_number
        if known and (now > LOOKS_MAX or now.bit_length() == before.bit_length()):
            return
        number, merged = self._domains.assign(self._histogram_RFE[slot], self._label_R[slot])
        self._domain_R[slot] = number
        if merged is not None:
            self._merge(*merged)

    def _merge(self, gone: int, into: int) -> None:
        self._domain_R[self._domain_R == gone] = into
        for key in [key for key in self._cells if key[0] == gone]:
            old = self._cells.pop(key)
            cell = self._cell(into, *key[1:])
            cell.table.add(old.table.rows, old.table.weights)
            cell.load_E += old.load_E
        if gone in self._new_tokens:
            histogram_FE = self._new_histogram.pop(gone)
            self._add_new(into, histogram_FE, self._new_tokens.pop(gone))

    def _note_domain(
        self, domain: int, ids_LTK: NDArray[np.int64], is_in_T: NDArray[np.bool_]
    ) -> None:
        """Grow a domain's centroid by its tokens."""
        histogram_1FE = np.zeros((1, len(self._layer_F), self.num_experts))
        num_tokens = int(is_in_T.sum())
        slot_T = np.zeros(num_tokens, np.int64)
        _add_histograms(
            np.ascontiguousarray(ids_LTK[self._layer_F][:, is_in_T]),
            np.arange(len(self._layer_F)),
            slot_T,
            self.num_experts,
            histogram_1FE,
        )
        self._domains.grow(domain, histogram_1FE[0], num_tokens)
        self._add_new(domain, histogram_1FE[0], float(num_tokens))

    def _add_new(self, domain: int, histogram_FE: NDArray[np.float64], tokens: float) -> None:
        known = self._new_histogram.get(domain)
        self._new_histogram[domain] = histogram_FE if known is None else known + histogram_FE
        self._new_tokens[domain] = self._new_tokens.get(domain, 0.0) + tokens

    def _cell(self, domain: int, phase: int, layer: int) -> _Cell:
        key = (domain, phase, layer)
        cell = self._cells.get(key)
        if cell is None:
            table = BundleTable(self.top_k, self._rows_max, salt=hash(key))
            cell = self._cells[key] = _Cell(table, np.zeros(self.num_experts))
        return cell

    def _count_rows(
        self, domain: int, phase: int, ids_LTK: NDArray[np.int64], rows_T: NDArray[np.intp]
    ) -> None:
        sorted_TK = np.empty((len(rows_T), self.top_k), np.uint16)
        weight_T = np.ones(len(rows_T))
        for layer in range(len(self.moe_layers)):
            cell = self._cell(domain, phase, layer)
            sort_rows(ids_LTK[layer], rows_T, sorted_TK)
            cell.table.add(sorted_TK, weight_T)
            _add_load(sorted_TK, cell.load_E)

    def _cell_sketch(
        self, key: tuple[int, int, int], cell: _Cell, num_rows: int, scale: float
    ) -> Cell:
        salt = hash((key, int(self._seen[0]), int(self._seen[1])))
        kept, weight_B = priority_sample(cell.table.rows, cell.table.weights, num_rows, salt)
        return Cell(
            layer=key[2],
            phase=key[1],
            experts=cell.table.rows[kept].astype("<u2").tobytes(),
            weights=(weight_B * scale).astype("<f4").tobytes(),
            load=(cell.load_E * scale).astype("<f4").tobytes(),
        )
