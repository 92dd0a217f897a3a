"""Command lines of `remora` in a process of their own, and what of costly modules that imports."""

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

COSTLY = ("torch", "transformers", "numba", "scipy", "pandas", "remora.cluster.coordinator")
WITHIN_S = 120.0


def run_commands(
    commands: Sequence[Sequence[str]], environment: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Run `commands` one after the other in one process.

    Returns:
        For each its exit `status`, what it `said`, and which of `COSTLY` is imported at its end.
    """
    done = subprocess.run(
        [sys.executable, "-P", __file__, json.dumps(commands)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=WITHIN_S,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def _main() -> None:
    from remora.cluster.cli import main

    for arguments in json.loads(sys.argv[1]):
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            status = main(arguments)
        costly = [name for name in COSTLY if name in sys.modules]
        print(json.dumps({"status": status, "said": said.getvalue(), "costly": costly}))


if __name__ == "__main__":
    _main()
