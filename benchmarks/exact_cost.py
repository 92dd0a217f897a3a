"""What row-independent numerics cost in the linears and experts of one layer, and in the executor.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/exact_cost.py --quick --json out.json

Part 1, one layer of the *small* shape (q, k, v, o, router, top-8 of 64 experts with gate and
combine; attention left out), over weights that do not fit a cache, five ways:

    own fast      own kernels on the T rows of the step, presummed combine
    own exact     the same kernels and rows, ordered combine: row-independent by construction
    own padded    as own exact, the dense rows zero-padded to a multiple of 64
    onednn plain  F.linear, one call per hit expert; its bits move with the number of rows
    onednn packed the same with weights prepacked by oneDNN
    onednn tiles  F.linear on zero-padded tiles of exactly 64 rows, dense and per expert

Part 2, a Qwen3-MoE-shaped dense layer around opaque ops, eager and compiled: time, and whether a
row's bits depend on how many rows stand beside it.

Part 3: the widths at which torch's own operations move a row's bits with the rows beside it.

With one thread the figures are CPU time of that thread, which a busy machine disturbs least.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import common
import torch
import torch.nn.functional as F
from common import Row
from engines_report import Bar, Spread
from exact_cost_layer import DenseLayer, random_weight, row_bits_hold
from exact_cost_ops import row_dependent_ops
from torch import Tensor

from remora.kernels.experts import PackedExperts
from remora.kernels.fingerprint import kernel_fingerprint
from remora.kernels.gates import SILU
from remora.kernels.linear import ROW_TILE, PackedLinear, row_linear, torch_linear
from remora.kernels.routing import combine_ordered, gather_rows, presum, route_sort

HIDDEN, WIDTH, NUM_EXPERTS, TOP_K = 1024, 384, 64, 8
DENSE = {"q": (1024, 1024), "k": (256, 1024), "v": (256, 1024), "o": (1024, 1024)}
WAYS = ("own fast", "own exact", "own padded", "onednn plain", "onednn packed", "onednn tiles")


@dataclass(frozen=True, slots=True)
class Step:
    """Rows of one step and where they go."""

    hidden_TD: Tensor
    index_TK: Tensor
    weights_TK: Tensor


class Layer:
    """The weights of one layer in every form, and one pass through them each way."""

    def __init__(self, seed: int) -> None:
        weights = {
            name: random_weight(*shape, seed=seed + i)
            for i, (name, shape) in enumerate(DENSE.items())
        }
        self.plain = weights
        self.router = random_weight(NUM_EXPERTS, HIDDEN, seed=seed + 9)
        self.own = {name: PackedLinear.pack(weight) for name, weight in weights.items()}
        self.packed = {name: onednn_pack(weight) for name, weight in weights.items()}
        self.up = [random_weight(2 * WIDTH, HIDDEN, seed=seed + 10 + e) for e in range(NUM_EXPERTS)]
        self.down = [random_weight(HIDDEN, WIDTH, seed=seed + 90 + e) for e in range(NUM_EXPERTS)]
        self.packed_up = [onednn_pack(weight) for weight in self.up]
        self.packed_down = [onednn_pack(weight) for weight in self.down]
        self.experts = PackedExperts(
            NUM_EXPERTS, hidden_size=HIDDEN, intermediate_size=WIDTH, dtype=torch.bfloat16
        )
        for e in range(NUM_EXPERTS):
            self.experts.load_slot(e, {"gate_up_proj": self.up[e], "down_proj": self.down[e]})

    def run_own(self, step: Step, *, ordered: bool, padded: bool) -> Tensor:
        """Own kernels; `ordered` combine or `presum`, dense rows padded or not."""
        num_tokens = step.hidden_TD.shape[0]
        x = step.hidden_TD
        if padded:
            x = F.pad(x, (0, 0, 0, -num_tokens % ROW_TILE))
        for name in DENSE:
            y = self.own[name](x)
        row_linear(x, self.router)
        sort = route_sort(step.index_TK.flatten(), NUM_EXPERTS)
        rows = gather_rows(step.hidden_TD, sort.order_N // TOP_K)
        gate_up = self.experts.up(rows, sort.offsets_S1)
        out = self.experts.down(SILU.apply(gate_up), sort.offsets_S1)
        if ordered:
            y = combine_ordered(out, sort.place_N.view(-1, TOP_K), step.weights_TK)
        else:
            pair_row = torch.arange(num_tokens).repeat_interleave(TOP_K)
            y = presum(out, pair_row, step.weights_TK.flatten(), num_tokens, sort.place_N)
        return y

    def run_torch(
        self,
        step: Step,
        linear: Callable[[Tensor, Tensor], Tensor],
        weights: dict[str, Tensor],
        up: list[Tensor],
        down: list[Tensor],
    ) -> Tensor:
        """`linear` for everything, a call per hit expert."""
        for name in DENSE:
            linear(step.hidden_TD, weights[name])
        linear(step.hidden_TD, self.router)
        out_TD = torch.zeros_like(step.hidden_TD, dtype=torch.float32)
        for e in step.index_TK.unique().tolist():
            token, k = torch.where(step.index_TK == e)
            gate, up_part = linear(step.hidden_TD[token], up[e]).chunk(2, dim=-1)
            y = linear(F.silu(gate) * up_part, down[e])
            out_TD.index_add_(0, token, (y * step.weights_TK[token, k, None]).float())
        return out_TD.bfloat16()

    def ways(self, step: Step) -> dict[str, Callable[[], Tensor]]:
        """Every way through this layer."""

        def tiles(x: Tensor, weight: Tensor) -> Tensor:
            return torch_linear(x, weight, None, exact=True)

        def packed(x: Tensor, weight: Tensor) -> Tensor:
            if not weight.is_mkldnn:
                return F.linear(x, weight)
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
            return y

        runs: tuple[Callable[[], Tensor], ...] = (
            lambda: self.run_own(step, ordered=False, padded=False),
            lambda: self.run_own(step, ordered=True, padded=False),
            lambda: self.run_own(step, ordered=True, padded=True),
            lambda: self.run_torch(step, F.linear, self.plain, self.up, self.down),
            lambda: self.run_torch(step, packed, self.packed, self.packed_up, self.packed_down),
            lambda: self.run_torch(step, tiles, self.plain, self.up, self.down),
        )
        return dict(zip(WAYS, runs, strict=True))


def onednn_pack(weight: Tensor) -> Tensor:
    """As inductor's freezing packs a bfloat16 linear."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, 8)
    return packed


