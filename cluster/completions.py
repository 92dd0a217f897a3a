"""`/v1/completions`: from its body to a job, and from pieces to its answers."""

import time
import uuid
from typing import Any

from remora.actors.tokenizer import Tokenizer
from remora.cluster.choice import Piece
from remora.cluster.generation import Generation
from remora.cluster.logprob_text import completion_logprobs, echo_logprobs
from remora.cluster.openai_schema import CompletionRequest
from remora.cluster.request_plan import (
    COMPLETION_TOKENS,
    Job,
    ModelInfo,
    Prompt,
    RequestLimits,
    check_counts,
    check_ids,
    check_logprobs,
    check_model,
    resolve_max_tokens,
    resolve_sampling,
)
from remora.cluster.sse import ChunkTail, to_json, usage_dict
from remora.comm.errors import RequestError
from remora.comm.wire import FRAME_BYTES_MAX

SCORE_BYTES, TOP_BYTES = 75, 15  # of a scored token on the wire, and of each rival of it; measured


def plan_completion(
    request: CompletionRequest, model: ModelInfo, limits: RequestLimits, tokenizer: Tokenizer
) -> Job:
    """Everything checked and tokenised; runs off the event loop.

    Raises:
        RequestError: what was asked for cannot be.
    """
    check_model(request.model, model)
    check_logprobs(request.logprobs, limits, "logprobs")
    prompts = _prompts(request)
    check_counts(len(prompts), request.n or 1, limits)
    if request.max_tokens == 0 and not request.echo:
        raise RequestError("max_tokens = 0 is allowed only with echo", param="max_tokens")
    planned = []
    for prompt in prompts:
        ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        check_ids(ids, model, "prompt")
        if request.echo and request.logprobs is not None:
            _check_answer(len(ids), request.logprobs)
        max_tokens = resolve_max_tokens(
            len(ids), request.max_tokens, COMPLETION_TOKENS, model, "max_tokens"
        )
        params = resolve_sampling(
            request,
            model,
            max_tokens=max_tokens,
            logprobs=request.logprobs,
            prompt_logprobs=request.logprobs if request.echo else None,
        )
        text = prompt if isinstance(prompt, str) else None
        planned.append(Prompt(ids=ids, text=text, params=params))
    return Job(
        prompts=tuple(planned),
        n=request.n or 1,
        seed=request.seed,
        stops=request.stop_texts,
        skip_special_tokens=request.skip_special_tokens is not False,
        priority=request.priority or 0,
        domain=request.domain,
        scores_end=True,  # harnesses count on one entry for each token that was generated
    )


