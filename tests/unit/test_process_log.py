"""What our processes tell, as a process without handlers of its own writes it."""

import subprocess
import sys

SCRIPT = """
import logging
from remora.actors.process_log import keep_log
{before}
keep_log()
keep_log()
logging.getLogger("remora.cluster.operation_runner").info("operation %s: %s", "up", "done")
logging.getLogger("another").info("not ours")
"""


def told(before: str = "") -> list[str]:
    script = SCRIPT.format(before=before)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return done.stderr.splitlines()


def test_a_process_tells_when_and_what_it_did_once() -> None:
    [line] = told()
    assert line.endswith(" INFO remora.cluster.operation_runner: operation up: done")
    assert line[:2] == "20", "when"


def test_handlers_that_somebody_has_set_are_kept() -> None:
    assert told("logging.basicConfig(format='mine %(message)s')") == ["mine operation up: done"]
