"""Weights of one byte: a scale for each output, quantised once; rows stay bfloat16.

Shapes: O outputs, K inputs. w[o, k] is close to scale[o] * q[o, k] with q in -127..127, rounded to
nearest, so that the largest weight of an output keeps its size. Kernels widen q to bfloat16, which
holds every q exactly, add up in float32 and multiply by the scale at the end.
"""

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from remora.kernels import narrow
from remora.kernels.linear import GROUP, PANEL

STEP: Final = narrow.STEP  # k of one step of the packed form
_MAX: Final = 127
_SIGN: Final = 0x80
_SCALE_BYTES: Final = 4


def quantize(weight_OK: Tensor) -> tuple[Tensor, Tensor]:
    """(q int8 [O, K], scale float32 [O]) of a weight of any float dtype; all zeros: scale 1.

    Raises:
        ValueError: a weight that is not finite: one NaN would make zeros of its whole output.
    """
    weight = weight_OK.detach().float()
    largest_O = weight.abs().amax(dim=1)
    if not bool(largest_O.isfinite().all()):
        raise ValueError(f"int8 holds finite weights, got {float(largest_O.max()):g}")
    scale_O = torch.where(largest_O > 0, largest_O / _MAX, torch.ones_like(largest_O))
    q_OK = (weight / scale_O[:, None]).round().clamp(-_MAX, _MAX).to(torch.int8)
    return q_OK, scale_O


def dequantize(q_OK: Tensor, scale_O: Tensor) -> Tensor:
    """float32 [O, K]."""
    return q_OK.float() * scale_O[:, None]


def scale_shape(num_outputs: int, num_inputs: int) -> tuple[int, ...]:
    """One for each output."""
    return (num_outputs,)


def packed_nbytes(num_outputs: int, num_inputs: int) -> int:
    """Bytes of the packed form, scales and zero padding included."""
    num_inputs = -(-num_inputs // STEP) * STEP
    return narrow.padded_outputs(num_outputs) * (num_inputs + _SCALE_BYTES)


def pack_into(packed: Tensor, q_OK: Tensor, scale_O: Tensor) -> None:
    """Writes both into `packed` (uint8 [packed_nbytes]) as kernels/csrc/panel.h has it."""
    num_outputs, num_inputs = q_OK.shape
    padding = narrow.padded_outputs(num_outputs) - num_outputs
    bytes_OK = narrow.sign_and_magnitude(F.pad(q_OK, (0, -num_inputs % STEP, 0, padding)), _SIGN)
    scales = F.pad(scale_O, (0, padding)).view(torch.uint8)
    for column, width, target in narrow.column_groups(
        packed, num_outputs, packed_nbytes(GROUP, num_inputs)
    ):
        split = target.numel() - width * _SCALE_BYTES
        target[:split] = narrow.interleaved(bytes_OK[column : column + width]).view(-1)
        target[split:] = scales[column * _SCALE_BYTES :][: width * _SCALE_BYTES]


def unpack(packed: Tensor, num_outputs: int, num_inputs: int) -> tuple[Tensor, Tensor]:
    """The q [O, K] and the scales [O] that were packed (new tensors)."""
    q, scales = [], []
    for _, width, source in narrow.column_groups(
        packed, num_outputs, packed_nbytes(GROUP, num_inputs)
    ):
        split = source.numel() - width * _SCALE_BYTES
        lines = source[:split].view(-1, width // PANEL, narrow.LINE_BYTES)
        q.append(narrow.signed(narrow.deinterleaved(lines), _SIGN))
        scales.append(source[split:].clone().view(torch.float32))
    return torch.cat(q)[:num_outputs, :num_inputs].contiguous(), torch.cat(scales)[:num_outputs]
