"""Wall time inside the loops that Inductor generated, for a profiled pass of `remora bench`.

Inductor compiles what lies between our operators (norms, rotary embeddings, gates' softmax) into
C++ functions, and calls them from a generated Python module as its globals `cpp_fused_*`. Those
loops are kernels like ours, but carry no counter. While `LoopTimers` is installed each of these
globals is a wrapper that times it. That costs the step some microseconds, so times of other kinds
are taken in a pass without it, and its own cost, measured on a function that does nothing, is
subtracted. What is left in a call is the loop and the reading of its arguments.
"""

import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

_PREFIX = "cpp_fused"  # of Inductor's names of generated CPU kernels
_EMPTY_CALLS = 2000


class LoopTimers:
    """Times every generated loop of this process from `install` to `remove`.

    Attributes:
        calls: calls timed so far.
        spent_ns: their wall time, the timers' own included; see `net_ns`.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.spent_ns = 0
        self._kept: list[tuple[ModuleType, str, Any]] = []
        self._empty_ns = 0.0

    @property
    def net_ns(self) -> int:
        """Time inside the loops, without what a timer adds."""
        return max(0, round(self.spent_ns - self.calls * self._empty_ns))

    def install(self) -> None:
        """Put a timer around every loop there is. Between steps only."""
        assert not self._kept, "installed already"
        self._empty_ns = self._cost_of_a_timer()
        self.calls = self.spent_ns = 0
        for module in _generated_modules():
            for name, loop in list(vars(module).items()):
                if name.startswith(_PREFIX) and callable(loop):
                    self._kept.append((module, name, loop))
                    setattr(module, name, self._timed(loop))

    def remove(self) -> None:
        """The modules are as before. Between steps only."""
        for module, name, loop in self._kept:
            setattr(module, name, loop)
        self._kept.clear()

    def _timed(self, loop: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            begin = time.perf_counter_ns()
            result = loop(*args)
            self.spent_ns += time.perf_counter_ns() - begin
            self.calls += 1
            return result

        return timed

    def _cost_of_a_timer(self) -> float:
        """Nanoseconds that a timer counts around nothing."""
        self.calls = self.spent_ns = 0
        empty = self._timed(_nothing)
        for _ in range(_EMPTY_CALLS):
            empty(1, 2, 3, 4)
        return self.spent_ns / self.calls


def _nothing(*_: Any) -> None:
    return None


def _generated_modules() -> list[ModuleType]:
    from torch._inductor.codecache import PyCodeCache  # heavy, and only there once it was used

    return list(PyCodeCache.modules)
