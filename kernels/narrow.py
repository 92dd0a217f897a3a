"""What the packed forms of one-byte and four-bit weights share (kernels/csrc/panel.h)."""

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

from remora.kernels.linear import GROUP, PANEL

STEP: Final = 4  # k of one line of bytes: 16 columns of a panel
LINE_BYTES: Final = 64
_RUN: Final = 4  # columns of one run: 16 bytes of a line, two k times four columns, twice


def padded_outputs(num_outputs: int) -> int:
    """Columns of whole panels."""
    return -(-num_outputs // PANEL) * PANEL


def column_groups(
    packed: Tensor, num_outputs: int, group_nbytes: int
) -> Iterator[tuple[int, int, Tensor]]:
    """(first column, columns, bytes) of each group; a whole one has `group_nbytes`."""
    num_columns = padded_outputs(num_outputs)
    for column in range(0, num_columns, GROUP):
        start = column // GROUP * group_nbytes
        yield column, min(GROUP, num_columns - column), packed[start : start + group_nbytes]


def interleaved(bytes_CK: Tensor) -> Tensor:
    """Bytes of whole panels' columns, K a multiple of `STEP` -> lines [K / STEP, panels, 64]."""
    # [panel, run, column of it] x [step, half, 2] -> [step, panel, run, half, column, 2]
    parts = bytes_CK.reshape(-1, PANEL // _RUN, _RUN, bytes_CK.shape[1] // STEP, 2, 2)
    return parts.permute(3, 0, 1, 4, 2, 5).reshape(parts.shape[3], parts.shape[0], LINE_BYTES)


def deinterleaved(lines: Tensor) -> Tensor:
    """Inverse of `interleaved`: [columns, K]."""
    parts = lines.reshape(lines.shape[0], lines.shape[1], PANEL // _RUN, 2, _RUN, 2)
    return parts.permute(1, 2, 4, 0, 3, 5).reshape(lines.shape[1] * PANEL, -1)


def sign_and_magnitude(q: Tensor, sign: int) -> Tensor:
    """int8 -> uint8: the magnitude, and the bit `sign` where it is negative."""
    return q.abs().view(torch.uint8) | ((q < 0).to(torch.uint8) * sign)


def signed(values: Tensor, sign: int) -> Tensor:
    """Inverse of `sign_and_magnitude`."""
    magnitude = (values & (sign - 1)).view(torch.int8)
    return torch.where(values >= sign, -magnitude, magnitude)
