"""A script under one instruction set: kernels choose theirs when their process begins."""

import os
import subprocess
import sys


def run_under(isa: str, script: str, *arguments: str) -> str:
    """What the script prints; it must end well."""
    run = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, "REMORA_ISA": isa, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()
