"""`remora rebalance`: what a better placement would be, of a deployment or of recorded traffic."""

import json
from argparse import ArgumentParser, Namespace, _SubParsersAction
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remora.cluster.instances import Instance
from remora.cluster.operation_command import add_how, named_when_left, new_operation_id
from remora.comm.checked import parse_section
from remora.comm.errors import ConfigError

if TYPE_CHECKING:
    from remora.actors.model_spec import ModelSpec
    from remora.comm.topology import Topology
    from remora.comm.trace import Trace
    from remora.comm.view import Placement

OK, FAILED = 0, 1
HOSTS, SHARDS_PER_HOST = 2, 1  # of a trace, unless something else is said
_OF_DEPLOYMENT = ("name", "ray_address", "operation_id")
_OF_TRACE = ("model", "hosts", "shards_per_host", "slots", "placement", "output")


def add_rebalance(commands: "_SubParsersAction[ArgumentParser]") -> ArgumentParser:
    """The command line of it; what it runs is set by the caller."""
    command = commands.add_parser(
        "rebalance", help="plan a better placement; without --dry-run, move experts accordingly"
    )
    command.add_argument("name", nargs="?", help="deployment; may be left out if one runs")
    command.add_argument("--dry-run", action="store_true", help="show it, change nothing")
    add_how(command)
    command.add_argument(
        "--trace", type=Path, metavar="FILE", help="plan from a routing trace; no deployment needed"
    )
    trace = command.add_argument_group("with --trace")
    trace.add_argument("--model", help="checkpoint; default: the one that the trace names")
    trace.add_argument("--hosts", type=int, help=f"hosts (default {HOSTS})")
    trace.add_argument("--shards-per-host", type=int, help=f"default {SHARDS_PER_HOST}")
    trace.add_argument("--slots", type=int, help="of a shard in a layer; default: no spare ones")
    trace.add_argument("--placement", type=Path, help="the one in force; default: contiguous runs")
    trace.add_argument("--output", type=Path, metavar="FILE", help="where the new one is written")
    return command


def check_options(options: Namespace) -> None:
    """Raises ConfigError where an option is of no use: one of a trace without `--trace` would be
    dropped, and experts of what serves would move."""
    from_trace = options.trace is not None
    names = _OF_DEPLOYMENT if from_trace else _OF_TRACE
    wrong = [name for name in names if getattr(options, name) is not None]
    if wrong:
        named = ["NAME" if name == "name" else f"--{name.replace('_', '-')}" for name in wrong]
        why = "no deployment is asked with --trace" if from_trace else "of use with --trace alone"
        raise ConfigError(f"{', '.join(named)}: {why}")
    if options.dry_run and options.output is not None:
        raise ConfigError("--output: --dry-run writes nothing")


def run_rebalance(name: str, instance: Instance | None, options: Namespace) -> int:
    """A round on a running deployment. Returns the exit status: 3 when there is none, 1 when what
    it decided could not be done.

    Raises:
        ClusterError: the router has no plan to give.
        ConfigError: `router.state_dir` cannot be written.
    """
    from remora.cluster.instances import missing
    from remora.cluster.manage_command import deployment_at, nothing_of
    from remora.cluster.operation_request import RebalanceBody

    operation_id = options.operation_id or new_operation_id()
    body = parse_section(
        {"operation_id": operation_id, "dry_run": options.dry_run},
        RebalanceBody,
        source="rebalance",
    )
    address = instance.ray_address if instance else options.ray_address
    with deployment_at(name, address) as cluster:
        if cluster is None:
            return missing(nothing_of(name), options.json)
        with nullcontext() if body.dry_run else named_when_left(operation_id):
            report = cluster.rebalance(operation_id, dry_run=body.dry_run)
            if "operation" in report:
                report["operation"] = operation = cluster.over(operation_id)
                if operation["outcome"] == "failed":
                    report["not_applied"] = operation["reason"]
                else:
                    report["applied_epoch"] = cluster.view().epoch
    return _print(report, options.json)


