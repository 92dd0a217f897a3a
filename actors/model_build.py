"""A `transformers` model on the meta device: structure without weights, for probing and loading.

Nothing here allocates parameters. What a model computes at construction and does not store
(rotary frequencies and other non-persistent buffers) is made real the way `from_pretrained` does
it, so that it holds what `transformers` itself would hold.
"""

import copy
import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from remora.comm.errors import UnsupportedModelError, WeightsError

# Modules that mix tokens in a way our paged attention cannot express, by a part of the class name.
TOKEN_MIXERS = (
    "Mamba",
    "DeltaNet",
    "LinearAttention",
    "LightningAttention",
    "ShortConv",
    "RWKV",
    "Conv1d",
    "Indexer",
)


# `transformers` sets torch's default dtype, which is the process' own, while it builds a model, and
# torch.fx puts itself in the place of all modules' calls while it traces one: two threads that
# build, probe or trace (tests) would disturb each other.
building = threading.RLock()


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsSite:
    """The experts module of one decoder layer."""

    layer: int
    name: str  # full module name
    module: nn.Module


def load_config(directory: Path) -> Any:
    """The checkpoint's `transformers` config, refused where it cannot be served at all.

    Raises:
        WeightsError: no directory, or a config.json that is missing or damaged.
        UnsupportedModelError: unknown to `transformers` (custom code is never run), quantised,
            encoder-decoder, multimodal, or without a causal language model class.
    """
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    file = directory / "config.json"
    if not directory.is_dir():
        raise WeightsError(f"{directory}: no such checkpoint directory")
    try:
        raw = json.loads(file.read_bytes())
        model_type = str(raw["model_type"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{file}: missing or damaged: {error!r}") from error
    if model_type not in CONFIG_MAPPING:
        code = " (its own code is never run)" if "auto_map" in raw else ""
        raise UnsupportedModelError(f"model type {model_type!r} is unknown to transformers{code}")
    if raw.get("quantization_config") is not None:
        method = raw["quantization_config"].get("quant_method", "unknown")
        raise UnsupportedModelError(
            f"{model_type}: the checkpoint is quantised ({method}); bfloat16 or float32 is needed"
        )
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # transformers validates configs with many kinds of errors
        raise WeightsError(f"{file}: transformers refuses it: {error}") from error
    if config.is_encoder_decoder:
        raise UnsupportedModelError(f"{model_type} is an encoder-decoder; decoders only are served")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(
            f"{model_type} has no causal language model class in transformers"
        )
    towers = sorted(name for name in config.sub_configs if name != "text_config")
    if towers:
        raise UnsupportedModelError(f"{model_type} is multimodal ({', '.join(towers)})")
    return config


def build_meta(config: Any, dtype: torch.dtype) -> Any:
    """The causal language model of `config` on the meta device, in eval mode.

    Raises:
        UnsupportedModelError: `transformers` cannot build it.
    """
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    try:
        with building, torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation="eager"
            )
    except Exception as error:  # whatever a model's constructor raises, it cannot be served
        raise UnsupportedModelError(
            f"{config.model_type}: transformers cannot build it from its config: {error}"
        ) from error
    model.requires_grad_(False)
    return model.eval()


def decoder_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder layers.

    Raises:
        UnsupportedModelError: no list of `num_hidden_layers` modules in the base model.
    """
    num_layers = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and name.endswith("layers"):
            if len(module) != num_layers:
                break
            return name, module
    raise UnsupportedModelError(
        f"{model.config.model_type}: found no list of {num_layers} decoder layers"
    )


def is_experts_module(module: nn.Module) -> bool:
    """Whether a module is dispatched through the experts interface (its decorator marks it)."""
    return all(hasattr(module, name) for name in ("has_gate", "has_bias", "_apply_gate"))


def expert_sites(model: Any) -> tuple[ExpertsSite, ...]:
    """Experts modules by decoder layer, ascending.

    Raises:
        UnsupportedModelError: none at all, more than one in a layer, or one outside the layers.
    """
    prefix, layers = decoder_layers(model)
    sites = [
        ExpertsSite(layer=index, name=f"{prefix}.{index}.{name}", module=module)
        for index, layer in enumerate(layers)
        for name, module in layer.named_modules()
        if is_experts_module(module)
    ]
    total = sum(is_experts_module(module) for module in model.modules())
    model_type = model.config.model_type
    if not total:
        raise UnsupportedModelError(
            f"{model_type} has no routed experts behind transformers' experts interface"
        )
    if total != len(sites) or len({site.layer for site in sites}) != len(sites):
        raise UnsupportedModelError(
            f"{model_type}: {total} experts modules, {len(sites)} of them in decoder layers: "
            f"one a layer can be served"
        )
    return tuple(sites)


def refuse_token_mixers(model: Any) -> None:
    """Refuse state-space layers, convolutions over tokens and the like.

    Raises:
        UnsupportedModelError: naming the classes.
    """
    names = {type(module).__name__ for module in model.modules()}
    found = sorted(name for name in names if any(mixer in name for mixer in TOKEN_MIXERS))
    if found:
        raise UnsupportedModelError(
            f"{model.config.model_type} mixes tokens outside softmax attention "
            f"({', '.join(found)}); only attention over a paged KV cache is served"
        )


def compute_buffers(model: Any) -> None:
    """Make non-persistent buffers real, with the values `from_pretrained` gives them.

    Raises:
        UnsupportedModelError: a buffer that the model does not know how to compute.
    """
    owners: list[nn.Module] = []
    names: list[tuple[nn.Module, str, str]] = []
    for full_name, buffer in list(model.named_non_persistent_buffers()):
        parent, _, name = full_name.rpartition(".")
        owner = model.get_submodule(parent)
        real = torch.empty_like(buffer, device="cpu")
        if real.is_floating_point():
            real.fill_(torch.nan)  # so that a buffer nobody computes is found below
        owner.register_buffer(name, real, persistent=False)
        owners.append(owner)
        names.append((owner, name, full_name))
    flags = _protect_parameters(model)
    with torch.no_grad():
        for owner in dict.fromkeys(owners):
            model._init_weights(owner)
    for parameter in flags:
        del parameter._is_hf_initialized
    for owner, name, full_name in names:
        buffer = getattr(owner, name)
        if buffer.is_floating_point() and bool(buffer.isnan().any()):
            raise UnsupportedModelError(
                f"{model.config.model_type}: transformers does not recompute buffer {full_name}"
            )


def _protect_parameters(model: Any) -> list[Any]:
    """Mark parameters as initialised, so that `_init_weights` leaves them alone."""
    parameters = [p for p in model.parameters() if not getattr(p, "_is_hf_initialized", False)]
    for parameter in parameters:
        parameter._is_hf_initialized = True
    return parameters
