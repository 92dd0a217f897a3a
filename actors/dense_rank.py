"""The model runner of one dense rank: a step plan in, sampled tokens out.

Legend: T token rows of the step (padding included), D model width, R rows whose logits are wanted,
V vocabulary.

Rows are padded for these reasons only. In `exact` numerics torch's transcendental functions must
not have scalar tails, whose last bits differ from the vector part's: T times every width of the
model is a multiple of `TAIL_FREE` (`row_quantum`; 1 or 2 rows for real widths; linears
and attention do not need it, measured in benchmarks/notes/2026-11-21-exact-spike.md). Layers that
divide their rows among the ranks of a group do it into equal slices. A compiled
layer would be specialised for T = 1, so T is at least 2. The torch path of the kernels (no
compiler) builds one oneDNN primitive per row count, so there T is one of few buckets.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from remora.actors.dense_events import Slice, SliceResult, StepPlan
from remora.actors.dense_model import DenseModel
from remora.actors.routing_tap import RoutingTap
from remora.actors.step_context import ExpertsFn, StepContext
from remora.actors.step_laps import Laps
from remora.actors.tp_shuffle import TokenShuffle
from remora.comm.messages import TokenLogprobs
from remora.kernels.attention import KVPages, build_plan
from remora.kernels.device import CPU, make_pages
from remora.kernels.linear import ROW_TILE, PackedLinear
from remora.kernels.native import native_available
from remora.kernels.sampling import RowLogprobs, RowParams, raw_logprobs, sample

if TYPE_CHECKING:
    from remora.kernels.gpu_pages import GpuKVPages

TAIL_FREE = 64  # values: two vectors of the widest kind, for each of two threads


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs:
    """Tensors of one step, and which of its rows want logits."""

    input_ids_T: Tensor  # int64; padding rows hold 0
    rows_R: Tensor  # int64: sampled rows first, in the order of their slices, then prompt rows
    num_sampled: int


def row_quantum(model: DenseModel) -> int:
    """Rows that a step of `exact` numerics is padded to a multiple of.

    The least q such that q rows of any width that the model's layers know have a multiple of
    TAIL_FREE values: elementwise kernels flatten rows, so a tail belongs to whoever comes last.
    """
    return math.lcm(*(TAIL_FREE // math.gcd(TAIL_FREE, width) for width in layer_widths(model)))


def layer_widths(model: DenseModel) -> set[int]:
    """Widths of rows inside the model's layers, as far as their linears and tables tell."""
    widths = {model.spec.hidden_size}
    for layer in model.layers:
        for module in layer.modules():
            if isinstance(module, PackedLinear):
                widths |= {module.in_features, module.out_features}
        widths |= {size for p in layer.parameters() if p.dim() == 2 for size in p.shape}
    return widths


def step_quantum(model: DenseModel, *, exact: bool) -> int:
    """Rows that any step is padded to a multiple of: slices of it are equal and alike."""
    return model.num_slices * (row_quantum(model) if exact else 1)


