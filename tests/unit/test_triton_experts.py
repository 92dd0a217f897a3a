"""Expert layers for GPUs under Triton's interpreter, against one pair at a time in float64.

The interpreter multiplies bfloat16 wrongly: float16 stands for it, but with `row_by_row_dot`.
"""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.triton_dot import row_by_row_dot
from torch import Tensor

from remora.kernels import reference_experts, triton_experts
from remora.kernels.gates import SILU, Gate
from remora.kernels.gpu_experts import CombineMode, GpuExperts, quantise_int8

pytest.importorskip("triton")
# numpy says so where exp overflows to infinity, which the kernels count on.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")

CPU = torch.device("cpu")
# Of the largest element: single ones may cancel.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
RIGHT = [torch.float32, torch.float16]  # by the interpreter's own dot
GATES = {
    "silu": SILU,
    "gelu": Gate(activation="gelu"),
    "gelu_tanh": Gate(activation="gelu_tanh"),
    "relu2_no_gate": Gate(activation="relu2", layout="none", gate_max=1.0),
    "relu": Gate(activation="relu"),
    "gpt_oss": Gate(alpha=1.702, gate_max=1.0, up_max=1.0, up_shift=1.0, layout="interleaved"),
    "clamped_after": Gate(act_max=0.5, up_max=0.5),
}


def filled(
    gate: Gate | Callable[[Tensor], Tensor],
    *,
    num_slots: int = 5,
    hidden: int = 37,
    width: int = 21,
    dtype: torch.dtype = torch.float32,
    **flags: object,
) -> tuple[GpuExperts, dict[int, dict[str, Tensor]]]:
    """Experts with every slot loaded, and what they compute with."""
    experts = GpuExperts(
        num_slots,
        hidden_size=hidden,
        intermediate_size=width,
        dtype=dtype,
        device=CPU,
        gate=gate,
        has_gate=gate.columns == 2 if isinstance(gate, Gate) else True,
        **flags,  # type: ignore[arg-type]
    )
    for slot in range(num_slots):
        generator = torch.Generator().manual_seed(slot)
        tensors = {
            name: (torch.randn(shape, generator=generator) / 4).to(dtype)
            for name, shape in experts.slot_shapes().items()
        }
        experts.load_slot(slot, tensors)
        if not experts.int8:
            exported = experts.export_slot(slot)
            assert list(exported) == sorted(tensors)
            assert all(torch.equal(exported[name], tensors[name]) for name in tensors)
    return experts, {slot: experts.export_slot(slot) for slot in range(num_slots)}


