"""The dense side of a model: everything but the routed experts, out of `transformers`' own classes.

The model is built on the meta device and filled layer by layer; `nn.Linear` weights are packed for
the kernels as they arrive, so the peak is what the process owns and one layer. Experts modules lose
their parameters and answer through the `remora` experts interface, attention goes to the pages.
Legend: T token rows of a step (padding included), R rows that logits are wanted for, V vocabulary.
"""

import ast
import copy
import functools
import inspect
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from remora.actors import attention_op, model_build, model_probe, row_linear_patch
from remora.actors.checkpoint_files import Checkpoint
from remora.actors.model_spec import ModelSpec
from remora.actors.step_context import StepContext, steps
from remora.actors.weights import Progress, WeightPlan
from remora.comm.errors import WeightsError
from remora.kernels.linear import DTYPES, PackedLinear


class CursorLayer(nn.Module):
    """A decoder layer that first moves the step's layer cursor, outside whatever is compiled.

    `call` is what runs: the layer itself, or a compiled form of it that all layers of one kind
    share (`DenseModel.compile`).
    """

    def __init__(self, layer: nn.Module, index: int, engine_id: int) -> None:
        super().__init__()
        self.layer = layer
        self.index = index
        self.engine_id = engine_id
        self.call: Callable[..., Any] = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the layer's own."""
        steps.current(self.engine_id).layer = self.index
        return self.call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Models read attributes of their layers (`attention_type`): pass them on."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)


