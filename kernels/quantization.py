"""How expert weights are held: as they are, or quantised once, when they are loaded."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from remora.kernels import int4, int8
from remora.kernels.experts_dtype import ExpertsDtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """A quantised form; the modules say what their functions do."""

    name: str  # as the C++ ops know it
    step: int  # inputs of one step of the packed form: rows are padded to a multiple
    quantize: Callable[[Tensor], tuple[Tensor, Tensor]]
    dequantize: Callable[[Tensor, Tensor], Tensor]
    scale_shape: Callable[[int, int], tuple[int, ...]]
    packed_nbytes: Callable[[int, int], int]
    pack_into: Callable[[Tensor, Tensor, Tensor], None]
    unpack: Callable[[Tensor, int, int], tuple[Tensor, Tensor]]


_FORMS: Final = {
    name: Quantization(
        name=name,
        step=step,
        quantize=module.quantize,
        dequantize=module.dequantize,
        scale_shape=module.scale_shape,
        packed_nbytes=module.packed_nbytes,
        pack_into=module.pack_into,
        unpack=module.unpack,
    )
    for name, module, step in (("int8", int8, int8.STEP), ("int4", int4, int4.STEP))
}


def quantization_of(experts_dtype: ExpertsDtype) -> Quantization | None:
    """The form that this names; None: weights are held as they are."""
    return None if experts_dtype == "auto" else _FORMS[experts_dtype]


def held_as(experts_dtype: ExpertsDtype, dtype: torch.dtype) -> str:
    """Name of what expert weights are held in under rows of `dtype`: "bfloat16", "int8", ..."""
    return str(dtype).removeprefix("torch.") if experts_dtype == "auto" else experts_dtype
