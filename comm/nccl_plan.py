"""Who talks to whom, in which order, and how much: the pure part of the NCCL transport.

A communicator *generation* joins all dense ranks (*sources*) and expert shards of one view, one GPU
each. Its members run every step in lock-step: for each MoE layer each source sends to each shard
and gets back from each, also when it has nothing to send. So every rank knows what the others
enqueue, and one communicator with one stream a rank suffices: no order between two communicators,
which NCCL leaves to the user, ever arises.

Two ways to move a layer's rows:

*decode*: fixed sizes, no number ever read by a host. A source sends its `C` rows (*capacity*, the
step's bucket) to every shard, with its `[C, K]` experts, their weights, and the shard that it chose
for each pair; a shard computes the pairs that name it and masks the rest. **A capacity cannot
overflow**: a token's row goes to a shard at most once, however many of its experts live there, so
what one shard gets of a source is at most the source's tokens, and `C` is at least that. Since the
worst case (all tokens to one shard) is the capacity, nothing is gained by packing rows together: a
row lies in its token's place, the sources' messages to all shards are one and the same bytes, and
packing is a copy. The price is bytes: `waste` times what `exact` sends.

*exact*: a small exchange of counts (the shard's host reads them: a synchronisation each layer),
then exactly the rows and pairs that go there. For prefill, and for steps over the capacity.

Shape suffixes: C capacity, K top-k, D model width, E experts, N sources, S shards, R replicas.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from remora.comm.errors import UserError
from remora.comm.view import View
from remora.comm.wire import PAIR_BYTES

HEADER_WORDS: Final = 16  # int32 words before the columns of a decode message: one 64-byte line
COUNT_WORDS: Final = 4  # rows, pairs, layer, tag
MEMBERS_MAX: Final = 4096  # of a generation

Mode = Literal["warm", "split", "decode", "exact"]
Part = Literal["rows", "meta", "counts", "back", "ping", "pong"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Roster:
    """The members of one generation, in rank order: sources by uid, then shards by uid.

    Every member computes it from the same view, so the order needs no agreement of its own.
    """

    generation: int  # grows with each roster that is built; never used twice
    epoch: int  # of the view it was made from
    uids: tuple[str, ...]
    incarnations: tuple[int, ...]
    num_sources: int

    @staticmethod
    def of(view: View, generation: int) -> "Roster":
        """Roster of a view.

        Raises:
            UserError: no source, no shard, or more members than MEMBERS_MAX.
        """
        members = sorted(view.members, key=lambda member: (member.role != "dense", member.uid))
        num_sources = sum(member.role == "dense" for member in members)
        if not 0 < num_sources < len(members) <= MEMBERS_MAX:
            raise UserError(
                f"view {view.epoch} has {num_sources} dense ranks and {len(members) - num_sources} "
                f"shards; a communicator needs one of each and has at most {MEMBERS_MAX} members"
            )
        return Roster(
            generation=generation,
            epoch=view.epoch,
            uids=tuple(member.uid for member in members),
            incarnations=tuple(member.incarnation for member in members),
            num_sources=num_sources,
        )

    @property
    def num_shards(self) -> int:
        """S."""
        return len(self.uids) - self.num_sources

    @property
    def shard_uids(self) -> tuple[str, ...]:
        """Shards in rank order."""
        return self.uids[self.num_sources :]

    @property
    def tag(self) -> int:
        """The generation as messages between ranks carry it, an int32: its low 31 bits. They are
        there to tell this generation from those before it, not from one 32,768 views ago."""
        return self.generation & 0x7FFF_FFFF

    def rank_of(self, uid: str) -> int:
        """Rank of a member. Raises KeyError with the roster for a stranger."""
        if uid not in self.uids:
            raise KeyError(f"{uid} is not in generation {self.generation}: {self.uids}")
        return self.uids.index(uid)

    def has(self, uid: str, incarnation: int) -> bool:
        """Whether that life of `uid` is a member."""
        return (uid, incarnation) in zip(self.uids, self.incarnations, strict=True)

    def is_source(self, rank: int) -> bool:
        """Whether `rank` is a dense rank."""
        return rank < self.num_sources

    def partners(self, rank: int) -> range:
        """Ranks that `rank` exchanges with: all shards of a source, all sources of a shard."""
        if self.is_source(rank):
            return range(self.num_sources, len(self.uids))
        return range(self.num_sources)


@dataclass(frozen=True, slots=True)
class Op:
    """One send or receive of a group; `peer` is a rank."""

    is_send: bool
    part: Part
    peer: int


def phase(roster: Roster, rank: int, parts: Sequence[Part], *, to_shards: bool) -> Iterator[Op]:
    """What `rank` enqueues in one group so that `parts` go from sources to shards, or back.

    Between two ranks operations match in order: both ends name the parts in the order given.
    """
    is_send = roster.is_source(rank) is to_shards
    for peer in roster.partners(rank):
        for part in parts:
            yield Op(is_send, part, peer)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeShape:
    """Sizes of a decode exchange; equal on all members of a generation.

    A message's `meta` is int32 words: header, experts [C, K], chosen shards [C, K], weights [C, K]
    (float32 bits). Header: tag of the generation, layer.
    """

    num_sources: int
    num_shards: int
    num_experts: int
    capacity: int  # C: tokens of a source in one step, padding included
    top_k: int
    width: int
    presummed: bool

    def __post_init__(self) -> None:
        for name in ("num_sources", "num_shards", "num_experts", "capacity", "top_k", "width"):
            assert getattr(self, name) > 0, f"{name} = {getattr(self, name)}"

    @property
    def num_pairs(self) -> int:
        """C K."""
        return self.capacity * self.top_k

    @property
    def meta_words(self) -> int:
        """int32 words of `meta`."""
        return HEADER_WORDS + 3 * self.num_pairs

    @property
    def back_rows(self) -> int:
        """Rows that a shard returns to a source."""
        return self.capacity if self.presummed else self.num_pairs

    def sent_bytes(self, item_bytes: int) -> int:
        """Bytes that one source sends and gets back in one layer."""
        rows = self.capacity + self.back_rows
        return self.num_shards * (rows * self.width * item_bytes + 4 * self.meta_words)

    def waste(self, item_bytes: int) -> float:
        """Bytes of a full decode exchange over those of an exact one, routing spread evenly.

        A token then uses S (1 - (1 - 1/S)^K) shards in expectation.
        """
        used = self.num_shards * (1 - (1 - 1 / self.num_shards) ** self.top_k)
        row_bytes = self.width * item_bytes
        back = used if self.presummed else self.top_k
        per_token = (used + back) * row_bytes + PAIR_BYTES * self.top_k
        exact = self.capacity * per_token + self.num_shards * COUNT_WORDS * 4
        return self.sent_bytes(item_bytes) / exact


def capacity_for(num_tokens: int, capacity_max: int) -> int | None:
    """The bucket of a step whose busiest source has `num_tokens`: a power of two, or the maximum.

    None when no bucket holds them: such a step runs `exact`. Buckets are few, so that there is one
    set of buffers and one CUDA graph for each.
    """
    assert num_tokens >= 0 and capacity_max > 0, f"{num_tokens} tokens of at most {capacity_max}"
    if num_tokens > capacity_max:
        return None
    return min(1 << max(0, num_tokens - 1).bit_length(), capacity_max)


def home_shards(
    replicas_ER: NDArray[np.int16], local_S: Sequence[bool], source: int
) -> NDArray[np.int64]:
    """The shard that source number `source` asks for each expert in decode: `[E + 1]`.

    A device cannot run `choice.choose` without a host in between, so the replica is fixed for the
    life of a view: one on our own host if there is one, else spread over the replicas by source and
    expert, so that sources and experts share them out. Entry E is S: no expert, no shard.

    Raises:
        AssertionError: an expert without a replica.
    """
    num_experts, num_shards = replicas_ER.shape[0], len(local_S)
    home_E = np.full(num_experts + 1, num_shards, np.int64)
    for expert in range(num_experts):
        held = [int(s) for s in replicas_ER[expert] if s >= 0]
        assert held, f"expert {expert} has no replica among {num_shards} shards"
        near = [s for s in held if local_S[s]] or held
        home_E[expert] = near[(source + expert) % len(near)]
    return home_E
