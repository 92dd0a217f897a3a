"""A step of a compiled model without the model's own Python around its layers.

`transformers` runs a model's forward anew for every step: decorators, mask and cache plumbing,
rotary tables, the loop over layers; 0.2 to 0.4 ms a step here, with one row as with many. Once the
layers are programs, that forward is traced twice with its layers left out: *before* them (token ids
and positions to the first layer's rows and to what else layers take) and *after* them (the last
norm); the head is traced by itself. A step is then straight calls of generated code:

    rows, *others = before(token ids, positions)
    rows = layer(rows, others), for each layer
    logits = head(those of after(rows) that are wanted)

Where all of that is C++ (`cpp_wrapper`), up to the last norm it is one chain of native calls
(`kernels/step_calls.py`).

A model that does something between its layers is not taken apart: its forward runs as it is.
Legend: T token rows of a step, D model width.
"""

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from remora.actors.layer_program import Program, Recording, as_tensor, find
from remora.kernels.native import native_available
from remora.kernels.step_calls import StepCalls

# (token ids [T], positions [T]) -> [T, D] after the last norm: the model's own forward
Forward = Callable[[Tensor, Tensor], Tensor]
# [R, D] -> [R, V]: the model's own head
Head = Callable[[Tensor], Tensor]

ROWS_MIN = 2  # the compiler takes a size of one for a constant


@dataclass(frozen=True, slots=True)
class StepProgram:
    """`run` takes a step from token ids to the rows after the last norm, `logits` further."""

    before: Program
    layers: tuple[tuple[Program, tuple[int, ...]], ...]  # and which of a step's values each takes
    after: Program
    head: Program
    calls: StepCalls | None  # all but the head, where they are native

    @classmethod
    def of(
        cls, before: Program, layers: Sequence[tuple[Program, tuple[int, ...]]], after: Program,
        head: Program,
    ) -> Self:  # fmt: skip
        """From its parts."""
        return cls(before, tuple(layers), after, head, _chain(before, layers, after))

    def run(self, token_ids_T: Tensor, positions_T: Tensor, cursor: ctypes.c_int64) -> Tensor:
        """[T, D]. `cursor` is told the index of each layer before it runs."""
        num_rows = token_ids_T.shape[0]
        if self.calls is not None:
            return self.calls.run([token_ids_T, positions_T], as_tensor(num_rows), cursor)
        values = list(self.before.run(num_rows, (token_ids_T, positions_T), {}))
        for index, (layer, indices) in enumerate(self.layers):
            cursor.value = index
            values[0] = layer.run_on(num_rows, [values[i] for i in indices])[0]
        return self.after.run(num_rows, (values[0],), {})[0]

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """[R, V] in the head's own dtype, R >= 1."""
        num_rows = hidden_RD.shape[0]
        if num_rows < ROWS_MIN:
            hidden_RD = hidden_RD.expand(ROWS_MIN, -1).contiguous()
        logits: Tensor = self.head.run(len(hidden_RD), (hidden_RD,), {})[0]
        return logits[:num_rows]


def _chain(
    before: Program, layers: Sequence[tuple[Program, tuple[int, ...]]], after: Program
) -> StepCalls | None:
    """The same as native calls; None where one of them is not C++."""
    if not native_available():
        return None
    chain, unused = StepCalls(), before.num_outputs  # behind the values that layers take

    def add(program: Program, values: Sequence[int], outputs: Sequence[int], layer: int) -> bool:
        entry = program.entry
        if entry is None:
            return False
        chain.add(
            entry,
            len(program.constants),
            constants={i: x for i, x in enumerate(program.constants) if x is not None},
            rows_at=program.rows_at,
            values_at={at: v for (at, _), v in zip(program.tensors_at, values, strict=True)},
            outputs=outputs,
            layer=layer,
        )
        return True

    def rows_only(program: Program) -> list[int]:
        return [0, *[unused] * (program.num_outputs - 1)]

    given = [int(place[0]) for _, place in before.tensors_at]
    is_native = (
        add(before, given, range(before.num_outputs), -1)
        and all(add(p, values, rows_only(p), i) for i, (p, values) in enumerate(layers))
        and add(after, [0], rows_only(after), -1)
    )
    return chain if is_native else None


class _NotSeparable(Exception):
    """The model does something between its layers."""


