"""The simulator's model: tokens that tell which experts computed them, from which bytes.

A token's row is a function of all tokens up to it; in each MoE layer it picks experts and adds what
they make of it, which depends on the bytes in the slot. What comes out is summed over the positions
(as attention would), and the sum names the next token: a wrong expert, a missing row, a damaged
slot or a page of another sequence gives another token.
"""

from collections.abc import Callable, Sequence
from typing import Final

MASK: Final = (1 << 61) - 1
VOCABULARY: Final = 997
NUM_EXPERTS: Final = 8
LAYERS: Final = (1, 3)
TOP_K: Final = 2
_A, _B, _C = 0x1E3779B97F4A7C15, 0x0B54A32D192ED03, 0x94D049BB133111E

Picked = tuple[int, int]  # two experts
Cell = tuple[int, int]  # of one position: what its row begins with, and the sum up to it
NOTHING: Final[Cell] = (0, 0)


def weights_of(layer: int, expert: int) -> int:
    """The bytes of an expert in the checkpoint."""
    return (layer * 1009 + expert + 1) * _C & MASK


def digest_of(weights: int) -> str:
    """Of an expert's bytes."""
    return f"{weights:016x}"


def first_row(before: Cell, token_id: int) -> int:
    """What the row of a token begins with."""
    return ((before[0] ^ (token_id + 1)) * _A + _B) & MASK


def picks(row: int) -> Picked:
    """The experts of a row."""
    first = row % NUM_EXPERTS
    return first, (first + 1 + (row >> 9) % (NUM_EXPERTS - 1)) % NUM_EXPERTS


def expert_output(weights: int, row: int) -> int:
    """What an expert with these bytes makes of a row."""
    return ((weights ^ row) * _A) & MASK


def next_row(row: int, outputs: Sequence[int]) -> int:
    """A row behind an MoE layer."""
    return (row * _B + sum(outputs)) & MASK


def next_cell(before: Cell, begun: int, row: int) -> Cell:
    """Of a position whose row has gone through every layer."""
    return begun, (before[1] * 3 + row) & MASK


def token_of(cell: Cell) -> int:
    """The token that follows a position."""
    return cell[1] * _C % MASK % VOCABULARY


def advanced(before: Cell, token_id: int, weights: Callable[[int, int], int] = weights_of) -> Cell:
    """The cell of a token behind `before`, all layers computed in one place."""
    row = begun = first_row(before, token_id)
    for layer in LAYERS:
        row = next_row(row, [expert_output(weights(layer, e), row) for e in picks(row)])
    return next_cell(before, begun, row)
