"""Weights of four bits: a scale for each 64 inputs of an output; rows stay bfloat16.

Shapes: O outputs, K inputs, G groups of 64 inputs; the last one is shorter where 64 does not divide
K. w[o, k] is close to scale[o, k // 64] * q[o, k] with q in -7..7, rounded to nearest. A scale is a
power of two times 1, 1.25, 1.5 or 1.75: a product with q is then a bfloat16, exactly, so kernels
compute with bfloat16 weights, in the order of bfloat16 weights, at every number of rows. Of the two
such scales around the largest magnitude / 7 the one with the smaller squared error is taken. On
normally distributed weights that error is 0.94 of what the scale "largest magnitude / 7" would
leave: the smaller scale cuts a few large weights and is finer for all others.
"""

from collections.abc import Iterator
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from remora.kernels import narrow
from remora.kernels.linear import GROUP, PANEL

BLOCK: Final = 64  # inputs that share a scale
STEP: Final = 2 * narrow.STEP  # k of one step of the packed form
_BLOCK_STEPS: Final = BLOCK // STEP
_MAX: Final = 7
_SIGN: Final = 8
_EXPONENT: Final = 16  # of the largest scales
_EXPONENTS: Final = 64
SMALLEST: Final = 2.0 ** (_EXPONENT - _EXPONENTS + 1)  # scale; 1.4e-14 is held at all
LARGEST: Final = 1.75 * 2.0**_EXPONENT  # scale
LARGEST_WEIGHT: Final = _MAX * LARGEST


def quantize(weight_OK: Tensor) -> tuple[Tensor, Tensor]:
    """(q int8 [O, K], scale float32 [O, G]) of a weight of any float dtype.

    A function of the weight alone, the same bits on every machine. What is below half of `SMALLEST`
    becomes zero.

    Raises:
        ValueError: a weight that is not finite, or beyond `LARGEST_WEIGHT`.
    """
    num_inputs = weight_OK.shape[1]
    padded = F.pad(weight_OK.detach().float(), (0, -num_inputs % BLOCK))
    weight_OGB = padded.unflatten(1, (-1, BLOCK))
    largest_OG1 = weight_OGB.abs().amax(dim=2, keepdim=True)
    if not bool((largest_OG1 <= LARGEST_WEIGHT).all()):  # false for NaN too
        raise ValueError(
            f"int4 holds weights up to {LARGEST_WEIGHT:g} in magnitude, "
            f"got {float(largest_OG1.max()):g}"
        )
    fraction, exponent = torch.frexp((largest_OG1 / _MAX).clamp(min=SMALLEST))
    eighths = (fraction * 8).floor()  # 4..7
    eighth = _power_of_two(exponent - 3)
    below = eighths * eighth
    above = ((eighths + 1) * eighth).clamp(max=LARGEST)
    q_below, error_below = _rounded(weight_OGB, below)
    q_above, error_above = _rounded(weight_OGB, above)
    is_above = error_above < error_below
    q_OGB = torch.where(is_above, q_above, q_below)
    scale_OG1 = torch.where(is_above, above, below)
    return q_OGB.to(torch.int8).flatten(1)[:, :num_inputs].contiguous(), scale_OG1.squeeze(2)


def _rounded(weight_OGB: Tensor, scale_OG1: Tensor) -> tuple[Tensor, Tensor]:
    """Weights in units of a scale, and the sum of squared errors [O, G, 1]."""
    q = (weight_OGB / scale_OG1).round_().clamp_(-_MAX, _MAX)
    errors = (q * scale_OG1 - weight_OGB).square_()
    while errors.shape[2] > 1:  # in one order everywhere: torch's own sum depends on the machine
        first, second = errors.chunk(2, dim=2)
        errors = first + second
    return q, errors


def dequantize(q_OK: Tensor, scale_OG: Tensor) -> Tensor:
    """float32 [O, K]; every value is a bfloat16."""
    return q_OK.float() * scale_OG.repeat_interleave(BLOCK, dim=1)[:, : q_OK.shape[1]]