def run_trace(options: Namespace) -> int:
    """A round on recorded traffic, against a placement of a cluster that need not exist.

    Raises:
        TraceError: no trace.
        ConfigError: a topology without room, a placement that does not fit, no checkpoint.
    """
    from remora.actors.model_spec import inspect_model, resolve_dtype
    from remora.actors.router_statistics import plan_from
    from remora.autoscale.rebalance import RebalancePolicy, objective_of
    from remora.cluster.placement_file import write_placement
    from remora.cluster.rebalance_report import move_sizes, round_of
    from remora.comm.bundles import count_bundles
    from remora.comm.trace_reader import read_trace

    if not options.dry_run and options.output is None:
        raise ConfigError("with --trace, say --dry-run or where to write: --output FILE")
    trace = read_trace(options.trace)
    model = options.model or trace.header.model
    if not Path(model).is_dir():
        named = "" if options.model else "the trace names "
        raise ConfigError(f"--model: {named}{model!r}, no folder that is here: say where it is")
    spec = inspect_model(model)
    _check_trace(trace, spec, model)
    topology, placement = _situation(options, trace)
    source_T = _sources(trace, topology)
    layers = [count_bundles(ids_TK, source_T) for ids_TK in trace.experts_LTK]
    policy, sizes = RebalancePolicy(), move_sizes(spec, resolve_dtype(spec, "auto"))
    outcome = plan_from(layers, placement, topology, 0, objective_of(policy, **sizes))
    found = round_of(policy, outcome, placement, **sizes)
    is_worth = found.proposal.gain_ratio >= policy.gain_min and bool(found.proposal.layers)
    report: dict[str, Any] = {
        "epoch": 0,
        **found.fields(),
        "verdict": "move" if is_worth else "keep",
        "reason": f"gain {found.proposal.gain_ratio:.1%}, {policy.gain_min:.1%} is needed",
        "moves": [asdict(move) for move in found.moves],
    }
    if not options.dry_run:
        write_placement(options.output, found.placement)
        report |= {"written": str(options.output), "trace": str(options.trace)}
    return _print(report, options.json)


def _check_trace(trace: "Trace", spec: "ModelSpec", model: str) -> None:
    """Raises ConfigError: nothing is in it, or it is of another model than `model`."""
    header = trace.header
    if not trace.num_tokens:
        raise ConfigError("--trace: no tokens are in it to plan from")
    if (header.num_experts, header.moe_layers) != (spec.num_experts, spec.moe_layers):
        raise ConfigError(
            f"--model {model}: {spec.num_experts} experts in {len(spec.moe_layers)} MoE layers; the"
            f" trace is of a model of {header.num_experts} in {len(header.moe_layers)}"
        )


def _situation(options: Namespace, trace: "Trace") -> "tuple[Topology, Placement]":
    """The cluster of the command line, and what its shards hold."""
    from remora.cluster.placement_file import check_fits, read_placement, whole_placement
    from remora.comm.topology import uniform_topology
    from remora.comm.view import contiguous_placement

    header = trace.header
    hosts = HOSTS if options.hosts is None else options.hosts
    per_host = SHARDS_PER_HOST if options.shards_per_host is None else options.shards_per_host
    shards = hosts * per_host
    if hosts < 1 or per_host < 1 or shards > header.num_experts:
        raise ConfigError(
            f"--hosts {hosts} x --shards-per-host {per_host}:"
            f" 1 to {header.num_experts} shards are possible"
        )
    slots = -(-header.num_experts // shards) if options.slots is None else options.slots
    topology = uniform_topology(num_hosts=hosts, shards_per_host=per_host, slots=slots)
    try:
        placement = contiguous_placement(
            num_experts=header.num_experts,
            moe_layers=header.moe_layers,
            shard_uids=topology.uids,
            slots=slots,
        )
    except ValueError as wrong:
        raise ConfigError(f"--slots {slots}: {wrong}") from None
    if options.placement is None:
        return topology, placement
    placement = read_placement(options.placement)
    check_fits(
        placement,
        source=str(options.placement),
        num_experts=header.num_experts,
        moe_layers=header.moe_layers,
        shard_uids=topology.uids,
        slots=slots,
    )
    return topology, whole_placement(placement, topology.uids)


def _sources(trace: "Trace", topology: "Topology") -> Any:
    """Hosts of the tokens: as recorded where they were several, else requests in turn."""
    if len(trace.sources) > 1:
        return trace.source_T % topology.num_hosts
    return trace.request_T % topology.num_hosts


def _print(report: dict[str, Any], as_json: bool) -> int:
    from remora.cluster.rebalance_report import report_text

    print(json.dumps(report) if as_json else report_text(report))
    return FAILED if "not_applied" in report else OK
