"""Arrivals of a real trace as requests to a service: which window, and what clients saw.

Lengths are those of the trace, clipped; the trace has no text, so a prompt is drawn from the number
of its request. Arrays: R requests.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from autoscale_model import TTFT_S, Floats

from remora.cluster.openai_schema import CompletionRequest
from remora.cluster.service import Service
from remora.comm.errors import RemoraError

PROMPT_MAX, OUTPUT_MAX = 32, 24  # tokens; lengths of the trace are clipped to these
FACTORS = np.geomspace(0.25, 16, 200)  # of compression, to choose from
PEAK_S, SHIFT_S = 60.0, 10.0  # of the trace's time
ITL_S = 0.25
PATIENCE_S = 300.0  # for what was asked to be answered


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """at_s: when it is sent, from the begin of the replay."""

    at_s: float
    prompt_ids: list[int]
    num_new: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a client saw. late_s: how much after its time it was sent, by our own fault."""

    ttft_s: float
    itl_s: float  # mean
    token_ids: list[int]
    late_s: float
    failure: str | None = None

    @property
    def is_good(self) -> bool:
        return self.failure is None and self.ttft_s <= TTFT_S and self.itl_s <= ITL_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Of the trace. peak_ratio: requests of its highest `PEAK_S` over its mean."""

    begin_s: float
    compression: float
    peak_ratio: float
    requests: list[Request]


def chosen_window(table_R3: Floats, *, arm_s: float, rate: float) -> Window:
    """Of all windows that take `arm_s`, each with its time compressed so that its mean is `rate`
    requests a second, that with the highest ratio of its highest `PEAK_S` to its mean.

    A length of window has one compression; of lengths, the one that comes closest to `rate` counts.
    """
    best: tuple[float, float, float, float] | None = None
    for factor in FACTORS:
        begin_s, ratio, mean = highest(table_R3[:, 0], arm_s * factor)
        off = abs(mean * factor - rate)
        if best is None or off < best[0]:
            best = (off, begin_s, float(factor), ratio)
    assert best is not None
    _, begin_s, factor, ratio = best
    at_R = table_R3[:, 0]
    inside = table_R3[(at_R >= begin_s) & (at_R < begin_s + arm_s * factor)]
    requests = [
        request_of(number, (at_s - begin_s) / factor, prompt, output)
        for number, (at_s, prompt, output) in enumerate(inside)
    ]
    return Window(begin_s=begin_s, compression=factor, peak_ratio=ratio, requests=requests)


def highest(at_R: Floats, window_s: float) -> tuple[float, float, float]:
    """Begin, highest `PEAK_S` over mean, and mean rate, of the window where that ratio is highest;
    an infinite rate where none of that length fits."""
    begins = np.arange(0.0, at_R[-1] - window_s, SHIFT_S)
    if not len(begins) or window_s < PEAK_S:
        return 0.0, 1.0, float("inf")
    count = np.histogram(at_R, np.arange(0.0, at_R[-1] + SHIFT_S, SHIFT_S))[0]
    peak = np.convolve(count, np.ones(int(PEAK_S / SHIFT_S)), "valid") / PEAK_S
    num_peaks = int((window_s - PEAK_S) / SHIFT_S) + 1
    found = []
    for index, begin_s in enumerate(begins):
        inside = np.searchsorted(at_R, [begin_s, begin_s + window_s])
        rate = float(inside[1] - inside[0]) / window_s
        found.append(
            (float(peak[index : index + num_peaks].max()) / max(rate, 1e-9), begin_s, rate)
        )
    ratio, begin_s, rate = max(found)
    return float(begin_s), ratio, rate


def request_of(number: int, at_s: float, prompt: float, output: float) -> Request:
    """With lengths as in the trace, clipped, and a prompt that depends on the number alone."""
    drawn = np.random.default_rng(number)
    ids = drawn.integers(10, 8000, int(np.clip(prompt, 1, PROMPT_MAX))).tolist()
    return Request(at_s=float(at_s), prompt_ids=ids, num_new=int(np.clip(output, 2, OUTPUT_MAX)))


async def answered(service: Service, request: Request, late_s: float = 0.0) -> Answer:
    """Greedily; a failure is told, not raised."""
    begin_s = last_s = time.perf_counter()
    first_s: float | None = None
    tokens: list[int] = []
    failure = None
    body = CompletionRequest(
        model=None, prompt=request.prompt_ids, max_tokens=request.num_new, temperature=0,
        ignore_eos=True,
    )  # fmt: skip
    try:
        generation, _ = await service.completion(body)
        try:
            await generation.start()
            while pieces := await generation.next():
                last_s = time.perf_counter()
                first_s = first_s or last_s
                tokens += [token for piece in pieces for token in piece.token_ids]
        finally:
            generation.close()
    except RemoraError as error:
        failure = f"{type(error).__name__}: {error}"
    if failure is None and generation.usage.completion_tokens != request.num_new:
        failure = f"{generation.usage.completion_tokens} tokens instead of {request.num_new}"
    return Answer(
        ttft_s=float("inf") if first_s is None else first_s - begin_s + late_s,
        itl_s=0.0 if first_s is None else (last_s - first_s) / max(1, request.num_new - 1),
        token_ids=tokens,
        late_s=late_s,
        failure=failure,
    )


async def replayed(service: Service, requests: Sequence[Request]) -> list[Answer]:
    """Each sent at its time, whatever became of those before it (an open loop)."""
    begin_s = time.perf_counter()

    async def one(request: Request) -> Answer:
        left_s = request.at_s - (time.perf_counter() - begin_s)
        await asyncio.sleep(max(0.0, left_s))
        return await answered(service, request, time.perf_counter() - begin_s - request.at_s)

    async with asyncio.timeout(requests[-1].at_s + PATIENCE_S):
        return await asyncio.gather(*(one(request) for request in requests))


async def capacity_of(
    service: Service, requests: Sequence[Request], *, clients: int, for_s: float
) -> tuple[float, float]:
    """Requests and tokens (prompt + output) a second while there are always some that wait."""
    end_s = time.perf_counter() + for_s
    waiting = iter(requests)
    done: list[Request] = []

    async def client() -> None:
        for request in waiting:
            answer = await answered(service, request)
            if answer.failure is not None:
                raise RuntimeError(answer.failure)
            if time.perf_counter() > end_s:
                return
            done.append(request)

    async with asyncio.timeout(for_s + PATIENCE_S):
        await asyncio.gather(*(client() for _ in range(clients)))
    tokens = sum(len(request.prompt_ids) + request.num_new for request in done)
    return len(done) / for_s, tokens / for_s
