"""A shard's experts for a native caller: one C call computes a layer for all rows that wait.

`NativeShard.entry` and `.handle` go to a socket loop that speaks `kernels/csrc/expert_call.h`;
`call` is the same for Python. Bits are those of `route_sort`, `gather_rows`, `PackedExperts.up`,
the gate, `PackedExperts.down` and `presum` one after the other.
"""

import weakref

import torch
from torch import Tensor

from remora.kernels import native
from remora.kernels.experts import PackedExperts
from remora.kernels.gates import ACTIVATIONS, LAYOUTS, Gate


class NativeShard:
    """Layers of packed experts behind a handle. One thread calls, and loads slots meanwhile.

    Attributes:
        entry: address of a `RemoraExpertsFn`.
        handle: its first argument; valid while this object lives.
    """

    def __init__(self) -> None:
        assert native.native_available(), "there are no C++ kernels here"
        self.entry: int = torch.ops.remora.expert_entry()
        self.handle: int = torch.ops.remora.expert_shard_new()
        # Not where the interpreter ends: a thread that serves is still in the kernel then.
        weakref.finalize(self, torch.ops.remora.expert_shard_free, self.handle).atexit = False
        self._layers: set[int] = set()

    def add_layer(
        self, layer: int, experts: PackedExperts, gate: Gate, slot_of_expert_E: Tensor
    ) -> bool:
        """Serves decoder layer `layer` from now on, or returns False where only Python can.

        Args:
            layer: its number; one that is known is replaced.
            experts: its slots; they may be loaded and cleared later.
            gate: between the two linears.
            slot_of_expert_E: int64, slot of each logical expert, -1 where it is not held. Read at
                every call: what is written into it counts from the next one.
        """
        up, down = experts.projections
        step = 2 if experts.dtype == torch.bfloat16 else 1
        if up.quantization is not None:
            step = up.quantization.step
        if not experts.is_native or experts.hidden_size % step:
            return False
        torch.ops.remora.expert_shard_layer(
            self.handle,
            layer,
            up.packed,
            up.bias_SO,
            down.packed,
            down.bias_SO,
            slot_of_expert_E,
            experts.hidden_size,
            experts.intermediate_size,
            ACTIVATIONS.index(gate.activation),
            LAYOUTS.index(gate.layout),
            gate.numbers,
            None if up.quantization is None else up.quantization.name,
        )
        self._layers.add(layer)
        return True

    def __contains__(self, layer: object) -> bool:
        return layer in self._layers

    def call(
        self,
        layer: int,
        rows_MD: Tensor,
        pair_row_N: Tensor,
        pair_expert_N: Tensor,
        pair_weight_N: Tensor,
        *,
        presummed: bool,
    ) -> Tensor:
        """Outputs of the routed pairs, as `ShardExperts.forward` describes them.

        Args:
            layer: one that was added.
            rows_MD: in the dtype of the weights.
            pair_row_N: int32 or int64.
            pair_expert_N: int32 or int64, logical experts that are held.
            pair_weight_N: read where `presummed`.
            presummed: weighted sums [M, D] instead of one row for each pair [N, D].

        Raises:
            IndexError: a row out of range, an expert that is not held.
        """
        out: Tensor = torch.ops.remora.expert_shard_call(
            self.handle, layer, rows_MD, pair_row_N, pair_expert_N, pair_weight_N, presummed
        )
        return out
