"""`Call`: one request to one peer and the place of its answer."""

from typing import TYPE_CHECKING

from remora.comm.arena import Memory, align64
from remora.comm.errors import ClusterError
from remora.comm.wire import HEADER_BYTES, Header

if TYPE_CHECKING:
    from remora.comm.peer import Peer


class Call:
    """One request to one peer: built in place at `body`, sent once, answered at most once.

    Attributes:
        peer: whom it asks.
        memory, start: where its region lies; header first.
        body_bytes, reply_bytes: exact size of the body, largest size of the answer's.
        reply: header of the answer (COMBINED or NOT_MINE), or None.
        error: why there is no answer, or None.
    """

    __slots__ = (
        "abandoned", "body_bytes", "error", "memory", "peer", "region", "reply", "reply_bytes",
        "reply_start", "sequence", "shared", "start",
    )  # fmt: skip

    def __init__(
        self, peer: "Peer", memory: Memory, start: int, region: int | None, body: int, reply: int
    ) -> None:
        self.peer = peer
        self.memory = memory
        self.start = start
        self.region = region  # None: a private memory of its own, for a call beyond a region
        self.body_bytes = body
        self.reply_bytes = reply
        self.reply_start = start + align64(HEADER_BYTES + body)
        self.sequence = 0
        self.shared = False  # sent through the arena: the answer may come there too
        self.reply: Header | None = None
        self.error: ClusterError | None = None
        self.abandoned = False

    @property
    def body(self) -> memoryview:
        """Where the request's body is to be written."""
        start = self.start + HEADER_BYTES
        return self.memory.view[start : start + self.body_bytes]

    @property
    def body_address(self) -> int:
        """Address of `body` in this process."""
        return self.memory.address + self.start + HEADER_BYTES

    @property
    def reply_body(self) -> memoryview:
        """The answer's body, valid until `release`."""
        assert self.reply is not None, "no answer yet"
        return self.memory.view[self.reply_start : self.reply_start + self.reply.length]

    @property
    def reply_address(self) -> int:
        """Address of `reply_body` in this process."""
        return self.memory.address + self.reply_start

    def release(self) -> None:
        """Gives the region back. A call under way is given up: its late answer will be dropped."""
        if self.sequence in self.peer.in_flight:
            self.abandoned = True
        elif self.region is not None:
            self.peer.give_back(self.region)
            self.region = None
