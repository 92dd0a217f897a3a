"""A live deployment of the demo model and streams over it, which see every gap and every token.

What `benchmarks/elastic.py`, `benchmarks/faults.py` and the live tests of elasticity share. Streams
talk to the dense groups as an ingress does (`EngineClient`: router, replay, waiting), without HTTP.
Half of the prompts are decoded greedily, half are sampled with a seed.
"""

import asyncio
import os
import signal
import time
from bisect import bisect_left
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import numpy as np
import ray
from locations import DEMO_MODEL
from ray_actors import living_names, process_of

from remora.actors.launch import RAY_NAMESPACE, host_label
from remora.cluster.bootstrap import ClusterHandle, neutral_runtime_env
from remora.cluster.config import RemoraConfig, parse_config
from remora.cluster.engine_client import EngineClient
from remora.cluster.inbox import Inbox
from remora.cluster.operation import Target
from remora.cluster.router_client import RouterClient
from remora.comm.errors import ClusterError
from remora.comm.messages import SamplingParams, Submit

NUM_EXPERTS, NUM_LAYERS = 32, 8  # of the demo model
NUM_STREAMS = 4
PROMPTS_EACH = 3  # of a stream, in turn
AFTER_S = 0.5  # a gap that an operation made may end after it
SOON_S = 120.0


@contextmanager
def one_node(num_cpus: int = 16) -> Iterator[None]:
    """A Ray cluster of one node of our own."""
    ray.init(
        address="local",  # never a cluster of somebody else's that happens to run here
        num_cpus=num_cpus,
        namespace=RAY_NAMESPACE,
        runtime_env=neutral_runtime_env(),
        include_dashboard=False,  # a dozen processes
    )
    try:
        yield
    finally:
        ray.shutdown()


def deployment(name: str, *, shards: int = 2, dense: int = 1, **sections: Any) -> RemoraConfig:
    """Of the demo model in `exact` numerics; every shard has slots for all experts."""
    small = {"num_cpus": 0.5, "threads": 1}
    whole: dict[str, Any] = {
        "name": name,
        "model": str(DEMO_MODEL),
        "numerics": "exact",
        "executor": "eager",
        "dense": {**small, "groups": dense, "max_model_len": 256, "prefix_caching": False},
        "experts": {**small, "shards": shards, "slots": NUM_EXPERTS},
    }
    for section, values in sections.items():
        whole[section] = {**whole.get(section, {}), **values}
    return parse_config(whole)


@dataclass(frozen=True)
class Window:
    """What came in some seconds."""

    tokens_per_s: float
    gap_p99_ms: float
    gap_max_ms: float


def window(tokens: list[tuple[float, int, float | None]], begin_s: float, end_s: float) -> Window:
    """Of (when, tokens, gap before them in the stream: None for a first token), in order of time.

    No pass over all tokens: while it took one, those that came would be stamped late.
    """
    first, end, over = (
        bisect_left(tokens, at_s, key=itemgetter(0)) for at_s in (begin_s, end_s, end_s + AFTER_S)
    )
    gaps = [gap for _, _, gap in tokens[first:over] if gap is not None]
    return Window(
        tokens_per_s=sum(count for _, count, _ in tokens[first:end]) / (end_s - begin_s),
        gap_p99_ms=1e3 * float(np.percentile(gaps, 99)) if gaps else float("inf"),
        gap_max_ms=1e3 * max(gaps, default=float("inf")),
    )


@dataclass
class Stream:
    """Requests of one stream, one after the other."""

    prompts: list[list[int]]
    expected: dict[int, list[int]] = field(default_factory=dict)  # by prompt
    number: int = 0  # of the request that runs