def steps(num_tokens: int, count: int) -> list[Step]:
    """Random rows with random top-8 routing."""
    generator = torch.Generator().manual_seed(num_tokens)
    result = []
    for _ in range(count):
        scores = torch.rand(num_tokens, NUM_EXPERTS, generator=generator)
        result.append(
            Step(
                torch.randn(num_tokens, HIDDEN, generator=generator).bfloat16(),
                scores.topk(TOP_K).indices,
                torch.rand(num_tokens, TOP_K, generator=generator).bfloat16(),
            )
        )
    return result


def measure_layers(num_layers: int, batches: list[int], rounds: int) -> tuple[list[Row], list[Bar]]:
    """Part 1: microseconds per layer each way, ratios within rounds."""
    layers = [Layer(1000 * i) for i in range(num_layers)]
    rows: list[Row] = []
    bars: list[Bar] = []
    for batch in batches:
        inputs = steps(batch, num_layers)
        ways = [layer.ways(step) for layer, step in zip(layers, inputs, strict=True)]

        def all_layers(name: str, ways: list[dict[str, Callable[[], Tensor]]] = ways) -> None:
            for way in ways:
                way[name]()

        cases = {name: partial(all_layers, name) for name in WAYS}
        times = common.alternate(cases, rounds=rounds, sample_s=0.15)
        row: dict[str, str | int | float | bool | Spread] = {"layer of rows": batch}
        for name in WAYS:
            row[f"{name} us"] = Spread.of([t / num_layers * 1e6 for t in times[name]])
        rows.append(row)
        for name, above, below, minus in (
            ("exact_layer_cost", "own exact", "own fast", 1.0),
            ("exact_layer_cost_padded", "own padded", "own fast", 1.0),
            ("exact_layer_cost_onednn", "onednn tiles", "onednn packed", 1.0),
            ("own_exact_vs_onednn_packed", "onednn packed", "own exact", 0.0),
        ):
            value = common.per_round(times[above], times[below], minus)
            op, target = ("<", 0.25) if name == "exact_layer_cost" else (None, None)
            bars.append(Bar(name=f"{name}_b{batch}", value=value, unit="x", op=op, target=target))
    return rows, bars


def measure_executors(batches: list[int], rounds: int) -> list[Row]:
    """Part 2: the dense layer eager and compiled."""
    layers = [DenseLayer(seed=i) for i in range(8)]
    compiled = torch.compile(DenseLayer.forward, dynamic=True, fullgraph=True)
    rows: list[Row] = []
    with torch.inference_mode():
        for batch in batches:
            x = torch.randn(batch, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16()
            positions = torch.arange(batch)

            def run(forward: Callable[..., Tensor], x: Tensor = x, p: Tensor = positions) -> None:
                for layer in layers:
                    forward(layer, x, p)

            cases = {
                "eager": partial(run, DenseLayer.forward),
                "compiled": partial(run, compiled),
            }
            times = common.alternate(cases, rounds=rounds, sample_s=0.1)
            micro = {k: Spread.of([t / len(layers) * 1e6 for t in v]) for k, v in times.items()}
            rows.append(
                {
                    "dense rows": batch,
                    "eager us": micro["eager"],
                    "compiled us": micro["compiled"],
                    "eager rows alone": row_bits_hold(layers[0], DenseLayer.forward, batch),
                    "compiled rows alone": row_bits_hold(layers[0], compiled, batch),
                    "same bits": torch.equal(
                        DenseLayer.forward(layers[0], x, positions),
                        compiled(layers[0], x, positions),
                    ),
                }
            )
    return rows


def main() -> None:
    """The command line."""
    parser = common.parser(__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-compile", action="store_true", help="leave part 2 out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    timed = "CPU time" if args.threads == 1 else "wall clock"
    print(f"{common.hardware()}\n{kernel_fingerprint()}\n{args.threads} thread(s), {timed}")
    batches = [1, 8, 32, 512]
    with torch.inference_mode():
        rows, bars = measure_layers(2 if args.quick else 4, batches, 5 if args.quick else 9)
    if not args.no_compile:
        rows += measure_executors(batches, 5 if args.quick else 9)
    rows += row_dependent_ops()
    common.finish("exact_cost", args, rows, bars)


if __name__ == "__main__":
    main()
