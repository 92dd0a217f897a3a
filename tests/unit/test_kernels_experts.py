"""Experts in slots: grouped linears against one expert at a time, loading, exporting, the gate."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from remora.kernels import native, reference
from remora.kernels.experts import PackedExperts
from remora.kernels.gates import SILU

DTYPES = [torch.float32, torch.bfloat16]
needs_native = pytest.mark.skipif(not native.native_available(), reason="C++ kernels not built")


def random_expert(experts: PackedExperts, seed: int) -> dict[str, Tensor]:
    """Tensors of one expert; expert and element decide the value, so a mix-up cannot look right."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(*shape, generator=generator).to(experts.dtype)
        for name, shape in experts.slot_shapes().items()
    }


def filled(
    num_slots: int, hidden: int, width: int, dtype: torch.dtype, **flags: bool
) -> tuple[PackedExperts, list[dict[str, Tensor]]]:
    """Experts with every slot loaded, and what was loaded."""
    experts = PackedExperts(
        num_slots, hidden_size=hidden, intermediate_size=width, dtype=dtype, exact=True, **flags
    )
    loaded = [random_expert(experts, slot) for slot in range(num_slots)]
    for slot, tensors in enumerate(loaded):
        experts.load_slot(slot, tensors)
    return experts, loaded