class Split:
    """A model's forward before and after its layers: traced, then compiled and warmed up.

    Args:
        forward: runs the model's own forward, which calls each of `layers` once and in order.
        head: the model's own head.
        layers: the modules to leave out; their programs say what they take.
        options: of the compiler.
    """

    def __init__(
        self, forward: Forward, head: Head, layers: Sequence[nn.Module],
        programs: Sequence[Program], options: dict[str, Any],
    ) -> None:  # fmt: skip
        self._forward = forward
        self._head = head
        self._layers = layers
        self._programs = programs
        self._indices: list[tuple[int, ...]] = []
        self._ends = [
            (Recording(end), torch.compile(end, dynamic=True, fullgraph=True, options=options))
            for end in self._trace(37)
        ]

    def warm(self, token_ids_T: Tensor, positions_T: Tensor) -> None:
        """Run the ends once with this number of rows."""
        num_rows = token_ids_T.shape[0]
        (before, run_before), (after, run_after), (head, run_head) = self._ends
        with torch.inference_mode():
            rows = before.call(run_before, num_rows, (token_ids_T, positions_T), {})[0]
            rows = after.call(run_after, num_rows, (torch.zeros_like(rows),), {})[0]
            head.call(run_head, num_rows, (rows,), {})

    def program(self) -> StepProgram | None:
        """Straight calls for a whole step; None where an end's warm-up steps did not agree."""
        before, after, head = (recording.program() for recording, _ in self._ends)
        if before is None or after is None or head is None:
            return None
        layers = list(zip(self._programs, self._indices, strict=True))
        return StepProgram.of(before, layers, after, head)

    def _trace(self, num_rows: int) -> tuple[nn.Module, nn.Module, nn.Module]:
        ids_T, positions_T = torch.zeros(num_rows, dtype=torch.int64), torch.arange(num_rows)
        with torch.no_grad():
            before = _traced(self._before, ids_T, positions_T)
            rows = self._before(ids_T, positions_T)[0].clone()
            after = _traced(lambda rows: self._after(rows, ids_T, positions_T), rows)
            hidden = self._after(rows, ids_T, positions_T)[0].clone()
            head = _traced(lambda hidden: [self._head(hidden)], hidden)
        return before, after, head

    def _before(self, token_ids_T: Tensor, positions_T: Tensor) -> list[Tensor]:
        """The first layer's rows, then every other tensor that a layer's program takes."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def note(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            calls.append((args, kwargs))
            rows: Tensor = args[0]
            return rows

        with _stand_in(self._layers, note):
            self._forward(token_ids_T, positions_T)
        values: list[Tensor] = [calls[0][0][0]]
        if len(calls) != len(self._layers) or any(args[0] is not values[0] for args, _ in calls):
            raise _NotSeparable
        self._indices = []
        for (args, kwargs), program in zip(calls, self._programs, strict=True):
            taken = [find(args, kwargs, place) for _, place in program.tensors_at]
            for tensor in taken:
                if not any(tensor is known for known in values):
                    values.append(tensor)
            self._indices.append(
                tuple(next(i for i, v in enumerate(values) if v is t) for t in taken)
            )
        return values

    def _after(self, rows_1TD: Tensor, token_ids_T: Tensor, positions_T: Tensor) -> list[Tensor]:
        with _stand_in(self._layers, lambda args, kwargs: rows_1TD):
            return [self._forward(token_ids_T, positions_T)]


def _traced(function: Callable[..., list[Tensor]], *inputs: Tensor) -> nn.Module:
    """The graph of `function`, for any number of rows."""
    trace = make_fx(
        lambda *given: function(*given), tracing_mode="symbolic", _allow_non_fake_inputs=True
    )
    module: nn.Module = trace(*inputs)
    return module


def split(
    forward: Forward, head: Head, layers: Sequence[nn.Module], programs: Sequence[Program],
    options: dict[str, Any],
) -> Split | None:  # fmt: skip
    """`Split`, or None where the model cannot be taken apart."""
    try:
        return Split(forward, head, layers, programs, options)
    except _NotSeparable:
        return None


@contextlib.contextmanager
def _stand_in(
    layers: Sequence[nn.Module], answer: Callable[[tuple[Any, ...], dict[str, Any]], Tensor]
) -> Iterator[None]:
    """Inside, a call of any of `layers` is answered by `answer(args, kwargs)`."""
    try:
        for layer in layers:
            layer.forward = lambda *args, **kwargs: answer(args, kwargs)
        yield
    finally:
        for layer in layers:
            del layer.forward
