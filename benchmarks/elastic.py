"""Operations under streams: what users feel while shards come and go and experts move.

    .venv/bin/python benchmarks/elastic.py --quick

A real Ray cluster on this machine serves the demo model in `exact` numerics to streams that never
stop. Per operation (2 -> 4 -> 3 -> 2 shards, then every expert to the other shard): seconds to
serving and to done, experts copied, and tokens/s, 99th percentile of gaps between a stream's tokens
and the longest gap, during the operation and in a window just before it. Every request's tokens are
compared with those of its prompt before any operation. At the end the deployment is stopped and
started with four shards, which is what scaling up without elasticity costs.
"""

import asyncio
import itertools
import time
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common
import numpy as np
import ray
from engines_report import Bar, Spread

from remora.actors.launch import RAY_NAMESPACE, host_label
from remora.cluster.bootstrap import (
    ClusterHandle,
    ensure_cluster,
    neutral_runtime_env,
    stop_cluster,
)
from remora.cluster.config import RemoraConfig, parse_config
from remora.cluster.operation import PlaceAs, ScaleTo, Target
from remora.comm.aio import AsyncConnection, connect_async
from remora.comm.messages import (
    SamplingParams,
    SequenceOutput,
    StepOutputs,
    Submit,
    decode_to_ingress,
    encode,
)

MODEL = Path(__file__).resolve().parent.parent / "examples" / "demo-model"
NAME = "bench-elastic"
NUM_EXPERTS, NUM_LAYERS = 32, 8  # of the demo model
NUM_STREAMS = 4
PROMPTS_EACH = 3  # of a stream, in turn
NUM_NEW = 128
AFTER_S = 0.5  # a gap that an operation made may end after it


@dataclass
class Stream:
    """Requests of one stream, one after the other."""

    prompts: list[list[int]]
    expected: dict[int, list[int]] = field(default_factory=dict)  # by prompt
    number: int = 0  # of the request that runs
    tokens: list[int] = field(default_factory=list)
    last_s: float | None = None


@dataclass(frozen=True)
class Window:
    """What came in some seconds."""

    tokens_per_s: float
    gap_p99_ms: float
    gap_max_ms: float


def window(tokens: list[tuple[float, int, float | None]], begin_s: float, end_s: float) -> Window:
    """Of (when, tokens, gap before them in the stream: None for a first token)."""
    inside = [t for t in tokens if begin_s <= t[0] < end_s]
    gaps = [gap for at, _, gap in tokens if begin_s <= at < end_s + AFTER_S and gap is not None]
    return Window(
        tokens_per_s=sum(count for _, count, _ in inside) / (end_s - begin_s),
        gap_p99_ms=1e3 * float(np.percentile(gaps, 99)) if gaps else float("inf"),
        gap_max_ms=1e3 * max(gaps, default=float("inf")),
    )


class Streams:
    """Streams over one control connection to the dense group."""

    def __init__(self, link: AsyncConnection) -> None:
        self._link = link
        drawn = np.random.default_rng(0)
        self._streams = [
            Stream([drawn.integers(10, 8000, 16).tolist() for _ in range(PROMPTS_EACH)])
            for _ in range(NUM_STREAMS)
        ]
        self.tokens: list[tuple[float, int, float | None]] = []
        self.failed: list[str] = []
        self.num_done = self.num_different = 0
        self.warm = asyncio.Event()  # every prompt has been answered once

    async def run(self) -> None:
        """Until cancelled."""
        for index in range(NUM_STREAMS):
            self._submit(index)
        async for payload in self._link:
            message = decode_to_ingress(payload)
            if isinstance(message, StepOutputs):
                now_s = time.perf_counter()
                for output in message.outputs:
                    self._take(output, now_s)

    def _submit(self, index: int) -> None:
        stream = self._streams[index]
        stream.tokens, stream.last_s = [], None
        params = SamplingParams(max_tokens=NUM_NEW, temperature=0.0, ignore_eos=True)
        prompt = stream.prompts[stream.number % PROMPTS_EACH]
        name = f"{index}/{stream.number}"
        self._link.send(encode(Submit(request_id=name, prompt_ids=prompt, params=params)))

    def _take(self, output: SequenceOutput, now_s: float) -> None:
        index = int(output.request_id.partition("/")[0])
        stream = self._streams[index]
        if output.token_ids:
            gap_s = None if stream.last_s is None else now_s - stream.last_s
            self.tokens.append((now_s, len(output.token_ids), gap_s))
            stream.tokens += output.token_ids
            stream.last_s = now_s
        if output.finish_reason is None:
            return
        if output.finish_reason == "length":
            prompt = stream.number % PROMPTS_EACH
            same = stream.expected.setdefault(prompt, stream.tokens) == stream.tokens
            self.num_different += not same
            self.num_done += 1
        else:
            self.failed.append(f"{output.request_id}: {output.finish_reason} {output.error}")
        stream.number += 1
        if all(len(each.expected) == PROMPTS_EACH for each in self._streams):
            self.warm.set()
        self._submit(index)


def settings(shards: int) -> RemoraConfig:
    """Of a deployment of the demo model."""
    small = {"num_cpus": 0.5, "threads": 1}
    return parse_config(
        {
            "name": NAME,
            "model": str(MODEL),
            "numerics": "exact",
            "executor": "eager",
            "dense": {**small, "max_model_len": 256, "prefix_caching": False},
            "experts": {**small, "shards": shards, "slots": NUM_EXPERTS},
        }
    )


