"""Gates found by trying: which of the kernels' gates the architectures really have."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.checkpoints import ARCHITECTURES, tiny_config
from torch import Tensor, nn
from transformers.activations import ACT2FN

from remora.actors import model_build
from remora.actors.expert_gate import find_gate
from remora.kernels.gates import SILU, Gate

GPT_OSS = Gate(layout="interleaved", alpha=1.702, gate_max=7.0, up_max=7.0, up_shift=1.0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_has_a_native_gate(architecture: str) -> None:
    model = model_build.build_meta(tiny_config(architecture), torch.bfloat16)
    for site in model_build.expert_sites(model):
        host: Any = site.module
        found = find_gate(host, 40)
        assert found == (GPT_OSS if architecture == "gpt_oss" else SILU)


def host_of(apply: Any, **numbers: float) -> Any:
    host = SimpleNamespace(has_gate=True, **numbers)
    host._apply_gate = apply
    return host


def halves(function: Any) -> Any:
    return lambda x: function(*x.chunk(2, dim=-1))


@pytest.mark.parametrize(
    "name,activation", [("gelu", "gelu"), ("gelu_pytorch_tanh", "gelu_tanh"), ("relu2", "relu2")]
)
def test_activations(name: str, activation: Any) -> None:
    act = ACT2FN[name]
    assert find_gate(host_of(halves(lambda g, u: act(g) * u)), 24) == Gate(activation=activation)
    bare = SimpleNamespace(has_gate=False, act_fn=act)
    assert find_gate(bare, 24) == Gate(activation=activation, layout="none")


def test_clamps_under_any_name() -> None:
    def after(gate: Tensor, up: Tensor) -> Tensor:
        return nn.functional.silu(gate).clamp(max=5.0) * up.clamp(-5.0, 5.0)

    def before(gate: Tensor, up: Tensor) -> Tensor:
        return nn.functional.silu(gate.clamp(max=5.0)) * up.clamp(-5.0, 5.0)

    assert find_gate(host_of(halves(after), bound=5.0), 24) == Gate(act_max=5.0, up_max=5.0)
    assert find_gate(host_of(halves(before), bound=5.0), 24) == Gate(gate_max=5.0, up_max=5.0)
    assert find_gate(host_of(halves(before)), 24) is None  # a limit that no attribute names


def test_what_is_not_known_is_left_to_the_model() -> None:
    silu = nn.functional.silu
    for apply in (
        halves(lambda g, u: silu(g) * u * (1 + 1e-4)),
        halves(lambda g, u: silu(g) * u / u.norm(dim=-1, keepdim=True)),
        halves(lambda g, u: silu(g) * u.roll(1, -1)),
        halves(lambda g, u: torch.where(g > 0, g, math.e * g) * u),
        lambda x: x,
    ):
        assert find_gate(host_of(apply), 24) is None
