"""Memory that frames are built in and read from, with torch views made once.

An *arena* is such memory in a memfd, made by the requester at connect and passed to the shard as
a descriptor over the Unix socket (SCM_RIGHTS). It has no name in any filesystem, so SIGKILL of
either side leaves nothing behind. It is sealed against shrinking (a shard must not get SIGBUS from
a requester's ftruncate) and divided into equal *regions*, one per call under way: credits.

    region:  header (64) | body | pad to 64 | the answer's rows

Lifetime: a view into a region is valid until the call's answer has been sent (shard) or the call
released (requester). A region whose call was given up is not used again until the late answer has
arrived or the connection is gone; after a lost connection the whole arena is abandoned, because
the peer may still be writing into its mapping.
"""

import fcntl
import mmap
import os
from typing import Final

import torch
from torch import Tensor

from remora.comm.errors import FrameError
from remora.comm.wire import Dtype

_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
TORCH_DTYPES: Final = {int(Dtype.FLOAT32): torch.float32, int(Dtype.BFLOAT16): torch.bfloat16}
DTYPE_CODES: Final = {dtype: code for code, dtype in TORCH_DTYPES.items()}
_ITEM_SHIFT: Final = {int(Dtype.FLOAT32): 2, int(Dtype.BFLOAT16): 1}


def align64(num_bytes: int) -> int:
    """`num_bytes` rounded up to a cache line."""
    return (num_bytes + 63) & ~63


class Memory:
    """A page-aligned mapping with byte, torch and address views; freed with its last view.

    Attributes:
        view: memoryview over all of it.
        address: where it starts in this process.
        num_bytes: its size.
    """

    def __init__(self, mapping: mmap.mmap) -> None:
        self.num_bytes = len(mapping)
        self.view = memoryview(mapping)
        base = torch.frombuffer(mapping, dtype=torch.uint8)
        self.address: int = base.data_ptr()
        self._flat = {code: base.view(dtype) for code, dtype in TORCH_DTYPES.items()}
        self._int32 = base.view(torch.int32)

    @classmethod
    def anonymous(cls, num_bytes: int) -> "Memory":
        """Private memory of at least `num_bytes`; pages are touched on use only."""
        return cls(mmap.mmap(-1, max(64, align64(num_bytes)), flags=mmap.MAP_PRIVATE))

    @classmethod
    def create_shared(cls, num_bytes: int) -> tuple["Memory", int]:
        """A new sealed memfd of `num_bytes` (a multiple of 64), mapped; and its descriptor.

        The descriptor is the caller's, to pass on and to close.
        """
        assert num_bytes > 0 and num_bytes % 64 == 0, f"arena of {num_bytes} bytes"
        descriptor = os.memfd_create("remora-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, num_bytes)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
            return cls(mmap.mmap(descriptor, num_bytes)), descriptor
        except BaseException:
            os.close(descriptor)
            raise

    @classmethod
    def attach(cls, descriptor: int, num_bytes: int) -> "Memory":
        """Maps a peer's arena; the descriptor stays the caller's.

        Raises:
            FrameError: not a sealed memfd of exactly `num_bytes`.
        """
        try:
            seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
        except OSError as error:
            raise FrameError(f"arena descriptor is no memfd: {error}") from error
        size = os.fstat(descriptor).st_size
        if seals & _SEALS != _SEALS or size != num_bytes:
            raise FrameError(
                f"arena has {size} bytes and seals {seals:#x}; "
                f"agreed were {num_bytes} bytes and seals {_SEALS:#x}"
            )
        return cls(mmap.mmap(descriptor, num_bytes))

    def rows(self, dtype: int, offset: int, num_rows: int, width: int) -> Tensor:
        """`[num_rows, width]` tensor on the bytes at `offset` (a multiple of the item size)."""
        return self._flat[dtype].as_strided(
            (num_rows, width), (width, 1), offset >> _ITEM_SHIFT[dtype]
        )

    def int32(self, offset: int, count: int) -> Tensor:
        """`[count]` int32 tensor on the bytes at `offset` (a multiple of 4)."""
        return self._int32.as_strided((count,), (1,), offset >> 2)
