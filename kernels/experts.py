"""Expert weights of one layer in slots, and grouped linears over rows sorted by slot.

Shapes: S slots, N routed rows sorted by slot, D model width, I expert width, U = 2I with a gate
and I without. Between `up` and `down` stands the model's own gate (`_apply_gate`), on [N, U], or
one of `gates` where that computes the same.
"""

import itertools
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from remora.kernels import native
from remora.kernels.experts_dtype import ExpertsDtype
from remora.kernels.linear import (
    DTYPES,
    pack_into,
    packed_equals,
    packed_numel,
    torch_linear,
    unpack,
)
from remora.kernels.memory import huge_zeros
from remora.kernels.quantization import held_as, quantization_of
from remora.kernels.slots import ExpertSlots, expert_shapes, same_bits


class GroupedWeights:
    """One projection of all slots: weights [S, O, K] packed, biases [S, O].

    Quantised weights (`experts_dtype`, under bfloat16 rows) lie packed with their scales, whoever
    computes; others are plain matrices where there are no C++ kernels.
    """

    def __init__(
        self,
        num_slots: int,
        num_outputs: int,
        num_inputs: int,
        *,
        dtype: torch.dtype,
        has_bias: bool,
        experts_dtype: ExpertsDtype = "auto",
    ) -> None:
        self.num_slots = num_slots
        self.num_outputs = num_outputs
        self.num_inputs = num_inputs
        self.is_native: Final = native.native_available()
        self.quantization: Final = quantization_of(experts_dtype)
        stored = dtype
        shape: tuple[int, ...] = (num_outputs, num_inputs)
        if self.quantization is not None:
            stored = torch.uint8
            shape = (self.quantization.packed_nbytes(num_outputs, num_inputs),)
        elif self.is_native:
            shape = (packed_numel(num_outputs, num_inputs, dtype),)
        self.packed = huge_zeros(num_slots, *shape, dtype=stored)
        self.bias_SO = torch.zeros(num_slots, num_outputs, dtype=dtype) if has_bias else None

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return self.packed.nbytes + (0 if self.bias_SO is None else self.bias_SO.nbytes)

    def load(
        self, slot: int, weight_OK: Tensor, bias_O: Tensor | None, scale: Tensor | None = None
    ) -> None:
        """Writes one slot; with scales, the weight is quantised already."""
        if self.quantization is not None:
            held = (
                (weight_OK, scale) if scale is not None else self.quantization.quantize(weight_OK)
            )
            self.quantization.pack_into(self.packed[slot], *held)
        elif self.is_native:
            pack_into(self.packed[slot], weight_OK)
        else:
            self.packed[slot].copy_(weight_OK)
        if self.bias_SO is not None and bias_O is not None:
            self.bias_SO[slot].copy_(bias_O)

    def holds(self, slot: int, weight_OK: Tensor, bias_O: Tensor | None) -> bool:
        """Whether a slot holds these, bit for bit; not asked of quantised ones."""
        assert self.quantization is None, "quantised weights are not those that were read"
        held = self.packed[slot]
        if self.is_native:
            is_held = packed_equals(held, weight_OK)
        else:
            is_held = same_bits(held, weight_OK)
        if self.bias_SO is None or bias_O is None:
            return is_held
        return is_held and same_bits(self.bias_SO[slot], bias_O)

    def weight(self, slot: int) -> tuple[Tensor, Tensor | None]:
        """The weight [O, K] of a slot, bit for bit (a new tensor); int8 and scales if quantised."""
        sizes = self.num_outputs, self.num_inputs
        if self.quantization is not None:
            return self.quantization.unpack(self.packed[slot], *sizes)
        if self.is_native:
            return unpack(self.packed[slot], *sizes), None
        return self.packed[slot].clone(), None

    def slot_parts(self, slot: int) -> list[Tensor]:
        """Packed weight and biases of a slot as uint8 vectors: its own memory."""
        held = [t for t in (self.packed, self.bias_SO) if t is not None]
        return [tensor[slot].view(-1).view(torch.uint8) for tensor in held]

    def forward(self, x_NK: Tensor, offsets_S1: Tensor, *, exact: bool) -> Tensor:
        """Rows offsets[s]..offsets[s+1] times slot s; rows from offsets[S] on give zeros. [N, O]"""
        if self.is_native:
            name = None if self.quantization is None else self.quantization.name
            out: Tensor = torch.ops.remora.grouped_linear(
                x_NK, self.packed, self.bias_SO, offsets_S1, self.num_outputs, name
            )
            return out
        return self._torch_forward(x_NK, offsets_S1, exact=exact)

    def _torch_forward(self, x_NK: Tensor, offsets_S1: Tensor, *, exact: bool) -> Tensor:
        y_NO = x_NK.new_zeros(x_NK.shape[0], self.num_outputs)
        bounds = offsets_S1.tolist()
        for slot, (start, stop) in enumerate(itertools.pairwise(bounds)):
            if stop > start:
                bias = None if self.bias_SO is None else self.bias_SO[slot]
                weight = self.packed[slot]
                if self.quantization is not None:
                    held = self.quantization.unpack(weight, self.num_outputs, self.num_inputs)
                    weight = self.quantization.dequantize(*held).to(x_NK.dtype)
                y_NO[start:stop] = torch_linear(x_NK[start:stop], weight, bias, exact=exact)
        return y_NO


