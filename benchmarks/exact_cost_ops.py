"""Which torch operations give a row other bits when other rows stand beside it, for exact_cost.py.

torch applies elementwise functions to the flattened tensor, sixteen or more values at a time, and
what is left over one by one, with another exp; where threads share the work, each has leftovers.
"""

from collections.abc import Callable
from typing import Final

import torch
import torch.nn.functional as F
from common import Row
from torch import Tensor

WIDTHS: Final = (1024, 64, 96, 1000, 33)
RUNS: Final = ((0, 1), (7, 1), (100, 3), (13, 5), (50, 8), (33, 17), (1, 64), (90, 100), (11, 200))


def rms_norm(x: Tensor) -> Tensor:
    """As most models write it."""
    wide = x.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)


OPS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "multiply and add": lambda x: x * 1.7 + x,
    "rms norm": rms_norm,
    "layer norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "softmax": lambda x: F.softmax(x.float(), -1),
    "sum": lambda x: x.sum(-1),
    "top-8": lambda x: x.float().topk(8, -1).values,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "gelu (tanh)": lambda x: F.gelu(x, approximate="tanh"),
    "softplus": F.softplus,
}


def moves(op: Callable[[Tensor], Tensor], width: int, dtype: torch.dtype) -> bool:
    """Whether any of `RUNS`, (first row, rows), differs from the same rows among 300."""
    generator = torch.Generator().manual_seed(width)
    x = (torch.randn(300, width, generator=generator) * 4).to(dtype)
    whole = op(x)
    return any(
        not torch.equal(op(x[start : start + count].clone()), whole[start : start + count])
        for start, count in RUNS
    )


def row_dependent_ops() -> list[Row]:
    """Per operation, number of threads and dtype: the widths at which rows' bits move."""
    before = torch.get_num_threads()
    rows: list[Row] = []
    for name, op in OPS.items():
        row: dict[str, str] = {"torch op": name}
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for dtype in (torch.float32, torch.bfloat16):
                found = [str(width) for width in WIDTHS if moves(op, width, dtype)]
                label = f"{threads} thr {'f32' if dtype == torch.float32 else 'bf16'}"
                row[label] = " ".join(found) or "-"
        rows.append(row)
    torch.set_num_threads(before)
    return rows
