"""Weights of one byte and of four bits: quantised, packed, multiplied, moved."""

from typing import Any

import pytest
import torch
from support.isa_script import run_under
from torch import Tensor

from remora.kernels import int4, native, reference
from remora.kernels.expert_shard import NativeShard
from remora.kernels.experts import PackedExperts
from remora.kernels.experts_dtype import ExpertsDtype
from remora.kernels.gates import SILU, Gate
from remora.kernels.quantization import Quantization, quantization_of

FORMS: list[ExpertsDtype] = ["int8", "int4"]
SIZES = [(1, 1), (7, 5), (16, 4), (64, 64), (65, 66), (200, 33), (70, 200), (128, 129)]
needs_native = pytest.mark.skipif(not native.native_available(), reason="C++ kernels not built")
each_form = pytest.mark.parametrize("kind", FORMS)


def form_of(kind: ExpertsDtype) -> Quantization:
    form = quantization_of(kind)
    assert form is not None
    return form


def random_weight(num_outputs: int, num_inputs: int) -> Tensor:
    generator = torch.Generator().manual_seed(num_outputs)
    return (torch.randn(num_outputs, num_inputs, generator=generator) * 0.1).bfloat16()


@each_form
@pytest.mark.parametrize("num_outputs,num_inputs", SIZES)
def test_packing_is_exact(kind: ExpertsDtype, num_outputs: int, num_inputs: int) -> None:
    form = form_of(kind)
    q, scale = form.quantize(random_weight(num_outputs, num_inputs))
    assert q.dtype == torch.int8 and q.shape == (num_outputs, num_inputs)
    assert scale.dtype == torch.float32 and scale.shape == form.scale_shape(num_outputs, num_inputs)
    packed = torch.zeros(form.packed_nbytes(num_outputs, num_inputs), dtype=torch.uint8)
    form.pack_into(packed, q, scale)
    again = form.unpack(packed, num_outputs, num_inputs)
    assert torch.equal(again[0], q) and torch.equal(again[1], scale)


@pytest.mark.parametrize("num_outputs,num_inputs", SIZES)
def test_int8_is_near(num_outputs: int, num_inputs: int) -> None:
    weight, form = random_weight(num_outputs, num_inputs), form_of("int8")
    q, scale = form.quantize(weight)
    error = (form.dequantize(q, scale) - weight.float()).abs()
    assert (error <= 0.5001 * scale[:, None]).all() and int(q.abs().max()) == 127


def test_int8_refuses_what_is_not_finite() -> None:
    """A NaN used to give an output of zeros, an infinity one of NaN: nobody was told."""
    for bad in (torch.nan, torch.inf, -torch.inf):
        weight = random_weight(3, 8)
        weight[1, 5] = bad
        with pytest.raises(ValueError, match=r"finite weights, got (nan|inf)"):
            form_of("int8").quantize(weight)


@pytest.mark.parametrize("num_outputs,num_inputs", SIZES)
def test_int4_takes_the_better_of_two_scales(num_outputs: int, num_inputs: int) -> None:
    """Against every scale that there is, one group at a time."""
    weight = random_weight(num_outputs, num_inputs).double()
    q, scale = int4.quantize(weight.bfloat16())
    held = int4.dequantize(q, scale)
    assert torch.equal(held.bfloat16().float(), held), "weights are bfloat16"
    scales = torch.tensor([m / 4 * 2.0**e for e in range(-47, 2) for m in range(4, 8)]).double()
    for group in range(scale.shape[1]):
        part = weight[:, group * 64 : (group + 1) * 64]
        rounded = (part[..., None] / scales).round().clamp(-7, 7) * scales
        errors = ((rounded - part[..., None]) ** 2).sum(dim=1)
        largest = part.abs().amax(dim=1) / 7
        above = (scales >= largest[:, None]).long().argmax(dim=1)  # the first one
        below = torch.where(scales[above] == largest, above, above - 1).clamp(min=0)
        choice = torch.stack([below, above], dim=1)
        best = errors.gather(1, choice).amin(dim=1)
        found = ((held[:, group * 64 : (group + 1) * 64].double() - part) ** 2).sum(dim=1)
        torch.testing.assert_close(found, best, rtol=1e-5, atol=1e-12)
        assert torch.isin(scale[:, group].double(), scales).all()


