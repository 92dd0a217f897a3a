"""What Remora must know of a checkpoint before anything is loaded, found by looking, not by name.

`inspect_model` builds the model on the meta device (no memory) and runs it once to see what reaches
the attention and experts interfaces of `transformers` (`model_probe.py`). What cannot be served is
refused there, saying why.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from remora.actors import model_build, model_probe
from remora.actors.checkpoint_files import Checkpoint
from remora.actors.model_probe import AttentionSpec
from remora.comm.errors import ConfigError, UnsupportedModelError, WeightsError
from remora.comm.limits import TOP_K_MAX
from remora.kernels.experts_dtype import ExpertsDtype
from remora.kernels.quantization import quantization_of

__all__ = ["AttentionSpec", "ExpertSpec", "ModelSpec", "inspect_model", "resolve_dtype"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSpec:
    """Tensors of one routed expert: name -> shape, in the layout its class declares."""

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
    linears: frozenset[str]  # full names of the nn.Linear modules that a pass calls
    expert: ExpertSpec  # the same for every MoE layer (else refused)
    dtype: str  # of the checkpoint: "float32" or "bfloat16"
    max_positions: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]  # of generation_config.json where there is one, else of config

    def expert_nbytes(self, dtype: torch.dtype, experts_dtype: ExpertsDtype = "auto") -> int:
        """Bytes of one expert: of its canonical (unpacked) tensors in `dtype`.

        Quantised weights are counted as they are held, scales and padding included.
        """
        form = quantization_of(experts_dtype)
        if form is None:
            return self.expert.num_elements * dtype.itemsize
        total = 0
        for _, shape in self.expert.shapes:
            if len(shape) == 1:  # a bias
                total += shape[0] * dtype.itemsize
            else:
                outputs, inputs = shape[::-1] if self.expert.is_transposed else shape
                total += form.packed_nbytes(outputs, inputs)
        return total

    def kv_bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes of K and V of one token over all layers in `dtype`."""
        return dtype.itemsize * sum(a.num_kv_heads * (a.k_dim + a.v_dim) for a in self.attention)


def resolve_dtype(spec: ModelSpec, dtype: str | None = None) -> torch.dtype:
    """Torch dtype that a model is served in: the checkpoint's own unless overridden.

    Raises:
        ConfigError: `dtype` is neither "auto", "float32" nor "bfloat16".
    """
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
    directory = Path(path)
    config = model_build.load_config(directory)
    model = model_build.build_meta(config, torch.bfloat16)
    sites = model_build.expert_sites(model)
    model_build.refuse_token_mixers(model)
    model_build.compute_buffers(model)
    watch = model_probe.watch_one_pass(model)
    with Checkpoint.open(directory) as checkpoint:
        dtype = _checkpoint_dtype(config, checkpoint)
    text = config.get_text_config()
    bos, eos = _special_tokens(directory, text)
    num_experts, expert = _expert_spec(config.model_type, sites)
    return ModelSpec(
        path=str(directory),
        config=config,
        model_type=config.model_type,
        num_layers=len(watch.layers),
        moe_layers=tuple(site.layer for site in sites),
        num_experts=num_experts,
        top_k=_top_k(watch, sites),
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        attention=tuple(_attention(watch, layer) for layer in range(len(watch.layers))),
        linears=frozenset(watch.linears),
        expert=expert,
        dtype=dtype,
        max_positions=text.max_position_embeddings,
        bos_token_id=bos,
        eos_token_ids=eos,
    )


def _expert_spec(
    model_type: str, sites: tuple[model_build.ExpertsSite, ...]
) -> tuple[int, ExpertSpec]:
    """Number of experts and what each holds, equal in every MoE layer."""
    found = {_site_spec(model_type, site) for site in sites}
    if len(found) > 1:
        raise UnsupportedModelError(f"{model_type}: experts differ between layers: {found}")
    return found.pop()


def _site_spec(model_type: str, site: model_build.ExpertsSite) -> tuple[int, ExpertSpec]:
    module: Any = site.module
    up = "gate_up_proj" if module.has_gate else "up_proj"
    names = [up, "down_proj"]
    if module.has_bias:
        names += [f"{name}_bias" for name in names]
    parameters = dict(module.named_parameters(recurse=False))
    missing = [name for name in names if name not in parameters]
    counts = {parameters[name].shape[0] for name in names if name in parameters}
    if missing or len(counts) != 1:
        raise UnsupportedModelError(
            f"{model_type}: layer {site.layer}: {type(module).__name__} has not the tensors of the "
            f"experts interface (missing {missing}, expert counts {sorted(counts)})"
        )
    spec = ExpertSpec(
        shapes=tuple((name, tuple(parameters[name].shape[1:])) for name in sorted(names)),
        has_gate=module.has_gate,
        has_bias=module.has_bias,
        is_transposed=module.is_transposed,
        is_concatenated=module.is_concatenated,
        has_post_expert_norm=module.has_post_expert_norm,
    )
    return counts.pop(), spec


def _top_k(watch: model_probe.Watch, sites: tuple[model_build.ExpertsSite, ...]) -> int:
    found = {watch.layers[site.layer].top_k for site in sites}
    top_k = found.pop()
    if found or top_k is None:
        raise UnsupportedModelError(
            f"{watch.model_type}: top-k differs between layers, or a layer never calls its experts"
        )
    if top_k > TOP_K_MAX:
        raise UnsupportedModelError(
            f"{watch.model_type}: {top_k} experts a token; at most {TOP_K_MAX} are served"
        )
    return top_k


def _attention(watch: model_probe.Watch, layer: int) -> AttentionSpec:
    attention = watch.layers[layer].attention
    assert attention is not None, f"layer {layer} passed the probe without attention"
    return attention


def _checkpoint_dtype(config: Any, checkpoint: Checkpoint) -> str:
    """What `dtype: auto` means: the config's dtype, else that of the largest tensor.

    float16 has no kernels: it is served as float32, which holds its values exactly.
    """
    dtype = config.dtype
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None)
    if dtype is None:
        largest = max(checkpoint.tensors.values(), key=lambda entry: entry.nbytes, default=None)
        dtype = largest.dtype if largest is not None else torch.float32
    return "bfloat16" if dtype == torch.bfloat16 else "float32"


def _special_tokens(directory: Path, config: Any) -> tuple[int | None, tuple[int, ...]]:
    """Beginning and end of sequence ids; generation_config.json goes before config.json.

    Raises:
        WeightsError: a generation_config.json that is damaged.
    """
    file = directory / "generation_config.json"
    values: dict[str, Any] = {}
    if file.exists():
        try:
            values = dict(json.loads(file.read_bytes()))
        except (OSError, ValueError, TypeError) as error:
            raise WeightsError(f"{file}: damaged: {error!r}") from error
    bos, eos = (
        values[name] if values.get(name) is not None else getattr(config, name, None)
        for name in ("bos_token_id", "eos_token_id")
    )
    return bos, tuple(eos) if isinstance(eos, list | tuple) else (() if eos is None else (eos,))
