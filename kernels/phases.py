"""Time that this process has spent inside our C++ kernels, by kind (csrc/phase.h).

    before = phases.snapshot()
    ...
    for kind, spent in phases.since(before).items(): ...

The counters are of the whole process and always on. Without the C++ kernels there are none.
"""

from functools import cache

import torch

from remora.kernels.native import native_available


def snapshot() -> dict[str, int]:
    """Nanoseconds by kind since the process began; empty without the C++ kernels.

    Wall time of the calling threads, a kernel inside another one counted as the outer one only.
    """
    if not native_available():
        return {}
    return dict(zip(_names(), torch.ops.remora.phase_ns(), strict=True))


def since(before: dict[str, int]) -> dict[str, int]:
    """Nanoseconds by kind since the snapshot `before`, kinds that did nothing left out."""
    now = snapshot()
    return {kind: now[kind] - before[kind] for kind in now if now[kind] != before[kind]}


@cache
def _names() -> tuple[str, ...]:
    return tuple(torch.ops.remora.phase_names())