def test_int4_of_small_large_and_none() -> None:
    q, scale = int4.quantize(torch.zeros(2, 70))
    assert (q == 0).all() and (scale == int4.SMALLEST).all()
    weight = torch.full((1, 64), int4.LARGEST_WEIGHT)
    assert torch.equal(int4.dequantize(*int4.quantize(weight)), weight)
    tiny = torch.full((1, 64), 7 * int4.SMALLEST)
    assert torch.equal(int4.dequantize(*int4.quantize(tiny)), tiny)
    assert (int4.quantize(tiny / 100)[0] == 0).all()
    for bad in (torch.nan, torch.inf, 2 * int4.LARGEST_WEIGHT):
        with pytest.raises(ValueError, match=r"int4 holds weights up to 802816 .* got"):
            int4.quantize(torch.tensor([[1.0, bad]]))
    packed = torch.zeros(int4.packed_nbytes(1, 64), dtype=torch.uint8)
    ones = torch.ones(1, 64, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"int4 weights are -7\.\.7, got -8\.\.1"):
        int4.pack_into(packed, torch.cat([ones[:, 1:], ones[:, :1] * -8], dim=1), torch.ones(1, 1))
    for scale_value in (0.0, 1.1, 2.0**18, 2.0**-60, torch.nan):
        with pytest.raises(ValueError, match="scales of int4 are"):
            int4.pack_into(packed, ones, torch.full((1, 1), scale_value))


def test_an_output_of_zeros_in_int8() -> None:
    q, scale = form_of("int8").quantize(torch.zeros(2, 8))
    assert (q == 0).all() and (scale == 1).all()


def experts_of(kind: ExpertsDtype, hidden: int, width: int, **flags: bool) -> PackedExperts:
    experts = PackedExperts(
        4,
        hidden_size=hidden,
        intermediate_size=width,
        dtype=torch.bfloat16,
        experts_dtype=kind,
        **flags,
    )
    for slot in range(4):
        tensors = {
            name: (torch.randn(shape, generator=torch.Generator().manual_seed(slot)) * 0.1)
            for name, shape in experts.slot_shapes().items()
        }
        experts.load_slot(slot, {name: t.bfloat16() for name, t in tensors.items()})
    return experts


def offsets_of(*counts: int) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0)


def held_weights(experts: PackedExperts, name: str) -> tuple[Tensor, Tensor | None]:
    """What a plain linear would multiply with [S, O, K], and biases."""
    held = [experts.export_slot(slot) for slot in range(experts.num_slots)]
    form = form_of(experts.experts_dtype)
    weights = [
        form.dequantize(t[name].t() if experts.is_transposed else t[name], t[f"{name}_scale"])
        for t in held
    ]
    bias = torch.stack([t[f"{name}_bias"] for t in held]) if experts.has_bias else None
    return torch.stack(weights).double(), bias


@each_form
@pytest.mark.parametrize(
    "flags", [{}, {"has_bias": True, "is_transposed": True}, {"has_gate": False}]
)
@pytest.mark.parametrize("hidden,width", [(32, 16), (36, 7), (256, 96), (136, 200)])
def test_against_the_reference(
    path: str, kind: ExpertsDtype, hidden: int, width: int, flags: dict[str, bool]
) -> None:
    experts = experts_of(kind, hidden, width, **flags)
    counts = (3, 40, 9, 1)
    offsets = offsets_of(*counts)
    for name, apply in ((experts.up_name, experts.up), ("down_proj", experts.down)):
        weights, bias = held_weights(experts, name)
        x = torch.randn(sum(counts), weights.shape[2]).bfloat16()
        y = apply(x, offsets)
        expected = reference.grouped_linear(x, weights, bias, offsets)
        magnitude = reference.grouped_linear(x.abs(), weights.abs(), None, offsets)
        # Without a compiler int8 weights are rounded to bfloat16 once more.
        tolerance = 2 * torch.finfo(torch.bfloat16).eps * (magnitude + expected.abs()) + 1e-6
        assert y.dtype == torch.bfloat16 and ((y.double() - expected).abs() <= tolerance).all()


