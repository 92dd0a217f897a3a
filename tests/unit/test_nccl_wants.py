"""Which dense ranks share a step, against the rule said dumbly."""

from hypothesis import given
from hypothesis import strategies as st

from remora.comm.nccl_wants_state import WantsState

UIDS = ("dense-0", "dense-1", "dense-2")
events = st.lists(
    st.one_of(
        st.tuples(st.just("want"), st.sampled_from(UIDS), st.integers(1, 40)),
        st.tuples(st.just("lost"), st.sampled_from(UIDS), st.just(0)),
        st.tuples(st.sampled_from(["begin", "commit"]), st.just(""), st.just(0)),
    ),
    max_size=30,
)


@given(events)
def test_all_that_wait_go_together_and_once(script: list[tuple[str, str, int]]) -> None:
    state, waiting, runs = WantsState(capacity_max=16), {}, False
    for what, uid, count in script:
        if what == "want":
            state.want(uid, count)
            waiting[uid] = count
        elif what == "lost":
            state.lost(uid)
            waiting.pop(uid, None)
        elif what == "commit":
            state.committed()
            runs = False
        else:
            step = state.begin()
            assert (step is None) == (runs or not waiting)
            if step is None:
                continue
            assert set(step.sources) == set(waiting)
            most = max(waiting.values())
            assert (step.mode == "exact") == (most > 16)
            assert step.mode == "exact" or most <= step.capacity <= 16
            waiting, runs = {}, True
