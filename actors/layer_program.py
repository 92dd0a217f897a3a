"""Compiled layers called directly: what `torch.compile` checks at every call of every layer is
settled once, while the engine warms up.

A call through `torch.compile` evaluates guards, finds the layer's parameters again and passes
through several wrappers before generated code runs: 60 to 100 us a layer (benchmarks' *tiny*, one
row), as much as the layer's own kernels. During warm-up a `Recording` notes what reached the
generated code; an argument of it is one of

    the number of rows          the one size that changes between steps
    a tensor of this step       found again by its place among the layer's arguments
    anything else               parameters, buffers and constants of the layer: the same for ever

A layer whose warm-up steps do not agree on that keeps its guards: slower, and as right. What the
guards would have caught cannot happen between steps of one engine: the dtype, the layout and the
modes of its steps never change, and a step has at least two rows. Legend: T token rows of a step.
"""

import contextlib
import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor.output_code import CompiledFxGraph
from torch.utils import _pytree as pytree

from remora.kernels.step_calls import entry_of

# Where a tensor of the step stands: index or name of an argument, then indices into tuples.
Place = tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class Program:
    """Generated code, and where its arguments come from."""

    code: Callable[[list[Any]], Sequence[Any]]
    constants: tuple[Any, ...]  # None where the step fills in
    rows_at: tuple[int, ...]  # arguments that are T
    tensors_at: tuple[tuple[int, Place], ...]  # arguments that are tensors of the step
    wants_tensors: bool  # of `code`: numbers too
    num_outputs: int

    @property
    def entry(self) -> int | None:
        """Address of the code itself where it is C++ with nothing else around it."""
        return _entry_of(self.code) if self.wants_tensors else None

    def run(self, num_rows: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[Tensor]:
        """The outputs for arguments of the kind it was recorded with, T apart."""
        tensors = [find(args, kwargs, place) for _, place in self.tensors_at]
        return self.run_on(num_rows, tensors)

    def run_on(self, num_rows: int, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """The outputs for the tensors of a step, in the order of `tensors_at`."""
        inputs = list(self.constants)
        rows = as_tensor(num_rows) if self.wants_tensors else num_rows
        for at in self.rows_at:
            inputs[at] = rows
        for (at, _), tensor in zip(self.tensors_at, tensors, strict=True):
            inputs[at] = tensor
        return self.code(inputs)


@dataclass(frozen=True, slots=True)
class _Call:
    """What reached the generated code in one call of a layer."""

    code: Callable[[list[Any]], Sequence[Any]]
    given: list[Any]
    places: tuple[Place | None, ...]  # of each of `given` that is a tensor of the step
    num_rows: int
    num_outputs: int


class Recording:
    """The warm-up calls of one layer."""

    def __init__(self, module: nn.Module) -> None:
        self._own = {id(t) for t in (*module.parameters(), *module.buffers())}
        self._calls: list[_Call] = []
        self._unclear = False

    def call(
        self,
        compiled: Callable[..., Any],
        num_rows: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """`compiled(*args, **kwargs)`, noted."""
        with _watch_graphs() as seen:
            result = compiled(*args, **kwargs)
        results = [result] if isinstance(result, Tensor) else list(result)
        graph, given, outputs = seen[0] if len(seen) == 1 else (None, [], ())
        is_plain = len(results) == len(outputs) and all(map(operator.is_, results, outputs))
        if graph is None or graph.current_callable is None or not is_plain:
            self._unclear = True  # several graphs, or wrappers that change what comes out
            return result
        standing = {id(t): place for place, t in tensor_places(args, kwargs).items()}
        places = tuple(standing.get(id(value)) for value in given)
        self._calls.append(_Call(graph.current_callable, given, places, num_rows, len(outputs)))
        return result

    def program(self) -> Program | None:
        """What all calls agree on; None where they do not, or an argument is nobody's."""
        if self._unclear or not self._calls:
            return None
        first = self._calls[0]
        if any(c.code != first.code or c.places != first.places for c in self._calls):
            return None
        constants: list[Any] = []
        rows_at: list[int] = []
        tensors_at: list[tuple[int, Place]] = []
        for at, (value, place) in enumerate(zip(first.given, first.places, strict=True)):
            values = [call.given[at] for call in self._calls]
            constants.append(None)
            if place is not None:
                tensors_at.append((at, place))
            elif self._is_constant(values):
                constants[at] = value
            elif isinstance(value, int) and values == [call.num_rows for call in self._calls]:
                rows_at.append(at)
            else:
                return None
        wants_tensors = _wants_tensors(first.code)
        if wants_tensors:
            constants = [
                as_tensor(x) if isinstance(x, bool | int | float) else x for x in constants
            ]
        return Program(
            first.code, tuple(constants), tuple(rows_at), tuple(tensors_at), wants_tensors,
            first.num_outputs,
        )  # fmt: skip

    def _is_constant(self, values: list[Any]) -> bool:
        first = values[0]
        if not isinstance(first, Tensor):
            return len(self._calls) > 1 and all(v == first for v in values)
        if id(first) in self._own:
            return all(v is first for v in values)
        # A float of the layer, which the compiler takes as a tensor without dimensions.
        return first.dim() == 0 and all(v.dim() == 0 and bool(v == first) for v in values)


def _wants_tensors(code: Callable[..., Any]) -> bool:
    """Whether it is the function around code in C++, which makes a tensor of each number that it is
    given, anew at every call."""
    return code.__qualname__ == "_wrap_func.<locals>.g"


def _entry_of(code: Any) -> int | None:
    """What the function around code in C++ calls, if it only hands tensors over and back."""
    does_more = "constants_tensor" in code.__code__.co_varnames or "item" in code.__code__.co_names
    called = [cell.cell_contents for cell in code.__closure__ or ()]
    library = getattr(getattr(called[0], "__self__", None), "__file__", None) if called else None
    return None if does_more or library is None else entry_of(library)


@functools.lru_cache(maxsize=4096, typed=True)  # 1, 1.0 and True differ
def as_tensor(number: float) -> Tensor:
    """[], made once."""
    return torch.tensor(number)


@contextlib.contextmanager
def _watch_graphs() -> Iterator[list[tuple[CompiledFxGraph, list[Any], Sequence[Any]]]]:
    """Compiled graphs that run inside, with what they were given and what they returned."""
    seen: list[tuple[CompiledFxGraph, list[Any], Sequence[Any]]] = []
    original = CompiledFxGraph.__call__

    def call(graph: CompiledFxGraph, inputs: Sequence[Any]) -> Any:
        given = list(inputs)  # generated code clears the list
        outputs = original(graph, inputs)
        seen.append((graph, given, outputs))
        return outputs

    CompiledFxGraph.__call__ = call  # type: ignore[method-assign,assignment]
    try:
        yield seen
    finally:
        CompiledFxGraph.__call__ = original  # type: ignore[method-assign]


def tensor_places(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Place, Tensor]:
    """Every tensor among the arguments by its place."""
    found: dict[Place, Tensor] = {}
    named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for key, value in named:
        for path, leaf in pytree.tree_flatten_with_path(value)[0]:
            steps: tuple[Any, ...] = tuple(getattr(p, "idx", getattr(p, "key", None)) for p in path)
            if isinstance(leaf, Tensor) and None not in steps:
                found[(key, *steps)] = leaf
    return found


def find(args: tuple[Any, ...], kwargs: dict[str, Any], place: Place) -> Any:
    """What stands at `place`."""
    first = place[0]
    value = args[first] if isinstance(first, int) else kwargs[first]
    for step in place[1:]:
        value = value[step]
    return value
