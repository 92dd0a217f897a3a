"""What Remora uses of `cupy.cuda.nccl`, as types; loading it; the device it runs beside.

The protocols have cupy 14's own names, parameters and order (`tests/unit/test_nccl_signatures.py`
holds them against the wheel). What is particular to that wheel, read from it:

* a unique id is `bytes` of length 128 (a tuple before cupy 14);
* communicators are blocking: `NcclConfig` has `split_share` and nothing else, and `NcclError(7)`
  (in progress) cannot even be made. So `NCCL_COMM_BLOCKING=0` must not be set, and a call that
  waits for a peer cannot be interrupted: see `nccl_member` for what follows;
* `destroy` and `abort` of a communicator that is gone do nothing; every other call on it fails with
  status 4 (invalid argument: NCCL's answer to a null handle). One that is dropped is destroyed;
* streams and buffers are plain integers, so cupy's arrays are not needed: tensors are torch's.
"""

import importlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from remora.comm.errors import ConfigError

NO_COLOR: Final = -1  # `commSplit`: this rank is in no part of the split


class Communicator(Protocol):
    """`cupy.cuda.nccl.NcclCommunicator`, one rank of one generation."""

    def send(self, sendbuf: int, count: int, datatype: int, peer: int, stream: int) -> None:
        """Enqueues `count` elements to rank `peer`."""

    def recv(self, recvbuf: int, count: int, datatype: int, peer: int, stream: int) -> None:
        """Enqueues the receipt of `count` elements from rank `peer`."""

    def commSplit(self, color: int, key: int, config: Any = None) -> "Communicator | None":
        """Collective over the parent, which must have nothing outstanding; ranks by `key`."""

    def check_async_error(self) -> None:
        """Raises NcclError when an enqueued operation failed since."""

    def abort(self) -> None:
        """Ends what is enqueued and frees the communicator, without its peers."""

    def rank_id(self) -> int:
        """This rank."""

    def size(self) -> int:
        """Number of ranks."""


class Nccl(Protocol):
    """The module `cupy.cuda.nccl`."""

    NCCL_INT32: int
    NCCL_FLOAT32: int
    NCCL_FLOAT16: int
    NCCL_BFLOAT16: int
    NcclError: type[Exception]

    def NcclCommunicator(
        self, ndev: int, commId: bytes, rank: int, config: Any = None
    ) -> Communicator:
        """Blocks until all `ndev` ranks of `commId` have called."""

    def get_unique_id(self) -> bytes:
        """A new id; this process serves the bootstrap of its communicator."""

    def get_version(self) -> int:
        """Of the NCCL library that was loaded: 22501 is 2.25.1."""

    def groupStart(self) -> None:
        """What this thread calls from here is launched together at `groupEnd`."""

    def groupEnd(self) -> None:
        """Launches the group; raises NcclError for all of it."""


class Mark(Protocol):
    """A place in a stream."""

    def ready(self) -> bool:
        """Whether everything enqueued before it is over. Does not wait."""


class Device(Protocol):
    """The GPU of this rank (or, in tests, the CPU)."""

    @property
    def torch_device(self) -> torch.device:
        """Where buffers lie."""

    def stream(self) -> int:
        """Address of the stream that torch enqueues on now: the one stream of all our calls."""

    def mark(self) -> Mark:
        """A mark behind everything enqueued so far."""

    def on_this_thread(self) -> AbstractContextManager[Any]:
        """Makes it the current device of the calling thread."""


class CudaDevice:
    """Device of a process with one GPU. Has not run on one yet."""

    def __init__(self, index: int = 0) -> None:
        self.torch_device = torch.device("cuda", index)

    def stream(self) -> int:
        """torch's current stream."""
        return int(torch.cuda.current_stream(self.torch_device).cuda_stream)

    def mark(self) -> Mark:
        """An event recorded on that stream."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.torch_device))
        return _CudaMark(event)

    def on_this_thread(self) -> AbstractContextManager[Any]:
        """`torch.cuda.device`: which device is current is a matter of each thread."""
        return torch.cuda.device(self.torch_device)


class _CudaMark:
    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def ready(self) -> bool:
        return bool(self._event.query())


def load_nccl() -> Nccl:
    """The module `cupy.cuda.nccl`.

    Raises:
        ConfigError: cupy or NCCL's library is not installed; the text says what to install.
    """
    try:
        module: Any = importlib.import_module("cupy.cuda.nccl")
    except ImportError as error:
        raise ConfigError(
            f"the NCCL transport needs cupy ({error}): install remora[gpu]"
        ) from error
    if not module.available:
        raise ConfigError(
            "cupy finds no libnccl.so.2: install nvidia-nccl-cu12, which torch for CUDA brings"
        )
    loaded: Nccl = module
    return loaded


@contextmanager
def group(nccl: Nccl) -> Iterator[None]:
    """Everything called inside is launched together: no order between peers can deadlock it.

    A call that fails inside ends the group too (what NCCL took of it is launched: the caller must
    abort the communicator), and the call's error is the one that is raised.

    Raises:
        NcclError: of a call, or of the launch.
    """
    nccl.groupStart()
    try:
        yield
    except BaseException as error:
        try:
            nccl.groupEnd()
        except nccl.NcclError as at_end:
            error.add_note(f"and the group ended with {at_end}")
        raise
    nccl.groupEnd()


def datatype(nccl: Nccl, dtype: torch.dtype) -> int:
    """NCCL's number of a torch dtype. Raises ValueError for one that is not sent."""
    codes = {
        torch.int32: nccl.NCCL_INT32,
        torch.float32: nccl.NCCL_FLOAT32,
        torch.float16: nccl.NCCL_FLOAT16,
        torch.bfloat16: nccl.NCCL_BFLOAT16,
    }
    if dtype not in codes:
        raise ValueError(f"{dtype} is not sent, allowed are {', '.join(map(str, codes))}")
    return codes[dtype]


def send(nccl: Nccl, comm: Communicator, tensor: Tensor, peer: int, stream: int) -> None:
    """Enqueues a contiguous tensor; an empty one is no operation (the peer knows the count)."""
    assert tensor.is_contiguous(), f"strides {tensor.stride()} of {tuple(tensor.shape)}"
    if tensor.numel():
        comm.send(tensor.data_ptr(), tensor.numel(), datatype(nccl, tensor.dtype), peer, stream)


def recv(nccl: Nccl, comm: Communicator, tensor: Tensor, peer: int, stream: int) -> None:
    """Enqueues the receipt of a contiguous tensor; an empty one is no operation."""
    assert tensor.is_contiguous(), f"strides {tensor.stride()} of {tuple(tensor.shape)}"
    if tensor.numel():
        comm.recv(tensor.data_ptr(), tensor.numel(), datatype(nccl, tensor.dtype), peer, stream)
