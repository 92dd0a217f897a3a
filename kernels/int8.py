"""Weights of one byte: a scale for each output, quantised once; rows stay bfloat16.

Shapes: O outputs, K inputs. w[o, k] is close to scale[o] * q[o, k] with q in -127..127, rounded to
nearest, so that the largest weight of an output keeps its size. Kernels widen q to bfloat16, which
holds every q exactly, add up in float32 and multiply by the scale at the end.
"""

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from remora.kernels.linear import GROUP, PANEL

_STEP: Final = 4  # k of one step of the packed form
_RUN: Final = 4  # columns of one run: 16 bytes of a step, two k times four columns, twice
_MAX: Final = 127


def quantize(weight_OK: Tensor) -> tuple[Tensor, Tensor]:
    """(q int8 [O, K], scale float32 [O]) of a weight of any float dtype; all zeros: scale 1."""
    weight = weight_OK.detach().float()
    largest_O = weight.abs().amax(dim=1)
    scale_O = torch.where(largest_O > 0, largest_O / _MAX, torch.ones_like(largest_O))
    q_OK = (weight / scale_O[:, None]).round().clamp(-_MAX, _MAX).to(torch.int8)
    return q_OK, scale_O


def dequantize(q_OK: Tensor, scale_O: Tensor) -> Tensor:
    """float32 [O, K]."""
    return q_OK.float() * scale_O[:, None]


def packed_int8_numel(num_outputs: int, num_inputs: int) -> int:
    """Bytes of the packed form, zero padding included."""
    return -(-num_outputs // PANEL) * PANEL * -(-num_inputs // _STEP) * _STEP


def pack_int8_into(packed: Tensor, q_OK: Tensor) -> None:
    """Writes q into `packed` (uint8 [packed_int8_numel]) as kernels/csrc/panel.h has it."""
    num_outputs, num_inputs = q_OK.shape
    padded = F.pad(q_OK, (0, -num_inputs % _STEP, 0, -num_outputs % PANEL))
    bytes_OK = (padded.abs().view(torch.uint8)) | ((padded < 0).to(torch.uint8) << 7)
    offset = 0
    for column in range(0, bytes_OK.shape[0], GROUP):
        group = bytes_OK[column : column + GROUP]
        # [panel, run, column of it] x [step, half, 2] -> [step, panel, run, half, column, 2]
        parts = group.reshape(-1, PANEL // _RUN, _RUN, group.shape[1] // _STEP, 2, 2)
        target = packed[offset : offset + group.numel()]
        target.copy_(parts.permute(3, 0, 1, 4, 2, 5).reshape(-1))
        offset += group.numel()


def unpack_int8(packed: Tensor, num_outputs: int, num_inputs: int) -> Tensor:
    """The q [O, K] that was packed (a new int8 tensor)."""
    num_columns = -(-num_outputs // PANEL) * PANEL
    num_steps = packed.numel() // num_columns // _STEP
    groups = []
    for column in range(0, num_columns, GROUP):
        width = min(GROUP, num_columns - column)
        part = packed[column * num_steps * _STEP : (column + width) * num_steps * _STEP]
        parts = part.view(num_steps, width // PANEL, PANEL // _RUN, 2, _RUN, 2)
        groups.append(parts.permute(1, 2, 4, 0, 3, 5).reshape(width, -1))
    bytes_OK = torch.cat(groups)[:num_outputs, :num_inputs]
    magnitude = (bytes_OK & 0x7F).to(torch.int8)
    return torch.where(bytes_OK >= 0x80, -magnitude, magnitude)
