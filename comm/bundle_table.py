"""Weighted unique rows in bounded memory: what bundles are counted in.

When a table is full it keeps a *priority sample* of its rows (Duffield, Lund, Thorup, "Priority
sampling for estimation of arbitrary subset sums", J. ACM 54(6), 2007): heavy rows keep their
weight, light ones stay with a chance in proportion to it and then stand for those that went. The
expected weight of every set of rows is what it was, so the cost of any placement, a sum over rows,
is estimated without bias; keeping the heaviest rows and forgetting the rest is not (a token's
bundle is rarely seen twice: of DeepSeek-V2-Lite's six of 64, most are unique). Chance is a hash of
the row and of how often the table was pruned: the same input gives the same table.

Shape suffixes: T rows given, B rows held, W values of a row, H hash slots.
"""

from typing import Any, Final

import numba
import numpy as np
from numpy.typing import NDArray

NO_VALUE: Final = 0xFFFF  # sorts behind every expert
ROWS_MIN: Final = 64  # a table begins with room for these

_jit: Any = numba.njit(cache=True, nogil=True, boundscheck=False)


@_jit
def _mix(x):  # type: ignore[no-untyped-def]
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection that looks random."""
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@_jit
def _hash_row(row_W):  # type: ignore[no-untyped-def]
    h = np.uint64(row_W.shape[0])
    for value in row_W:
        h = _mix(h + np.uint64(value) + np.uint64(0x9E3779B97F4A7C15))
    return h


@_jit
def sort_rows(ids_TK, rows_T, out_TK):  # type: ignore[no-untyped-def]
    """`out_TK[i]` = row `rows_T[i]` of `ids_TK` ascending, as uint16; negative ids: NO_VALUE."""
    top_k = ids_TK.shape[1]
    for i in range(rows_T.shape[0]):
        t = rows_T[i]
        for k in range(top_k):
            e = ids_TK[t, k]
            value = np.uint16(e) if e >= 0 else np.uint16(NO_VALUE)
            at = k
            while at > 0 and out_TK[i, at - 1] > value:
                out_TK[i, at] = out_TK[i, at - 1]
                at -= 1
            out_TK[i, at] = value


@_jit
def _find(row_W, keys_BW, slots_H):  # type: ignore[no-untyped-def]
    """The slot where a row is, or where it would go."""
    mask = np.uint64(slots_H.shape[0] - 1)
    slot = _hash_row(row_W) & mask
    while slots_H[slot] >= 0:
        b = slots_H[slot]
        same = True
        for w in range(row_W.shape[0]):
            if keys_BW[b, w] != row_W[w]:
                same = False
                break
        if same:
            break
        slot = (slot + np.uint64(1)) & mask
    return slot


@_jit
def _insert(rows_TW, weight_T, begin, keys_BW, weight_B, num_rows, slots_H):  # type: ignore[no-untyped-def]
    """Adds rows from `begin` on until there is no room; (first row not added, rows held)."""
    for t in range(begin, rows_TW.shape[0]):
        slot = _find(rows_TW[t], keys_BW, slots_H)
        b = slots_H[slot]
        if b < 0:
            if num_rows == keys_BW.shape[0]:
                return t, num_rows
            b = num_rows
            num_rows += 1
            slots_H[slot] = b
            keys_BW[b] = rows_TW[t]
            weight_B[b] = 0.0
        weight_B[b] += weight_T[t]
    return rows_TW.shape[0], num_rows


@_jit
def _chances(keys_BW, num_rows, salt):  # type: ignore[no-untyped-def]
    """A number in (0, 1] for each row, as good as random, the same for the same row and salt."""
    out_B = np.empty(num_rows)
    for b in range(num_rows):
        h = _mix(_hash_row(keys_BW[b]) ^ _mix(salt))
        out_B[b] = (np.float64(h >> np.uint64(11)) + 1.0) / 9007199254740992.0
    return out_B


def priority_sample(
    keys_BW: NDArray[np.uint16], weight_B: NDArray[np.float64], num_kept: int, salt: int
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Which rows stay when only `num_kept` may, ascending, and what they weigh then.

    Args:
        weight_B: non-negative. Rows of no weight never stay.
        salt: another one for every time that the same rows are sampled again.
    """
    kept = np.flatnonzero(weight_B > 0)
    if len(kept) <= num_kept:
        return kept, weight_B[kept]
    chance_B = _chances(keys_BW, len(keys_BW), np.uint64(salt & (2**64 - 1)))
    priority = weight_B[kept] / chance_B[kept]
    order = np.argpartition(-priority, num_kept)
    threshold = priority[order[num_kept]]
    kept = np.sort(kept[order[:num_kept]])
    return kept, np.maximum(weight_B[kept], threshold)


