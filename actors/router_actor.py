"""The process of the router: a Ray actor around `RouterServer`.

No token goes through it, so Ray may start it again by itself: its constructor restores what was
saved, listens, and takes the view from the coordinator. Who talks to it asks for its address again
(`router_lookup.py`).
"""

import logging
from pathlib import Path
from typing import Any, Final

import msgspec
import ray

from remora.actors.launch import RAY_NAMESPACE, advertised_ip, coordinator_name
from remora.actors.plan_outcome import PlacementCost, PlanOutcome
from remora.actors.process_log import keep_log
from remora.comm.errors import ClusterError, first_line
from remora.comm.objective import Objective
from remora.comm.view import Placement, View

logger = logging.getLogger(__name__)

ASK_S: Final = 5.0  # for a view


class RouterLaunch(msgspec.Struct, frozen=True, kw_only=True):
    """What the router is told."""

    deployment: str
    token: bytes
    bind_ip: str
    port: int
    report_every_s: float
    slots: int | None  # of a shard in a layer
    state_dir: Path | None


class RouterActor:
    """The router. `cluster` wraps it with `ray.remote`.

    Raises (from the constructor):
        ClusterError: the address cannot be bound.
    """

    def __init__(self, launch: RouterLaunch) -> None:
        # numba and scipy come with them, a second that whoever creates the actor is spared
        from remora.actors.router_service import RouterServer
        from remora.actors.router_statistics import RouterStatistics

        keep_log()
        self._launch = launch
        path = launch.state_dir / "history.msgpack" if launch.state_dir else None
        self._statistics = RouterStatistics(slots=launch.slots, path=path)
        self._statistics.restore()
        self._server = RouterServer(
            token=launch.token,
            bind_ip=launch.bind_ip,
            port=launch.port,
            statistics=self._statistics,
            report_every_s=launch.report_every_s,
        )
        self._server.start()
        self._view: View | None = None
        view = _view_of(launch.deployment)
        if view is not None:  # else the coordinator brings it
            self.adopt_view(view)

    def address(self) -> str:
        """What clients dial."""
        ip = advertised_ip(self._launch.bind_ip)
        port = self._server.address.rpartition(":")[2]
        return f"{ip}:{port}" if ip is not None else self._server.address

    def adopt_view(self, view: View) -> str:
        """Route by `view` from now on; its hash."""
        if self._view is not None and self._view.placement != view.placement:
            self._statistics.start_fresh()
        self._view = view
        self._server.adopt_view(view)
        return view.view_hash

    def plan(self, seed: int, objective: Objective) -> PlanOutcome:
        """A placement for what was reported, against the one in force.

        Raises:
            ClusterError: no view yet, too little was reported, or a plan is being made.
        """
        return self._server.plan(self._known_view(), seed, objective)

    def fresh_cost(self, placement: Placement) -> PlacementCost:
        """What a placement of the same shards costs on what came since the one in force serves.

        Raises:
            ClusterError: no view yet, or too little came.
        """
        return self._statistics.fresh_cost(self._known_view(), placement)

    def heat(self) -> dict[tuple[int, int], float]:
        """As `RouterStatistics.heat`."""
        return self._statistics.heat()

    def status(self) -> dict[str, Any]:
        """What `remora status` shows."""
        return self._server.status() | {"address": self.address()}

    def heartbeat(self) -> tuple[int, int]:
        """A sign of progress, for the coordinator: returns once the loop that serves has come
        round; how often it has, and that nothing waits then."""
        return self._server.come_round(), 0

    def stop(self) -> None:
        """Save what was counted and stop listening."""
        self._server.stop()
        self._statistics.save()

    def _known_view(self) -> View:
        if self._view is None:
            raise ClusterError("the router has no view yet")
        return self._view


def _view_of(deployment: str) -> View | None:
    """The committed view, when a coordinator has one: this router was started again then."""
    try:
        actor = ray.get_actor(coordinator_name(deployment), namespace=RAY_NAMESPACE)
        view: Any = ray.get(actor.view.remote(), timeout=ASK_S)
    except (ValueError, ray.exceptions.RayError) as none_yet:
        logger.info("no view yet: %s", first_line(none_yet))
        return None
    assert isinstance(view, View)
    return view
