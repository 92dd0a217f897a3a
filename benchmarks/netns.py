"""Hosts on one machine: network namespaces on a bridge, each behind a link of a given rate.

    with Hosts(count=4, mbit=100) as hosts:
        process = hosts.popen(0, ["program", "--listen", hosts.ip(0)])
        sent = hosts.counters(1).sent_bytes

A host is a namespace with one veth link to a bridge; both directions are shaped by a token bucket
(`tc tbf`). Host 0 is meant for control and is not shaped. Needs root and iproute2. The namespaces
carry the process number of their maker: those of a maker that is dead (killed before it could
clean up) are removed by whoever comes next.
"""

import ipaddress
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Final

PREFIX: Final = "rmh"  # of namespaces, rmh<pid>-<host>; interfaces have 15 characters at most
NETWORK: Final = ipaddress.ip_network("10.231.0.0/24")
BURST_BYTES: Final = 32 << 10  # of the bucket: a few frames of segmentation offload
LATENCY: Final = "200ms"  # what a queue may hold before it drops
TERMINATE_S: Final = 10.0
ENDING: Final = (signal.SIGTERM, signal.SIGHUP)


def usable() -> str | None:
    """Why hosts cannot be made here; None when they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip", path=_path()) is None or shutil.which("tc", path=_path()) is None:
        return "network namespaces need iproute2 (ip, tc)"
    probe = f"{PREFIX}{os.getpid()}-x"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        return f"ip netns add: {made.stderr.strip()}"
    _run("ip", "netns", "del", probe)
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkCount:
    """What the kernel counted on one host's link; bytes include Ethernet headers (14 a frame)."""

    sent_bytes: int
    sent_packets: int
    received_bytes: int
    received_packets: int

    def since(self, before: "LinkCount") -> "LinkCount":
        """What came after `before`."""
        return LinkCount(
            **{name: getattr(self, name) - getattr(before, name) for name in self.__slots__}
        )


