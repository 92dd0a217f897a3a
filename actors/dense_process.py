"""A dense group's first rank as Ray starts it; `light_process.py` says at what cost, and when."""

from typing import TYPE_CHECKING, Any

from remora.actors.collector import objects_that_stay
from remora.actors.dense_launch import DenseLaunch
from remora.actors.light_process import LightProcess

if TYPE_CHECKING:
    from remora.actors.dense_actor import DenseActor
    from remora.actors.model_spec import ModelSpec
    from remora.actors.trace_recorder import Recorded
    from remora.comm.trace import TraceHeader
    from remora.comm.view import Endpoint, Member, View


class DenseProcess(LightProcess["DenseActor", DenseLaunch]):
    """The actor class of first ranks; its methods are those of `DenseActor`.

    Args:
        launch: which group it is; None: a standby, which `start` tells.
    """

    def listen(self) -> "Endpoint":
        """As `DenseActor.listen`."""
        return self._begin(None).listen()

    def start(self, launch: DenseLaunch | None = None) -> "Member":
        """As `DenseActor.start`; `launch` is what a standby is to be."""
        with objects_that_stay():
            return self._begin(launch).start()

    def offer_view(self, view: "View") -> str:
        """As `DenseActor.offer_view`."""
        return self._made().offer_view(view)

    def adopt_view(self, view: "View", or_none: bool = False) -> str:
        """As `DenseActor.adopt_view`."""
        return self._made().adopt_view(view, or_none)

    def quiesce(self, within_s: float) -> None:
        """As `DenseActor.quiesce`."""
        self._made().quiesce(within_s)

    def fingerprint(self) -> str:
        """As `DenseActor.fingerprint`."""
        return self._made().fingerprint()

    def phases(self) -> dict[str, Any]:
        """As `DenseActor.phases`."""
        return self._made().phases()

    def take_sketch(self) -> bytes:
        """As `DenseActor.take_sketch`."""
        return self._made().take_sketch()

    def start_recording(self, tokens_max: int, name: str) -> "TraceHeader":
        """As `DenseActor.start_recording`."""
        return self._made().start_recording(tokens_max, name)

    def take_recorded(self, name: str) -> "Recorded":
        """As `DenseActor.take_recorded`."""
        return self._made().take_recorded(name)

    def stop_recording(self, name: str) -> None:
        """As `DenseActor.stop_recording`."""
        self._made().stop_recording(name)

    def _import(self) -> None:
        from remora.actors import dense_actor  # noqa: F401

    def _look_at(self, model: str) -> "ModelSpec":
        """And have numba's code at hand: half of what a standby would else do when it joins."""
        spec = super()._look_at(model)
        from remora.actors.routing_tap import counter_of
        from remora.comm import plan

        plan.warm()
        counter_of(spec).warm()
        return spec

    def _make(self, launch: DenseLaunch) -> "DenseActor":
        from remora.actors.dense_actor import DenseActor

        return DenseActor(launch, known=self._known())
