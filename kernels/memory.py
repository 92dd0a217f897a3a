"""Memory for weights and KV pages: straight from the kernel, in pages of 2 MiB where there are any.

Both are streams of memory, and with pages of 4 KiB every one of them costs a look-up: the experts
of a layer take 1.4 times as long (benchmarks/notes/2026-11-28-huge-pages.md). The heap does not
do: what it hands out has often been written before, in small pages, and those stay small.
"""

import contextlib
import ctypes
import math
import mmap
import threading
from typing import Final

import torch
from torch import Tensor

HUGE_PAGE_BYTES: Final = 2 << 20
CHUNK_BYTES: Final = 32 << 20  # of which smaller tensors get pieces
ALIGN_BYTES: Final = 128


class _Chunk:
    """A mapping of whole huge pages, handed out from its start to its end."""

    def __init__(self, nbytes: int) -> None:
        # One page more: the mapping begins anywhere. What is not touched is not there.
        self._mapping = mmap.mmap(-1, nbytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            # A kernel without them refuses, which costs speed only.
            with contextlib.suppress(OSError):
                self._mapping.madvise(mmap.MADV_HUGEPAGE)
        begin = torch.frombuffer(self._mapping, dtype=torch.uint8).data_ptr()
        self._next = -begin % HUGE_PAGE_BYTES
        self._end = self._next + nbytes

    def take(self, numel: int, dtype: torch.dtype) -> Tensor | None:
        """A flat tensor that keeps the mapping alive, or None where there is no room left."""
        offset = self._next
        end = offset + -(-numel * dtype.itemsize // ALIGN_BYTES) * ALIGN_BYTES
        if end > self._end:
            return None
        self._next = end
        return torch.frombuffer(self._mapping, dtype=dtype, count=numel, offset=offset)


MADV_DONTNEED: Final = 4  # Linux
_libc: Final = ctypes.CDLL(None, use_errno=True)

_lock: Final = threading.Lock()
_chunk: _Chunk | None = None  # where small tensors come from


def huge_zeros(*shape: int, dtype: torch.dtype) -> Tensor:
    """A zero-filled contiguous CPU tensor that takes memory when it is first written.

    Tensors of less than a quarter of `CHUNK_BYTES` share a mapping, which is given back when the
    last of them is gone. Any thread may call.
    """
    global _chunk
    numel = math.prod(shape)
    if numel == 0:
        return torch.zeros(shape, dtype=dtype)
    nbytes = -(-numel * dtype.itemsize // ALIGN_BYTES) * ALIGN_BYTES
    if nbytes >= CHUNK_BYTES // 4:
        flat = _Chunk(nbytes).take(numel, dtype)
    else:
        with _lock:
            flat = None if _chunk is None else _chunk.take(numel, dtype)
            if flat is None:
                _chunk = _Chunk(CHUNK_BYTES)
                flat = _chunk.take(numel, dtype)
    assert flat is not None
    return flat.view(shape)


def give_back(tensor: Tensor) -> int:
    """Give the memory of a contiguous CPU tensor back to the system until it is written again.

    What it held is lost: whole pages of it read as zeros, its ends keep what they have.

    Returns:
        Bytes given back: those of the whole pages that are the tensor's alone.
    """
    begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end <= begin:
        return 0
    if _libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), MADV_DONTNEED):
        raise OSError(ctypes.get_errno(), "madvise(MADV_DONTNEED)")
    return end - begin
