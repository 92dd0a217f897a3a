"""The autoscaler's decisions on the disk: JSON lines, bounded, rotated, each file replays alone.

`autoscale.jsonl` (`ingress.jsonl` of ingress replicas) is being written, `autoscale.jsonl.1` is the
one before it, and so on. Each begins with the policy and the state at that moment
(`decision_lines.py`), so that `remora autoscale replay` takes any of them.
"""

import json
import logging
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final, TextIO

from remora.autoscale.autoscale_policy import AutoscalePolicy
from remora.autoscale.autoscale_sample import AutoscaleState, Sample
from remora.autoscale.autoscaler import Decision
from remora.autoscale.decision_lines import decision_line, recalled, start_line
from remora.comm.errors import ConfigError, RemoraError

logger = logging.getLogger(__name__)

FILE: Final = "autoscale.jsonl"
INGRESS_FILE: Final = "ingress.jsonl"
LOG_BYTES_MAX: Final = 8 << 20
OLDER_MAX: Final = 4  # files that are kept beside the one being written
THREAD: Final = "remora-decisions"  # that writes in the background
WAITING_MAX: Final = 256  # decisions that wait for a slow disk


class AutoscaleLog:
    """Appends lines to `<folder>/<file>`.

    A disk that takes nothing costs lines, with a warning, not decisions; the next file that can be
    begun replays again.
    """

    def __init__(
        self,
        folder: Path,
        policy: AutoscalePolicy,
        *,
        file: str = FILE,
        bytes_max: int = LOG_BYTES_MAX,
    ) -> None:
        self.path = folder / file
        self._policy = policy
        self._bytes_max = bytes_max
        self._file: TextIO | None = None
        self._num_bytes = 0
        self._closed = False

    def recalled(self) -> AutoscaleState:
        """What the policy remembers of the file that is there, which another life has written."""
        try:
            with self.path.open(encoding="utf-8") as lines:
                return recalled(lines, self._policy, source=str(self.path))
        except FileNotFoundError:
            return AutoscaleState()
        except (OSError, UnicodeDecodeError, ConfigError) as failed:
            logger.warning("%s: nothing is remembered of it: %s", self.path, failed)
            return AutoscaleState()

    def decided(self, before: AutoscaleState, sample: Sample, decision: Decision) -> None:
        """A decision, and the state that it was made in."""
        self._append(decision_line(sample, decision), before)

    def noted(self, kind: str, fields: dict[str, Any], state: AutoscaleState) -> None:
        """What else happened; a replay leaves it alone."""
        self._append(json.dumps({"kind": kind, **fields}, allow_nan=False), state)

    def skipped(self, decisions: int) -> None:
        """So many decisions are not told: what follows would not replay, and begins a file."""
        logger.warning("%s: too slow: %d decisions are not logged", self.path, decisions)
        self._end_file()

    def close(self) -> None:
        """No more lines."""
        self._closed = True
        self._end_file()

    def _end_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _append(self, line: str, state: AutoscaleState) -> None:
        if self._closed:
            return
        try:
            if self._file is None or self._num_bytes + len(line) > self._bytes_max:
                self._begin(state)
            self._write(line)
        except OSError as failed:
            logger.warning("%s: %s: a decision is not logged", self.path, failed.strerror)
            with suppress(OSError):  # what it still holds it cannot write either
                self._end_file()
            self._file = None  # what follows a lost line would not replay: begin anew

    def _begin(self, state: AutoscaleState) -> None:
        """A file that replays, in the place of the one being written; those before it move on only
        once it has its first line: a disk that is full for a while costs none of them."""
        self._end_file()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        begun = self.path.with_name(f"{self.path.name}.new")
        self._file, self._num_bytes = begun.open("w", encoding="utf-8"), 0
        self._write(start_line(self._policy, state))
        for number in range(OLDER_MAX, 0, -1):
            older = self.path if number == 1 else self._older(number - 1)
            if older.exists():
                older.replace(self._older(number))
        begun.replace(self.path)

    def _older(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}")

    def _write(self, line: str) -> None:
        assert self._file is not None
        self._file.write(line + "\n")
        self._file.flush()
        self._num_bytes += len(line) + 1


_Entry = tuple[int, AutoscaleState, Sample, Decision]  # first: decisions before it that were lost


class BackgroundLog:
    """An `AutoscaleLog` for who must not wait for a disk: a thread of its own makes and writes it,
    until the `BackgroundLog` is gone. Of a disk that is slow it keeps `WAITING_MAX` decisions back,
    and then loses some.

    Args:
        make: the log.
    """

    def __init__(self, make: Callable[[], AutoscaleLog]) -> None:
        self._entries: SimpleQueue[_Entry | None] = SimpleQueue()  # whose `put` never waits
        self._lost = 0
        weakref.finalize(self, self._entries.put, None)
        threading.Thread(
            target=_write_all, args=(make, self._entries), name=THREAD, daemon=True
        ).start()

    def decided(self, before: AutoscaleState, sample: Sample, decision: Decision) -> None:
        """A decision, and the state that it was made in; returns at once. Of one thread."""
        if self._entries.qsize() >= WAITING_MAX:
            self._lost += 1
            return
        self._entries.put((self._lost, before, sample, decision))
        self._lost = 0


def _write_all(make: Callable[[], AutoscaleLog], entries: "SimpleQueue[_Entry | None]") -> None:
    try:
        log = make()
    except RemoraError as failed:
        logger.warning("no decision is logged: %s", failed)
        return
    while (entry := entries.get()) is not None:
        lost, before, sample, decision = entry
        if lost:
            log.skipped(lost)
        log.decided(before, sample, decision)
    log.close()
