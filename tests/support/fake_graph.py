"""Capturing a CUDA graph, pretended on the CPU: what may not be captured raises, and it replays.

A captured region may not read a tensor on the host (that would synchronise) and may not allocate
(a graph's addresses are fixed). As on a GPU, nothing is computed while it is captured.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class ContractError(AssertionError):
    """What would hang or corrupt on a GPU, or cannot be captured."""


class Graph:
    """A captured graph: the operations on tensors and the groups, to run again on new contents."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], Any]] = []

    def replay(self) -> None:
        for call in self.calls:
            call()


class _Recorder(TorchDispatchMode):
    """Remembers what writes, without running it; refuses results that lie in new memory."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self._graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            self._graph.calls.append(lambda: func(*args, **kwargs))
            named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
            written = [
                named[a.name]
                for a in func._schema.arguments
                if a.alias_info is not None and a.alias_info.is_write
            ]
            return written[0] if len(written) == 1 else tuple(written)
        known = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        out = func(*args, **kwargs)
        for tensor in _tensors(out):
            if tensor.untyped_storage().data_ptr() not in known:
                raise ContractError(f"{func} allocates under capture")
        if not _tensors(out):
            raise ContractError(f"{func} gives {out!r} to the host under capture")
        return out


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class _NoHostReads(TorchFunctionMode):
    """Refuses what reads a tensor on the host without passing the dispatcher."""

    NAMES = frozenset(
        {"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__index__", "__float__"}
        | {"__array__", "__contains__", "is_nonzero", "equal", "allclose"}
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self.NAMES:
            raise ContractError(f"{func.__name__} reads on the host under capture")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def capturing(graph: Graph) -> Iterator[None]:
    """Operations on tensors inside go into `graph`."""
    with _NoHostReads(), _Recorder(graph):
        yield
