"""Python's cyclic collector in processes that serve.

A process that has imported torch and transformers has a million objects that stay. Each full pass
over them takes 0.1 to 0.5 s (measured: 14 passes, 3 s of the 7 s of a shard's start), and one that
comes while streams flow stops them for as long.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import ray


@contextmanager
def objects_that_stay() -> Iterator[None]:
    """What is imported and loaded inside is not looked at by the collector, now or later.

    Only in a Ray worker, which is there for that alone: what forms a cycle is never freed again.
    """
    if not ray.is_initialized():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
