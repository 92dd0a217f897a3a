"""`remora scale`, `drain`, `placement import`, `cancel`: operations on what runs."""

import json
import secrets
import sys
from argparse import ArgumentParser, Namespace, _SubParsersAction
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remora.cluster.instances import Instance
from remora.comm.checked import parse_section
from remora.comm.errors import ClusterError, ConfigError

if TYPE_CHECKING:
    from remora.cluster.operation_request import DrainBody, PlaceBody, ScaleBody

OK = 0
Which = Callable[[str | None, str | None], tuple[str | None, Instance | None]]


def add_operations(commands: "_SubParsersAction[ArgumentParser]") -> list[ArgumentParser]:
    """The command lines; what they run is set by the caller."""
    scale = commands.add_parser(
        "scale", help="more or fewer expert shards and dense groups, while requests run"
    )
    scale.add_argument("name", nargs="?", help="deployment; may be left out if one runs")
    scale.add_argument("--shards", type=int, metavar="N", help="shards that there are to be")
    scale.add_argument(
        "--dense-groups", type=int, metavar="N", help="dense groups that there are to be"
    )
    scale.add_argument(
        "--retire",
        nargs="+",
        default=[],
        metavar="UID",
        help="shards and dense groups that are not to be among them",
    )
    drain = commands.add_parser(
        "drain", help="move experts off shards, requests off dense groups, and end those"
    )
    drain.add_argument("uids", nargs="+", metavar="UID", help="such as shard-1 or dense-0")
    drain.add_argument("--deployment", dest="name", metavar="NAME", help="if several run")
    for command in (scale, drain):
        add_how(command)
    return [scale, drain]


def add_cancel(commands: "_SubParsersAction[ArgumentParser]") -> ArgumentParser:
    """The command line of it; what it runs is set by the caller."""
    command = commands.add_parser(
        "cancel", help="undo an operation that runs, as far as it is not committed"
    )
    command.add_argument(
        "operation_id", nargs="?", metavar="ID", help="may be left out: the one that runs"
    )
    command.add_argument("--deployment", dest="name", metavar="NAME", help="if several run")
    command.add_argument("--ray-address", help="Ray cluster that it runs in")
    command.add_argument("--json", action="store_true", help="machine-readable output")
    return command


def add_how(command: ArgumentParser) -> None:
    """What every operation takes."""
    command.add_argument("--ray-address", help="Ray cluster that it runs in")
    command.add_argument(
        "--operation-id", metavar="ID", help="asking again with the same one does nothing twice"
    )
    command.add_argument("--json", action="store_true", help="machine-readable output")


def new_operation_id() -> str:
    """For who gives none."""
    return f"cli-{secrets.token_hex(4)}"


@contextmanager
def named_when_left(operation_id: str) -> Iterator[None]:
    """Errors of a cluster, and who is interrupted, say under which id to ask again."""
    try:
        yield
    except KeyboardInterrupt:
        how = "`remora status` tells of it, `remora cancel` undoes it"
        print(f"operation {operation_id} goes on: {how}", file=sys.stderr)
        raise
    except ClusterError as failure:
        raise ClusterError(f"{failure} (operation id {operation_id})") from failure


def body_of(options: Namespace) -> "ScaleBody | DrainBody | PlaceBody":
    """What a command line asks for.

    Raises:
        ConfigError: no number, a value that is not allowed, or a placement file that is none.
    """
    from remora.cluster.operation_request import DrainBody, PlaceBody, PlacementBody, ScaleBody
    from remora.cluster.placement_file import read_placement

    fields: dict[str, Any] = {"operation_id": options.operation_id or new_operation_id()}
    if hasattr(options, "shards"):
        if options.shards is None and options.dense_groups is None:
            raise ConfigError("scale what? say --shards N, --dense-groups N, or both")
        fields |= {"shards": options.shards, "dense_groups": options.dense_groups}
        fields["retire"] = tuple(options.retire)
        return parse_section(fields, ScaleBody, source="scale")
    if hasattr(options, "uids"):
        return parse_section(fields | {"uids": tuple(options.uids)}, DrainBody, source="drain")
    placement = PlacementBody.of(read_placement(Path(options.file)))
    return parse_section(fields | {"placement": placement}, PlaceBody, source="placement import")


def run_operation(name: str, instance: Instance | None, options: Namespace) -> int:
    """Have it done, and wait. Returns the exit status: 3 when there is no such deployment.

    Raises:
        ConfigError: it cannot be.
        ClusterError: another operation runs, or it failed; then what was is in force.
    """
    from remora.cluster.instances import missing
    from remora.cluster.manage_command import deployment_at, nothing_of
    from remora.cluster.operation_request import begin

    body = body_of(options)
    operation_id = body.operation_id
    address = instance.ray_address if instance else options.ray_address
    with deployment_at(name, address) as cluster:
        if cluster is None:
            return missing(nothing_of(name), options.json)
        with named_when_left(operation_id):
            operation = begin(cluster, body)
            while operation["outcome"] == "running":
                if not options.json:
                    print(f"{operation_id}: {progress_text(operation)}", file=sys.stderr)
                operation = cluster.wait(operation_id)
    if operation["outcome"] == "failed":
        raise ClusterError(f"operation {operation_id} failed: {operation['reason']}")
    print(json.dumps(operation) if options.json else operation_text(operation))
    return OK


def run_cancel(name: str, instance: Instance | None, options: Namespace) -> int:
    """Have an operation undone, and wait. Returns the exit status: 3 when there is no such
    deployment.

    Raises:
        ConfigError: none runs, or what runs cannot be undone.
        ClusterError: there is none of that id, or it was over first.
    """
    from remora.cluster.instances import missing
    from remora.cluster.manage_command import deployment_at, nothing_of

    address = instance.ray_address if instance else options.ray_address
    with deployment_at(name, address) as cluster:
        if cluster is None:
            return missing(nothing_of(name), options.json)
        operation_id = cluster.cancel(options.operation_id)["operation_id"]
        with named_when_left(operation_id):
            operation = cluster.over(operation_id)
    if operation["outcome"] == "done":
        raise ClusterError(f"operation {operation_id} was done before it could be undone")
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
