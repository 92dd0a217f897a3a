"""The pure half of an expert shard: order, refusals, no starvation."""

from hypothesis import given
from hypothesis import strategies as st

from remora.actors.expert_state import (
    MAX_PASSED_OVER,
    QUEUE_MAX,
    CallArrived,
    CallDone,
    CallLost,
    Compute,
    ExpertState,
    Loaded,
    Refuse,
)


def call(call_id: int, *, num_rows: int = 1, experts: set[int] | None = None) -> CallArrived:
    return CallArrived(
        call_id=call_id,
        layer=0,
        experts=frozenset(experts or {0}),
        num_rows=num_rows,
        epoch=1,
        incarnation=7,
    )


def loaded() -> ExpertState:
    state = ExpertState(incarnation=7)
    assert state.handle(Loaded({0: frozenset({0, 1})})) == []
    return state


def test_a_call_before_loading_is_refused() -> None:
    [refusal] = ExpertState(incarnation=7).handle(call(1))
    assert isinstance(refusal, Refuse) and refusal.reason == "not-ready"


def test_an_expert_that_is_elsewhere_is_not_mine_and_named() -> None:
    [refusal] = loaded().handle(call(1, experts={1, 5}))
    assert isinstance(refusal, Refuse)
    assert refusal.reason == "not-mine" and "[5]" in refusal.detail


def test_a_layer_without_experts_here_is_not_mine() -> None:
    state = loaded()
    state.experts_by_layer = {3: frozenset({0})}
    [refusal] = state.handle(call(1))
    assert isinstance(refusal, Refuse) and refusal.reason == "not-mine"


def test_another_incarnation_is_fenced() -> None:
    state = ExpertState(incarnation=8)
    state.handle(Loaded({0: frozenset({0})}))
    [refusal] = state.handle(call(1))
    assert isinstance(refusal, Refuse) and refusal.reason == "fenced"


def test_decode_goes_ahead_of_prefill() -> None:
    state = loaded()
    assert state.handle(call(1, num_rows=512)) == [Compute(1)]
    assert state.handle(call(2, num_rows=512)) == []
    assert state.handle(call(3, num_rows=8)) == []
    assert state.handle(CallDone(1)) == [Compute(3)]
    assert state.handle(CallDone(3)) == [Compute(2)]


def test_prefill_does_not_starve() -> None:
    state = loaded()
    state.handle(call(0))
    state.handle(call(1, num_rows=512))
    started = []
    for next_id in range(2, 100):
        state.handle(call(next_id))
        [instruction] = state.handle(CallDone(state.running or 0))
        started.append(instruction.call_id)
        if instruction.call_id == 1:
            break
    assert len(started) == MAX_PASSED_OVER + 1


def test_the_queue_is_bounded() -> None:
    state = loaded()
    state.handle(call(0))
    for call_id in range(1, QUEUE_MAX + 1):
        assert state.handle(call(call_id)) == []
    [refusal] = state.handle(call(QUEUE_MAX + 1))
    assert isinstance(refusal, Refuse) and refusal.reason == "full"


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("arrive"), st.integers(1, 600)),
            st.tuples(st.just("done"), st.just(0)),
            st.tuples(st.just("lose"), st.integers(0, 30)),
        ),
        max_size=60,
    )
)
def test_every_call_that_is_not_lost_is_computed_once(script: list[tuple[str, int]]) -> None:
    state = loaded()
    computed: list[int] = []
    arrived: list[int] = []
    lost: set[int] = set()

    def note(instructions: list[Compute | Refuse]) -> None:
        for instruction in instructions:
            assert isinstance(instruction, Compute)
            computed.append(instruction.call_id)

    for what, value in script:
        if what == "arrive":
            arrived.append(len(arrived))
            note(state.handle(call(arrived[-1], num_rows=value)))
        elif what == "done" and state.running is not None:
            note(state.handle(CallDone(state.running)))
        elif what == "lose" and value in arrived and value not in computed:
            lost.add(value)
            note(state.handle(CallLost(value)))
    while state.running is not None:
        note(state.handle(CallDone(state.running)))
    assert sorted(computed) == sorted(set(arrived) - lost)
