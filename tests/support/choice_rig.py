"""Problems of replica choice, drawn, and the compiled choice run on them."""

import numpy as np
from hypothesis import strategies as st

from remora.comm import choice


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, list[list[int]], set[int]]:
    """(experts [T, K], shards that hold each, shards on our own host); 7 shards at most."""
    num_shards = draw(st.integers(1, 7))
    num_experts = draw(st.integers(1, 20))
    top_k = draw(st.integers(1, min(16, num_experts)))
    shard = st.integers(0, num_shards - 1)
    holders = [sorted(draw(st.sets(shard, min_size=1, max_size=3))) for _ in range(num_experts)]
    token = st.permutations(range(num_experts)).map(lambda p: list(p)[:top_k])
    rows = draw(st.lists(token, min_size=1, max_size=12))
    index_TK = np.array(rows, np.int64)
    if draw(st.booleans()):
        index_TK[draw(st.integers(0, len(rows) - 1)), 0] = -1
    return index_TK, holders, draw(st.sets(shard))


def table_of(holders: list[list[int]]) -> np.ndarray:
    """`[E, R]`, with a column of padding at least."""
    table_ER = np.full((len(holders), max(map(len, holders)) + 1), -1, np.int16)
    for expert, shards in enumerate(holders):
        table_ER[expert, : len(shards)] = shards
    return table_ER


def run_choose(
    index_TK: np.ndarray,
    holders: list[list[int]],
    local: set[int],
    usable: set[int],
    *,
    hosts: list[int] | None = None,
    load: list[int] | None = None,
    gain: int = 4 * choice.GAIN_ONE,
) -> tuple[int, np.ndarray, np.ndarray, list[int]]:
    """(missing, shards, calls, load afterwards); host 0 is ours, each other shard has its own
    host unless `hosts` are given."""
    num_shards = 1 + max(max(max(h, default=0) for h in holders), max(local | usable, default=0))
    hosts = hosts or [0 if s in local else 1 + s for s in range(num_shards)]
    load_S = np.array(load or [0] * num_shards, np.int64)
    usable_S = np.array([s in usable for s in range(num_shards)], np.uint8)
    shard_TK = np.full(index_TK.shape, -7, np.int32)
    call_TK = np.full(index_TK.shape, choice.PENDING, np.int32)
    missing = choice.choose(
        index_TK, len(index_TK), table_of(holders), np.array(hosts, np.int32), 0, usable_S,
        load_S, gain, shard_TK, call_TK,
    )  # fmt: skip
    return missing, shard_TK, call_TK, load_S.tolist()
