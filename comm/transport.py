"""Addresses and sockets under the framed transports: where to listen, how to dial, what to set.

*Same host* is decided by `Endpoint.host`, a label that Ray gives the node, and by nothing else.
Unix sockets are **abstract** (`@name` in an endpoint, a leading NUL in the kernel): they vanish
with their last descriptor, so SIGKILL leaves no file behind, and they live in the network
namespace, which is where two hosts that share a filesystem differ. They have no file permissions;
the token handshake guards them as it guards TCP, and the name has 128 random bits.
"""

import secrets
import socket
from typing import Final

from remora.comm.errors import PeerLostError
from remora.comm.view import Endpoint

ABSTRACT_PREFIX: Final = "@"
BACKLOG: Final = 128
SOCKET_BUFFER_BYTES: Final = 1 << 20
TCP_USER_TIMEOUT_MS: Final = 20_000  # unacknowledged bytes for this long: the peer's host is gone


def listen_tcp(host_ip: str) -> socket.socket:
    """A listening TCP socket on `host_ip`, the port chosen by the system. Raises OSError."""
    family = socket.AF_INET6 if ":" in host_ip else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.bind((host_ip, 0))
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def listen_unix() -> tuple[socket.socket, str]:
    """A listening abstract Unix socket and its name as endpoints write it (`@remora-...`)."""
    name = f"remora-{secrets.token_hex(16)}"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind("\0" + name)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener, ABSTRACT_PREFIX + name


def format_tcp(listener: socket.socket) -> str:
    """`ip:port` (`[ip]:port` for IPv6) of a listening socket."""
    ip, port = listener.getsockname()[:2]
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"


def socket_address(endpoint: Endpoint, self_host: str) -> tuple[int, str | tuple[str, int]]:
    """Address family and address to dial `endpoint` from a process on `self_host`.

    Raises:
        ValueError: the endpoint's TCP address is not `ip:port`.
    """
    if endpoint.host == self_host and endpoint.unix_path is not None:
        path = endpoint.unix_path
        if path.startswith(ABSTRACT_PREFIX):
            path = "\0" + path[len(ABSTRACT_PREFIX) :]
        return socket.AF_UNIX, path
    ip, colon, port = endpoint.tcp_address.rpartition(":")
    if not colon or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"tcp address is {endpoint.tcp_address!r}, must be 'ip:port'")
    ip = ip.strip("[]")
    return (socket.AF_INET6 if ":" in ip else socket.AF_INET), (ip, int(port))


def tune(sock: socket.socket) -> None:
    """Buffers, no Nagle delay, and detection of a peer whose host is gone.

    TCP's buffers are left to the kernel: setting them switches its tuning off and bounds the
    window at `rmem_max`, which matters on long links. On loopback it made no difference (four
    alternating runs, 2 x 1 MiB each way: 1.5-2.5 ms either way).
    """
    if sock.family == socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
    else:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, TCP_USER_TIMEOUT_MS)


def dial(endpoint: Endpoint, self_host: str, *, timeout_s: float) -> socket.socket:
    """A connected, tuned socket with `timeout_s` set on it.

    Raises:
        PeerLostError: refused, unreachable or not connected within `timeout_s`.
    """
    family, address = socket_address(endpoint, self_host)
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout_s)
        sock.connect(address)
        tune(sock)
    except OSError as error:
        sock.close()
        raise PeerLostError(f"cannot connect to {address!r} on {endpoint.host}: {error}") from error
    return sock


def receive_exactly(sock: socket.socket, num_bytes: int) -> bytes:
    """Reads `num_bytes` from a blocking socket. Raises PeerLostError at its end, OSError."""
    data = bytearray()
    while len(data) < num_bytes:
        chunk = sock.recv(num_bytes - len(data))
        if not chunk:
            raise PeerLostError(f"connection closed after {len(data)} of {num_bytes} bytes")
        data += chunk
    return bytes(data)
