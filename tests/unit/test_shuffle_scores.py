"""Scores learned from what was served: against slow twins, and that learning is worth something."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remora.comm.shuffle import SCALE, copy_prices, slice_order
from remora.comm.shuffle_cost import GroupFacts, choose_form, form_costs
from remora.comm.shuffle_scores import PRIOR, SEEN_MAX, OnlineScores


def fresh(vocab_size: int = 50) -> OnlineScores:
    return OnlineScores(num_layers=2, num_experts=8, num_ranks=3, vocab_size=vocab_size)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 9999), rows=st.integers(1, 40))
def test_scores_are_means_of_what_was_saved(seed: int, rows: int) -> None:
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, 5, rows)
    previous = generator.integers(-1, 8, (rows, 2))
    costs = generator.integers(0, 4, (rows, 3))
    scores = fresh()
    scores.learn(1, tokens, previous, costs)
    saved = costs.max(axis=1, keepdims=True) - costs
    found = scores.scores(1, tokens[:1], previous[:1])
    same = tokens == tokens[0]
    expected = SCALE * saved[same].sum(axis=0) // (same.sum() + PRIOR)
    for expert in previous[0]:
        if expert >= 0:
            times = (previous == expert).sum(axis=1)
            total = (saved * times[:, None]).sum(axis=0)
            expected = expected + SCALE * total // (2 * (times.sum() + PRIOR))
    assert found[0].tolist() == expected.tolist()


def test_layers_and_unseen_tokens_know_nothing() -> None:
    scores = fresh()
    scores.learn(0, np.array([3]), None, np.array([[0, 2, 2]]))
    assert scores.scores(0, np.array([3]), None).tolist() == [[SCALE, 0, 0]]
    assert not scores.scores(1, np.array([3]), None).any()
    assert not scores.scores(0, np.array([4]), None).any()
    scores.forget()
    assert not scores.scores(0, np.array([3]), None).any()


def test_old_rows_fade() -> None:
    """After a change of routing the new rank wins within the rows that a table row remembers."""
    scores = fresh()
    token = np.array([7])
    for _ in range(3 * SEEN_MAX):
        scores.learn(0, token, None, np.array([[0, 1, 1]]))
    for _ in range(2 * SEEN_MAX):
        scores.learn(0, token, None, np.array([[1, 1, 0]]))
    first, _, last = scores.scores(0, token, None)[0]
    assert last > first


def test_memory_does_not_grow_with_the_vocabulary() -> None:
    assert fresh(1 << 22).nbytes == fresh(1 << 15).nbytes
    scores = fresh(1 << 22)
    scores.learn(0, np.array([5]), None, np.array([[0, 1, 1]]))
    assert scores.scores(0, np.array([5 + (1 << 15)]), None)[0, 0] > 0  # they share a row


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
        scores.learn(0, tokens, None, costs)
    rank_T = np.arange(3).repeat(8)
    plain = guessed = best = 0
    for _ in range(30):
        tokens, costs = step()
        order = slice_order(scores.scores(0, tokens, None))
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
