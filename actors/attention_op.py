"""The two opaque ops of the compiled hot path, and the `transformers` interfaces that call them.

Attention and experts take tensors and the engine's number; everything else (KV pages, the plan of
the step, where experts live) comes from the step's context, so one compilation serves every layer
of one kind. They are `remora::step_attention` and `remora::step_experts`, C++ that asks no Python
(experts: while nothing is unusual), or where the kernels are not built `remora_rt::attention` and
`remora_rt::experts`. In eager mode the ops are skipped and their bodies called at
once. Legend: T token rows of the step, H query heads, J key/value heads, D model width,
K top-k.
"""

from typing import Any

import torch
from torch import Tensor, nn

from remora.actors.step_context import steps
from remora.kernels.device import attend_on
from remora.kernels.native import native_available

IMPLEMENTATION = "remora"  # config._attn_implementation and config._experts_implementation
ENGINE_ATTRIBUTE = "remora_engine_id"  # on the model's own copy of the config

_library = torch.library.Library("remora_rt", "DEF")


class PassThroughCache:
    """Stands where the KV cache stands. Keys and values reach attention as given: pages are there.

    `transformers` asks a cache for lengths only to build masks and positions, which we do not use.
    """

    is_compileable = False

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """What came in goes to attention, which writes it into the pages."""
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions are always given explicitly."""
        return 0


def attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, engine_id: int) -> Tensor:
    """Write the step's keys and values into the pages, then attend over them.

    Args:
        q: [1, H, T, k_dim]; k: [1, J, T, k_dim]; v: [1, J, T, v_dim]; any strides.
        sinks: [H] or None.
        engine_id: whose step this is.

    Returns:
        [1, T, H, v_dim] in the dtype of `q`; padding rows are zeros.
    """
    context = steps.current(engine_id)
    spec = steps.attention_of(engine_id)[context.layer]
    return attend_on(
        q,
        k,
        v,
        context.pages[context.layer],
        context.device_plan,
        scale=spec.scale,
        sliding_window=spec.sliding_window,
        soft_cap=spec.soft_cap,
        sinks_H=sinks,
        exact=context.exact,
    )


def experts(hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor, engine_id: int) -> Tensor:
    """Routed experts of the layer that runs: [T, D] in the dtype of `hidden_TD`.

    What is raised is kept in the step's context: through compiled code only its text would pass.
    """
    context = steps.current(engine_id)
    if index_TK.dtype is not torch.int64:
        index_TK = index_TK.to(torch.int64)
    try:
        return context.experts(
            context.layer,
            hidden_TD.contiguous(),
            index_TK.contiguous(),
            weights_TK.contiguous(),
            context.plan.num_tokens,
        )
    except Exception as failure:
        context.failure = failure
        raise


def _fake_attention(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, engine_id: int
) -> Tensor:
    return q.new_empty((1, q.shape[2], q.shape[1], v.shape[3]))


def _fake_experts(
    hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor, engine_id: int
) -> Tensor:
    return hidden_TD.new_empty(hidden_TD.shape)


_library.define("attention(Tensor q, Tensor k, Tensor v, Tensor? sinks, int engine_id) -> Tensor")
_library.define("experts(Tensor hidden, Tensor index, Tensor weights, int engine_id) -> Tensor")
_library.impl("attention", attention, "CompositeExplicitAutograd")
_library.impl("experts", experts, "CompositeExplicitAutograd")
torch.library.register_fake("remora_rt::attention", _fake_attention, lib=_library)
torch.library.register_fake("remora_rt::experts", _fake_experts, lib=_library)
if native_available():
    torch.library.register_fake("remora::step_attention", _fake_attention)
    torch.library.register_fake("remora::step_experts", _fake_experts)


_COMPILED_ATTENTION: Any = (
    torch.ops.remora.step_attention if native_available() else torch.ops.remora_rt.attention
)
_COMPILED_EXPERTS: Any = (
    torch.ops.remora.step_experts if native_available() else torch.ops.remora_rt.experts
)


def attention_interface(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """`transformers`' attention interface. Scale, window and soft cap are those the probe saw."""
    engine_id = getattr(module.config, ENGINE_ATTRIBUTE)
    if torch.compiler.is_compiling():
        return _COMPILED_ATTENTION(query, key, value, s_aux, engine_id), None
    return attention(query, key, value, s_aux, engine_id), None


def experts_interface(
    module: nn.Module, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """`transformers`' experts interface."""
    engine_id: int = getattr(module.config, ENGINE_ATTRIBUTE)
    if torch.compiler.is_compiling():
        out: Tensor = _COMPILED_EXPERTS(hidden_TD, index_TK, weights_TK, engine_id)
        return out
    return experts(hidden_TD, index_TK, weights_TK, engine_id)


def register_interfaces() -> None:
    """Make `transformers` know the implementation "remora"; idempotent.

    No mask function is registered under that name: `transformers` then builds no masks at all.
    """
    from transformers import AttentionInterface
    from transformers.integrations.moe import ExpertsInterface

    AttentionInterface.register(IMPLEMENTATION, attention_interface)
    ExpertsInterface.register(IMPLEMENTATION, experts_interface)
