"""Log-probabilities as the two APIs spell them."""

from collections.abc import Iterable
from typing import Any

from remora.actors.tokenizer import Tokenizer
from remora.cluster.choice import TokenInfo
from remora.comm.messages import TokenLogprobs

LOGPROB_MIN = -9999.0  # JSON has no infinity


def finite(logprob: float) -> float:
    """A log-probability that JSON can carry: minus infinity and NaN become `LOGPROB_MIN`."""
    return logprob if logprob >= LOGPROB_MIN else LOGPROB_MIN


def completion_logprobs(
    tokens: Iterable[TokenInfo], tokenizer: Tokenizer, base: int
) -> dict[str, list[Any]]:
    """The `logprobs` object of a completion; `base` characters of the text come before."""
    result: dict[str, list[Any]] = {
        "tokens": [],
        "token_logprobs": [],
        "top_logprobs": [],
        "text_offset": [],
    }
    for token in tokens:
        entry = token.logprobs
        result["tokens"].append(tokenizer.token_text(entry.token_id))
        result["token_logprobs"].append(finite(entry.logprob))
        result["top_logprobs"].append(_top(entry, tokenizer))
        result["text_offset"].append(base + token.offset)
    return result


def echo_logprobs(
    prompt_ids: list[int], entries: list[TokenLogprobs], tokenizer: Tokenizer, own: slice
) -> dict[str, list[Any]]:
    """The `logprobs` object of an echoed prompt: its first token has none, hence null.

    Args:
        own: tokens that are text of the prompt; the others (a first one, say) have no length.
    """
    stream = tokenizer.stream([], skip_special_tokens=False)
    offset, offsets = 0, []
    for position, token_id in enumerate(prompt_ids):
        offsets.append(offset)
        if own.start <= position < own.stop:
            offset += len(stream.push(token_id))
    return {
        "tokens": [tokenizer.token_text(token_id) for token_id in prompt_ids],
        "token_logprobs": [None, *(finite(entry.logprob) for entry in entries)],
        "top_logprobs": [None, *(_top(entry, tokenizer) for entry in entries)],
        "text_offset": offsets,
    }


def chat_logprobs(
    tokens: Iterable[TokenInfo], tokenizer: Tokenizer, num_top: int
) -> dict[str, list[Any]]:
    """The `logprobs` object of a chat choice."""
    content = []
    for token in tokens:
        entry = token.logprobs
        one = _chat_token(entry.token_id, entry.logprob, tokenizer)
        pairs = list(zip(entry.top_ids, entry.top_logprobs, strict=True))[:num_top]
        one["top_logprobs"] = [_chat_token(i, value, tokenizer) for i, value in pairs]
        content.append(one)
    return {"content": content}


def _top(entry: TokenLogprobs, tokenizer: Tokenizer) -> dict[str, float]:
    top = {
        tokenizer.token_text(token_id): finite(value)
        for token_id, value in zip(entry.top_ids, entry.top_logprobs, strict=True)
    }
    top.setdefault(tokenizer.token_text(entry.token_id), finite(entry.logprob))
    return top


def _chat_token(token_id: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "token": tokenizer.token_text(token_id),
        "logprob": finite(logprob),
        "bytes": list(tokenizer.token_bytes(token_id)),
    }
