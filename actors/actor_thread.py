"""The one thread of an actor that calls torch: it loads, tells that it has, and serves.

Ray's own threads only start it, ask the actor how it is, and stop it.
"""

import threading
from collections.abc import Callable


class ActorThread:
    """Runs `prepare`, then what `prepare` returned, in a daemon thread named `name`."""

    def __init__(self, name: str, prepare: Callable[[], Callable[[], None]]) -> None:
        self._prepare = prepare
        self._prepared = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start, and wait until `prepare` is through. Raises what it raised, in this thread."""
        self._thread.start()
        self._prepared.wait()
        if self._failure is not None:
            raise self._failure

    @property
    def is_alive(self) -> bool:
        """Whether it is still to start, prepares or serves."""
        return self._thread.ident is None or self._thread.is_alive()

    def join(self) -> None:
        """Wait until it has ended; at once if it never started."""
        if self._thread.is_alive():
            self._thread.join()

    def wait_until_end(self) -> None:
        """Wait until it has ended, whether it has been started yet or not."""
        self._prepared.wait()
        self._thread.join()

    def _run(self) -> None:
        try:
            serve = self._prepare()
        except BaseException as failure:  # handed to whoever waits in `start`
            self._failure = failure
            return
        finally:
            self._prepared.set()
        serve()
