"""`AsyncConnection`: the ingress's end of a control stream, for asyncio."""

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Final

from remora.comm.auth import CHALLENGE_BYTES, VERDICT_BYTES, ClientHandshake, Grants
from remora.comm.errors import FencedError, FrameError, PeerLostError
from remora.comm.transport import socket_address, tune
from remora.comm.view import Endpoint
from remora.comm.wire import (
    ERROR_TEXT_BYTES_MAX,
    HEADER_BYTES,
    ErrorCode,
    Kind,
    check_body,
    decode_header,
    encode_frame,
)

CONNECT_S: Final = 5.0
UNSENT_BYTES_MAX: Final = 64 << 20


class AsyncConnection:
    """An authenticated control stream; made by `connect_async`. Iterate it for payloads.

    Iteration ends with PeerLostError, FrameError or FencedError: a stream never just stops, so a
    lost engine cannot look like one with nothing to say. After `close` it ends quietly.

    Attributes:
        grants: what the server agreed to; `grants.incarnation` is its incarnation.
        duplicates: control frames dropped because their sequence had been seen.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        grants: Grants,
        *,
        checked: bool,
        incarnation: int,
    ) -> None:
        self._reader = reader
        self._writer = writer
        self.grants = grants
        self._checked = checked
        self._incarnation = incarnation
        self._sent = 0
        self._received = 0
        self._closed = False
        self.duplicates = 0

    def send(self, payload: bytes) -> None:
        """Queues one CONTROL frame; never blocks.

        Raises:
            PeerLostError: closed, or more than `UNSENT_BYTES_MAX` wait (then it is closed).
            FrameError: over the granted frame bound.
        """
        if self._closed or self._writer.is_closing():
            raise PeerLostError("the control stream is closed")
        if HEADER_BYTES + len(payload) > self.grants.frame_bytes_max:
            raise FrameError(
                f"message of {len(payload)} bytes, allowed are "
                f"{self.grants.frame_bytes_max - HEADER_BYTES}"
            )
        self._sent += 1
        self._writer.write(
            encode_frame(
                payload,
                checked=self._checked,
                kind=Kind.CONTROL,
                incarnation=self._incarnation,
                sequence=self._sent,
            )
        )
        waiting = self._writer.transport.get_write_buffer_size()
        if waiting > UNSENT_BYTES_MAX:
            self._writer.transport.abort()
            raise PeerLostError(f"slow peer: {waiting} bytes wait, allowed are {UNSENT_BYTES_MAX}")

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            payload = await self._receive()
            if payload is None:
                return
            yield payload

    async def _receive(self) -> bytes | None:
        """The next payload; None once we closed. Raises PeerLostError, FrameError, FencedError."""
        while True:
            try:
                data = await self._reader.readexactly(HEADER_BYTES)
                header = decode_header(
                    memoryview(data), frame_bytes_max=self.grants.frame_bytes_max
                )
                body = await self._reader.readexactly(header.inline_bytes)
            except (asyncio.IncompleteReadError, OSError) as error:
                if self._closed:
                    return None
                raise PeerLostError(f"the control stream ended: {error}") from error
            check_body(header, memoryview(body))
            if header.kind == Kind.CONTROL:
                if header.sequence <= self._received:
                    self.duplicates += 1
                    continue
                if header.sequence != self._received + 1:
                    raise FrameError(f"control frame {header.sequence} follows {self._received}")
                self._received = header.sequence
                return body
            if header.kind == Kind.ERROR:
                text = body[:ERROR_TEXT_BYTES_MAX].decode("utf-8", errors="replace")
                if header.num_rows == ErrorCode.FENCED:
                    raise FencedError(text)
                raise PeerLostError(text)
            raise FrameError(f"frame kind {header.kind} on a control stream")

    async def close(self) -> None:
        """Closes the stream. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except OSError:  # the peer was faster; closed is closed
            pass


async def connect_async(
    endpoint: Endpoint,
    token: bytes,
    self_host: str,
    *,
    name: str = "",
    incarnation: int = 0,
    timeout_s: float = CONNECT_S,
) -> AsyncConnection:
    """Dials and authenticates a control stream.

    Args:
        endpoint: of the dense rank.
        token: the cluster's token.
        self_host: host label of this process; equal labels use the Unix socket.
        name: what the peer calls us in its logs.
        incarnation: of the dense rank as the view has it; 0 takes whoever answers.
        timeout_s: for all of it.

    Raises:
        PeerLostError, AuthError, FencedError.
    """
    handshake = ClientHandshake(token, name=name)
    family, address = socket_address(endpoint, self_host)
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        tune(sock)
        async with asyncio.timeout(timeout_s):
            loop = asyncio.get_running_loop()
            await loop.sock_connect(sock, address)
            reader, writer = await asyncio.open_connection(sock=sock)
            try:
                writer.write(handshake.hello)
                challenge = await reader.readexactly(CHALLENGE_BYTES)
                writer.write(handshake.on_challenge(challenge))
                grants = handshake.on_verdict(await reader.readexactly(VERDICT_BYTES))
                if incarnation and grants.incarnation not in (0, incarnation):
                    raise FencedError(
                        f"incarnation {grants.incarnation} answers, the view says {incarnation}"
                    )
            except BaseException:
                writer.close()
                raise
    except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
        sock.close()
        raise PeerLostError(f"cannot connect to {address!r} on {endpoint.host}: {error}") from error
    except BaseException:
        sock.close()
        raise
    return AsyncConnection(
        reader,
        writer,
        grants,
        checked=family != socket.AF_UNIX,
        incarnation=incarnation or grants.incarnation,
    )