class CompletionFormat:
    """Spells the answers of `/v1/completions`."""

    def __init__(
        self,
        request: CompletionRequest,
        generation: Generation,
        model: ModelInfo,
        tokenizer: Tokenizer,
    ) -> None:
        self._request = request
        self._generation = generation
        self._model = model
        self._tokenizer = tokenizer
        self._plain = request.logprobs is None and not request.return_token_ids
        self._common = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model.id,
            "system_fingerprint": model.fingerprint,
        }
        self._head = b"data: " + to_json(self._common)[:-1] + b',"choices":['
        self._tail = ChunkTail(
            self._head,
            generation.usage,
            include=request.include_usage,
            continuous=request.continuous_usage,
        )
        self._opened: dict[int, bytes] = {}  # choice -> start of its text chunks
        self._collected: dict[int, list[Piece]] = {}
        self._echoed: dict[int, str] = {}  # choice -> text of its prompt

    def chunks(self, pieces: list[Piece]) -> bytes:
        """Events of one step."""
        tail = self._tail.end()
        out = []
        for piece in pieces:
            index = piece.choice.index
            start = self._opened.get(index)
            if start is None:
                start = self._head + b'{"index":%d,"text":' % index
                self._opened[index] = start
                if self._request.echo or self._request.return_token_ids:
                    out.append(self._head + to_json(self._prompt_chunk(piece)) + tail)
            if piece.text or piece.token_ids:
                if self._plain:
                    if piece.text:
                        text = to_json(piece.text)
                        out.append(start + text + b',"logprobs":null,"finish_reason":null}' + tail)
                else:
                    out.append(self._head + to_json(self._text_chunk(piece)) + tail)
            if piece.is_last:
                out.append(self._head + to_json(self._finish_chunk(piece)) + tail)
        return b"".join(out)

    def closing(self) -> bytes:
        """The usage chunk, if asked for."""
        return self._tail.closing()

    def add(self, pieces: list[Piece]) -> None:
        """Collect one step."""
        for piece in pieces:
            self._collected.setdefault(piece.choice.index, []).append(piece)

    def answer(self) -> dict[str, Any]:
        """The whole answer."""
        choices = [self._whole(index) for index in sorted(self._collected)]
        usage = usage_dict(self._generation.usage)
        return {**self._common, "choices": choices, "usage": usage}

    def _whole(self, index: int) -> dict[str, Any]:
        pieces = self._collected[index]
        choice = pieces[0].choice
        result: dict[str, Any] = {"index": index, "text": "".join(piece.text for piece in pieces)}
        logprobs = None
        if self._request.echo:
            result["text"] = self._prompt_text(pieces[0]) + result["text"]
        if self._request.logprobs is not None:
            tokens = [token for piece in pieces for token in piece.tokens]
            logprobs = completion_logprobs(tokens, self._tokenizer, self._base(pieces[0]))
            if self._request.echo:
                prompt = self._prompt_logprobs(pieces[0])
                logprobs = {key: prompt[key] + logprobs[key] for key in logprobs}
        result["logprobs"] = logprobs
        result["finish_reason"] = choice.finish_reason
        result["stop_reason"] = choice.stop_reason
        if self._request.return_token_ids:
            result["token_ids"] = choice.token_ids
            result["prompt_token_ids"] = choice.prompt.ids
        return result

    def _prompt_chunk(self, piece: Piece) -> dict[str, Any]:
        """What comes before the first token: the echo, the prompt's ids."""
        chunk: dict[str, Any] = {"index": piece.choice.index, "text": "", "logprobs": None}
        if self._request.echo:
            chunk["text"] = self._prompt_text(piece)
            if self._request.logprobs is not None:
                chunk["logprobs"] = self._prompt_logprobs(piece)
        chunk["finish_reason"] = None
        if self._request.return_token_ids:
            chunk["prompt_token_ids"] = piece.choice.prompt.ids
            chunk["token_ids"] = []
        return chunk

    def _text_chunk(self, piece: Piece) -> dict[str, Any]:
        chunk: dict[str, Any] = {
            "index": piece.choice.index,
            "text": piece.text,
            "logprobs": None,
            "finish_reason": None,
        }
        if self._request.logprobs is not None:
            base = self._base(piece)
            chunk["logprobs"] = completion_logprobs(piece.tokens, self._tokenizer, base)
        if self._request.return_token_ids:
            chunk["token_ids"] = piece.token_ids
        return chunk

    def _finish_chunk(self, piece: Piece) -> dict[str, Any]:
        return {
            "index": piece.choice.index,
            "text": "",
            "logprobs": None,
            "finish_reason": piece.choice.finish_reason,
            "stop_reason": piece.choice.stop_reason,
        }

    def _prompt_text(self, piece: Piece) -> str:
        index = piece.choice.index
        text = self._echoed.get(index)
        if text is None:
            prompt = piece.choice.prompt
            text = prompt.text
            if text is None:
                text = self._tokenizer.decode(prompt.ids, skip_special_tokens=False)
            self._echoed[index] = text
        return text

    def _base(self, piece: Piece) -> int:
        return len(self._prompt_text(piece)) if self._request.echo else 0

    def _prompt_logprobs(self, piece: Piece) -> dict[str, list[Any]]:
        choice = piece.choice
        entries = choice.prompt_logprobs or []
        ids, text = choice.prompt.ids, choice.prompt.text
        own = slice(0, len(ids)) if text is None else _own_tokens(ids, text, self._tokenizer)
        return echo_logprobs(ids, entries, self._tokenizer, own)


def _own_tokens(ids: list[int], text: str, tokenizer: Tokenizer) -> slice:
    """Which of a prompt's tokens are its text's; the tokenizer has put the others around them."""
    bare = tokenizer.encode(text, add_special_tokens=False)
    for first in range(len(ids) - len(bare) + 1):
        if ids[first : first + len(bare)] == bare:
            return slice(first, first + len(bare))
    return slice(0, len(ids))


def _check_answer(num_tokens: int, num_logprobs: int) -> None:
    """Raises `RequestError` where a prompt's log-probabilities would not fit into one message."""
    allowed = FRAME_BYTES_MAX // 2 // (SCORE_BYTES + TOP_BYTES * num_logprobs)
    if num_tokens > allowed:
        raise RequestError(
            f"echo with logprobs = {num_logprobs} of {num_tokens} prompt tokens: at most {allowed}"
            " tokens are allowed, as their log-probabilities travel together; cut the prompt, or"
            " lower logprobs",
            param="logprobs",
        )


def _prompts(request: CompletionRequest) -> list[str | list[int]]:
    prompt = request.prompt
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [list(prompt)]  # the schema has checked: all are ints
    return list(prompt)  # strings, or lists of ints
