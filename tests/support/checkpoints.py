"""Random small checkpoints of every architecture that Remora promises, in both layouts.

`hub` is what `save_pretrained` writes by default and what the hub holds (one tensor per expert
where the architecture has it so); `fused` is the layout of the running model
(`save_original_format=False`). Weights are scaled so that greedy outputs do not fall into a loop.
"""

import functools
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

Layout = Literal["hub", "fused"]

VOCAB = 384
BASE: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=None,
    tie_word_embeddings=False,
)
MLA: dict[str, Any] = dict(
    num_key_value_heads=4,
    kv_lora_rank=32,
    q_lora_rank=None,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=20,
    head_dim=8,
    first_k_dense_replace=1,
    n_routed_experts=8,
    num_experts_per_tok=3,
    n_shared_experts=1,
    moe_intermediate_size=40,
)

# What differs from BASE; odd widths on purpose where the architecture allows them (tails).
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "mixtral": dict(num_local_experts=8, num_experts_per_tok=2),
    "qwen3_moe": dict(
        head_dim=24,
        moe_intermediate_size=40,
        num_experts=8,
        num_experts_per_tok=3,
        norm_topk_prob=True,
        mlp_only_layers=[1],
    ),
    "olmoe": dict(num_experts=8, num_experts_per_tok=3, clip_qkv=3.0),
    "deepseek_v2": MLA
    | dict(topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=1.5),
    "gpt_oss": dict(
        head_dim=24,
        num_local_experts=8,
        num_experts_per_tok=3,
        sliding_window=16,
        num_hidden_layers=4,
        intermediate_size=56,
        rope_parameters=dict(
            rope_type="yarn",
            rope_theta=10000.0,
            factor=8.0,
            beta_fast=32.0,
            beta_slow=1.0,
            truncate=False,
            original_max_position_embeddings=64,
        ),
    ),
    "qwen2_moe": dict(
        moe_intermediate_size=40,
        shared_expert_intermediate_size=48,
        num_experts=8,
        num_experts_per_tok=3,
        use_sliding_window=True,
        sliding_window=16,
        max_window_layers=1,
    ),
    "deepseek_v3": MLA
    | dict(
        q_lora_rank=24, n_group=4, topk_group=2, routed_scaling_factor=1.5, rope_interleave=True
    ),
    "phimoe": dict(num_local_experts=8, num_experts_per_tok=2, attention_bias=True),
    "granitemoe": dict(
        num_local_experts=8,
        num_experts_per_tok=3,
        attention_multiplier=0.25,
        embedding_multiplier=3.0,
        residual_multiplier=0.7,
        logits_scaling=0.5,
    ),
    "glm4_moe": dict(
        head_dim=16,
        moe_intermediate_size=40,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_group=2,
        topk_group=1,
        n_shared_experts=1,
        first_k_dense_replace=1,
        use_qk_norm=True,
        routed_scaling_factor=1.5,
    ),
    "ernie4_5_moe": dict(
        moe_intermediate_size=40,
        moe_num_experts=8,
        moe_k=3,
        moe_num_shared_experts=1,
        moe_layer_start_index=1,
        moe_layer_end_index=2,
        tie_word_embeddings=True,
    ),
    "dots1": dict(
        moe_intermediate_size=40,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_shared_experts=1,
        first_k_dense_replace=1,
        norm_topk_prob=True,
        num_key_value_heads=4,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        sliding_window=16,
    ),
    "hunyuan_v1_moe": dict(num_experts=8, moe_topk=3, head_dim=16),
    "minimax_m2": dict(num_local_experts=8, num_experts_per_tok=3, head_dim=24),
    "flex_olmo": dict(num_experts=8, num_experts_per_tok=3),
}


def tiny_config(architecture: str, **overrides: Any) -> Any:
    """A `transformers` config of `architecture`, small enough to build at once."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[architecture](**(BASE | ARCHITECTURES[architecture] | overrides))


def random_model(
    architecture: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> Any:
    """A `transformers` model with weights drawn from `seed`; every parameter is random."""
    from transformers import AutoModelForCausalLM

    config = tiny_config(architecture, **overrides)
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *_persistent_buffers(model)]:
            tensor.copy_(_draw(name, tensor, generator))
    return model.to(dtype).eval()


def make_checkpoint(
    directory: Path,
    architecture: str,
    *,
    layout: Layout = "hub",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "150KB",
    **overrides: Any,
) -> Path:
    """Write a checkpoint of several safetensors files and an index; returns `directory`."""
    model = random_model(architecture, seed=seed, dtype=dtype, **overrides)
    model.generation_config.eos_token_id = model.config.eos_token_id
    model.save_pretrained(
        directory, save_original_format=layout == "hub", max_shard_size=max_shard_size
    )
    return directory


def _persistent_buffers(model: Any) -> list[tuple[str, Tensor]]:
    persistent = set(model.state_dict())
    return [(name, buffer) for name, buffer in model.named_buffers() if name in persistent]


def _draw(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Values that keep activations of order one and outputs far from a fixed point."""
    noise = functools.partial(torch.randn, tensor.shape, generator=generator)
    if "norm" in name.split(".")[-2].lower() and name.endswith("weight"):
        return 1.0 + 0.2 * noise()
    if tensor.dim() < 2 or name.endswith("bias"):
        return 0.3 * noise()
    if "embed" in name:
        return 0.3 * noise()
    fan_in = tensor.shape[-1]
    if name.endswith(("gate_up_proj", "down_proj")):  # gpt_oss holds them transposed
        fan_in = min(tensor.shape[-2:])
    gain = 3.0 if "lm_head" in name else 1.6
    return gain * fan_in**-0.5 * noise()
