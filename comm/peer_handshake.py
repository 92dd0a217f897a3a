"""A requester's end of the handshake: proofs, and the arena's descriptor on one host."""

import os
import socket

from remora.comm.arena import Memory, align64
from remora.comm.auth import ATTACH, CHALLENGE_BYTES, VERDICT_BYTES, ClientHandshake, Grants
from remora.comm.errors import PeerLostError
from remora.comm.transport import receive_exactly


def shake_hands(
    sock: socket.socket, token: bytes, *, name: str, num_regions: int, region_bytes: int
) -> tuple[Grants, Memory]:
    """Authenticates a dialled, still blocking socket and passes the arena.

    Args:
        sock: connected.
        token: the cluster's.
        name: what the peer calls us in its logs.
        num_regions, region_bytes: asked for; less may be granted.

    Returns:
        What was granted, and the memory of its regions: the arena on one host, else private.

    Raises:
        AuthError, PeerLostError.
    """
    is_unix = sock.family == socket.AF_UNIX
    handshake = ClientHandshake(
        token, name=name, arena=is_unix, num_regions=num_regions, region_bytes=align64(region_bytes)
    )
    try:
        sock.sendall(handshake.hello)
        sock.sendall(handshake.on_challenge(receive_exactly(sock, CHALLENGE_BYTES)))
        grants = handshake.on_verdict(receive_exactly(sock, VERDICT_BYTES))
        total = grants.num_regions * grants.region_bytes
        if not grants.arena:
            return grants, Memory.anonymous(total)
        memory, descriptor = Memory.create_shared(total)
        try:
            socket.send_fds(sock, [ATTACH], [descriptor])
        finally:
            os.close(descriptor)
        return grants, memory
    except OSError as error:
        raise PeerLostError(f"handshake failed: {error}") from error
