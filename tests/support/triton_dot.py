"""`tl.dot` for Triton's interpreter that does what a tensor core promises.

The interpreter's own is numpy's `matmul`: it takes bfloat16 for integers, and its BLAS adds up a
row in another order at the edge of a matrix than inside. On the hardware an output element is a
function of its row and its column. Here it is, too: one product after the other, over k.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray


def _float32(handle: Any) -> NDArray[np.float32]:
    if str(handle.dtype.scalar) == "bf16":
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    values: NDArray[np.float32] = handle.data.astype(np.float32)
    return values


@contextmanager
def row_by_row_dot() -> Iterator[None]:
    """While it lasts, `tl.dot` of interpreted kernels is computed as said above."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        a_MK, b_KN = _float32(a), _float32(b)
        total_MN = d.data.copy()
        for k in range(a_MK.shape[1]):
            total_MN += a_MK[:, k : k + 1] * b_KN[k : k + 1, :]
        return TensorHandle(total_MN, d.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", create_dot)
        yield
