"""A dense group's first rank as Ray starts it: a process that costs those who serve beside it
little.

As `shard_process.py`: neither torch nor transformers is imported before a thread of idle priority
does that, where others serve; a *standby* has done it in advance, for a group not known yet.
"""

import threading
from typing import TYPE_CHECKING, Any

from remora.actors.collector import objects_that_stay
from remora.actors.dense_launch import DenseLaunch
from remora.actors.launch import Progress
from remora.actors.thread_policy import run_idle

if TYPE_CHECKING:
    from remora.actors.dense_actor import DenseActor
    from remora.actors.trace_recorder import Recorded
    from remora.comm.trace import TraceHeader
    from remora.comm.view import Endpoint, Member, View


class DenseProcess:
    """The actor class of first ranks; its methods are those of `DenseActor`.

    Args:
        launch: which group it is; None: a standby, which `start` tells.
    """

    def __init__(self, launch: DenseLaunch | None = None) -> None:
        self._launch = launch
        self._lock = threading.Lock()
        self._actor: DenseActor | None = None
        self._begun = threading.Event()  # there is an actor, or there will be none

    def warm_up(self, model: str) -> None:
        """Import what a dense rank of this checkpoint needs, and look at its model; load nothing.

        Raises:
            UnsupportedModelError, WeightsError: as `inspect_model`.
        """
        with objects_that_stay():
            run_idle("remora-warm-up", lambda: _look_at(model))

    def listen(self) -> "Endpoint":
        """As `DenseActor.listen`."""
        return self._begin(self._launch).listen()

    def start(self, launch: DenseLaunch | None = None) -> "Member":
        """As `DenseActor.start`; `launch` is what a standby is to be."""
        with objects_that_stay():
            return self._begin(launch or self._launch).start()

    def offer_view(self, view: "View") -> str:
        """As `DenseActor.offer_view`."""
        return self._made().offer_view(view)

    def adopt_view(self, view: "View", or_none: bool = False) -> str:
        """As `DenseActor.adopt_view`."""
        return self._made().adopt_view(view, or_none)

    def quiesce(self, within_s: float) -> None:
        """As `DenseActor.quiesce`."""
        self._made().quiesce(within_s)

    def heartbeat(self) -> tuple[int, int]:
        """As `DenseActor.heartbeat`."""
        return self._made().heartbeat()

    def until_end(self) -> None:
        """As `DenseActor.until_end`."""
        self._begun.wait()
        if self._actor is not None:
            self._actor.until_end()

    def progress(self) -> Progress:
        """As `DenseActor.progress`; also while it is imported."""
        return self._actor.progress() if self._actor else Progress(phase="starting")

    def status(self) -> dict[str, Any]:
        """As `DenseActor.status`; also while it is imported."""
        if self._actor is not None:
            return self._actor.status()
        incarnation = self._launch.incarnation if self._launch else 0
        return {"alive": True, "phase": "starting", "incarnation": incarnation}

    def fingerprint(self) -> str:
        """As `DenseActor.fingerprint`."""
        return self._made().fingerprint()

    def phases(self) -> dict[str, Any]:
        """As `DenseActor.phases`."""
        return self._made().phases()

    def take_sketch(self) -> bytes:
        """As `DenseActor.take_sketch`."""
        return self._made().take_sketch()

    def start_recording(self, tokens_max: int) -> "TraceHeader":
        """As `DenseActor.start_recording`."""
        return self._made().start_recording(tokens_max)

    def take_recorded(self) -> "Recorded":
        """As `DenseActor.take_recorded`."""
        return self._made().take_recorded()

    def stop_recording(self) -> None:
        """As `DenseActor.stop_recording`."""
        self._made().stop_recording()

    def stop(self) -> None:
        """As `DenseActor.stop`; what is not there yet will not be."""
        with self._lock:
            self._begun.set()
        if self._actor is not None:
            self._actor.stop()

    def _begin(self, launch: DenseLaunch | None) -> "DenseActor":
        assert launch is not None, "a standby is told what to be by start"
        actor_class = run_idle("remora-imports", _dense_actor) if launch.load_idle else None
        with self._lock:
            if self._actor is None:
                self._actor = (actor_class or _dense_actor())(launch)
            self._begun.set()
        return self._actor

    def _made(self) -> "DenseActor":
        assert self._actor is not None, "asked before start returned"
        return self._actor


def _dense_actor() -> "type[DenseActor]":
    """Import what a dense rank needs."""
    from remora.actors.dense_actor import DenseActor

    return DenseActor


def _look_at(model: str) -> None:
    _dense_actor()
    from remora.actors.model_spec import inspect_model

    inspect_model(model)
