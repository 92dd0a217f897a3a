"""A chain of calls of code that Inductor generated in C++, without Python between them (CPU).

    calls = StepCalls()
    calls.add(entry, 3, constants={2: weight}, rows_at=(0,), values_at={1: 0}, outputs=(0,))
    out = calls.run([rows_TD], num_rows, cursor)     # value 0 after the last call

A chain works on *values*: those that a step gives it, then what the calls put in their places. An
input of a call is a constant, a value, or the number of rows as a tensor. Python took 40 us around
every layer in place, as its code and data are out of the caches after a layer's weights
([measured](../benchmarks/notes/2026-11-29-step-calls.md)).
"""

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# void inductor_entry_impl(AtenTensorHandle*, AtenTensorHandle*), as g++ and clang name it
ENTRY_SYMBOL = "_Z19inductor_entry_implPP16AtenTensorOpaqueS1_"


def entry_of(library: str) -> int | None:
    """Address of the generated code in a shared library that is loaded; None: it has none."""
    symbol = getattr(ctypes.CDLL(library), ENTRY_SYMBOL, None)
    return None if symbol is None else ctypes.cast(symbol, ctypes.c_void_p).value


class StepCalls:
    """The calls of one step, in order. One thread runs them at a time."""

    def __init__(self) -> None:
        self._calls: Any = torch.classes.remora.StepCalls()

    def add(
        self,
        entry: int,
        num_inputs: int,
        *,
        constants: Mapping[int, Tensor],
        rows_at: Sequence[int],
        values_at: Mapping[int, int],
        outputs: Sequence[int],
        layer: int = -1,
    ) -> None:
        """One more call behind the others.

        Args:
            entry: of `entry_of`, whose library stays loaded.
            constants: input -> tensor, the same in every step.
            rows_at: inputs that are the number of rows.
            values_at: input -> value.
            outputs: the values that the call's outputs become, all of them in order.
            layer: what the cursor says meanwhile; negative: as it is.

        Raises:
            ValueError: an input that nothing fills, or more than one does.
        """
        pairs = [number for pair in values_at.items() for number in pair]
        self._calls.add(
            entry, num_inputs, list(constants.values()), list(constants), list(rows_at), pairs,
            list(outputs), layer,
        )  # fmt: skip

    def run(self, values: list[Tensor], num_rows: Tensor, cursor: ctypes.c_int64) -> Tensor:
        """Value 0 after the last call.

        Args:
            values: 0 and those that follow, as they are at first.
            num_rows: int64 [].
            cursor: is told which layer runs.

        Raises:
            RuntimeError: what a call raised, as text.
        """
        out: Tensor = self._calls.run(values, num_rows, ctypes.addressof(cursor))
        return out
