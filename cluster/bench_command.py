"""`remora bench`: how fast a deployment decodes, and with `--phases` where a step's time goes.

It measures a deployment that runs, or brings one up in a Ray cluster of its own, without an
ingress: the load goes straight to the first dense group. Every batch is run once to warm up. Decode
throughput is taken between the first and the last token of a batch, phases between two readings of
the rank's counters over the same steps. Loops that Inductor generated carry no counter in an engine
that serves: they are timed in this process afterwards (`actors/loop_profile.py`).
"""

import asyncio
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayTaskError

from remora.actors.launch import RAY_NAMESPACE
from remora.actors.loop_profile import loops_step_us
from remora.actors.model_spec import inspect_model
from remora.cluster.bench_load import EngineLoad, Timing
from remora.cluster.bench_phases import Breakdown, breakdown, phases_table
from remora.cluster.bootstrap import ClusterHandle, ensure_cluster
from remora.cluster.config import RemoraConfig
from remora.cluster.instances import Instance, missing
from remora.cluster.local_ray import own_ray
from remora.cluster.manage_command import deployment_at
from remora.cluster.model_source import local_checkpoint
from remora.comm.errors import ClusterError, ConfigError, RemoraError

FIRST_ID = 8  # below are the special tokens of most vocabularies
SEED = 0
WARM_UP_TOKENS = 4
# It does not wait for the compiler: that takes longer than the measurement, if it works at all.
EAGER = (
    "layers ran eager, at least at first: a model's first deployment here compiles them in the"
    " background, for some minutes (remora status says which run, or why none will)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchPlan:
    """What to run."""

    batches: Sequence[int]
    prompt_tokens: int
    new_tokens: int
    phases: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What one batch size gave."""

    batch: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    first_ms: float
    executor: str  # of the layers: eager or compiled
    phases: Breakdown | None

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "batch": self.batch,
            "prefill_tokens_per_s": round(self.prefill_tokens_per_s, 1),
            "decode_tokens_per_s": round(self.decode_tokens_per_s, 1),
            "first_ms": round(self.first_ms, 2),
            "executor": self.executor,
            "phases": self.phases.as_json() if self.phases else None,
        }


def bench_own(config: RemoraConfig, plan: BenchPlan, *, as_json: bool) -> int:
    """Bring a deployment up, measure it, take it down. Returns the exit status.

    Raises:
        RemoraError: it cannot be served, or a request failed.
    """
    config = config.model_copy(update={"model": local_checkpoint(config.model)})
    _check(config, plan)
    with own_ray(config):
        print(f"starting {config.model_id} ...", file=sys.stderr, flush=True)
        _measure_and_print(ensure_cluster(config), config, plan, as_json)
    return 0


def bench_running(
    name: str, instance: Instance | None, address: str | None, plan: BenchPlan, *, as_json: bool
) -> int:
    """Measure a deployment that runs. Returns the exit status: 3 when there is none.

    Raises:
        RemoraError: a request failed.
    """
    with deployment_at(name, instance.ray_address if instance else address) as handle:
        if handle is None:
            return missing(f"there is no deployment {name!r} here", as_json)
        config = RemoraConfig.model_validate(ray.get(handle.coordinator.config.remote()))
        _check(config, plan)
        _measure_and_print(handle, config, plan, as_json)
    return 0


def _check(config: RemoraConfig, plan: BenchPlan) -> None:
    if max(plan.batches) > config.dense.max_num_seqs:
        raise ConfigError(
            f"batch {max(plan.batches)}: at most dense.max_num_seqs = {config.dense.max_num_seqs}"
            " sequences run in one step"
        )


def _measure_and_print(
    handle: ClusterHandle, config: RemoraConfig, plan: BenchPlan, as_json: bool
) -> None:
    vocab_size = inspect_model(config.model).vocab_size
    samples = asyncio.run(_measure(handle, plan, vocab_size))
    loops_us: dict[int, float] = {}
    if plan.phases and samples[-1].after["executor"] == "compiled":
        print("timing generated loops ...", file=sys.stderr, flush=True)
        loops_us = loops_step_us(
            config.model,
            dtype=config.dtype,
            exact=config.numerics == "exact",
            batches=plan.batches,
        )
    results = [_result(s, plan, loops_us.get(s.batch, 0.0)) for s in samples]
    print(json.dumps([r.as_json() for r in results]) if as_json else results_text(results))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One measured batch, and the rank's counters after its first and its last tokens."""

    batch: int
    timing: Timing
    before: dict[str, Any]
    after: dict[str, Any]


async def _measure(handle: ClusterHandle, plan: BenchPlan, vocab_size: int) -> list[Sample]:
    actor = rank_actor(handle)
    load = await EngineLoad.connect(handle)
    prompts = _prompts(vocab_size, plan.prompt_tokens)
    samples = []
    try:
        for batch in plan.batches:
            warm, measured = ([next(prompts) for _ in range(batch)] for _ in range(2))
            await load.generate(warm, min(WARM_UP_TOKENS, plan.new_tokens))
            samples.append(await sample_batch(load, actor, measured, plan.new_tokens))
    finally:
        await load.close()
    return samples


def rank_actor(handle: ClusterHandle) -> Any:
    """The Ray actor of the first dense group."""
    return ray.get_actor(handle.dense_members()[0].actor_name, namespace=RAY_NAMESPACE)


async def sample_batch(
    load: EngineLoad, actor: Any, prompts: list[list[int]], num_new: int
) -> Sample:
    """Run one batch with a reading of the counters at each of its ends.

    Raises:
        ClusterError: a request failed, or the rank has stopped.
    """
    reading: asyncio.Task[dict[str, Any]] | None = None

    async def begin() -> None:
        nonlocal reading
        reading = asyncio.create_task(_phases(actor))

    timing = await load.generate(prompts, num_new, begin)
    assert reading is not None, "generate returned before the first token"
    return Sample(
        batch=len(prompts), timing=timing, before=await reading, after=await _phases(actor)
    )


async def _phases(actor: Any) -> dict[str, Any]:
    """`DenseActor.phases()`. Raises ClusterError."""
    try:
        reading: dict[str, Any] = await actor.phases.remote()
    except RayTaskError as failure:
        if isinstance(failure.cause, RemoraError):
            raise failure.cause from None
        raise ClusterError(f"the dense rank cannot be asked: {failure.cause}") from failure
    return reading


def _result(sample: Sample, plan: BenchPlan, loops_us: float) -> Result:
    timing, batch = sample.timing, sample.batch
    phases = breakdown(batch, sample.before, sample.after, loops_us) if plan.phases else None
    return Result(
        batch=batch,
        prefill_tokens_per_s=batch * plan.prompt_tokens / timing.first_s,
        decode_tokens_per_s=batch * (plan.new_tokens - 1) / (timing.seconds - timing.first_s),
        first_ms=1e3 * timing.first_s,
        executor=sample.after["executor"],
        phases=phases,
    )


def _prompts(vocab_size: int, num_tokens: int) -> Iterator[list[int]]:
    """Random prompts without a common beginning: no prefix cache helps."""
    rng = random.Random(SEED)
    first = min(FIRST_ID, vocab_size - 1)
    while True:
        yield [rng.randrange(first, vocab_size) for _ in range(num_tokens)]


def results_text(results: Sequence[Result]) -> str:
    """The results for people."""
    lines = [
        f"{'batch':>5} {'decode tokens/s':>16} {'prefill tokens/s':>17} {'first token, ms':>16}"
    ]
    for r in results:
        lines.append(
            f"{r.batch:>5} {r.decode_tokens_per_s:>16,.1f} {r.prefill_tokens_per_s:>17,.1f}"
            f" {r.first_ms:>16.1f}"
        )
    if any(r.executor != "compiled" for r in results):
        lines.append(EAGER)
    found = [r.phases for r in results if r.phases is not None]
    return "\n".join(lines) + ("\n\n" + phases_table(found) if found else "")
