"""What counting routing costs a decode step: the same dense rank with its tap in place and without.

    .venv/bin/python benchmarks/statistics_cost.py --quick --json out.json

One deployment of *tiny* (`make_checkpoint.py`). The tap is taken off and put back between batches
of decode, in alternation; a step's time is the median gap between two messages of the engine.
Beside it the processor time of the dense rank's process by step, the counting thread's included.
"""

import asyncio
import itertools
import random
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
from engines_report import Bar, Spread
from make_checkpoint import SHAPES, write_checkpoint

from remora.cluster.bench_command import rank_actor
from remora.cluster.bench_load import EngineLoad
from remora.cluster.bootstrap import ClusterHandle, ensure_cluster
from remora.cluster.config import load_config
from remora.cluster.local_ray import own_ray

OUT = Path(__file__).resolve().parent / "out"
TARGET = 1.02


def set_tap(process: Any, is_on: bool) -> float:
    """In the dense rank's process: put the tap on or take it off; its processor seconds so far."""
    import time

    actor = process._made()

    def change() -> None:
        experts = actor._dispatcher.moe
        actor._rank.tap = actor._tap if is_on else None
        actor._rank.experts = actor._tap.watch(experts) if is_on else experts

    actor._engine.between_steps(change)
    return time.process_time()


def prompts(vocab_size: int, num_tokens: int) -> Iterator[list[int]]:
    """Random prompts without a common beginning."""
    rng = random.Random(0)
    while True:
        yield [rng.randrange(8, vocab_size) for _ in range(num_tokens)]


async def measure(
    handle: ClusterHandle, batches: tuple[int, ...], rounds: int, new_tokens: int
) -> dict[tuple[int, bool], list[tuple[float, float]]]:
    """(batch, tap on) -> for each round, (seconds, processor seconds) of a decode step."""
    actor: Any = rank_actor(handle)
    load = await EngineLoad.connect(handle)
    source = prompts(4000, 16)
    found: dict[tuple[int, bool], list[tuple[float, float]]] = {}
    try:
        for batch in batches:
            await load.generate(list(itertools.islice(source, batch)), 8)  # warm
            for round_number in range(rounds):
                for is_on in (True, False) if round_number % 2 else (False, True):
                    before = await actor.__ray_call__.remote(set_tap, is_on)
                    timing = await load.generate(list(itertools.islice(source, batch)), new_tokens)
                    after = await actor.__ray_call__.remote(set_tap, is_on)
                    figures = (statistics.median(timing.gaps_s), (after - before) / new_tokens)
                    found.setdefault((batch, is_on), []).append(figures)
                    await actor.take_sketch.remote()
    finally:
        await load.close()
    return found


def main() -> None:
    """Measure and print."""
    parser = common.parser(__doc__)
    parser.add_argument("--shape", default="tiny", choices=sorted(SHAPES))
    parser.add_argument("--executor", default="eager", choices=["eager", "compiled", "auto"])
    args = parser.parse_args()
    checkpoint = OUT / args.shape
    if not (checkpoint / "config.json").exists():
        write_checkpoint(checkpoint, SHAPES[args.shape], seed=0)
    batches, rounds, new_tokens = ((1, 32), 10, 65) if args.quick else ((1, 8, 32), 20, 129)
    overrides = {"model": str(checkpoint), "executor": args.executor, "name": "statistics-cost"}
    config = load_config(None, preset="tiny_cpu", overrides=overrides)
    with own_ray(config):
        found = asyncio.run(measure(ensure_cluster(config), batches, rounds, new_tokens))
    rows: list[common.Row] = []
    bars = []
    for batch in batches:
        on, off = found[(batch, True)], found[(batch, False)]
        ratio = common.per_round([a for a, _ in on], [b for b, _ in off])
        rows.append(
            {
                "batch": batch,
                "step us, tap off": Spread.of([1e6 * s for s, _ in off]),
                "step us, tap on": Spread.of([1e6 * s for s, _ in on]),
                "cpu us a step, off": Spread.of([1e6 * s for _, s in off]),
                "cpu us a step, on": Spread.of([1e6 * s for _, s in on]),
            }
        )
        name = f"statistics_step_ratio_b{batch}"
        bars.append(Bar(name=name, value=ratio, unit="x", op="<=", target=TARGET))
    common.finish("statistics_cost", args, rows, bars)


if __name__ == "__main__":
    main()
