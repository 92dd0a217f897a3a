"""What compiled layers find under their engine's number, for attention without Python (CPU).

layers = step_layers(pages, [(scale, sliding window, soft cap), ...])     # once for an engine
enter_step(engine_id, layers, plan, exact=..., cursor=cursor)
cursor.value = 3                                        # layer 3 runs
torch.ops.remora.step_attention(q, k, v, sinks, engine_id)     # what `attend` computes
leave_step(engine_id)
"""

import ctypes
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from remora.kernels.attention import AttentionPlan, KVPages, isa_max


def step_layers(
    pages: Sequence[KVPages], rules: Iterable[tuple[float, int | None, float | None]]
) -> Any:
    """What `enter_step` takes for an engine whose layers stay the same; holds the pages.

    Args:
        pages: one per layer.
        rules: (scale, sliding window, soft cap) of each layer.
    """
    return torch.classes.remora.StepLayers(
        [page.k_NJWBE for page in pages],
        [page.v_NJPDE for page in pages],
        [float(x or 0) for layer in rules for x in layer],
    )


def enter_step(
    engine_id: int, layers: Any, plan: AttentionPlan, *, exact: bool, cursor: ctypes.c_int64
) -> None:
    """From here on `step_attention` of this engine reads these. From any thread.

    Args:
        layers: of `step_layers`.
        cursor: index of the layer that runs; stays alive until `leave_step`.
    """
    address = ctypes.addressof(cursor)
    torch.ops.remora.step_enter(engine_id, layers, plan.packed, isa_max(exact=exact), address)


def leave_step(engine_id: int) -> None:
    """The engine is in no step any more; nothing where it was in none."""
    torch.ops.remora.step_leave(engine_id)
