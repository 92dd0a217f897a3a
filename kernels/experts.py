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
from remora.kernels.linear import (
    DTYPES,
    pack_into,
    packed_numel,
    torch_linear,
    unpack,
)


class GroupedWeights:
    """One projection of all slots: weights [S, O, K] packed, and biases [S, O]."""

    def __init__(
        self,
        num_slots: int,
        num_outputs: int,
        num_inputs: int,
        *,
        dtype: torch.dtype,
        has_bias: bool,
    ) -> None:
        self.num_slots = num_slots
        self.num_outputs = num_outputs
        self.num_inputs = num_inputs
        self.is_native: Final = native.native_available()
        shape = (
            (packed_numel(num_outputs, num_inputs, dtype),)
            if self.is_native
            else (num_outputs, num_inputs)
        )
        self.packed = torch.zeros(num_slots, *shape, dtype=dtype)
        if self.is_native:
            torch.ops.remora.advise_huge_pages(self.packed)
        self.bias_SO = torch.zeros(num_slots, num_outputs, dtype=dtype) if has_bias else None

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return self.packed.nbytes + (0 if self.bias_SO is None else self.bias_SO.nbytes)

    def load(self, slot: int, weight_OK: Tensor, bias_O: Tensor | None) -> None:
        """Writes one slot."""
        if self.is_native:
            pack_into(self.packed[slot], weight_OK)
        else:
            self.packed[slot].copy_(weight_OK)
        if self.bias_SO is not None and bias_O is not None:
            self.bias_SO[slot].copy_(bias_O)

    def weight(self, slot: int) -> Tensor:
        """The weight [O, K] of a slot, bit for bit (a new tensor)."""
        if self.is_native:
            return unpack(self.packed[slot], self.num_outputs, self.num_inputs)
        return self.packed[slot].clone()

    def forward(self, x_NK: Tensor, offsets_S1: Tensor, *, exact: bool) -> Tensor:
        """Rows offsets[s]..offsets[s+1] times slot s; rows from offsets[S] on give zeros. [N, O]"""
        if self.is_native:
            out: Tensor = torch.ops.remora.grouped_linear(
                x_NK, self.packed, self.bias_SO, offsets_S1, self.num_outputs
            )
            return out
        return self._torch_forward(x_NK, offsets_S1, exact=exact)

    def _torch_forward(self, x_NK: Tensor, offsets_S1: Tensor, *, exact: bool) -> Tensor:
        y_NO = x_NK.new_zeros(x_NK.shape[0], self.num_outputs)
        bounds = offsets_S1.tolist()
        for slot, (start, stop) in enumerate(itertools.pairwise(bounds)):
            if stop > start:
                bias = None if self.bias_SO is None else self.bias_SO[slot]
                y_NO[start:stop] = torch_linear(
                    x_NK[start:stop], self.packed[slot], bias, exact=exact
                )
        return y_NO


class PackedExperts:
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
    ) -> None:
        if min(num_slots, hidden_size, intermediate_size) < 1 or dtype not in DTYPES:
            raise ValueError(
                f"experts need sizes >= 1 and bfloat16 or float32, got {num_slots} slots, "
                f"{hidden_size} x {intermediate_size}, {dtype}"
            )
        self.num_slots = num_slots
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.dtype = dtype
        self.has_gate = has_gate
        self.has_bias = has_bias
        self.is_transposed = is_transposed
        self.exact = exact
        self.up_name = "gate_up_proj" if has_gate else "up_proj"
        up_size = intermediate_size * (2 if has_gate else 1)
        self._projections = {
            self.up_name: GroupedWeights(
                num_slots, up_size, hidden_size, dtype=dtype, has_bias=has_bias
            ),
            "down_proj": GroupedWeights(
                num_slots, hidden_size, intermediate_size, dtype=dtype, has_bias=has_bias
            ),
        }
        self._loaded: set[int] = set()

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

    @property
    def loaded_slots(self) -> frozenset[int]:
        """Slots that hold an expert."""
        return frozenset(self._loaded)

    def slot_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of one expert's tensors, for `load_slot` and `export_slot`."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, projection in self._projections.items():
            shape = (projection.num_outputs, projection.num_inputs)
            shapes[name] = shape[::-1] if self.is_transposed else shape
            if self.has_bias:
                shapes[f"{name}_bias"] = shape[:1]
        return shapes

    def load_slot(self, slot: int, tensors: Mapping[str, Tensor]) -> None:
        """Copies one expert's tensors (`slot_shapes`) into a slot, replacing what was there.

        Raises:
            ValueError: a name that is missing or unknown, a wrong shape or dtype.
        """
        assert 0 <= slot < self.num_slots, f"slot {slot} of {self.num_slots}"
        shapes = self.slot_shapes()
        if tensors.keys() != shapes.keys():
            raise ValueError(f"an expert has tensors {sorted(shapes)}, got {sorted(tensors)}")
        for name, tensor in tensors.items():
            if tuple(tensor.shape) != shapes[name] or tensor.dtype != self.dtype:
                raise ValueError(
                    f"{name} must be {list(shapes[name])} {self.dtype}, "
                    f"got {list(tensor.shape)} {tensor.dtype}"
                )
        for name, projection in self._projections.items():
            weight = tensors[name].detach()
            projection.load(
                slot, weight.t() if self.is_transposed else weight, tensors.get(f"{name}_bias")
            )
        self._loaded.add(slot)

    def export_slot(self, slot: int) -> dict[str, Tensor]:
        """One expert's tensors as they were loaded, bit for bit, contiguous, sorted by name."""
        assert slot in self._loaded, f"slot {slot} is empty; loaded: {sorted(self._loaded)}"
        tensors: dict[str, Tensor] = {}
        for name, projection in self._projections.items():
            weight = projection.weight(slot)
            tensors[name] = weight.t().contiguous() if self.is_transposed else weight
            if projection.bias_SO is not None:
                tensors[f"{name}_bias"] = projection.bias_SO[slot].clone()
        return dict(sorted(tensors.items()))

    def clear_slot(self, slot: int) -> None:
        """Forgets the expert of a slot; its room may be loaded again."""
        self._loaded.discard(slot)

    def up(self, x_ND: Tensor, offsets_S1: Tensor) -> Tensor:
        """[N, D] -> [N, U]: rows offsets[s]..offsets[s+1] times `gate_up_proj` of slot s.

        Rows from offsets[S] on (padding) give zeros. Offsets are int64 or int32, not decreasing.
        """
        return self._projections[self.up_name].forward(x_ND, offsets_S1, exact=self.exact)

    def down(self, h_NI: Tensor, offsets_S1: Tensor) -> Tensor:
        """[N, I] -> [N, D]: as `up`, with `down_proj`."""
        return self._projections["down_proj"].forward(h_NI, offsets_S1, exact=self.exact)


def _fake_grouped_linear(
    x_NK: Tensor, packed: Tensor, bias_SO: Tensor | None, offsets_S1: Tensor, num_outputs: int
) -> Tensor:
    return x_NK.new_empty((x_NK.shape[0], num_outputs))


if native.native_available():
    torch.library.register_fake("remora::grouped_linear", _fake_grouped_linear)
