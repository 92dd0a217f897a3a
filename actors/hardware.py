"""What one actor computes on: the device of its kernels, and NCCL beside it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from remora.comm.errors import ConfigError
from remora.comm.nccl_api import CudaDevice, Device, Nccl, load_nccl
from remora.kernels.device import CPU


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """The CPU, or the GPU that Ray gave this process.

    Attributes:
        device: of kernels and of what they read (`kernels.device`).
        nccl_device: the same as NCCL's wrappers see it; None: it takes no part.
        nccl: gives the module; raises ConfigError where it is not installed.
    """

    device: torch.device
    nccl_device: Device | None
    nccl: Callable[[], Nccl] = load_nccl

    @staticmethod
    def of(name: str) -> "Hardware":
        """The hardware of `Launch.device`; Ray makes the process' GPU the only visible one.

        Raises:
            ConfigError: "cuda" where torch finds no GPU.
        """
        if name == "cpu":
            return Hardware(device=CPU, nccl_device=None)
        if not torch.cuda.is_available():
            raise ConfigError(
                f"device {name}: torch {torch.__version__} finds no GPU in this process (is it a "
                "CUDA build, and did Ray give the actor one: num_gpus?); allowed without: cpu"
            )
        return Hardware(device=torch.device("cuda", 0), nccl_device=CudaDevice())
