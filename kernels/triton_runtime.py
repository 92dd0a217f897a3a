"""Where Triton comes from, so that the modules that need it can be imported where it is not.

Kernels are written against the `tl`, `triton` and `jit` of this file. Without Triton those are
stand-ins: a module still imports, and the first call of a kernel says what to install. Under
`TRITON_INTERPRET=1`, set before the first import, kernels run in Python on CPU tensors.
"""

import importlib.util
import os
from collections.abc import Callable
from typing import Any, Final, NoReturn

import torch

HAS_TRITON: Final = importlib.util.find_spec("triton") is not None
INTERPRETED: Final = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"

_MISSING = (
    "GPU kernels need Triton, which is not installed here: pip install 'remora[gpu]', "
    "or choose the device cpu"
)


class _NoKernel:
    """Stands where a compiled kernel would stand."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.fn = function

    def __getitem__(self, grid: object) -> NoReturn:
        raise RuntimeError(_MISSING)


class _NoTriton:
    """Stands where `triton` and `triton.language` would stand, for annotations and constants."""

    def __getattr__(self, name: str) -> object:
        return _NoTriton()

    def __call__(self, *args: object, **kwargs: object) -> object:
        return _NoTriton()


triton: Any = importlib.import_module("triton") if HAS_TRITON else _NoTriton()
tl: Any = importlib.import_module("triton.language") if HAS_TRITON else _NoTriton()


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`, or without Triton what says so when it is launched."""
    return triton.jit(function) if HAS_TRITON else _NoKernel(function)


def check_device(device: torch.device) -> None:
    """Says whether Triton kernels can run on tensors of `device`.

    Raises:
        RuntimeError: Triton is missing, or the device is neither a GPU that is there nor, under
            the interpreter, the CPU.
    """
    if not HAS_TRITON:
        raise RuntimeError(_MISSING)
    if INTERPRETED and device.type == "cpu":
        return
    if device.type != "cuda":
        raise RuntimeError(
            f"Triton kernels run on cuda devices, got {device} "
            "(on cpu only under TRITON_INTERPRET=1, to check them)"
        )
    if not torch.cuda.is_available():
        raise RuntimeError(f"device {device} asked for, but torch {torch.__version__} sees no GPU")


def cdiv(numerator: int, denominator: int) -> int:
    """Numerator over denominator, rounded up."""
    return -(-numerator // denominator)


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size` (>= 1): block shapes must be such."""
    return 1 << (size - 1).bit_length()