class DenseModel:
    """A loaded dense side. One step at a time, from one thread.

    Attributes:
        model: the `transformers` model after surgery.
        layers: its decoder layers, in order.
        engine_id: its number in the step registry.
    """

    def __init__(
        self, model: Any, spec: ModelSpec, dtype: torch.dtype, layers: list[CursorLayer]
    ) -> None:
        self.model = model
        self.spec = spec
        self.dtype = dtype
        self.layers = layers
        self.engine_id = layers[0].engine_id
        self._cache = attention_op.PassThroughCache()
        self._base = getattr(model, model.base_model_prefix)
        self._head = _head_of(model)

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters and buffers, shared ones once."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return sum({t.data_ptr(): t.nbytes for t in tensors}.values())

    def hidden(self, token_ids_T: Tensor, positions_T: Tensor) -> Tensor:
        """One pass over the rows of the step that `steps` is in (`steps.enter` comes first).

        Args:
            token_ids_T: int64; padding rows hold any valid id.
            positions_T: int64, `plan.positions_T`.

        Returns:
            [T, D] in the served dtype, after the last norm.
        """
        with torch.no_grad():
            output = self._base(
                input_ids=token_ids_T[None],
                position_ids=positions_T[None],
                past_key_values=self._cache,
                use_cache=True,
            )
        hidden_TD: Tensor = output.last_hidden_state[0]
        return hidden_TD

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """The model's own head over rows of `hidden`: scaling and soft caps included. [R, V]"""
        with torch.no_grad():
            logits_RV: Tensor = self._head(inputs_embeds=hidden_RD[None]).logits[0]
        return logits_RV

    def run(self, context: StepContext, token_ids_T: Tensor, logit_rows_R: Tensor) -> Tensor:
        """`hidden` and `logits` in one step: float32 [R, V] of the rows `logit_rows_R` (int64)."""
        steps.enter(self.engine_id, context)
        try:
            hidden_TD = self.hidden(token_ids_T, context.plan.positions_T)
            return self.logits(hidden_TD[logit_rows_R]).float()
        finally:
            steps.leave(self.engine_id)

    def compile(self, **options: Any) -> None:
        """Run layers through `torch.compile`, one compilation for all layers of one kind.

        Nothing is compiled before the first step; `use_eager` goes back. `options` go to
        `torch.compile`; `dynamic=True, fullgraph=True` are set.
        """
        kinds = {type(layer.layer) for layer in self.layers}
        compiled = {
            kind: torch.compile(kind.forward, dynamic=True, fullgraph=True, **options)
            for kind in kinds
        }
        for layer in self.layers:
            layer.call = functools.partial(compiled[type(layer.layer)], layer.layer)

    def use_eager(self) -> None:
        """Run layers as they are."""
        for layer in self.layers:
            layer.call = layer.layer


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

    Raises:
        WeightsError: naming file and tensor.
    """
    model, called, sites = _prepare(spec, dtype, exact=exact)
    owned = _owned(model, [site.name for site in sites])
    with Checkpoint.open(path) as checkpoint:
        plan = WeightPlan(model, checkpoint, dtype)
        plan.check_complete(owned)
        _drop_experts(sites)
        _fill(model, plan, owned, _Packer(model, called, exact=exact), progress)
    return _finish(model, spec, dtype, max_positions)


def build_hollow(spec: ModelSpec, *, dtype: torch.dtype, exact: bool) -> DenseModel:
    """The dense side with zeros for weights, which cost no memory until they are touched.

    For a compiler, which must see everything but the values: a layer is packed only while it runs.
    """
    model, called, sites = _prepare(spec, dtype, exact=exact)
    _drop_experts(sites)
    for name, meta in model.state_dict().items():
        if meta.is_meta:
            _assign(model, name, torch.zeros(meta.shape, dtype=meta.dtype))
    prefix = model_build.decoder_layers(model)[0]
    dense = _finish(model, spec, dtype, None)
    for wrapped in dense.layers:
        start = f"{prefix}.{wrapped.index}."
        paths = [path.removeprefix(start) for path in called if path.startswith(start)]
        _pack_while_running(wrapped, paths, exact=exact)
    return dense


def _pack_while_running(wrapped: CursorLayer, paths: list[str], *, exact: bool) -> None:
    plain: dict[str, nn.Linear] = {}

    def put(path: str, module: nn.Module) -> None:
        parent, _, child = path.rpartition(".")
        setattr(wrapped.layer.get_submodule(parent), child, module)

    def pack(*_: Any) -> None:
        for path in paths:
            module = wrapped.layer.get_submodule(path)
            if type(module) is nn.Linear and module.weight.dtype in DTYPES:
                plain[path] = module
                put(path, PackedLinear.pack(module.weight, module.bias, exact=exact))

    def unpack(*_: Any) -> None:
        for path, module in plain.items():
            put(path, module)
        plain.clear()

    wrapped.register_forward_pre_hook(pack)
    wrapped.register_forward_hook(unpack)


def _prepare(
    spec: ModelSpec, dtype: torch.dtype, *, exact: bool
) -> tuple[Any, set[str], tuple[model_build.ExpertsSite, ...]]:
    """The model on the meta device, which linears its forward calls, and its experts modules."""
    attention_op.register_interfaces()
    row_linear_patch.install(exact=exact)
    model = model_build.build_meta(spec.config, dtype)
    model_build.compute_buffers(model)
    called = model_probe.watch_one_pass(model).linears
    return model, called, model_build.expert_sites(model)


def _finish(
    model: Any, spec: ModelSpec, dtype: torch.dtype, max_positions: int | None
) -> DenseModel:
    engine_id = steps.new_engine_id(spec.attention)
    _point_config(model, engine_id)
    _pin_rotary(model, max_positions or spec.max_positions)
    return DenseModel(model, spec, dtype, _wrap_layers(model, engine_id))


def _owned(model: Any, experts: list[str]) -> list[str]:
    """Parameters and persistent buffers outside the experts modules, in the model's own order."""
    prefixes = tuple(f"{name}." for name in experts)
    return [name for name in model.state_dict() if not name.startswith(prefixes)]


def _drop_experts(sites: tuple[model_build.ExpertsSite, ...]) -> None:
    for site in sites:
        for module in site.module.modules():
            for name in list(module._parameters):
                del module._parameters[name]


class DenseLinear(PackedLinear):
    """A packed linear whose `weight` still tells shape and dtype, which models ask for.

    It is on the meta device: a model that computes with it fails instead of going wrong.
    """

    def __init__(self, packed: Tensor, bias_O: Tensor | None, **sizes: Any) -> None:
        super().__init__(packed, bias_O, **sizes)
        shape = (self.out_features, self.in_features)
        self.weight = torch.empty(shape, dtype=packed.dtype, device="meta")


