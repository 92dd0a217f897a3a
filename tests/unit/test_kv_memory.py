"""KV pages take memory when they are used, not when they are allocated."""

import resource
from pathlib import Path

import torch

from remora.kernels.attention import KVPages

PAGE_BYTES = resource.getpagesize()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


def test_a_pool_takes_memory_as_it_is_used() -> None:
    before = resident_bytes()
    pages = KVPages.allocate(16384, 4, 64, 64, torch.bfloat16)
    assert pages.nbytes == 256 << 20
    assert resident_bytes() - before < 32 << 20
    assert not pages.k_NJWBE[:64].any() and not pages.v_NJPDE[-64:].any()
    pages.k_NJWBE.fill_(1)
    pages.v_NJPDE.fill_(1)
    assert resident_bytes() - before > 200 << 20