def check(
    experts: GpuExperts,
    slots: dict[int, dict[str, Tensor]],
    gate: Gate,
    pairs: list[tuple[int, int]],
    num_rows: int,
    mode: CombineMode,
) -> None:
    """A call against the twin; pairs are (row, slot)."""
    generator = torch.Generator().manual_seed(len(pairs))
    rows_MD = torch.randn((num_rows, experts.hidden_size), generator=generator).to(experts.dtype)
    weights_N = torch.rand(len(pairs), generator=generator)
    row = [r for r, _ in pairs]
    slot = [s for _, s in pairs]
    pair_row_N, pair_slot_N = torch.tensor([row, slot], dtype=torch.int64)
    found = experts.forward(rows_MD, pair_row_N, pair_slot_N, weights_N, mode)
    again = experts.forward(rows_MD, pair_row_N, pair_slot_N, weights_N, mode)
    assert torch.equal(found, again)
    expected = reference_experts.expert_layer(
        rows_MD, row, slot, slots, gate, is_transposed=experts.is_transposed
    )
    if mode == "presummed":
        expected = reference_experts.presummed(expected, row, weights_N.tolist(), num_rows)
    assert found.dtype == experts.dtype and found.shape == expected.shape
    bound = TOLERANCE[experts.dtype] * expected.abs().max().clamp(min=1e-3)
    assert ((found.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype", RIGHT, ids=["fp32", "fp16"])
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias_transposed"])
@pytest.mark.parametrize("name", GATES)
def test_every_gate(name: str, has_bias: bool, dtype: torch.dtype) -> None:
    gate = GATES[name]
    experts, slots = filled(gate, dtype=dtype, has_bias=has_bias, is_transposed=has_bias)
    pairs = [(n % 9, (n * n) % 5) for n in range(30)]
    check(experts, slots, gate, pairs, 9, "presummed" if has_bias else "ordered")


@settings(max_examples=12)
@given(data=st.data())
def test_random_shapes(data: st.DataObject) -> None:
    """Sizes around the tiles, slots without rows, rows without pairs, pairs of nothing."""
    hidden = data.draw(st.sampled_from([16, 63, 65, 130]))
    width = data.draw(st.sampled_from([1, 15, 64, 65, 96]))
    num_slots = data.draw(st.sampled_from([1, 2, 7]))
    num_rows = data.draw(st.sampled_from([1, 5, 40]))
    gate = data.draw(st.sampled_from(list(GATES.values())))
    pair = st.tuples(st.integers(-1, num_rows - 1), st.integers(-1, num_slots - 1))
    pairs = data.draw(st.lists(pair, min_size=1, max_size=80))
    mode: CombineMode = data.draw(st.sampled_from(["ordered", "presummed"]))
    experts, slots = filled(
        gate,
        num_slots=num_slots,
        hidden=hidden,
        width=width,
        dtype=data.draw(st.sampled_from(RIGHT)),
        exact=data.draw(st.booleans()),
        int8=data.draw(st.booleans()),
    )
    check(experts, slots, gate, pairs, num_rows, mode)


@pytest.mark.parametrize("pairs_per_slot", [3, 20, 70, 130])
def test_every_tile(pairs_per_slot: int) -> None:
    """Each line of the table, with a last tile that is not full."""
    experts, slots = filled(SILU, num_slots=2, dtype=torch.float16)
    pairs = [(n % 11, n % 2) for n in range(2 * pairs_per_slot)]
    limits = [limit for limit, _ in triton_experts.FAST_TILES]
    assert any(
        low < pairs_per_slot <= high for low, high in zip([0, *limits], limits, strict=False)
    )
    check(experts, slots, SILU, pairs, 11, "presummed")


def test_nothing_to_do() -> None:
    experts, _ = filled(SILU)
    none, rows = torch.zeros(0, dtype=torch.int64), torch.ones(3, 37)
    assert experts.forward(rows, none, none, torch.zeros(0), "ordered").shape == (0, 37)
    assert not experts.forward(rows, none, none, torch.zeros(0), "presummed").any()
    empty = torch.tensor([-1, -1])
    out = experts.forward(rows[:0], empty, empty, torch.ones(2), "ordered")
    assert torch.equal(out, torch.zeros(2, 37))
    out = experts.forward(rows, torch.tensor([0, 2]), empty, torch.ones(2), "ordered")
    assert torch.equal(out, torch.zeros(2, 37))


def test_bfloat16() -> None:
    with row_by_row_dot():
        experts, slots = filled(SILU, dtype=torch.bfloat16, has_bias=True)
        check(experts, slots, SILU, [(n % 9, n % 5) for n in range(20)], 9, "presummed")


@pytest.mark.parametrize(
    ("dtype", "mode"),
    [(torch.float32, "presummed"), (torch.float16, "presummed"), (torch.bfloat16, "ordered")],
)
def test_exact_rows_do_not_know_each_other(dtype: torch.dtype, mode: CombineMode) -> None:
    """A row's bits alone, among few and among many, wherever it stands."""
    experts, _ = filled(SILU, num_slots=2, hidden=70, width=66, dtype=dtype, exact=True)
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn((90, 70), generator=generator).to(dtype)
    slot_90 = torch.randint(0, 2, (90,), generator=generator)
    weights = torch.rand(90, generator=generator)

    def outputs(index: Tensor) -> Tensor:
        own = torch.arange(index.numel())
        return experts.forward(rows[index], own, slot_90[index], weights[index], mode)

    with row_by_row_dot():
        everything = outputs(torch.arange(90))
        for size in (1, 17):
            index = torch.randperm(90, generator=generator)[:size]
            assert torch.equal(outputs(index), everything[index]), size


def test_int8_is_what_was_rounded() -> None:
    """Half a scale off at most; the kernels compute with what `export_slot` says."""
    weight = torch.randn(6, 40) * torch.tensor([1e-3, 1, 0, 5, 1e4, 1])[:, None]
    quantised, scale = quantise_int8(weight)
    error = (quantised.float() * scale[:, None] - weight).abs()
    assert (error <= scale[:, None] * 0.5001).all()
    assert quantised.abs().amax(dim=1).tolist() == [127, 127, 0, 127, 127, 127]
    bf16 = GpuExperts(
        4, hidden_size=64, intermediate_size=64, dtype=torch.bfloat16, device=CPU, gate=SILU
    )
    int8, slots = filled(SILU, hidden=64, width=64, int8=True, num_slots=4)
    assert int8.weight_nbytes < 0.6 * bf16.weight_nbytes
    check(int8, slots, SILU, [(n % 3, n % 4) for n in range(20)], 3, "presummed")


def test_a_models_own_gate_and_norm() -> None:
    """What no fused form covers is called between and after the projections."""
    odd = Gate(activation="gelu", gate_max=0.7)
    fused, _ = filled(odd)

    def twice(out_ND: Tensor) -> Tensor:
        return out_ND * 2 + 1

    unfused, slots = filled(odd.apply, post=twice)
    check(fused, slots, odd, [(0, 1), (1, 4), (1, 1)], 2, "ordered")
    rows, weights = torch.randn(3, 37), torch.rand(4)
    row, slot = torch.tensor([0, 2, 2, 1]), torch.tensor([1, 0, 4, -1])
    plain = fused.forward(rows, row, slot, weights, "ordered")
    own = unfused.forward(rows, row, slot, weights, "ordered")
    torch.testing.assert_close(own[:3], twice(plain[:3]))
    assert not own[3].any()
    summed = unfused.forward(rows, row, slot, weights, "presummed")
    expected = reference_experts.presummed(own, row.tolist(), weights.tolist(), 3)
    torch.testing.assert_close(summed.double(), expected, rtol=1e-5, atol=1e-5)


def test_slots_are_exchanged() -> None:
    gate = Gate(layout="interleaved")
    experts, slots = filled(gate)
    experts.load_slot(1, slots[3])
    assert all(torch.equal(t, slots[3][name]) for name, t in experts.export_slot(1).items())
    check(experts, {**slots, 1: slots[3]}, gate, [(0, 1), (0, 2)], 1, "ordered")
    experts.clear_slot(1)
    assert experts.loaded_slots == {0, 2, 3, 4}
    with pytest.raises(AssertionError, match="slot 1 is empty"):
        experts.export_slot(1)


def test_refuses() -> None:
    experts, slots = filled(SILU)
    with pytest.raises(ValueError, match="down_proj must be"):
        experts.load_slot(0, {**slots[0], "down_proj": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="an expert has tensors"):
        experts.load_slot(0, {})
    for wrong, message in (
        ({"num_slots": 0}, "sizes >= 1"),
        ({"dtype": torch.float64}, "float64"),
        ({"gate": Gate(layout="none")}, "has_gate is True"),
    ):
        arguments = {"num_slots": 1, "dtype": torch.float32, "gate": SILU, **wrong}
        with pytest.raises(ValueError, match=message):
            GpuExperts(hidden_size=8, intermediate_size=8, device=CPU, **arguments)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="sees no GPU"):
        GpuExperts(
            1,
            hidden_size=8,
            intermediate_size=8,
            dtype=torch.float32,
            device=torch.device("cuda"),
            gate=SILU,
        )
