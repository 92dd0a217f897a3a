"""Decoder layers that divide their rows among the ranks behind attention, not at the experts.

A layer of the usual shape is

    rows -> [norm] -> attention -> + rows -> [norm] -> experts -> + -> rows

and everything behind attention looks at one row at a time. So the sum over the ranks that ends
attention may leave each rank a slice of the rows (a reduce-scatter), what is added to it is sliced
alike, and the rows are brought together at the end of the layer: norm and gate run once for a row
instead of on every rank, and the extra gather behind the experts is gone.

Which layers have that shape is read off a trace of their `forward` with all modules left whole
(torch.fx); names of architectures play no part. What cannot be shown stays as it is, with the
reason. Legend: T rows, D model width.
"""

import operator
import threading
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, fx, nn

from remora.actors import shuffle_op
from remora.actors.dense_surgery import CursorLayer
from remora.actors.model_build import building, is_experts_module
from remora.actors.tp_shuffle import Sliced
from remora.actors.tp_surgery import Part, SummedLinear

# What may happen to rows behind attention, apart from modules.
ROW_WISE: Final = {
    operator.add, operator.iadd, operator.mul, operator.imul, operator.truediv,
    torch.add, torch.mul, torch.div,
}  # fmt: skip
_classes: dict[tuple[type[Any], str], type[Any]] = {}


class _Unlike(Exception):
    """A layer of another shape; says how."""


def slice_layers(layers: list[CursorLayer], part: Part, engine_id: int) -> Sliced:
    """Have every MoE layer of the usual shape divide its rows; in place, after loading."""
    found = Sliced()
    shuffle_op.divide(engine_id, part.group)
    for wrapped in layers:
        if not any(is_experts_module(module) for module in wrapped.layer.modules()):
            continue
        try:
            _slice(wrapped.layer, wrapped.index, part, engine_id)
        except _Unlike as unlike:
            found.others[wrapped.index] = str(unlike)
        else:
            found.layers.append(wrapped.index)
    return found


def _slice(layer: Any, index: int, part: Part, engine_id: int) -> None:
    graph = _trace(layer, part.shape.arguments[index])
    moe = [name for name, child in layer.named_children() if _has_experts(child)]
    if len(moe) != 1:
        raise _Unlike("the experts are not in one module of the layer")
    sums = {
        name: path
        for path, module in layer.named_modules()
        if isinstance(module, SummedLinear)
        for name in [path.partition(".")[0]]
        if name != moe[0]
    }
    if len(sums) != 1 or next(iter(sums)) == next(iter(sums.values())):
        raise _Unlike("attention is whole on every rank, or more than it ends with a sum")
    ((attention, ending),) = sums.items()
    shared = _shared(layer, moe[0], part, index)
    if f"{index}.{ending}" not in part.shape.ends:
        raise _Unlike("something follows the sum in attention")
    _rewrite(graph, layer, attention, moe[0], engine_id, part.group.size)
    # Nothing has been changed up to here; from here on nothing fails.
    layer.get_submodule(ending).is_partial = True
    for module, last in shared:
        module.get_submodule(last).is_partial = True
        kind = type(module)
        key = kind, f"whole {engine_id} {part.group.size}"
        if key not in _classes:
            _classes[key] = shuffle_op.whole_rows_class(kind, engine_id, part.group.size)
        module.__class__ = _classes[key]
    layer.__class__ = _with_forward(layer, graph)


def _shared(layer: Any, moe: str, part: Part, index: int) -> list[tuple[Any, str]]:
    """Modules beside the experts that are divided by width, and the linear that ends each."""
    block = layer.get_submodule(moe)
    found = []
    for path, module in block.named_modules():
        if not isinstance(module, SummedLinear):
            continue
        parent, _, last = path.rpartition(".")
        if not parent or f"{index}.{moe}.{path}" not in part.shape.ends:
            raise _Unlike(f"{path} beside the experts is not the end of a module")
        found.append((block.get_submodule(parent), last))
    return found


def _has_experts(module: nn.Module) -> bool:
    return any(is_experts_module(inner) for inner in module.modules())


