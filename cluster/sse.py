"""Server-sent events without overhead: JSON fragments built once per choice, one write per step.

A token costs one JSON string and a few joins of bytes (`benchmarks/http_overhead.py` measures it).
The response starts with the first output, so that a failure before it still has its own status.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Protocol

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from remora.cluster.choice import Piece
from remora.cluster.errors_http import as_request_error, error_body
from remora.cluster.generation import ClientGone, Generation, Usage

logger = logging.getLogger(__name__)

LAST_WRITE_S = 5.0  # a client that is told of its timeout has as long to read that
ANSWER_ON_LOOP_TOKENS = 4096  # up to some ten milliseconds with log-probabilities
DONE = b"data: [DONE]\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]

to_json = msgspec.json.Encoder().encode


class Format(Protocol):
    """How one kind of answer is spelled."""

    def chunks(self, pieces: list[Piece]) -> bytes:
        """Events of one step of a stream."""

    def closing(self) -> bytes:
        """Events after the last step, without `[DONE]`."""

    def add(self, pieces: list[Piece]) -> None:
        """Collect one step of an answer that does not stream."""

    def answer(self) -> dict[str, Any]:
        """The whole answer, once everything was added."""


def usage_dict(usage: Usage) -> dict[str, Any]:
    """The `usage` object."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


class ChunkTail:
    """The end of each chunk: `usage` as `stream_options` ask for it.

    `include_usage`: null in every chunk and a last one with empty `choices`;
    `continuous_usage_stats`: the figures so far in every chunk.
    """

    def __init__(self, head: bytes, usage: Usage, *, include: bool, continuous: bool) -> None:
        self._head = head
        self._usage = usage
        self._include = include
        self._continuous = continuous

    def end(self) -> bytes:
        """From the end of `choices` to the end of the event."""
        if self._continuous:
            return b'],"usage":' + to_json(usage_dict(self._usage)) + b"}\n\n"
        return b'],"usage":null}\n\n' if self._include else b"]}\n\n"

    def closing(self) -> bytes:
        """The last chunk, if usage was asked for."""
        if not self._include:
            return b""
        return self._head + b'],"usage":' + to_json(usage_dict(self._usage)) + b"}\n\n"


class EventStream(Response):
    """A streaming answer: runs the generation and writes its events."""

    def __init__(self, generation: Generation, form: Format) -> None:
        self.status_code = 200
        self.background = None
        self._generation = generation
        self._format = form

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; the generation is closed whatever happens.

        Raises:
            RequestError, ClusterError: before the first output; nothing was sent then.
        """
        generation = self._generation
        watcher = asyncio.ensure_future(_watch(receive, generation))
        try:
            async with asyncio.timeout(generation.timeout_s + LAST_WRITE_S) as limit:
                await self._serve(send)
        except ClientGone:
            return
        except TimeoutError:  # it reads nothing: the server closes the connection
            if not limit.expired():
                raise
            logger.info("a client did not take its answer in %g s", generation.timeout_s)
        finally:
            watcher.cancel()
            generation.close()

    async def _serve(self, send: Send) -> None:
        generation, form = self._generation, self._format
        started = False
        try:
            await generation.start()
            pieces = await generation.next()
            await send({"type": "http.response.start", "status": 200, "headers": list(_HEADERS)})
            started = True
            while pieces:
                await _write(send, form.chunks(pieces), True)
                pieces = await generation.next()
            await _write(send, form.closing() + DONE, False)
        except ClientGone:
            raise
        except Exception as error:
            if not started:
                raise
            failure = as_request_error(error)
            await _write(send, b"data: " + error_body(failure) + b"\n\n" + DONE, False)


async def collect(
    generation: Generation, form: Format, receive: Receive | None
) -> dict[str, Any] | None:
    """A whole answer; None when the client went away first.

    Raises:
        RequestError, ClusterError: the generation failed.
    """
    watcher = asyncio.ensure_future(_watch(receive, generation)) if receive else None
    try:
        await generation.start()
        while pieces := await generation.next():
            form.add(pieces)
        usage = generation.usage
        if usage.prompt_tokens + usage.completion_tokens <= ANSWER_ON_LOOP_TOKENS:
            return form.answer()
        return await asyncio.to_thread(form.answer)  # seconds of Python: streams must go on
    except ClientGone:
        return None
    finally:
        if watcher is not None:
            watcher.cancel()
        generation.close()


async def _watch(
    receive: Callable[[], Awaitable[MutableMapping[str, Any]]], generation: Generation
) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    generation.cancel()


async def _write(send: Send, body: bytes, more: bool) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})
