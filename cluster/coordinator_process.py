"""The coordinator as Ray starts it, and as all that ask it know it.

Who gets the handle of an actor has Ray import the class of that actor: the command line, ingresses,
dense groups. What a coordinator needs (torch, gRPC, the planners) is 2.5 s of CPU, which none of
them has a use for, so its class is this one, and what it does is imported in its own process alone.
"""

from typing import TYPE_CHECKING, Any, Literal

from remora.actors.launch import Progress
from remora.autoscale.ingress_load import IngressLoad
from remora.cluster.operation import Target
from remora.comm.view import View

if TYPE_CHECKING:
    from remora.actors.manifest import Manifest

Phase = Literal["new", "starting", "serving", "failed", "stopped"]
OVER: tuple[Phase, ...] = ("failed", "stopped")  # nothing is up, and nothing will be


class CoordinatorProcess:
    """The actor class; its methods are those of `Coordinator`. Wrapped by `ray.remote` in
    `cluster.bootstrap`."""

    def __init__(self, config: dict[str, Any], token: bytes) -> None:
        from remora.cluster.coordinator import Coordinator

        self._coordinator = Coordinator(config, token)

    def credentials(self) -> bytes:
        """As `Coordinator.credentials`."""
        return self._coordinator.credentials()

    def config(self) -> dict[str, Any]:
        """As `Coordinator.config`."""
        return self._coordinator.config()

    def phase(self) -> Phase:
        """As `Coordinator.phase`."""
        return self._coordinator.phase()

    def view(self) -> View:
        """As `Coordinator.view`."""
        return self._coordinator.view()

    def manifest(self) -> "Manifest":
        """As `Coordinator.manifest`."""
        return self._coordinator.manifest()

    def status(self) -> dict[str, Any]:
        """As `Coordinator.status`."""
        return self._coordinator.status()

    def progress(self) -> dict[str, Progress]:
        """As `Coordinator.progress`."""
        return self._coordinator.progress()

    def rebalance(self, operation_id: str, *, dry_run: bool) -> dict[str, Any]:
        """As `Coordinator.rebalance`."""
        return self._coordinator.rebalance(operation_id, dry_run=dry_run)

    def request(self, operation_id: str, target: Target) -> dict[str, Any]:
        """As `Coordinator.request`."""
        return self._coordinator.request(operation_id, target)

    def wait(self, operation_id: str, timeout_s: float) -> dict[str, Any]:
        """As `Coordinator.wait`."""
        return self._coordinator.wait(operation_id, timeout_s)

    def cancel(self, operation_id: str | None) -> dict[str, Any]:
        """As `Coordinator.cancel`."""
        return self._coordinator.cancel(operation_id)

    def heartbeat(self) -> tuple[int, int]:
        """As `Coordinator.heartbeat`."""
        return self._coordinator.heartbeat()

    def exchange(self, load: IngressLoad | None) -> dict[str, float]:
        """As `Coordinator.exchange`."""
        return self._coordinator.exchange(load)

    def deploy(self) -> View:
        """As `Coordinator.deploy`."""
        return self._coordinator.deploy()

    def stop(self) -> None:
        """As `Coordinator.stop`."""
        self._coordinator.stop()
