"""An expert shard as Ray starts it; `light_process.py` says at what cost, and when."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from remora.actors.collector import objects_that_stay
from remora.actors.host_memory import HostMemory, free_memory
from remora.actors.launch import CopyOrder, ShardLaunch, host_label
from remora.actors.light_process import LightProcess

if TYPE_CHECKING:
    from remora.actors.expert_actor import ExpertActor
    from remora.actors.shard_facts import ShardFacts
    from remora.comm.view import Member

Pair = tuple[int, int]  # decoder layer, logical expert


class ShardProcess(LightProcess["ExpertActor", ShardLaunch]):
    """The actor class of expert shards; its methods are those of `ExpertActor`.

    Args:
        launch: which shard it is; None: a standby, which `join` tells.
    """

    def start(self) -> "Member":
        """As `ExpertActor.start`."""
        with objects_that_stay():
            return self._begin(None).start()

    def join(
        self, launch: ShardLaunch | None = None, order: CopyOrder | None = None
    ) -> "ShardFacts":
        """As `ExpertActor.join`; `launch` is what a standby is to be."""
        with objects_that_stay():
            return self._begin(launch).join(order)

    def facts(self) -> "ShardFacts":
        """As `ExpertActor.facts`."""
        return self._made().facts()

    def load_experts(self, order: CopyOrder) -> dict[Pair, str]:
        """As `ExpertActor.load_experts`."""
        return self._made().load_experts(order)

    def hold_copies(self, order: CopyOrder) -> dict[Pair, str]:
        """As `ExpertActor.hold_copies`."""
        return self._made().hold_copies(order)

    def set_copy_share(self, share: float) -> None:
        """As `ExpertActor.set_copy_share`; nothing while it is imported."""
        if self._actor is not None:
            self._actor.set_copy_share(share)

    def canary(self, pairs: Sequence[Pair]) -> tuple[str, dict[Pair, str]]:
        """As `ExpertActor.canary`."""
        return self._made().canary(pairs)

    def keep_experts(self, experts: Mapping[int, Sequence[int]], term: int = 0) -> dict[int, int]:
        """As `ExpertActor.keep_experts`."""
        return self._made().keep_experts(experts, term)

    def fence(self, names: Sequence[str], term: int = 0) -> None:
        """As `ExpertActor.fence`."""
        self._made().fence(names, term)

    def host_memory(self) -> HostMemory:
        """What this host has left for another shard."""
        slot, copies = self._actor.held_bytes() if self._actor is not None else (0, 0)
        return HostMemory(host=host_label(), free=free_memory(), slot=slot, copies=copies)

    def _import(self) -> None:
        from remora.actors import expert_actor  # noqa: F401

    def _make(self, launch: ShardLaunch) -> "ExpertActor":
        from remora.actors.expert_actor import ExpertActor

        return ExpertActor(launch, known=self._known())
