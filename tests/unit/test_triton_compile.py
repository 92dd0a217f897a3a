"""Every Triton kernel compiles for real GPUs, through the host code that launches it.

The interpreter knows nothing of types, layouts, shared memory or registers; the compiler does. It
runs in a process of its own, since this one has Triton interpreted.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SHARED_MAX = {80: 163 * 1024, 90: 227 * 1024}  # bytes a program may have: CUDA C++ Guide, table 24
SPILL_MAX = 256  # bytes a thread: more means that a tile is too large

SCRIPT = Path(__file__).parents[1] / "support" / "triton_compile.py"


@pytest.mark.long
@pytest.mark.parametrize("capability", SHARED_MAX)
def test_kernels_fit(capability: int, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", str(SCRIPT), str(capability)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    kernels = json.loads(done.stdout)
    names = {kernel["name"] for kernel in kernels}
    assert names == {
        "_sort_kernel",
        "_tile_map_kernel",
        "_up_kernel",
        "_down_kernel",
        "_sum_pairs_kernel",
        "_write_kernel",
        "attend_kernel",
        "merge_kernel",
    }
    for kernel in kernels:
        assert kernel["shared_nbytes"] <= SHARED_MAX[capability], kernel
        assert kernel["spill_nbytes"] <= SPILL_MAX, kernel
        if kernel["name"] in ("_up_kernel", "_down_kernel", "attend_kernel"):
            assert kernel["uses_tensor_cores"], kernel
