"""Who computes on which device: the choice, a whole shard on a pretended GPU, and no Triton."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.checkpoints import make_checkpoint

from remora.actors.model_spec import inspect_model
from remora.actors.nccl_expert import SlotExperts
from remora.actors.shard_build import build_shard
from remora.actors.shard_model import ShardExperts
from remora.kernels.attention import KVPages
from remora.kernels.device import CPU, INTERPRETED_GPU, implementation_of, make_pages
from remora.kernels.gpu_pages import GpuKVPages


def test_choice() -> None:
    assert implementation_of(CPU) in ("native", "torch")
    assert implementation_of(torch.device("cuda")) == "triton"
    with pytest.raises(ValueError, match="computes on cpu and cuda"):
        implementation_of(torch.device("mps"))
    assert isinstance(make_pages(CPU, 2, 1, 8, 8, torch.float32), KVPages)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
def test_a_shard_on_a_pretended_gpu(architecture: str, tmp_path: Path) -> None:
    """The whole way of a call, against the same shard on the CPU."""
    pytest.importorskip("triton")
    assert isinstance(make_pages(INTERPRETED_GPU, 2, 1, 8, 8, torch.float32), GpuKVPages)
    path = make_checkpoint(tmp_path, architecture)
    spec = inspect_model(path)
    layer = spec.moe_layers[0]
    here, there = (
        build_shard(
            path, spec, {layer: list(range(8))}, dtype=torch.float32, exact=True, device=device
        )
        for device in (CPU, INTERPRETED_GPU)
    )
    assert there.manifest == here.manifest
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((9, spec.hidden_size), generator=generator)
    row = torch.arange(9).repeat_interleave(2)
    expert, weight = torch.arange(18) * 5 % 8, torch.rand(18, generator=generator)
    for mode in ("ordered", "presummed"):
        expected = here.forward(layer, x, row, expert, weight, mode)  # type: ignore[arg-type]
        found = there.forward(layer, x, row, expert, weight, mode)  # type: ignore[arg-type]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    exported = exported_slot(there, layer, 3)
    assert all(torch.equal(t, exported[n]) for n, t in exported_slot(here, layer, 3).items())


@pytest.mark.parametrize("presummed", [False, True])
def test_a_layer_without_experts_takes_part_over_nccl(presummed: bool, tmp_path: Path) -> None:
    """All shards answer every layer of a step; a placement may give one of them nothing of it."""
    pytest.importorskip("triton")
    path = make_checkpoint(tmp_path, "mixtral")
    spec = inspect_model(path)
    full, empty = spec.moe_layers[:2]
    held = {full: list(range(8)), empty: []}
    shard = build_shard(path, spec, held, dtype=torch.float32, exact=False, device=INTERPRETED_GPU)
    experts = SlotExperts(shard, CPU)
    rows, none = torch.ones(3, spec.hidden_size), torch.full((3, 2), -1, dtype=torch.int32)
    out = torch.full((3 if presummed else 6, spec.hidden_size), torch.nan)
    experts.masked(empty, rows, none, torch.ones(3, 2), out, presummed=presummed)
    assert torch.equal(out, torch.zeros_like(out))
    nothing = torch.zeros(0, dtype=torch.int32)
    back = experts.exact(empty, rows[:0], nothing, nothing, torch.zeros(0), presummed=presummed)
    assert back.shape == (0, spec.hidden_size) and not experts.fault_1.any()
    pair = torch.ones(1, dtype=torch.int32)
    experts.exact(empty, rows, pair, pair, torch.ones(1), presummed=presummed)
    assert experts.fault_1.any(), "an expert that is not there was taken for zeros"


def exported_slot(shard: ShardExperts, layer: int, expert: int) -> dict[str, torch.Tensor]:
    slot = shard.state.slot_of(layer, expert)
    assert slot is not None
    return shard._layers[layer].packed.export_slot(slot)


def test_without_triton() -> None:
    """Every module imports; who asks for a GPU is told what to install."""
    script = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
import torch
from remora.kernels import gpu_attention, triton_experts, triton_routing
from remora.kernels.device import make_pages
for call in (
    lambda: make_pages(torch.device("cuda"), 1, 1, 8, 8, torch.float32),
    lambda: triton_routing.sort_pairs(torch.zeros(1, dtype=torch.int32), 1),
):
    try:
        call()
    except RuntimeError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", script],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.count("GPU kernels need Triton") == 2, done.stdout
