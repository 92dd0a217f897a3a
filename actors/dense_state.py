"""The dense rank's state machine: events in, instructions out, and what to compute next. Pure.

    while serving:
        for event in arrived:                  # RequestArrived, AbortRequested, SourceLost, ...
            carry_out(state.handle(event))     # Emit: one message to one ingress
        plan = state.next_step()
        results = runner.run(plan)             # other events may be handled meanwhile
        carry_out(state.handle(StepDone(plan.step_id, results)))

Every accepted request ends with exactly one output that has a finish reason, unless its source is
lost. What a request is answered does not depend on the others: chunks, prefix hits and preemptions
change when its tokens are computed, never which tokens at which positions.
"""

from collections.abc import Iterable

from remora.actors.dense_events import (
    AbortRequested,
    DenseLimits,
    Emit,
    Event,
    Instruction,
    RequestArrived,
    Slice,
    SliceResult,
    SourceLost,
    StatusChanged,
    StepDone,
    StepFailed,
    StepPlan,
)
from remora.actors.finish import check_result, finish_of, refusal
from remora.actors.scheduler import Scheduler
from remora.actors.sequence import Phase, Sequence, Source
from remora.comm.messages import EngineStats, SequenceOutput, StepOutputs


class DenseState:
    """Continuous batching for one dense rank."""

    def __init__(self, limits: DenseLimits) -> None:
        self.limits = limits
        self._scheduler = Scheduler(limits)
        self._sequences: dict[Source, dict[str, Sequence]] = {}  # not finished, by request id
        self._in_flight: StepPlan | None = None
        self._num_arrivals = 0
        self._num_steps = 0  # planned so far; the id of the newest step
        self._executor = "eager"
        self._epoch = 0

    @property
    def has_work(self) -> bool:
        """Whether some request is not finished."""
        return bool(self._sequences)

    @property
    def in_flight(self) -> StepPlan | None:
        """The step that `StepDone` or `StepFailed` must answer before the next one."""
        return self._in_flight

    def handle(self, event: Event) -> list[Instruction]:
        """Takes one event in; returns what the shell has to do now.

        Raises `AssertionError` for an answer that does not fit the step in flight.
        """
        match event:
            case StepDone():
                return self._on_step_done(event)
            case RequestArrived():
                return self._on_arrival(event)
            case AbortRequested():
                return self._on_abort(event)
            case StepFailed():
                return self._on_step_failed(event)
            case SourceLost():
                return self._on_source_lost(event)
            case StatusChanged():
                if event.executor != self._executor:  # they round in different places
                    self._scheduler.blocks.forget_cached()
                self._executor, self._epoch = event.executor, event.epoch
                return []

    def next_step(self) -> StepPlan | None:
        """Plans the next step, preempting where blocks are short; None when all is done."""
        assert self._in_flight is None, f"step {self._num_steps} is still in flight"
        slices = self._scheduler.plan()
        if not slices:
            assert not self._sequences, f"nothing to run, but unfinished: {self._sequences}"
            return None
        self._num_steps += 1
        num_tokens = sum([len(piece.token_ids) for piece in slices])
        self._in_flight = StepPlan(step_id=self._num_steps, slices=slices, num_tokens=num_tokens)
        return self._in_flight

    def stats(self) -> EngineStats:
        """Gauges and running totals as of now."""
        scheduler = self._scheduler
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            kv_blocks_used=scheduler.blocks.num_used,
            kv_blocks_total=scheduler.blocks.num_blocks,
            prefix_hit_tokens_total=scheduler.num_prefix_hit_tokens,
            preemptions_total=scheduler.num_preemptions,
            steps_total=self._num_steps,
            executor=self._executor,
            epoch=self._epoch,
        )

    def _on_arrival(self, event: RequestArrived) -> list[Instruction]:
        submit, source = event.submit, event.source
        request_id = submit.request_id
        error = refusal(submit, self.limits)
        known = self._sequences.get(source, {}).get(request_id)
        if known is not None:
            # The ingress could not tell the outputs of the two apart, so both end here.
            self._finish(known)
            error = f"request id {request_id!r} is running already; ids must be unique"
        num_waiting = len(self._scheduler.waiting)
        if error is None and num_waiting >= self.limits.max_waiting:
            error = f"the queue is full: {num_waiting} waiting, max_waiting is " + str(
                self.limits.max_waiting
            )
        if error is not None:
            return self._emit_one(source, _error_output(request_id, error))
        if submit.params.max_tokens == 0 and submit.params.prompt_logprobs is None:
            done = SequenceOutput(request_id=request_id, finish_reason="length")
            return self._emit_one(source, done)
        self._num_arrivals += 1
        sequence = Sequence(
            submit, source, self._num_arrivals, self.limits.eos_token_ids, self.limits.vocab_size
        )
        self._sequences.setdefault(source, {})[request_id] = sequence
        self._scheduler.enqueue(sequence)
        return []

    def _on_abort(self, event: AbortRequested) -> list[Instruction]:
        sequence = self._sequences.get(event.source, {}).get(event.request_id)
        if sequence is None:
            return []
        self._finish(sequence)
        output = SequenceOutput(request_id=event.request_id, finish_reason="abort")
        return self._emit_one(event.source, output)

    def _on_source_lost(self, event: SourceLost) -> list[Instruction]:
        for sequence in list(self._sequences.get(event.source, {}).values()):
            self._finish(sequence)
        return []

    def _on_step_done(self, event: StepDone) -> list[Instruction]:
        plan = self._take_in_flight(event.step_id)
        assert len(event.results) == len(plan.slices), (
            f"step {plan.step_id}: {len(event.results)} results != {len(plan.slices)} slices"
        )
        outputs: dict[Source, list[SequenceOutput]] = {}
        for piece, result in zip(plan.slices, event.results, strict=True):
            sequence = piece.sequence
            if sequence.phase is Phase.FINISHED:  # aborted, or its source lost, in flight
                continue
            output: SequenceOutput | None
            if result.error is not None:
                self._finish(sequence)
                output = _error_output(sequence.request_id, result.error)
            else:
                check_result(piece, result, self.limits.vocab_size)
                output = self._absorb(piece, result)
            if output is not None:
                outputs.setdefault(sequence.source, []).append(output)
        return self._emit(outputs.items())

    def _on_step_failed(self, event: StepFailed) -> list[Instruction]:
        plan = self._take_in_flight(event.step_id)
        outputs: dict[Source, list[SequenceOutput]] = {}
        for piece in plan.slices:
            sequence = piece.sequence
            if sequence.phase is not Phase.FINISHED:
                self._finish(sequence)
                output = _error_output(sequence.request_id, event.message)
                outputs.setdefault(sequence.source, []).append(output)
        return self._emit(outputs.items())

    def _take_in_flight(self, step_id: int) -> StepPlan:
        plan = self._in_flight
        assert plan is not None, f"an answer to step {step_id}, but none is in flight"
        assert plan.step_id == step_id, (
            f"an answer to step {step_id} != step {plan.step_id} in flight"
        )
        self._in_flight = None
        return plan

    def _absorb(self, piece: Slice, result: SliceResult) -> SequenceOutput | None:
        """Takes one slice's result into its sequence; returns what its ingress is to see."""
        sequence = piece.sequence
        self._scheduler.advance(piece)
        if piece.num_prompt_logprobs:
            sequence.prompt_logprobs.extend(result.prompt_logprobs)
        token_id = result.token_id
        if token_id is None:
            if sequence.num_computed < len(sequence.token_ids):
                return None
            # max_tokens is 0: only the prompt's log-probabilities were wanted
            self._finish(sequence)
            return SequenceOutput(
                request_id=sequence.request_id,
                prompt_logprobs=sequence.prompt_logprobs,
                num_cached_tokens=sequence.num_cached_tokens,
                finish_reason="length",
            )
        sequence.token_ids.append(token_id)
        sequence.output_ids.append(token_id)
        finish_reason, stop_reason = finish_of(sequence)
        if finish_reason is not None:
            self._finish(sequence)
        is_first = not sequence.has_emitted
        sequence.has_emitted = True
        wants_prompt_logprobs = is_first and sequence.params.prompt_logprobs is not None
        return SequenceOutput(
            request_id=sequence.request_id,
            token_ids=[token_id],
            logprobs=[] if result.logprobs is None else [result.logprobs],
            prompt_logprobs=sequence.prompt_logprobs if wants_prompt_logprobs else None,
            num_cached_tokens=sequence.num_cached_tokens if is_first else 0,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
        )

    def _finish(self, sequence: Sequence) -> None:
        self._scheduler.finish(sequence)
        of_source = self._sequences[sequence.source]
        del of_source[sequence.request_id]
        if not of_source:
            del self._sequences[sequence.source]

    def _emit_one(self, source: Source, output: SequenceOutput) -> list[Instruction]:
        return self._emit([(source, [output])])

    def _emit(self, outputs: Iterable[tuple[Source, list[SequenceOutput]]]) -> list[Instruction]:
        stats = self.stats()
        return [
            Emit(source, StepOutputs(outputs=of_source, stats=stats))
            for source, of_source in outputs
        ]

    def check_integrity(self) -> None:
        """Raises `AssertionError` with the broken equation and its numbers."""
        scheduler = self._scheduler
        scheduler.check_integrity()
        unfinished = [s for of_source in self._sequences.values() for s in of_source.values()]
        num_waiting, num_running = len(scheduler.waiting), len(scheduler.running)
        assert len(unfinished) == num_waiting + num_running, (
            f"unfinished {len(unfinished)} != waiting {num_waiting} + running {num_running}"
        )
        assert all(self._sequences.values()), f"a source without requests: {self._sequences}"
        for sequence in unfinished:
            assert sequence.phase is not Phase.FINISHED, f"{sequence} is still known"
        if self._in_flight is not None:
            num_tokens = sum(len(piece.token_ids) for piece in self._in_flight.slices)
            assert num_tokens == self._in_flight.num_tokens <= self.limits.max_tokens_per_step, (
                f"step of {num_tokens} tokens, said to be {self._in_flight.num_tokens}, "
                f"max_tokens_per_step {self.limits.max_tokens_per_step}"
            )
        if not unfinished:
            num_used = scheduler.blocks.num_used
            assert num_used == 0, f"idle, but used {num_used} != 0 blocks"


def _error_output(request_id: str, message: str) -> SequenceOutput:
    return SequenceOutput(request_id=request_id, finish_reason="error", error=message)
