"""Paged KV accounting: blocks of one dense rank, shared by content. Pure; holds no tensors.

A block is *free* (empty), *used* (in at least one block table) or *cached* (in no table, but its
content is known and a later prompt may take it up again). Always

    free + cached + used == num_blocks

A full block's key is a SHA-256 chain over the tokens of all blocks up to it, so equal keys mean
equal prefixes (no two prefixes with one key are known to anybody). Cached blocks are evicted the
least recently released first, and of one sequence its tail before its head: a prefix outlives what
depends on it. Method: vLLM's automatic prefix caching, with a cryptographic key.
"""

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Iterator, Sequence

_ROOT_KEY = b""


def block_key(parent_key: bytes, token_ids: Sequence[int]) -> bytes:
    """Key of a full block from its parent's (b"" for the first) and its tokens; 32 bytes.

    The parent has a fixed length and the tokens a fixed width, so nothing can be shifted between
    them. Raises `OverflowError` for a token id outside int64.
    """
    return hashlib.sha256(parent_key + array("q", token_ids).tobytes()).digest()


def extend_keys(
    keys: list[bytes], token_ids: Sequence[int], num_blocks: int, block_size: int
) -> None:
    """Appends to `keys` until it holds those of the `num_blocks` leading full blocks."""
    for index in range(len(keys), num_blocks):
        parent = keys[-1] if keys else _ROOT_KEY
        keys.append(block_key(parent, token_ids[index * block_size : (index + 1) * block_size]))


class BlockManager:
    """Reference-counted blocks with a prefix cache. Blocks are the ids 0 .. num_blocks - 1."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks is {num_blocks}; it must be at least 1")
        self.num_blocks = num_blocks
        self._free: list[int] = list(range(num_blocks - 1, -1, -1))  # popped from the end
        self._refs: list[int] = [0] * num_blocks  # block tables that hold the block
        self._keys: list[bytes | None] = [None] * num_blocks
        self._by_key: dict[bytes, int] = {}  # complete blocks, used or cached
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently released first

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can give: free and cached."""
        return len(self._free) + len(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks in at least one table."""
        return self.num_blocks - len(self._free) - len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks in no table whose content may be taken up again."""
        return len(self._cached)

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """Blocks of the longest prefix of `keys` that is here. Changes nothing."""
        matched: list[int] = []
        for key in keys:
            block = self._by_key.get(key)
            if block is None:
                break
            matched.append(block)
        return matched

    def num_cached_among(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` are cached, so that `acquire` would make them unavailable."""
        refs = self._refs
        return sum(refs[block] == 0 for block in blocks)

    def acquire(self, blocks: Iterable[int]) -> None:
        """Takes matched blocks into one more table."""
        for block in blocks:
            if self._refs[block] == 0:
                assert self._keys[block] is not None, f"acquire({block}): its content is unknown"
                del self._cached[block]
            self._refs[block] += 1

    def allocate(self, num_blocks: int) -> list[int]:
        """Empty blocks for one table, evicting cached ones where no free block is left."""
        assert num_blocks <= self.num_available, (
            f"allocate({num_blocks}) > free {len(self._free)} + cached {len(self._cached)}"
        )
        blocks: list[int] = []
        for _ in range(num_blocks):
            if self._free:
                block = self._free.pop()
            else:
                block, _none = self._cached.popitem(last=False)
                self._forget(block)
            self._refs[block] = 1
            blocks.append(block)
        return blocks

    def publish(self, block: int, key: bytes) -> None:
        """Says that a used block is complete and holds the content `key`.

        When another block already holds it (two sequences computed the same prefix side by side),
        that one stays the known one, and this one will be free after use.
        """
        assert self._refs[block] > 0, f"publish({block}): it is in no table"
        if key not in self._by_key and self._keys[block] is None:
            self._by_key[key] = block
            self._keys[block] = key

    def release(self, blocks: Sequence[int]) -> None:
        """Takes a whole table's blocks out of it, the tail first."""
        for block in reversed(blocks):
            assert self._refs[block] > 0, f"release({block}): it is in no table"
            self._refs[block] -= 1
            if self._refs[block] == 0:
                if self._keys[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None

    def forget_cached(self) -> None:
        """What is in no table is free, and what is in one will be after use: what comes is computed
        otherwise than what is here."""
        self._free += self._cached
        self._cached.clear()
        self._by_key.clear()
        self._keys = [None] * self.num_blocks

    def reclaimable(self, tables: Iterable[Sequence[int]], keep: Collection[int]) -> Iterator[int]:
        """After each of `tables`: blocks outside `keep` that releasing all so far would free."""
        counts: Counter[int] = Counter()
        num_blocks = 0
        for table in tables:
            for block in table:
                counts[block] += 1
                num_blocks += counts[block] == self._refs[block] and block not in keep
            yield num_blocks

    def _forget(self, block: int) -> None:
        key = self._keys[block]
        assert key is not None, f"block {block} is cached without a key"
        del self._by_key[key]
        self._keys[block] = None

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Raises `AssertionError` with the broken equation unless `tables` explain every block."""
        counts: Counter[int] = Counter()
        for table in tables:
            assert len(set(table)) == len(table), f"a block twice in one table: {list(table)}"
            counts.update(table)
        free, cached, used = len(self._free), len(self._cached), len(counts)
        assert free + cached + used == self.num_blocks, (
            f"free {free} + cached {cached} + used {used} != num_blocks {self.num_blocks}"
        )
        for block, refs in enumerate(self._refs):
            assert refs == counts[block], (
                f"block {block}: {refs} references != {counts[block]} tables that hold it"
            )
            places = (block in self._cached) + (refs > 0)
            assert places <= 1, f"block {block} is cached and in {refs} tables"
        loose = [block for block in self._free if self._refs[block] or self._keys[block]]
        assert not loose, f"free blocks that are in use or have content: {loose}"
        assert len(set(self._free)) == free, f"a block twice in the free list: {self._free}"
        keyed = {block: key for block, key in enumerate(self._keys) if key is not None}
        known = {block: key for key, block in self._by_key.items()}
        assert keyed == known, f"{len(keyed)} blocks with a key != {len(known)} known keys"
        assert self._cached.keys() <= keyed.keys(), (
            f"cached blocks without content: {self._cached.keys() - keyed.keys()}"
        )
