"""What a checkpoint is found to be, and which ones are refused, saying why."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import make_checkpoint, tiny_config
from transformers import CONFIG_MAPPING

from remora.actors import model_build
from remora.actors.model_probe import Watch
from remora.actors.model_spec import inspect_model, resolve_dtype
from remora.comm.errors import ConfigError, UnsupportedModelError, WeightsError

DEMO = Path(__file__).parents[2] / "examples" / "demo-model"


def write_config(directory: Path, config: Any, **extra: Any) -> Path:
    """A directory with nothing but config.json."""
    config.save_pretrained(directory)
    if extra:
        file = directory / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | extra))
    return directory


def test_the_demo_model() -> None:
    spec = inspect_model(DEMO)
    assert spec.model_type == "qwen3_moe"
    assert (spec.num_layers, spec.num_experts, spec.top_k) == (8, 32, 4)
    assert spec.moe_layers == tuple(range(8))
    assert (spec.hidden_size, spec.vocab_size, spec.max_positions) == (256, 8192, 2048)
    assert (spec.dtype, spec.bos_token_id, spec.eos_token_ids) == ("bfloat16", 0, (0,))
    assert spec.expert_nbytes(torch.bfloat16) == 2 * (2 * 64 * 256 + 256 * 64)
    assert spec.kv_bytes_per_token(torch.bfloat16) == 2 * 8 * 2 * (64 + 64)


def test_windows_come_from_the_mask(tmp_path: Path) -> None:
    gpt_oss = inspect_model(make_checkpoint(tmp_path / "a", "gpt_oss"))
    assert [a.sliding_window for a in gpt_oss.attention] == [16, None, 16, None]
    assert all(a.has_sinks for a in gpt_oss.attention)
    assert gpt_oss.expert.has_bias and gpt_oss.expert.is_transposed
    # qwen2_moe windows its masks and never tells the attention interface
    qwen2 = inspect_model(make_checkpoint(tmp_path / "b", "qwen2_moe"))
    assert 16 in {a.sliding_window for a in qwen2.attention}
    phimoe = make_checkpoint(tmp_path / "c", "phimoe", sliding_window=9)
    assert [a.sliding_window for a in inspect_model(phimoe).attention] == [9, 9, 9]


def test_mla_arrives_expanded(tmp_path: Path) -> None:
    spec = inspect_model(make_checkpoint(tmp_path, "deepseek_v3"))
    assert {(a.num_kv_heads, a.k_dim, a.v_dim) for a in spec.attention} == {(4, 24, 20)}
    assert spec.moe_layers == (1, 2)
    assert spec.num_layers == 3


def test_dtypes(tmp_path: Path) -> None:
    spec = inspect_model(make_checkpoint(tmp_path, "mixtral", dtype=torch.bfloat16))
    assert resolve_dtype(spec) == resolve_dtype(spec, "auto") == torch.bfloat16
    assert resolve_dtype(spec, "float32") == torch.float32
    with pytest.raises(ConfigError, match=r"dtype 'float16': allowed are auto, float32, bfloat16"):
        resolve_dtype(spec, "float16")


def test_generation_config_names_the_end(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "mixtral")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    spec = inspect_model(tmp_path)
    assert (spec.bos_token_id, spec.eos_token_ids) == (1, (7, 9))
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(WeightsError, match=r"generation_config.json: damaged"):
        inspect_model(tmp_path)


UNSERVED = {
    "llama": "no routed experts behind",
    "t5": "encoder-decoder",
    "qwen3_vl_moe": "no causal language model class",
    "gemma4": "multimodal",
    "qwen3_next": "GatedDeltaNet",
    "jamba": "Mamba",
    "granitemoehybrid": "Mamba",
    "nemotron_h": "Mamba2",
    "minimax": "LightningAttention",
    "deepseek_v32": "Indexer",
    "llama4_text": "no routed experts behind|no causal language model class",
}


@pytest.mark.parametrize(("model_type", "reason"), UNSERVED.items())
def test_refused_with_the_reason(model_type: str, reason: str, tmp_path: Path) -> None:
    path = write_config(tmp_path, CONFIG_MAPPING[model_type]())
    with pytest.raises(UnsupportedModelError, match=reason) as raised:
        inspect_model(path)
    assert model_type in str(raised.value)


def test_sixteen_experts_a_token_and_no_more(tmp_path: Path) -> None:
    most, more = (
        make_checkpoint(
            tmp_path / str(top_k), "mixtral", num_local_experts=20, num_experts_per_tok=top_k
        )
        for top_k in (16, 17)
    )
    assert inspect_model(most).top_k == 16
    with pytest.raises(UnsupportedModelError, match="mixtral: 17 experts a token; at most 16 are"):
        inspect_model(more)


def test_an_attention_of_its_own_is_seen_by_the_probe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were its class name unknown to us, the pass itself would still find the layer out."""
    monkeypatch.setattr(model_build, "TOKEN_MIXERS", ())
    config = CONFIG_MAPPING["minimax"](num_hidden_layers=2, hidden_size=64, num_attention_heads=4)
    with pytest.raises(UnsupportedModelError, match=r"minimax: .*cache of its own"):
        inspect_model(write_config(tmp_path, config))


def test_masks_that_pages_cannot_express() -> None:
    watch = Watch(model_type="x", hidden_size=8)
    causal = watch._window_of(lambda b, h, q, k: k <= q)
    assert causal is None
    assert watch._window_of(lambda b, h, q, k: (k <= q) & (k > q - 300)) == 300
    for rule, reason in (
        (lambda b, h, q, k: (k <= q) & (k // 64 == q // 64), "neither causal nor"),
        (lambda b, h, q, k: (k <= q) | (k < 100), "neither causal nor"),
        (lambda b, h, q, k: (k <= q) & (k % 2 == 0), "neither causal nor"),
        (lambda b, h, q, k: torch.empty(5, device="meta")[k] > q, "more than positions"),
    ):
        with pytest.raises(UnsupportedModelError, match=reason):
            watch._window_of(rule)


def test_quantised(tmp_path: Path) -> None:
    quantised = {"quant_method": "fp8"}
    path = write_config(tmp_path, tiny_config("mixtral"), quantization_config=quantised)
    with pytest.raises(UnsupportedModelError, match=r"mixtral: the checkpoint is quantised \(fp8"):
        inspect_model(path)


def test_custom_code_is_never_run(tmp_path: Path) -> None:
    code = {"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(code))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UnsupportedModelError, match=r"'mine' is unknown.*own code is never run"):
        inspect_model(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "{}", '{"model_type": "mixtral", "hidden_size": "x"}']
)
def test_damaged_config(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(WeightsError, match=r"config\.json"):
        inspect_model(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"config\.json: missing"):
        inspect_model(tmp_path)
