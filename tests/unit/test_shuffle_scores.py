"""Scores learned from what was served: against slow twins, and that learning is worth something."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remora.comm import shuffle_scores
from remora.comm.shuffle import copy_prices, slice_order
from remora.comm.shuffle_cost import GroupFacts, choose_form, form_costs
from remora.comm.shuffle_scores import SCALE, TOKEN_ROWS_MAX, OnlineScores


def fresh(vocab_size: int = 50) -> OnlineScores:
    return OnlineScores(num_layers=2, num_experts=8, num_ranks=3, vocab_size=vocab_size)


class SlowScores:
    """One layer of the delta rule, with a table for everything that a row is told by."""

    def __init__(self) -> None:
        self.tables: dict[tuple[str, int], list[int]] = {}
        self.seen: dict[int, int] = {}
        self.rows = 0

    def parts(self, token: int, before: list[list[int]]) -> list[tuple[str, int]]:
        names = [("token", token)]
        for depth, experts in enumerate(before):
            names += [(f"layer-{depth}", expert) for expert in experts if expert >= 0]
        return names

    def scores(self, token: int, before: list[list[int]]) -> list[int]:
        found = [self.tables.get(part, [0] * 3) for part in self.parts(token, before)]
        return [sum(values) for values in zip(*found, strict=True)]

    def learn(self, token: int, before: list[list[int]], cost: list[int]) -> None:
        self.seen[token] = min(self.seen.get(token, 0) + 1, shuffle_scores.TOKEN_ROWS_MAX)
        steps = {
            "token": min(
                self.seen[token] + shuffle_scores.TOKEN_PRIOR, shuffle_scores.TOKEN_ROWS_MAX
            )
        }
        context = shuffle_scores.CONTEXT_FIRST + self.rows // shuffle_scores.CONTEXT_ROWS
        self.rows += 1
        guessed = self.scores(token, before)
        missed = [SCALE * (max(cost) - c) - g for c, g in zip(cost, guessed, strict=True)]
        for part in self.parts(token, before):
            step = steps.get(part[0], min(context, shuffle_scores.CONTEXT_MAX))
            table = self.tables.setdefault(part, [0] * 3)
            for rank in range(3):
                table[rank] += (missed[rank] + step // 2) // step


@settings(max_examples=30)
@given(seed=st.integers(0, 9999), rows=st.integers(1, 60), depth=st.integers(0, 2))
def test_scores_are_those_of_the_slow_twin(seed: int, rows: int, depth: int) -> None:
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, 5, rows)
    every = np.tile(np.arange(-1, 8), (rows, 1))
    before = [generator.permuted(every, axis=1)[:, :3] for _ in range(depth)]
    costs = generator.integers(0, 40, (rows, 3))
    scores, slow = fresh(), SlowScores()
    half = rows // 2
    for part in (slice(0, half), slice(half, rows)):
        scores.learn(1, tokens[part], [index_TK[part] for index_TK in before], costs[part])
    for t in range(rows):
        slow.learn(int(tokens[t]), [b[t].tolist() for b in before], costs[t].tolist())
    found = scores.scores(1, tokens, before)
    for t in range(rows):
        expected = slow.scores(int(tokens[t]), [b[t].tolist() for b in before])
        assert found[t].tolist() == expected


def test_layers_and_unseen_tokens_know_nothing() -> None:
    scores = fresh()
    scores.learn(0, np.array([3]), [], np.array([[0, 2, 2]]))
    assert scores.scores(0, np.array([3]), [])[0, 0] > SCALE // 4
    assert not scores.scores(0, np.array([3]), [])[0, 1:].any()
    assert not scores.scores(1, np.array([3]), []).any()
    assert not scores.scores(0, np.array([4]), []).any()
    scores.forget()
    assert not scores.scores(0, np.array([3]), []).any()


def test_what_both_tables_tell_is_counted_once() -> None:
    """Where id and bundle always come together, their sum is what they save, not twice that."""
    scores = fresh()
    tokens, before = np.array([7]), [np.array([[2, 5]])]
    for _ in range(2000):
        scores.learn(0, tokens, before, np.array([[0, 1, 1]]))
    assert abs(int(scores.scores(0, tokens, before)[0, 0]) - SCALE) < SCALE // 50


def test_old_rows_fade() -> None:
    """After a change of routing the new rank wins within the rows that a table row remembers."""
    scores = fresh()
    token = np.array([7])
    for _ in range(3 * TOKEN_ROWS_MAX):
        scores.learn(0, token, [], np.array([[0, 1, 1]]))
    for _ in range(TOKEN_ROWS_MAX):
        scores.learn(0, token, [], np.array([[1, 1, 0]]))
    first, _, last = scores.scores(0, token, [])[0]
    assert last > first


def test_memory_does_not_grow_with_the_vocabulary() -> None:
    assert fresh(1 << 22).nbytes == fresh(1 << 15).nbytes
    scores = fresh(1 << 22)
    scores.learn(0, np.array([5]), [], np.array([[0, 1, 1]]))
    assert scores.scores(0, np.array([5 + (1 << 15)]), [])[0, 0] > 0  # they share a row


def test_what_depends_on_the_token_is_learned() -> None:
    generator = np.random.default_rng(3)
    likes = generator.integers(0, 3, 50)
    scores = fresh()

    def step() -> tuple[np.ndarray, np.ndarray]:
        tokens = generator.integers(0, 50, 24)
        noise = generator.random(24) < 0.1
        near = np.where(noise, generator.integers(0, 3, 24), likes[tokens])
        return tokens, (np.arange(3) != near[:, None]).astype(np.int64)

    for _ in range(30):
        tokens, costs = step()
        scores.learn(0, tokens, [], costs)
    rank_T = np.arange(3).repeat(8)
    plain = guessed = best = 0
    for _ in range(30):
        tokens, costs = step()
        order = slice_order(scores.scores(0, tokens, []))
        plain += costs[np.arange(24), rank_T].sum()
        guessed += costs[order, rank_T].sum()
        best += costs[slice_order(-costs), rank_T].sum()
    assert (plain - guessed) > 0.6 * (plain - best)


def facts(ranks: list[str], shards: list[str], device_price: int = 0) -> GroupFacts:
    return GroupFacts(
        rank_hosts=ranks, shard_hosts=shards, num_experts=64, top_k=6, row_bytes=4096,
        replies_per_copy=1.0, device_price=device_price,
    )  # fmt: skip


def test_ranks_of_one_cpu_host_need_no_shuffle() -> None:
    assert choose_form(facts(["a", "a"], ["a", "a"])) == "none"
    assert choose_form(facts(["a", "a"], ["a", "b", "b"])) == "none"


@pytest.mark.parametrize("size", [2, 4])
def test_between_hosts_a_slice_is_cheaper_than_a_sum(size: int) -> None:
    hosts = [f"host-{i}" for i in range(size)]
    costs = form_costs(facts(hosts, hosts))
    assert costs["exact"].dispatch < costs["speculative"].dispatch < costs["none"].dispatch
    assert costs["exact"].exchange == costs["none"].exchange > costs["speculative"].exchange
    assert choose_form(facts(hosts, hosts)) == "speculative"


def test_bytes_of_the_exchanges_are_those_of_the_groups() -> None:
    """As tests/unit/test_slices.py counts them: two ranks, one row of 4,096 bytes."""
    costs = form_costs(facts(["a", "b"], ["a", "b"]))
    price = int(copy_prices(["a", "b"], ["a", "b"])[0, 1])
    assert costs["none"].exchange == price * 4096 * 3  # sum: both give it; gather: one does
    assert costs["speculative"].exchange == price * (4096 * 2 + 2 * 6)
