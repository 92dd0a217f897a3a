"""What compiled layers find under their engine's number, for attention without Python (CPU).

enter_step(engine_id, pages, step_rules(...), plan, exact=..., cursor=cursor)
cursor.value = 3                                        # layer 3 runs
torch.ops.remora.step_attention(q, k, v, sinks, engine_id)     # what `attend` computes
leave_step(engine_id)
"""

import ctypes
from collections.abc import Iterable, Sequence

import torch

from remora.kernels.attention import AttentionPlan, KVPages, isa_max


def step_rules(layers: Iterable[tuple[float, int | None, float | None]]) -> list[float]:
    """(scale, sliding window, soft cap) of each layer, as `enter_step` takes them."""
    return [float(x or 0) for layer in layers for x in layer]


def enter_step(
    engine_id: int,
    pages: Sequence[KVPages],
    rules: list[float],
    plan: AttentionPlan,
    *,
    exact: bool,
    cursor: ctypes.c_int64,
) -> None:
    """From here on `step_attention` of this engine reads these. From any thread.

    Args:
        pages: one per layer.
        rules: of `step_rules`.
        cursor: index of the layer that runs; stays alive until `leave_step`.
    """
    torch.ops.remora.step_enter(
        engine_id,
        [page.k_NJWBE for page in pages],
        [page.v_NJPDE for page in pages],
        rules,
        plan.packed,
        isa_max(exact=exact),
        ctypes.addressof(cursor),
    )


def leave_step(engine_id: int) -> None:
    """The engine is in no step any more; nothing where it was in none."""
    torch.ops.remora.step_leave(engine_id)