class PackedExperts(ExpertSlots):
    """Weights of up to `num_slots` experts of one layer, packed for the kernels.

    Args:
        num_slots: S.
        hidden_size: D.
        intermediate_size: I.
        dtype: bfloat16 or float32.
        has_gate: `gate_up_proj` [2I, D] instead of `up_proj` [I, D].
        has_bias: `<projection>_bias` vectors beside the weights.
        is_transposed: the model holds its weights as [inputs, outputs] (gpt_oss).
        exact: only matters without C++ kernels: work on fixed row tiles then.
        experts_dtype: quantise what is loaded, to int8 or int4; `dtype` is bfloat16 then.

    Raises:
        ValueError: a size below one, or another dtype.
    """

    def __init__(
        self,
        num_slots: int,
        *,
        hidden_size: int,
        intermediate_size: int,
        dtype: torch.dtype,
        has_gate: bool = True,
        has_bias: bool = False,
        is_transposed: bool = False,
        exact: bool = False,
        experts_dtype: ExpertsDtype = "auto",
    ) -> None:
        if experts_dtype != "auto" and dtype != torch.bfloat16:
            raise ValueError(f"{experts_dtype} experts are served in bfloat16, not in {dtype}")
        if min(num_slots, hidden_size, intermediate_size) < 1 or dtype not in DTYPES:
            raise ValueError(
                f"experts need sizes >= 1 and bfloat16 or float32, got {num_slots} slots, "
                f"{hidden_size} x {intermediate_size}, {dtype}"
            )
        super().__init__(num_slots)
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.dtype = dtype
        self.has_gate = has_gate
        self.has_bias = has_bias
        self.is_transposed = is_transposed
        self.exact = exact
        self.experts_dtype: Final = experts_dtype
        self.up_name = "gate_up_proj" if has_gate else "up_proj"
        up_size = intermediate_size * (2 if has_gate else 1)
        sizes = {
            self.up_name: (up_size, hidden_size),
            "down_proj": (hidden_size, intermediate_size),
        }
        self._projections = {
            name: GroupedWeights(
                num_slots, *size, dtype=dtype, has_bias=has_bias, experts_dtype=experts_dtype
            )
            for name, size in sizes.items()
        }

    @property
    def is_native(self) -> bool:
        """Whether the weights are packed for the C++ kernels."""
        return self.projections[0].is_native

    @property
    def projections(self) -> tuple[GroupedWeights, GroupedWeights]:
        """The first linear (with the gate) and the second."""
        return self._projections[self.up_name], self._projections["down_proj"]

    @property
    def weight_nbytes(self) -> int:
        """Bytes of all slots, loaded or not."""
        return sum(projection.nbytes for projection in self._projections.values())

    def slot_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of one expert's tensors, for `load_slot` and `export_slot`."""
        weights = {
            name: (projection.num_outputs, projection.num_inputs)
            for name, projection in self._projections.items()
        }
        return expert_shapes(weights, has_bias=self.has_bias, is_transposed=self.is_transposed)

    def load_slot(self, slot: int, tensors: Mapping[str, Tensor]) -> None:
        """Copies one expert's tensors into a slot, replacing what was there.

        Args:
            slot: below `num_slots`.
            tensors: `slot_shapes` in `dtype`; quantised ones also take what `export_slot` gives.

        Raises:
            ValueError: a name that is missing or unknown, a wrong shape or dtype, weights that the
                quantised form cannot hold.
        """
        shapes, dtypes = self._wanted(tensors)
        self.check_load(slot, tensors, shapes, dtypes)
        for name, projection in self._projections.items():
            weight = tensors[name].detach()
            projection.load(
                slot,
                weight.t() if self.is_transposed else weight,
                tensors.get(f"{name}_bias"),
                tensors.get(f"{name}_scale"),
            )
        self._loaded.add(slot)

    def holds(self, slot: int, tensors: Mapping[str, Tensor]) -> bool:
        """As `ExpertSlots.holds`, without a copy."""
        if self.experts_dtype != "auto":
            return super().holds(slot, tensors)
        self.check_loaded(slot)
        return all(
            projection.holds(
                slot,
                tensors[name].t() if self.is_transposed else tensors[name],
                tensors.get(f"{name}_bias"),
            )
            for name, projection in self._projections.items()
        )

    def slot_layout(self) -> str:
        """Packed alike (`linear.packed_numel`) by whatever instruction set computes; a process
        without C++ kernels holds plain matrices of what is not quantised."""
        form = "packed" if self.is_native or self.experts_dtype != "auto" else "plain"
        kind = held_as(self.experts_dtype, self.dtype)
        sizes = f"{self.hidden_size}x{self.intermediate_size}"
        return f"{form} {kind} {sizes} gate={self.has_gate} bias={self.has_bias}"

    def slot_parts(self, slot: int) -> list[Tensor]:
        """The first linear's, then the second's."""
        return [part for each in self.projections for part in each.slot_parts(slot)]

    def _wanted(
        self, tensors: Mapping[str, Tensor]
    ) -> tuple[dict[str, tuple[int, ...]], dict[str, torch.dtype]]:
        """Shapes and dtypes: of the model's, or where there are scales of quantised tensors."""
        shapes = self.slot_shapes()
        dtypes = dict.fromkeys(shapes, self.dtype)
        if not any(name.endswith("_scale") for name in tensors):
            return shapes, dtypes
        for name, projection in self._projections.items():
            if projection.quantization is not None:
                sizes = projection.num_outputs, projection.num_inputs
                dtypes[name] = torch.int8
                shapes[f"{name}_scale"] = projection.quantization.scale_shape(*sizes)
                dtypes[f"{name}_scale"] = torch.float32
        return shapes, dtypes

    def export_slot(self, slot: int) -> dict[str, Tensor]:
        """One expert's tensors as they are held, bit for bit, contiguous, sorted by name.

        As they were loaded; quantised ones give int8 weights and `<projection>_scale`, float32 [O]
        (int8) or [O, G] (int4).
        """
        self.check_loaded(slot)
        tensors: dict[str, Tensor] = {}
        for name, projection in self._projections.items():
            weight, scale = projection.weight(slot)
            tensors[name] = weight.t().contiguous() if self.is_transposed else weight
            if scale is not None:
                tensors[f"{name}_scale"] = scale
            if projection.bias_SO is not None:
                tensors[f"{name}_bias"] = projection.bias_SO[slot].clone()
        return dict(sorted(tensors.items()))

    def up(self, x_ND: Tensor, offsets_S1: Tensor) -> Tensor:
        """[N, D] -> [N, U]: rows offsets[s]..offsets[s+1] times `gate_up_proj` of slot s.

        Rows from offsets[S] on (padding) give zeros. Offsets are int64 or int32, not decreasing.
        """
        return self._projections[self.up_name].forward(x_ND, offsets_S1, exact=self.exact)

    def down(self, h_NI: Tensor, offsets_S1: Tensor) -> Tensor:
        """[N, I] -> [N, D]: as `up`, with `down_proj`."""
        return self._projections["down_proj"].forward(h_NI, offsets_S1, exact=self.exact)


def _fake_grouped_linear(
    x_NK: Tensor,
    packed: Tensor,
    bias_SO: Tensor | None,
    offsets_S1: Tensor,
    num_outputs: int,
    quantized: str | None = None,
) -> Tensor:
    return x_NK.new_empty((x_NK.shape[0], num_outputs))


if native.native_available():
    torch.library.register_fake("remora::grouped_linear", _fake_grouped_linear)
