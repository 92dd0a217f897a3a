"""A load generator's end of OpenAI streams, as thin as possible: it shares the cores it measures.

One connection per stream, HTTP/1.1. Events are counted by the blank line that ends each; nothing is
decoded but the last one's `usage`.
"""

import asyncio
import json
import re
import time
from functools import partial

USAGE = re.compile(rb'"completion_tokens": ?(\d+)')
TAIL_BYTES = 2048  # holds the last events, with the usage


class Stream(asyncio.Protocol):
    """One POST whose answer is a stream of server-sent events."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._tail = b""
        self._seen_head = False
        self.num_events = 0
        self.first_s = 0.0  # perf_counter of the first event
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Sends the request."""
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Counts events: `\\n\\n`, which chunk frames and headers (`\\r\\n`) cannot contain."""
        if not self._seen_head:
            if b" 200 " not in data.split(b"\r\n", 1)[0]:
                self._finish(RuntimeError(f"server answered {data[:300]!r}"))
                return
            self._seen_head = True
        at = self._tail[-1:] + data
        events = at.count(b"\n\n")
        if events and not self.num_events:
            self.first_s = time.perf_counter()
        self.num_events += events
        self._tail = (self._tail + data)[-TAIL_BYTES:]
        if b"data: [DONE]" in self._tail[-64:]:
            self._finish(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """Before the end of the stream this is a failure."""
        self._finish(RuntimeError(f"connection lost ({exc}) after {self.num_events} events"))

    @property
    def num_tokens(self) -> int:
        """`usage.completion_tokens` of the last event."""
        found = USAGE.findall(self._tail)
        if not found:
            raise RuntimeError(f"no usage in the last events: {self._tail!r}")
        return int(found[-1])

    def _finish(self, error: Exception | None) -> None:
        if self.done.done():
            return
        if error is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(error)


def completion_request(host: str, model: str, prompt: list[int], num_new: int) -> bytes:
    """POST /v1/completions: token ids in, greedy, never ending early, streamed, with usage."""
    body = json.dumps(
        {
            "model": model,
            "prompt": prompt,
            "max_tokens": num_new,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


async def stream_all(
    host: str, port: int, model: str, prompts: list[list[int]], num_new: int
) -> dict[str, float]:
    """Runs one stream per prompt at once; the workers' answer to "generate", and `num_events`."""
    loop = asyncio.get_running_loop()
    begin = time.perf_counter()
    streams = []
    for prompt in prompts:
        request = completion_request(f"{host}:{port}", model, prompt, num_new)
        _, stream = await loop.create_connection(partial(Stream, request), host, port)
        streams.append(stream)
    await asyncio.gather(*(stream.done for stream in streams))
    return {
        "seconds": time.perf_counter() - begin,
        "first_s": max(stream.first_s for stream in streams) - begin,
        "num_tokens": sum(stream.num_tokens for stream in streams),
        "num_events": sum(stream.num_events for stream in streams),
    }
