"""Gates: every activation, layout and clamp against the slow twin, element by element."""

import dataclasses
import itertools
import math

import pytest
import torch

from remora.kernels import native, reference
from remora.kernels.gates import ACTIVATIONS, LAYOUTS, SILU, Gate

DTYPES = [torch.float32, torch.bfloat16]
CLAMPED = {"gate_max": 7.0, "up_max": 6.5, "up_shift": 1.0, "alpha": 1.702}
GATES = [
    *(Gate(activation=a, layout=y) for a, y in itertools.product(ACTIVATIONS, LAYOUTS)),
    *(Gate(layout=layout, **CLAMPED) for layout in LAYOUTS),
    Gate(act_max=2.0, up_max=2.0),
]


def random_rows(gate: Gate, width: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(23, gate.columns * width, generator=generator) * 6).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", GATES, ids=str)
def test_against_the_reference(path: str, gate: Gate, dtype: torch.dtype) -> None:
    up = random_rows(gate, 53, dtype)
    out = gate.apply(up)
    expected = reference.expert_gate(gate, up)
    assert out.dtype == dtype and out.shape == (23, 53)
    # gelu takes 1 + erf in float32: what is left of it far below zero is rounding.
    floor = 2e-6 * (1 + up.double().abs().max()) ** 2
    tolerance = 3 * torch.finfo(dtype).eps * expected.abs() + floor
    assert ((out.double() - expected).abs() <= tolerance).all()
    assert torch.equal(gate.apply(up.view(1, 23, -1)), out[None])


@pytest.mark.parametrize("gate", GATES, ids=str)
def test_where_a_row_or_an_element_stands_does_not_matter(path: str, gate: Gate) -> None:
    up = random_rows(gate, 53, torch.bfloat16)
    out = gate.apply(up)
    for start in range(0, 18, 3):
        assert torch.equal(gate.apply(up[start : start + 5]), out[start : start + 5])
    if path == "native":
        columns = torch.arange(20, 40)
        if gate.layout == "concatenated":
            picked = torch.cat([columns, columns + 53])
        elif gate.layout == "interleaved":
            picked = torch.stack([2 * columns, 2 * columns + 1], 1).flatten()
        else:
            picked = columns
        assert torch.equal(gate.apply(up[:, picked]), out[:, columns])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", [SILU, Gate(alpha=1.702, up_shift=1.0)], ids=str)
def test_how_gates_and_ups_lie_changes_no_bit(path: str, gate: Gate, dtype: torch.dtype) -> None:
    up = random_rows(gate, 300, dtype)
    in_turn = torch.stack(up.chunk(2, dim=1), dim=2).flatten(1)
    other = dataclasses.replace(gate, layout="interleaved")
    assert torch.equal(gate.apply(up), other.apply(in_turn))


def test_long_rows_go_through_in_pieces(path: str) -> None:
    up = torch.randn(3, 2 * 1000, generator=torch.Generator().manual_seed(2))
    expected = reference.expert_gate(SILU, up)
    torch.testing.assert_close(SILU.apply(up).double(), expected, rtol=1e-6, atol=1e-6)


def test_silu_at_the_ends(path: str) -> None:
    gate = torch.tensor([[0.0, 100.0, -100.0, 3e38, math.inf, math.nan]])
    out = SILU.apply(torch.cat([gate, torch.ones_like(gate)], dim=1))[0]
    assert out[:2].tolist() == [0.0, 100.0] and abs(out[2]) < 1e-30
    assert out[3] == gate[0, 3] and out[4].isinf() and out[5].isnan()
    limited = Gate(gate_max=7.0, up_max=7.0).apply(torch.full((1, 2), math.nan))
    assert limited.isnan().all()


@pytest.mark.skipif(not native.native_available(), reason="C++ kernels not built")
def test_the_op_describes_itself_truly() -> None:
    checks = ("test_schema", "test_faketensor")
    for gate in (SILU, Gate(layout="none")):
        args = (torch.randn(5, 24), 0, LAYOUTS.index(gate.layout), gate.numbers)
        torch.library.opcheck(torch.ops.remora.expert_gate.default, args, test_utils=checks)
    with pytest.raises(RuntimeError, match="no such gate"):
        torch.ops.remora.expert_gate(torch.randn(5, 24), 9, 0, SILU.numbers)