def halves(first: str, second: str) -> PlaceAs:
    """Half of the experts of every layer in each of two shards."""
    half = NUM_EXPERTS // 2
    low, high = tuple(range(half)), tuple(range(half, NUM_EXPERTS))
    return PlaceAs({first: (low,) * NUM_LAYERS, second: (high,) * NUM_LAYERS})


async def operations(
    handle: ClusterHandle, pause_s: float, rounds: int
) -> tuple[list[Any], Streams]:
    """A row for each operation, and what the streams have seen."""
    [member] = handle.dense_members()
    link = await connect_async(
        member.endpoint,
        handle.token,
        host_label(),
        name="benchmark",
        incarnation=member.incarnation,
    )
    streams = Streams(link)
    running = asyncio.ensure_future(streams.run())
    rows = []
    try:
        await streams.warm.wait()
        steps: list[tuple[str, Target]] = [
            ("settle", halves("shard-0", "shard-1")),
            ("2 to 4", ScaleTo(4)),
            ("4 to 3", ScaleTo(3)),
            ("3 to 2", ScaleTo(2)),
            ("halves", halves("shard-0", "shard-1")),
            ("turned", halves("shard-1", "shard-0")),
        ]
        for number, (name, target) in itertools.product(range(rounds), steps):
            begin_s = time.perf_counter()
            await asyncio.sleep(pause_s)
            paired = window(streams.tokens, begin_s, time.perf_counter())
            begin_s = time.perf_counter()
            found = await asyncio.to_thread(handle.done, f"{name}-{number}", target)
            end_s = time.perf_counter()
            if found["outcome"] != "done":
                raise RuntimeError(f"{name}: {found['reason']}")
            await asyncio.sleep(AFTER_S)
            during = window(streams.tokens, begin_s, end_s)
            if name not in ("settle", "halves"):  # those only make the next one what it is
                rows.append(_row(name, found, paired, during))
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await link.close()
    return rows, streams


def _row(name: str, found: dict[str, Any], paired: Window, during: Window) -> dict[str, Any]:
    return {
        "operation": name,
        "serving_s": round(found["serving_s"], 2),
        "done_s": round(found["ended_s"], 2),
        "experts": found["moved"],
        "tokens_per_s": round(paired.tokens_per_s, 1),
        "during": round(during.tokens_per_s, 1),
        "throughput_ratio": round(during.tokens_per_s / paired.tokens_per_s, 3),
        "gap_p99_ms": round(paired.gap_p99_ms, 1),
        "p99_during_ms": round(during.gap_p99_ms, 1),
        "gap_max_ms": round(paired.gap_max_ms, 1),
        "max_during_ms": round(during.gap_max_ms, 1),
        "gap_ratio": round(during.gap_max_ms / paired.gap_max_ms, 2),
    }


def main(args: Namespace) -> None:
    """Measure, print, write."""
    ray.init(num_cpus=8, namespace=RAY_NAMESPACE, runtime_env=neutral_runtime_env())
    try:
        handle = ensure_cluster(settings(2))
        try:
            pause_s, rounds = (4.0, 1) if args.quick else (10.0, 3)
            rows, streams = asyncio.run(operations(handle, pause_s, rounds))
            begin_s = time.perf_counter()
        finally:
            stop_cluster(NAME)
        ensure_cluster(settings(4))
        cold_s = time.perf_counter() - begin_s
        stop_cluster(NAME)
    finally:
        ray.shutdown()
    for failure in streams.failed:
        print(f"FAILED {failure}")
    print(f"{streams.num_done} requests of {NUM_NEW} tokens; stop and start with 4: {cold_s:.1f} s")
    common.finish("elastic", args, rows, bars(rows, streams, cold_s))


def bars(rows: list[dict[str, Any]], streams: Streams, cold_s: float) -> list[Bar]:
    """The issue's, over all operations: worst ones are the range of a spread."""

    def of(key: str) -> Spread:
        return Spread.of([row[key] for row in rows])

    up = Spread.of([row["serving_s"] for row in rows if row["operation"] == "2 to 4"])
    ratio = Spread.of([cold_s / s for s in (up.median, up.max, up.min)])
    identical = float(streams.num_different == 0 and streams.num_done > 0)
    failed = float(len(streams.failed))
    worst = Spread.of([min(row["throughput_ratio"] for row in rows)])
    gap = Spread.of([max(row["gap_ratio"] for row in rows)])
    return [
        Bar(name="failed_requests", value=Spread.of([failed]), unit="", op="<=", target=0.0),
        Bar(name="identical_tokens", value=Spread.of([identical]), unit="", op=">=", target=1.0),
        Bar(name="throughput_during_ratio", value=worst, unit="x", op=">=", target=0.85),
        Bar(name="throughput_during_ratio_all", value=of("throughput_ratio"), unit="x"),
        Bar(name="longest_gap_ratio", value=gap, unit="x", op="<=", target=2.0),
        Bar(name="longest_gap_ratio_all", value=of("gap_ratio"), unit="x"),
        Bar(name="scale_up_s_cold", value=up, unit="s"),
        Bar(name="scale_up_vs_cold_restart", value=ratio, unit="x"),
    ]


if __name__ == "__main__":
    main(common.parser(__doc__).parse_args())
