"""Expert weights of one layer in slots on a GPU, and the whole layer in three launches or so.

The counterpart of `remora.kernels.experts.PackedExperts` on a device where Triton runs. A slot's
weights are put into one layout when they are loaded (outputs x inputs, gate rows before up rows),
so transposed and interleaved models cost the kernels nothing; `export_slot` puts them back.

Shapes: S slots, M rows, N pairs (row, slot), D model width, I expert width, U = 2I with a gate and
I without.
"""

from collections.abc import Callable, Mapping
from typing import Final, Literal

import torch
from torch import Tensor

from remora.kernels import triton_experts
from remora.kernels.gates import Gate
from remora.kernels.slots import ExpertSlots, expert_shapes
from remora.kernels.triton_experts import Projection, Routing, choose_tiles
from remora.kernels.triton_routing import map_tiles, sort_pairs, sum_pairs
from remora.kernels.triton_runtime import check_device

DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)

CombineMode = Literal["ordered", "presummed"]


def quantise_int8(weight_OK: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [O, K] and float32 scale [O] with weight ~ int8 * scale; symmetric, one an output.

    The largest weight of an output becomes 127, so the error is at most half a scale.
    """
    weight_OK = weight_OK.float()
    scale_O = weight_OK.abs().amax(dim=1) / 127.0
    safe_O1 = torch.where(scale_O > 0, scale_O, 1.0)[:, None]
    return torch.round(weight_OK / safe_O1).to(torch.int8), scale_O


class GpuExperts(ExpertSlots):
    """Weights of up to `num_slots` experts of one layer, on a device.

    Args:
        num_slots: S.
        hidden_size: D.
        intermediate_size: I.
        dtype: bfloat16, float16 or float32: of rows, results and, unless `int8`, weights.
        device: where the weights live and the kernels run.
        gate: what stands between the projections, fused into the first; or a function
            [N, U] -> [N, I] of the model, which is then called between them.
        has_gate: `gate_up_proj` [2I, D] instead of `up_proj` [I, D].
        has_bias: `<projection>_bias` vectors beside the weights.
        is_transposed: the model holds its weights as [inputs, outputs] (gpt_oss).
        exact: one fixed tile, so that a row's bits depend on that row alone.
        int8: keep weights as int8 with one float32 scale for each output, rounded once at load.
        post: what the model applies to an expert's output before it is weighted, or None.

    Raises:
        ValueError: a size below one, another dtype, or a gate that contradicts `has_gate`.
        RuntimeError: no Triton, or no such GPU.
    """

    def __init__(
        self,
        num_slots: int,
        *,
        hidden_size: int,
        intermediate_size: int,
        dtype: torch.dtype,
        device: torch.device,
        gate: Gate | Callable[[Tensor], Tensor],
        has_gate: bool = True,
        has_bias: bool = False,
        is_transposed: bool = False,
        exact: bool = False,
        int8: bool = False,
        post: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if min(num_slots, hidden_size, intermediate_size) < 1 or dtype not in DTYPES:
            raise ValueError(
                f"experts need sizes >= 1 and one of {DTYPES}, got {num_slots} slots, "
                f"{hidden_size} x {intermediate_size}, {dtype}"
            )
        if isinstance(gate, Gate) and (gate.columns == 2) != has_gate:
            raise ValueError(f"has_gate is {has_gate}, but the gate is {gate}")
        check_device(device)
        super().__init__(num_slots)
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.dtype = dtype
        self.device = device
        self.has_gate = has_gate
        self.has_bias = has_bias
        self.is_transposed = is_transposed
        self.exact = exact
        self.int8 = int8
        self.up_name = "gate_up_proj" if has_gate else "up_proj"
        self._gate = gate
        self._post = post
        up_size = intermediate_size * (2 if has_gate else 1)
        self._projections = {
            self.up_name: self._allocate(up_size, hidden_size),
            "down_proj": self._allocate(hidden_size, intermediate_size),
        }

    @property
    def weight_nbytes(self) -> int:
        """Bytes of all slots, loaded or not."""
        return sum(projection.nbytes for projection in self._projections.values())

    def slot_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of one expert's tensors, for `load_slot` and `export_slot`."""
        weights = {
            name: tuple(projection.weight_SOK.shape[1:])
            for name, projection in self._projections.items()
        }
        return expert_shapes(weights, has_bias=self.has_bias, is_transposed=self.is_transposed)

    def load_slot(self, slot: int, tensors: Mapping[str, Tensor]) -> None:
        """Copies one expert's tensors (`slot_shapes`, any device) into a slot.

        Raises:
            ValueError: a name that is missing or unknown, a wrong shape or dtype.
        """
        shapes = self.slot_shapes()
        self.check_load(slot, tensors, shapes, dict.fromkeys(shapes, self.dtype))
        for name, projection in self._projections.items():
            weight = tensors[name].detach().to(self.device)
            weight_OK = self._outputs_in_order(name, weight.t() if self.is_transposed else weight)
            if projection.scale_SO is None:
                projection.weight_SOK[slot].copy_(weight_OK)
            else:
                quantised_OK, scale_O = quantise_int8(weight_OK)
                projection.weight_SOK[slot].copy_(quantised_OK)
                projection.scale_SO[slot].copy_(scale_O)
            if projection.bias_SO is not None:
                bias = tensors[f"{name}_bias"].detach().to(self.device)
                projection.bias_SO[slot].copy_(self._outputs_in_order(name, bias))
        self._loaded.add(slot)

    def export_slot(self, slot: int) -> dict[str, Tensor]:
        """One expert's tensors on the CPU, contiguous, sorted by name.

        Bit for bit as they were loaded; with `int8` what the kernels compute with, in `dtype`.
        """
        self.check_loaded(slot)
        tensors: dict[str, Tensor] = {}
        for name, projection in self._projections.items():
            weight_OK = projection.weight_SOK[slot]
            if projection.scale_SO is not None:
                weight_OK = weight_OK.float() * projection.scale_SO[slot, :, None]
            weight_OK = self._outputs_as_loaded(name, weight_OK.to(self.dtype))
            weight = weight_OK.t() if self.is_transposed else weight_OK
            tensors[name] = weight.contiguous().cpu()
            if projection.bias_SO is not None:
                bias_O = self._outputs_as_loaded(name, projection.bias_SO[slot])
                tensors[f"{name}_bias"] = bias_O.contiguous().cpu()
        return {name: tensors[name].clone() for name in sorted(tensors)}

    def forward(
        self,
        rows_MD: Tensor,
        pair_row_N: Tensor,
        pair_slot_N: Tensor,
        pair_weight_N: Tensor,
        mode: CombineMode,
    ) -> Tensor:
        """Expert outputs of the routed pairs; nothing waits for the device.

        Args:
            rows_MD: [M, D] in `dtype` on `device`; rows may be strided.
            pair_row_N: int32 or int64, row of each pair; -1: a row of zeros.
            pair_slot_N: int32 or int64, slot of each pair; -1: the pair is empty (a call of fixed
                capacity has such). Others must be loaded: the device is not asked.
            pair_weight_N: float32 or bfloat16; only `presummed` reads it.
            mode: `ordered`: one row per pair, not weighted, in pair order, zeros for an empty one;
                `presummed`: one row per row that came, the weighted sum of its pairs in pair order
                (float32 inside).

        Returns:
            [N, D] or [M, D] in `dtype`.
        """
        num_rows, num_pairs = rows_MD.shape[0], pair_row_N.shape[0]
        presums = mode == "presummed"
        if num_pairs == 0 or num_rows == 0:
            return rows_MD.new_zeros(num_rows if presums else num_pairs, self.hidden_size)
        if rows_MD.stride(1) != 1:
            rows_MD = rows_MD.contiguous()
        tiles = choose_tiles(num_pairs, self.num_slots, self.dtype, exact=self.exact)
        by_slot = sort_pairs(pair_slot_N, self.num_slots)
        routing = Routing(
            order_N=by_slot.order_N,
            offsets_S1=by_slot.offsets_C1,
            pair_row_N=pair_row_N,
            tile_map=map_tiles(by_slot.offsets_C1, num_pairs, tiles.rows),
        )
        up, down = self._projections[self.up_name], self._projections["down_proj"]
        if isinstance(self._gate, Gate):
            hidden_NI = triton_experts.up(rows_MD, up, routing, self._gate, tiles)
        else:
            hidden_NI = self._gate(triton_experts.up(rows_MD, up, routing, None, tiles))
        hidden_NI = hidden_NI.contiguous()
        if not presums:
            out_ND = triton_experts.down(hidden_NI, down, routing, tiles, None, self.dtype)
            return self._after(out_ND, pair_slot_N)
        if self._post is None:
            weighted_ND = triton_experts.down(
                hidden_NI, down, routing, tiles, pair_weight_N, torch.float32
            )
        else:
            out_ND = triton_experts.down(hidden_NI, down, routing, tiles, None, self.dtype)
            weighted_ND = self._post(out_ND).float() * pair_weight_N.float()[:, None]
        kept_N = torch.where(pair_slot_N < 0, -1, pair_row_N)
        return sum_pairs(weighted_ND, kept_N, num_rows, self.dtype)

    def _after(self, out_ND: Tensor, pair_slot_N: Tensor) -> Tensor:
        """What the model does to an expert's output; empty pairs stay zeros."""
        if self._post is None:
            return out_ND
        return self._post(out_ND).masked_fill((pair_slot_N < 0)[:, None], 0)

    def _allocate(self, num_outputs: int, num_inputs: int) -> Projection:
        shape = (self.num_slots, num_outputs)
        return Projection(
            weight_SOK=torch.zeros(
                (*shape, num_inputs),
                dtype=torch.int8 if self.int8 else self.dtype,
                device=self.device,
            ),
            scale_SO=torch.zeros(shape, device=self.device) if self.int8 else None,
            bias_SO=torch.zeros(shape, dtype=self.dtype, device=self.device)
            if self.has_bias
            else None,
        )

    def _outputs_in_order(self, name: str, tensor: Tensor) -> Tensor:
        """Gate rows first, then up rows: [O, ...] of a model that alternates them."""
        if not self._alternates(name):
            return tensor
        return torch.cat([tensor[::2], tensor[1::2]])

    def _outputs_as_loaded(self, name: str, tensor: Tensor) -> Tensor:
        """The inverse of `_outputs_in_order`."""
        if not self._alternates(name):
            return tensor
        half = tensor.shape[0] // 2
        return torch.stack([tensor[:half], tensor[half:]], dim=1).flatten(0, 1)

    def _alternates(self, name: str) -> bool:
        gate = self._gate
        is_fused = isinstance(gate, Gate) and gate.layout == "interleaved"
        return is_fused and name == "gate_up_proj"
