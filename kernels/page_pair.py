"""What pages of keys and values tell of themselves, whatever their layout and device."""

import torch
from torch import Tensor


class PagePair:
    """Two tensors whose first two sizes are blocks and key/value heads."""

    __slots__ = ()

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """Keys and values."""
        raise NotImplementedError

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool, N."""
        return self.tensors[0].shape[0]

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads, J."""
        return self.tensors[0].shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self.tensors[0].dtype

    @property
    def nbytes(self) -> int:
        """Of the whole pool."""
        return sum(tensor.nbytes for tensor in self.tensors)


def check_pages(
    num_blocks: int,
    num_kv_heads: int,
    k_dim: int,
    v_dim: int,
    dtype: torch.dtype,
    allowed: tuple[torch.dtype, ...],
) -> None:
    """Raises ValueError for sizes below one and dtypes that are not `allowed`."""
    if dtype not in allowed:
        raise ValueError(f"KV dtype {dtype}: allowed are {', '.join(map(str, allowed))}")
    if min(num_blocks, num_kv_heads, k_dim, v_dim) < 1:
        raise ValueError(
            f"KV pages need positive sizes, got blocks {num_blocks}, heads {num_kv_heads}, "
            f"key width {k_dim}, value width {v_dim}"
        )
