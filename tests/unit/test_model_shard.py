"""The expert side: what `transformers`' own experts give, slot by slot."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import make_checkpoint
from support.local_engine import reference_model
from torch import Tensor

from remora.actors.manifest import digest_expert
from remora.actors.model_spec import ModelSpec, inspect_model
from remora.actors.shard_build import build_shard
from remora.actors.shard_model import ShardExperts
from remora.comm.errors import WeightsError
from remora.kernels.experts import PackedExperts
from remora.kernels.experts_dtype import ExpertsDtype

ALL = range(8)


def load(
    path: Path, experts: Any = ALL, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[ModelSpec, ShardExperts]:
    spec = inspect_model(path)
    wanted = {layer: list(experts) for layer in spec.moe_layers}
    return spec, build_shard(path, spec, wanted, dtype=dtype, exact=True, **options)


def routing(num_rows: int, top_k: int) -> tuple[Tensor, Tensor]:
    """Experts [T, K] without repetition in a row, and weights."""
    generator = torch.Generator().manual_seed(3)
    index = torch.stack([torch.randperm(8, generator=generator)[:top_k] for _ in range(num_rows)])
    return index, torch.rand((num_rows, top_k), generator=generator)


def as_pairs(index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = torch.arange(len(index))[:, None].expand_as(index)
    return rows.flatten(), index.flatten(), weights.flatten()


@pytest.mark.parametrize("layout", ["hub", "fused"])
@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss", "granitemoe", "phimoe"])
def test_outputs_are_those_of_transformers(architecture: str, layout: Any, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, architecture, layout=layout)
    theirs = dict(reference_model(path, torch.float32).named_modules())
    spec, shard = load(path)
    x = torch.randn((33, spec.hidden_size), generator=torch.Generator().manual_seed(1))
    index, weights = routing(33, spec.top_k)
    row, expert, weight = as_pairs(index, weights)
    for layer in spec.moe_layers:
        experts: Any = next(
            m for n, m in theirs.items() if n.endswith("experts") and f".{layer}." in n
        )
        with torch.no_grad():
            expected = experts(x, index, weights)
        presummed = shard.forward(layer, x, row, expert, weight, "presummed")
        torch.testing.assert_close(presummed, expected, atol=1e-4, rtol=1e-4)
        ordered = shard.forward(layer, x, row, expert, weight, "ordered")
        assert ordered.shape == (row.numel(), spec.hidden_size)
        summed = (ordered * weight[:, None]).view(*index.shape, -1).sum(1)
        torch.testing.assert_close(summed, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss"])
def test_a_pair_does_not_know_the_others(
    architecture: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    spec, shard = load(make_checkpoint(tmp_path, architecture), dtype=dtype)
    layer = spec.moe_layers[0]
    x = torch.randn((100, spec.hidden_size)).to(dtype)
    row, expert, weight = as_pairs(*routing(100, 3))
    together = shard.forward(layer, x, row, expert, weight, "ordered")
    for picked in (torch.tensor([7]), torch.arange(20, 51), torch.randperm(300)[:150]):
        some = shard.forward(layer, x, row[picked], expert[picked], weight[picked], "ordered")
        assert torch.equal(some, together[picked])


def test_only_what_it_holds(tmp_path: Path) -> None:
    spec, shard = load(make_checkpoint(tmp_path, "qwen3_moe"), experts=[6, 1, 3])
    assert shard.state.layers == spec.moe_layers == (0, 2)
    assert shard.state.experts_of(0) == (6, 1, 3)
    assert shard.state.experts_of(1) == ()
    assert shard.state.not_mine(0, [1, 6, 2, 2, 0]) == [0, 2]
    assert shard.state.not_mine(1, [1]) == [1]
    x = torch.randn((2, spec.hidden_size))
    one = torch.tensor([1])
    with pytest.raises(AssertionError, match=r"layer 0: experts \[2\] are not held"):
        shard.forward(0, x, one, torch.tensor([2]), torch.ones(1), "ordered")
    whole = load(make_checkpoint(tmp_path / "again", "qwen3_moe"))[1]
    assert torch.equal(
        shard.forward(0, x, one, one, torch.ones(1), "ordered"),
        whole.forward(0, x, one, one, torch.ones(1), "ordered"),
    )


def test_a_call_without_pairs(tmp_path: Path) -> None:
    spec, shard = load(make_checkpoint(tmp_path, "mixtral"))
    x, none = torch.randn((3, spec.hidden_size)), torch.zeros(0, dtype=torch.int64)
    assert shard.forward(0, x, none, none, torch.zeros(0), "ordered").shape == (0, spec.hidden_size)
    assert torch.equal(
        shard.forward(0, x, none, none, torch.zeros(0), "presummed"), torch.zeros_like(x)
    )


def test_a_slot_that_does_not_hold_what_was_read_fails_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = PackedExperts.load_slot

    def flipped(self: PackedExperts, slot: int, tensors: Any) -> None:
        write(self, slot, tensors)
        if slot == 2:
            self.slot_parts(slot)[-1][5] ^= 1

    monkeypatch.setattr(PackedExperts, "load_slot", flipped)
    with pytest.raises(WeightsError, match=r"expert 3: slot 2 holds .* which was read"):
        load(make_checkpoint(tmp_path, "mixtral"), experts=[6, 1, 3])


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
def test_experts_move_between_shards_bit_for_bit(architecture: str, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, architecture)
    spec, left = load(path, experts=[0, 1, 2, 3], num_slots=6)
    _, right = load(path, experts=[4, 5, 6, 7])
    x, row = torch.randn((1, spec.hidden_size)), torch.tensor([0])
    expected = right.forward(1, x, row, torch.tensor([6]), torch.ones(1), "ordered")
    tensors = right.reader.read(1, 6)
    held = right.manifest.by_expert()[1, 6]
    assert digest_expert(1, 6, tensors) == held
    assert left.state.free_slots(1) == [4, 5]
    assert left.fill_slot(1, 6, 5, tensors) == held
    assert left.state.not_mine(1, [6]) == [6], "filled, and not published yet"
    assert left.settle(5, held, held.digest)
    assert left.state.free_slots(1) == [4]
    assert not left.settle(4, held, "another digest")
    assert (left.state.free_slots(1), left.state.room(1)) == ([], 5)
    assert left.state.experts_of(1) == (0, 1, 2, 3, 6)
    assert left.manifest.by_expert()[1, 6] == held
    moved = left.forward(1, x, row, torch.tensor([6]), torch.ones(1), "ordered")
    assert torch.equal(moved, expected)
    with pytest.raises(AssertionError, match="slot 5 is not free"):
        left.fill_slot(1, 5, 5, right.reader.read(1, 5))
    right.drop_expert(1, 6)
    assert right.state.not_mine(1, [6, 7]) == [6]
    assert (1, 6) not in right.manifest.by_expert()


def copied(source: ShardExperts, layout: str, memory: list[memoryview]) -> bool:
    """Layer 1 expert 6 of another shard, byte by byte."""
    found = source.held_memory(1, 6)
    assert found is not None and found[0] == layout and len(found[1]) == len(memory)
    for to, part in zip(memory, found[1], strict=True):
        to[:] = part
    return True


@pytest.mark.parametrize(("kind", "near"), [("int8", 0.02), ("int4", 0.25)])
@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
def test_quantised_experts_are_near_and_move_bit_for_bit(
    architecture: str, kind: ExpertsDtype, near: float, tmp_path: Path
) -> None:
    path = make_checkpoint(tmp_path, architecture)
    spec, left = load(path, experts=[0, 1], num_slots=4, dtype=torch.bfloat16, experts_dtype=kind)
    _, right = load(path, experts=[6], dtype=torch.bfloat16, experts_dtype=kind)
    _, whole = load(path, dtype=torch.bfloat16)
    held = right.manifest.by_expert()[1, 6]
    assert right.manifest.dtype == kind
    assert left.copy_slot(1, 6, 3, lambda layout, to: copied(right, layout, to)) == held
    assert left.settle(3, held, held.digest)
    assert right.nbytes == len(spec.moe_layers) * spec.expert_nbytes(torch.bfloat16, kind)
    x, row = torch.randn((9, spec.hidden_size)).bfloat16(), torch.arange(9)
    pairs = row, torch.full((9,), 6), torch.ones(9)
    moved = left.forward(1, x, *pairs, "ordered")
    assert torch.equal(moved, right.forward(1, x, *pairs, "ordered"))
    exact = whole.forward(1, x, *pairs, "ordered").float()
    assert (moved.float() - exact).norm() < near * exact.norm()


def test_bytes_are_those_of_its_slots(tmp_path: Path) -> None:
    spec, shard = load(make_checkpoint(tmp_path, "mixtral"), experts=[2, 5])
    assert shard.nbytes == 2 * len(spec.moe_layers) * spec.expert_nbytes(torch.float32)