class _Packer:
    """Replaces `nn.Linear` modules by `PackedLinear` once their tensors are there.

    Only modules whose `forward` the probe saw running: where a model reads `linear.weight` itself,
    the weight must stay.
    """

    def __init__(self, model: Any, called: set[str], *, exact: bool) -> None:
        self._model = model
        self._called = called
        self._exact = exact

    def filled(self, name: str) -> None:
        """The parameter or buffer `name` has been loaded."""
        path = name.rpartition(".")[0]
        module = self._model.get_submodule(path)
        if type(module) is not nn.Linear or path not in self._called:
            return
        tensors = [module.weight, *([] if module.bias is None else [module.bias])]
        if any(t.is_meta or t.dtype not in DTYPES for t in tensors):
            return
        packed = DenseLinear.pack(module.weight, module.bias, exact=self._exact)
        parent, _, child = path.rpartition(".")
        setattr(self._model.get_submodule(parent), child, packed)


def _fill(
    model: Any,
    plan: WeightPlan,
    owned: list[str],
    packer: _Packer,
    progress: Progress | None,
) -> None:
    """Load `owned` tensor by tensor; a tensor that the checkpoint holds once is shared."""
    total, done = plan.nbytes(owned), 0
    shared = {name: source for name in owned if (source := plan.source_of(name)) is not None}
    kept = {name: Tensor() for name in shared.values()}
    waiting = [name for name in owned if name not in shared]
    loaded: set[str] = set()
    for name in waiting:
        if name in loaded:
            continue
        for target, tensor in plan.load(name).items():
            if target in kept:
                kept[target] = tensor
            _assign(model, target, tensor)
            packer.filled(target)
            loaded.add(target)
        done += plan.nbytes([name])
        if progress is not None:
            progress(done, total)
    for name, source in shared.items():
        _assign(model, name, kept[source])
        packer.filled(name)
    left = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    left += [name for name, tensor in model.named_buffers() if tensor.is_meta]
    if left:
        raise WeightsError(f"{model.config.model_type}: nothing gave {sorted(left)}")


def _assign(model: Any, name: str, tensor: Tensor) -> None:
    """Put a loaded tensor where the meta one was."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[leaf] = tensor


def _point_config(model: Any, engine_id: int) -> None:
    """Every config that a module looks at names our implementations and this engine."""
    configs = [model.config, model.config.get_text_config()]
    configs += [m.config for m in model.modules() if hasattr(m, "config")]
    for config in configs:
        config._attn_implementation = attention_op.IMPLEMENTATION
        config._experts_implementation = attention_op.IMPLEMENTATION
        setattr(config, attention_op.ENGINE_ATTRIBUTE, engine_id)


def _pin_rotary(model: Any, max_positions: int) -> None:
    """Take the batch out of rotary embeddings that look at the largest position of a step.

    Dynamic kinds (`dynamic`, `longrope`) change their frequencies with it, so a request's tokens
    would depend on its neighbours. A row at the last position that will ever be served goes along
    and is thrown away: the choice is then the same in every step.
    """
    for module in model.modules():
        if "Rotary" not in type(module).__name__:
            continue
        kinds = getattr(module, "rope_type", None)
        names = kinds.values() if isinstance(kinds, dict) else [kinds]
        if any("dynamic" in str(name) or name == "longrope" for name in names):
            module.forward = _with_last_position(module.forward, max_positions)


def _with_last_position(forward: Callable[..., Any], max_positions: int) -> Callable[..., Any]:
    def run(x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        last = position_ids.new_full((*position_ids.shape[:-1], 1), max_positions - 1)
        result = forward(x, torch.cat([position_ids, last], dim=-1), *args, **kwargs)
        return pytree.tree_map(lambda value: value[..., :-1, :], result)

    return run


def _wrap_layers(model: Any, engine_id: int) -> list[CursorLayer]:
    name, layers = model_build.decoder_layers(model)
    for module in layers.modules():
        # A number that differs between equal layers would make each of them compile anew.
        if hasattr(module, "layer_idx") and _only_names_cache(type(module)):
            module.layer_idx = 0
    wrapped = [CursorLayer(layer, index, engine_id) for index, layer in enumerate(layers)]
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.ModuleList(wrapped))
    return wrapped


@functools.cache
def _only_names_cache(kind: type) -> bool:
    """Whether a class uses `layer_idx`, after construction, only to name its part of the cache."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for function in (node for node in functions if node.name != "__init__"):
        calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
        naming = {
            id(argument)
            for call in calls
            if isinstance(call.func, ast.Attribute) and call.func.attr == "update"
            for argument in call.args
        }
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute) and node.attr == "layer_idx":
                if id(node) not in naming:
                    return False
    return True
