"""`remora scale`, `drain` and `placement import`: operations on a deployment that runs."""

import json
import secrets
import sys
from argparse import ArgumentParser, Namespace, _SubParsersAction
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remora.cluster.instances import Instance
from remora.comm.errors import ClusterError, ConfigError

if TYPE_CHECKING:
    from remora.cluster.operation import Target

OK = 0
Which = Callable[[str | None, str | None], tuple[str | None, Instance | None]]


def add_operations(commands: "_SubParsersAction[ArgumentParser]") -> list[ArgumentParser]:
    """The command lines; what they run is set by the caller."""
    scale = commands.add_parser("scale", help="more or fewer expert shards, while requests run")
    scale.add_argument("name", nargs="?", help="deployment; may be left out if one runs")
    scale.add_argument("--shards", type=int, required=True, help="shards that there are to be")
    scale.add_argument(
        "--retire",
        nargs="+",
        default=[],
        metavar="UID",
        help="shards that are not to be among them",
    )
    drain = commands.add_parser("drain", help="move all experts off shards, and end those")
    drain.add_argument("uids", nargs="+", metavar="UID", help="such as shard-1")
    drain.add_argument("--deployment", dest="name", metavar="NAME", help="if several run")
    for command in (scale, drain):
        add_how(command)
    return [scale, drain]


def add_how(command: ArgumentParser) -> None:
    """What every operation takes."""
    command.add_argument("--ray-address", help="Ray cluster that it runs in")
    command.add_argument(
        "--operation-id", metavar="ID", help="asking again with the same one does nothing twice"
    )
    command.add_argument("--json", action="store_true", help="machine-readable output")


def target_of(options: Namespace) -> "Target":
    """What a command line asks for.

    Raises:
        ConfigError: a placement file that is none.
    """
    from remora.cluster.operation import DrainShards, PlaceAs, ScaleTo
    from remora.cluster.placement_file import read_placement

    if hasattr(options, "shards"):
        return ScaleTo(options.shards, tuple(options.retire))
    if hasattr(options, "uids"):
        return DrainShards(tuple(options.uids))
    return PlaceAs(read_placement(Path(options.file)).slots)


def run_operation(name: str, instance: Instance | None, options: Namespace) -> int:
    """Have it done, and wait. Returns the exit status: 3 when there is no such deployment.

    Raises:
        ConfigError: it cannot be.
        ClusterError: another operation runs, or it failed; then what was is in force.
    """
    from remora.cluster.bootstrap import find_cluster
    from remora.cluster.instances import missing
    from remora.cluster.manage_command import connected, nothing_of

    target = target_of(options)
    operation_id = options.operation_id or f"cli-{secrets.token_hex(4)}"
    with connected(instance.ray_address if instance else options.ray_address) as found:
        cluster = find_cluster(name) if found else None
        if cluster is None:
            return missing(nothing_of(name), options.json)
        try:
            operation = cluster.request(operation_id, target)
            while operation["outcome"] == "running":
                if not options.json:
                    print(f"{operation_id}: {progress_text(operation)}", file=sys.stderr)
                operation = cluster.wait(operation_id)
        except ConfigError:
            raise
        except ClusterError as failure:
            raise ClusterError(f"{failure} (operation id {operation_id})") from failure
    if operation["outcome"] == "failed":
        raise ClusterError(f"operation {operation_id} failed: {operation['reason']}")
    print(json.dumps(operation) if options.json else operation_text(operation))
    return OK


def progress_text(operation: dict[str, Any]) -> str:
    """Where an operation stands, in a few words."""
    rounds = f", round {operation['round'] + 1} of {operation['num_rounds']}"
    several = rounds if operation["num_rounds"] > 1 else ""
    return f"{operation['kind']}: {operation['step']}{several}"


def operation_text(operation: dict[str, Any]) -> str:
    """One operation for people."""
    line = f"{operation['operation_id']}: {operation['kind']} {operation['outcome']}"
    if operation["outcome"] == "running":
        return f"{line}, step {progress_text(operation).partition(': ')[2]}"
    line += f" in {operation['ended_s']:.1f} s, {operation['moved']} experts loaded"
    if operation["safe_to_delete"]:
        line += f", safe to delete: {', '.join(operation['safe_to_delete'])}"
    return f"{line} ({operation['reason']})" if operation["reason"] else line
