"""`/v1/chat/completions`: from its body to a job, and from pieces to its answers."""

import time
import uuid
from typing import Any

from remora.actors.tokenizer import Tokenizer
from remora.cluster.choice import Piece
from remora.cluster.generation import Generation
from remora.cluster.logprob_text import chat_logprobs
from remora.cluster.openai_schema import ChatRequest, Message
from remora.cluster.request_plan import (
    Job,
    ModelInfo,
    Prompt,
    RequestLimits,
    check_counts,
    check_logprobs,
    check_model,
    resolve_max_tokens,
    resolve_sampling,
)
from remora.cluster.sse import ChunkTail, to_json, usage_dict
from remora.comm.errors import RequestError


def plan_chat(
    request: ChatRequest, model: ModelInfo, limits: RequestLimits, tokenizer: Tokenizer
) -> Job:
    """Everything checked, the template applied, tokenised; runs off the event loop.

    Raises:
        RequestError: what was asked for cannot be.
    """
    check_model(request.model, model)
    check_counts(1, request.n or 1, limits)
    check_logprobs(request.top_logprobs, limits, "top_logprobs")
    if request.top_logprobs and not request.logprobs:
        raise RequestError("top_logprobs needs logprobs = true", param="top_logprobs")
    ids = encode_chat(request.messages, request.template_kwargs, tokenizer)
    asked, param = request.max_completion_tokens, "max_completion_tokens"
    if asked is None:
        asked, param = request.max_tokens, "max_tokens"
    max_tokens = resolve_max_tokens(len(ids), asked, None, model, param)
    params = resolve_sampling(
        request,
        model,
        max_tokens=max_tokens,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        turn_end_id=tokenizer.turn_end_id,
    )
    return Job(
        prompts=(Prompt(ids=ids, text=None, params=params),),
        n=request.n or 1,
        seed=request.seed,
        stops=request.stop_texts,
        skip_special_tokens=request.skip_special_tokens is not False,
        priority=request.priority or 0,
        domain=request.domain,
        turn_end_id=tokenizer.turn_end_id,
    )


def encode_chat(
    messages: list[Message], kwargs: dict[str, Any] | None, tokenizer: Tokenizer
) -> list[int]:
    """Token ids of a conversation through the model's chat template.

    `developer` is the newer name of `system`, which templates know.
    """
    turns = []
    for message in messages:
        role = "system" if message.role == "developer" else message.role
        turn: dict[str, Any] = {"role": role, "content": message.text}
        if message.name is not None:
            turn["name"] = message.name
        turns.append(turn)
    text = tokenizer.render_chat(turns, kwargs or {})
    return tokenizer.encode(text, add_special_tokens=False)


class ChatFormat:
    """Spells the answers of `/v1/chat/completions`."""

    def __init__(
        self,
        request: ChatRequest,
        generation: Generation,
        model: ModelInfo,
        tokenizer: Tokenizer,
    ) -> None:
        self._request = request
        self._generation = generation
        self._tokenizer = tokenizer
        self._num_top = request.top_logprobs or 0
        self._plain = not request.logprobs and not request.return_token_ids
        self._common = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": model.id,
            "system_fingerprint": model.fingerprint,
        }
        common = {**self._common, "object": "chat.completion.chunk"}
        self._prompt_ids = {"prompt_token_ids": generation.job.prompts[0].ids}
        self._head = b"data: " + to_json(common)[:-1] + b',"choices":['
        first = {**common, **self._prompt_ids} if request.return_token_ids else common
        self._first_head = b"data: " + to_json(first)[:-1] + b',"choices":['
        self._tail = ChunkTail(
            self._head,
            generation.usage,
            include=request.include_usage,
            continuous=request.continuous_usage,
        )
        self._opened: dict[int, bytes] = {}  # choice -> start of its text chunks
        self._collected: dict[int, list[Piece]] = {}

    def chunks(self, pieces: list[Piece]) -> bytes:
        """Events of one step; a choice begins with its role and ends with its finish, apart."""
        tail = self._tail.end()
        out = []
        for piece in pieces:
            index = piece.choice.index
            start = self._opened.get(index)
            if start is None:
                head = self._head if self._opened else self._first_head
                role = {"role": "assistant", "content": ""}
                start = self._head + b'{"index":%d,"delta":{"content":' % index
                self._opened[index] = start
                out.append(head + to_json(_choice(index, role)) + tail)
            if piece.text or piece.token_ids:
                if self._plain:
                    if piece.text:
                        text = to_json(piece.text)
                        out.append(start + text + b'},"logprobs":null,"finish_reason":null}' + tail)
                else:
                    out.append(self._head + to_json(self._text_choice(piece)) + tail)
            if piece.is_last:
                finish = _choice(index, {})
                finish["finish_reason"] = piece.choice.finish_reason
                finish["stop_reason"] = piece.choice.stop_reason
                out.append(self._head + to_json(finish) + tail)
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
        answer = {**self._common, "choices": choices, "usage": usage_dict(self._generation.usage)}
        if self._request.return_token_ids:
            answer.update(self._prompt_ids)
        return answer

    def _whole(self, index: int) -> dict[str, Any]:
        pieces = self._collected[index]
        choice = pieces[0].choice
        text = "".join(piece.text for piece in pieces)
        tokens = [token for piece in pieces for token in piece.tokens]
        wanted = bool(self._request.logprobs)
        result: dict[str, Any] = {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": chat_logprobs(tokens, self._tokenizer, self._num_top) if wanted else None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if self._request.return_token_ids:
            result["token_ids"] = choice.token_ids
        return result

    def _text_choice(self, piece: Piece) -> dict[str, Any]:
        choice = _choice(piece.choice.index, {"content": piece.text})
        if self._request.logprobs:
            choice["logprobs"] = chat_logprobs(piece.tokens, self._tokenizer, self._num_top)
        if self._request.return_token_ids:
            choice["token_ids"] = piece.token_ids
        return choice


def _choice(index: int, delta: dict[str, str]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
