"""What compiled layers find under their engine's number, without Python: attention, experts (CPU).

layers = step_layers(pages, [(scale, sliding window, soft cap), ...])     # once for an engine
enter_step(engine_id, layers, plan, exact=..., cursor=cursor, experts=address, notes=notes)
cursor.value = 3                                        # layer 3 runs
torch.ops.remora.step_attention(q, k, v, sinks, engine_id)     # what `attend` computes
torch.ops.remora.step_experts(rows, index, weights, engine_id)     # [T, D], of who is at `address`
leave_step(engine_id)
"""

import ctypes
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from remora.kernels.attention import AttentionPlan, KVPages, isa_max


class RoutingNotes(ctypes.Structure):
    """`RemoraRoutingNotes` of csrc/step_experts.h: where `step_experts` copies what it is asked."""

    base: int
    pitch: int
    num_bytes: int
    index: int
    num_layers: int
    layers_seen: int
    _fields_ = (
        ("base", ctypes.c_int64),
        ("pitch", ctypes.c_int64),
        ("num_bytes", ctypes.c_int64),
        ("index", ctypes.c_void_p),
        ("num_layers", ctypes.c_int64),
        ("layers_seen", ctypes.c_int64),
    )


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
    engine_id: int,
    layers: Any,
    plan: AttentionPlan,
    *,
    exact: bool,
    cursor: ctypes.c_int64,
    experts: int = 0,
    notes: RoutingNotes | None = None,
) -> None:
    """From here on `step_attention` and `step_experts` of this engine read these. From any thread.

    Args:
        layers: of `step_layers`.
        cursor: index of the layer that runs; stays alive until `leave_step`.
        experts: address of the `RemoraStepExperts` that answers rows of experts; 0, or a layer that
            it does not take: `remora_rt::experts` is asked, then and for the rest of the step.
        notes: where its answers' routing is noted; stays alive until `leave_step`.
    """
    torch.ops.remora.step_enter(
        engine_id, layers, plan.packed, isa_max(exact=exact), ctypes.addressof(cursor),
        plan.num_tokens, experts, ctypes.addressof(notes) if notes is not None else 0,
    )  # fmt: skip


def leave_step(engine_id: int) -> None:
    """The engine is in no step any more; nothing where it was in none."""
    torch.ops.remora.step_leave(engine_id)
