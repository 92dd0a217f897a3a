"""What the online loop decided, as JSON lines in a file of bounded size; the last but one is kept.

Every line has `time` (ISO 8601, UTC) and `kind`:

- `decision`: a plan and what became of it (`verdict`, `reason`, predicted costs, moves in numbers);
- `failed`: the last move, begun by hand, came to nothing: what was known before it holds;
- `achieved`: what a placement that was moved to is measured to have saved.
"""

import json
import logging
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

logger = logging.getLogger(__name__)

LOG_BYTES_MAX: Final = 1 << 20
FILE: Final = "decisions.jsonl"


class DecisionLog:
    """Appends to `<folder>/decisions.jsonl`; over the bound that becomes `decisions.jsonl.1`.

    A disk that takes nothing costs the log, with a warning, not the decision.
    """

    def __init__(self, folder: Path, *, bytes_max: int = LOG_BYTES_MAX) -> None:
        self.path = folder / FILE
        self._older = folder / f"{FILE}.1"
        self._bytes_max = bytes_max

    def append(self, kind: str, fields: dict[str, Any], unix_s: float) -> None:
        """Add a line."""
        time = datetime.fromtimestamp(unix_s, UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": time, "kind": kind, **fields}) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists() and self.path.stat().st_size + len(line) > self._bytes_max:
                self.path.replace(self._older)
            with self.path.open("ab+") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    if file.read() != b"\n":  # the line before was cut off: a disk was full, say
                        line = "\n" + line
                file.write(line.encode())
        except OSError as failed:
            logger.warning("%s: %s: a decision is not logged", self.path, failed.strerror)

    def lines(self) -> Iterator[dict[str, Any]]:
        """What is there, oldest first; a line that was cut off is left out."""
        for path in (self._older, self.path):
            if not path.exists():
                continue
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    found = json.loads(line)
                except ValueError:
                    found = None
                if isinstance(found, dict):
                    yield found
                else:
                    logger.warning("%s: a line that is not whole", path)
