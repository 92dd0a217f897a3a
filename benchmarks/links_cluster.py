"""A Ray cluster over network namespaces: one raylet a host, the driver in the host for control.

with Hosts(count=4, mbit=1000) as hosts, RayHosts(hosts, resources) as cluster:
    hosts_of = cluster.ask("deploy", name="a", overrides={...})
"""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from netns import Hosts

from remora.cluster.instances import TOKEN_ENV

HERE = Path(__file__).resolve().parent
PORT = 6379
RAY = str(Path(sys.executable).with_name("ray"))


class RayHosts:
    """Raylets in every host of `hosts`, and a driver that takes orders (`links_worker.py`).

    Args:
        resources: Ray resources of each shaped host.
        log_dir: what Ray and the driver print.
    """

    def __init__(self, hosts: Hosts, resources: Mapping[str, float], log_dir: Path) -> None:
        self._hosts = hosts
        self._resources = dict(resources)
        self._log_dir = log_dir
        # Unix sockets lie in the session; their paths may have 107 bytes, so the name is short.
        self._session = tempfile.mkdtemp(prefix="rml-", dir="/tmp")
        self._driver: subprocess.Popen[str] | None = None
        # Ray asks for a token; one of this cluster's own, whatever else runs on the machine.
        self._token = {"RAY_AUTH_MODE": "token", TOKEN_ENV: secrets.token_hex(32)}
        self.node_of: list[str] = []  # Ray node of each shaped host, from host 1 on

    def __enter__(self) -> "RayHosts":
        try:
            self._start()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def ask(self, op: str, **arguments: Any) -> Any:
        """Has the driver carry out one operation.

        Raises:
            RuntimeError: with what it said, and where its log is.
        """
        driver = self._driver
        assert driver is not None and driver.stdin is not None and driver.stdout is not None
        driver.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
        driver.stdin.flush()
        return self._answer()

    def _start(self) -> None:
        """Hosts one after the other: on two cores, raylets that start together miss deadlines."""
        self._raylet(0, "--head", f"--port={PORT}", "--include-dashboard=false")
        log = (self._log_dir / "driver.log").open("w")
        address = f"{self._hosts.ip(0)}:{PORT}"
        worker = str(HERE / "workers" / "links_worker.py")
        self._driver = self._hosts.popen(
            0,
            [sys.executable, "-P", worker, json.dumps({"address": address})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={"PYTHONPATH": str(HERE / "workers"), **self._token},
        )
        self._answer()
        for host in range(1, self._hosts.count + 1):
            self._raylet(host, f"--address={address}")
            ip = self._hosts.ip(host)
            self.node_of.append(self.ask("await_node", ip=ip)["node"])

    def _raylet(self, host: int, *role: str) -> None:
        resources = self._resources if host else {}
        log = (self._log_dir / f"raylet-{host}.log").open("w")
        command = [
            *(RAY, "start", *role, "--block", "--num-cpus=8"),
            f"--node-ip-address={self._hosts.ip(host)}",
            f"--resources={json.dumps(resources)}",
            f"--object-store-memory={100 << 20}",
            *([f"--temp-dir={self._session}"] if host == 0 else []),
        ]
        self._hosts.popen(
            host,
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={"RAY_USAGE_STATS_ENABLED": "0", "OMP_WAIT_POLICY": "PASSIVE", **self._token},
        )

    def _answer(self) -> Any:
        assert self._driver is not None and self._driver.stdout is not None
        line = self._driver.stdout.readline()
        if not line:
            raise RuntimeError(f"the driver died; its log: {self._log_dir / 'driver.log'}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{answer['error']} (log: {self._log_dir / 'driver.log'})")
        return answer

    def _close(self) -> None:
        if self._driver is not None and self._driver.stdin is not None:
            self._driver.stdin.close()
            try:
                self._driver.wait(60)
            except subprocess.TimeoutExpired:
                self._driver.kill()
        self._hosts.end_processes()
        shutil.rmtree(self._session, ignore_errors=True)


def log_dir() -> Path:
    """Where logs of this run go."""
    folder = HERE / "out" / f"links-{os.getpid()}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
