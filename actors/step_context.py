"""What the opaque ops of one step read: a context per engine, looked up by its number.

Compiled layers must not take KV pages or placements as arguments (one compilation serves every
layer and every step), so `remora_rt::attention` and `remora_rt::experts` receive only the
engine's number and find the rest here. The layer cursor is moved by the wrapper of each decoder
layer, outside compiled code. Legend: T token rows of the step (padding included), D model width,
K top-k.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from remora.actors.model_probe import AttentionSpec
from remora.actors.tp_shuffle import TokenShuffle
from remora.kernels.attention import AttentionPlan, KVPages
from remora.kernels.device import CPU, plan_on
from remora.kernels.native import native_available
from remora.kernels.step import RoutingNotes, enter_step, leave_step, step_layers

if TYPE_CHECKING:
    from remora.kernels.gpu_pages import GpuKVPages, GpuPlan

# (layer, hidden_TD, top_k_index_TK int64, top_k_weights_TK, num_tokens) -> [T, D], rows beyond
# num_tokens are padding: they are not routed, and come back as zeros.
ExpertsFn = Callable[[int, Tensor, Tensor, Tensor, int], Tensor]


@dataclass(slots=True, kw_only=True)
class StepContext:
    """One step of one engine. Built by the runner, read by the ops."""

    plan: AttentionPlan  # kernels.attention.build_plan: num_tokens, positions_T, slots, tables
    pages: Sequence["KVPages | GpuKVPages"]  # one per decoder layer
    experts: ExpertsFn
    # Of `Dispatcher.step_experts`: answers compiled layers in the place of `experts`; 0: nobody.
    direct: int = 0
    notes: RoutingNotes | None = None  # of what it answers
    shuffle: TokenShuffle | None = None  # whose rows are whose, in a tensor-parallel group
    exact: bool = True  # numerics
    device: torch.device = CPU  # where the model computes (`kernels.device`)
    failure: Exception | None = None  # of `experts`: compiled code forgets what was raised below it
    cursor: ctypes.c_int64 = field(default_factory=lambda: ctypes.c_int64(-1))  # see `layer`
    device_plan: "AttentionPlan | GpuPlan" = field(init=False)  # the same for attention there

    def __post_init__(self) -> None:
        self.device_plan = plan_on(self.device, self.plan)

    @property
    def layer(self) -> int:
        """Decoder layer that runs now; lies where compiled kernels read it."""
        return self.cursor.value

    @layer.setter
    def layer(self, index: int) -> None:
        self.cursor.value = index


class StepRegistry:
    """Contexts by engine number. One per process; an engine takes a number for its life."""

    def __init__(self) -> None:
        self._contexts: dict[int, StepContext] = {}
        self._attention: dict[int, tuple[AttentionSpec, ...]] = {}
        # (pages of the last step, what compiled kernels read of them and of the layers)
        self._layers: dict[int, tuple[Sequence[KVPages | GpuKVPages], Any]] = {}

    def new_engine_id(self, attention: tuple[AttentionSpec, ...]) -> int:
        """A number never given before in this process, for a model with these layers."""
        engine_id = len(self._attention) + 1
        self._attention[engine_id] = attention
        return engine_id

    def forget(self, engine_id: int) -> None:
        """The engine is gone: nothing holds its pages any more."""
        self._layers.pop(engine_id, None)

    def attention_of(self, engine_id: int) -> tuple[AttentionSpec, ...]:
        """Attention of each decoder layer of an engine's model."""
        return self._attention[engine_id]

    def enter(self, engine_id: int, context: StepContext) -> None:
        """Make `context` the one that the ops of `engine_id` see, until `leave`."""
        assert engine_id not in self._contexts, f"engine {engine_id} is already in a step"
        self._contexts[engine_id] = context
        if native_available():
            layers = self._layers_of(engine_id, context.pages)
            if layers is not None:
                enter_step(
                    engine_id, layers, context.plan, exact=context.exact, cursor=context.cursor,
                    experts=context.direct, notes=context.notes,
                )  # fmt: skip

    def _layers_of(self, engine_id: int, pages: "Sequence[KVPages | GpuKVPages]") -> Any:
        """Of `step_layers`; None where the model computes elsewhere."""
        known = self._layers.get(engine_id)
        if known is None or known[0] is not pages:
            listed = [page for page in pages if isinstance(page, KVPages)]  # all of them, or none
            rules = [(x.scale, x.sliding_window, x.soft_cap) for x in self._attention[engine_id]]
            known = self._layers[engine_id] = pages, step_layers(listed, rules) if listed else None
        return known[1]

    def leave(self, engine_id: int) -> None:
        """The step is over."""
        del self._contexts[engine_id]
        if native_available():
            leave_step(engine_id)

    def current(self, engine_id: int) -> StepContext:
        """The context of the running step.

        Raises:
            AssertionError: the engine is in no step.
        """
        context = self._contexts.get(engine_id)
        assert context is not None, f"engine {engine_id} is in no step, only {list(self._contexts)}"
        return context


steps = StepRegistry()
