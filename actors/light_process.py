"""What Ray starts for a member: a process that costs those who serve beside it little.

Torch and transformers take seconds to import (measured: 1.8 s of a core, and 4 s for the model's
own modules). A process that joins while others serve must do that at idle priority, and so neither
this module nor those of the actor classes import either: Ray's threads, which read them, stay at
normal priority, and one of them starts the thread that serves: an unprivileged thread that has left
normal priority cannot go back.

A *standby* has done all that in advance, for a member that is not known yet. So have the first
members of a deployment, at normal priority: the coordinator goes by what they see of the model.
"""

import threading
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from remora.actors.collector import objects_that_stay
from remora.actors.launch import Progress
from remora.actors.process_log import keep_log
from remora.actors.thread_policy import run_idle

if TYPE_CHECKING:
    from remora.actors.draft import Draft, Known
    from remora.actors.model_spec import ModelSpec


class LateActor(Protocol):
    """What any actor answers that stands behind such a process."""

    def progress(self) -> Progress:
        """How far its start has come."""

    def status(self) -> dict[str, Any]:
        """For `remora status`."""

    def heartbeat(self) -> tuple[int, int]:
        """A sign of progress."""

    def until_end(self) -> None:
        """Returns when it has ended."""

    def stop(self) -> None:
        """End it."""


class JoinsIdle(Protocol):
    """A launch that says whether the member loads at idle priority."""

    @property
    def incarnation(self) -> int:
        """Which life of the member it is."""

    @property
    def load_idle(self) -> bool:
        """Others serve beside it."""


A = TypeVar("A", bound=LateActor)
L = TypeVar("L", bound=JoinsIdle)


class LightProcess(Generic[A, L]):
    """An actor class whose methods are those of the actor behind it, which is imported late.

    Args:
        launch: which member it is; None: a standby, which is told later.
    """

    def __init__(self, launch: L | None = None) -> None:
        keep_log()
        self._launch = launch
        self._lock = threading.Lock()
        self._importing = threading.Lock()
        self._spec: ModelSpec | None = None
        self._drafted: Draft | None = None
        self._actor: A | None = None
        self._begun = threading.Event()  # there is an actor, or there will be none

    def warm_up(self, model: str, *, idle: bool = True) -> "ModelSpec":
        """Import what a member with this checkpoint needs, and look at its model; load nothing.

        Args:
            idle: in time that nobody else wants: others serve beside it.

        Returns:
            What it saw, but for `config`: who only places it is spared the import of transformers.

        Raises:
            UnsupportedModelError, WeightsError: as `inspect_model`.
        """
        with objects_that_stay(), self._importing:
            look = partial(self._look_at, model)
            spec = self._spec = run_idle("remora-warm-up", look) if idle else look()
            if idle:  # who loads next does it then
                self._drafted = run_idle("remora-draft", partial(_draft, model, spec))
        return replace(spec, config=None)

    def progress(self) -> Progress:
        """As the actor's; also while it is imported."""
        return self._actor.progress() if self._actor else Progress(phase="starting")

    def heartbeat(self) -> tuple[int, int]:
        """As the actor's."""
        return self._made().heartbeat()

    def until_end(self) -> None:
        """As the actor's."""
        self._begun.wait()
        if self._actor is not None:
            self._actor.until_end()

    def status(self) -> dict[str, Any]:
        """As the actor's; also while it is imported."""
        if self._actor is not None:
            return self._actor.status()
        incarnation = self._launch.incarnation if self._launch else 0
        return {"alive": True, "phase": "starting", "incarnation": incarnation}

    def stop(self) -> None:
        """As the actor's; what is not there yet will not be."""
        with self._lock:
            self._begun.set()
        if self._actor is not None:
            self._actor.stop()

    # -- what an actor class says of itself ---------------------------------------------------

    def _import(self) -> None:
        """Import what `_make` needs."""
        raise NotImplementedError

    def _make(self, launch: L) -> A:
        raise NotImplementedError

    # -- inside -------------------------------------------------------------------------------

    def _begin(self, launch: L | None) -> A:
        """The actor, made if there is none. `launch`: what a standby is to be."""
        launch = launch or self._launch
        assert launch is not None, "a standby is told what to be"
        with self._importing:  # two threads at once would find each other's modules half made
            if launch.load_idle:
                run_idle("remora-imports", self._import)
            else:
                self._import()
        with self._lock:
            if self._actor is None:
                self._actor = self._make(launch)
            self._begun.set()
        return self._actor

    def _known(self) -> "Known":
        """What was seen in advance, for `_make`; a draft is given away."""
        from remora.actors.draft import Known

        drafted, self._drafted = self._drafted, None
        return Known(self._spec, drafted)

    def _made(self) -> A:
        assert self._actor is not None, "asked before it was started"
        return self._actor

    def _look_at(self, model: str) -> "ModelSpec":
        self._import()
        from remora.actors.model_spec import inspect_model

        return inspect_model(model)


def _draft(model: str, spec: "ModelSpec") -> "Draft":
    from remora.actors.draft import draft_model
    from remora.actors.model_spec import resolve_dtype

    return draft_model(model, spec, resolve_dtype(spec, "auto"))
