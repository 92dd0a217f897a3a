"""One request on its way through the engine.

`Generation` admits a job, submits its sequences and turns step outputs into `Piece`s. It ends in
`close`, which aborts what nobody waits for any more.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from remora.actors.tokenizer import Tokenizer
from remora.cluster.admission import Admission
from remora.cluster.choice import Choice, Piece
from remora.cluster.engine_client import EngineClient
from remora.cluster.inbox import Inbox
from remora.cluster.metrics import IngressMetrics
from remora.cluster.request_plan import Job, sequence_seed, with_seed
from remora.comm.errors import RemoraError, RequestError
from remora.comm.messages import SequenceOutput, Submit

TIMEOUT_CODE = "request_timeout"


@dataclass(slots=True)
class Usage:
    """Tokens of a request so far."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


@dataclass(slots=True)
class Serving:
    """What every request of one ingress shares."""

    engine: EngineClient
    tokenizer: Tokenizer
    admission: Admission
    metrics: IngressMetrics
    timeout_s: float
    clock: Callable[[], float] = time.perf_counter  # uvloop's own counts whole milliseconds


class Generation:
    """A job being served. `start`, then `next` until it gives nothing, then `close` in any case."""

    def __init__(self, serving: Serving, job: Job) -> None:
        self.job = job
        self.choices: list[Choice] = []
        self.usage = Usage(prompt_tokens=sum(len(prompt.ids) for prompt in job.prompts))
        self._serving = serving
        self._inbox = Inbox()
        self._by_id: dict[str, Choice] = {}
        self._started_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._admitted = 0
        self._left_as = "abort"  # what those are counted as that have not finished

    @property
    def timeout_s(self) -> float:
        """Seconds that the whole request may take."""
        return self._serving.timeout_s

    async def start(self) -> None:
        """Admit, ask where to, submit.

        Raises:
            OverloadedError: the queue is full (429).
            ClusterError: no dense group is connected (503).
        """
        serving, job = self._serving, self.job
        try:
            serving.admission.admit(job.num_sequences)
        except RequestError:
            serving.metrics.refuse(job.num_sequences)
            raise
        self._admitted = job.num_sequences
        serving.metrics.accept(self._admitted, self.usage.prompt_tokens)
        self._started_s = serving.clock()
        for prompt in job.prompts:
            for number in range(job.n):
                params = with_seed(prompt.params, sequence_seed(job.seed, number))
                choice = Choice(len(self.choices), prompt, params, job, serving.tokenizer)
                self.choices.append(choice)
                self._by_id[choice.request_id] = choice
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(serving.timeout_s, self._on_timeout)
        submits = [
            Submit(
                request_id=choice.request_id,
                prompt_ids=choice.prompt.ids,
                params=choice.params,
                priority=job.priority,
                domain=job.domain,
            )
            for choice in self.choices
        ]
        with self._failing():
            await serving.engine.submit(submits, self._inbox)

    async def next(self) -> list[Piece]:
        """What the next step adds, at least one piece; empty when every choice is finished.

        Raises:
            RequestError: the engine gave a sequence up, or the time is over.
            ClusterError: its dense group was lost.
            ClientGone: `cancel` was called.
        """
        pieces: list[Piece] = []
        with self._failing():
            while not pieces and self._by_id:
                outputs = await self._inbox.take()
                now_s = self._serving.clock()
                for output in outputs:
                    choice = self._by_id.get(output.request_id)
                    if choice is None:  # ended by a stop string while this was on its way
                        continue
                    piece = choice.absorb(output)
                    self._count(choice, output, now_s)
                    if choice.finish_reason is not None:
                        self._finish(choice, output)
                    if piece is not None:
                        pieces.append(piece)
        return pieces

    def cancel(self) -> None:
        """The client is gone: `next` raises `ClientGone`."""
        self._inbox.fail(ClientGone())

    def close(self) -> None:
        """Abort what still runs and give the room back. Twice does nothing."""
        for choice in self._by_id.values():
            self._serving.engine.abort(choice.request_id)
            self._serving.metrics.finished.labels(self._left_as).inc()
        self._by_id.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._admitted:
            now_s = self._serving.clock()
            self._serving.admission.release(self._admitted, now_s)
            self._serving.metrics.release(self._admitted, now_s - self._started_s)
            self._admitted = 0

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """What fails here is not counted as a client that went away."""
        try:
            yield
        except RemoraError as failure:
            is_late = isinstance(failure, RequestError) and failure.code == TIMEOUT_CODE
            self._left_as = "timeout" if is_late else "error"
            raise

    def _finish(self, choice: Choice, output: SequenceOutput) -> None:
        del self._by_id[choice.request_id]
        if output.finish_reason is None:  # a stop string: the engine does not know yet
            self._serving.engine.abort(choice.request_id)
        self._serving.metrics.finished.labels(choice.finish_reason).inc()

    def _count(self, choice: Choice, output: SequenceOutput, now_s: float) -> None:
        num_tokens = len(output.token_ids)
        first_s = None
        if choice.last_s == 0.0:
            first_s = now_s - self._started_s
            if choice.index % self.job.n == 0:
                self.usage.cached_tokens += output.num_cached_tokens
        metrics = self._serving.metrics
        metrics.output(num_tokens, first_s=first_s, since_s=now_s - choice.last_s)
        choice.last_s = now_s
        self.usage.completion_tokens += num_tokens

    def _on_timeout(self) -> None:
        self._inbox.fail(
            RequestError(
                f"the request took longer than {self._serving.timeout_s:g} s",
                status=504,
                type="timeout_error",
                code=TIMEOUT_CODE,
            )
        )


class ClientGone(Exception):
    """The client closed its connection while the request ran."""
