"""Steps that only warm an engine up, and the child process that fills the compiler's cache.

The child builds the dense side with zeros for weights (`build_hollow`), runs the same warm-up steps
as the engine will, and so leaves behind exactly the artefacts that the engine then finds. It reads
a pipe from its parent and ends with it, however the parent ends.
"""

import json
import os
import sys
import threading

import torch
from torch import Tensor

from remora.actors.dense_model import DenseModel, build_hollow
from remora.actors.launch import take_threads
from remora.actors.model_spec import inspect_model, resolve_dtype
from remora.actors.step_context import StepContext
from remora.kernels.attention import BLOCK_SIZE, KVPages, build_plan
from remora.kernels.linear import ROW_TILE

LOWEST_PRIORITY = 19  # niceness of the child that compiles beside a serving engine

# The first row count is what the compiler meets; it must equal no width of any model, or the
# compiler would take the two for one symbol. The others prove that nothing compiles again.
FAST_ROWS = (37, 2, 129)
EXACT_ROWS = (3 * ROW_TILE, ROW_TILE, 5 * ROW_TILE)


def warm_up(model: DenseModel, *, exact: bool) -> None:
    """Run a few steps that touch no request: pages of their own, experts that answer zeros."""
    for num_rows in EXACT_ROWS if exact else FAST_ROWS:
        num_blocks = -(-num_rows // BLOCK_SIZE)
        plan = build_plan([0], [num_rows], [list(range(num_blocks))], num_rows)
        pages = [
            KVPages.allocate(num_blocks, a.num_kv_heads, a.k_dim, a.v_dim, model.dtype)
            for a in model.spec.attention
        ]
        context = StepContext(plan=plan, pages=pages, experts=_silent_experts)
        no_rows = torch.empty(0, dtype=torch.int64)
        model.run(context, torch.zeros(num_rows, dtype=torch.int64), no_rows)


def _silent_experts(
    layer: int, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor, num_tokens: int
) -> Tensor:
    return torch.zeros_like(hidden_TD)


def main() -> None:
    """Entry point of the child: `argv[1]` is JSON with model, dtype and exact."""
    os.nice(LOWEST_PRIORITY)
    threading.Thread(target=_end_with_parent, name="parent-watch", daemon=True).start()
    order = json.loads(sys.argv[1])
    take_threads(1)
    spec = inspect_model(order["model"])
    model = build_hollow(spec, dtype=resolve_dtype(spec, order["dtype"]), exact=order["exact"])
    model.compile()
    warm_up(model, exact=order["exact"])


def _end_with_parent() -> None:
    """The parent never writes: its end of the pipe closes when it closes it, or dies."""
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)
