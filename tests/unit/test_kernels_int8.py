"""Weights of one byte: quantised, packed, multiplied, moved."""

import pytest
import torch
from torch import Tensor

from remora.kernels import native, reference
from remora.kernels.expert_shard import NativeShard
from remora.kernels.experts import PackedExperts
from remora.kernels.gates import SILU
from remora.kernels.int8 import (
    dequantize,
    pack_int8_into,
    packed_int8_numel,
    quantize,
    unpack_int8,
)

SIZES = [(1, 1), (7, 5), (16, 4), (64, 64), (65, 66), (200, 33)]


def random_weight(num_outputs: int, num_inputs: int) -> Tensor:
    generator = torch.Generator().manual_seed(num_outputs)
    return (torch.randn(num_outputs, num_inputs, generator=generator) * 0.1).bfloat16()


@pytest.mark.parametrize("num_outputs,num_inputs", SIZES)
def test_quantised_weights_are_near_and_packing_is_exact(num_outputs: int, num_inputs: int) -> None:
    weight = random_weight(num_outputs, num_inputs)
    q, scale = quantize(weight)
    error = (dequantize(q, scale) - weight.float()).abs()
    assert (error <= 0.5001 * scale[:, None]).all() and int(q.abs().max()) == 127
    packed = torch.zeros(packed_int8_numel(num_outputs, num_inputs), dtype=torch.uint8)
    pack_int8_into(packed, q)
    assert torch.equal(unpack_int8(packed, num_outputs, num_inputs), q)


def test_an_output_of_zeros() -> None:
    q, scale = quantize(torch.zeros(2, 8))
    assert (q == 0).all() and (scale == 1).all()


def int8_experts(hidden: int, width: int, **flags: bool) -> PackedExperts:
    experts = PackedExperts(
        4, hidden_size=hidden, intermediate_size=width, dtype=torch.bfloat16, is_int8=True, **flags
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


@pytest.mark.parametrize("flags", [{}, {"has_bias": True, "is_transposed": True}])
@pytest.mark.parametrize("hidden,width", [(32, 16), (36, 7), (256, 96)])
def test_against_the_reference(path: str, hidden: int, width: int, flags: dict[str, bool]) -> None:
    experts = int8_experts(hidden, width, **flags)
    counts = (3, 0, 9, 1)
    offsets = offsets_of(*counts)
    held = [experts.export_slot(slot) for slot in range(4)]
    for name, apply in ((experts.up_name, experts.up), ("down_proj", experts.down)):
        q = torch.stack([t[name].t() if experts.is_transposed else t[name] for t in held])
        scale = torch.stack([t[f"{name}_scale"] for t in held])
        weights = q.double() * scale[:, :, None]
        bias = torch.stack([t[f"{name}_bias"] for t in held]) if experts.has_bias else None
        x = torch.randn(sum(counts), weights.shape[2]).bfloat16()
        y = apply(x, offsets)
        expected = reference.grouped_linear(x, weights, bias, offsets)
        magnitude = reference.grouped_linear(x.abs(), weights.abs(), None, offsets)
        # Without a compiler the weights are rounded to bfloat16 once more.
        tolerance = 2 * torch.finfo(torch.bfloat16).eps * (magnitude + expected.abs()) + 1e-6
        assert y.dtype == torch.bfloat16 and ((y.double() - expected).abs() <= tolerance).all()


def test_a_row_depends_on_itself_only(path: str, threads: int) -> None:
    experts = int8_experts(256, 96)
    experts.exact = True
    x = torch.randn(60, 256).bfloat16()
    alone = torch.cat([experts.up(x[i : i + 1], offsets_of(0, 1, 0, 0)) for i in range(60)])
    for start, stop in ((0, 60), (3, 8), (11, 40)):
        together = experts.up(x[start:stop], offsets_of(0, stop - start, 0, 0))
        assert torch.equal(together, alone[start:stop])


def test_what_is_exported_is_what_is_held(path: str) -> None:
    experts, copy = int8_experts(36, 8, has_bias=True), int8_experts(36, 8, has_bias=True)
    exported = experts.export_slot(2)
    assert exported["down_proj"].dtype == torch.int8 and "down_proj_scale" in exported
    copy.load_slot(0, exported)
    for name, tensor in copy.export_slot(0).items():
        assert torch.equal(tensor, exported[name])
    x = torch.randn(5, 36).bfloat16()
    assert torch.equal(copy.up(x, offsets_of(5, 0, 0, 0)), experts.up(x, offsets_of(0, 0, 5, 0)))
    with pytest.raises(ValueError, match=r"down_proj must be .* torch.int8, got .* torch.bfloat16"):
        copy.load_slot(0, {**exported, "down_proj": exported["down_proj"].bfloat16()})
    with pytest.raises(ValueError, match="served in bfloat16"):
        PackedExperts(1, hidden_size=4, intermediate_size=4, dtype=torch.float32, is_int8=True)


@pytest.mark.skipif(not native.native_available(), reason="C++ kernels not built")
def test_a_whole_layer_has_the_bits_of_its_steps(threads: int) -> None:
    experts = int8_experts(256, 128)
    shard = NativeShard()
    assert shard.add_layer(0, experts, SILU, torch.arange(4))
    for counts in ((1, 0, 0, 0), (2, 3, 0, 40)):
        x = torch.randn(sum(counts), 256).bfloat16()
        offsets = offsets_of(*counts)
        expected = experts.down(SILU.apply(experts.up(x, offsets)), offsets)
        row = torch.arange(len(x))
        expert = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
        out = shard.call(0, x, row, expert, torch.ones(len(x)), presummed=False)
        assert torch.equal(out, expected)
    odd = PackedExperts(1, hidden_size=6, intermediate_size=4, dtype=torch.bfloat16, is_int8=True)
    assert not shard.add_layer(1, odd, SILU, torch.arange(1))
