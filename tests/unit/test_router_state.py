"""The router's state machine against a dumb one, its bounds, and the rebalance policy's rules."""

import itertools
from collections.abc import Callable, Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.router_rig import view_of

from remora.actors import router_state
from remora.actors.router_reporter import PERIOD_MAX_S
from remora.actors.router_state import (
    BLOCK_TOKENS,
    COPY_TOKENS,
    FORGET_S,
    SEQUENCE_TOKENS,
    SETTLE_S,
    SILENT_S,
    SILENT_TOKENS,
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
GROUPS = ("dense-0", "dense-1", "dense-2")


class DumbRouter:
    """Remembers every prompt and every event, and looks through all of them each time."""

    def __init__(self) -> None:
        self.sent: list[tuple[tuple[int, ...], str]] = []
        self.routed: list[tuple[str, int, float]] = []
        self.reports: dict[str, LoadReported] = {}
        self.copies: Mapping[str, float] = {}
        self.by_prompt = False

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

    def check(self, event: RouteAsked, choices: list[Choice | None]) -> None:
        """No other choices cost less, lot by lot; then remember what was chosen."""
        assert len(choices) == len(event.prompts)
        waiting = []
        for number, (prompt, choice) in enumerate(zip(event.prompts, choices, strict=True)):
            assert (choice is None) == (prompt.unreachable >= set(GROUPS))
            if choice is not None:
                waiting.append(number)
        while waiting:
            lot: list[int] = []
            for number in waiting:
                begin = event.prompts[number].token_ids[:BLOCK_TOKENS]
                is_whole = len(event.prompts[number].token_ids) > BLOCK_TOKENS
                known = any(
                    len(i) > BLOCK_TOKENS and i[:BLOCK_TOKENS] == begin for i, _ in self.sent
                )
                same = [n for n in lot if event.prompts[n].token_ids[:BLOCK_TOKENS] == begin]
                same = [n for n in same if len(event.prompts[n].token_ids) > BLOCK_TOKENS]
                if known or not is_whole or not same:
                    lot.append(number)
            asked = [event.prompts[number] for number in lot]
            chosen = [choice for number in lot if (choice := choices[number]) is not None]
            best = min(
                self.cost(asked, way, event.now_s)
                for way in itertools.product(GROUPS, repeat=len(asked))
            )
            found = self.cost(asked, tuple(c.group for c in chosen), event.now_s)
            assert found == pytest.approx(best, abs=1e-6)
            for prompt, choice in zip(asked, chosen, strict=True):
                assert choice.prefix_tokens == self.cached(choice.group, prompt)
                host = HOSTS[int(choice.group[-1])]
                assert choice.expected_copies == self.expected(prompt).get(host, -1.0)
            for prompt, choice in zip(asked, chosen, strict=True):
                self.routed.append((choice.group, prompt.num_sequences, event.now_s))
                self.sent.append((prompt.token_ids, choice.group))
            waiting = [number for number in waiting if number not in lot]

    def expected(self, prompt: Prompt) -> Mapping[str, float]:
        return of_prompt(prompt.token_ids) if self.by_prompt else self.copies

    def cost(self, prompts: list[Prompt], way: tuple[str, ...], now_s: float) -> float:
        size = sum(prompt.num_sequences for prompt in prompts) / len(prompts)
        total = 0.0
        for number, (prompt, uid) in enumerate(zip(prompts, way, strict=True)):
            if uid in prompt.unreachable:
                return float("inf")
            report = self.reports.get(uid)
            if report is not None and now_s - report.now_s > SILENT_S:
                total += SILENT_TOKENS
            before = self.sequences(uid, now_s) + size * way[:number].count(uid)
            copies = self.expected(prompt).get(HOSTS[int(uid[-1])], 0.0)
            total += SEQUENCE_TOKENS * before + prompt.num_tokens - self.cached(uid, prompt)
            total += COPY_TOKENS * copies * prompt.num_tokens
        return total


def of_prompt(token_ids: Sequence[int]) -> Mapping[str, float]:
    """Tokens of each family are at home somewhere."""
    return {host: 3.0 * (token_ids[0] % 3 != i) for i, host in enumerate(HOSTS)}


@st.composite
def prompts(draw: st.DrawFn) -> Prompt:
    family = draw(st.integers(0, 2))
    shared = draw(st.integers(0, 40))
    own = draw(st.integers(1, 40))
    number = draw(st.integers(0, 3))
    ids = (*[family] * shared, *(100 + number + i for i in range(own)))
    return Prompt(
        token_ids=ids,
        num_tokens=len(ids) * draw(st.sampled_from([1, 40])),
        num_sequences=draw(st.integers(1, 3)),
        unreachable=draw(st.frozensets(st.sampled_from(GROUPS), max_size=3)),
    )


steps = st.one_of(
    st.tuples(st.just("route"), st.lists(prompts(), min_size=1, max_size=4), st.just(0)),
    st.tuples(st.just("report"), st.sampled_from(GROUPS), st.integers(0, 5)),
    st.tuples(
        st.just("copies"),
        st.dictionaries(st.sampled_from(HOSTS), st.sampled_from([0.0, 0.5, 3.0])),
        st.booleans(),
    ),
)


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 2.0, 20.0, 40.0]), steps), max_size=30))
def test_choices_are_the_best_that_the_dumb_router_finds(
    script: list[tuple[float, tuple]],  # type: ignore[type-arg]
) -> None:
    state, dumb, now_s = RouterState(), DumbRouter(), 0.0
    state.handle(ViewAdopted(view_of(hosts=HOSTS), now_s))
    for pause_s, (kind, first, second) in script:
        now_s += pause_s
        if kind == "route":
            event = RouteAsked(prompts=tuple(first), now_s=now_s)
            dumb.check(event, state.handle(event))
        elif kind == "report":
            report = LoadReported(
                group=first, incarnation=1, num_running=second, num_waiting=0, now_s=now_s
            )
            state.handle(report)
            dumb.reports[first] = report
        else:
            state.handle(HomesLearned(first, of_prompt if second else None))
            dumb.copies, dumb.by_prompt = first, second


