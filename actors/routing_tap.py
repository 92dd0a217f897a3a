"""Takes what a dense rank's gates choose off the hot path: a copy in the step, the rest elsewhere.

    experts = tap.watch(dispatcher.moe)      # or `note_bundles`, where its rows are a slice
    with tap.step(plan, num_rows):           # engine's thread: one memmove for each MoE layer
        ... experts(...)                     # or `remora::step_experts`, which fills `tap.notes`
    tap.take_sketch("host")                  # any thread

Two buffers: the step fills one while a thread counts the other. When both are full the step is not
looked at, only its tokens are noted, and a sketch says which share was (`counted_ratio`): the step
never waits. Failed steps leave nothing.

Legend: L MoE layers, T rows, K top-k, D model width.
"""

import ctypes
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import numpy as np
import torch
from torch import Tensor

from remora.actors.dense_events import StepPlan
from remora.actors.model_spec import ModelSpec
from remora.actors.step_context import ExpertsFn
from remora.actors.trace_recorder import Recorded, TraceRecorder
from remora.comm.errors import ClusterError
from remora.comm.routing_counter import RoutingCounter, Run
from remora.comm.sketch import encode_sketch
from remora.comm.trace import DECODE, PREFILL
from remora.kernels.step import RoutingNotes

logger = logging.getLogger(__name__)

BUFFER_BYTES_MAX: Final = 32 << 20  # of each of the two
BUFFER_ROWS: Final = 4096
WAKE_ROWS: Final = 1024  # rows after which the counting thread is woken
ID_BYTES: Final = 8

_memmove = ctypes.memmove


class _Buffer:
    """Rows of several steps, layer by layer."""

    def __init__(self, num_layers: int, num_rows: int, top_k: int) -> None:
        self.ids_LTK = np.empty((num_layers, num_rows, top_k), np.int64)
        self.runs: list[Run] = []
        self.num_rows = 0
        self.num_counted = 0  # of them; `runs` are those of the rest

    @property
    def room(self) -> int:
        """Rows that still fit."""
        return self.ids_LTK.shape[1] - self.num_rows


