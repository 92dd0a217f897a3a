"""Time inside the code that Inductor generated, and inside torch's own kernels that it calls.

Inductor compiles what lies between our operators (norms, rotary embeddings, gates' softmax) into
loops of C++, called from C++: nothing outside can time them in an engine that serves. So `remora
bench --phases` compiles the same layers once more with torch's own kernel records in them
(`cpp.enable_kernel_profile`; tens of seconds, cached), over zeros for weights and with experts that
answer at once, and reads the records of some decode steps. Each record also holds a part of what
making it costs, some 0.1 us. What a loop does depends on the number of rows alone.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile

from remora.actors.dense_model import INDUCTOR_OPTIONS, DenseModel, build_hollow
from remora.actors.dense_rank import allocate_pages
from remora.actors.executor import use_cache
from remora.actors.model_spec import inspect_model, resolve_dtype
from remora.actors.step_context import StepContext
from remora.actors.warm import compile_and_warm, silent_experts
from remora.kernels.attention import BLOCK_SIZE, build_plan

NUM_STEPS = 20
POSITION = 64  # of the decoded token, in every sequence
_GENERATED = ("cpp_fused", "aoti_torch_cpu_")  # in names of records: loops, torch's own kernels


def loops_step_us(
    model: str | Path, *, dtype: str, exact: bool, batches: Sequence[int]
) -> dict[int, float]:
    """Microseconds of a decode step inside generated loops and torch's kernels, by batch size.

    Args:
        model: checkpoint directory; no weights are read.
        dtype: as configured, "auto" included.
        exact: numerics of the deployment.
        batches: sequences that a step decodes.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler prints its own steps
    spec = inspect_model(model)
    use_cache()
    with _records():
        dense = build_hollow(spec, dtype=resolve_dtype(spec, dtype), exact=exact)
        compile_and_warm(dense, exact=exact)
        return {batch: _measure(dense, batch) for batch in batches}


def _measure(model: DenseModel, batch: int) -> float:
    blocks_each = POSITION // BLOCK_SIZE + 1
    tables = [[i * blocks_each + b for b in range(blocks_each)] for i in range(batch)]
    num_rows = max(2, batch)
    pages = allocate_pages(model, batch * blocks_each)
    rows_R = torch.arange(batch)

    def step() -> None:
        plan = build_plan([POSITION] * batch, [1] * batch, tables, num_rows)
        context = StepContext(plan=plan, pages=pages, experts=silent_experts)
        model.run(context, torch.zeros(num_rows, dtype=torch.int64), rows_R)

    for _ in range(NUM_STEPS // 5):
        step()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(NUM_STEPS):
            step()
    spent_us: dict[str, list[float]] = {}
    for event in recorded.events():
        if any(name in event.key for name in _GENERATED):
            spent_us.setdefault(event.key, []).append(event.cpu_time_total)
    # The median: other processes' slices must not count as ours.
    return sum(median(each) * len(each) for each in spent_us.values()) / NUM_STEPS


@contextmanager
def _records() -> Iterator[None]:
    """Whatever is compiled inside the block tells a profiler of each of its kernels."""
    before = dict(INDUCTOR_OPTIONS)
    INDUCTOR_OPTIONS["cpp.enable_kernel_profile"] = True
    try:
        yield
    finally:
        INDUCTOR_OPTIONS.clear()
        INDUCTOR_OPTIONS.update(before)