@needs_native
@pytest.mark.parametrize("hidden,width", [(64, 64), (136, 200), (1024, 48)])
def test_int4_has_the_bits_of_bfloat16_weights(threads: int, hidden: int, width: int) -> None:
    """What is held is a bfloat16 weight, and is computed with as one, in the same order."""
    experts = experts_of("int4", hidden, width)
    plain = PackedExperts(4, hidden_size=hidden, intermediate_size=width, dtype=torch.bfloat16)
    names = (experts.up_name, "down_proj")
    for slot in range(4):
        weights = {name: held_weights(experts, name)[0][slot].bfloat16() for name in names}
        plain.load_slot(slot, weights)
    for counts in ((1, 0, 4, 3), (20, 33, 2, 70)):
        x, offsets = torch.randn(sum(counts), hidden).bfloat16(), offsets_of(*counts)
        assert torch.equal(experts.up(x, offsets), plain.up(x, offsets))
        h = torch.randn(sum(counts), width).bfloat16()
        assert torch.equal(experts.down(h, offsets), plain.down(h, offsets))


@each_form
def test_a_row_depends_on_itself_only(path: str, kind: ExpertsDtype, threads: int) -> None:
    experts = experts_of(kind, 256, 96)
    experts.exact = True
    x = torch.randn(60, 256).bfloat16()
    alone = torch.cat([experts.up(x[i : i + 1], offsets_of(0, 1, 0, 0)) for i in range(60)])
    for start, stop in ((0, 60), (3, 8), (11, 40), (20, 22)):
        together = experts.up(x[start:stop], offsets_of(0, stop - start, 0, 0))
        assert torch.equal(together, alone[start:stop])


@each_form
def test_what_is_exported_is_what_is_held(path: str, kind: ExpertsDtype) -> None:
    experts = experts_of(kind, 36, 8, has_bias=True)
    copy = experts_of(kind, 36, 8, has_bias=True)
    exported = experts.export_slot(2)
    assert exported["down_proj"].dtype == torch.int8 and "down_proj_scale" in exported
    copy.load_slot(0, exported)
    for name, tensor in copy.export_slot(0).items():
        assert torch.equal(tensor, exported[name])
    x = torch.randn(5, 36).bfloat16()
    assert torch.equal(copy.up(x, offsets_of(5, 0, 0, 0)), experts.up(x, offsets_of(0, 0, 5, 0)))
    with pytest.raises(ValueError, match=r"down_proj must be .* torch.int8, got .* torch.bfloat16"):
        copy.load_slot(0, {**exported, "down_proj": exported["down_proj"].bfloat16()})
    with pytest.raises(ValueError, match=f"{kind} experts are served in bfloat16"):
        PackedExperts(
            1, hidden_size=4, intermediate_size=4, dtype=torch.float32, experts_dtype=kind
        )


@each_form
def test_bytes_of_a_slot_are_an_expert(path: str, kind: ExpertsDtype) -> None:
    """As a copy from a replica: equal layouts, parts byte by byte."""
    source, target = (experts_of(kind, 72, 40, has_bias=True) for _ in range(2))
    assert source.slot_layout() == target.slot_layout() and kind in source.slot_layout()
    for to, part in zip(target.slot_parts(0), source.slot_parts(3), strict=True):
        to.copy_(part)
    copied, wanted = target.export_slot(0), source.export_slot(3)
    assert copied.keys() == wanted.keys()
    assert all(torch.equal(copied[name], wanted[name]) for name in wanted)


