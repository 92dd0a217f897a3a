"""The slow, obvious twin of a whole expert layer: one pair at a time, in float64.

Shapes: M rows, N pairs, D model width, I expert width, U = 2I with a gate and I without, S slots.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from remora.kernels.gates import Gate
from remora.kernels.reference import expert_gate, linear


def expert_layer(
    rows_MD: Tensor,
    pair_row: Sequence[int],
    pair_slot: Sequence[int],
    slots: Mapping[int, Mapping[str, Tensor]],
    gate: Gate,
    *,
    is_transposed: bool = False,
) -> Tensor:
    """Expert output of each pair, not weighted: float64 [N, D]; zeros where the slot is -1.

    `slots[s]`: one expert's tensors as `slot_shapes` names them. A pair of row -1 sees zeros.
    """
    name = "up_proj" if gate.layout == "none" else "gate_up_proj"
    out_ND = torch.zeros((len(pair_row), rows_MD.shape[1]), dtype=torch.float64)
    for n, (row, slot) in enumerate(zip(pair_row, pair_slot, strict=True)):
        if slot < 0:
            continue
        tensors = slots[slot]
        up_UD, down_DI = tensors[name], tensors["down_proj"]
        if is_transposed:
            up_UD, down_DI = up_UD.t(), down_DI.t()
        x_1D = rows_MD[row : row + 1] if row >= 0 else torch.zeros_like(rows_MD[:1])
        hidden_1I = expert_gate(gate, linear(x_1D, up_UD, tensors.get(f"{name}_bias")))
        out_ND[n] = linear(hidden_1I, down_DI, tensors.get("down_proj_bias"))[0]
    return out_ND


def presummed(
    out_ND: Tensor, pair_row: Sequence[int], weights: Sequence[float], rows: int
) -> Tensor:
    """Weighted sum of the pairs of each row, float64 [M, D]; pairs of row -1 are left out."""
    sum_MD = torch.zeros((rows, out_ND.shape[1]), dtype=torch.float64)
    for n, row in enumerate(pair_row):
        if row >= 0:
            sum_MD[row] += weights[n] * out_ND[n].double()
    return sum_MD
