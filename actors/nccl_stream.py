"""The conductor's stream as a member has it: one connection of the frame server it has anyway."""

from collections.abc import Callable

import msgspec

from remora.actors.nccl_conductor import CONDUCTOR_UID, PEER_NAME
from remora.comm.connection import Connection, Frame
from remora.comm.errors import FrameError, PeerLostError
from remora.comm.nccl_messages import (
    ToConductor,
    ToMember,
    decode_to_member,
    encode,
)
from remora.comm.wire import Kind


class ConductorStream:
    """Where messages of the conductor come from and answers go to; the newest conductor counts.

    Args:
        uid: of this member, for errors.
        take: gets every message, in the frame server's thread.
        lose: told, there too, that the conductor is gone, or has lost us.
    """

    def __init__(
        self, uid: str, take: Callable[[ToMember], None], lose: Callable[[str], None]
    ) -> None:
        self._uid = uid
        self._take = take
        self._lose = lose
        self._connection: Connection | None = None

    def takes(self, connection: Connection, frame: Frame) -> bool:
        """Whether the frame was the conductor's. Raises FrameError for one that it never sends."""
        if connection.peer_name != PEER_NAME:
            return False
        before = self._connection
        if before is not None and connection.id < before.id:
            return True  # it has been replaced since
        if frame.header.kind != Kind.CONTROL:
            raise FrameError(f"frame kind {frame.header.kind} from the conductor")
        try:
            message = decode_to_member(bytes(frame.body))
        except msgspec.DecodeError as error:
            raise FrameError(f"the conductor's message: {error}") from error
        self._connection = connection
        if before is not None and connection is not before:  # whose host may have vanished
            self._lose(f"another {CONDUCTOR_UID} conducts")
        self._take(message)
        return True

    def on_lost(self, connection: Connection) -> None:
        """A connection of the server has ended."""
        if connection is self._connection:
            self._connection = None
            self._lose(f"{CONDUCTOR_UID}, which conducts, is gone")

    def reply(self, message: ToConductor) -> None:
        """Sends to the conductor. From any thread. Raises PeerLostError without one."""
        connection = self._connection
        if connection is None or not connection.send_control(encode(message)):
            raise PeerLostError(f"{self._uid} has no conductor: dense rank 0 is gone, or starting")
