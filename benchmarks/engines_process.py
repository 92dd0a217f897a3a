"""Engines under measurement: each a worker in its own process and session, all resident at once.

While one engine is measured the others are held (SIGSTOP), so that no waiting thread of theirs
takes a core: neither those of an engine that spins, nor the dozen processes of a Ray cluster that
idles (7 to 14 % of two cores). A Ray cluster is stopped as a whole, its health checks with it.
Everything else that ran on the machine is counted: a figure taken beside other work says so.
"""

import json
import os
import signal
import subprocess
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")
STOP_WITHIN_S = 60.0


class EngineError(Exception):
    """A worker could not load, answered with an error, or died."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """How one engine is started.

    `options` is the worker's JSON argument (see `workers/`); `missing` says why it cannot run
    here, None when it can.
    """

    name: str
    python: str
    worker: Path
    options: Mapping[str, Any]
    env: Mapping[str, str]
    cpus: str  # of taskset
    missing: str | None = None


class Engine:
    """A started worker. `ask` is synchronous: one request, one answer.

    Raises (from every method that talks to it):
        EngineError: with what the worker said, and where its log is.
    """

    def __init__(self, spec: Spec, log: Path) -> None:
        self.spec = spec
        self._log_path = log
        self._held = False
        options = json.dumps(dict(spec.options))
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                [*("taskset", "-c", spec.cpus, spec.python), str(spec.worker), options],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env={**os.environ, **spec.env},
                start_new_session=True,
            )
        self.info: dict[str, Any] = self._answer()["ready"]

    def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        """Carry out one operation of the worker; one that was held is released."""
        self.release()
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise EngineError(f"{self.spec.name} died; its log: {self._log_path}") from None
        return self._answer()

    def hold(self) -> None:
        """Let it take no core until `release`."""
        if not self._held:
            _signal_all(self.pids(), signal.SIGSTOP)
            self._held = True

    def release(self) -> None:
        """Undo `hold`."""
        if self._held:
            _signal_all(self.pids(), signal.SIGCONT)
            self._held = False

    def shield(self, on: bool) -> None:
        """Make all its threads real-time (round robin, lowest priority), or ordinary again.

        A waiting thread of an ordinary process gets its core back up to a time slice late on a busy
        machine, so an engine of several processes suffers more from others than one that spins.
        Needs root; others are left 5 % of the cores meanwhile (sched_rt_runtime_us).
        """
        policy, priority = (os.SCHED_RR, 1) if on else (os.SCHED_OTHER, 0)
        for pid in self.pids():
            for thread in _listed(Path(f"/proc/{pid}/task")):
                with suppress(ProcessLookupError):
                    os.sched_setscheduler(int(thread), policy, os.sched_param(priority))

    def pids(self) -> list[int]:
        """The worker and all that descends from it."""
        return _tree(self._process.pid)

    def cpu_s(self) -> float:
        """CPU time that its living processes have used, seconds."""
        return cpu_s(self.pids())

    def pss_bytes(self) -> int:
        """Resident memory of its processes; pages they share are counted once."""
        return sum(_pss_bytes(pid) for pid in self.pids())

    def close(self) -> None:
        """Ends the worker; kills what is left of it after a while."""
        self.release()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            _signal_all(self.pids(), signal.SIGKILL)
            self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise EngineError(f"{self.spec.name} died; its log: {self._log_path}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineError(f"{self.spec.name}: {answer['error']} (log: {self._log_path})")
        return answer


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuShares:
    """Who used the cores during one measurement, as shares of all cores (0..1)."""

    measured: float
    idle_engines: float
    others: float  # not ours at all: other processes, kernel threads, stolen time


class CpuMeter:
    """Shares of the cores between its making and `stop`."""

    def __init__(self, measured: Engine, resident: Iterable[Engine]) -> None:
        self._measured = measured
        self._idle = [engine for engine in resident if engine is not measured]
        self._begin = self._read()

    def stop(self) -> CpuShares:
        """Shares since the start."""
        spent = [end - begin for begin, end in zip(self._begin, self._read(), strict=True)]
        busy, capacity, measured, idle, ours = spent
        capacity = max(capacity, TICK_S)
        return CpuShares(
            measured=measured / capacity,
            idle_engines=idle / capacity,
            others=max(0.0, busy - measured - idle - ours) / capacity,
        )

    def _read(self) -> tuple[float, float, float, float, float]:
        ticks = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        total = sum(ticks)
        waiting = ticks[3] + ticks[4]  # idle, iowait
        return (
            (total - waiting) * TICK_S,
            total * TICK_S,
            self._measured.cpu_s(),
            sum(engine.cpu_s() for engine in self._idle),
            cpu_s([os.getpid()]),
        )


def _signal_all(pids: Iterable[int], number: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _tree(root: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            fields = _stat(int(entry.name))
            if fields:
                children.setdefault(int(fields[1]), []).append(int(entry.name))
    found = [root]
    for pid in found:
        found.extend(children.get(pid, ()))
    return found


def _listed(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except (FileNotFoundError, ProcessLookupError):
        return []


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on; empty when the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def cpu_s(pids: Iterable[int]) -> float:
    """CPU time that the living ones of these processes have used, all threads, seconds."""
    stats = [_stat(pid) for pid in pids]
    return TICK_S * sum(int(fields[11]) + int(fields[12]) for fields in stats if fields)


def _pss_bytes(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 0
