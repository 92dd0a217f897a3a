"""The dense rank's state machine, by example: what the golden scenarios cannot show."""

from dataclasses import replace

import pytest
import torch
from support.fake_runner import FakeRunner

from remora.actors.dense_events import (
    AbortRequested,
    DenseLimits,
    RequestArrived,
    SliceResult,
    StatusChanged,
    StepDone,
    StepFailed,
    StepPlan,
)
from remora.actors.dense_rank import slice_results
from remora.actors.dense_state import DenseState
from remora.comm.messages import SamplingParams, Submit, TokenLogprobs

LIMITS = DenseLimits(num_blocks=16, max_model_len=64, vocab_size=100, block_size=4)


def arrive(state: DenseState, name: str, source: str, **params: int) -> None:
    submit = Submit(
        request_id=name,
        prompt_ids=[1, 2, 3, len(name)],
        params=SamplingParams(**{"max_tokens": 3, **params}),  # type: ignore[arg-type]
    )
    assert state.handle(RequestArrived(submit, source)) == []


def planned(state: DenseState) -> StepPlan:
    plan = state.next_step()
    assert plan is not None
    return plan


@pytest.mark.parametrize(
    ("field", "value"),
    [(f, 0) for f in ("num_blocks", "max_model_len", "block_size", "max_num_seqs", "max_waiting")]
    + [("max_tokens_per_step", 255)],
)
def test_limits_that_contradict(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{field} (is )?{value}"):
        replace(LIMITS, **{field: value})  # type: ignore[arg-type]


def test_one_message_for_each_source_and_step() -> None:
    state = DenseState(LIMITS)
    for name, source in (("a", "east"), ("b", "west"), ("cc", "east")):
        arrive(state, name, source)
    state.handle(StatusChanged(executor="compiled", epoch=7))
    plan = planned(state)
    results = FakeRunner(LIMITS).run(plan)
    emits = state.handle(StepDone(plan.step_id, results))
    told = {e.source: [output.request_id for output in e.outputs.outputs] for e in emits}
    assert [e.source for e in emits] == ["east", "west"]
    assert told == {"east": ["a", "cc"], "west": ["b"]}
    for emit in emits:
        stats = emit.outputs.stats
        assert (stats.num_running, stats.steps_total) == (3, 1)
        assert (stats.executor, stats.epoch) == ("compiled", 7)
        assert (stats.kv_blocks_used, stats.kv_blocks_total) == (3, 16)


def test_a_step_in_flight_keeps_what_it_was_planned_with() -> None:
    state = DenseState(LIMITS)
    arrive(state, "a", "web")
    piece = planned(state).slices[0]
    table = list(piece.block_table)
    state.handle(AbortRequested("a", "web"))
    assert (piece.block_table, piece.position, piece.num_outputs) == (table, 4, 0)
    assert (piece.request_id, piece.prompt_ids, piece.output_ids) == ("a", [1, 2, 3, 1], [])


def test_nothing_to_do() -> None:
    state = DenseState(LIMITS)
    assert state.next_step() is None
    assert not state.has_work
    arrive(state, "a", "web")
    assert state.has_work


def test_one_step_at_a_time() -> None:
    state = DenseState(LIMITS)
    with pytest.raises(AssertionError, match="an answer to step 1, but none is in flight"):
        state.handle(StepDone(1, []))
    arrive(state, "a", "web")
    planned(state)
    with pytest.raises(AssertionError, match="step 1 is still in flight"):
        state.next_step()
    with pytest.raises(AssertionError, match="an answer to step 2 != step 1 in flight"):
        state.handle(StepFailed(2, "late"))


@pytest.mark.parametrize(
    ("results", "params", "complaint"),
    [
        ([], {}, "0 results != 1 slices"),
        ([SliceResult()], {}, "sampled token None for a slice with sample=True"),
        ([SliceResult(token_id=100)], {}, "sampled token 100 is outside 0 to 99"),
        ([SliceResult(token_id=1)], {"logprobs": 0}, "wanted=True"),
        (
            [SliceResult(token_id=1, logprobs=TokenLogprobs(1, -0.1, 1))],
            {},
            "wanted=False",
        ),
        ([SliceResult(token_id=1)], {"prompt_logprobs": 0}, "0 prompt logprobs != 3"),
        ([SliceResult(token_id=1)], {"prompt_logprobs": 0, "max_tokens": 0}, "sample=False"),
    ],
)
def test_answers_that_do_not_fit_the_step(
    results: list[SliceResult], params: dict[str, int], complaint: str
) -> None:
    state = DenseState(LIMITS)
    arrive(state, "a", "web", **params)
    plan = planned(state)
    with pytest.raises(AssertionError, match=complaint):
        state.handle(StepDone(plan.step_id, results))


def test_an_error_of_one_slice_ends_that_request_alone() -> None:
    state, runner = DenseState(LIMITS), FakeRunner(LIMITS)
    for name in ("a", "bb", "a" * 9):
        arrive(state, name, "web", max_tokens=2)
    plan = planned(state)
    results = runner.run(plan)
    results[0] = SliceResult(error="logits are not finite")
    (emit,) = state.handle(StepDone(plan.step_id, results))
    first, *others = emit.outputs.outputs
    assert (first.finish_reason, first.error) == ("error", "logits are not finite")
    assert first.token_ids == []
    assert [output.error for output in others] == [None, None]
    state.check_integrity()
    arrive(state, "c", "web", max_tokens=1)  # the prompt of "a": its block must not be shareable
    plan = planned(state)
    assert [(piece.request_id, piece.start) for piece in plan.slices][-1] == ("c", 0)
    runner.run(plan)


@pytest.mark.parametrize("stop_id", [LIMITS.vocab_size, -1])
@pytest.mark.parametrize("of", ["the checkpoint", "the request"])
def test_an_end_token_that_the_model_does_not_have_changes_nothing_for_anybody(
    of: str, stop_id: int
) -> None:
    """While `min_tokens` forbids the end, end tokens are masked; one mask that does not fit the
    logits would fail the step, and all who are in it."""
    eos, stops = ({7, stop_id}, []) if of == "the checkpoint" else ({7}, [stop_id])
    state = DenseState(replace(LIMITS, eos_token_ids=frozenset(eos)))
    asked = SamplingParams(max_tokens=3, min_tokens=2, temperature=0.0, stop_token_ids=tuple(stops))
    for name, params in (("one", asked), ("victim", SamplingParams(max_tokens=3, temperature=0.0))):
        state.handle(RequestArrived(Submit(request_id=name, prompt_ids=[1], params=params), "web"))
    plan = planned(state)
    logits_BV = torch.zeros(2, LIMITS.vocab_size)
    logits_BV[:, 7] = 2.0
    logits_BV[:, 8] = 1.0
    results = slice_results(plan, logits_BV, 2)
    assert [result.token_id for result in results] == [8, 7]
    (emit,) = state.handle(StepDone(plan.step_id, results))
    assert [output.finish_reason for output in emit.outputs.outputs] == [None, "stop"]


@pytest.mark.parametrize("token_id", [LIMITS.vocab_size, -1])
def test_a_bias_on_a_token_that_the_model_does_not_have_is_refused(token_id: int) -> None:
    params = SamplingParams(max_tokens=3, logit_bias={5: 1.0, token_id: 1.0})
    submit = Submit(request_id="a", prompt_ids=[1], params=params)
    (emit,) = DenseState(LIMITS).handle(RequestArrived(submit, "web"))
    (output,) = emit.outputs.outputs
    assert output.error == f"token id {token_id} is outside the vocabulary: 0 to 99"


def test_without_prefix_caching_nothing_is_shared() -> None:
    limits = replace(LIMITS, prefix_caching=False)
    state, runner = DenseState(limits), FakeRunner(limits)
    for _ in range(2):
        arrive(state, "a" * 9, "web", max_tokens=1)
        plan = planned(state)
        assert plan.num_tokens == 4
        emits = state.handle(StepDone(plan.step_id, runner.run(plan)))
        assert emits[0].outputs.outputs[0].num_cached_tokens == 0
        state.check_integrity()
    assert state.stats().prefix_hit_tokens_total == 0


@pytest.mark.parametrize(("after", "reused"), [("eager", 8), ("compiled", 0)])
def test_what_another_executor_computed_is_taken_up_by_nobody(after: str, reused: int) -> None:
    """They round in different places: a request's tokens would depend on who came before it."""
    state, runner = DenseState(LIMITS), FakeRunner(LIMITS)
    state.handle(StatusChanged(executor="eager", epoch=1))
    found = []
    for name in ("first", "second"):
        params = SamplingParams(max_tokens=1)
        submit = Submit(request_id=name, prompt_ids=[1, 2, 3, 4, 5, 6, 7, 8, 9], params=params)
        state.handle(RequestArrived(submit, "web"))
        plan = planned(state)
        [emit] = state.handle(StepDone(plan.step_id, runner.run(plan)))
        found.append(emit.outputs.outputs[0].num_cached_tokens)
        state.handle(StatusChanged(executor=after, epoch=2))
        state.check_integrity()
    assert found == [0, reused]


def test_integrity_says_the_numbers() -> None:
    state = DenseState(LIMITS)
    arrive(state, "a", "web")
    planned(state)
    state.check_integrity()
    state._scheduler.running[0].block_table.append(9)
    with pytest.raises(AssertionError, match=r"free 15 \+ cached 0 \+ used 2 != num_blocks 16"):
        state.check_integrity()
