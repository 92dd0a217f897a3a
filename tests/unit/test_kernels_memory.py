"""Memory of weights: zero, in huge pages where there are any, given back with the last tensor."""

import gc
import re
from pathlib import Path

import pytest
import torch

from remora.kernels import memory
from remora.kernels.memory import ALIGN_BYTES, CHUNK_BYTES, HUGE_PAGE_BYTES, give_back, huge_zeros

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def rollup(name: str) -> int:
    """Bytes of this process, as /proc/self/smaps_rollup says."""
    found = re.search(rf"^{name}: +(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.M)
    assert found is not None
    return int(found[1]) << 10


@pytest.mark.parametrize("shape", [(3,), (1, 5, 7), (CHUNK_BYTES // 8,), (17, CHUNK_BYTES // 16)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8, torch.int64])
def test_tensors_are_zero_apart_and_contiguous(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    first, second = huge_zeros(*shape, dtype=dtype), huge_zeros(*shape, dtype=dtype)
    assert first.shape == shape and first.dtype == dtype and first.is_contiguous()
    assert first.data_ptr() % ALIGN_BYTES == 0
    first.fill_(1)
    assert not second.any() and first.all()
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()


def test_nothing_is_a_tensor_too() -> None:
    assert huge_zeros(0, 4, dtype=torch.bfloat16).shape == (0, 4)


def test_memory_is_taken_when_it_is_written_and_given_back() -> None:
    before = rollup("Rss")
    tensor = huge_zeros(16, CHUNK_BYTES, dtype=torch.uint8)
    assert rollup("Rss") - before < CHUNK_BYTES
    tensor.fill_(1)
    assert rollup("Rss") - before > 15 * CHUNK_BYTES
    del tensor
    gc.collect()
    assert rollup("Rss") - before < CHUNK_BYTES


def mapping_of(address: int) -> dict[str, int]:
    """Bytes of the mapping at an address, by their name in /proc/self/smaps."""
    found: dict[str, int] = {}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and (size := re.match(r"(\w+): +(\d+) kB", line)):
            found[size[1]] = int(size[2]) << 10
    return found


@pytest.mark.skipif(
    not ENABLED.exists() or "[never]" in ENABLED.read_text(),
    reason="this kernel gives no transparent huge pages",
)
@pytest.mark.parametrize("numel", [CHUNK_BYTES * 3, CHUNK_BYTES // 8])
def test_pages_are_huge(numel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole ones; small tensors share theirs, and the last may not be full."""
    monkeypatch.setattr(memory, "_chunk", None)  # parts of another test's may be given back
    tensors = [huge_zeros(numel, dtype=torch.uint8).fill_(1) for _ in range(8)]
    for tensor in tensors:
        mapping = mapping_of(tensor.data_ptr())
        assert mapping["Rss"] >= numel
        assert mapping["AnonHugePages"] >= mapping["Rss"] - HUGE_PAGE_BYTES


def test_memory_of_a_part_is_given_back_and_its_neighbours_stay() -> None:
    tensor = huge_zeros(3, CHUNK_BYTES + 100, dtype=torch.uint8)
    tensor.fill_(7)
    before = rollup("Rss")
    given = give_back(tensor[1])
    assert CHUNK_BYTES - 2 * 4096 <= given <= CHUNK_BYTES + 100
    assert before - rollup("Rss") > 0.9 * given
    assert (tensor[0] == 7).all() and (tensor[2] == 7).all()
    tensor[1].fill_(9)
    assert (tensor[1] == 9).all(), "it can be written again"
    assert give_back(tensor[1][:100]) == 0, "less than a page"
