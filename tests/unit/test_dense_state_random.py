"""Random events against a twin that serves each request alone, by the definition.

Whatever chunks, prefix hits, preemptions, aborts and failures happen around it, a request's tokens
are those of `fake_token` on all its tokens so far, and it finishes once. The runner checks every
position's K/V (`support.fake_runner`).
"""

from dataclasses import dataclass, field

import hypothesis.strategies as st
import msgspec
from hypothesis import event, given, settings
from support.fake_runner import FakeRunner, digests, fake_logprobs, fake_token

from remora.actors.dense_events import (
    AbortRequested,
    DenseLimits,
    Emit,
    Event,
    RequestArrived,
    Slice,
    SourceLost,
    StepDone,
    StepFailed,
    StepPlan,
)
from remora.actors.dense_state import DenseState
from remora.comm.messages import SamplingParams, SequenceOutput, Submit, TokenLogprobs

VOCAB_SIZE = 30
EOS = frozenset({0})


@dataclass
class Told:
    """What the outputs of one request said, put together."""

    submit: Submit
    source: int
    order: tuple[int, int]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] | None = None
    num_cached_tokens: int = 0
    num_outputs: int = 0
    finish_reason: str | None = None
    stop_reason: int | None = None
    lost: bool = False
    started: bool = False

    def take(self, output: SequenceOutput) -> None:
        assert self.finish_reason is None, f"{output} after it finished: {self}"
        assert not self.lost, f"{output} for a lost source"
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs
        if self.num_outputs == 0:
            self.prompt_logprobs = output.prompt_logprobs
            self.num_cached_tokens = output.num_cached_tokens
        else:
            assert output.prompt_logprobs is None and output.num_cached_tokens == 0
        self.num_outputs += 1
        self.finish_reason, self.stop_reason = output.finish_reason, output.stop_reason
        assert (output.error is not None) == (output.finish_reason == "error")

    @property
    def is_over(self) -> bool:
        return self.lost or self.finish_reason is not None


def twin(submit: Submit) -> tuple[list[int], str, int | None]:
    """(tokens, finish reason, stop reason) of a request that is served alone."""
    params, output_ids = submit.params, list[int]()
    eos = frozenset[int]() if params.ignore_eos else EOS
    while len(output_ids) < params.max_tokens:
        token_id = fake_token(digests(submit.prompt_ids + output_ids)[-1], VOCAB_SIZE)
        output_ids.append(token_id)
        if len(output_ids) > params.min_tokens:
            if token_id in eos:
                return output_ids, "stop", None
            if token_id in params.stop_token_ids:
                return output_ids, "stop", token_id
    return output_ids, "length", None


def check_against_twin(told: Told, block_size: int) -> None:
    """Compares a request that ended with what it would have got alone."""
    token_ids, finish_reason, stop_reason = twin(told.submit)
    params, prompt_ids = told.submit.params, told.submit.prompt_ids
    if told.finish_reason in ("stop", "length"):
        assert told.token_ids == token_ids
        assert (told.finish_reason, told.stop_reason) == (finish_reason, stop_reason)
    else:  # cut short: a beginning of it
        assert told.token_ids == token_ids[: len(told.token_ids)]
    chain = digests(prompt_ids + told.token_ids)
    if params.logprobs is not None:
        first = len(prompt_ids)
        expected = [fake_logprobs(chain[first + i], t) for i, t in enumerate(told.token_ids)]
        assert told.logprobs == expected
    else:
        assert not told.logprobs
    if params.prompt_logprobs is not None and (told.token_ids or told.finish_reason == "length"):
        assert told.prompt_logprobs == [
            fake_logprobs(chain[p], prompt_ids[p]) for p in range(1, len(prompt_ids))
        ]
        assert told.num_cached_tokens == 0
    assert 0 <= told.num_cached_tokens < len(prompt_ids)
    assert told.num_cached_tokens % block_size == 0


