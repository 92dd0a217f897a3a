"""The dense side of a model: everything but the routed experts, out of `transformers`' classes.

Experts answer through the `remora` experts interface and attention goes to the pages, so the
model's own `forward` runs a step over flattened rows of many sequences. How a model is brought to
that is in `dense_surgery.py`. Legend: T token rows of a step (padding included), R rows that logits
are wanted for, D model width, V vocabulary.
"""

import contextlib
import copy
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from remora.actors import (
    attention_op,
    dense_surgery,
    row_linear_patch,
    tp_surgery,
)
from remora.actors.dense_surgery import CursorLayer
from remora.actors.draft import Draft, current_draft, structure
from remora.actors.layer_program import Recording
from remora.actors.merge_linears import MergeLinears
from remora.actors.model_spec import ModelSpec
from remora.actors.shuffle_surgery import slice_layers
from remora.actors.step_context import StepContext, steps
from remora.actors.step_program import Split, StepProgram, split
from remora.actors.tp_shuffle import Sliced
from remora.actors.tp_surgery import Part
from remora.actors.weights import Progress
from remora.comm.collectives import DryGroup, Group
from remora.kernels.device import CPU, home_of

INDUCTOR_OPTIONS: dict[str, Any] = {
    "post_grad_custom_pre_pass": MergeLinears(),
    # What the compiler generates here are elementwise loops of microseconds; a team of threads
    # costs more than it gains (each loop wakes one: B=1 decode of benchmarks' *tiny* 10.3 ms a
    # step, 6.9 with one thread), and code made for one thread is the same whatever process fills
    # the cache.
    "cpp.threads": 1,
    # The calls between those loops in C++ too (dense part of *tiny*, B=1: 2.14 -> 1.87 ms a step);
    # what the asserts check cannot change between steps (2.6 -> 2.14 ms).
    "cpp_wrapper": True,
    "size_asserts": False,
    "alignment_asserts": False,
}


