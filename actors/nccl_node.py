"""What a dense rank's process has of NCCL: its source, and in `dense-0` the conductor of all."""

from collections.abc import Callable

from remora.actors.dense_launch import DenseLaunch
from remora.actors.dense_model import DenseModel
from remora.actors.hardware import Hardware
from remora.actors.launch import Launch, host_label
from remora.actors.nccl_conductor import CONDUCTOR_UID, NcclConductor
from remora.actors.nccl_dense import NcclSource
from remora.actors.nccl_stream import ConductorStream
from remora.actors.view_inbox import ViewInbox
from remora.comm.view import View

BUILD_S = 2  # times a step's deadline, for all to make a communicator: they may be in a step
USE_S = 4  # the same, until the communicator of a view is in use


class NcclNode:
    """Made with the model; `stream` goes to the frame server.

    Args:
        launch: with `nccl`.
        hardware, model: of the rank.
        wake: has the engine's thread call `source.attend` soon.

    Attributes:
        views: on their way to the engine's thread; a step that waits takes them too.
    """

    def __init__(
        self, launch: DenseLaunch, hardware: Hardware, model: DenseModel, wake: Callable[[], None]
    ) -> None:
        assert launch.nccl is not None, f"{launch.uid} exchanges over sockets"
        self._use_s = USE_S * launch.nccl.step_timeout_s
        self.stream = ConductorStream(
            launch.uid,
            lambda message: self.source.take(message),
            lambda why: self.source.lose_conductor(why),
        )
        self.views = ViewInbox(
            lambda view: self.source.expect(view), launch.hold_s, lambda: self.source.look_up()
        )
        self.source = NcclSource(
            hardware,
            uid=launch.uid,
            incarnation=launch.incarnation,
            spec=model.spec,
            dtype=model.dtype,
            presummed=not launch.exact,
            launch=launch.nccl,
            self_host=host_label(),
            reply=self.stream.reply,
            wake=wake,
            views=self.views,
            adopt=self.adopt,
        )
        self._conductor = _conductor_of(launch, hardware)

    def adopt(self, view: View) -> None:
        """Exchange with the members of `view`, from the engine's thread. Steps go on by what there
        is until these have a communicator; the next one waits for it where there is none.

        Raises:
            ClusterError: `view` is known, and no step runs by it as yet.
        """
        if self._conductor is not None:
            self._conductor.adopt(view)
        self.source.see(view)

    def wait_for(self, view: View, or_none: bool) -> None:
        """Returns when the communicator of the members of `view` is in use, for all; where this is
        not the conductor's process, at once. From any other thread, after `adopt`.

        Args:
            or_none: also when it is clear that there is none.

        Raises:
            ClusterError: they do not come together.
        """
        if self._conductor is not None:
            self._conductor.wait_for(view, self._use_s, or_none=or_none)

    def beat(self) -> tuple[int, int]:
        """Signs of the engine's thread that it gets on in tickets, and 1 while there is something
        that is to move them. From any thread."""
        member = self.source.member
        return member.signs_total, int(member.is_behind)

    @property
    def shards(self) -> list[str]:
        """Shards of the communicator in use. From any thread."""
        roster = self.source.member.roster_in_use
        return [] if roster is None else list(roster.shard_uids)

    def close(self) -> None:
        """Ends the communicators, and tells all if this is the conductor's process."""
        if self._conductor is not None:
            self._conductor.close()
        self.source.close()


def _conductor_of(launch: Launch, hardware: Hardware) -> NcclConductor | None:
    if launch.uid != CONDUCTOR_UID or launch.nccl is None:
        return None
    conductor = NcclConductor(
        hardware.nccl,
        token=launch.token,
        self_host=host_label(),
        capacity_max=launch.nccl.capacity_max,
        build_s=BUILD_S * launch.nccl.step_timeout_s,
    )
    conductor.start()
    return conductor
