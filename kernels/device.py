"""Which implementation serves a device.

`native`: the C++ kernels of the CPU; `torch`: the same through torch, where there is no compiler;
`triton`: GPUs. Under `TRITON_INTERPRET=1` the device `meta` stands for a GPU that is not there: its
experts and pages live on the CPU and Triton's kernels are interpreted, to check them.

What belongs to GPUs is imported when a GPU is asked for: Triton costs every other process a second
of start and tens of megabytes.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from remora.kernels import native
from remora.kernels.attention import AttentionPlan, KVPages, attend
from remora.kernels.experts import PackedExperts
from remora.kernels.experts_dtype import ExpertsDtype
from remora.kernels.gates import Gate

if TYPE_CHECKING:
    from remora.kernels.gpu_experts import GpuExperts
    from remora.kernels.gpu_pages import GpuKVPages, GpuPlan

Implementation = Literal["native", "torch", "triton"]
CPU = torch.device("cpu")
INTERPRETED_GPU = torch.device("meta")


def implementation_of(device: torch.device) -> Implementation:
    """What computes on `device`.

    Raises:
        ValueError: nothing of ours does.
    """
    if device.type == "cpu":
        return "native" if native.native_available() else "torch"
    from remora.kernels.triton_runtime import INTERPRETED

    if device.type == "cuda" or (INTERPRETED and device == INTERPRETED_GPU):
        return "triton"
    raise ValueError(f"device {device}: Remora computes on cpu and cuda")


def home_of(device: torch.device) -> torch.device:
    """Where tensors of a device live."""
    return CPU if device == INTERPRETED_GPU else device


def plan_on(device: torch.device, plan: AttentionPlan) -> "AttentionPlan | GpuPlan":
    """The plan of a step, as attention on `device` takes it; does not wait for the device."""
    if implementation_of(device) != "triton":
        return plan
    from remora.kernels.gpu_pages import GpuPlan

    return GpuPlan.of(plan, home_of(device))


def attend_on(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pages: "KVPages | GpuKVPages",
    plan: "AttentionPlan | GpuPlan",
    *,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    sinks_H: Tensor | None,
    exact: bool,
) -> Tensor:
    """`attention.attend` where the pages are: [1, T, H, v_dim] in the dtype of `q`."""
    if isinstance(pages, KVPages):
        assert isinstance(plan, AttentionPlan), "a plan of another device"
        return attend(
            q, k, v, pages, plan,
            scale=scale, sliding_window=sliding_window, soft_cap=soft_cap, sinks_H=sinks_H,
            exact=exact,
        )  # fmt: skip
    from remora.kernels.gpu_attention import gpu_attend
    from remora.kernels.gpu_pages import GpuPlan, gpu_write_kv

    assert isinstance(plan, GpuPlan), "a plan of another device"
    q_THd, k_TJd, v_TJd = (x[0].transpose(0, 1).to(pages.dtype) for x in (q, k, v))
    gpu_write_kv(pages, k_TJd, v_TJd, plan)
    out_THd = gpu_attend(
        q_THd, pages, plan,
        scale=scale, sliding_window=sliding_window, soft_cap=soft_cap, sinks_H=sinks_H,
        exact=exact,
    )  # fmt: skip
    return out_THd[None].to(q.dtype)


def make_experts(
    device: torch.device,
    num_slots: int,
    *,
    hidden_size: int,
    intermediate_size: int,
    dtype: torch.dtype,
    gate: Gate | Callable[[Tensor], Tensor],
    has_gate: bool,
    has_bias: bool,
    is_transposed: bool,
    exact: bool,
    post: Callable[[Tensor], Tensor] | None,
    experts_dtype: ExpertsDtype = "auto",
) -> "PackedExperts | GpuExperts":
    """Slots for one layer's experts on `device`; arguments as `GpuExperts` describes them.

    On the CPU gate and `post` stay the caller's business. `PackedExperts` alone quantises.

    Raises:
        ValueError: sizes, dtypes or a device that do not fit.
        RuntimeError: no Triton, or no such GPU.
    """
    if implementation_of(device) != "triton":
        return PackedExperts(
            num_slots,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            dtype=dtype,
            has_gate=has_gate,
            has_bias=has_bias,
            is_transposed=is_transposed,
            exact=exact,
            experts_dtype=experts_dtype,
        )
    if experts_dtype != "auto":
        raise ValueError(f"{experts_dtype} experts are computed on cpu, not on {device}")
    from remora.kernels.gpu_experts import GpuExperts

    return GpuExperts(
        num_slots,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        dtype=dtype,
        device=home_of(device),
        gate=gate,
        has_gate=has_gate,
        has_bias=has_bias,
        is_transposed=is_transposed,
        exact=exact,
        post=post,
    )


def make_pages(
    device: torch.device,
    num_blocks: int,
    num_kv_heads: int,
    k_dim: int,
    v_dim: int,
    dtype: torch.dtype,
) -> "KVPages | GpuKVPages":
    """Zero-filled pages of one layer on `device`.

    Raises:
        ValueError: sizes, dtypes or a device that do not fit.
        RuntimeError: no Triton, or no such GPU.
    """
    if implementation_of(device) != "triton":
        return KVPages.allocate(num_blocks, num_kv_heads, k_dim, v_dim, dtype)
    from remora.kernels.gpu_pages import GpuKVPages

    return GpuKVPages.allocate(num_blocks, num_kv_heads, k_dim, v_dim, dtype, home_of(device))