GATES = [
    (SILU, 256, 128),
    (Gate(activation="gelu_tanh"), 64, 7),
    (Gate(layout="interleaved", alpha=1.7, gate_max=7.0, up_max=7.0, up_shift=1.0), 96, 56),
    (Gate(activation="relu2", layout="none"), 64, 72),
]


@needs_native
@each_form
@pytest.mark.parametrize("gate,hidden,width", GATES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_whole_layer_has_the_bits_of_its_steps(
    threads: int, kind: ExpertsDtype, gate: Gate, hidden: int, width: int, has_bias: bool
) -> None:
    experts = experts_of(kind, hidden, width, has_gate=gate.columns == 2, has_bias=has_bias)
    shard = NativeShard()
    assert shard.add_layer(0, experts, gate, torch.arange(4))
    for counts in ((1, 0, 0, 0), (2, 3, 0, 40)):
        x = torch.randn(sum(counts), hidden).bfloat16()
        offsets = offsets_of(*counts)
        expected = experts.down(gate.apply(experts.up(x, offsets)), offsets)
        row = torch.arange(len(x))
        expert = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
        out = shard.call(0, x, row, expert, torch.ones(len(x)), presummed=False)
        assert torch.equal(out, expected)


@needs_native
@pytest.mark.parametrize("kind,hidden", [("int8", 6), ("int4", 12)])
def test_rows_that_need_padding_go_step_by_step(kind: ExpertsDtype, hidden: int) -> None:
    odd = experts_of(kind, hidden, 4)
    assert not NativeShard().add_layer(1, odd, SILU, torch.arange(4))


@needs_native
def test_the_op_refuses_what_does_not_fit() -> None:
    experts = experts_of("int4", 64, 64)
    up = experts.projections[0]
    x, offsets = torch.randn(2, 64), offsets_of(2, 0, 0, 0)
    op: Any = torch.ops.remora.grouped_linear
    for rows, packed, kind, told in (
        (x, up.packed, "int4", "rows must be bfloat16"),
        (x.bfloat16(), up.packed, "int8", "do not fit"),
        (x.bfloat16(), up.packed[:, 1:].contiguous(), "int4", "do not fit"),
        (x.bfloat16(), up.packed, "int5", "int8 or int4, not to int5"),
    ):
        with pytest.raises(RuntimeError, match=told):
            op(rows, packed, None, offsets, 128, kind)


# Each instruction set is chosen once for a process.
SCRIPT = """
import sys, torch
from remora.kernels import native
from remora.kernels.experts import PackedExperts
assert native.native_isa() == sys.argv[1], native.native_isa()
torch.manual_seed(5)
for hidden, width in ((64, 64), (200, 72), (36, 7)):
    held = [PackedExperts(2, hidden_size=hidden, intermediate_size=width, dtype=torch.bfloat16,
                          experts_dtype=kind) for kind in ("int4", "auto")]
    for slot in range(2):
        tensors = {n: (torch.randn(s) * 0.1).bfloat16() for n, s in held[0].slot_shapes().items()}
        held[0].load_slot(slot, tensors)
        weights = {}
        for name in tensors:
            q, scale = held[0].export_slot(slot)[name], held[0].export_slot(slot)[name + "_scale"]
            weights[name] = held[0].projections[0].quantization.dequantize(q, scale).bfloat16()
        held[1].load_slot(slot, weights)
    for rows in range(1, 8):
        offsets = torch.tensor([0, rows, rows + 40])
        x = torch.randn(rows + 40, hidden).bfloat16()
        assert torch.equal(*(each.up(x, offsets) for each in held)), (hidden, rows)
"""


@needs_native
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512_bf16", "amx_emulated"])
def test_int4_on_every_instruction_set_is_bfloat16(isa: str) -> None:
    known = ["portable", "avx2", "avx512", "avx512_bf16", "amx_bf16"]
    if isa in known and known.index(isa) > known.index(native.native_isa()):
        pytest.skip(f"this machine has no {isa}, or it is kept off")
    run_under(isa, SCRIPT, isa)