class DenseModel:
    """A loaded dense side. One step at a time, from one thread.

    Attributes:
        model: the `transformers` model after surgery.
        layers: its decoder layers, in order.
        engine_id: its number in the step registry.
        part: which part of the model this is, where it is not the whole.
        device: where it computes (`kernels.device`); tensors of a step come and go on the CPU.
        sliced: layers that divide their rows among the ranks before their gate.
        pinned: longest sequence that rotary embeddings were pinned to; None: they look at none.
    """

    def __init__(
        self,
        model: Any,
        spec: ModelSpec,
        dtype: torch.dtype,
        layers: list[CursorLayer],
        part: Part | None = None,
        device: torch.device = CPU,
        sliced: Sliced | None = None,
        pinned: int | None = None,
    ) -> None:
        self.model = model
        self.device = device
        self._home = home_of(device)
        self.part = part
        self.sliced = sliced or Sliced()
        self.pinned = pinned
        self.spec = spec
        self.dtype = dtype
        self.layers = layers
        self.engine_id = layers[0].engine_id
        self._cache = attention_op.PassThroughCache()
        self._base = getattr(model, model.base_model_prefix)
        self._head = _head_of(model)
        self._program: StepProgram | None = None
        weakref.finalize(self, steps.forget, self.engine_id)

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters and buffers, shared ones once."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return sum({t.data_ptr(): t.nbytes for t in tensors}.values())

    @property
    def num_ranks(self) -> int:
        """Ranks that the model is divided over."""
        return 1 if self.part is None else self.part.group.size

    @property
    def num_slices(self) -> int:
        """Equal slices that the rows of a step are divided into."""
        return self.num_ranks if self.sliced.layers else 1

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Meanwhile nothing is exchanged with other ranks: steps that count for nothing."""
        if self.part is None or isinstance(self.part.group, DryGroup):
            yield
            return
        self.part.group.set_dry(True)
        try:
            yield
        finally:
            self.part.group.set_dry(False)

    def hidden(self, token_ids_T: Tensor, positions_T: Tensor) -> Tensor:
        """One pass over the rows of the step that `steps` is in (`steps.enter` comes first).

        Args:
            token_ids_T: int64; padding rows hold any valid id.
            positions_T: int64, `plan.positions_T`.

        Returns:
            [T, D] in the served dtype, after the last norm.
        """
        with torch.inference_mode():
            if self._program is None:
                return self._forward(token_ids_T, positions_T)
            cursor = steps.current(self.engine_id).cursor
            return self._program.run(token_ids_T, positions_T, cursor)

    def _forward(self, token_ids_T: Tensor, positions_T: Tensor) -> Tensor:
        """The model's own forward."""
        output = self._base(
            input_ids=token_ids_T[None],
            position_ids=positions_T[None],
            past_key_values=self._cache,
            use_cache=True,
        )
        hidden_TD: Tensor = output.last_hidden_state[0]
        return hidden_TD

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """The model's own head over rows of `hidden`: scaling and soft caps included.

        Returns:
            [R, V]; nothing of use on ranks of a group other than the first.
        """
        with torch.inference_mode():
            if self._program is None or len(hidden_RD) == 0:
                logits_RV = self._own_logits(hidden_RD)
            else:
                logits_RV = self._program.logits(hidden_RD)
        return logits_RV if self.part is None else self.part.whole_logits(logits_RV)

    def _own_logits(self, hidden_RD: Tensor) -> Tensor:
        """The model's own head."""
        logits_RV: Tensor = self._head(inputs_embeds=hidden_RD[None]).logits[0]
        return logits_RV

    def run(self, context: StepContext, token_ids_T: Tensor, logit_rows_R: Tensor) -> Tensor:
        """`hidden` and `logits` in one step, of the rows `logit_rows_R` (int64).

        Returns:
            float32 [R, V] on the model's device, where it may yet be computed (`settle`).
        """
        steps.enter(self.engine_id, context)
        try:
            ids_T, positions_T, rows_R = (
                x.to(self._home, non_blocking=True)
                for x in (token_ids_T, context.plan.positions_T, logit_rows_R)
            )
            hidden_TD = self.hidden(ids_T, positions_T)
            logits_RV = self.logits(hidden_TD[rows_R]).float()
            if self.part is not None:
                self.part.group.settle()
            return logits_RV
        except Exception:
            if context.failure is not None:
                raise context.failure from None
            raise
        finally:
            steps.leave(self.engine_id)

    def compile(self, **options: Any) -> None:
        """Run layers through `torch.compile`, one compilation for all layers of one kind.

        Nothing is compiled before the first step; `use_eager` goes back. `options` go to
        `torch.compile`; `dynamic=True, fullgraph=True` are set.
        """
        kinds = {type(layer.layer) for layer in self.layers}
        options.setdefault("options", INDUCTOR_OPTIONS)
        compiled = {
            kind: torch.compile(kind.forward, dynamic=True, fullgraph=True, **options)
            for kind in kinds
        }
        for layer in self.layers:
            layer.compiled = compiled[type(layer.layer)]
            layer.recording = Recording(layer.layer)

    def drop_guards(self) -> Split | None:
        """Call compiled layers directly from here on, after warm-up steps of several sizes.

        Returns:
            The model's forward without its layers, to be warmed up for `use_program`; None where a
            layer keeps its guards (its warm-up steps did not agree), or where the model does
            something between its layers.
        """
        programs = []
        for layer in self.layers:
            assert layer.recording is not None, "drop_guards comes after compile, once"
            layer.program = layer.recording.program()
            layer.recording = None
            if layer.program is not None:
                programs.append(layer.program)
        if len(programs) < len(self.layers):
            return None
        return split(self._forward, self._own_logits, self.layers, programs, INDUCTOR_OPTIONS)

    def use_program(self, program: StepProgram | None) -> None:
        """Run steps by `program`; None: by the model's own forward."""
        self._program = program

    @property
    def has_program(self) -> bool:
        """Whether steps run without the model's own forward."""
        return self._program is not None

    def use_eager(self) -> None:
        """Run layers as they are."""
        self._program = None
        for layer in self.layers:
            layer.compiled = layer.recording = layer.program = None


class _Given(nn.Module):
    """Stands where the base model stands in the head: what is given comes out."""

    def forward(self, inputs_embeds: Tensor, **_: Any) -> Any:
        """Hidden states [1, R, D] as if the base model had made them."""
        from transformers.modeling_outputs import MoeModelOutputWithPast

        return MoeModelOutputWithPast(last_hidden_state=inputs_embeds)


