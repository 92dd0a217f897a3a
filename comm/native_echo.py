"""A shard without weights, in C++: what the data plane costs when the experts cost nothing."""

from remora.comm.native import native_extension
from remora.comm.native_pump import NativeCompute
from remora.comm.wire import ITEM_BYTES


def native_echo(width: int, dtype: int) -> NativeCompute:
    """Answers the rows it got: one a row (presummed), or one a pair. The extension must be there.

    Args:
        width: elements of a row.
        dtype: `wire.Dtype` of rows.
    """
    return NativeCompute(native_extension().ECHO_ENTRY, width * ITEM_BYTES[dtype], width, dtype)
