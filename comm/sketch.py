"""A routing sketch: what a dense group counted since its last report, in bounded bytes.

How the router carries and uses one:

    report.sketch = encode_sketch(sketch)        # dense group: bytes, at most SKETCH_BYTES_MAX
    sketch = decode_sketch(report.sketch)        # router: FrameError for anything malformed
    history.add(sketch)                          # comm/statistics.py: RoutingHistory
    layers = history.bundles(hosts=topology.hosts)   # list[LayerBundles], one for each MoE layer

A sketch holds, for each domain of traffic, phase and MoE layer, weighted unique bundles (a priority
sample where there were too many: any placement's cost is estimated without bias) and the exact load
of every expert. Sketches add up: in whatever order they are merged, the expected result is the
same. Some tokens come with their ids, in order of the ids: what predictors learn from. Nothing
names a request, and texts are not to be had from it.

Shape suffixes: B bundles, K top-k, E experts, F feature layers, L MoE layers, N sampled tokens.
"""

from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from remora.comm.bundle_table import NO_VALUE
from remora.comm.errors import FrameError
from remora.comm.limits import TOP_K_MAX

VERSION: Final = 1
SKETCH_BYTES_MAX: Final = 2 << 20
DOMAINS_MAX: Final = 64
LABEL_CHARS_MAX: Final = 64
HOST_CHARS_MAX: Final = 256
LAYERS_MAX: Final = 1024
EXPERTS_MAX: Final = 1 << 15
FEATURE_LAYERS_MAX: Final = 4  # of the MoE layers, evenly apart: what a domain is told by
TOKENS_MAX: Final = float(1 << 40)  # of one sketch: sums over many stay far from overflow
NAMES_BYTES: Final = 64  # of a cell or a domain: names of its fields, numbers, lengths; at most
SKETCH_NAMES_BYTES: Final = 512  # of a sketch, with the name of its host
PHASES: Final = ("prefill", "decode")


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One MoE layer in one phase in one domain."""

    layer: int  # index into `moe_layers`
    phase: int  # index into PHASES
    experts: bytes  # uint16 [B, K], ascending, NO_VALUE where a token has fewer
    weights: bytes  # float32 [B]: tokens
    load: bytes  # float32 [E]: tokens that chose each expert; exact

    def bundles(self, top_k: int) -> tuple[NDArray[np.uint16], NDArray[np.float64]]:
        """`[B, K]` and `[B]`."""
        experts_BK = np.frombuffer(self.experts, "<u2").reshape(-1, top_k).astype(np.uint16)
        return experts_BK, np.frombuffer(self.weights, "<f4").astype(np.float64)

    def load_E(self) -> NDArray[np.float64]:
        """`[E]`."""
        return np.frombuffer(self.load, "<f4").astype(np.float64)


class DomainSketch(msgspec.Struct, frozen=True, kw_only=True):
    """One domain of traffic, as its dense group told domains apart."""

    tokens: float
    histogram: bytes  # float32 [F, E]: tokens by expert in the feature layers
    cells: list[Cell]
    label: str | None = None  # given by clients; None: found by clustering

    def histogram_FE(self, num_experts: int) -> NDArray[np.float64]:
        """`[F, E]`."""
        return np.frombuffer(self.histogram, "<f4").reshape(-1, num_experts).astype(np.float64)


class TokenSample(msgspec.Struct, frozen=True, kw_only=True):
    """Some tokens with the experts that they chose."""

    token_ids: bytes  # uint32 [N], ascending
    experts: bytes  # uint16 [L, N, K], NO_VALUE where a token has fewer

    def token_N(self) -> NDArray[np.int64]:
        """`[N]`."""
        return np.frombuffer(self.token_ids, "<u4").astype(np.int64)

    def experts_LNK(self, num_layers: int, top_k: int) -> NDArray[np.int64]:
        """`[L, N, K]`, -1 where there is none."""
        found = np.frombuffer(self.experts, "<u2").astype(np.int64)
        found[found == NO_VALUE] = -1
        return found.reshape(num_layers, -1, top_k)


class RoutingSketch(msgspec.Struct, frozen=True, kw_only=True):
    """What one dense group counted. Weights are tokens as routed: already scaled up where only
    a part was counted (`tokens_counted` of `tokens_seen`, in each phase)."""

    source: str  # host of the dense group (`Endpoint.host`)
    num_experts: int
    top_k: int
    moe_layers: tuple[int, ...]  # decoder-layer indices
    tokens_seen: tuple[float, float]  # by PHASES
    tokens_counted: tuple[float, float]
    domains: list[DomainSketch]
    sample: TokenSample | None = None
    version: int = VERSION

    @property
    def counted_ratio(self) -> float:
        """Share of the tokens that was looked at, 0 to 1; 1 when there were none."""
        seen = sum(self.tokens_seen)
        return sum(self.tokens_counted) / seen if seen else 1.0


def feature_layers(num_layers: int) -> NDArray[np.intp]:
    """Indices of the MoE layers by whose experts domains are told apart."""
    count = min(FEATURE_LAYERS_MAX, num_layers)
    return np.unique(np.linspace(0, num_layers - 1, count).round().astype(np.intp))


def rows_per_cell(
    bytes_max: int,
    *,
    num_domains: int,
    num_cells: int,
    num_layers: int,
    num_experts: int,
    top_k: int,
) -> int:
    """Bundles of each of `num_cells` cells that a sketch of `bytes_max` bytes has room for.

    Args:
        num_domains: of traffic, in all of which the cells lie.
        num_layers: MoE layers of the model.
    """
    load_bytes = 4 * num_experts
    histogram_bytes = load_bytes * len(feature_layers(num_layers))
    label_bytes = 4 * LABEL_CHARS_MAX  # in UTF-8, at most
    fixed = SKETCH_NAMES_BYTES + 4 * num_layers
    fixed += num_domains * (histogram_bytes + label_bytes + NAMES_BYTES)
    fixed += num_cells * (load_bytes + NAMES_BYTES)
    return max(2, (bytes_max - fixed) // max(1, num_cells) // (2 * top_k + 4))


def encode_sketch(sketch: RoutingSketch) -> bytes:
    """msgpack bytes."""
    return msgspec.msgpack.encode(sketch)


def decode_sketch(data: bytes | memoryview) -> RoutingSketch:
    """Inverse of `encode_sketch`; everything in it is checked.

    Raises:
        FrameError: not a sketch, too large, of another version, or numbers that cannot be.
    """
    if len(data) > SKETCH_BYTES_MAX:
        raise FrameError(f"a routing sketch of {len(data)} bytes, at most {SKETCH_BYTES_MAX}")
    try:
        sketch = msgspec.msgpack.decode(data, type=RoutingSketch)
    except msgspec.DecodeError as error:
        raise FrameError(f"not a routing sketch: {error}") from error
    check_sketch(sketch)
    return sketch


def check_sketch(sketch: RoutingSketch) -> None:
    """Raises FrameError when a sketch contradicts itself."""
    if sketch.version != VERSION:
        raise FrameError(f"a routing sketch of version {sketch.version}, not {VERSION}")
    if len(sketch.source) > HOST_CHARS_MAX:
        raise FrameError(f"a host of {len(sketch.source)} characters, at most {HOST_CHARS_MAX}")
    num_layers = len(sketch.moe_layers)
    shape_ok = (
        1 <= sketch.num_experts < EXPERTS_MAX
        and 1 <= sketch.top_k <= min(TOP_K_MAX, sketch.num_experts)
        and 1 <= num_layers <= LAYERS_MAX
        and len(sketch.domains) <= DOMAINS_MAX
    )
    numbers = [*sketch.tokens_seen, *sketch.tokens_counted, *(d.tokens for d in sketch.domains)]
    if not shape_ok or not all(0 <= n <= TOKENS_MAX for n in numbers):  # nor what is no number
        raise FrameError(
            f"a routing sketch of {num_layers} layers, top {sketch.top_k} of"
            f" {sketch.num_experts} experts, {len(sketch.domains)} domains, tokens {numbers}, each"
            f" 0 to {TOKENS_MAX:.0f}"
        )
    if sketch.sample is not None:
        _check_sample(sketch, sketch.sample)
    for domain in sketch.domains:
        if domain.label is not None and len(domain.label) > LABEL_CHARS_MAX:
            raise FrameError(
                f"a label of {len(domain.label)} characters, at most {LABEL_CHARS_MAX}"
            )
        num_values = len(feature_layers(num_layers)) * sketch.num_experts
        _check_floats(domain.histogram, num_values, "a domain's histogram")
        if len(domain.cells) > num_layers * len(PHASES):
            raise FrameError(f"a routing sketch with {len(domain.cells)} cells in a domain")
        for cell in domain.cells:
            _check_cell(sketch, cell)


def _check_sample(sketch: RoutingSketch, sample: TokenSample) -> None:
    num_tokens, rest = divmod(len(sample.token_ids), 4)
    due = 2 * len(sketch.moe_layers) * num_tokens * sketch.top_k
    if rest or len(sample.experts) != due:
        raise FrameError(
            f"a sample of {len(sample.token_ids)} bytes of token ids and {len(sample.experts)} of"
            f" experts, {due} are due"
        )
    experts = np.frombuffer(sample.experts, "<u2")
    if not ((experts < sketch.num_experts) | (experts == NO_VALUE)).all():
        raise FrameError("a sample whose experts are out of range")


def _check_cell(sketch: RoutingSketch, cell: Cell) -> None:
    if not (0 <= cell.layer < len(sketch.moe_layers) and 0 <= cell.phase < len(PHASES)):
        raise FrameError(f"a cell of layer {cell.layer}, phase {cell.phase}")
    num_bundles, rest = divmod(len(cell.experts), 2 * sketch.top_k)
    if rest:
        raise FrameError(f"{len(cell.experts)} bytes of bundles of {sketch.top_k} experts")
    experts_BK, _ = cell.bundles(sketch.top_k)
    in_range = (experts_BK < sketch.num_experts) | (experts_BK == NO_VALUE)
    if not in_range.all() or (np.diff(experts_BK.astype(np.int64), axis=1) < 0).any():
        raise FrameError("bundles whose experts are out of range or do not ascend")
    _check_floats(cell.weights, num_bundles, "weights of bundles")
    _check_floats(cell.load, sketch.num_experts, "loads of experts")


def _check_floats(data: bytes, count: int, what: str) -> None:
    if len(data) != 4 * count:
        raise FrameError(f"{what}: {len(data)} bytes, {4 * count} are due")
    values = np.frombuffer(data, "<f4")
    if not ((values >= 0) & (values <= TOKENS_MAX)).all():
        raise FrameError(f"{what}: not all 0 to {TOKENS_MAX:.0f}")
