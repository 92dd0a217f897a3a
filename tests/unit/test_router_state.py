"""The router's state machine against a dumb one, its bounds, and the rebalance policy's rules."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.router_rig import view_of

from remora.actors import router_state
from remora.actors.router_state import (
    BLOCK_TOKENS,
    COPY_TOKENS,
    FORGET_S,
    SEQUENCE_TOKENS,
    SETTLE_S,
    SILENT_S,
    Choice,
    HomesLearned,
    LoadReported,
    Prompt,
    RouteAsked,
    RouterState,
    ViewAdopted,
    block_keys,
)
from remora.autoscale.rebalance import (
    LayerChange,
    RebalanceMemory,
    RebalancePolicy,
    decide,
    propose,
)

HOSTS = ("a", "b", "c")


class DumbRouter:
    """Remembers every prompt and every event, and looks through all of them each time."""

    def __init__(self) -> None:
        self.sent: list[tuple[tuple[int, ...], str]] = []
        self.routed: list[tuple[str, int, float]] = []
        self.reports: dict[str, LoadReported] = {}
        self.copies: dict[str, float] = {}

    def sequences(self, uid: str, now_s: float) -> int:
        report = self.reports.get(uid)
        total = report.num_running + report.num_waiting if report else 0
        for group, count, at_s in self.routed:
            counted = report is not None and report.now_s - at_s > SETTLE_S
            forgotten = now_s - at_s > FORGET_S
            if group == uid and not counted and not forgotten:
                total += count
        return total

    def cached(self, uid: str, prompt: Prompt) -> int:
        best = 0
        for ids, group in self.sent:
            if group == uid:
                same = 0
                while same < min(len(ids), len(prompt.token_ids)) and (
                    ids[same] == prompt.token_ids[same]
                ):
                    same += 1
                limit = min(len(ids) - 1, len(prompt.token_ids) - 1)
                best = max(best, min(same, limit) // BLOCK_TOKENS)
        return best * BLOCK_TOKENS

    def route(self, event: RouteAsked) -> list[Choice]:
        choices = []
        usable = [f"dense-{i}" for i in range(len(HOSTS)) if f"dense-{i}" not in event.unreachable]
        for prompt in event.prompts:
            ranked = []
            for uid in usable:
                report = self.reports.get(uid)
                silent = report is not None and event.now_s - report.now_s > SILENT_S
                cached = self.cached(uid, prompt)
                copies = self.copies.get(HOSTS[int(uid[-1])], 0.0)
                cost = SEQUENCE_TOKENS * self.sequences(uid, event.now_s)
                cost += prompt.num_tokens - cached
                cost += COPY_TOKENS * copies * prompt.num_tokens
                ranked.append((silent, cost, uid, cached))
            if not ranked:
                return []
            _, _, uid, cached = min(ranked)
            self.routed.append((uid, prompt.num_sequences, event.now_s))
            self.sent.append((prompt.token_ids, uid))
            copies = self.copies.get(HOSTS[int(uid[-1])], -1.0)
            choices.append(Choice(group=uid, prefix_tokens=cached, expected_copies=copies))
        return choices


@st.composite
def prompts(draw: st.DrawFn) -> Prompt:
    family = draw(st.integers(0, 2))
    shared = draw(st.integers(0, 40))
    own = draw(st.integers(1, 40))
    number = draw(st.integers(0, 3))
    ids = (*[family] * shared, *(100 + number + i for i in range(own)))
    return Prompt(token_ids=ids, num_tokens=len(ids), num_sequences=draw(st.integers(1, 3)))


steps = st.one_of(
    st.tuples(st.just("route"), st.lists(prompts(), min_size=1, max_size=3), st.sets(
        st.sampled_from(["dense-0", "dense-1", "dense-2"])
    )),
    st.tuples(st.just("report"), st.sampled_from(["dense-0", "dense-1", "dense-2"]),
              st.integers(0, 5)),
    st.tuples(st.just("copies"), st.dictionaries(
        st.sampled_from(HOSTS), st.sampled_from([0.0, 0.5, 3.0])
    ), st.just(0)),
)  # fmt: skip


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 2.0, 20.0, 40.0]), steps), max_size=30))
def test_choices_are_those_of_the_dumb_router(script: list[tuple[float, tuple]]) -> None:  # type: ignore[type-arg]
    state, dumb, now_s = RouterState(), DumbRouter(), 0.0
    state.handle(ViewAdopted(view_of(hosts=HOSTS), now_s))
    for pause_s, (kind, first, second) in script:
        now_s += pause_s
        if kind == "route":
            event = RouteAsked(prompts=tuple(first), now_s=now_s, unreachable=frozenset(second))
            assert state.handle(event) == dumb.route(event)
        elif kind == "report":
            report = LoadReported(
                group=first, incarnation=1, num_running=second, num_waiting=0, now_s=now_s
            )
            state.handle(report)
            dumb.reports[first] = report
        else:
            state.handle(HomesLearned(first))
            dumb.copies = first


def route(state: RouterState, ids: tuple[int, ...]) -> Choice:
    prompt = Prompt(token_ids=ids, num_tokens=len(ids))
    [choice] = state.handle(RouteAsked(prompts=(prompt,), now_s=0.0))
    return choice


def test_the_prefix_index_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_state, "PREFIX_BLOCKS_MAX", 4)
    state = RouterState()
    state.handle(ViewAdopted(view_of(hosts=("a",)), 0.0))
    long = tuple(range(BLOCK_TOKENS * 3 + 1))
    other = tuple(range(1000, 1000 + BLOCK_TOKENS * 3 + 1))
    route(state, long)
    assert route(state, long).prefix_tokens == 3 * BLOCK_TOKENS
    route(state, other)
    assert len(state._prefixes) == 4
    assert route(state, long).prefix_tokens == BLOCK_TOKENS, "its beginning stays longest"


def test_what_is_noted_of_a_group_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_state, "ROUTED_MAX", 5)
    state = RouterState()
    state.handle(ViewAdopted(view_of(hosts=("a",)), 0.0))
    for number in range(9):
        route(state, (number,))
    assert state.loads(0.0) == {"dense-0": 5}


def test_keys_cover_whole_blocks_and_all_that_stands_before() -> None:
    ids = tuple(range(100))
    assert len(block_keys(ids)) == 6 and block_keys(ids[:17]) == block_keys(ids)[:1]
    assert block_keys(ids[:16]) == [], "the last token is always computed"
    changed = (7, *ids[1:])
    assert not set(block_keys(changed)) & set(block_keys(ids))


changes = st.lists(
    st.builds(
        LayerChange,
        layer=st.integers(0, 50),
        copies_before=st.floats(0, 4),
        copies_after=st.floats(0, 4),
        load_before=st.floats(1, 3),
        load_after=st.floats(1, 3),
        moved=st.integers(0, 40),
    ),
    max_size=6,
    unique_by=lambda change: change.layer,
)


@given(changes, st.integers(0, 60), st.floats(0, 2))
def test_a_proposal_keeps_within_its_bounds(
    layers: list[LayerChange], moves_max: int, margin: float
) -> None:
    policy = RebalancePolicy(moves_max=moves_max, margin=margin, horizon_tokens=100)
    proposal = propose(policy, layers, expert_bytes=50, row_bytes=3)
    by_layer = {change.layer: change for change in layers}
    taken = [by_layer[layer] for layer in proposal.layers]
    assert proposal.moved == sum(change.moved for change in taken) <= moves_max
    assert proposal.moved_bytes == 50 * proposal.moved
    for change in taken:
        saved = change.copies_before - change.copies_after
        saved += policy.load_copies * (change.load_before - change.load_after)
        assert saved * 300 > margin * 50 * change.moved
    assert proposal.saved_bytes >= 0


@given(st.lists(st.tuples(st.floats(0, 500), st.booleans()), min_size=1, max_size=40))
def test_rounds_keep_apart_and_are_confirmed(rounds: list[tuple[float, bool]]) -> None:
    """Against the rule said plainly over the whole history."""
    policy = RebalancePolicy(cooldown_s=300, confirmations=3, tokens_min=1)
    good = LayerChange(
        layer=0, copies_before=2, copies_after=1, load_before=1, load_after=1, moved=0
    )
    memory, now_s, moves, in_a_row = RebalanceMemory(), 0.0, list[float](), 0
    for pause_s, is_worth in rounds:
        now_s += pause_s
        proposal = propose(policy, [good] if is_worth else [], expert_bytes=1, row_bytes=1)
        decision, memory = decide(policy, memory, proposal, tokens=10, now_s=now_s)
        in_a_row = in_a_row + 1 if is_worth else 0
        cool = not moves or now_s - moves[-1] >= policy.cooldown_s
        assert (decision.verdict == "move") == (in_a_row >= 3 and cool)
        if decision.verdict == "move":
            moves.append(now_s)
            in_a_row = 0


def test_what_costs_more_than_it_saves_is_never_proposed() -> None:
    worse: Callable[[float], LayerChange] = lambda after: LayerChange(  # noqa: E731
        layer=0, copies_before=1, copies_after=after, load_before=1, load_after=1, moved=0
    )
    assert propose(RebalancePolicy(), [worse(1.0)], expert_bytes=1, row_bytes=1).layers == ()
    assert propose(RebalancePolicy(), [worse(1.1)], expert_bytes=1, row_bytes=1).layers == ()
    assert propose(RebalancePolicy(), [worse(0.9)], expert_bytes=1, row_bytes=1).layers == (0,)
