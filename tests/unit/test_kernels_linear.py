"""Packed and ordinary linears: right within a bound, and rows that do not know each other."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from remora.kernels import native, reference
from remora.kernels.linear import (
    ROW_TILE,
    PackedLinear,
    pack_into,
    packed_equals,
    packed_numel,
    row_linear,
    unpack,
)

DTYPES = [torch.float32, torch.bfloat16]
SIZES = [(1, 1), (16, 2), (17, 3), (64, 64), (33, 47), (80, 129), (100, 512), (200, 96)]  # O, K
ISAS = ["portable", "avx2", "avx512", "avx512_bf16", "amx_bf16"]
needs_native = pytest.mark.skipif(not native.native_available(), reason="C++ kernels not built")


def random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Normal values with a few large and a few tiny ones: sums that cancel."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    scale = torch.randint(-6, 7, shape, generator=generator)
    return (x * torch.where(scale.abs() == 6, 2.0**scale, 1.0)).to(dtype)


def check_close(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Within what float32 accumulation and one rounding allow."""
    error = (y.double() - reference.linear(x, weight, bias)).abs()
    bound = reference.linear_error_bound(x, weight, bias, y.dtype)
    assert (error <= bound).all(), f"{error.max()} over {bound.max()}"


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_outputs,num_inputs", SIZES)
def test_packing_is_a_bijection_of_bits(
    dtype: torch.dtype, num_outputs: int, num_inputs: int
) -> None:
    word = torch.int16 if dtype == torch.bfloat16 else torch.int32
    info = torch.iinfo(word)
    generator = torch.Generator().manual_seed(7)
    size = (num_outputs, num_inputs)
    bits = torch.randint(info.min, info.max, size, dtype=word, generator=generator)
    weight = bits.view(dtype)  # NaNs with payloads, denormals, -0 among them
    packed = torch.full((packed_numel(*size, dtype),), 7.0, dtype=dtype)
    pack_into(packed, weight)
    expected = reference.packed_weight(weight)
    assert torch.equal(packed.view(word), expected.view(word)), "padding is zero, too"
    assert torch.equal(unpack(packed, *size).view(word), bits)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_outputs,num_inputs", SIZES)
