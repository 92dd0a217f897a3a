"""What a pod runs before it ends (preStop): its expert shards are drained, and it waits for that.

`python -m remora.cluster.node_drain DEPLOYMENT --within-s 540`, in the pod, finds the shards of
this Ray node and has `remora drain` move their experts elsewhere, until the coordinator calls them
safe to delete (issue 5, item 6; docs/kubernetes.md). Exit statuses are those of `remora`.
"""

import argparse
import json
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from remora.actors.launch import RAY_NAMESPACE
from remora.cluster.instances import MISSING
from remora.comm.errors import ClusterError, ConfigError, DeadlineError, RemoraError

OK, FAILED, USAGE = 0, 1, 2  # what `remora` ends with, beside MISSING
AGAIN_S = 2.0  # nothing tells a caller when somebody else's operation is over
ACTORS_MAX = 10_000  # of one node; Ray's API lists no more


class Clock(Protocol):
    """Of `time`: what waiting needs."""

    def monotonic(self) -> float:
        """Seconds."""

    def sleep(self, seconds: float, /) -> None:
        """Return after so many seconds."""


def drain_here(
    shards_here: Callable[[], Sequence[str]],
    drain: Callable[[Sequence[str], float], tuple[int, str]],
    *,
    within_s: float,
    clock: Clock,
) -> list[str]:
    """Have the shards of this node drained; ask again while another operation is in the way.

    Args:
        shards_here: uids of the shards that live on this node now.
        drain: asks for these uids to be drained and waits, so many seconds at most; returns exit
            status and output of `remora drain --json`.
        within_s: for all of it.
        clock: `time`.

    Returns:
        The uids that are safe to delete; none where there was nothing to drain.

    Raises:
        ConfigError: refused for good, such as experts that have no slot elsewhere.
        DeadlineError: not drained within `within_s`; with what the last attempt said.
        ClusterError: it is said to be done, and a shard is not safe to delete.
    """
    until = clock.monotonic() + within_s
    safe: list[str] = []
    while uids := [uid for uid in shards_here() if uid not in safe]:
        status, text = drain(uids, until - clock.monotonic())
        if status == MISSING:  # the deployment was stopped: nobody holds anything
            break
        if status == USAGE:
            raise ConfigError(f"{', '.join(uids)} cannot be drained: {text}")
        if status == OK:
            named = json.loads(text)["safe_to_delete"]
            if missing := sorted(set(uids) - set(named)):
                raise ClusterError(f"drained, but not safe to delete: {', '.join(missing)}")
            safe += uids  # Ray may list an actor a little longer than it lives
            continue
        if clock.monotonic() + AGAIN_S >= until:
            raise DeadlineError(f"{', '.join(uids)} not drained within {within_s:g} s: {text}")
        clock.sleep(AGAIN_S)
    return safe


def shard_uids(actor_names: Iterable[str], deployment: str) -> list[str]:
    """Uids of the expert shards among Ray's actor names, sorted; see `launch.actor_name`."""
    prefix = f"remora/{deployment}/shard-"
    found = {name.rpartition("/")[2].partition("#")[0] for name in actor_names if prefix in name}
    return sorted(found)


def drain_command(deployment: str, uids: Sequence[str], operation_id: str) -> list[str]:
    """The command line that drains `uids` of a deployment."""
    how = ["--deployment", deployment, "--operation-id", operation_id, "--json"]
    return ["remora", "drain", *uids, *how]


def main(argv: Sequence[str] | None = None) -> int:
    """Drain this node; returns the exit status and says on standard error what came of it."""
    parser = argparse.ArgumentParser(prog="remora.cluster.node_drain", description=__doc__)
    parser.add_argument("deployment", help="its name")
    parser.add_argument(
        "--within-s", type=float, default=540.0, help="below the pod's grace period (default 540)"
    )
    options = parser.parse_args(argv)
    from remora.cluster.manage_command import connected  # Ray, only where needed

    try:
        with connected(None) as found:
            if not found:
                raise ClusterError("no Ray cluster is to be found from here (RAY_ADDRESS)")
            safe = drain_here(
                lambda: shard_uids(_actors_here(), options.deployment),
                lambda uids, left_s: _drain(options.deployment, uids, left_s),
                within_s=options.within_s,
                clock=time,
            )
    except RemoraError as error:
        print(f"preStop: {error}", file=sys.stderr)
        return USAGE if isinstance(error, ConfigError) else FAILED
    print(
        f"preStop: safe to delete: {', '.join(safe) or 'there was nothing to drain'}",
        file=sys.stderr,
    )
    return OK


def _actors_here() -> list[str]:
    """Names of Remora's living actors on this Ray node, by Ray's state API."""
    import ray
    from ray.util.state import list_actors
    from ray.util.state.exception import RayStateApiException

    context = ray.get_runtime_context()
    try:
        actors = list_actors(
            address=context.gcs_address,  # else Ray looks for a cluster by itself, and finds others
            filters=[
                ("node_id", "=", context.get_node_id()),
                ("state", "=", "ALIVE"),
                ("ray_namespace", "=", RAY_NAMESPACE),
            ],
            limit=ACTORS_MAX,
        )
    except RayStateApiException as failure:
        raise ClusterError(f"Ray does not list its actors: {failure}") from failure
    return [actor.name for actor in actors if actor.name]


def _drain(deployment: str, uids: Sequence[str], left_s: float) -> tuple[int, str]:
    """Run `remora drain`; status and output."""
    command = drain_command(deployment, uids, f"pre-stop-{secrets.token_hex(4)}")
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=max(left_s, 0.1), check=False
        )
    except subprocess.TimeoutExpired:
        return FAILED, f"{' '.join(command)} was not over after {left_s:.0f} s"
    output = done.stdout if done.returncode == OK else done.stdout + done.stderr
    return done.returncode, output.strip()


if __name__ == "__main__":
    sys.exit(main())