def test_a_lot_goes_where_it_costs_least_together() -> None:
    """One after the other, the first would take what only it can do without."""
    state = RouterState()
    state.handle(ViewAdopted(view_of(hosts=("a", "b")), 0.0))

    def costs(token_ids: Sequence[int]) -> Mapping[str, float]:
        return {"a": 0.0, "b": 0.5 if token_ids[0] == 1 else 3.0}

    state.handle(HomesLearned({}, costs))
    prompts = [Prompt(token_ids=(n,), num_tokens=1000) for n in (1, 2)]
    together = state.handle(RouteAsked(prompts=tuple(prompts), now_s=0.0))
    assert [c.group for c in together if c is not None] == ["dense-1", "dense-0"]


def test_more_prompts_than_one_flow_takes_all_get_a_group() -> None:
    state = RouterState()
    state.handle(ViewAdopted(view_of(hosts=("a", "b")), 0.0))
    count = 2 * router_state.FLOW_PROMPTS_MAX + 6
    prompts = tuple(Prompt(token_ids=(n,), num_tokens=1) for n in range(count))
    choices = state.handle(RouteAsked(prompts=prompts, now_s=0.0))
    groups = [choice.group for choice in choices if choice is not None]
    assert groups.count("dense-0") == groups.count("dense-1") == count // 2


@pytest.mark.parametrize(
    ("period_s", "silent_s"), [(2.0, 30.0), (45.0, 180.0), (600.0, 4 * PERIOD_MAX_S)]
)
def test_a_group_is_silent_after_several_periods_of_reports(
    period_s: float, silent_s: float
) -> None:
    """Reporters take a period of PERIOD_MAX_S at most, whatever they are asked for."""
    state = RouterState(period_s)
    state.handle(ViewAdopted(view_of(hosts=("a", "b")), 0.0))
    for number, group in enumerate(("dense-0", "dense-1")):
        state.handle(
            LoadReported(
                group=group,
                incarnation=1,
                num_running=8 * number,
                num_waiting=0,
                now_s=10.0 * number,
            )
        )
    for after_s, group in ((-1.0, "dense-0"), (1.0, "dense-1")):
        prompt = Prompt(token_ids=(1,), num_tokens=1)
        [choice] = state.handle(RouteAsked(prompts=(prompt,), now_s=silent_s + after_s))
        assert choice is not None and choice.group == group


def route(state: RouterState, ids: tuple[int, ...], num_tokens: int = 0) -> Choice:
    prompt = Prompt(token_ids=ids, num_tokens=num_tokens or len(ids))
    [choice] = state.handle(RouteAsked(prompts=(prompt,), now_s=0.0))
    assert choice is not None
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


def test_to_look_at_loads_changes_none() -> None:
    """A status is told by another thread than that which routes: both would take the same away."""
    state = RouterState()
    state.handle(ViewAdopted(view_of(hosts=("a",)), 0.0))
    route(state, (1,))
    assert state.loads(FORGET_S + 1) == {"dense-0": 0}
    assert state.loads(FORGET_S) == {"dense-0": 1}


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
