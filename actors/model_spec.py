"""What Remora must know of a checkpoint before anything is loaded, found by looking, not by name.

`inspect_model` builds the model on the meta device (no memory) and runs it once to see what reaches
the attention and experts interfaces of `transformers` (`model_probe.py`). What cannot be served is
refused there, saying why.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """Attention of one decoder layer, as it arrives at the attention interface.

    MLA arrives expanded: `k_dim` and `v_dim` may differ. The window is what the model's own mask
    says, which is what eager `transformers` obeys (the `sliding_window` argument may disagree).
    """

    num_heads: int
    num_kv_heads: int
    k_dim: int
    v_dim: int
    scale: float
    sliding_window: int | None  # a token sees itself and the `sliding_window - 1` before it
    soft_cap: float | None
    has_sinks: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSpec:
    """Tensors of one routed expert: name -> shape, in the layout its class declares."""

    class_name: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]  # sorted by name, without the expert dimension
    has_gate: bool
    has_bias: bool
    is_transposed: bool
    is_concatenated: bool
    has_post_expert_norm: bool

    @property
    def num_elements(self) -> int:
        """Elements of one expert, all tensors."""
        return sum(torch.Size(shape).numel() for _, shape in self.shapes)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A servable checkpoint. `config` is the `transformers` config, untouched; pickles with it."""

    path: str
    config: Any
    model_type: str
    num_layers: int
    moe_layers: tuple[int, ...]  # decoder-layer indices that have routed experts, ascending
    num_experts: int
    top_k: int
    hidden_size: int
    vocab_size: int
    attention: tuple[AttentionSpec, ...]  # one per decoder layer
    expert: ExpertSpec  # the same for every MoE layer (else refused)
    dtype: str  # of the checkpoint: "float32" or "bfloat16"
    max_positions: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]  # of generation_config.json where there is one, else of config

    def expert_nbytes(self, dtype: torch.dtype) -> int:
        """Bytes of one expert's canonical (unpacked) tensors in `dtype`."""
        return self.expert.num_elements * dtype.itemsize

    def kv_bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes of K and V of one token over all layers in `dtype`."""
        return dtype.itemsize * sum(a.num_kv_heads * (a.k_dim + a.v_dim) for a in self.attention)


def resolve_dtype(spec: ModelSpec, dtype: str | None = None) -> torch.dtype:
    """Torch dtype that a model is served in: the checkpoint's own unless overridden.

    Raises:
        ConfigError: `dtype` is neither "auto", "float32" nor "bfloat16".
    """
    from remora.comm.errors import ConfigError

    name = spec.dtype if dtype in (None, "auto") else dtype
    if name not in DTYPES:
        raise ConfigError(f"dtype {dtype!r}: allowed are auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def inspect_model(path: str | Path) -> ModelSpec:
    """Look at a checkpoint directory; nothing but its JSON files and safetensors headers is read.

    Raises:
        UnsupportedModelError: an architecture that cannot be served, and why.
        WeightsError: no directory, no config, or damaged weight files.
    """
    from remora.actors.model_probe import probe_model

    return probe_model(Path(path))
