"""A routing history as bytes: what a router saves, and the next one begins with.

    data = pack_history(history)
    history = unpack_history(data, limits)   # FrameError for anything else

msgpack with the arrays as raw little-endian bytes, behind a version and a checksum: a file that was
cut off or belongs to another version is told from one that can be used.
"""

import zlib
from typing import Final

import msgspec
import numpy as np

from remora.comm.bundle_table import NO_VALUE, BundleTable
from remora.comm.domains import Domain
from remora.comm.errors import FrameError
from remora.comm.limits import TOP_K_MAX
from remora.comm.sketch import EXPERTS_MAX, LAYERS_MAX, PHASES, feature_layers
from remora.comm.statistics import HistoryCell, HistoryLimits, RoutingHistory

MAGIC: Final = b"RMHIST1\n"
HISTORY_BYTES_MAX: Final = 1 << 30
_HEAD: Final = len(MAGIC) + 4


class _Domain(msgspec.Struct, frozen=True, kw_only=True):
    number: int
    tokens: float
    share: float | None
    labels: list[str]
    histogram: bytes  # float64 [F, E]


class _Cell(msgspec.Struct, frozen=True, kw_only=True):
    domain: int
    phase: int
    layer: int
    rows: bytes  # uint16 [B, 1 + K]: source, experts
    weights: bytes  # float64 [B]
    load: bytes  # float64 [E]


class _History(msgspec.Struct, frozen=True, kw_only=True):
    num_experts: int
    top_k: int
    moe_layers: tuple[int, ...]
    tokens_total: float
    next_number: int
    sources: list[str]
    reported: dict[str, float] = {}  # files of before have none
    domains: list[_Domain]
    cells: list[_Cell]


def pack_history(history: RoutingHistory) -> bytes:
    """Everything in it but its limits."""
    packed = _History(
        num_experts=history.num_experts,
        top_k=history.top_k,
        moe_layers=history.moe_layers,
        tokens_total=history.tokens_total,
        next_number=history.domains.next_number,
        sources=list(history.sources),
        reported=dict(history.reported),
        domains=[
            _Domain(
                number=number,
                tokens=domain.tokens,
                share=history.share.get(number),
                labels=sorted(domain.labels),
                histogram=domain.histogram_FE.astype("<f8").tobytes(),
            )
            for number, domain in history.domains.by_number.items()
        ],
        cells=[
            _Cell(
                domain=domain,
                phase=phase,
                layer=layer,
                rows=cell.table.rows.astype("<u2").tobytes(),
                weights=cell.table.weights.astype("<f8").tobytes(),
                load=cell.load_E.astype("<f8").tobytes(),
            )
            for (domain, phase, layer), cell in history.cells.items()
        ],
    )
    body = msgspec.msgpack.encode(packed)
    return MAGIC + zlib.crc32(body).to_bytes(4, "little") + body


def unpack_history(data: bytes, limits: HistoryLimits | None = None) -> RoutingHistory:
    """Inverse of `pack_history`, under limits of one's own.

    Raises:
        FrameError: it is none, it is damaged, or of another version.
    """
    if len(data) > HISTORY_BYTES_MAX or data[: len(MAGIC)] != MAGIC:
        raise FrameError(f"{len(data)} bytes that are no routing history of this version")
    body = data[_HEAD:]
    if zlib.crc32(body) != int.from_bytes(data[len(MAGIC) : _HEAD], "little"):
        raise FrameError("a routing history that does not match its checksum")
    try:
        packed = msgspec.msgpack.decode(body, type=_History)
        return _restored(packed, limits or HistoryLimits())
    except (msgspec.DecodeError, ValueError) as wrong:
        raise FrameError(f"a routing history that contradicts itself: {wrong}") from wrong


def _restored(packed: _History, limits: HistoryLimits) -> RoutingHistory:
    num_experts, top_k, num_layers = packed.num_experts, packed.top_k, len(packed.moe_layers)
    if not (
        1 <= top_k <= min(TOP_K_MAX, num_experts)
        and num_experts < EXPERTS_MAX
        and 1 <= num_layers <= LAYERS_MAX
    ):
        raise ValueError(f"top {top_k} of {num_experts} experts in {num_layers} layers")
    history = RoutingHistory(
        num_experts=num_experts, top_k=top_k, moe_layers=packed.moe_layers, limits=limits
    )
    history.sources[:] = packed.sources
    history.reported = {name: tokens for name, tokens in packed.reported.items() if tokens > 0}
    history.tokens_total = packed.tokens_total
    history.domains.next_number = packed.next_number
    num_features = len(feature_layers(num_layers))
    for domain in packed.domains:
        histogram = np.frombuffer(domain.histogram, "<f8").reshape(num_features, num_experts)
        history.domains.by_number[domain.number] = Domain(
            histogram.copy(), domain.tokens, set(domain.labels)
        )
        if domain.share is not None:
            history.share[domain.number] = domain.share
    rows_max = _rows_max(limits, len(packed.cells), top_k)
    for number, cell in enumerate(packed.cells):
        rows = np.frombuffer(cell.rows, "<u2").reshape(-1, 1 + top_k).astype(np.uint16)
        weights = np.frombuffer(cell.weights, "<f8").astype(np.float64)
        load_E = np.frombuffer(cell.load, "<f8").astype(np.float64)
        experts_BK = rows[:, 1:]
        if (
            cell.domain not in history.domains.by_number
            or not 0 <= cell.phase < len(PHASES)
            or not 0 <= cell.layer < num_layers
            or len(weights) != len(rows)
            or len(load_E) != num_experts
            or (len(rows) and rows[:, 0].max() >= len(packed.sources))
            or ((experts_BK >= num_experts) & (experts_BK != NO_VALUE)).any()
        ):
            raise ValueError(f"cell {number} of domain {cell.domain}, layer {cell.layer}")
        table = BundleTable(1 + top_k, rows_max, salt=number)
        table.add(rows, weights)
        history.cells[cell.domain, cell.phase, cell.layer] = HistoryCell(table, load_E)
    return history


def _rows_max(limits: HistoryLimits, num_cells: int, top_k: int) -> int:
    """As `RoutingHistory` shares its bytes out."""
    return max(2, limits.bytes_max // max(1, num_cells) // (2 * (top_k + 1) + 8 + 16))
