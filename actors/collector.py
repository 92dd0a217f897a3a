"""Python's cyclic collector, and the heap, in processes that serve.

A process that has imported torch and transformers has a million objects that stay. Each full pass
over them takes 0.1 to 0.5 s (measured: 14 passes, 3 s of the 7 s of a shard's start), and one that
comes while streams flow stops them for as long.
"""

import ctypes
import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import ray

_lock = threading.Lock()
_inside = 0  # threads that import or load


@contextmanager
def objects_that_stay() -> Iterator[None]:
    """What is imported and loaded inside is not looked at by the collector, now or later.

    One pass at the end (of the last thread that is inside) frees what only loading needed, and the
    heap gives back what is free in it: a compiler's graphs and a checkpoint's staging (benchmarks'
    *small*: 750 MB of a dense group's 1,370). Only in a Ray worker, which is there for that alone:
    what forms a cycle is never freed again.
    """
    if not ray.is_initialized():
        yield
        return
    global _inside
    with _lock:
        _inside += 1
        gc.disable()
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                gc.collect()
                gc.freeze()
                gc.enable()
                _give_memory_back()


def _give_memory_back() -> None:
    """Free pages of the heap go to the kernel, which else come and go with requests for memory
    (`launch.thread_environment` lets the heap keep them); where the C library can do that."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
