"""Pages of keys and values on a GPU, the plan of a step there, and the writing of pages.

The counterpart of the first half of `remora.kernels.attention`: the same plan, made on the host by
`build_plan` and copied over once a step. Nothing here waits for the device.

Shapes: T token rows of a step (padding included), S sequences, M blocks of the longest table, B
tiles, J key/value heads, N blocks of the pool, d width.
"""

from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
from torch import Tensor

from remora.kernels.attention import BLOCK_SIZE, AttentionPlan
from remora.kernels.page_pair import PagePair, check_pages
from remora.kernels.triton_runtime import check_device, jit, power_of_two, tl

DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)
SHORT_MAX: Final = 4  # new tokens up to which a sequence's context is split over programs


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GpuKVPages(PagePair):
    """Keys and values of one layer on a device, plain: a block of a head is 16 rows."""

    k_NJBd: Tensor  # [N, J, 16, k_dim], contiguous
    v_NJBd: Tensor  # [N, J, 16, v_dim], contiguous

    @classmethod
    def allocate(
        cls,
        num_blocks: int,
        num_kv_heads: int,
        k_dim: int,
        v_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "GpuKVPages":
        """Zero-filled pages for `num_blocks * 16` tokens.

        Raises:
            ValueError: a size below one, or a dtype other than bfloat16, float16 and float32.
            RuntimeError: no Triton, or no such GPU.
        """
        check_pages(num_blocks, num_kv_heads, k_dim, v_dim, dtype, DTYPES)
        check_device(device)
        shape = (num_blocks, num_kv_heads, BLOCK_SIZE)
        return cls(
            k_NJBd=torch.zeros((*shape, k_dim), dtype=dtype, device=device),
            v_NJBd=torch.zeros((*shape, v_dim), dtype=dtype, device=device),
        )

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """See `PagePair`."""
        return self.k_NJBd, self.v_NJBd

    @property
    def k_dim(self) -> int:
        return self.k_NJBd.shape[3]

    @property
    def v_dim(self) -> int:
        return self.v_NJBd.shape[3]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tiles:
    """Query tiles of some sequences of a step: which tokens each program takes."""

    seq_B: Tensor  # int32 on the device: index into S
    first_B: Tensor  # int32 on the device: absolute position of the tile's first token
    num_keys: int  # of the longest context among them


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GpuPlan:
    """`AttentionPlan` on a device; built once a step, read by every layer."""

    host: AttentionPlan
    device: torch.device
    query_start_S1: Tensor  # int32 [S + 1]
    start_S: Tensor  # int32 [S]
    block_table_SM: Tensor  # int32 [S, M]
    slot_mapping_T: Tensor  # int64 [T]
    # Tiles by (tokens of a tile, whether of short sequences): layers differ in heads a group.
    tiles: dict[tuple[int, bool], Tiles | None] = field(default_factory=dict)

    @classmethod
    def of(cls, plan: AttentionPlan, device: torch.device) -> "GpuPlan":
        """Copies what the kernels read, without waiting."""

        def over(tensor: Tensor) -> Tensor:
            pinned = tensor.pin_memory() if device.type == "cuda" else tensor
            return pinned.to(device, non_blocking=True)

        return cls(
            host=plan,
            device=device,
            query_start_S1=over(plan.query_start_S1),
            start_S=over(plan.start_S),
            block_table_SM=over(plan.block_table_SM),
            slot_mapping_T=over(plan.slot_mapping_T),
        )

    def tiles_of(self, tokens: int, *, short: bool) -> Tiles | None:
        """Tiles of `tokens` absolute positions over the short or the long sequences, if any."""
        key = (tokens, short)
        if key not in self.tiles:
            self.tiles[key] = self._cut(tokens, short=short)
        return self.tiles[key]

    def check(self, pages: GpuKVPages) -> None:
        """Raises ValueError where the plan names a block that the pages do not have."""
        if self.host.block_id_max >= pages.num_blocks:
            raise ValueError(f"block {self.host.block_id_max} of {pages.num_blocks}")

    def _cut(self, tokens: int, *, short: bool) -> Tiles | None:
        start_S = self.host.start_S.numpy().astype(np.int64)
        query_start_S1 = self.host.query_start_S1.numpy().astype(np.int64)
        length_S = query_start_S1[1:] - query_start_S1[:-1]
        chosen = np.flatnonzero((length_S <= SHORT_MAX) == short)
        if not chosen.size:
            return None
        end = start_S[chosen] + length_S[chosen]
        first = start_S[chosen] // tokens
        counts = -(-end // tokens) - first
        index = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        first_B = ((np.repeat(first, counts) + index) * tokens).astype(np.int32)
        seq_B = np.repeat(chosen, counts).astype(np.int32)
        both = torch.from_numpy(np.stack([seq_B, first_B]))
        if self.device.type == "cuda":
            both = both.pin_memory()
        both = both.to(self.device, non_blocking=True)
        return Tiles(seq_B=both[0], first_B=both[1], num_keys=int(end.max()))


@jit
def _write_kernel(  # type: ignore[no-untyped-def]
    k_ptr,
    v_ptr,
    k_page_ptr,
    v_page_ptr,
    slot_ptr,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    num_kv_heads,
    PAGE: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    K_WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
):
    """Key and value of one row and head to their slot; slot -1: nowhere."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    slot = tl.load(slot_ptr + row).to(tl.int64)
    if slot < 0:
        return
    place = ((slot // PAGE) * num_kv_heads + head) * PAGE + slot % PAGE
    i = tl.arange(0, K_WIDTH)
    k = tl.load(k_ptr + row * k_row_stride + head * k_head_stride + i, mask=i < K_DIM)
    tl.store(k_page_ptr + place * K_DIM + i, k, mask=i < K_DIM)
    i = tl.arange(0, V_WIDTH)
    v = tl.load(v_ptr + row * v_row_stride + head * v_head_stride + i, mask=i < V_DIM)
    tl.store(v_page_ptr + place * V_DIM + i, v, mask=i < V_DIM)


def gpu_write_kv(pages: GpuKVPages, k_TJd: Tensor, v_TJd: Tensor, plan: GpuPlan) -> None:
    """Stores each row's key [J, k_dim] and value [J, v_dim] at its slot; padding rows: nothing.

    Keys and values have the pages' dtype; their last dimension is contiguous, the others may be
    strided. Raises ValueError for shapes, dtypes or blocks that do not fit.
    """
    num_rows = plan.host.num_rows
    k_shape = (num_rows, pages.num_kv_heads, pages.k_dim)
    v_shape = (num_rows, pages.num_kv_heads, pages.v_dim)
    if tuple(k_TJd.shape) != k_shape or tuple(v_TJd.shape) != v_shape:
        raise ValueError(
            f"keys {tuple(k_TJd.shape)} and values {tuple(v_TJd.shape)}: "
            f"the pages take {k_shape} and {v_shape}"
        )
    if k_TJd.dtype != pages.dtype or v_TJd.dtype != pages.dtype:
        raise ValueError(f"keys {k_TJd.dtype}, values {v_TJd.dtype}: the pages hold {pages.dtype}")
    plan.check(pages)
    if num_rows == 0:
        return
    k_TJd, v_TJd = dense_rows(k_TJd), dense_rows(v_TJd)
    _write_kernel[(num_rows, pages.num_kv_heads)](
        k_TJd,
        v_TJd,
        pages.k_NJBd,
        pages.v_NJBd,
        plan.slot_mapping_T,
        k_TJd.stride(0),
        k_TJd.stride(1),
        v_TJd.stride(0),
        v_TJd.stride(1),
        pages.num_kv_heads,
        PAGE=BLOCK_SIZE,
        K_DIM=pages.k_dim,
        V_DIM=pages.v_dim,
        K_WIDTH=power_of_two(pages.k_dim),
        V_WIDTH=power_of_two(pages.v_dim),
        num_warps=1,
    )


def dense_rows(x_THd: Tensor) -> Tensor:
    """`x_THd` with a contiguous last dimension: itself, or a copy."""
    return x_THd if x_THd.stride(2) == 1 else x_THd.contiguous()
