"""Kernels against the machine: the memory bandwidth and the matmul rate of the same threads.

    .venv/bin/python benchmarks/kernels.py --quick --json out.json

Weights are several times as large as the caches together and are gone through layer by layer, as a
model does. `experts`: all experts of a layer, each with so many rows, in one native call. `int8`,
`int4`: the same with weights quantised to one byte and to four bits. `linear`: a dense packed
linear. What they are held against is measured in the same rounds: `stream_read` over 1 GiB, and
torch's bfloat16 matmul of large matrices.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import common
import torch
from engines_report import Bar, Spread
from kernels_attention import attention_bars, attention_rows

from remora.kernels import native
from remora.kernels.expert_shard import NativeShard
from remora.kernels.experts import PackedExperts
from remora.kernels.experts_dtype import ExpertsDtype
from remora.kernels.gates import SILU
from remora.kernels.linear import PackedLinear
from remora.kernels.memory import huge_zeros

WEIGHT_BYTES: Final = 1 << 30  # of all layers of a case: more than any cache (480 MiB is known)
STREAM_BYTES: Final = 1 << 30
PEAK_SIZE: Final = 2048
EXPERT_ROWS: Final = (1, 2, 3, 4, 8, 16, 32, 128)
LINEAR_ROWS: Final = (1, 2, 4, 8, 16, 32)


class ExpertShape(NamedTuple):
    """Experts of one layer: tiny and small of the checkpoints we measure with."""

    name: str
    hidden: int
    width: int
    num_experts: int
    top_k: int


class Work(NamedTuple):
    """A case: what one call streams and multiplies."""

    kind: str
    name: str
    rows: int
    nbytes: int
    macs: int
    call: Callable[[], object]


EXPERT_KINDS: Final[dict[str, ExpertsDtype]] = {"experts": "auto", "int8": "int8", "int4": "int4"}
EXPERTS: Final = (ExpertShape("tiny", 512, 256, 32, 4), ExpertShape("small", 1024, 384, 64, 8))
LINEARS: Final = {
    "tiny qkv": (512, 1024),
    "tiny head": (512, 32000),
    "small qkv": (1024, 1536),
    "small o": (1024, 1024),
    "small head": (1024, 32000),
}


def expert_works(kind: str, shape: ExpertShape, rows_of: tuple[int, ...]) -> list[Work]:
    """All experts of a layer with so many rows each."""
    per_expert = 3 * shape.hidden * shape.width
    make = functools.partial(
        PackedExperts,
        hidden_size=shape.hidden,
        intermediate_size=shape.width,
        dtype=torch.bfloat16,
        experts_dtype=EXPERT_KINDS[kind],
    )
    one = make(1)
    weights = {name: torch.randn(size) * 0.03 for name, size in one.slot_shapes().items()}
    one.load_slot(0, {name: weight.bfloat16() for name, weight in weights.items()})
    nbytes = one.weight_nbytes * shape.num_experts
    shard = NativeShard()
    num_layers = max(2, WEIGHT_BYTES // nbytes)
    for layer in range(num_layers):
        experts = make(shape.num_experts)
        for ours, its in zip(experts.projections, one.projections, strict=True):
            ours.packed.copy_(its.packed.expand_as(ours.packed))
        shard.add_layer(layer, experts, SILU, torch.arange(shape.num_experts))
    works = []
    for rows in rows_of:
        num_pairs = rows * shape.num_experts
        num_tokens = max(1, num_pairs // shape.top_k)
        x = torch.randn(num_tokens, shape.hidden).bfloat16()
        pair = torch.arange(num_pairs)
        token, expert = (pair % num_tokens).int(), (pair % shape.num_experts).int()
        weight, layers = torch.rand(num_pairs), itertools.cycle(range(num_layers))

        def call(
            x: Any = x, token: Any = token, expert: Any = expert, weight: Any = weight,
            layers: Any = layers,
        ) -> object:  # fmt: skip
            return shard.call(next(layers), x, token, expert, weight, presummed=True)

        works.append(Work(kind, shape.name, rows, nbytes, num_pairs * per_expert, call))
    return works


def linear_works(name: str, num_inputs: int, num_outputs: int) -> list[Work]:
    """One dense linear, as many copies of it as fill the memory."""
    nbytes = 2 * num_inputs * num_outputs
    weight = torch.randn(num_outputs, num_inputs).bfloat16()
    copies = [PackedLinear.pack(weight) for _ in range(max(2, WEIGHT_BYTES // nbytes))]
    works = []
    for rows in LINEAR_ROWS:
        x, layers = torch.randn(rows, num_inputs).bfloat16(), itertools.cycle(copies)

        def call(x: Any = x, layers: Any = layers) -> object:
            return next(layers)(x)

        works.append(Work("linear", name, rows, nbytes, rows * nbytes // 2, call))
    return works


def measure(works: list[Work], threads: int, rounds: int, sample_s: float) -> list[dict[str, Any]]:
    """Rows of the table: rates, and their share of what memory or the multipliers give."""
    torch.set_num_threads(threads)
    stream = huge_zeros(STREAM_BYTES // 8, dtype=torch.int64).fill_(1)
    square = torch.randn(PEAK_SIZE, PEAK_SIZE).bfloat16()
    cases: dict[str, Callable[[], object]] = {
        "stream": lambda: torch.ops.remora.stream_read(stream),
        "peak": lambda: square @ square,
    }
    cases |= {f"{w.kind} {w.name} {w.rows}": w.call for w in works}
    seconds = common.alternate(cases, rounds=rounds, sample_s=sample_s)
    bandwidths = [STREAM_BYTES / s for s in seconds["stream"]]
    peaks = [PEAK_SIZE**3 / s for s in seconds["peak"]]
    rows = []
    for work in works:
        took = seconds[f"{work.kind} {work.name} {work.rows}"]
        rows.append(
            {
                "kind": work.kind,
                "shape": work.name,
                "threads": threads,
                "rows": work.rows,
                "us": Spread.of([s * 1e6 for s in took]),
                "GB/s": Spread.of([work.nbytes / s / 1e9 for s in took]),
                "of bandwidth": common.per_round([work.nbytes / s for s in took], bandwidths),
                "GMAC/s": Spread.of([work.macs / s / 1e9 for s in took]),
                "of peak": common.per_round([work.macs / s for s in took], peaks),
            }
        )
    print(
        f"{threads} threads: memory {Spread.of([b / 1e9 for b in bandwidths])} GB/s, "
        f"matmul {Spread.of([p / 1e9 for p in peaks])} GMAC/s"
    )
    return rows


def bars_of(rows: list[dict[str, Any]]) -> list[Bar]:
    """The worst case of each promise, with two threads."""
    experts = [row for row in rows if row["kind"] == "experts" and row["threads"] == 2]
    few = [row["of bandwidth"] for row in experts if row["rows"] <= 4]
    many = [row["of peak"] for row in experts if row["rows"] == 128]
    named = (
        ("expert_ffn_bandwidth_1_4_rows", few, 0.75),
        ("expert_ffn_peak_128_rows", many, 0.60),
    )
    return [
        Bar(name=name, value=min(found, key=lambda s: s.median), unit="x", op=">=", target=target)
        for name, found, target in named
        if found
    ]


def main() -> None:
    """Measure what is asked for."""
    parser = common.parser(__doc__)
    parser.add_argument("--kind", choices=(*EXPERT_KINDS, "linear", "attention"), nargs="*")
    parser.add_argument("--shape", nargs="*", help="of these names only")
    parser.add_argument("--rows", type=int, nargs="*", help="rows of an expert")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    args = parser.parse_args()
    assert native.native_available(), "there are no C++ kernels here"
    rounds, sample_s = (3, 0.02) if args.quick else (7, 0.05)
    kinds = args.kind or (*EXPERT_KINDS, "linear", "attention")
    rows: list[dict[str, Any]] = []
    for kind, shape in itertools.product(EXPERT_KINDS, EXPERTS):
        if kind in kinds and (not args.shape or shape.name in args.shape):
            works = expert_works(kind, shape, tuple(args.rows or EXPERT_ROWS))
            for threads in args.threads:
                rows += measure(works, threads, rounds, sample_s)
    for name, (num_inputs, num_outputs) in LINEARS.items() if "linear" in kinds else ():
        if not args.shape or name in args.shape:
            works = linear_works(name, num_inputs, num_outputs)
            for threads in args.threads:
                rows += measure(works, threads, rounds, sample_s)
    attention = []
    for threads in args.threads if "attention" in kinds else ():
        attention += attention_rows(threads, rounds, sample_s)
    bars = bars_of(rows) + attention_bars(attention)
    common.finish("kernels", args, rows + attention, bars)


if __name__ == "__main__":
    main()