def padded_rows(num_tokens: int, *, quantum: int, native: bool, slices: int = 1) -> int:
    """Rows that a step of `num_tokens` tokens is run with; see the head of this file.

    Args:
        quantum: of `step_quantum`.
        slices: equal parts of at least two rows that the step is divided into.
    """
    if not native:
        bucket = 1 << max(1, (num_tokens - 1).bit_length())
        num_tokens = bucket if bucket < ROW_TILE else -(-num_tokens // ROW_TILE) * ROW_TILE
    return max(2 * slices, -(-num_tokens // quantum) * quantum)


def allocate_pages(model: DenseModel, num_blocks: int) -> list["KVPages | GpuKVPages"]:
    """Key/value pages of every decoder layer, in the model's dtype and on its device."""
    return [
        make_pages(model.device, num_blocks, a.num_kv_heads, a.k_dim, a.v_dim, model.dtype)
        for a in model.spec.attention
    ]


# Runs a step's model with the experts that answer it: (tokens, run) -> what `run` gave.
StepFn = Callable[[int, Callable[[ExpertsFn], Tensor]], Tensor]


class DenseRank:
    """Runs steps. Not thread-safe: torch is called from one thread.

    Args:
        model, pages: of this rank.
        experts: answers the rows of a step.
        exact: numerics.
        step: runs the model in its place, with experts of its own (NCCL: in step with others).
    """

    def __init__(
        self,
        *,
        model: DenseModel,
        pages: list["KVPages | GpuKVPages"],
        experts: ExpertsFn,
        exact: bool,
        step: StepFn | None = None,
        shuffle: TokenShuffle | None = None,
    ) -> None:
        self.model = model
        self._shuffle = shuffle
        self._step = step or (lambda num_tokens, run: run(self.experts))
        self._pages = pages
        self.experts = experts  # replaced when another view is adopted
        # Of `Dispatcher.step_experts`: asks for rows as `experts` does, without Python.
        self.direct: Callable[[], int] | None = None
        self._exact = exact
        self._quantum = step_quantum(model, exact=exact)
        self._native = native_available() or model.device != CPU
        self.tap: RoutingTap | None = None  # looks at what `experts` is asked
        self.laps = Laps()  # the engine's loop marks its own parts of a step on it

    def num_rows(self, plan: StepPlan) -> int:
        """Rows that the step is run with."""
        return padded_rows(
            plan.num_tokens,
            quantum=self._quantum,
            native=self._native,
            slices=self.model.num_slices,
        )

    def run(self, plan: StepPlan) -> list[SliceResult]:
        """Compute one step; one result per slice, in order.

        Raises:
            ClusterError: a shard did not answer; nothing of the step counts, it may be repeated.
        """
        num_rows = self.num_rows(plan)
        attention = build_plan(
            [s.start for s in plan.slices],
            [s.num_tokens for s in plan.slices],
            [s.block_table for s in plan.slices],
            num_rows,
        )
        inputs = step_inputs(plan, num_rows)
        if self._shuffle is not None:
            note = self.tap.note_bundles if self.tap else None
            self._shuffle.begin_step(inputs.input_ids_T, plan.num_tokens, note)
        self.laps.lap("inputs")

        def run(experts: ExpertsFn) -> Tensor:
            context = StepContext(
                plan=attention,
                pages=self._pages,
                experts=experts,
                shuffle=self._shuffle,
                exact=self._exact,
                device=self.model.device,
                direct=self.direct() if self.direct else 0,
                notes=self.tap.notes if self.tap else None,
            )
            return self.model.run(context, inputs.input_ids_T, inputs.rows_R)

        with self.tap.step(plan, num_rows) if self.tap else nullcontext():
            logits_RV = self._step(plan.num_tokens, run).to(CPU)  # sampling is the CPU's
        self.laps.lap("model")
        results = slice_results(plan, logits_RV, inputs.num_sampled)
        self.laps.lap("sampling")
        return results


def step_inputs(plan: StepPlan, num_rows: int) -> StepInputs:
    """Flatten a plan's slices into token rows and name the rows that want logits."""
    token_ids: list[int] = []
    sampled_rows: list[int] = []
    prompt_rows: list[int] = []
    for part in plan.slices:
        first = len(token_ids)
        token_ids.extend(part.token_ids)
        prompt_rows.extend(range(first, first + part.num_prompt_logprobs))
        if part.sample:
            sampled_rows.append(len(token_ids) - 1)
    assert len(token_ids) == plan.num_tokens, f"{len(token_ids)} tokens, not {plan.num_tokens}"
    token_ids.extend([0] * (num_rows - len(token_ids)))
    return StepInputs(
        input_ids_T=torch.tensor(token_ids, dtype=torch.int64),
        rows_R=torch.tensor(sampled_rows + prompt_rows, dtype=torch.int64),
        num_sampled=len(sampled_rows),
    )


def slice_results(plan: StepPlan, logits_RV: Tensor, num_sampled: int) -> list[SliceResult]:
    """Sample, and look up prompt log-probabilities, slice by slice.

    A row's result depends on that row alone (`kernels.sampling`), so order does not matter.
    """
    wanted = [part for part in plan.slices if part.sample]
    sampled = sample(logits_RV[:num_sampled], [_row_params(part) for part in wanted])
    failed = frozenset(sampled.failed_rows)
    row, prompt_row = 0, num_sampled
    results = []
    for part in plan.slices:
        count = part.num_prompt_logprobs
        prompt_logprobs = []
        if count:
            first = part.start + 1  # row i of the slice predicts position start + i + 1
            target_ids = part.prompt_ids[first : first + count]
            rows_CV = logits_RV[prompt_row : prompt_row + count]
            found = raw_logprobs(rows_CV, target_ids, part.params.prompt_logprobs or 0)
            prompt_logprobs = [
                _message(token_id, entry) for token_id, entry in zip(target_ids, found, strict=True)
            ]
            prompt_row += count
        if not part.sample:
            results.append(SliceResult(prompt_logprobs=prompt_logprobs))
            continue
        token_id, entry, broken = sampled.token_ids[row], sampled.logprobs[row], row in failed
        row += 1
        if broken:
            results.append(SliceResult(error="logits are not finite: nothing can be sampled"))
            continue
        results.append(
            SliceResult(
                token_id=token_id,
                logprobs=None if entry is None else _message(token_id, entry),
                prompt_logprobs=prompt_logprobs,
            )
        )
    return results


def _row_params(part: Slice) -> RowParams:
    params = part.params
    has_penalty = (
        params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
        or params.repetition_penalty != 1.0
    )
    return RowParams(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        logit_bias=params.logit_bias,
        masked_ids=tuple(part.sequence.stop_ids) if part.num_outputs < params.min_tokens else (),
        prompt_ids=part.prompt_ids if has_penalty else (),
        output_ids=part.output_ids if has_penalty else (),
        seed=params.seed,
        position=part.position,
        num_logprobs=params.logprobs,
    )


def _message(token_id: int, entry: RowLogprobs) -> TokenLogprobs:
    return TokenLogprobs(
        token_id=token_id,
        logprob=entry.logprob,
        rank=entry.rank,
        top_ids=entry.top_ids,
        top_logprobs=entry.top_logprobs,
    )
