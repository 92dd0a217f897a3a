"""Records routing from a checkpoint and texts, without a cluster: `transformers`' own forward pass.

Every token of a text is read once (teacher forcing, so phase PREFILL), in windows. What the experts
modules are given is what is written down: the hooks stand before the same interface that a dense
group is dispatched through. Memory is one batch and one block of the trace.

Shape suffixes: B texts of a batch, S positions, T tokens of the batch, L MoE layers, K top-k.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from remora.actors.model_build import expert_sites
from remora.actors.model_spec import inspect_model, resolve_dtype
from remora.actors.tokenizer import Tokenizer
from remora.comm.errors import TraceError, WeightsError
from remora.comm.trace import TraceHeader, TraceWriter, make_trace

TEXT_CHARS_MAX = 16 << 20  # that are tokenised at once


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFile:
    """Where texts come from and how their tokens are labelled."""

    path: Path
    domain: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordPlan:
    """What to record."""

    window: int  # tokens of one text that are read; the rest of it makes further windows
    tokens_max: int  # of the whole file
    batch: int = 8  # windows in one pass
    with_weights: bool = False


def read_texts(path: Path) -> Iterator[str]:
    """Texts of a file: `.jsonl` has one JSON string, or object with "text", a line; any other
    file is one text, which comes in pieces where it is long.

    Raises:
        TraceError: it cannot be read, or a line is something else or too long.
    """
    try:
        with path.open(encoding="utf-8") as file:
            if path.suffix != ".jsonl":
                yield from iter(lambda: file.read(TEXT_CHARS_MAX), "")
                return
            lines = iter(lambda: file.readline(TEXT_CHARS_MAX + 1), "")
            for number, line in enumerate(lines, 1):
                if len(line) > TEXT_CHARS_MAX:
                    raise TraceError(
                        f"{path}, line {number}: longer than {TEXT_CHARS_MAX:,} characters"
                    )
                if line.strip():
                    yield _text_of(path, number, line)
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: cannot be read: {error}") from error


def _text_of(path: Path, number: int, line: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise TraceError(f"{path}, line {number}: no JSON: {error}") from error
    text = value.get("text") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise TraceError(f'{path}, line {number}: must be a string or an object with "text"')
    return text


def record_texts(
    checkpoint: str,
    files: Sequence[TextFile],
    output: Path,
    plan: RecordPlan,
    *,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda tokens: None,
) -> int:
    """Write the trace of some texts; returns the tokens in it.

    Raises:
        WeightsError, UnsupportedModelError: as `inspect_model`, or transformers cannot load it.
        TraceError: a text cannot be read, or the trace not written.
    """
    spec = inspect_model(checkpoint)
    tokenizer = Tokenizer(checkpoint)
    header = TraceHeader(
        model=checkpoint,
        num_experts=spec.num_experts,
        top_k=spec.top_k,
        moe_layers=spec.moe_layers,
        vocab_size=spec.vocab_size,
        has_weights=plan.with_weights,
        note="teacher forcing",
    )
    window = min(plan.window, spec.max_positions)
    for file in files:  # before a model is loaded
        next(read_texts(file.path), None)
    with TraceWriter(output, header, overwrite=overwrite) as writer:
        model = _load(checkpoint, resolve_dtype(spec, "auto"))
        taken = watch_experts(model)
        request = 0
        for file in files:
            windows = _windows(tokenizer, file.path, window)
            while batch := list(islice(windows, plan.batch)):
                room = plan.tokens_max - writer.num_tokens
                rows = _run(model, taken, batch)
                trace = make_trace(
                    header,
                    experts_LTK=rows.experts_LTK[:, :room],
                    weights_LTK=None if not plan.with_weights else rows.weights_LTK[:, :room],
                    request_T=rows.window_T[:room] + request,
                    position_T=rows.position_T[:room],
                    token_T=rows.token_T[:room],
                    domain=file.domain,
                )
                writer.append(trace)
                request += len(batch)
                progress(writer.num_tokens)
                if writer.num_tokens >= plan.tokens_max:
                    return writer.num_tokens
        return writer.num_tokens


def _load(checkpoint: str, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            experts_implementation="grouped_mm",  # two to three times as fast as a loop over them
        )
    except (OSError, ValueError) as error:
        raise WeightsError(f"{checkpoint}: transformers cannot load it: {error}") from error
    return model.eval()


def watch_experts(model: Any) -> list[tuple[Tensor, Tensor]]:
    """Hooks that append (index, weights) of every experts module as it is called."""
    taken: list[tuple[Tensor, Tensor]] = []

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = [*args, *kwargs.values()]
        assert len(values) == 3, f"{type(module).__name__} was given {len(values)} arguments"
        taken.append((values[1], values[2]))

    for site in expert_sites(model):
        site.module.register_forward_pre_hook(note, with_kwargs=True)
    return taken


def _windows(tokenizer: Tokenizer, path: Path, window: int) -> Iterator[list[int]]:
    for text in read_texts(path):
        ids = tokenizer.encode(text)
        for begin in range(0, len(ids), window):
            yield ids[begin : begin + window]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """The real tokens of one batch, window after window."""

    token_T: np.ndarray[Any, Any]
    position_T: np.ndarray[Any, Any]
    window_T: np.ndarray[Any, Any]
    experts_LTK: np.ndarray[Any, Any]
    weights_LTK: np.ndarray[Any, Any]


def _run(model: Any, taken: list[tuple[Tensor, Tensor]], batch: list[list[int]]) -> _Rows:
    """One pass. Windows are padded at the end, where causal attention does not look."""
    longest = max(map(len, batch))
    ids_BS = torch.tensor([ids + [0] * (longest - len(ids)) for ids in batch])
    length_B = torch.tensor([len(ids) for ids in batch])
    is_real_BS = torch.arange(longest) < length_B[:, None]
    taken.clear()
    with torch.inference_mode():
        # without the head: nobody asks for logits
        model.base_model(input_ids=ids_BS, attention_mask=is_real_BS.long(), use_cache=False)
    real = is_real_BS.reshape(-1)
    window_T, position_T = is_real_BS.nonzero(as_tuple=True)
    return _Rows(
        token_T=ids_BS.reshape(-1)[real].numpy(),
        position_T=position_T.numpy(),
        window_T=window_T.numpy(),
        experts_LTK=np.stack([index[real].numpy() for index, _ in taken]),
        weights_LTK=np.stack([weights[real].float().numpy() for _, weights in taken]),
    )
