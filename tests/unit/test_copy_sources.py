"""Who copies what from whom: replicas only, evenly, and nobody begins where somebody else does."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from remora.cluster.copy_sources import REPLICAS_MAX, copy_sources
from remora.cluster.placement_steps import pairs_of

LAYERS = (1, 4)
ALL = tuple(range(8))


def test_two_takers_begin_with_different_sources() -> None:
    held = {"a": (ALL, ALL), "b": (ALL, ALL)}
    wanted = {uid: [(layer, e) for layer in LAYERS for e in range(4)] for uid in ("c", "d")}
    copies = copy_sources(wanted, held, LAYERS)
    given_by = {u: [sources[0] for sources in copies[u].values()] for u in wanted}
    assert {u: Counter(given_by[u]) for u in wanted} == {
        "c": {"a": 4, "b": 4}, "d": {"a": 4, "b": 4},
    }  # fmt: skip
    for at_c, at_d in zip(given_by["c"], given_by["d"], strict=True):
        assert at_c != at_d, "each has its own source at any time"
    assert all(len(sources) == 2 for u in wanted for sources in copies[u].values())


def test_what_nobody_else_holds_comes_from_the_checkpoint() -> None:
    held = {"a": ((0,), (0,)), "b": ((1,), (1,))}
    assert copy_sources({"a": [(1, 0), (1, 1), (4, 7)]}, held, LAYERS) == {
        "a": {(1, 0): (), (1, 1): ("b",), (4, 7): ()}
    }


experts = st.lists(st.integers(0, 7), unique=True, max_size=8).map(tuple)
placements = st.dictionaries(
    st.sampled_from("abcde"), st.tuples(experts, experts), min_size=1, max_size=5
)
wishes = st.dictionaries(
    st.sampled_from("abcxyz"),
    st.lists(st.tuples(st.sampled_from(LAYERS), st.integers(0, 7)), unique=True, max_size=12),
    max_size=4,
)


@given(placements, wishes)
def test_every_wish_is_met_once_by_those_who_hold_it(
    held: dict[str, tuple[tuple[int, ...], ...]], wanted: dict[str, list[tuple[int, int]]]
) -> None:
    copies = copy_sources(wanted, held, LAYERS)
    holders = {uid: set(pairs_of(layers, LAYERS)) for uid, layers in held.items()}
    assert {u: set(each) for u, each in copies.items()} == {
        u: set(w) for u, w in wanted.items() if w
    }
    for taker, each in copies.items():
        for pair, sources in each.items():
            able = {uid for uid in held if pair in holders[uid] and uid != taker}
            assert set(sources) <= able and len(sources) == min(len(able), REPLICAS_MAX)
