"""What a pod runs before it ends (preStop): what is on its node leaves it, and it waits for that.

`python -m remora.cluster.node_drain DEPLOYMENT --within-s 540`, in the pod, tells Ray that this
node goes away, so that nothing new is placed on it. The deployment's coordinator sees that and
moves what is there elsewhere, shards and dense groups (`evacuation.py`, docs/elasticity.md); this
waits until nothing is left (issue 5, item 6; docs/kubernetes.md).

Ray's head may be away just then: it was on the same machine, which is drained, and comes back on
another one; or all of the Ray cluster is being deleted, and it does not. So long as the first takes
this waits for it, and then lets the pod end.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

from remora.comm.errors import ClusterError, DeadlineError, RemoraError

OK, FAILED = 0, 1
LOOK_S = 1.0  # nothing tells a caller when the coordinator is through
WHY = "its pod ends"
HEAD_S = 120.0  # that Ray's head may be away; KubeRay has a new one up in less, as a rule
# How long a process of Ray looks for its head before it ends itself. KubeRay sets 600 s in pods.
RECONNECT_ENV = "RAY_gcs_rpc_server_reconnect_timeout_s"


class Clock(Protocol):
    """Of `time`: what waiting needs."""

    def monotonic(self) -> float:
        """Seconds."""

    def sleep(self, seconds: float, /) -> None:
        """Return after so many seconds."""


def wait_until_left(
    node: str,
    look: Callable[[], Mapping[str, Any] | None],
    *,
    within_s: float,
    clock: Clock,
) -> list[str]:
    """Wait until nothing is left on a node that Ray drains.

    Args:
        node: its id.
        look: what the coordinator knows of such nodes (`NodeWatch.status`); None: there is no such
            deployment, or no such node, any more. Raises ClusterError: it does not tell just now.
        within_s: the longest wait.
        clock: `time`.

    Returns:
        The uids that were there and have left.

    Raises:
        DeadlineError: something is left after `within_s`.
        ClusterError: something will stay; with the reason, where there is one.
    """
    until = clock.monotonic() + within_s
    seen: set[str] = set()
    is_known, last = False, "the coordinator did not look"
    while True:
        try:
            told = look()
        except ClusterError as silent:  # it is being started again
            last = str(silent)
        else:
            here = None if told is None else told["draining"].get(node)
            if told is None or here == [] or (here is None and is_known):  # the node has ended
                return sorted(seen)
            if here is not None:
                is_known, last = True, f"{', '.join(here)} are there"
                seen.update(here)
                if stay := sorted(set(here) & set(told["stay"])):
                    whys = dict.fromkeys(told["refused"].values())  # once for all tries
                    why = "; ".join(whys) or "see `remora status --json`"
                    raise ClusterError(f"{', '.join(stay)} cannot leave: {why}")
        if clock.monotonic() + LOOK_S >= until:
            raise DeadlineError(f"not left within {within_s:g} s: {last}")
        clock.sleep(LOOK_S)


def once_answered(ask: Callable[[], bool], *, within_s: float, clock: Clock) -> bool:
    """What `ask` gives, as soon as it gives anything.

    Raises:
        ClusterError: it has raised that for so long.
    """
    until = clock.monotonic() + within_s
    while True:
        try:
            return ask()
        except ClusterError:
            if clock.monotonic() + LOOK_S >= until:
                raise
        clock.sleep(LOOK_S)


def main(argv: Sequence[str] | None = None) -> int:
    """Have this node left; returns the exit status and says on standard error what came of it."""
    parser = argparse.ArgumentParser(prog="remora.cluster.node_drain", description=__doc__)
    parser.add_argument("deployment", help="its name")
    parser.add_argument(
        "--within-s", type=float, default=540.0, help="below the pod's grace period (default 540)"
    )
    options = parser.parse_args(argv)
    until = time.monotonic() + options.within_s
    os.environ[RECONNECT_ENV] = f"{HEAD_S:g}"  # before Ray is imported: it looks once
    from remora.actors.launch import host_label  # Ray, only where needed
    from remora.cluster.manage_command import connected
    from remora.cluster.node_watch import RayNodes

    try:
        with ExitStack() as stack:
            if not once_answered(
                lambda: stack.enter_context(connected(None)),
                within_s=min(HEAD_S, options.within_s),
                clock=time,
            ):
                raise ClusterError("no Ray cluster is to be found from here (RAY_ADDRESS)")
            node, nodes = host_label(), RayNodes()
            left_s = until - time.monotonic()
            nodes.drain(node, WHY, time.time() + left_s)
            left = wait_until_left(
                node,  # Ray ends it once nothing is there, which may be at once
                lambda: _known_of_nodes(options.deployment) if nodes.is_alive(node) else None,
                within_s=left_s,
                clock=time,
            )
    except RemoraError as error:
        print(f"preStop: {error}", file=sys.stderr)
        return FAILED
    print(f"preStop: {', '.join(left) or 'nothing'} left this node", file=sys.stderr)
    return OK


def _known_of_nodes(deployment: str) -> Mapping[str, Any] | None:
    from remora.cluster.bootstrap import cluster_status, find_cluster

    if find_cluster(deployment) is None:
        return None
    nodes: Mapping[str, Any] | None = (cluster_status(deployment)["health"] or {}).get("nodes")
    if nodes is None:  # it starts, or its coordinator does
        raise ClusterError(f"deployment {deployment!r} does not serve")
    return nodes


if __name__ == "__main__":
    sys.exit(main())
