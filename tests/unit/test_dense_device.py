"""The dense path on a GPU that is pretended: Triton's kernels interpreted, linears torch's own.

Everything that chooses by device runs as it would on a GPU: loading, pages, the plan of a step,
attention, inputs, logits, and the experts' kernels behind it. Tensors live on the CPU.
"""

from pathlib import Path

import pytest
import torch
from support.checkpoints import VOCAB, make_checkpoint
from support.local_engine import LocalEngine

from remora.actors.dense_surgery import DenseLinear
from remora.kernels.device import CPU, INTERPRETED_GPU
from remora.kernels.linear import PackedLinear

pytest.importorskip("triton")
from remora.kernels.gpu_pages import GpuKVPages, GpuPlan

# Grouped heads; sinks, windows, transposed interleaved experts with biases; MLA with shared experts
ARCHITECTURES = ["qwen3_moe", "gpt_oss", "deepseek_v3"]


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_those_of_the_cpu(architecture: str, tmp_path: Path) -> None:
    """A prompt, a chunk behind it beside another prompt, and decode, teacher-forced."""
    path = make_checkpoint(tmp_path, architecture)
    here, there = (
        LocalEngine.load(path, dtype=torch.float32, mode="presummed", exact=False, device=device)
        for device in (CPU, INTERPRETED_GPU)
    )
    assert any(isinstance(m, DenseLinear) for m in here.dense.model.modules())
    assert not any(isinstance(m, PackedLinear) for m in there.dense.model.modules())
    ids = torch.arange(60) * 37 % VOCAB
    for engine in (here, there):
        engine.reset(2, 40)
    assert isinstance(there.pages[0], GpuKVPages)
    steps = [
        [(0, 0, ids[:21].tolist())],
        [(0, 21, ids[21:27].tolist()), (1, 0, ids[30:35].tolist())],
        [(0, 27, ids[27:28].tolist()), (1, 5, ids[35:36].tolist())],
    ]
    for parts in steps:
        expected, found = here.step(parts), there.step(parts)
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)
        assert torch.equal(found.argmax(-1), expected.argmax(-1))


def test_a_step_knows_its_plan_on_the_device(tmp_path: Path) -> None:
    from remora.actors.step_context import StepContext
    from remora.actors.warm import silent_experts
    from remora.kernels.attention import build_plan

    plan = build_plan([0], [3], [[0]], 4)
    context = StepContext(plan=plan, pages=[], experts=silent_experts, device=INTERPRETED_GPU)
    assert isinstance(context.device_plan, GpuPlan) and context.device_plan.host is plan
    assert StepContext(plan=plan, pages=[], experts=silent_experts).device_plan is plan
