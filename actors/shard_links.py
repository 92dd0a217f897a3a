"""A dense rank's way to the expert shards: connections, dispatcher, room for its largest calls."""

from typing import Any

from remora.actors.dense_launch import DenseLaunch
from remora.actors.dense_model import DenseModel
from remora.actors.view_inbox import ViewInbox
from remora.comm.accounting import TrafficMeter
from remora.comm.dispatch import Dispatcher
from remora.comm.errors import ClusterError
from remora.comm.limits import ROWS_PER_CALL_MAX
from remora.comm.messages import Traffic
from remora.comm.peer import PeerLimits
from remora.comm.peers import PeerSet
from remora.comm.view import View, uncovered
from remora.comm.wire import combined_rows, dispatch_bytes


def connect_shards(
    peers: PeerSet,
    view: View,
    launch: DenseLaunch,
    before: Dispatcher | None,
    views: ViewInbox | None = None,
    or_none: bool = False,
) -> Dispatcher:
    """A dispatcher by `view`; `before` is the one that it takes the place of.

    Args:
        views: asked for a newer one when a call fails. None: there is none.
        or_none: also where an expert has no replica that can be reached: steps are held for it.

    Raises:
        ClusterError: an expert has no replica that can be reached.
    """
    if before is not None:
        for uid in before.suspects:  # a shard that hangs does not shake hands
            peers.disconnect(uid)
    dispatcher = Dispatcher(
        view=view,
        peers=peers,
        combine="ordered" if launch.exact else "presummed",
        deadline_s=launch.call_timeout_s,
        refresh_view=views.newest if views else None,
        hold=views.hold if views else None,
    )
    missing = sorted(set(view.placement.slots) - set(peers.live_uids))
    if missing and not or_none and uncovered(view.placement, set(peers.live_uids)):
        raise ClusterError(f"shards {missing} of view {view.epoch} cannot be reached")
    return dispatcher


def peer_limits(model: DenseModel, launch: DenseLaunch) -> PeerLimits:
    """Regions that hold the largest call and its answer; pages are touched on use only."""
    row_bytes = model.spec.hidden_size * model.dtype.itemsize
    num_rows = min(launch.max_tokens_per_step, ROWS_PER_CALL_MAX)
    num_pairs = num_rows * model.spec.top_k
    back = combined_rows(num_rows, num_pairs, presummed=not launch.exact)
    call_bytes = dispatch_bytes(num_rows, num_pairs, row_bytes) + back * row_bytes
    return PeerLimits(region_bytes=_round_up(call_bytes + 4096, 1 << 16))


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def traffic_of(meter: TrafficMeter, view: View, peers: PeerSet) -> Traffic:
    """What a rank's frames to the shards of `view` came to."""
    members = {m.uid: m for m in view.members if m.role == "shard"}
    local = [uid for uid, m in members.items() if m.endpoint.host == peers.self_host]
    return meter.read({uid: peers.counters.link(uid) for uid in members}, local)


def no_view(*_: Any) -> Any:
    """Experts of a rank that has no view."""
    raise ClusterError("no view has been adopted yet: shards are still loading")