class Hosts:
    """`count` shaped hosts (1 .. count) and one that is not (0), while the context lasts.

    Args:
        count: shaped hosts.
        mbit: rate of each one's link, each way; None leaves them as fast as they are.
    """

    def __init__(self, *, count: int, mbit: float | None) -> None:
        self.count = count
        self.mbit = mbit
        self._tag = f"{PREFIX}{os.getpid()}"
        self._bridge = f"{self._tag}b"
        self._processes: list[subprocess.Popen[Any]] = []
        self._handlers: dict[signal.Signals, Any] = {}

    def ip(self, host: int) -> str:
        """Address of a host."""
        return str(NETWORK[host + 1])

    def __enter__(self) -> "Hosts":
        sweep()
        for name in ENDING:  # an ordinary exit, so that what was made is unmade
            self._handlers[name] = signal.signal(name, _leave)
        try:
            _run("ip", "link", "add", self._bridge, "type", "bridge")
            _run("ip", "link", "set", self._bridge, "up")
            for host in range(self.count + 1):
                self._add(host)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends every process that runs in a host and removes the hosts."""
        self.end_processes()
        _remove(self._tag)
        for name, handler in self._handlers.items():
            signal.signal(name, handler)
        self._handlers.clear()

    def end_processes(self) -> None:
        """Ends what `popen` started: asked to, then killed."""
        for process in self._processes:
            if process.poll() is None:
                process.terminate()
        for process in self._processes:
            try:
                process.wait(TERMINATE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()

    def shape(self, mbit: float | None) -> None:
        """Gives every shaped host's link another rate, each way."""
        for host in range(1, self.count + 1):
            for where, device in (((), self._outer(host)), (self._inside(host), "eth0")):
                kind = "del" if mbit is None else "replace"
                bucket = () if mbit is None else _bucket(mbit)
                if mbit is None and self.mbit is None:
                    continue
                _run(*where, "tc", "qdisc", kind, "dev", device, "root", *bucket)
        self.mbit = mbit

    def command(self, host: int, command: Sequence[str]) -> list[str]:
        """The command line that runs `command` in a host."""
        return [*self._inside(host), *command]

    def popen(
        self,
        host: int,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        **options: Any,
    ) -> "subprocess.Popen[Any]":
        """Starts a program in a host; it is ended with the hosts."""
        environment = dict(os.environ) | dict(env or {})
        process = subprocess.Popen(self.command(host, command), env=environment, **options)
        self._processes.append(process)
        return process

    def counters(self, host: int) -> LinkCount:
        """What has crossed a host's link so far, as the kernel counts it."""
        folder = Path("/sys/class/net") / self._outer(host) / "statistics"

        def read(name: str) -> int:
            return int((folder / name).read_text())

        return LinkCount(  # what the bridge's end receives, the host has sent
            sent_bytes=read("rx_bytes"),
            sent_packets=read("rx_packets"),
            received_bytes=read("tx_bytes"),
            received_packets=read("tx_packets"),
        )

    def _name(self, host: int) -> str:
        return f"{self._tag}-{host}"

    def _outer(self, host: int) -> str:
        return f"{self._tag}v{host}"

    def _inside(self, host: int) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self._name(host))

    def _add(self, host: int) -> None:
        name, outer, inside = self._name(host), self._outer(host), self._inside(host)
        _run("ip", "netns", "add", name)
        inner = ("peer", "name", "eth0", "netns", name)
        _run("ip", "link", "add", outer, "type", "veth", *inner)
        for where, device in (((), outer), (inside, "all")):  # no neighbour discovery in the counts
            setting = f"/proc/sys/net/ipv6/conf/{device}/disable_ipv6"
            _run(*where, "sh", "-c", f"test ! -e {setting} || echo 1 > {setting}")
        _run(*inside, "ip", "link", "set", "lo", "up")
        address = f"{self.ip(host)}/{NETWORK.prefixlen}"
        _run(*inside, "ip", "addr", "add", address, "dev", "eth0")
        _run(*inside, "ip", "link", "set", "eth0", "up")
        _run("ip", "link", "set", outer, "master", self._bridge, "up")
        if host > 0 and self.mbit is not None:
            _run("tc", "qdisc", "replace", "dev", outer, "root", *_bucket(self.mbit))
            _run(*inside, "tc", "qdisc", "replace", "dev", "eth0", "root", *_bucket(self.mbit))


def sweep() -> None:
    """Removes what makers that are dead have left."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    tags = {line.split("-")[0] for line in listed.stdout.split("\n") if line.startswith(PREFIX)}
    for device in Path("/sys/class/net").iterdir():
        if device.name.startswith(PREFIX) and device.name.endswith("b"):
            tags.add(device.name.removesuffix("b"))
    for tag in tags:
        pid = tag.removeprefix(PREFIX)
        if pid.isdigit() and not Path("/proc", pid).exists():
            _remove(tag)


def _remove(tag: str) -> None:
    """Every namespace and interface of one maker, and whatever still runs in them."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    for line in listed.stdout.splitlines():
        name = line.split()[0] if line else ""
        if not name.startswith(f"{tag}-"):
            continue
        pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
        for pid in pids.stdout.split():
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:  # it has just ended
                continue
        _run("ip", "netns", "del", name)
    for device in Path("/sys/class/net").iterdir():
        rest = device.name.removeprefix(tag)
        if rest != device.name and (rest == "b" or rest[:1] == "v"):
            # a veth whose namespace is gone may vanish by itself meanwhile
            subprocess.run(["ip", "link", "del", device.name], capture_output=True)


def _bucket(mbit: float) -> tuple[str, ...]:
    return ("tbf", "rate", f"{mbit:g}mbit", "burst", str(BURST_BYTES), "latency", LATENCY)


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def _run(*command: str) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PATH": _path()}
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
