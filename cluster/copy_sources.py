"""From which replicas, or second copies, the shards that take experts copy them. Pure."""

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Final

from remora.cluster.operation import Held, Pair
from remora.cluster.placement_steps import pairs_of

REPLICAS_MAX: Final = 4  # that one copy may try


Copies = dict[str, dict[Pair, tuple[str, ...]]]  # taker -> pair, in order -> from whom, best first


def copy_sources(
    wanted: Mapping[str, Sequence[Pair]],
    held: Held,
    moe_layers: tuple[int, ...],
    copies: Mapping[str, Collection[Pair]] = MappingProxyType({}),
) -> Copies:
    """Who copies what from whom.

    Every source gives about as much as the others that could, and each shard takes from its
    sources one after the other, in an order in which no two shards begin with the same source, or
    go on to the same, as long as they are as fast as each other: edges of a bipartite graph,
    coloured greedily, largest first.

    Args:
        wanted: shard -> what it takes.
        held: of shards that live and serve; a taker may be among them.
        copies: second copies of living shards, which are asked where no replica is.

    Returns:
        Nothing of an expert without either but an empty tuple: it comes from the checkpoint.
    """
    holders: dict[Pair, list[str]] = {}
    for uid in sorted(held):
        for pair in pairs_of(held[uid], moe_layers):
            holders.setdefault(pair, []).append(uid)
    second: dict[Pair, list[str]] = {}
    for uid in sorted(copies):
        for pair in copies[uid]:
            second.setdefault(pair, []).append(uid)
    given = dict.fromkeys([*held, *copies], 0)
    edges: dict[tuple[str, str], list[Pair]] = {}  # (taker, source) -> pairs; "": the checkpoint
    chosen: dict[tuple[str, Pair], tuple[str, ...]] = {}
    for taker in sorted(wanted):
        for pair in wanted[taker]:
            able = [uid for uid in holders.get(pair, ()) if uid != taker]
            able = able or [uid for uid in second.get(pair, ()) if uid != taker]
            able.sort(key=lambda uid: (given[uid], uid))
            if able:
                given[able[0]] += 1
            chosen[taker, pair] = tuple(able[:REPLICAS_MAX])
            edges.setdefault((taker, able[0] if able else ""), []).append(pair)
    turn = _turns({edge: len(pairs) for edge, pairs in edges.items()})
    found: Copies = {}
    for taker, source in sorted(edges, key=lambda edge: (edge[0], turn[edge])):
        pairs = edges[taker, source]
        found.setdefault(taker, {}).update({pair: chosen[taker, pair] for pair in pairs})
    return found


def _turns(sizes: Mapping[tuple[str, str], int]) -> dict[tuple[str, str], int]:
    """A number for each (taker, source): equal ones share neither; the checkpoint has all turns."""
    turn: dict[tuple[str, str], int] = {}
    for edge in sorted(sizes, key=lambda e: (-sizes[e], e)):
        taker, source = edge
        taken = {
            number
            for (other_taker, other_source), number in turn.items()
            if other_taker == taker or (source and other_source == source)
        }
        turn[edge] = next(number for number in range(len(sizes)) if number not in taken)
    return turn