class Harness:
    """A state machine, a runner and what was told about every request."""

    def __init__(self, limits: DenseLimits) -> None:
        self.limits = limits
        self.state = DenseState(limits)
        self.runner = FakeRunner(limits)
        self.told: dict[tuple[int, str], Told] = {}

    def handle(self, happened: Event) -> list[Emit]:
        emits = self.state.handle(happened)
        assert len({emit.source for emit in emits}) == len(emits), "two messages for one source"
        for emit in emits:
            assert isinstance(emit.source, int)
            for output in emit.outputs.outputs:
                self.told[emit.source, output.request_id].take(output)
        self.state.check_integrity()
        return emits

    def arrive(self, submit: Submit, source: int) -> None:
        told = Told(submit, source, (submit.priority, len(self.told)))
        self.told[source, submit.request_id] = told
        self.handle(RequestArrived(submit, source))
        num_tokens = len(submit.prompt_ids) + submit.params.max_tokens
        num_blocks = -(-max(len(submit.prompt_ids), num_tokens - 1) // self.limits.block_size)
        if num_tokens > self.limits.max_model_len or num_blocks > self.limits.num_blocks:
            assert told.finish_reason == "error"
        elif told.finish_reason is not None:
            assert told.finish_reason == "length" and submit.params.max_tokens == 0

    def lose(self, source: int) -> None:
        for told in self.told.values():
            if told.source == source and not told.is_over:
                told.lost = True
        assert self.handle(SourceLost(source)) == []

    def start(self) -> StepPlan | None:
        plan = self.state.next_step()
        self.state.check_integrity()
        if plan is None:
            assert all(told.is_over for told in self.told.values())
            return None
        keys = [(_source(piece), piece.request_id) for piece in plan.slices]
        assert len(set(keys)) == len(keys) <= self.limits.max_num_seqs
        new = [self.told[key] for key in keys if not self.told[key].started]
        for told in new:
            told.started = True
        waiting = [told for told in self.told.values() if not (told.started or told.is_over)]
        for told in new:  # nobody overtakes
            assert all(told.order < other.order for other in waiting), (told, waiting)
        return plan

    def answer(self, plan: StepPlan, failure: str | None = None) -> None:
        if failure is None:
            self.handle(StepDone(plan.step_id, self.runner.run(plan)))
            return
        keys = [(_source(piece), piece.request_id) for piece in plan.slices]
        alive = [self.told[key] for key in keys if not self.told[key].is_over]
        self.handle(StepFailed(plan.step_id, failure))
        assert all(told.finish_reason == "error" for told in alive)


def _source(piece: Slice) -> int:
    assert isinstance(piece.sequence.source, int)
    return piece.sequence.source


@st.composite
def all_limits(draw: st.DrawFn) -> DenseLimits:
    max_num_seqs = draw(st.sampled_from([4, 3, 2, 1, 6]))
    return DenseLimits(
        num_blocks=draw(st.integers(4, 12)),
        max_model_len=24,
        vocab_size=VOCAB_SIZE,
        eos_token_ids=EOS,
        block_size=draw(st.sampled_from([2, 1, 3, 4])),
        max_num_seqs=max_num_seqs,
        max_tokens_per_step=max_num_seqs + draw(st.integers(0, 12)),
        prefix_caching=draw(st.integers(0, 4)) > 0,
    )


@st.composite
def submits(draw: st.DrawFn) -> Submit:
    """Prompts out of two families, so that many share a prefix."""
    family = draw(st.sampled_from([[1, 2, 3, 4, 5, 6, 7, 8], [1, 1, 1, 1, 1, 1, 1, 1]]))
    prompt_ids = family[: draw(st.sampled_from([0, 8, 4, 6]))] + draw(
        st.lists(st.integers(0, 2), min_size=1, max_size=4)
    )
    logprobs = st.sampled_from([None, None, None, None, 0])
    params = SamplingParams(
        max_tokens=draw(st.sampled_from([10, 8, 5, 12, 1, 0])),
        min_tokens=draw(st.sampled_from([0, 0, 3])),
        stop_token_ids=draw(st.sampled_from([(), (3,)])),
        ignore_eos=draw(st.booleans()),
        logprobs=draw(logprobs),
        prompt_logprobs=draw(logprobs),
    )
    return Submit(
        request_id="", prompt_ids=prompt_ids, params=params, priority=draw(st.integers(0, 1))
    )


happenings = st.lists(
    st.one_of(
        st.tuples(st.just("arrive"), st.lists(submits(), min_size=1, max_size=6)),
        st.tuples(st.just("step"), st.integers(1, 4)),
        st.tuples(st.just("step"), st.integers(1, 4)),
        st.tuples(st.just("abort"), st.integers(0, 99)),
        st.tuples(st.just("fail"), st.none()),
        st.tuples(st.just("lose"), st.integers(0, 2)),
    ),
    min_size=1,
    max_size=16,
)


@settings(max_examples=400)
@given(all_limits(), happenings)
def test_every_request_is_served_as_if_alone(
    limits: DenseLimits, script: list[tuple[str, object]]
) -> None:
    harness = Harness(limits)
    plan: StepPlan | None = None
    for number, (what, argument) in enumerate(script):
        # Half of the events come while a step is in flight.
        if plan is None and number % 2:
            plan = harness.start()
        if isinstance(argument, list):
            for index, submit in enumerate(argument):
                named = msgspec.structs.replace(submit, request_id=f"r{number}.{index}")
                harness.arrive(named, source=index % 3)
        elif what == "abort" and harness.told:
            assert isinstance(argument, int)
            source, request_id = list(harness.told)[argument % len(harness.told)]
            harness.handle(AbortRequested(request_id, source))
            assert harness.told[source, request_id].is_over
        elif what == "lose":
            assert isinstance(argument, int)
            harness.lose(argument)
        elif what == "fail":
            plan = plan or harness.start()
            if plan is not None:
                harness.answer(plan, "a shard is gone")
            plan = None
        elif what == "step":
            assert isinstance(argument, int)
            for _ in range(argument):
                plan = plan or harness.start()
                if plan is not None:
                    harness.answer(plan)
                plan = None
    _finish_all(harness, plan)
    for told in harness.told.values():
        assert told.is_over
        check_against_twin(told, limits.block_size)
    event(f"preempted: {harness.state.stats().preemptions_total > 0}")
    event(f"prefix hits: {harness.state.stats().prefix_hit_tokens_total > 0}")


def _finish_all(harness: Harness, plan: StepPlan | None) -> None:
    """Runs until all is done, within a bound: every step computes at least one token."""
    alive = [told for told in harness.told.values() if not told.is_over]
    num_tokens = sum(len(told.submit.prompt_ids) + told.submit.params.max_tokens for told in alive)
    # Each sequence is recomputed at most once for each block that those before it may take.
    num_steps_max = num_tokens * (1 + harness.limits.num_blocks * len(alive))
    for _ in range(num_steps_max + 2):  # one in flight, and the last that finds nothing
        plan = plan or harness.start()
        if plan is None:
            return
        harness.answer(plan)
        plan = None
    raise AssertionError(f"not done after {num_steps_max} steps: {harness.state.stats()}")
