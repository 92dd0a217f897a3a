"""Which executor runs the decoder layers: eager at once, compiled once that costs nobody a wait.

    no compiler, or "eager"        eager for good
    artefacts cached (a marker)    compiled before the engine serves: a few seconds of tracing
    "compiled", nothing cached     the same, but the compiler runs first (tens of seconds)
    "auto", nothing cached         eager; a child process of low priority fills the cache meanwhile;
                                   the engine switches at a moment when no request runs

The switch never happens under a running request, in either numerics: eager and compiled bfloat16
round in different places, so a request belongs to the executor that it started with. Artefacts are
kept in `REMORA_CACHE_DIR` (default `~/.cache/remora`) between starts.
"""

import functools
import hashlib
import json
import logging
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import transformers

from remora.actors.dense_launch import Wish
from remora.actors.dense_model import DenseModel
from remora.actors.warm import compile_and_warm, warm_up
from remora.kernels.fingerprint import kernel_fingerprint

logger = logging.getLogger(__name__)

_CACHE_ENV = "TORCHINDUCTOR_CACHE_DIR"

Phase = Literal["eager", "warming", "compiled"]


def cache_dir() -> Path:
    """Where compiled artefacts live between starts."""
    return Path(os.environ.get("REMORA_CACHE_DIR", Path.home() / ".cache" / "remora"))


def use_cache() -> None:
    """Point torch's compiler at our cache; before anything is compiled in this process.

    Importing torch's compiler writes torch's own default into the environment, for children too:
    that is nobody's wish and gives way, anything else stays.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # imports the compiler

    if os.environ.get(_CACHE_ENV) in (None, default_cache_dir()):
        os.environ[_CACHE_ENV] = str(cache_dir() / "inductor" / processor_tag())


@functools.cache
def processor_tag() -> str:
    """Tells kinds of processors apart: code is compiled for just the one that it runs on, and hosts
    of several kinds may share a home."""
    try:
        first, _, _ = Path("/proc/cpuinfo").read_text().partition("\n\n")
    except OSError:  # another system
        first = platform.processor()
    kept = [line for line in first.splitlines() if line.startswith(("model name", "flags", "Feat"))]
    return hashlib.blake2b("\n".join(kept).encode(), digest_size=6).hexdigest()


def has_compiler() -> bool:
    """Whether torch can build C++ here."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++"))


def artefact_key(model: DenseModel, *, exact: bool) -> str:
    """What compiled artefacts depend on, as 32 hex digits."""
    facts = json.dumps(
        [
            model.spec.config.to_dict(),
            str(model.dtype),
            exact,
            model.num_ranks,
            model.num_slices,
            model.part is None or model.part.group.is_native,
            model.pinned,
            kernel_fingerprint(),
            processor_tag(),
            transformers.__version__,
        ],
        sort_keys=True,
        default=str,
    )
    return hashlib.blake2b(facts.encode(), digest_size=16).hexdigest()


class Executor:
    """Owns the choice for one engine; used from the engine's thread only."""

    def __init__(self, model: DenseModel, *, wish: Wish, exact: bool) -> None:
        self._model = model
        self._exact = exact
        self._child: subprocess.Popen[bytes] | None = None
        self.phase: Phase = "eager"
        self.why_eager: str | None = None  # why nothing will be compiled, for people
        if wish == "eager":
            self.why_eager = "asked for"
            return
        if not has_compiler():
            self._stay_eager("no C++ compiler found")
            return
        self._marker = cache_dir() / "compiled" / artefact_key(model, exact=exact)
        if wish == "compiled" or self._marker.exists():
            self._switch()
        else:
            self._warm()

    @property
    def name(self) -> str:
        """`eager` or `compiled`: what runs now, as stats and fingerprints say it."""
        return "compiled" if self.phase == "compiled" else "eager"

    def call_when_compiled(self, wake: Callable[[], None]) -> None:
        """Have `wake` called, from another thread, when the compiling child has ended."""
        child = self._child
        if child is None:
            return

        def wait() -> None:
            child.wait()
            wake()

        threading.Thread(target=wait, name="remora-compile-watch", daemon=True).start()

    def when_idle(self) -> bool:
        """Called while no request runs: switches if the artefacts are ready. True if it changed."""
        if self._child is None or self._child.poll() is None:
            return False
        status = self._end_child()
        if status != 0:
            self._stay_eager(f"compiling failed with status {status}, see {self._log_path()}")
            return True
        self._switch()
        return True

    def close(self) -> None:
        """End the compiling child, if one runs."""
        if self._child is not None:
            if self._child.poll() is None:
                # The whole group: its g++ would go on for seconds. SIGTERM, upon which g++ removes
                # what it has half written into the cache.
                os.killpg(self._child.pid, signal.SIGTERM)
            self._end_child()

    def _end_child(self) -> int:
        """Wait for the child, close the pipe it watched; its exit status."""
        assert self._child is not None
        with self._child as child:  # closes the pipe, waits
            self._child = None
        return child.returncode

    def _switch(self) -> None:
        """Compile, or stay eager where that fails: a full disk must not keep a model from serving.

        The compiler wraps whatever stopped it (no space, no permission, a broken g++) in errors of
        many kinds, so any failure of the warm-up counts as its own once eager layers pass it.
        """
        use_cache()
        try:
            compile_and_warm(self._model, exact=self._exact)
        except Exception as failure:
            self._model.use_eager()
            warm_up(self._model, exact=self._exact)
            self._stay_eager(f"compiling failed: {_first_line(failure)}")
            return
        self.phase = "compiled"
        logger.info("layers are compiled")
        try:
            self._marker.parent.mkdir(parents=True, exist_ok=True)
            self._marker.touch()
        except OSError as failure:  # it only saves the next start some work
            logger.warning("compiled artefacts cannot be kept: %s", failure)

    def _warm(self) -> None:
        try:
            self._child = self._spawn()
        except OSError as failure:
            self._stay_eager(f"the cache cannot be written: {failure}")
        else:
            self.phase = "warming"

    def _stay_eager(self, why: str) -> None:
        self.phase, self.why_eager = "eager", why
        logger.warning("layers run in eager mode for good: %s", why)

    def _log_path(self) -> Path:
        return cache_dir() / "compiled" / f"{self._marker.name}.log"

    def _spawn(self) -> subprocess.Popen[bytes]:
        use_cache()
        self._log_path().parent.mkdir(parents=True, exist_ok=True)
        order = json.dumps(
            {
                "model": self._model.spec.path,
                "dtype": str(self._model.dtype).removeprefix("torch."),
                "exact": self._exact,
                "num_ranks": self._model.num_ranks,
                "is_native": self._model.part is not None and self._model.part.group.is_native,
                "slice_rows": self._model.num_slices > 1,
                "max_positions": self._model.pinned,
            }
        )
        with self._log_path().open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-c", "from remora.actors.warm import main; main()", order],
                stdout=log,
                stderr=log,
                stdin=subprocess.PIPE,  # the child ends when this end closes
                start_new_session=True,  # it ends with all that it has started
            )


def _first_line(failure: BaseException) -> str:
    lines = str(failure).strip().splitlines()
    return f"{type(failure).__name__}: {lines[0]}" if lines else type(failure).__name__