class Streams:
    """Requests again and again; every answer must be as that of the same prompt was at first.

    Attributes:
        tokens: (when, how many, seconds since the stream's last ones; None: first of a request).
        failed: why requests did not end as they should.
        num_done, num_different: requests that ended, and those of them with other tokens.
    """

    def __init__(self, engine: EngineClient, *, num_new: int) -> None:
        self.engine = engine
        self._num_new = num_new
        drawn = np.random.default_rng(0)
        self._streams = [
            Stream([drawn.integers(10, 8000, 16).tolist() for _ in range(PROMPTS_EACH)])
            for _ in range(NUM_STREAMS)
        ]
        self.tokens: list[tuple[float, int, float | None]] = []
        self.failed: list[str] = []
        self.num_done = self.num_different = 0
        self._progress = asyncio.Event()
        self._stopping = False

    def add(self, other: "Streams") -> None:
        """Count what others have seen, too."""
        self.failed += other.failed
        self.num_done += other.num_done
        self.num_different += other.num_different

    async def run(self) -> None:
        """Until `stop`, and the requests that run then have ended."""
        await asyncio.gather(*(self._flow(index) for index in range(NUM_STREAMS)))

    def stop(self) -> None:
        """Begin no more requests."""
        self._stopping = True

    async def one_more(self) -> None:
        """Until every stream has ended a request that began after this call."""
        await self._until([stream.number + 2 for stream in self._streams])

    async def warm(self) -> None:
        """Until every prompt has been answered once."""
        await self._until([PROMPTS_EACH] * NUM_STREAMS)

    def window(self, begin_s: float, end_s: float) -> Window:
        """What came between two readings of `time.perf_counter`."""
        return window(self.tokens, begin_s, end_s)

    async def _until(self, wanted: list[int]) -> None:
        async with asyncio.timeout(SOON_S):
            while any(s.number < n for s, n in zip(self._streams, wanted, strict=True)):
                self._progress.clear()
                await self._progress.wait()

    async def _flow(self, index: int) -> None:
        stream = self._streams[index]
        while not self._stopping:
            name = f"{index}/{stream.number}"
            try:
                tokens = await self._answer(name, stream.number % PROMPTS_EACH, stream)
            except ClusterError as failure:
                self.failed.append(f"{name}: {failure}")
                await asyncio.sleep(AFTER_S)  # nobody is there: not thousands of failures
            else:
                prompt = stream.number % PROMPTS_EACH
                self.num_different += stream.expected.setdefault(prompt, tokens) != tokens
                self.num_done += 1
            stream.number += 1
            self._progress.set()

    async def _answer(self, name: str, prompt: int, stream: Stream) -> list[int]:
        params = SamplingParams(
            max_tokens=self._num_new,
            temperature=float(prompt % 2),
            seed=prompt,
            ignore_eos=True,
        )
        inbox, last_s = Inbox(), None
        tokens: list[int] = []
        submit = Submit(request_id=name, prompt_ids=stream.prompts[prompt], params=params)
        await self.engine.submit([submit], inbox)
        while True:
            for output in await inbox.take():
                if output.finish_reason in ("error", "abort"):
                    raise ClusterError(f"{output.finish_reason}: {output.error}")
                now_s = time.perf_counter()
                if output.token_ids:
                    gap_s = None if last_s is None else now_s - last_s
                    self.tokens.append((now_s, len(output.token_ids), gap_s))
                    tokens += output.token_ids
                    last_s = now_s
                if output.finish_reason is not None:
                    return tokens


@asynccontextmanager
async def flowing(
    config: RemoraConfig, handle: ClusterHandle, *, num_new: int = 64
) -> AsyncIterator[Streams]:
    """Streams over a deployment, warm; at the end those that run are let end."""

    async def members() -> Any:
        return await asyncio.to_thread(handle.dense_members)

    async def router_address() -> str | None:
        return await asyncio.to_thread(handle.router_address)

    timeout_s = config.router.route_timeout_s
    engine = EngineClient(
        members,
        token=handle.token,
        self_host=host_label(),
        router=RouterClient(router_address, token=handle.token, timeout_s=timeout_s),
        hold_s=config.elastic.hold_s,
    )
    await engine.start()
    streams = Streams(engine, num_new=num_new)
    running = asyncio.ensure_future(streams.run())
    try:
        await streams.warm()
        yield streams
        streams.stop()
        await asyncio.wait_for(running, SOON_S)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await engine.close()


async def operate(handle: ClusterHandle, operation_id: str, target: Target) -> dict[str, Any]:
    """Have an operation done. Raises RuntimeError: it failed."""
    operation = await asyncio.to_thread(handle.done, operation_id, target)
    if operation["outcome"] != "done":
        raise RuntimeError(f"{operation_id}: {operation['reason']}")
    return operation


async def until(found: Callable[[], Awaitable[bool]]) -> float:
    """Wait for something that is polled for; the seconds that it took."""
    begin_s = time.perf_counter()
    async with asyncio.timeout(SOON_S):
        while not await found():
            await asyncio.sleep(0.1)
    return time.perf_counter() - begin_s


async def over(handle: ClusterHandle, operation_id: str) -> dict[str, Any]:
    """An operation of anybody's, once it has begun and is over."""
    found: dict[str, Any] = {}

    async def is_over() -> bool:
        try:
            found.update(await asyncio.to_thread(handle.wait, operation_id))
        except ClusterError:  # it has not begun, or the coordinator is being started again
            return False
        return bool(found["outcome"] != "running")

    await until(is_over)
    return found


def living(name: str) -> set[str]:
    """Actors of a deployment, as `uid#incarnation`."""
    return {actor.removeprefix(f"remora/{name}/") for actor in living_names(name)}


async def strike(actor_name: str, fault: signal.Signals) -> int:
    """Send a signal to the process of an actor; its pid."""
    pid = await asyncio.to_thread(process_of, actor_name)
    os.kill(pid, fault)
    return pid
