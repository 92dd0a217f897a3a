"""The block manager against a twin that keeps no books, and its keys."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from remora.actors.blocks import BlockManager, block_key, extend_keys

NUM_BLOCKS = 6
BLOCK_SIZE = 2


class Twin:
    """Blocks by brute force: the tables, what each block holds, and when each came out of use."""

    def __init__(self) -> None:
        self.tables: list[list[int]] = []
        self.content: dict[int, tuple[int, ...]] = {}  # block -> all tokens up to its end
        self.released: dict[int, int] = {}  # block -> when it was released last
        self.now = 0

    def used(self) -> set[int]:
        return {block for table in self.tables for block in table}

    def cached(self) -> list[int]:
        """Least recently released first."""
        blocks = self.content.keys() - self.used()
        return sorted(blocks, key=lambda block: self.released[block])

    def match(self, token_ids: list[int]) -> list[int]:
        found: list[int] = []
        for end in range(BLOCK_SIZE, len(token_ids) + 1, BLOCK_SIZE):
            holders = [b for b, held in self.content.items() if held == tuple(token_ids[:end])]
            if not holders:
                break
            found.append(holders[0])
        return found

    def evict(self, num_needed: int) -> list[int]:
        num_free = NUM_BLOCKS - len(self.used()) - len(self.cached())
        evicted = self.cached()[: max(0, num_needed - num_free)]
        for block in evicted:
            del self.content[block]
        return evicted

    def release(self, table: list[int]) -> None:
        self.tables.remove(table)
        for block in reversed(table):
            self.now += 1
            self.released[block] = self.now


tokens = st.lists(st.integers(0, 1), min_size=1, max_size=10)
operations = st.lists(
    st.one_of(st.tuples(st.just("run"), tokens), st.tuples(st.just("end"), st.integers(0, 9))),
    max_size=40,
)


@given(operations)
def test_twin(script: list[tuple[str, list[int] | int]]) -> None:
    """Sequences come, take what is known of them, compute the rest and go."""
    blocks, twin = BlockManager(NUM_BLOCKS), Twin()
    for _, argument in script:
        if isinstance(argument, int):
            if twin.tables:
                table = twin.tables[argument % len(twin.tables)]
                blocks.release(table)
                twin.release(table)
        else:
            _start(blocks, twin, argument)
        blocks.check_integrity(twin.tables)
        assert blocks.num_used == len(twin.used())
        assert blocks.num_cached == len(twin.cached())
        gains = list(blocks.reclaimable(twin.tables, set()))
        assert gains == [
            blocks.num_used - len({b for table in twin.tables[count:] for b in table})
            for count in range(1, len(twin.tables) + 1)
        ]


def _start(blocks: BlockManager, twin: Twin, token_ids: list[int]) -> None:
    keys: list[bytes] = []
    extend_keys(keys, token_ids, len(token_ids) // BLOCK_SIZE, BLOCK_SIZE)
    matched = blocks.match(keys)
    assert matched == twin.match(token_ids)
    num_new = -(-len(token_ids) // BLOCK_SIZE) - len(matched)
    assert blocks.num_cached_among(matched) == len(set(matched) - twin.used())
    if num_new + blocks.num_cached_among(matched) > blocks.num_available:
        return
    blocks.acquire(matched)
    twin.tables.append(list(matched))
    evicted = twin.evict(num_new)
    new = blocks.allocate(num_new)
    assert set(evicted) <= set(new)
    assert not set(new) & twin.content.keys()
    twin.tables[-1] += new
    for index in range(len(matched), len(keys)):
        blocks.publish(twin.tables[-1][index], keys[index])
        held = tuple(token_ids[: (index + 1) * BLOCK_SIZE])
        if held not in twin.content.values():
            twin.content[twin.tables[-1][index]] = held


def test_keys_chain_over_all_tokens_before() -> None:
    keys: list[bytes] = []
    extend_keys(keys, [1, 2, 3, 4, 5], 2, 2)
    assert keys == [block_key(b"", [1, 2]), block_key(block_key(b"", [1, 2]), [3, 4])]
    other: list[bytes] = []
    extend_keys(other, [1, 3, 3, 4], 2, 2)
    assert len({*keys, *other}) == 4
    extend_keys(keys, [9, 9, 9, 9, 5, 6], 3, 2)
    assert keys[2] == block_key(keys[1], [5, 6])  # known keys are not computed again


def test_a_second_holder_of_the_same_content_is_freed_not_cached() -> None:
    blocks = BlockManager(2)
    first, second = blocks.allocate(2)
    blocks.publish(first, block_key(b"", [1]))
    blocks.publish(second, block_key(b"", [1]))
    blocks.release([second])
    assert (blocks.num_cached, blocks.num_available) == (0, 1)
    blocks.release([first])
    assert (blocks.num_cached, blocks.num_available) == (1, 2)
    assert blocks.match([block_key(b"", [1])]) == [first]


def test_broken_invariants_say_their_numbers() -> None:
    blocks = BlockManager(2)
    with pytest.raises(ValueError, match="num_blocks is 0"):
        BlockManager(0)
    with pytest.raises(AssertionError, match=r"allocate\(3\) > free 2 \+ cached 0"):
        blocks.allocate(3)
    with pytest.raises(AssertionError, match=r"release\(1\)"):
        blocks.release([1])
    with pytest.raises(AssertionError, match=r"publish\(1\)"):
        blocks.publish(1, b"key")
    with pytest.raises(AssertionError, match=r"acquire\(1\)"):
        blocks.acquire([1])
    table = blocks.allocate(1)
    with pytest.raises(AssertionError, match=r"free 1 \+ cached 0 \+ used 0 != num_blocks 2"):
        blocks.check_integrity([])
    with pytest.raises(AssertionError, match="1 references != 2 tables"):
        blocks.check_integrity([table, table])
