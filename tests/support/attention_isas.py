"""The instruction sets that attention has a kernel for, and the best of them here."""

from remora.kernels.native import native_available, native_isa

ISAS = ["portable", "avx2", "avx512", "avx512_bf16"]


def best_isa() -> str:
    """The last of them where there is AMX, whose tiles attention does not use."""
    return ISAS[-1] if native_isa().startswith("amx") else native_isa()


def is_here(isa: str) -> bool:
    """Whether the C++ kernels run with `isa` on this machine."""
    return native_available() and ISAS.index(isa) <= ISAS.index(best_isa())
