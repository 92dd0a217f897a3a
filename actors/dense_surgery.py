"""What is done to a `transformers` model so that it can serve: filled, packed, wrapped, pinned.

The model comes on the meta device and is filled tensor by tensor; `nn.Linear` weights are packed
for the kernels as they arrive, so the peak is what the process owns and one tensor more.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from remora.actors import attention_op, model_build
from remora.actors.layer_program import Program, Recording
from remora.actors.step_context import steps
from remora.actors.weights import Progress, WeightPlan
from remora.comm.errors import WeightsError
from remora.kernels.device import CPU, home_of
from remora.kernels.linear import DTYPES, PackedLinear


class CursorLayer(nn.Module):
    """A decoder layer that first moves the step's layer cursor, outside whatever is compiled.

    `compiled`, where it is set, runs in place of the layer and takes it as its first argument:
    the compiled `forward` that all layers of one class share (`DenseModel.compile`). `recording`
    notes its calls; `program`, made of them, then runs in place of both.
    """

    def __init__(self, layer: nn.Module, index: int, engine_id: int) -> None:
        super().__init__()
        self.layer = layer
        self.index = index
        self.engine_id = engine_id
        self.compiled: Callable[..., Any] | None = None
        self.recording: Recording | None = None
        self.program: Program | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the layer's own."""
        context = steps.current(self.engine_id)
        context.layer = self.index
        if self.program is not None:
            return self.program.run(context.plan.num_rows, args, kwargs)[0]
        if self.compiled is None:
            return self.layer(*args, **kwargs)
        compiled = functools.partial(self.compiled, self.layer)
        if self.recording is None:
            return compiled(*args, **kwargs)
        return self.recording.call(compiled, context.plan.num_rows, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        """Models read attributes of their layers (`attention_type`): pass them on."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)


def owned_names(model: Any, experts: list[str]) -> list[str]:
    """Parameters and persistent buffers outside the experts modules, in the model's own order."""
    prefixes = tuple(f"{name}." for name in experts)
    return [name for name in model.state_dict() if not name.startswith(prefixes)]


def drop_experts(sites: tuple[model_build.ExpertsSite, ...]) -> None:
    """Takes the experts' parameters out of the model: the shards hold them."""
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


class Packer:
    """Replaces `nn.Linear` modules by `PackedLinear` once their tensors are there.

    Only modules whose `forward` the probe saw running: where a model reads `linear.weight` itself,
    the weight must stay. On a GPU linears are torch's own and stay too.

    Args:
        hollow: weights are zeros, and take no memory packed either.
    """

    def __init__(
        self,
        model: Any,
        called: frozenset[str],
        *,
        exact: bool,
        device: torch.device = CPU,
        hollow: bool = False,
    ) -> None:
        self._make = DenseLinear.zeros if hollow else DenseLinear.pack
        self._model = model
        self._called = called if device == CPU else frozenset()
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
        packed = self._make(module.weight, module.bias, exact=self._exact)
        parent, _, child = path.rpartition(".")
        setattr(self._model.get_submodule(parent), child, packed)


def fill(
    model: Any,
    plan: WeightPlan,
    owned: list[str],
    packer: Packer,
    progress: Progress | None,
    device: torch.device = CPU,
) -> None:
    """Load `owned` tensor by tensor; a tensor that the checkpoint holds once is shared.

    Args:
        device: where the tensors go, one by one (`kernels.device`).
    """
    home = home_of(device)
    total, done = plan.nbytes(owned), 0
    shared = {name: source for name in owned if (source := plan.source_of(name)) is not None}
    kept = {name: Tensor() for name in shared.values()}
    waiting = [name for name in owned if name not in shared]
    loaded: set[str] = set()
    for name in waiting:
        if name in loaded:
            continue
        for target, loaded_tensor in plan.load(name).items():
            tensor = loaded_tensor.to(home)
            if target in kept:
                kept[target] = tensor
            assign(model, target, tensor)
            packer.filled(target)
            loaded.add(target)
        done += plan.nbytes([name])
        if progress is not None:
            progress(done, total)
    for name, source in shared.items():
        assign(model, name, kept[source])
        packer.filled(name)
    left = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    left += [name for name, tensor in model.named_buffers() if tensor.is_meta]
    if left:
        raise WeightsError(f"{model.config.model_type}: nothing gave {sorted(left)}")


def assign(model: Any, name: str, tensor: Tensor) -> None:
    """Put a loaded tensor where the meta one was."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[leaf] = tensor


def point_config(model: Any, engine_id: int) -> None:
    """Every config that a module looks at names our implementations and this engine."""
    configs = [model.config, model.config.get_text_config()]
    configs += [m.config for m in model.modules() if hasattr(m, "config")]
    for config in configs:
        config._attn_implementation = attention_op.IMPLEMENTATION
        config._experts_implementation = attention_op.IMPLEMENTATION
        setattr(config, attention_op.ENGINE_ATTRIBUTE, engine_id)


def pin_rotary(model: Any, max_positions: int) -> bool:
    """Take the batch out of rotary embeddings that look at the largest position of a step.

    Dynamic kinds (`dynamic`, `longrope`) change their frequencies with it, so a request's tokens
    would depend on its neighbours. A row at the last position that will ever be served goes along
    and is thrown away: the choice is then the same in every step.

    Returns:
        Whether there are any: code that is compiled then holds that position.
    """
    is_pinned = False
    for module in model.modules():
        if "Rotary" not in type(module).__name__:
            continue
        kinds = getattr(module, "rope_type", None)
        names = kinds.values() if isinstance(kinds, dict) else [kinds]
        if any("dynamic" in str(name) or name == "longrope" for name in names):
            module.forward = _with_last_position(module.forward, max_positions)
            is_pinned = True
    return is_pinned


def _with_last_position(forward: Callable[..., Any], max_positions: int) -> Callable[..., Any]:
    def run(x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        last = position_ids.new_full((*position_ids.shape[:-1], 1), max_positions - 1)
        result = forward(x, torch.cat([position_ids, last], dim=-1), *args, **kwargs)
        return pytree.tree_map(lambda value: value[..., :-1, :], result)

    return run


def wrap_layers(model: Any, engine_id: int) -> list[CursorLayer]:
    """Puts every decoder layer into a `CursorLayer`, in the model too; returns them in order."""
    name, layers = model_build.decoder_layers(model)
    wrapped = [CursorLayer(layer, index, engine_id) for index, layer in enumerate(layers)]
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.ModuleList(wrapped))
    return wrapped