def _head_of(model: Any) -> Any:
    """`model` without its base model: its own `forward` from hidden states to logits."""
    head = copy.copy(model)
    head._modules = dict(model._modules)
    head._modules[model.base_model_prefix] = _Given()
    return head


def build_dense(
    path: str | Path,
    spec: ModelSpec,
    *,
    dtype: torch.dtype,
    exact: bool,
    max_positions: int | None = None,
    progress: Progress | None = None,
    group: Group | None = None,
    device: torch.device = CPU,
    slice_rows: bool = False,
    draft: Draft | None = None,
) -> DenseModel:
    """Load the dense side of a checkpoint.

    Args:
        path: checkpoint directory.
        spec: of `inspect_model(path)`.
        dtype: served dtype, float32 or bfloat16.
        exact: without C++ kernels, work on fixed row tiles.
        max_positions: longest sequence that will be served; it decides once and for all what
            rotary embeddings that depend on the sequence length do. None: `spec.max_positions`.
        progress: called with (bytes done, bytes in all).
        group: load this rank's part only; every rank of the group does the same.
        device: where it computes; a GPU has torch's linears and Triton's attention.
        slice_rows: layers of the usual shape divide their rows among the ranks before their gate
            (`shuffle_surgery`).
        draft: made in advance, and used up; it is made again where it is none of this call.

    Raises:
        WeightsError: naming file and tensor.
        ConfigError: a group whose size does not divide the heads.
    """
    _register(exact=exact)
    draft = current_draft(draft, path, spec, dtype)
    model, sites, plan = draft.model, draft.sites, draft.plan
    owned = dense_surgery.owned_names(model, [site.name for site in sites])
    with draft.checkpoint:
        plan.check_complete(owned)
        part = None
        if group is not None:
            part, spec = tp_surgery.take_part(model, spec, group)
            plan.cuts = part.plan.cuts
        dense_surgery.drop_experts(sites)
        packer = dense_surgery.Packer(model, spec.linears, exact=exact, device=device)
        dense_surgery.fill(model, plan, owned, packer, progress, device)
    if home_of(device) != CPU:
        model.to(home_of(device))  # what no checkpoint holds: tables of rotary embeddings
    return _finish(model, spec, dtype, max_positions, part, device, slice_rows)


def build_hollow(
    spec: ModelSpec,
    *,
    dtype: torch.dtype,
    exact: bool,
    group: Group | None = None,
    slice_rows: bool = False,
    max_positions: int | None = None,
) -> DenseModel:
    """The dense side with zeros for weights, which cost no memory until they are touched.

    For a compiler, which must see everything but the values.
    """
    _register(exact=exact)
    model, sites = structure(spec, dtype)
    part = None
    if group is not None:
        part, spec = tp_surgery.take_part(model, spec, group)
    dense_surgery.drop_experts(sites)
    packer = dense_surgery.Packer(model, spec.linears, exact=exact, hollow=True)
    owned = model.state_dict()
    for name, meta in owned.items():
        if meta.is_meta:
            dense_surgery.assign(model, name, torch.zeros(meta.shape, dtype=meta.dtype))
    for name in owned:
        packer.filled(name)
    return _finish(model, spec, dtype, max_positions, part, slice_rows=slice_rows)


def _register(*, exact: bool) -> None:
    """What `transformers` calls of ours, before a model is made."""
    attention_op.register_interfaces()
    row_linear_patch.install(exact=exact)


def _finish(
    model: Any,
    spec: ModelSpec,
    dtype: torch.dtype,
    max_positions: int | None,
    part: Part | None,
    device: torch.device = CPU,
    slice_rows: bool = False,
) -> DenseModel:
    if part is not None:
        tp_surgery.join(model, part)
    engine_id = steps.new_engine_id(spec.attention)
    dense_surgery.point_config(model, engine_id)
    last = max_positions or spec.max_positions
    pinned = last if dense_surgery.pin_rotary(model, last) else None
    layers = dense_surgery.wrap_layers(model, engine_id)
    sliced = None
    if part is not None and slice_rows:
        sliced = slice_layers(layers, part, engine_id)
    return DenseModel(model, spec, dtype, layers, part, device, sliced, pinned)
