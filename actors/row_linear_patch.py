"""Routers call `torch.nn.functional.linear` themselves: in a dense process it is row-independent.

`nn.Linear` layers become `PackedLinear`, but routers (and subclasses of `nn.Linear`) hold bare
weights. Their results must not depend on how many rows run beside them either, so the one function
they all end in is replaced for the life of the process. Only 2-D weights of our dtypes on the CPU
are diverted; anything else goes to torch's own.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from remora.kernels import native
from remora.kernels.linear import DTYPES, in_row_tiles

torch_linear: Callable[..., Tensor] = F.linear  # torch's own, as it was at import


def _row_independent(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Drop-in for `F.linear`: same arguments, same shapes."""
    if weight.dim() != 2 or input.dtype != weight.dtype or weight.dtype not in DTYPES:
        return torch_linear(input, weight, bias)
    if weight.device.type != "cpu" or input.device.type != "cpu":
        return torch_linear(input, weight, bias)
    if native.native_available():
        out: Tensor = torch.ops.remora.row_linear(input, weight, bias)
        return out
    flat: Tensor = in_row_tiles(lambda tile: torch_linear(tile, weight, bias), input.flatten(0, -2))
    tiled: Tensor = flat.unflatten(0, input.shape[:-1])
    return tiled


def install(*, exact: bool) -> None:
    """Replace `F.linear` in this process; without C++ kernels only where `exact` asks for it."""
    if native.native_available() or exact:
        F.linear = _row_independent


def uninstall() -> None:
    """Give torch its own function back (tests)."""
    F.linear = torch_linear
