"""benchmarks/make_checkpoint.py: what it writes is read by transformers, and is always the same."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "make_checkpoint.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_checkpoint", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def write(script: ModuleType, monkeypatch: pytest.MonkeyPatch):
    """Writes a checkpoint of two layers and six experts, in files of at most 200 kB."""
    monkeypatch.setattr(script, "FILE_BYTES_MAX", 200_000)
    shape = script.Shape(
        num_layers=2,
        hidden_size=32,
        num_experts=6,
        top_k=2,
        expert_width=16,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        vocab_size=8200,
    )
    return lambda out, **more: script.write_checkpoint(out, shape, **{"seed": 3, **more})


def tensors(path: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            found |= {name: handle.get_tensor(name) for name in handle.keys()}
    return found


def test_transformers_reads_it(write, tmp_path: Path) -> None:
    path = write(tmp_path / "a", dtype="float32")
    assert len(list(path.glob("*.safetensors"))) > 1
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    assert model.config.num_experts == 6
    raw = tensors(path)
    fused = model.model.layers[1].mlp.experts.gate_up_proj[5]
    at = "model.layers.1.mlp.experts.5"
    torch.testing.assert_close(fused[:16], raw[f"{at}.gate_proj.weight"], rtol=0, atol=0)
    torch.testing.assert_close(fused[16:], raw[f"{at}.up_proj.weight"], rtol=0, atol=0)
    ids = AutoTokenizer.from_pretrained(path)("the same words").input_ids
    assert 0 < len(ids) and max(ids) < model.config.vocab_size


def test_same_seed_same_bytes(write, tmp_path: Path) -> None:
    first, again, other = (
        tensors(write(tmp_path / name, seed=seed)) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    gate = "model.layers.0.mlp.gate.weight"
    assert not torch.equal(first[gate], other[gate])


def test_existing_directory_is_left(write, tmp_path: Path) -> None:
    path = write(tmp_path / "a")
    before = (path / "config.json").stat().st_mtime_ns
    assert write(tmp_path / "a") == path
    assert (path / "config.json").stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match="no checkpoint of"):
        write(tmp_path / "a", seed=9)