class RoutingTap:
    """One dense group's (its rank 0 sees every row once). `close` ends the counting thread.

    Args:
        counter: called from the counting thread, and from `take_sketch`, never at once.
    """

    def __init__(self, counter: RoutingCounter) -> None:
        counter.warm()  # not in the first requests' time
        self._counter = counter
        layers, top_k = counter.moe_layers, counter.top_k
        row_bytes = len(layers) * top_k * ID_BYTES
        num_rows = max(64, min(BUFFER_ROWS, BUFFER_BYTES_MAX // row_bytes))
        self._buffers = [_Buffer(len(layers), num_rows, top_k) for _ in range(2)]
        self._active = self._buffers[0]
        self._row_bytes = top_k * ID_BYTES
        self._num_layers = len(layers)
        self._index_L = np.full(max(layers) + 1, -1, np.int32)  # of decoder layers
        self._index_L[list(layers)] = np.arange(len(layers))
        self.notes = RoutingNotes(  # of the step that runs: the one place that says where to write
            base=0,
            pitch=num_rows * self._row_bytes,
            num_bytes=0,
            index=self._index_L.ctypes.data,
            num_layers=len(self._index_L),
            layers_seen=0,
        )
        self._num_rows = 0  # of the step, that are looked at
        self._step_rows = 0
        self._padded_rows = 0
        self._runs: list[Run] = []
        self._skipped: list[Run] = []
        self._recorder: TraceRecorder | None = None
        self._full: list[_Buffer] = []
        self._lock = threading.Condition()
        self._counting = threading.Lock()
        self._ended = False
        self.shared_labels: list[list[str]] = []  # as of `RoutingCounter`
        self._thread = threading.Thread(
            target=self._count_forever, name="remora-routing-counter", daemon=True
        )
        self._thread.start()

    # -- the engine's thread ------------------------------------------------------------------

    def watch(self, experts: ExpertsFn) -> ExpertsFn:
        """`experts`, with what it is asked noted."""

        def watched(
            layer: int, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor, num_tokens: int
        ) -> Tensor:
            if self.notes.base:
                self._note(layer, index_TK, num_tokens)
            return experts(layer, hidden_TD, index_TK, weights_TK, num_tokens)

        return watched

    def _begin(self, plan: StepPlan) -> None:
        """A step begins."""
        with_tokens = self._recorder is not None or self._counter.wants_tokens
        self._runs = runs_of(plan, with_tokens=with_tokens)
        self._step_rows, self.notes.layers_seen = plan.num_tokens, 0
        buffer = self._active
        if buffer.room < plan.num_tokens and buffer.num_rows:
            buffer = self._swap()
        self._num_rows = min(plan.num_tokens, buffer.room)
        self.notes.num_bytes = self._num_rows * self._row_bytes
        self.notes.base = 0
        if self._num_rows:
            self.notes.base = buffer.ids_LTK.ctypes.data + buffer.num_rows * self._row_bytes

    def _end(self) -> None:
        """The step is computed: what was noted counts."""
        looked = self.notes.base != 0 and self.notes.layers_seen == self._num_layers
        self.notes.base = 0
        if not looked:
            self._skip(self._runs)
            return
        kept, rest = split_runs(self._runs, self._num_rows)
        self._skip(rest)
        with self._lock:
            self._active.runs.extend(kept)
            self._active.num_rows += self._num_rows
        if self._active.num_rows >= WAKE_ROWS:
            self._swap()

    @contextmanager
    def step(self, plan: StepPlan, num_rows: int) -> Iterator[None]:
        """Around the model's run of one step; one that fails leaves nothing.

        Args:
            num_rows: of the step, padding included.
        """
        self._begin(plan)
        self._padded_rows = num_rows
        try:
            yield
        except BaseException:
            self.notes.base = 0  # it is repeated, or nobody waits for it
            raise
        self._end()

    def _note(self, layer: int, index_TK: Tensor, num_tokens: int) -> None:
        is_whole = num_tokens == self._step_rows and index_TK.shape[0] == self._padded_rows
        if is_whole and index_TK.is_cpu:  # else a slice of the step, or ids to wait for
            self.note_bundles(layer, index_TK)

    def note_bundles(self, layer: int, index_TK: Tensor) -> None:
        """What all rows of the step chose in a layer, once a layer: [T, K] on the CPU; padding may
        be left out."""
        if not self.notes.base:
            return
        if index_TK.dtype is not torch.int64 or not index_TK.is_contiguous():
            index_TK = index_TK.to(torch.int64).contiguous()
        notes = self.notes
        address = notes.base + int(self._index_L[layer]) * notes.pitch
        _memmove(address, index_TK.data_ptr(), notes.num_bytes)
        notes.layers_seen += 1

    def _swap(self) -> _Buffer:
        """Hand the active buffer over if the other one is free; the active one afterwards."""
        with self._lock:
            other = self._buffers[self._buffers[0] is self._active]
            if not other.num_rows:  # it has been counted
                self._full.append(self._active)
                self._active = other
                self._lock.notify_all()
        return self._active

    def _skip(self, runs: list[Run]) -> None:
        if runs:
            with self._lock:
                if len(self._skipped) > BUFFER_ROWS:
                    self._skipped = merged_runs(self._skipped)
                self._skipped.extend(runs)

    # -- any thread ---------------------------------------------------------------------------

    def take_sketch(self, source: str) -> bytes:
        """What was routed since the last call, encoded; empty when nothing was.

        Args:
            source: host of this dense group.
        """
        with self._counting:
            self._count_all()
            sketch = self._counter.take(source)
        return encode_sketch(sketch) if sum(sketch.tokens_seen) else b""

    def record(self, recorder: TraceRecorder) -> None:
        """Give what is counted to a recorder too, from the next step on; to one before no more."""
        with self._counting:
            self._recorder = recorder

    def take_recorded(self, name: str) -> Recorded:
        """What the recorder of that name has since the last call, the newest step included.

        Raises:
            ClusterError: nothing is being recorded, or for somebody else by now.
        """
        with self._counting:
            self._count_all()
            if self._recorder is None:
                raise ClusterError("nothing is being recorded here")
            if self._recorder.name != name:
                raise ClusterError("another recording of this deployment began and took its place")
            return self._recorder.take()

    def stop_recording(self, name: str) -> None:
        """Forget the recorder of that name, and what nobody took."""
        with self._counting:
            if self._recorder is not None and self._recorder.name == name:
                self._recorder = None

    def close(self) -> None:
        """End the counting thread."""
        with self._lock:
            self._ended = True
            self._lock.notify_all()
        self._thread.join()

    def _count_forever(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._full or self._ended)
                if self._ended:
                    return
            with self._counting:
                with self._lock:
                    if not self._full:
                        continue
                    buffer = self._full.pop(0)
                self._count(buffer)
                self._note_skipped()

    def _count_all(self) -> None:
        """Count whatever has been computed; `_counting` is held."""
        with self._lock:
            waiting, self._full = [*self._full, self._active], []
        for buffer in waiting:
            self._count(buffer)
        self._note_skipped()

    def _count(self, buffer: _Buffer) -> None:
        """Count what is new in a buffer; one that was handed over is empty then.

        The engine's thread may be writing rows of a step behind those of an active buffer, and
        hand it over meanwhile: what it has then waits for its turn in `_full`.
        """
        with self._lock:
            begin, end = buffer.num_counted, buffer.num_rows
            runs, buffer.runs, buffer.num_counted = buffer.runs, [], end
        recorder = self._recorder
        try:
            if runs:
                self._counter.count(buffer.ids_LTK[:, begin:end], runs)
                self._look_at_labels()
            if runs and recorder is not None:
                recorder.note(buffer.ids_LTK[:, begin:end], runs)
        except Exception:  # statistics must not end a dense group; it goes on without them
            logger.exception("counting %d routed tokens failed", end - begin)
        with self._lock:
            if buffer is not self._active and buffer.num_rows == end:
                buffer.num_rows = buffer.num_counted = 0

    def _look_at_labels(self) -> None:
        shared = self._counter.shared_labels()
        if shared and not self.shared_labels:  # once: clients may name what they like
            names = " and ".join(shared[0])
            logger.warning("more names of domains than are told apart: %s count as one", names)
        self.shared_labels = shared

    def _note_skipped(self) -> None:
        with self._lock:
            skipped, self._skipped = self._skipped, []
        self._counter.skip(skipped)
        if self._recorder is not None:
            self._recorder.skip(sum(run.num_tokens for run in skipped))


def counter_of(spec: ModelSpec) -> RoutingCounter:
    """Of a model's MoE layers."""
    return RoutingCounter(
        num_experts=spec.num_experts, top_k=spec.top_k, moe_layers=spec.moe_layers
    )


def tap_of(spec: ModelSpec) -> RoutingTap:
    """A tap on a model's MoE layers."""
    return RoutingTap(counter_of(spec))


def runs_of(plan: StepPlan, *, with_tokens: bool = False) -> list[Run]:
    """The rows of a step by request; a row is of the prefill while its token is of the prompt.

    Args:
        with_tokens: copy token ids, for a recorder or a sample.
    """
    runs = []
    for part in plan.slices:
        count = len(part.token_ids)
        prompt = min(max(len(part.prompt_ids) - part.start, 0), count)
        arrival = part.sequence.arrival
        for phase, begin, end in ((PREFILL, 0, prompt), (DECODE, prompt, count)):
            if begin < end:
                token_ids = part.token_ids[begin:end] if with_tokens else []
                run = Run(
                    arrival, phase, end - begin, part.start + begin, token_ids, part.sequence.domain
                )
                runs.append(run)
    return runs


def split_runs(runs: list[Run], num_rows: int) -> tuple[list[Run], list[Run]]:
    """Runs of the first `num_rows` rows, and the rest."""
    kept: list[Run] = []
    rest: list[Run] = []
    for run in runs:
        count = min(run.num_tokens, num_rows)
        num_rows -= count
        if count:
            kept.append(run.part(0, count))
        if count < run.num_tokens:
            rest.append(run.part(count, run.num_tokens))
    return kept, rest


def merged_runs(runs: list[Run]) -> list[Run]:
    """One run for each phase: what is left of runs when only their number counts."""
    totals: dict[int, int] = {}
    for run in runs:
        totals[run.phase] = totals.get(run.phase, 0) + run.num_tokens
    return [Run(0, phase, count) for phase, count in totals.items()]
