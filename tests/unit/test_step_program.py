"""Compiled layers called without guards: the same results, and guards where steps do not agree."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import make_checkpoint
from support.local_engine import LocalEngine
from torch import Tensor, nn

from remora.actors.layer_program import Recording
from remora.actors.merge_linears import MergeLinears
from remora.actors.model_spec import inspect_model
from remora.actors.step_program import split
from remora.actors.warm import compile_and_warm
from remora.kernels.linear import PackedLinear
from remora.kernels.native import native_available

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++")


class Scaled(nn.Module):
    """A layer with a parameter, a constant and a keyword."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((8,), factor), requires_grad=False)
        self.factor = factor

    def forward(self, rows: Tensor, *, pair: tuple[Tensor, Tensor]) -> Tensor:
        return rows * self.weight + pair[1] * self.factor - pair[0]


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, dynamic=True, fullgraph=True, **options)


def inputs(num_rows: int) -> tuple[Tensor, dict[str, Any]]:
    generator = torch.Generator().manual_seed(num_rows)
    rows, a, b = (torch.randn(num_rows, 8, generator=generator) for _ in range(3))
    return rows, {"pair": (a, b)}


@pytest.mark.parametrize("cpp_wrapper", [False, True])
def test_a_program_finds_its_tensors_again(cpp_wrapper: bool) -> None:
    """Around code in C++ it gives numbers as tensors: those of a layer are made once."""
    layer = Scaled(3.0)
    run = compiled(layer.forward, options={"cpp_wrapper": cpp_wrapper})
    recording = Recording(layer)
    with torch.inference_mode():
        for num_rows in (5, 3, 11):
            rows, kwargs = inputs(num_rows)
            recording.call(run, num_rows, (rows,), kwargs)
        program = recording.program()
        assert program is not None and program.wants_tensors == cpp_wrapper
        for num_rows in (2, 5, 64):
            rows, kwargs = inputs(num_rows)
            out = program.run(num_rows, (rows,), kwargs)[0]
            torch.testing.assert_close(out, layer(rows, **kwargs))


def test_each_layer_keeps_its_own_parameters() -> None:
    layers = [Scaled(2.0), Scaled(5.0)]
    run = compiled(Scaled.forward)
    programs = []
    with torch.inference_mode():
        for layer in layers:
            recording = Recording(layer)
            for num_rows in (5, 3):
                rows, kwargs = inputs(num_rows)
                recording.call(
                    lambda *a, _l=layer, **k: run(_l, *a, **k), num_rows, (rows,), kwargs
                )
            programs.append(recording.program())
        rows, kwargs = inputs(7)
        for layer, program in zip(layers, programs, strict=True):
            assert program is not None
            torch.testing.assert_close(program.run(7, (rows,), kwargs)[0], layer(rows, **kwargs))


def test_steps_that_run_different_code_keep_their_guards() -> None:
    def branches(rows: Tensor) -> Tensor:
        return rows * 2 if rows.shape[0] > 4 else rows - 1

    run = compiled(branches)
    recording = Recording(nn.Module())
    with torch.inference_mode():
        for num_rows in (5, 3):
            recording.call(run, num_rows, (torch.ones(num_rows, 8),), {})
    assert recording.program() is None


def test_what_is_neither_parameter_nor_argument_keeps_guards() -> None:
    beside = torch.ones(8)
    run = compiled(lambda rows: rows + beside)
    recording = Recording(nn.Module())
    with torch.inference_mode():
        for num_rows in (5, 3):
            recording.call(run, num_rows, (torch.ones(num_rows, 8),), {})
    assert recording.program() is None


def test_a_result_that_wrappers_change_keeps_guards() -> None:
    run = compiled(lambda rows: (rows + 1, rows))
    recording = Recording(nn.Module())
    with torch.inference_mode():
        for num_rows in (5, 3):
            recording.call(run, num_rows, (torch.ones(num_rows, 8),), {})
    assert recording.program() is None


def test_a_model_with_something_between_its_layers_is_not_taken_apart() -> None:
    layers = [nn.Identity(), nn.Identity()]

    def forward(token_ids_T: Tensor, positions_T: Tensor) -> Tensor:
        rows = token_ids_T[None, :, None] * 1.0
        return (layers[1](layers[0](rows) + 1)[0] + positions_T[:, None])[:, :]

    assert split(forward, lambda rows: rows, layers, [], {}) is None


@pytest.mark.parametrize(
    "architecture", ["gpt_oss", pytest.param("deepseek_v3", marks=pytest.mark.long)]
)
def test_steps_without_guards_give_what_guarded_ones_do(tmp_path: Path, architecture: str) -> None:
    """Windows and sinks that alternate; a dense first layer, and latent attention."""
    path = make_checkpoint(tmp_path, architecture)
    engine = LocalEngine.load(path, dtype=torch.float32, exact=False)
    assert engine.dense.spec == inspect_model(path)
    tokens = torch.randint(0, 60, (4, 37), generator=torch.Generator().manual_seed(4))
    torch._dynamo.reset()
    engine.dense.compile()
    guarded = engine.forced(tokens)
    engine.dense.use_eager()
    compile_and_warm(engine.dense, exact=False)
    assert all(layer.program is not None for layer in engine.dense.layers)
    assert engine.dense.has_program
    assert not native_available() or engine.dense._program.calls is not None
    for picked in (tokens, tokens[:1, :11], tokens[:2, :3]):
        direct = engine.forced(picked)
        torch.testing.assert_close(
            direct, guarded[: len(picked), : picked.shape[1]], atol=1e-4, rtol=1e-4
        )


@pytest.mark.skipif(not native_available(), reason="the torch path has no merged linears")
@pytest.mark.parametrize(
    "count,merged", [(1, []), (2, [2]), (3, [3]), (4, [2, 2]), (5, [3, 2]), (7, [3, 2, 2])]
)
def test_linears_of_the_same_rows_become_one_call(count: int, merged: list[int]) -> None:
    weights = [torch.randn(8 * (i + 1), 16) for i in range(count)]
    layers = nn.ModuleList(PackedLinear.pack(weight) for weight in weights)
    other = PackedLinear.pack(torch.randn(24, 16))

    def forward(module: nn.ModuleList, rows: Tensor) -> list[Tensor]:
        return [*(layer(rows) for layer in module), other(rows + 1)]

    seen: list[str] = []

    class Watch(MergeLinears):
        def __call__(self, graph: torch.fx.Graph) -> None:
            super().__call__(graph)
            seen.extend(n.target.name() for n in graph.nodes if hasattr(n.target, "name"))

        def uuid(self) -> None:  # not to be cached
            return None

    run = compiled(forward, options={"post_grad_custom_pre_pass": Watch()})
    rows = torch.randn(5, 16)
    with torch.inference_mode():
        assert all(map(torch.equal, run(layers, rows), forward(layers, rows)))
    names = [f"remora::packed_linear_{size}" for size in merged]
    assert sorted(n for n in seen if n.startswith("remora::packed_linear_")) == sorted(names)
    assert seen.count("remora::packed_linear") == (2 if count == 1 else 1)
