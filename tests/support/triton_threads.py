"""Triton's interpreter in several threads, which it is not made for: one launch at a time.

It swaps functions of `triton.language` for the time of a launch, in the whole process. And it
computes with numpy, which warns of an overflow where a GPU goes on with infinity: rows of a step
whose exchange failed are computed from whatever the buffers hold, and thrown away.
"""

import functools
import threading
from typing import Any

import numpy as np
import pytest

_one_launch = threading.Lock()


@pytest.fixture(scope="session")
def one_launch_at_a_time() -> Any:
    """From here on; harmless for other tests."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    launch = interpreter.GridExecutor.__call__

    @functools.wraps(launch)
    def alone(*args: Any, **kwargs: Any) -> Any:
        with _one_launch, np.errstate(all="ignore"):
            return launch(*args, **kwargs)

    interpreter.GridExecutor.__call__ = alone
    yield
    interpreter.GridExecutor.__call__ = launch
