"""What the last bits of a kernel's result depend on, in one string."""

from typing import Final

import torch

from remora.kernels import native

KERNEL_VERSION: Final = 2  # grows where Python code of this room moves a bit of a result


def kernel_fingerprint() -> str:
    """Kernel version, instruction set and torch build: equal strings, equal bits.

    A part of the numeric fingerprint of a run; the dense rank adds mode, executor, dtype, threads
    and tensor-parallel size.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    return (
        f"kernels={KERNEL_VERSION}-{native.native_source_hash()} isa={native.native_isa()} "
        f"torch={torch.__version__} torch_cpu={capability}"
    )
