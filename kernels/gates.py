"""What stands between an expert's two linears, in one pass: activation, clamps, gate times up.

Shapes: N rows, I expert width, U columns of the first linear: 2I with a gate, I without. Computed
element by element in float32 and rounded once; a model's own gate in bfloat16 rounds between its
steps, so last bits differ from it.
"""

import math
from dataclasses import dataclass
from typing import Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from remora.kernels import native
from remora.kernels.linear import in_row_tiles

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]
Layout = Literal["concatenated", "interleaved", "none"]
ACTIVATIONS: Final[tuple[Activation, ...]] = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
LAYOUTS: Final[tuple[Layout, ...]] = ("concatenated", "interleaved", "none")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """out = min(act(min(gate, gate_max)), act_max) * (clamp(up, -up_max, up_max) + up_shift).

    Without a gate (`none`): out = min(act(min(up, gate_max)), act_max). The columns of the first
    linear are gates then ups (`concatenated`) or gate, up, gate, up, ... (`interleaved`).
    """

    activation: Activation = "silu"
    layout: Layout = "concatenated"
    alpha: float = 1.0  # silu is gate * sigmoid(alpha * gate)
    gate_max: float = math.inf
    up_max: float = math.inf
    act_max: float = math.inf
    up_shift: float = 0.0

    @property
    def columns(self) -> int:
        """Columns of the first linear for one of the second."""
        return 1 if self.layout == "none" else 2

    @property
    def numbers(self) -> list[float]:
        """As the C++ side takes them (kernels/csrc/gates.h)."""
        return [self.alpha, self.gate_max, self.up_max, self.act_max, self.up_shift]

    def apply(self, up_NU: Tensor) -> Tensor:
        """[..., U] -> [..., I] in the dtype of what comes, bfloat16 or float32."""
        if native.native_available():
            out: Tensor = torch.ops.remora.expert_gate(
                up_NU, ACTIVATIONS.index(self.activation), LAYOUTS.index(self.layout), self.numbers
            )
            return out
        flat_NU = up_NU.reshape(-1, up_NU.shape[-1])
        width = up_NU.shape[-1] // self.columns
        return in_row_tiles(self._torch, flat_NU).view(*up_NU.shape[:-1], width)

    def _torch(self, up_NU: Tensor) -> Tensor:
        values = up_NU.float()
        if self.layout == "none":
            return self._activated(values).to(up_NU.dtype)
        if self.layout == "interleaved":
            gate_NI, factor_NI = values[..., ::2], values[..., 1::2]
        else:
            gate_NI, factor_NI = values.chunk(2, dim=-1)
        factor_NI = factor_NI.clamp(-self.up_max, self.up_max) + self.up_shift
        return (self._activated(gate_NI) * factor_NI).to(up_NU.dtype)

    def _activated(self, gate: Tensor) -> Tensor:
        gate = gate.clamp(max=self.gate_max)
        if self.activation == "silu":
            out = gate * torch.sigmoid(self.alpha * gate)
        elif self.activation == "gelu":
            out = F.gelu(gate)
        elif self.activation == "gelu_tanh":
            out = F.gelu(gate, approximate="tanh")
        else:
            out = F.relu(gate)
            out = out * out if self.activation == "relu2" else out
        return out.clamp(max=self.act_max)


SILU: Final = Gate()  # silu(gate) * up of two halves: what most models have


def _fake_expert_gate(up: Tensor, activation: int, layout: int, numbers: list[float]) -> Tensor:
    columns = 1 if LAYOUTS[layout] == "none" else 2
    return up.new_empty((*up.shape[:-1], up.shape[-1] // columns))


if native.native_available():
    torch.library.register_fake("remora::expert_gate", _fake_expert_gate)
