"""An expert shard as Ray starts it: a process that costs those who serve beside it little.

Torch and transformers take seconds to import (measured: 1.8 s of a core, and 4 s for the model's
own modules). A process that joins while others serve must do that at idle priority, and so this
module imports neither: Ray's threads, which read it, stay at normal priority, and one of them
starts the thread that serves: an unprivileged thread that has left normal priority cannot go back.

A *standby* has done all that in advance, for a shard that is not known yet.
"""

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from remora.actors.collector import objects_that_stay
from remora.actors.host_memory import free_memory
from remora.actors.launch import CopyOrder, Progress, ShardLaunch, host_label
from remora.actors.thread_policy import run_idle

if TYPE_CHECKING:
    from remora.actors.expert_actor import ExpertActor, ShardFacts
    from remora.actors.model_spec import ModelSpec
    from remora.comm.view import Member

Pair = tuple[int, int]  # decoder layer, logical expert


class ShardProcess:
    """The actor class of expert shards; its methods are those of `ExpertActor`.

    Args:
        launch: which shard it is; None: a standby, which `join` tells.
    """

    def __init__(self, launch: ShardLaunch | None = None) -> None:
        self._launch = launch
        self._lock = threading.Lock()
        self._spec: ModelSpec | None = None
        self._actor: ExpertActor | None = None
        self._begun = threading.Event()  # there is an actor, or there will be none

    def warm_up(self, model: str) -> None:
        """Import what a shard of this checkpoint needs, and look at its model; load nothing.

        Raises:
            UnsupportedModelError, WeightsError: as `inspect_model`.
        """
        with objects_that_stay():
            self._spec = run_idle("remora-warm-up", lambda: _look_at(model))

    def start(self) -> "Member":
        """As `ExpertActor.start`."""
        with objects_that_stay():
            return self._begin(self._launch).start()

    def join(
        self, launch: ShardLaunch | None = None, order: CopyOrder | None = None
    ) -> "ShardFacts":
        """As `ExpertActor.join`; `launch` is what a standby is to be."""
        with objects_that_stay():
            return self._begin(launch or self._launch).join(order)

    def facts(self) -> "ShardFacts":
        """As `ExpertActor.facts`."""
        return self._made().facts()

    def progress(self) -> Progress:
        """As `ExpertActor.progress`; also while it is imported."""
        return self._actor.progress() if self._actor else Progress(phase="starting")

    def load_experts(self, order: CopyOrder) -> dict[Pair, str]:
        """As `ExpertActor.load_experts`."""
        return self._made().load_experts(order)

    def hold_copies(self, order: CopyOrder) -> dict[Pair, str]:
        """As `ExpertActor.hold_copies`."""
        return self._made().hold_copies(order)

    def set_copy_rate(self, bytes_per_s: float | None) -> None:
        """As `ExpertActor.set_copy_rate`; nothing while it is imported."""
        if self._actor is not None:
            self._actor.set_copy_rate(bytes_per_s)

    def canary(self, pairs: Sequence[Pair]) -> tuple[str, dict[Pair, str]]:
        """As `ExpertActor.canary`."""
        return self._made().canary(pairs)

    def keep_experts(self, experts: Mapping[int, Sequence[int]], term: int = 0) -> dict[int, int]:
        """As `ExpertActor.keep_experts`."""
        return self._made().keep_experts(experts, term)

    def fence(self, names: Sequence[str], term: int = 0) -> None:
        """As `ExpertActor.fence`."""
        self._made().fence(names, term)

    def host_memory(self) -> tuple[str, int, int]:
        """Label of this host, bytes that a new process of it may take, and those of this shard's
        second copies, which it may take too."""
        copies = self._actor.status()["second_copies_bytes"] if self._actor is not None else 0
        return host_label(), free_memory(), copies

    def heartbeat(self) -> tuple[int, int]:
        """As `ExpertActor.heartbeat`."""
        return self._made().heartbeat()

    def until_end(self) -> None:
        """As `ExpertActor.until_end`."""
        self._begun.wait()
        if self._actor is not None:
            self._actor.until_end()

    def status(self) -> dict[str, Any]:
        """As `ExpertActor.status`; also while it is imported."""
        if self._actor is not None:
            return self._actor.status()
        incarnation = self._launch.incarnation if self._launch else 0
        return {"alive": True, "phase": "starting", "incarnation": incarnation}

    def stop(self) -> None:
        """As `ExpertActor.stop`; what is not there yet will not be."""
        with self._lock:
            self._begun.set()
        if self._actor is not None:
            self._actor.stop()

    def _begin(self, launch: ShardLaunch | None) -> "ExpertActor":
        assert launch is not None, "a standby is told what to be by join"
        actor_class = run_idle("remora-imports", _expert_actor) if launch.load_idle else None
        with self._lock:
            if self._actor is None:
                self._actor = (actor_class or _expert_actor())(launch, spec=self._spec)
            self._begun.set()
        return self._actor

    def _made(self) -> "ExpertActor":
        assert self._actor is not None, "asked before start returned"
        return self._actor


def _expert_actor() -> "type[ExpertActor]":
    """Import what a shard needs."""
    from remora.actors.expert_actor import ExpertActor

    return ExpertActor


def _look_at(model: str) -> "ModelSpec":
    _expert_actor()
    from remora.actors.model_spec import inspect_model

    return inspect_model(model)
