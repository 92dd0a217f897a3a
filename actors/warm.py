"""Steps that only warm an engine up, and the child process that fills the compiler's cache.

The child builds the dense side with zeros for weights (`build_hollow`), runs the same warm-up steps
as the engine will, and so leaves behind exactly the artefacts that the engine then finds. It reads
a pipe from its parent and ends with it, however the parent ends.
"""

import itertools
import json
import os
import signal
import sys
import threading

import torch
from torch import Tensor

from remora.actors.dense_model import DenseModel, build_hollow
from remora.actors.dense_rank import allocate_pages, layer_widths, step_quantum
from remora.actors.launch import take_threads
from remora.actors.model_spec import inspect_model, resolve_dtype
from remora.actors.step_context import StepContext
from remora.comm.collectives import DryGroup
from remora.kernels.attention import BLOCK_SIZE, build_plan

LOWEST_PRIORITY = 19  # niceness of the child that compiles beside a serving engine

WARM_ROWS = (37, 2, 129)  # at least; a large step, the smallest, and a larger one


def warm_rows(model: DenseModel, *, exact: bool) -> list[int]:
    """Row counts of the warm-up steps, of a kind that the engine will have.

    None of them equals a width of the model, except perhaps the smallest: the compiler would take
    the two for one symbol and compile anew for every other number of rows, and `exact` steps of
    just that many rows would run other code than the rest.
    """
    quantum = step_quantum(model, exact=exact)
    smallest = 2 * model.num_slices
    widths = layer_widths(model)
    widths |= {size for a in model.spec.attention for size in (a.k_dim, a.v_dim)}
    widths |= {k * size for b in model.model.buffers() for size in b.shape for k in (1, 2)}
    counts = []
    for at_least in WARM_ROWS:
        at_least = max(at_least, smallest)
        multiples = itertools.count(-(-at_least // quantum) * quantum, quantum)
        counts.append(next(rows for rows in multiples if rows not in widths or rows == smallest))
    return counts


def compile_and_warm(model: DenseModel, *, exact: bool) -> None:
    """Compile the layers and what stands around them, and settle how they are called."""
    model.compile()
    warm_up(model, exact=exact)
    with model.alone():
        ends = model.drop_guards()
        if ends is not None:
            for num_rows in warm_rows(model, exact=exact):
                ends.warm(torch.zeros(num_rows, dtype=torch.int64), torch.arange(num_rows))
            model.use_program(ends.program())
    warm_up(model, exact=exact)  # what has been put together runs before a request meets it


def warm_up(model: DenseModel, *, exact: bool) -> None:
    """Run a few steps that touch no request: pages of their own, experts that answer zeros."""
    for num_rows in warm_rows(model, exact=exact):
        num_blocks = -(-num_rows // BLOCK_SIZE)
        plan = build_plan([0], [num_rows], [list(range(num_blocks))], num_rows)
        pages = allocate_pages(model, num_blocks)
        context = StepContext(
            plan=plan, pages=pages, experts=silent_experts, exact=exact, device=model.device
        )
        no_rows = torch.empty(0, dtype=torch.int64)
        with model.alone():
            model.run(context, torch.zeros(num_rows, dtype=torch.int64), no_rows)


def silent_experts(
    layer: int, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor, num_tokens: int
) -> Tensor:
    """Stands where the experts stand in steps that count for nothing: zeros, at once."""
    return torch.zeros_like(hidden_TD)


def main() -> None:
    """Entry point of the child: `argv[1]` is JSON, see `executor`."""
    os.nice(LOWEST_PRIORITY)
    threading.Thread(target=_end_with_parent, name="parent-watch", daemon=True).start()
    order = json.loads(sys.argv[1])
    take_threads(1)
    spec = inspect_model(order["model"])
    dtype = resolve_dtype(spec, order["dtype"])
    group = None
    if order["num_ranks"] > 1:
        group = DryGroup(0, order["num_ranks"], is_native=order["is_native"])
    model = build_hollow(
        spec,
        dtype=dtype,
        exact=order["exact"],
        group=group,
        slice_rows=order["slice_rows"],
        max_positions=order["max_positions"],
    )
    compile_and_warm(model, exact=order["exact"])


def _end_with_parent() -> None:
    """The parent never writes: its end of the pipe closes when it closes it, or dies."""
    os.read(sys.stdin.fileno(), 1)
    assert os.getpgrp() == os.getpid(), "the group is not its own: others would end with it"
    os.killpg(0, signal.SIGTERM)  # its g++, too
