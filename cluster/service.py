"""What one ingress works with, whoever calls it: HTTP routes or another Serve application."""

import asyncio
import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

import msgspec
from pydantic import BaseModel

from remora.actors.tokenizer import Tokenizer
from remora.cluster.admission import Admission
from remora.cluster.chat import ChatFormat, plan_chat
from remora.cluster.completions import CompletionFormat, plan_completion
from remora.cluster.config import RemoraConfig
from remora.cluster.engine_client import EngineClient
from remora.cluster.gate import Keys
from remora.cluster.generation import Generation, Serving
from remora.cluster.metrics import IngressMetrics
from remora.cluster.openai_schema import ChatRequest, CompletionRequest
from remora.cluster.operation_request import Operations
from remora.cluster.operation_routes import OperationCalls
from remora.cluster.request_plan import ModelInfo, RequestLimits
from remora.cluster.security import ADMIN_KEYS_ENV, API_KEYS_ENV, load_keys
from remora.cluster.sse import Format

TOKENIZER_THREADS = 2
PARSE_OFF_LOOP_BYTES = 32 << 10  # a larger body is checked on a thread (about 0.1 ms at this size)

P = ParamSpec("P")
R = TypeVar("R")
Body = TypeVar("Body", bound=BaseModel)


@dataclass(slots=True, kw_only=True)
class Service:
    """One ingress without its HTTP."""

    model: ModelInfo
    limits: RequestLimits
    serving: Serving
    keys: Keys
    body_bytes_max: int
    access_log: bool
    operations: OperationCalls
    watch: asyncio.Task[None] | None = None  # ends with the service
    pool: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(TOKENIZER_THREADS, "remora-tokenizer")
    )

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.serving.tokenizer

    async def parse(self, model: type[Body], data: bytes) -> Body:
        """A checked body. Raises pydantic's `ValidationError`."""
        if len(data) > PARSE_OFF_LOOP_BYTES:
            return await self.off_loop(model.model_validate_json, data)
        return model.model_validate_json(data)

    async def completion(self, request: CompletionRequest) -> tuple[Generation, Format]:
        """A planned completion, not started. Raises RequestError."""
        plan = await self.off_loop(
            plan_completion, request, self.model, self.limits, self.tokenizer
        )
        generation = Generation(self.serving, plan)
        return generation, CompletionFormat(request, generation, self.model, self.tokenizer)

    async def chat(self, request: ChatRequest) -> tuple[Generation, Format]:
        """A planned chat answer, not started. Raises RequestError."""
        plan = await self.off_loop(plan_chat, request, self.model, self.limits, self.tokenizer)
        generation = Generation(self.serving, plan)
        return generation, ChatFormat(request, generation, self.model, self.tokenizer)

    async def off_loop(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run `function` on the tokenizer's threads."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.pool, lambda: function(*args, **kwargs))

    async def close(self) -> None:
        """Let go of engines and threads."""
        if self.watch is not None:
            self.watch.cancel()
            await asyncio.gather(self.watch, return_exceptions=True)
        await self.serving.engine.close()
        self.pool.shutdown(wait=False, cancel_futures=True)
        self.operations.close()


def make_service(
    config: RemoraConfig,
    *,
    model: ModelInfo,
    tokenizer: Tokenizer,
    engine: EngineClient,
    operations: Operations | None = None,
) -> Service:
    """A service from its configuration and what was loaded for it.

    Args:
        operations: the deployment as operators see it, for `/v1/ep/*`.

    Raises:
        ConfigError: a keys file that cannot be used.
    """
    http = config.http
    return Service(
        model=model,
        limits=RequestLimits(
            batch_max=http.batch_max,
            n_max=http.n_max,
            logprobs_max=http.logprobs_max,
            queue_max=http.queue_max,
        ),
        serving=Serving(
            engine=engine,
            tokenizer=tokenizer,
            admission=Admission(http.queue_max),
            metrics=IngressMetrics(
                engine.stats, engine.routed, engine.traffic, lambda: engine.num_replays
            ),
            timeout_s=http.request_timeout_s,
        ),
        keys=Keys(
            api=load_keys(http.api_keys_file, API_KEYS_ENV),
            admin=load_keys(http.admin_keys_file, ADMIN_KEYS_ENV),
        ),
        body_bytes_max=http.body_bytes_max,
        access_log=http.access_log,
        operations=OperationCalls(operations),
    )


def fingerprint_of(config: RemoraConfig) -> str:
    """`system_fingerprint`: changes when answers may, with the model or the numerics."""
    data = [config.model_id, config.numerics, config.dtype, config.executor]
    return "fp_" + hashlib.blake2b(msgspec.json.encode(data), digest_size=6).hexdigest()