class _Tracer(fx.Tracer):
    """All modules stay whole. torch.fx sees what every thread calls meanwhile: what is not this
    thread's passes through."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def call_module(
        self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)


def _trace(layer: Any, names: frozenset[str] | None) -> fx.Graph:
    """The forward of a layer that is given rows and arguments of these names."""
    if names is None:
        raise _Unlike("it is called with more than rows by position")
    kind = type(layer)
    # What torch.fx needs is a signature without stars.
    given = sorted(names)
    text = f"def forward(self, rows, {', '.join(f'{name}=None' for name in given)}):\n"
    text += f"    return own(self, rows, {', '.join(f'{name}={name}' for name in given)})\n"
    space: dict[str, Any] = {"own": kind.forward}
    exec(text, space)
    seen: Any = object.__new__(type(kind.__name__, (kind,), {"forward": space["forward"]}))
    seen.__dict__ = layer.__dict__
    try:
        with building:
            return _Tracer().trace(seen)
    except Exception as error:  # a forward may do anything: it is then not of the usual shape
        raise _Unlike(f"its forward cannot be traced: {type(error).__name__}") from error


def _rewrite(
    graph: fx.Graph, layer: Any, attention: str, moe: str, engine_id: int, size: int
) -> None:
    """Slice behind `attention`, restore at the output.

    Raises:
        _Unlike: what is behind attention is not known to look at one row at a time.
    """
    rows = next(node for node in graph.nodes if node.op == "placeholder")
    calls = [n for n in graph.nodes if n.op == "call_module" and n.target == attention]
    gates = [n for n in graph.nodes if n.op == "call_module" and n.target == moe]
    if len(calls) != 1 or len(gates) != 1:
        raise _Unlike("attention or experts are called more than once")
    attended = [n for n in calls[0].users if n.target is operator.getitem and n.args[1] == 0]
    unused = [n for n in calls[0].users if n not in attended]
    if len(attended) != 1 or any(node.users for node in unused):
        raise _Unlike("attention gives more than rows")
    behind = _behind(graph, attended[0])
    if gates[0] not in behind:
        raise _Unlike("the experts do not follow attention")
    output = next(node for node in graph.nodes if node.op == "output")
    if output.args[0] not in behind:
        raise _Unlike("the layer gives more than rows")
    crossing: list[tuple[fx.Node, fx.Node]] = []
    for node in behind - {attended[0]}:
        _check_row_wise(node, layer, moe)
        for given in node.all_input_nodes:
            if given not in behind:
                if given is not rows:
                    raise _Unlike(f"{given.name} reaches what is behind attention")
                crossing.append((node, given))
    with graph.inserting_after(attended[0]):
        own = graph.call_function(shuffle_op.slice_sum, (attended[0], engine_id, size))
    attended[0].replace_all_uses_with(own, delete_user_cb=lambda user: user is not own)
    if crossing:
        with graph.inserting_after(own):
            residual = graph.call_function(shuffle_op.slice_rows, (rows, engine_id, size))
        for node, given in crossing:
            node.replace_input_with(given, residual)
    with graph.inserting_before(output):
        whole = graph.call_function(shuffle_op.restore_rows, (output.args[0], rows, engine_id))
    output.args = (whole,)
    graph.lint()


def _behind(graph: fx.Graph, first: fx.Node) -> set[fx.Node]:
    """`first` and what depends on it, the output apart."""
    behind = {first}
    for node in graph.nodes:
        if node.op != "output" and any(given in behind for given in node.all_input_nodes):
            behind.add(node)
    return behind


def _check_row_wise(node: fx.Node, layer: Any, moe: str) -> None:
    if node.op == "call_function" and node.target in ROW_WISE:
        return
    if node.op == "call_function" and node.target is operator.getitem:
        source = node.args[0]
        if isinstance(source, fx.Node) and source.op == "call_module" and node.args[1] == 0:
            return
        if not node.users:
            return
    if node.op == "call_module":
        module = layer.get_submodule(node.target)
        if len(node.all_input_nodes) > 1:
            raise _Unlike(f"{node.target} behind attention is given more than rows")
        if node.target == moe or _is_norm(module):
            return
        raise _Unlike(f"{node.target} behind attention is neither a norm nor the experts")
    raise _Unlike(f"{node.target} behind attention is not known to work row by row")


def _is_norm(module: nn.Module) -> bool:
    """No module inside, nothing but vectors: it can scale columns, and knows no other row."""
    tensors = [*module.parameters(), *module.buffers()]
    return not list(module.children()) and all(tensor.dim() <= 1 for tensor in tensors)


def _with_forward(layer: Any, graph: fx.Graph) -> type[Any]:
    """The layer's class with the forward of `graph`; one for all layers with that code."""
    kind = type(layer)
    key = kind, graph.python_code("self").src
    if key not in _classes:
        module = fx.GraphModule(layer, graph)
        forward: Callable[..., Tensor] = type(module).forward
        _classes[key] = type(f"Sliced{kind.__name__}", (kind,), {"forward": forward})
    return _classes[key]