def offsets_of(*counts: int) -> Tensor:
    """[S + 1] from the rows of each slot."""
    return torch.tensor([0, *counts]).cumsum(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden,width", [(32, 16), (33, 7), (96, 40)])
@pytest.mark.parametrize("has_gate", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("is_transposed", [True, False])
def test_against_the_reference(
    path: str,
    dtype: torch.dtype,
    hidden: int,
    width: int,
    has_gate: bool,
    has_bias: bool,
    is_transposed: bool,
) -> None:
    flags = {"has_gate": has_gate, "has_bias": has_bias, "is_transposed": is_transposed}
    experts, loaded = filled(5, hidden, width, dtype, **flags)
    counts = (3, 0, 1, 9, 0)
    offsets = offsets_of(*counts)
    generator = torch.Generator().manual_seed(99)
    for name, apply in ((experts.up_name, experts.up), ("down_proj", experts.down)):
        weights = torch.stack([tensors[name] for tensors in loaded])
        weights = weights.transpose(1, 2) if is_transposed else weights
        bias = torch.stack([t[f"{name}_bias"] for t in loaded]) if has_bias else None
        x = torch.randn(sum(counts) + 2, weights.shape[2], generator=generator).to(dtype)
        y = apply(x, offsets)
        expected = reference.grouped_linear(x, weights, bias, offsets)
        assert y.dtype == dtype and y.shape == expected.shape
        assert (y[sum(counts) :] == 0).all()  # padding
        for slot in range(5):
            run = slice(int(offsets[slot]), int(offsets[slot + 1]))
            bound = reference.linear_error_bound(
                x[run], weights[slot], None if bias is None else bias[slot], dtype
            )
            assert ((y[run].double() - expected[run]).abs() <= bound).all()
        assert torch.equal(apply(x, offsets.int()), y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_depends_on_itself_and_its_expert_only(
    path: str, threads: int, dtype: torch.dtype
) -> None:
    experts, _ = filled(4, 256, 96, dtype)
    generator = torch.Generator().manual_seed(threads)
    x = torch.randn(120, 256, generator=generator).to(dtype)
    alone = torch.stack(
        [experts.up(x, offsets_of(*(120 * (slot == s) for slot in range(4)))) for s in range(4)]
    )
    for _ in range(20 // threads**2):  # the second thread waits for a busy machine's other core
        slot_of_row, _order = torch.randint(0, 4, (70,), generator=generator).sort()
        rows = torch.randperm(120, generator=generator)[:70]
        offsets = offsets_of(*torch.bincount(slot_of_row, minlength=4).tolist())
        assert torch.equal(experts.up(x[rows], offsets), alone[slot_of_row, rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_transposed", [True, False])
def test_export_gives_back_every_bit(path: str, dtype: torch.dtype, is_transposed: bool) -> None:
    experts, loaded = filled(3, 33, 9, dtype, has_bias=True, is_transposed=is_transposed)
    for slot, tensors in enumerate(loaded):
        exported = experts.export_slot(slot)
        assert list(exported) == sorted(tensors)
        for name, tensor in exported.items():
            assert tensor.is_contiguous() and torch.equal(tensor, tensors[name])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_transposed", [True, False])
def test_a_slot_holds_what_was_loaded_and_nothing_else(
    path: str, dtype: torch.dtype, is_transposed: bool
) -> None:
    experts, loaded = filled(3, 33, 9, dtype, has_bias=True, is_transposed=is_transposed)
    assert [experts.holds(slot, loaded[slot]) for slot in range(3)] == [True] * 3
    assert not experts.holds(1, loaded[2])
    for name, tensor in loaded[1].items():
        other = tensor.clone()
        other.view(-1)[-1].neg_()  # the sign of one value
        assert not experts.holds(1, {**loaded[1], name: other}), name
    experts.slot_parts(1)[0][0] ^= 1
    assert not experts.holds(1, loaded[1])


def test_a_slot_is_replaced_and_cleared(path: str) -> None:
    experts, loaded = filled(3, 32, 16, torch.float32)
    x = torch.randn(6, 32)
    offsets = offsets_of(2, 2, 2)
    before = experts.up(x, offsets)
    experts.load_slot(1, loaded[0])
    after = experts.up(x, offsets)
    assert torch.equal(after[:2], before[:2]) and torch.equal(after[4:], before[4:])
    assert torch.equal(after[2:4], experts.up(x[2:4], offsets_of(2, 0, 0)))
    experts.clear_slot(1)
    assert experts.loaded_slots == {0, 2}
    with pytest.raises(AssertionError, match=r"slot 1 is empty; loaded: \[0, 2\]"):
        experts.export_slot(1)


def test_wrong_tensors_are_refused_by_name(path: str) -> None:
    experts = PackedExperts(2, hidden_size=8, intermediate_size=4, dtype=torch.float32)
    good = random_expert(experts, 0)
    with pytest.raises(ValueError, match=r"\['down_proj', 'gate_up_proj'\], got \['down_proj'\]"):
        experts.load_slot(0, {"down_proj": good["down_proj"]})
    with pytest.raises(ValueError, match=r"gate_up_proj must be \[8, 8\]"):
        experts.load_slot(0, {**good, "gate_up_proj": torch.zeros(8, 9)})
    with pytest.raises(ValueError, match=r"down_proj must be .* got \[8, 4\] torch.bfloat16"):
        experts.load_slot(0, {**good, "down_proj": good["down_proj"].bfloat16()})
    assert experts.loaded_slots == frozenset()
    with pytest.raises(ValueError, match="0 slots"):
        PackedExperts(0, hidden_size=8, intermediate_size=4, dtype=torch.float32)


@needs_native
@pytest.mark.parametrize("offsets", [[0, 3, 2], [1, 2, 3], [0, 1, 9], [0, 1]])
def test_wrong_offsets_are_refused(offsets: list[int]) -> None:
    experts, _ = filled(2, 8, 4, torch.float32)
    with pytest.raises(RuntimeError, match="offsets"):
        experts.up(torch.zeros(3, 8), torch.tensor(offsets))


def test_no_rows(path: str) -> None:
    experts, _ = filled(2, 8, 4, torch.float32)
    assert experts.up(torch.zeros(0, 8), offsets_of(0, 0)).shape == (0, 8)


@needs_native
def test_the_ops_describe_themselves_truly() -> None:
    checks = ("test_schema", "test_faketensor")
    packed = torch.randn(2, 24 * 48)
    args = (torch.randn(5, 24), packed, torch.randn(2, 40), offsets_of(2, 3), 40)
    torch.library.opcheck(torch.ops.remora.grouped_linear.default, args, test_utils=checks)


@needs_native
def test_a_whole_expert_agrees_with_torch() -> None:
    experts, loaded = filled(3, 64, 32, torch.float32)
    x = torch.randn(12, 64, generator=torch.Generator().manual_seed(1))
    offsets = offsets_of(5, 0, 7)
    y = experts.down(SILU.apply(experts.up(x, offsets)), offsets)
    for slot, rows in ((0, slice(0, 5)), (2, slice(5, 12))):
        gate, up = F.linear(x[rows], loaded[slot]["gate_up_proj"]).chunk(2, dim=-1)
        expected = F.linear(F.silu(gate) * up, loaded[slot]["down_proj"])
        torch.testing.assert_close(y[rows], expected, rtol=1e-4, atol=1e-2)
