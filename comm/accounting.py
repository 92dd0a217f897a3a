"""Bytes, rows and pairs per peer and direction, counted where frames are sent and taken.

The counts equal `expected_call_bytes` exactly; a test holds them together. Header and body count,
in shared memory as on a wire (`arena_bytes` says how much of it was shared memory); the handshake,
which happens once a connection, does not.
"""

from dataclasses import dataclass, field, fields

from remora.comm.wire import HEADER_BYTES, combined_rows, dispatch_bytes


@dataclass(slots=True)
class LinkCounters:
    """Running totals of one peer; all non-negative and never falling."""

    sent_frames: int = 0
    sent_bytes: int = 0
    sent_rows: int = 0
    sent_pairs: int = 0
    received_frames: int = 0
    received_bytes: int = 0
    received_rows: int = 0
    arena_bytes: int = 0  # of sent and received bytes: those that lay in shared memory
    late_replies: int = 0  # answers to calls given up; dropped
    stale_replies: int = 0  # duplicates, answers to no call or of another incarnation; dropped
    not_mine: int = 0
    deadlines: int = 0
    losses: int = 0  # connections lost


@dataclass(slots=True)
class TrafficCounters:
    """One `LinkCounters` per peer uid; it outlives the connections."""

    links: dict[str, LinkCounters] = field(default_factory=dict)

    def link(self, uid: str) -> LinkCounters:
        """The counters of one peer, made at first use."""
        return self.links.setdefault(uid, LinkCounters())

    def total(self) -> LinkCounters:
        """Sum over all peers."""
        total = LinkCounters()
        for link in self.links.values():
            for name in (f.name for f in fields(LinkCounters)):
                setattr(total, name, getattr(total, name) + getattr(link, name))
        return total


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
