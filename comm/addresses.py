"""Addresses as arrays inside numba functions, and the two bit casts that bfloat16 needs."""

from typing import Any

import numba
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

carray: Any = numba.carray  # type: ignore[attr-defined]  # (pointer, shape) -> array on it


def _cast(source: Any, target: Any, operation: str) -> Any:
    """An intrinsic of one argument that is one LLVM cast."""

    def cast(typing_context: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            to = context.get_value_type(signature.return_type)
            return getattr(builder, operation)(arguments[0], to)

        return target(source), generate

    return intrinsic(cast)


_pointer_to: Any = types.CPointer
as_int32 = _cast(types.int64, _pointer_to(types.int32), "inttoptr")
as_uint16 = _cast(types.int64, _pointer_to(types.uint16), "inttoptr")
as_float32 = _cast(types.int64, _pointer_to(types.float32), "inttoptr")
float32_of_bits = _cast(types.uint32, types.float32, "bitcast")
bits_of_float32 = _cast(types.float32, types.uint32, "bitcast")


def _copy(typing_context: Any, target: Any, source: Any, num_bytes: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = context.get_value_type(_pointer_to(types.uint8))
        target_at = builder.inttoptr(arguments[0], pointer)
        source_at = builder.inttoptr(arguments[1], pointer)
        raw_memcpy: Any = cgutils.raw_memcpy
        raw_memcpy(builder, target_at, source_at, arguments[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


copy_bytes: Any = intrinsic(_copy)  # (target address, source address, number of bytes)
