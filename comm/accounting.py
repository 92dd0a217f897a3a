"""Bytes, rows and pairs per peer and direction, counted where frames are sent and taken.

The counts equal `expected_call_bytes` exactly; a test holds them together. Header and body count,
in shared memory as on a wire (`arena_bytes` says how much of it was shared memory); the handshake,
which happens once a connection, does not. What the ranks of a tensor-parallel group exchange among
themselves is counted by operation (`collective_bytes`).
"""

import ctypes
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from remora.comm.messages import PeerTraffic, Traffic
from remora.comm.wire import HEADER_BYTES, combined_rows, dispatch_bytes

COUNTER_NAMES: Final = (
    "sent_frames", "sent_bytes", "sent_rows", "sent_pairs", "received_frames", "received_bytes",
    "received_rows", "arena_bytes", "late_replies", "stale_replies", "not_mine", "deadlines",
    "losses",
)  # fmt: skip
HALF_LIFE_PAIRS: Final = 1 << 18  # 8,000 tokens of eight layers and four experts


class LinkCounters(ctypes.Structure):
    """Running totals of one peer; all non-negative and never falling. The native data plane adds
    to them where they lie (`comm/csrc/frame.h`)."""

    sent_frames: int
    sent_bytes: int
    sent_rows: int
    sent_pairs: int
    received_frames: int
    received_bytes: int
    received_rows: int
    arena_bytes: int  # of sent and received bytes: those that lay in shared memory
    late_replies: int  # answers to calls given up; dropped
    stale_replies: int  # duplicates, answers to no call or of another incarnation; dropped
    not_mine: int
    deadlines: int
    losses: int  # connections lost
    _fields_ = [(name, ctypes.c_int64) for name in COUNTER_NAMES]


@dataclass(slots=True)
class TrafficCounters:
    """One `LinkCounters` per peer uid; it outlives the connections."""

    links: dict[str, LinkCounters] = field(default_factory=dict)

    def link(self, uid: str) -> LinkCounters:
        """The counters of one peer, made at first use."""
        return self.links.setdefault(uid, LinkCounters())

    def num_bytes(self) -> dict[str, int]:
        """Bytes out and back by peer uid."""
        return {uid: of.sent_bytes + of.received_bytes for uid, of in self.links.items()}

    def total(self) -> LinkCounters:
        """Sum over all peers."""
        total = LinkCounters()
        for link in self.links.values():
            for name in COUNTER_NAMES:
                setattr(total, name, getattr(total, name) + getattr(link, name))
        return total


COLLECTIVES: Final = ("sum", "gather_rows", "gather_columns", "sum_slice", "gather_slices")
CollectiveBytes = dict[str, dict[str, int]]


def collective_bytes(counts: Sequence[int]) -> CollectiveBytes:
    """What one rank exchanged with its tensor-parallel group so far, by operation and direction.

    Args:
        counts: calls, bytes sent and bytes received of each of `COLLECTIVES`. A byte that several
            ranks read is sent to each of them, as it would be on links; headers are not counted.
    """
    triples = zip(COLLECTIVES, counts[0::3], counts[1::3], counts[2::3], strict=True)
    return {
        name: {"calls": calls, "sent_bytes": sent, "received_bytes": received}
        for name, calls, sent, received in triples
        if calls
    }


class TrafficMeter:
    """Turns running totals into what is true lately. Pure: time is counted in pairs.

    Args:
        top_k: experts of a token.
        half_life_pairs: (token, expert) pairs after which what was seen counts half.
    """

    def __init__(self, top_k: int, half_life_pairs: float = HALF_LIFE_PAIRS) -> None:
        self._top_k = top_k
        self._half_life_pairs = half_life_pairs
        self._before: dict[str, tuple[int, int]] = {}  # rows and pairs sent, by uid
        self._rows: dict[str, float] = {}  # the same, decayed
        self._pairs: dict[str, float] = {}

    def read(self, links: Mapping[str, LinkCounters], local: Collection[str]) -> Traffic:
        """The traffic of a dense rank.

        Args:
            links: counters of the shards of its view, by uid.
            local: those of its own host.
        """
        new: dict[str, tuple[int, int]] = {}
        for uid, link in links.items():
            rows, pairs = self._before.get(uid, (0, 0))
            new[uid] = (link.sent_rows - rows, link.sent_pairs - pairs)
            self._before[uid] = (link.sent_rows, link.sent_pairs)
        fade = 0.5 ** (sum(pairs for _, pairs in new.values()) / self._half_life_pairs)
        for uid, (rows, pairs) in new.items():
            self._rows[uid] = fade * self._rows.get(uid, 0.0) + rows
            self._pairs[uid] = fade * self._pairs.get(uid, 0.0) + pairs
        total = sum(self._pairs[uid] for uid in links)
        mean = total / len(links) if links else 0.0
        remote_rows = sum(self._rows[uid] for uid in links if uid not in local)
        local_pairs = sum(self._pairs[uid] for uid in links if uid in local)
        return Traffic(
            peers=[
                PeerTraffic(
                    uid=uid,
                    level="host" if uid in local else "remote",
                    sent_bytes=link.sent_bytes,
                    received_bytes=link.received_bytes,
                    load_ratio=self._pairs[uid] / mean if mean else 0.0,
                )
                for uid, link in links.items()
            ],
            remote_copies_per_token=remote_rows * self._top_k / total if total else 0.0,
            local_activation_ratio=local_pairs / total if total else 0.0,
        )


def expected_call_bytes(
    *, num_rows: int, num_pairs: int, row_bytes: int, presummed: bool, reply_row_bytes: int = 0
) -> tuple[int, int]:
    """Bytes (out, back) of one DISPATCH call and its answer, headers included.

    Args:
        num_rows: rows sent, each once whatever the number of its pairs.
        num_pairs: (row, expert) pairs.
        row_bytes: bytes of one row sent.
        presummed: one row back per row sent; else one per pair.
        reply_row_bytes: bytes of one row of the answer; 0 = as `row_bytes`.
    """
    back = combined_rows(num_rows, num_pairs, presummed=presummed) * (reply_row_bytes or row_bytes)
    return HEADER_BYTES + dispatch_bytes(num_rows, num_pairs, row_bytes), HEADER_BYTES + back
