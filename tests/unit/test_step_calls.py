"""Chains of native calls: what calls of the same code from Python give, and what they refuse."""

import ctypes
import shutil
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from remora.actors.layer_program import Program, Recording, as_tensor
from remora.actors.step_program import StepProgram
from remora.kernels.native import native_available
from remora.kernels.step_calls import StepCalls, entry_of

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++"),
    pytest.mark.skipif(not native_available(), reason="needs the C++ kernels"),
]

seen_layers: list[int] = []
cursor = ctypes.c_int64(-1)
_library = torch.library.Library("remora_test_calls", "DEF")


def _observed(rows: Tensor) -> Tensor:
    seen_layers.append(cursor.value)
    if bool(rows.isnan().any()):
        raise OverflowError("rows are not finite")
    return rows.clone()


_library.define("observed(Tensor rows) -> Tensor")
_library.impl("observed", _observed, "CompositeExplicitAutograd")
torch.library.register_fake("remora_test_calls::observed", lambda rows: rows.clone(), lib=_library)


class Scaled(nn.Module):
    """A layer with a parameter, a constant and a second input."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((8,), factor), requires_grad=False)
        self.factor = factor

    def forward(self, rows: Tensor, beside: Tensor) -> Tensor:
        rows = torch.ops.remora_test_calls.observed(rows)
        return rows * self.weight + beside * self.factor + rows.shape[0]


class Before(nn.Module):
    """Token ids and positions to the first layer's rows, and what else layers take."""

    def forward(self, token_ids_T: Tensor, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        rows = token_ids_T[:, None] * torch.arange(8) * 0.25
        return rows, positions_T[:, None] * torch.ones(8)


class After(nn.Module):
    """The last norm."""

    def forward(self, rows: Tensor) -> tuple[Tensor]:
        return (rows - rows.mean(-1, keepdim=True),)


def inputs(num_rows: int) -> tuple[Tensor, Tensor]:
    return torch.arange(num_rows) + 3, torch.arange(num_rows) * 2


@pytest.fixture(scope="module")
def step() -> Iterator[StepProgram]:
    """Two layers between two ends, compiled and recorded as an engine does it."""
    torch._dynamo.reset()
    layers = [Scaled(2.0), Scaled(5.0)]
    modules = [Before(), *layers, After()]
    options = {"cpp_wrapper": True}
    kinds = {
        kind: torch.compile(kind.forward, dynamic=True, fullgraph=True, options=options)
        for kind in map(type, modules)
    }
    recordings = [Recording(module) for module in modules]

    def call(index: int, num_rows: int, *args: Tensor) -> tuple[Tensor, ...]:
        module = modules[index]
        out = recordings[index].call(
            lambda *given: kinds[type(module)](module, *given), num_rows, args, {}
        )
        return (out,) if isinstance(out, Tensor) else out

    with torch.inference_mode():
        for num_rows in (5, 3):
            rows, beside = call(0, num_rows, *inputs(num_rows))
            for index in (1, 2):
                (rows,) = call(index, num_rows, rows, beside)
            call(3, num_rows, rows)
        programs = [recording.program() for recording in recordings]
        before, first, second, after = programs
        assert before and first and second and after
        yield StepProgram.of(before, [(first, (0, 1)), (second, (0, 1))], after, after)


def python_only(step: StepProgram) -> StepProgram:
    return StepProgram(step.before, step.layers, step.after, step.head, None)


@pytest.mark.parametrize("num_rows", [2, 3, 64])
def test_a_chain_gives_what_calls_from_python_give(step: StepProgram, num_rows: int) -> None:
    assert step.calls is not None
    seen_layers.clear()
    with torch.inference_mode():
        expected = python_only(step).run(*inputs(num_rows), cursor)
        found = step.run(*inputs(num_rows), cursor)
        again = step.run(*inputs(num_rows), cursor)
    assert torch.equal(found, expected) and torch.equal(again, expected)
    assert seen_layers == [0, 1] * 3  # whoever asks meanwhile is told which layer runs


def test_what_an_operator_raises_ends_the_chain(step: StepProgram) -> None:
    """And leaves it fit for the next step, with the interpreter's lock where it was."""
    assert step.calls is not None
    with torch.inference_mode():
        expected = step.run(*inputs(3), cursor)
        one = step.layers[0][0]
        chain = StepCalls()
        assert one.entry is not None
        add(chain, one, values={at: i for i, (at, _) in enumerate(one.tensors_at)})
        nothing = torch.full((3, 8), torch.nan)
        with pytest.raises(RuntimeError):
            chain.run([nothing, nothing], as_tensor(3), cursor)
        assert torch.equal(step.run(*inputs(3), cursor), expected)


def add(chain: StepCalls, program: Program, values: dict[int, int]) -> None:
    assert program.entry is not None
    chain.add(
        program.entry,
        len(program.constants),
        constants={i: x for i, x in enumerate(program.constants) if x is not None},
        rows_at=program.rows_at,
        values_at=values,
        outputs=(0,),
    )


def test_calls_whose_inputs_do_not_fit_are_refused(step: StepProgram) -> None:
    one = step.layers[0][0]
    places = {at: i for i, (at, _) in enumerate(one.tensors_at)}
    with pytest.raises(ValueError, match="nothing fills input"):
        add(StepCalls(), one, values=dict(list(places.items())[:1]))
    with pytest.raises(ValueError, match="filled twice"):
        add(StepCalls(), one, values=places | {one.rows_at[0]: 0})
    with pytest.raises(ValueError, match="is none"):
        add(StepCalls(), one, values=places | {99: 0})
    with pytest.raises(ValueError, match="0 calls"):
        StepCalls().run([torch.ones(2)], as_tensor(2), cursor)


def test_only_generated_code_has_an_entry() -> None:
    assert entry_of(torch._C.__file__) is None