class BundleTable:
    """Counts rows of `width` values below 2**16; at most `rows_max` of them. Not thread-safe.

    Args:
        salt: where the hash's chance begins; anything.
    """

    def __init__(self, width: int, rows_max: int, *, salt: int = 0) -> None:
        assert width >= 1 and rows_max >= 2, f"a table of {rows_max} rows of {width}"
        self.width = width
        self.num_rows = 0
        self._rows_max = rows_max
        self._salt = salt
        self._allocate(min(ROWS_MIN, rows_max))

    @property
    def rows(self) -> NDArray[np.uint16]:
        """[B, W]: the rows held, in no particular order; a view."""
        return self._keys_BW[: self.num_rows]

    @property
    def weights(self) -> NDArray[np.float64]:
        """[B]: their weights; a view, which may be scaled in place."""
        return self._weight_B[: self.num_rows]

    @property
    def nbytes(self) -> int:
        """Memory held."""
        return self._keys_BW.nbytes + self._weight_B.nbytes + self._slots_H.nbytes

    def add(self, rows_TW: NDArray[np.uint16], weight_T: NDArray[np.float64]) -> None:
        """Add weight to rows."""
        begin = 0
        while True:
            begin, self.num_rows = _insert(
                rows_TW, weight_T, begin, self._keys_BW, self._weight_B, self.num_rows,
                self._slots_H,
            )  # fmt: skip
            if begin == len(rows_TW):
                return
            if len(self._keys_BW) < self._rows_max:
                self._rebuild(self.rows, self.weights, 2 * len(self._keys_BW))
            else:
                self.prune(self._rows_max // 2)

    def prune(self, num_kept: int) -> None:
        """Keep a priority sample of `num_kept` rows."""
        self._salt += 1
        kept, weight_B = priority_sample(self.rows, self.weights, num_kept, self._salt)
        self._rebuild(self.rows[kept], weight_B, len(self._keys_BW))

    def shrink(self, rows_max: int) -> None:
        """Hold at most `rows_max` rows from now on."""
        self._rows_max = max(2, rows_max)
        if len(self._keys_BW) > self._rows_max:
            self._salt += 1
            kept, weight_B = priority_sample(self.rows, self.weights, self._rows_max, self._salt)
            self._rebuild(self.rows[kept], weight_B, self._rows_max)

    def clear(self) -> None:
        """Forget every row; memory stays."""
        self.num_rows = 0
        self._slots_H[:] = -1

    def _allocate(self, num_rows: int) -> None:
        self._keys_BW = np.empty((num_rows, self.width), np.uint16)
        self._weight_B = np.empty(num_rows)
        num_slots = 1 << (2 * num_rows - 1).bit_length()
        self._slots_H = np.full(num_slots, -1, np.int32)

    def _rebuild(
        self, rows_BW: NDArray[np.uint16], weight_B: NDArray[np.float64], num_rows: int
    ) -> None:
        rows_BW, weight_B = rows_BW.copy(), weight_B.copy()
        self._allocate(min(num_rows, self._rows_max))
        _, self.num_rows = _insert(
            rows_BW, weight_B, 0, self._keys_BW, self._weight_B, 0, self._slots_H
        )
        assert self.num_rows == len(rows_BW), f"{self.num_rows} rows of {len(rows_BW)}"
