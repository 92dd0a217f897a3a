"""What is to leave hosts that are going away, and what is brought back afterwards. Pure.

Ray tells that a node is being drained, and until when (a spot instance that is taken back, a pod
that ends, `ray drain-node`). Members on such nodes retire by an operation of our own, which has all
the time that there is and starts as few new members as will do: others take what is there. What
is left at the end dies with its node, and is restored as anything that dies. Once the node is left,
and nothing hurries any more, a second operation brings back as many members as there were. Until
there is room for them it gives way to whatever else is asked for, and is begun again afterwards.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Final

from remora.actors.health_state import Life
from remora.cluster.operation import Drain, Operation, ScaleTo, is_dense

EVACUATE: Final = "evacuate-"
REPLACE: Final = "replace-"
TRIES: Final = 2  # a new member that dies while it starts is no reason to stay
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
    target = Drain(tuple(uid for uid, _ in lives), "needed", within_s)
    name = EVACUATE + "-".join(f"{uid}.{incarnation}" for uid, incarnation in lives)
    tries = tries_of(f"{name}:1")
    return next(((each, target) for each in tries if not is_tried(each)), None)


def tries_of(operation_id: str) -> list[str]:
    """Ids of all tries of the evacuation of which one has this id."""
    name = operation_id.rpartition(":")[0]
    return [f"{name}:{number + 1}" for number in range(TRIES)]


def next_replacement(
    history: Sequence[Operation],
    uids: Collection[str],
    is_tried: Callable[[str], bool],
) -> tuple[str, ScaleTo] | None:
    """The operation that brings back what evacuations have not replaced; None: nothing is due.

    What is missing is forgotten when somebody scales: he knows how many there are to be.

    Args:
        history: operations, the newest last.
        uids: members of the view.
        is_tried: as above.
    """
    missing = {False: 0, True: 0}  # shards, dense groups
    name, num_tries = "", 0
    for each in history:
        if each.gave_way:
            num_tries += 1
        elif isinstance(each.target, ScaleTo):
            if each.target.shards is not None:
                missing[False] = 0
            if each.target.dense_groups is not None:
                missing[True] = 0
        elif each.operation_id.startswith(EVACUATE) and each.outcome == "done":
            name, num_tries = REPLACE + each.operation_id.removeprefix(EVACUATE), 0
            for kind in missing:
                missing[kind] += _num(kind, each.retirees) - _num(kind, each.joiners)
    shards, groups = missing[False], missing[True]
    name += f":{num_tries + 1}" if num_tries else ""
    if not (shards or groups) or is_tried(name):
        return None
    return name, ScaleTo(
        _num(False, uids) + shards if shards else None,
        dense_groups=_num(True, uids) + groups if groups else None,
        gives_way=True,
    )


def _num(of_dense: bool, uids: Collection[str]) -> int:
    return sum(is_dense(uid) == of_dense for uid in uids)
