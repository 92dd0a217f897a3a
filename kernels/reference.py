"""Slow, obvious twins of the linear, expert and routing kernels, in float64 or plain Python.

They say what a kernel computes, not how it rounds: tests compare within an error bound, and rows
among each other bit for bit. The twins of attention and sampling are in `reference_attention`.

Shapes: T tokens, K inputs or top-k, O outputs, N rows or pairs, D model width, S slots.
"""

import math

import torch
from torch import Tensor

from remora.kernels.gates import Gate


def linear(x_TK: Tensor, weight_OK: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + b in float64, [T, O]."""
    y_TO = x_TK.double() @ weight_OK.double().t()
    return y_TO if bias_O is None else y_TO + bias_O.double()


def linear_error_bound(
    x_TK: Tensor, weight_OK: Tensor, bias_O: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """What a float32 sum over k in any order, rounded once to `dtype`, may be off by, [T, O].

    Higham, Accuracy and Stability of Numerical Algorithms, section 3.1: K roundings of a sum of the
    absolute products; denormals may be taken as zero (`vdpbf16ps`).
    """
    magnitude_TO = linear(x_TK.abs(), weight_OK.abs(), None if bias_O is None else bias_O.abs())
    num_roundings = x_TK.shape[1] + 2
    sum_error = num_roundings * torch.finfo(torch.float32).eps * magnitude_TO
    return sum_error + torch.finfo(dtype).eps * magnitude_TO + x_TK.shape[1] * 1e-37


def packed_weight(weight_OK: Tensor) -> Tensor:
    """The packed form (kernels/csrc/panel.h): 32-bit words [K'][columns] of every 64 outputs.

    A word is one float32 or two inputs of bfloat16; zeros fill up 16 outputs and the last word.
    """
    per_word = 4 // weight_OK.element_size()
    num_outputs, num_inputs = weight_OK.shape
    padding = (0, -num_inputs % per_word, 0, -num_outputs % 16)
    words = torch.nn.functional.pad(weight_OK, padding).view(torch.int32)
    groups = [words[column : column + 64].t().flatten() for column in range(0, len(words), 64)]
    return torch.cat(groups).view(weight_OK.dtype)


def grouped_linear(
    x_NK: Tensor, weights_SOK: Tensor, bias_SO: Tensor | None, offsets_S1: Tensor
) -> Tensor:
    """Row n times the slot whose run of rows it stands in, one row at a time; float64, [N, O]."""
    y_NO = torch.zeros(x_NK.shape[0], weights_SOK.shape[1], dtype=torch.float64)
    for slot in range(weights_SOK.shape[0]):
        for row in range(int(offsets_S1[slot]), int(offsets_S1[slot + 1])):
            bias = None if bias_SO is None else bias_SO[slot]
            y_NO[row] = linear(x_NK[row : row + 1], weights_SOK[slot], bias)[0]
    return y_NO


def expert_gate(gate: Gate, up_NU: Tensor) -> Tensor:
    """One element at a time as `Gate` says it, float64, [N, I]."""
    rows = [
        [
            _gate_element(gate, *row[i * gate.columns : (i + 1) * gate.columns])
            if gate.layout != "concatenated"
            else _gate_element(gate, row[i], row[i + len(row) // 2])
            for i in range(len(row) // gate.columns)
        ]
        for row in up_NU.double().tolist()
    ]
    return torch.tensor(rows, dtype=torch.float64)


def _gate_element(gate: Gate, value: float, factor: float | None = None) -> float:
    value = min(value, gate.gate_max)
    if gate.activation == "silu":
        exponent = -gate.alpha * value
        out = value / (1 + math.exp(exponent)) if exponent < 700 else -0.0
    elif gate.activation == "gelu":
        out = 0.5 * value * math.erfc(-value / math.sqrt(2))
    elif gate.activation == "gelu_tanh":
        inner = math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)
        out = 0.5 * value * (1 + math.tanh(inner))
    else:
        out = max(value, 0.0) ** (2 if gate.activation == "relu2" else 1)
    out = min(out, gate.act_max)
    if factor is None:
        return out
    return out * (max(min(factor, gate.up_max), -gate.up_max) + gate.up_shift)


def route_sort(slots: list[int], num_slots: int) -> tuple[list[int], list[int], list[int]]:
    """(order, place, offsets) of `routing.route_sort`."""
    pairs = range(len(slots))
    order = sorted(pairs, key=lambda pair: num_slots if slots[pair] < 0 else slots[pair])
    place = [order.index(pair) for pair in pairs]
    offsets = [sum(0 <= slot < limit for slot in slots) for limit in range(num_slots + 1)]
    return order, place, offsets


def gather_rows(rows_MD: Tensor, index: list[int]) -> Tensor:
    """Row index[n], or zeros for -1, [N, D]."""
    zero_D = torch.zeros_like(rows_MD[0]) if rows_MD.shape[0] else rows_MD.new_zeros(())
    return torch.stack([zero_D if i < 0 else rows_MD[i] for i in index])


def combine_ordered(rows_ND: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Float32 sums in top-k order, product and sum rounded separately; dtype of the rows."""
    out_TD = torch.zeros(index_TK.shape[0], rows_ND.shape[1], dtype=torch.float32)
    for token, (indices, weights) in enumerate(
        zip(index_TK.tolist(), weights_TK.float(), strict=True)
    ):
        for index, weight in zip(indices, weights, strict=True):
            if index >= 0:
                out_TD[token] += weight * rows_ND[index].float()
    return out_TD.to(rows_ND.dtype)


def presum(
    rows_ND: Tensor, pair_row: list[int], pair_weight_N: Tensor, num_rows: int, place: list[int]
) -> Tensor:
    """Float32 sums in pair order, product and sum rounded separately; dtype of the rows."""
    out_TD = torch.zeros(num_rows, rows_ND.shape[1], dtype=torch.float32)
    for pair, row in enumerate(pair_row):
        if row >= 0:
            out_TD[row] += pair_weight_N[pair].float() * rows_ND[place[pair]].float()
    return out_TD.to(rows_ND.dtype)
