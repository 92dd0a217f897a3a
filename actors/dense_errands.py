"""What a dense group does for the rest of its deployment, in threads beside the engine.

It reports to the router (`router_reporter.py`) and looks after the coordinator
(`coordinator_watch.py`).
"""

from collections.abc import Callable

from remora.actors.coordinator_watch import CoordinatorWatch, watch_coordinator
from remora.actors.dense_launch import DenseLaunch
from remora.actors.load_sharing import LoadSharing
from remora.actors.router_reporter import report_to_router
from remora.comm.messages import EngineStats
from remora.comm.view import View


class Errands:
    """See the head of this file. From the start of a group to `close`.

    Args:
        stats, take_sketch, loads: as `RouterReporter`.
    """

    def __init__(
        self,
        launch: DenseLaunch,
        stats: Callable[[], EngineStats],
        take_sketch: Callable[[], bytes],
        loads: LoadSharing,
    ) -> None:
        self._reporter = report_to_router(launch, stats, take_sketch, loads)
        self._watch: CoordinatorWatch | None = None
        if launch.hang_s is not None:
            self._watch = watch_coordinator(
                launch.deployment,
                launch.uid,
                hang_s=launch.hang_s,
                start_s=launch.start_timeout_s,
            )

    def adopt_view(self, view: View) -> None:
        """This view is in force."""
        if self._watch is not None:
            self._watch.adopt_view(view)

    def close(self) -> None:
        """End the threads."""
        if self._reporter is not None:
            self._reporter.close()
        if self._watch is not None:
            self._watch.close()