def scale_shape(num_outputs: int, num_inputs: int) -> tuple[int, ...]:
    """One for each output and 64 inputs."""
    return (num_outputs, -(-num_inputs // BLOCK))


def packed_nbytes(num_outputs: int, num_inputs: int) -> int:
    """Bytes of the packed form, scales and zero padding included."""
    num_steps = -(-num_inputs // STEP)
    scales = -(-num_outputs // GROUP) * -(-num_inputs // BLOCK) * narrow.LINE_BYTES
    return scales + narrow.padded_outputs(num_outputs) // PANEL * num_steps * narrow.LINE_BYTES


def pack_into(packed: Tensor, q_OK: Tensor, scale_OG: Tensor) -> None:
    """Writes both into `packed` (uint8 [packed_nbytes]) as kernels/csrc/panel.h has it.

    Raises:
        ValueError: a weight or a scale that `quantize` does not give.
    """
    num_outputs, num_inputs = q_OK.shape
    if int(q_OK.abs().max()) > _MAX:
        raise ValueError(
            f"int4 weights are {-_MAX}..{_MAX}, got {int(q_OK.min())}..{int(q_OK.max())}"
        )
    scales_OG = F.pad(_scale_bytes(scale_OG), (0, 0, 0, -num_outputs % GROUP))
    padding = narrow.padded_outputs(num_outputs) - num_outputs
    nibbles_OK = narrow.sign_and_magnitude(F.pad(q_OK, (0, -num_inputs % STEP, 0, padding)), _SIGN)
    for column, width, target in narrow.column_groups(
        packed, num_outputs, packed_nbytes(GROUP, num_inputs)
    ):
        halves = narrow.interleaved(nibbles_OK[column : column + width])  # even and odd 4 k in turn
        lines = halves[0::2] | halves[1::2] << 4
        for first, scales, weights in _blocks(target, width, num_inputs):
            count = len(scales)
            scales.copy_(scales_OG[column : column + GROUP, first : first + count].t())
            steps = lines[first * _BLOCK_STEPS : (first + count) * _BLOCK_STEPS]
            weights.copy_(steps.reshape(count, -1))


def unpack(packed: Tensor, num_outputs: int, num_inputs: int) -> tuple[Tensor, Tensor]:
    """The q [O, K] and the scales [O, G] that were packed (new tensors)."""
    q, scales = [], []
    for _, width, source in narrow.column_groups(
        packed, num_outputs, packed_nbytes(GROUP, num_inputs)
    ):
        blocks = list(_blocks(source, width, num_inputs))
        lines = torch.cat([weights.reshape(-1, narrow.LINE_BYTES) for _, _, weights in blocks])
        lines = lines.view(-1, width // PANEL, narrow.LINE_BYTES)
        halves = torch.stack([lines & 0xF, lines >> 4], dim=1).flatten(0, 1)
        q.append(narrow.signed(narrow.deinterleaved(halves), _SIGN))
        scales.append(torch.cat([part.t() for _, part, _ in blocks], dim=1))
    scale_OG = _scales_of(torch.cat(scales)[:num_outputs])
    return torch.cat(q)[:num_outputs, :num_inputs].contiguous(), scale_OG


def _blocks(group: Tensor, width: int, num_inputs: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Views of a group of columns: (first block, scales [B, 64], bytes of weights [B, ...]) of the
    whole blocks, then of a shorter one."""
    step_nbytes = width // PANEL * narrow.LINE_BYTES
    num_whole, left = divmod(-(-num_inputs // STEP), _BLOCK_STEPS)
    split = num_whole * (narrow.LINE_BYTES + _BLOCK_STEPS * step_nbytes)
    for first, count, part in (
        (0, num_whole, group[:split]),
        (num_whole, int(left > 0), group[split:]),
    ):
        if count:
            lines = part.view(count, -1)
            yield first, lines[:, : narrow.LINE_BYTES], lines[:, narrow.LINE_BYTES :]


def _scale_bytes(scale_OG: Tensor) -> Tensor:
    """Six bits of exponent below the largest, two of the fraction. Raises ValueError."""
    fraction, exponent = torch.frexp(scale_OG)
    code = (
        ((_EXPONENT + 1 - exponent) << 2 | (fraction * 8).int() - 4).clamp(0, 255).to(torch.uint8)
    )
    if not torch.equal(_scales_of(code), scale_OG):
        raise ValueError(
            "scales of int4 are 1, 1.25, 1.5 or 1.75 times a power of two, from"
            f" {SMALLEST:g} to {LARGEST:g}"
        )
    return code


def _scales_of(code: Tensor) -> Tensor:
    """Inverse of `_scale_bytes`: float32."""
    return (4 + (code & 3).float()) * _power_of_two(_EXPONENT - 2 - (code >> 2).int())


def _power_of_two(exponent: Tensor) -> Tensor:
    """float32, exactly: `torch.ldexp` goes through `pow`, which need not be."""
    return ((exponent + 127) << 23).view(torch.float32)
