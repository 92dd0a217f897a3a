"""The bandwidth of memory behind the workers' protocol: our streaming read, all threads.

The best of some thirty passes: whatever else runs can only make a pass slower, and a limit that is
too low would flatter what is held against it.
"""

import time
from typing import Any

from protocol import Loaded, run_worker

SECONDS = 0.5  # of reading, for one figure


def load(options: dict[str, Any]) -> Loaded:
    """Options: threads, bytes (of the buffer, far beyond the caches)."""
    import torch

    from remora.kernels.memory import huge_zeros
    from remora.kernels.native import native_available

    if not native_available():
        raise RuntimeError("the C++ kernels are needed to measure bandwidth (make setup)")
    torch.set_num_threads(options["threads"])
    num_bytes = options["bytes"]
    buffer = huge_zeros(num_bytes // 8, dtype=torch.int64).fill_(1)  # as weights lie

    def measure() -> dict[str, float]:
        torch.ops.remora.stream_read(buffer)  # threads wake up
        best_s, until = float("inf"), time.perf_counter() + SECONDS
        while (begin := time.perf_counter()) < until:
            torch.ops.remora.stream_read(buffer)
            best_s = min(best_s, time.perf_counter() - begin)
        return {"bytes_per_s": num_bytes / best_s}

    return {"threads": torch.get_num_threads(), "bytes": num_bytes}, {"measure": measure}


if __name__ == "__main__":
    run_worker(load)
