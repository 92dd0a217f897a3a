"""What a server listens on: a TCP port that the system chose, and an abstract Unix socket."""

import ipaddress
import logging
import select
import socket
import time
from typing import Final

from remora.comm.transport import format_tcp, listen_tcp, listen_unix
from remora.comm.view import Endpoint

log = logging.getLogger(__name__)

PAUSE_S: Final = 1.0  # after the process ran out of descriptors


class Listeners:
    """Listening sockets of one server, readable in its poll set while somebody dials.

    Args:
        host_ip: address to bind.
        unix: an abstract Unix socket too, for peers of the same host.
        advertise_ip: address in `endpoint` when it is not `host_ip`.
        epoll: the server's.

    Attributes:
        again_at: accepting pauses until then (monotonic); None: it does not.

    Raises:
        ValueError: a wildcard address without `advertise_ip`.
        OSError: the address cannot be bound.
    """

    def __init__(
        self, host_ip: str, *, unix: bool, advertise_ip: str | None, epoll: select.epoll
    ) -> None:
        if advertise_ip is None and ipaddress.ip_address(host_ip).is_unspecified:
            raise ValueError(f"bound to every address ({host_ip}): advertise_ip must say which")
        self._epoll = epoll
        tcp = listen_tcp(host_ip)
        self._address = format_tcp(tcp)
        if (ip := advertise_ip) is not None:
            port = self._address.rpartition(":")[2]
            self._address = f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"
        self._socks = {tcp.fileno(): tcp}
        self._unix_path: str | None = None
        if unix:
            sock, self._unix_path = listen_unix()
            self._socks[sock.fileno()] = sock
        self.again_at: float | None = None
        for fd in self._socks:
            epoll.register(fd, select.EPOLLIN)

    def __contains__(self, fd: int) -> bool:
        return fd in self._socks

    def endpoint(self, host_label: str) -> Endpoint:
        """What to publish."""
        return Endpoint(host=host_label, tcp_address=self._address, unix_path=self._unix_path)

    def accept(self, fd: int) -> socket.socket | None:
        """Who dials at this one; None: nobody any more, or accepting pauses from now on."""
        try:
            return self._socks[fd].accept()[0]
        except (BlockingIOError, ConnectionAbortedError):
            return None
        except OSError as error:  # out of descriptors: the listener stays readable, so look away
            log.warning("cannot accept: %s", error)
            for each in self._socks:
                self._epoll.modify(each, 0)
            self.again_at = time.monotonic() + PAUSE_S
            return None

    def resume(self) -> None:
        """Ends a pause."""
        if self.again_at is None:
            return
        self.again_at = None
        for fd in self._socks:
            self._epoll.modify(fd, select.EPOLLIN)

    def close(self) -> None:
        """Closes the sockets."""
        for sock in self._socks.values():
            sock.close()