def test_one_bit_makes_a_packed_weight_another(
    dtype: torch.dtype, num_outputs: int, num_inputs: int
) -> None:
    word = torch.int16 if dtype == torch.bfloat16 else torch.int32
    bits = torch.arange(num_outputs * num_inputs, dtype=torch.int32).to(word)
    bits = bits.view(num_outputs, num_inputs)
    packed = torch.zeros(packed_numel(num_outputs, num_inputs, dtype), dtype=dtype)
    pack_into(packed, bits.view(dtype))
    assert packed_equals(packed, bits.view(dtype))
    for output, at in {(0, 0), (num_outputs - 1, num_inputs - 1), (num_outputs // 2, 0)}:
        for bit in (0, word.itemsize * 8 - 1):
            other = bits.clone()
            other[output, at] ^= torch.tensor(1).bitwise_left_shift(bit).to(word)
            assert not packed_equals(packed, other.view(dtype))


@needs_native
def test_what_cannot_be_packed_is_refused() -> None:
    packed = torch.zeros(packed_numel(16, 8, torch.float32))
    for weight in (torch.zeros(16, 9), torch.zeros(17, 8), torch.zeros(16, 8).bfloat16()):
        with pytest.raises(RuntimeError, match="weight"):
            pack_into(packed, weight)
    with pytest.raises(RuntimeError, match=r"is none of \[16, 7\]"):
        unpack(packed, 16, 7)
    with pytest.raises(RuntimeError, match=r"is none of \[0, 8\]"):
        unpack(packed, 0, 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_outputs,num_inputs", SIZES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_against_the_reference(
    path: str, dtype: torch.dtype, num_outputs: int, num_inputs: int, has_bias: bool
) -> None:
    weight = random(num_outputs, num_inputs, dtype=dtype, seed=1)
    bias = random(num_outputs, dtype=dtype, seed=2) if has_bias else None
    linear = PackedLinear.pack(weight, bias)
    assert torch.equal(linear.unpacked_weight(), weight)
    for num_rows in (1, 2, 5, 6, 7, 13, 65):
        x = random(num_rows, num_inputs, dtype=dtype, seed=num_rows)
        for y in (linear(x), row_linear(x, weight, bias)):
            assert y.dtype == dtype and y.shape == (num_rows, num_outputs)
            check_close(y, x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_outputs,num_inputs", [(200, 96), (80, 129), (1024, 384)])
def test_rows_are_independent_bit_for_bit(
    path: str, threads: int, dtype: torch.dtype, num_outputs: int, num_inputs: int
) -> None:
    weight = random(num_outputs, num_inputs, dtype=dtype, seed=1)
    bias = random(num_outputs, dtype=dtype, seed=2)
    x = random(500, num_inputs, dtype=dtype, seed=3)
    linear = PackedLinear.pack(weight, bias, exact=True)
    whole = linear(x)
    whole_row = row_linear(x, weight, bias, exact=True)
    generator = torch.Generator().manual_seed(threads)
    # The second thread waits for a busy machine's other core, and torch is slow on tiles.
    counts = range(1, 201, 25 if path == "torch" else 11 if threads == 2 else 1)
    for count in counts:
        rows = torch.randperm(500, generator=generator)[:count]
        assert torch.equal(linear(x[rows]), whole[rows]), count
        if count % 7 == 1:
            assert torch.equal(row_linear(x[rows], weight, bias, exact=True), whole_row[rows])


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_thread_count_changes_no_bit(dtype: torch.dtype) -> None:
    linear = PackedLinear.pack(random(1024, 1024, dtype=dtype, seed=1))
    x = random(300, 1024, dtype=dtype, seed=2)
    before = torch.get_num_threads()
    results = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        results.append(linear(x))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@needs_native
@pytest.mark.parametrize("num_rows", [1, 16, 63, 64, 65, 200])
@pytest.mark.parametrize("num_outputs,num_inputs", [(5, 2), (33, 70), (64, 1024), (130, 96)])
def test_on_tiles_an_ordinary_weight_gives_the_bits_of_a_packed_one(
    num_rows: int, num_outputs: int, num_inputs: int
) -> None:
    if not native.native_isa().startswith("amx"):
        pytest.skip("this machine has no AMX tiles: a subprocess emulates them")
    weight = random(num_outputs, num_inputs, dtype=torch.bfloat16, seed=1)
    x = random(num_rows, num_inputs, dtype=torch.bfloat16, seed=2)
    assert torch.equal(row_linear(x, weight), PackedLinear.pack(weight)(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_inputs", [63, 64, 68])
def test_a_poisoned_row_stays_alone(path: str, dtype: torch.dtype, num_inputs: int) -> None:
    weight = random(50, num_inputs, dtype=dtype, seed=1)
    linear = PackedLinear.pack(weight, exact=True)
    x = random(20, num_inputs, dtype=dtype, seed=2)
    clean, clean_row = linear(x), row_linear(x, weight, exact=True)
    for row in (0, 9, 19):
        poisoned = x.clone()
        poisoned[row] = float("nan")
        others = [i for i in range(20) if i != row]
        assert torch.equal(linear(poisoned)[others], clean[others])
        assert torch.equal(row_linear(poisoned, weight, exact=True)[others], clean_row[others])
        assert linear(poisoned)[row].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_shape_and_stride(path: str, dtype: torch.dtype) -> None:
    weight = random(40, 24, dtype=dtype, seed=1)
    linear = PackedLinear.pack(weight.t().contiguous().t(), exact=True)  # a strided weight
    wide = random(9, 60, dtype=dtype, seed=2)
    rows = linear(wide[:, 5:29].contiguous())
    assert torch.equal(linear(wide[:, 5:29]), rows)
    assert torch.equal(linear(wide[:, 5:29].unsqueeze(1))[:, 0], rows)
    assert torch.equal(linear(wide[::2, 5:29]), rows[::2])
    assert torch.equal(linear(wide[:, 5:29].t().contiguous().t()), rows)
    assert linear(wide[:0, 5:29]).shape == (0, 40)
    assert linear(wide[0, 5:29]).shape == (40,)
    assert linear(wide[:, 5:29].reshape(3, 3, 24)).shape == (3, 3, 40)
    plain = row_linear(wide[:, 5:29].clone(), weight, exact=True)
    assert torch.equal(row_linear(wide[:, 5:29], weight, exact=True), plain)
    assert row_linear(wide[:0, 5:29], weight).shape == (0, 40)


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_and_overflow(path: str, dtype: torch.dtype) -> None:
    weight = torch.eye(20, dtype=dtype)
    x = torch.full((1, 20), torch.finfo(dtype).max, dtype=dtype)
    assert torch.equal(PackedLinear.pack(weight)(x), x)
    assert PackedLinear.pack(torch.full((3, 20), 4.0, dtype=dtype))(x).isinf().all()
    assert row_linear(x, torch.full((3, 20), 4.0, dtype=dtype)).isinf().all()


def test_wrong_weights_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[O, K\]"):
        PackedLinear.pack(torch.zeros(3))
    with pytest.raises(ValueError, match="float16"):
        PackedLinear.pack(torch.zeros(3, 3, dtype=torch.float16))
    with pytest.raises(ValueError, match="bias"):
        PackedLinear.pack(torch.zeros(3, 3), torch.zeros(4))


@needs_native
def test_wrong_rows_are_refused() -> None:
    linear = PackedLinear.pack(torch.zeros(8, 8))
    with pytest.raises(RuntimeError, match="does not fit"):
        linear(torch.zeros(2, 9))
    with pytest.raises(RuntimeError, match="does not fit"):
        linear(torch.zeros(2, 8, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="does not fit"):
        row_linear(torch.zeros(2, 9), torch.zeros(8, 8))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [0, 1, 7, 300])
def test_several_linears_in_one_call_are_the_single_ones(dtype: torch.dtype, num_rows: int) -> None:
    layers = [
        PackedLinear.pack(
            random(size, 129, dtype=dtype, seed=size),
            random(size, dtype=dtype, seed=1) if size == 64 else None,
        )
        for size in (512, 64, 40)
    ]
    x = random(num_rows, 129, dtype=dtype, seed=2)
    weights = [(layer.packed, layer.bias, layer.out_features) for layer in layers]
    expected = [layer(x) for layer in layers]
    three = torch.ops.remora.packed_linear_3(x, *weights[0], *weights[1], *weights[2])
    two = torch.ops.remora.packed_linear_2(x, *weights[2], *weights[0])
    assert all(map(torch.equal, three, expected))
    assert all(map(torch.equal, two, (expected[2], expected[0])))


@needs_native
def test_one_compilation_serves_any_row_count_and_any_layer() -> None:
    layers = [PackedLinear.pack(random(48, 32, dtype=torch.float32, seed=i)) for i in range(3)]
    graphs = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        nonlocal graphs
        graphs += 1
        return graph

    def layer_forward(layer: PackedLinear, x: Tensor) -> Tensor:
        return layer(x * 2) + row_linear(x, weight)

    weight = random(48, 32, dtype=torch.float32, seed=9)
    compiled = torch.compile(layer_forward, backend=backend, fullgraph=True, dynamic=True)
    for layer in layers:
        for num_rows in (3, 5, 64):
            x = random(num_rows, 32, dtype=torch.float32, seed=num_rows)
            assert torch.equal(compiled(layer, x), layer_forward(layer, x))
    assert graphs == 1


@needs_native
def test_the_ops_describe_themselves_truly() -> None:
    layer = PackedLinear.pack(torch.randn(40, 24), torch.randn(40))
    x = torch.randn(5, 24)
    checks = ("test_schema", "test_faketensor")
    for op, args in (
        (torch.ops.remora.packed_linear.default, (x, layer.packed, layer.bias, 40)),
        (torch.ops.remora.packed_linear_2.default, (x, *2 * (layer.packed, layer.bias, 40))),
        (torch.ops.remora.packed_linear_3.default, (x, *3 * (layer.packed, layer.bias, 40))),
        (torch.ops.remora.packed_linear.default, (x.view(5, 1, 24), layer.packed, None, 40)),
        (torch.ops.remora.row_linear.default, (x, torch.randn(7, 24), None)),
    ):
        torch.library.opcheck(op, args, test_utils=checks)


ISA_SCRIPT = """
import torch
from remora.kernels import native, reference
from remora.kernels.linear import PackedLinear, row_linear
assert native.native_isa() == {expected!r}, native.native_isa()
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16):
    for num_outputs, num_inputs in ((200, 96), (33, 47), (80, 129)):
        weight = torch.randn(num_outputs, num_inputs).to(dtype)
        bias = torch.randn(num_outputs).to(dtype)
        x = torch.randn(67, num_inputs).to(dtype)
        bound = reference.linear_error_bound(x, weight, bias, dtype)
        linear = PackedLinear.pack(weight, bias)
        for run in (linear, lambda x: row_linear(x, weight, bias)):
            y = run(x)
            assert ((y.double() - reference.linear(x, weight, bias)).abs() <= bound).all()
            for count in range(1, 40):
                rows = torch.randperm(67)[:count]
                assert torch.equal(run(x[rows]), y[rows]), (dtype, num_outputs, count)
        plain = row_linear(x, weight)
        bound = reference.linear_error_bound(x, weight, None, dtype)
        assert ((plain.double() - reference.linear(x, weight, None)).abs() <= bound).all()
        if {expected!r}.startswith("amx") and dtype == torch.bfloat16 and num_inputs % 2 == 0:
            assert torch.equal(plain, PackedLinear.pack(weight)(x))
        for count in (1, 15, 64, 66):
            rows = torch.randperm(67)[:count]
            assert torch.equal(row_linear(x[rows], weight), plain[rows]), (dtype, count)
"""


@needs_native
@pytest.mark.parametrize("isa", [*ISAS, "amx_emulated"])
def test_every_instruction_set_below_this_machines(isa: str) -> None:
    best = ISAS.index(native.native_isa())
    expected = isa if isa not in ISAS else ISAS[min(best, ISAS.index(isa))]
    run = subprocess.run(
        [sys.executable, "-c", ISA_SCRIPT.format(expected=expected)],
        env={**os.environ, "REMORA_ISA": isa, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr


def test_row_tile_is_what_the_torch_path_works_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "native_available", lambda: False)
    seen: list[int] = []

    def watch(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        seen.append(x.shape[0])
        return x @ weight.t()

    linear = PackedLinear.pack(torch.randn(5, 4), exact=True)
    monkeypatch.setattr(torch.nn.functional, "linear", watch)
    assert linear(torch.randn(130, 4)).shape == (130, 5)
    assert seen == [ROW_TILE] * 3
