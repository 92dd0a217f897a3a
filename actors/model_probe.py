"""One pass over a model on the meta device, watching what reaches the interfaces we implement.

Whatever the architecture is called: if every decoder layer hands our attention plain causal (or
windowed) queries, keys and values, and every experts module is called the uniform way, Remora can
serve it; otherwise it is refused here, with the reason. What one pass cannot see (a model that
mixes tokens outside attention without state) is left to the class names of `model_build`.
Legend: T tokens of the probe, H heads, D model width, K top-k.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from remora.actors.model_build import building, decoder_layers
from remora.comm.errors import UnsupportedModelError

NUM_TOKENS = 5  # T of the probe
FAR = 1 << 18  # the rule of a mask is looked for up to this distance
# Keyword arguments of the attention interface that change nothing for us; others must be None.
HARMLESS = {
    "dropout",
    "scaling",
    "sliding_window",  # the mask is the truth: eager transformers does not look at this one
    "softcap",
    "s_aux",
    "position_ids",
    "cache_position",
    "is_causal",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "position_embeddings",
}
_numbers = itertools.count()


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


@dataclass(slots=True)
class SeenLayer:
    """What one decoder layer asked for."""

    attention: AttentionSpec | None = None
    top_k: int | None = None


@dataclass(slots=True)
class Watch:
    """Sees one pass. `layer` is the decoder layer that runs."""

    model_type: str
    hidden_size: int
    layer: int = -1
    layers: dict[int, SeenLayer] = field(default_factory=dict)
    linears: set[str] = field(default_factory=set)  # nn.Linear modules that were called
    rules: list[tuple[Tensor, Callable[..., Any]]] = field(default_factory=list)  # mask, its rule
    windows: dict[int, int | None] = field(default_factory=dict)  # by index of the rule

    def refuse(self, reason: str) -> UnsupportedModelError:
        """The error to raise."""
        where = f"layer {self.layer}: " if self.layer >= 0 else ""
        return UnsupportedModelError(f"{self.model_type}: {where}{reason}")

    def mask(self, *, mask_function: Callable[..., Any], **_: Any) -> Tensor:
        """Mask interface: a stand-in whose rule is remembered."""
        mask = torch.empty((1, 1, NUM_TOKENS, NUM_TOKENS), dtype=torch.bool, device="meta")
        self.rules.append((mask, mask_function))
        return mask

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attention interface: [1, H, T, k_dim], [1, J, T, k_dim], [1, J, T, v_dim]."""
        seen = self.layers.setdefault(self.layer, SeenLayer())
        if self.layer < 0 or seen.attention is not None:
            raise self.refuse("attention outside the decoder layers, or twice in one")
        unknown = sorted(k for k, v in kwargs.items() if v is not None and k not in HARMLESS)
        if unknown:
            raise self.refuse(f"attention with {', '.join(unknown)} is not served")
        if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
            raise self.refuse("attention that is not causal")
        num_heads, k_dim, v_dim = query.shape[1], query.shape[3], value.shape[3]
        num_kv_heads = key.shape[1]
        expected = (1, num_kv_heads, NUM_TOKENS)
        if tuple(key.shape) != (*expected, k_dim) or tuple(value.shape) != (*expected, v_dim):
            raise self.refuse(
                f"attention over keys {tuple(key.shape)} and values {tuple(value.shape)}, which "
                f"are not those of the step's {NUM_TOKENS} tokens"
            )
        seen.attention = AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            k_dim=k_dim,
            v_dim=v_dim,
            scale=float(scaling if scaling is not None else k_dim**-0.5),
            sliding_window=self._window(attention_mask),
            soft_cap=kwargs.get("softcap"),
            has_sinks=kwargs.get("s_aux") is not None,
        )
        return query.new_empty((1, NUM_TOKENS, num_heads, v_dim)), None

    def route(
        self, module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor, **kwargs: Any
    ) -> Tensor:
        """Experts interface: [T, D], [T, K], [T, K]."""
        seen = self.layers.setdefault(self.layer, SeenLayer())
        if self.layer < 0 or seen.top_k is not None or kwargs:
            raise self.refuse("experts called outside the decoder layers, twice, or with extras")
        if tuple(hidden.shape) != (NUM_TOKENS, self.hidden_size):
            raise self.refuse(
                f"experts work on rows of shape {tuple(hidden.shape)}; [tokens, hidden_size="
                f"{self.hidden_size}] is served"
            )
        if index.dim() != 2 or index.shape != weights.shape or index.shape[0] != NUM_TOKENS:
            raise self.refuse(f"routing of shape {tuple(index.shape)} and {tuple(weights.shape)}")
        seen.top_k = index.shape[1]
        return torch.empty_like(hidden)

    def _window(self, mask: Tensor | None) -> int | None:
        for index, (known, rule) in enumerate(self.rules):
            if known is mask:
                if index not in self.windows:  # layers share their masks
                    self.windows[index] = self._window_of(rule)
                return self.windows[index]
        raise self.refuse(
            "a mask of its own making reaches attention (sparse attention?); causal and "
            "sliding-window attention are served"
        )

    def _window_of(self, rule: Callable[..., Any]) -> int | None:
        """The sliding window of a mask rule, None where it is plainly causal.

        The reach is read off a far position; then the rule must be that window, no more and no
        less, at others: chunked, prefix, block and sparse masks are not.
        """
        keys = torch.arange(FAR)
        reach = int(self._allowed(rule, FAR - 1, keys).sum())
        for position in (FAR - 1, FAR - 7, FAR // 2 + 3, FAR // 2, 5, 0):
            window = (keys <= position) & (keys > position - reach)
            if not torch.equal(self._allowed(rule, position, keys), window):
                raise self.refuse(
                    "its attention mask is neither causal nor a sliding window (chunked, prefix "
                    "or sparse attention is not served)"
                )
        return None if reach == FAR else reach

    def _allowed(self, rule: Callable[..., Any], position: int, keys: Tensor) -> Tensor:
        zero = torch.zeros((), dtype=torch.int64)
        try:
            allowed = torch.as_tensor(rule(zero, zero, torch.tensor(position), keys))
            return allowed.to("cpu", torch.bool).expand(keys.shape)
        except (RuntimeError, IndexError, TypeError, NotImplementedError) as error:
            reason = f"its attention mask depends on more than positions: {error}"
            raise self.refuse(reason) from error


class ProbeCache:
    """Stands where the KV cache stands: empty, and returns keys and values as given."""

    is_compileable = False

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """What came in goes to attention."""
        return key, value

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        """Nothing is cached."""
        return 0

    def get_query_offset(self, *_: Any) -> int:
        """The probe's tokens are the first."""
        return 0

    def get_mask_sizes(self, query_length: int, *_: Any) -> tuple[int, int]:
        """Key length and offset of a mask."""
        return query_length, 0


def watch_one_pass(model: Any) -> Watch:
    """Run `model` (meta device, real non-persistent buffers) once over `NUM_TOKENS` tokens.

    Raises:
        UnsupportedModelError: anything that cannot be served, and why.
    """
    text = model.config.get_text_config()
    watch = Watch(model_type=model.config.model_type, hidden_size=text.hidden_size)
    ids = torch.zeros((1, NUM_TOKENS), dtype=torch.int64, device="meta")
    with building, torch.no_grad(), _watching(model, watch):
        try:
            model(
                input_ids=ids,
                position_ids=torch.arange(NUM_TOKENS, device="meta")[None],
                past_key_values=ProbeCache(),
                use_cache=True,
                logits_to_keep=torch.zeros(1, dtype=torch.int64, device="meta"),
            )
        except UnsupportedModelError:
            raise
        except Exception as error:  # any model code may fail in any way: say where and what
            raise watch.refuse(f"a pass on the meta device failed: {error!r}") from error
    watch.layer = -1
    for index, layer in enumerate(decoder_layers(model)[1]):
        if watch.layers.get(index, SeenLayer()).attention is None:
            kinds = getattr(text, "layer_types", None)
            kind = f" ({kinds[index]})" if kinds else ""
            raise watch.refuse(
                f"layer {index}{kind}, {type(layer).__name__}, has no softmax attention behind "
                f"the attention interface; state-space and linear-attention layers are not served"
            )
    return watch


@contextlib.contextmanager
def _watching(model: Any, watch: Watch) -> Iterator[None]:
    """Interfaces, layers and rotary modules of `model` report to `watch` meanwhile."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.moe import ExpertsInterface

    name = f"remora_probe_{next(_numbers)}"
    interfaces = (
        (AttentionInterface, watch.attend),
        (AttentionMaskInterface, watch.mask),
        (ExpertsInterface, watch.route),
    )
    before = model.config._attn_implementation, model.config._experts_implementation
    handles = [
        layer.register_forward_pre_hook(_set_layer(watch, index))
        for index, layer in enumerate(decoder_layers(model)[1])
    ]
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(_add(watch.linears, path)))
    rotaries = [module for module in model.modules() if "Rotary" in type(module).__name__]
    for module in rotaries:
        module.forward = _on_cpu(module.forward)
    for interface, function in interfaces:
        interface.register(name, function)
    model.config._attn_implementation = name
    model.config._experts_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation, model.config._experts_implementation = before
        for interface, _ in interfaces:
            del interface._global_mapping[name]
        for module in rotaries:
            del module.forward
        for handle in handles:
            handle.remove()


def _set_layer(watch: Watch, index: int) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        watch.layer = index

    return hook


def _add(called: set[str], path: str) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        called.add(path)

    return hook


def _on_cpu(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Rotary modules look at positions (dynamic kinds branch on the largest): give real ones."""

    def real(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.device.type != "meta":
            return value
        if value.is_floating_point():
            return torch.zeros(value.shape, dtype=value.dtype)
        return torch.arange(NUM_TOKENS).expand(value.shape)

    def run(*args: Any, **kwargs: Any) -> Any:
        result = forward(*pytree.tree_map(real, args), **pytree.tree_map(real, kwargs))
        return pytree.tree_map(lambda v: v.to("meta") if isinstance(v, Tensor) else v, result)

    return run
