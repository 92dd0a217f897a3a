"""What is to leave hosts that are going away, and how often that is tried. Pure.

Ray tells that a node is being drained, and until when (a spot instance that is taken back, a pod
that ends, `ray drain-node`). Members on such nodes retire by an operation of our own: at first
with as many new ones elsewhere; where those find no place in time, with as few as are needed. What
is left then dies with its node, and is restored as anything that dies.
"""

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from typing import Final

from remora.actors.health_state import Life
from remora.cluster.operation import Drain

PREFIX: Final = "evacuate-"
WITHIN_S_MIN: Final = 1.0


def next_evacuation(
    draining: Mapping[str, float | None],
    homes: Mapping[Life, AbstractSet[str]],
    is_tried: Callable[[str], bool],
) -> tuple[str, Drain] | None:
    """The operation that is due; None: nothing is to leave, or all has been tried.

    Args:
        draining: nodes that go away, and the seconds that they have left; None: no deadline.
        homes: nodes of each member of the view (of all ranks of a dense group).
        is_tried: whether an operation of this id is known, or was refused.
    """
    lives = sorted(life for life, nodes in homes.items() if nodes & draining.keys())
    if not lives:
        return None
    nodes = {node for life in lives for node in homes[life]} & draining.keys()
    left_s = [each for node in nodes if (each := draining[node]) is not None]
    within_s = max(WITHIN_S_MIN, min(left_s)) if left_s else None
    uids = tuple(uid for uid, _ in lives)
    name = PREFIX + "-".join(f"{uid}.{incarnation}" for uid, incarnation in lives)
    if not is_tried(f"{name}:1"):
        # the second try needs half of it, should new members find no place
        within_s = within_s / 2 if within_s is not None else None
        return f"{name}:1", Drain(uids, "all", within_s)
    if not is_tried(f"{name}:2"):
        return f"{name}:2", Drain(uids, "needed", within_s)
    return None
