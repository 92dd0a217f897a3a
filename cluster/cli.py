"""The command `remora`: one configuration path, `--json` everywhere.

Exit statuses: 0 done; 1 the cluster failed, or a replay differs; 2 what was asked for cannot be
(configuration, model, weights), or the command line; 3 there is no such deployment; 141 nobody
reads the output any more.
"""

import argparse
import json
import os
import select
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from remora.cluster.autoscale_command import add_autoscale
from remora.cluster.config import RemoraConfig, load_config, parse_override, preset_names
from remora.cluster.instances import Instance, missing, use_token, which_instance
from remora.cluster.operation_command import (
    add_cancel,
    add_how,
    add_operations,
    run_cancel,
    run_operation,
)
from remora.cluster.rebalance_command import (
    add_rebalance,
    check_options,
    run_rebalance,
    run_trace,
)
from remora.cluster.sim_command import add_sim
from remora.cluster.trace_command import add_trace
from remora.comm.errors import ClusterError, ConfigError, RemoraError, UserError

OK, FAILED, USAGE = 0, 1, 2
UNREAD = 128 + 13  # what a shell says of a command that SIGPIPE ended

# flag -> key of the configuration, type, help
FLAGS: tuple[tuple[str, str, type, str], ...] = (
    ("--name", "name", str, "name of the deployment"),
    ("--served-model-name", "served_model_name", str, "what clients say in `model`"),
    ("--dtype", "dtype", str, "auto, float32 or bfloat16"),
    ("--numerics", "numerics", str, "fast or exact"),
    ("--dense-groups", "dense.groups", int, "dense groups"),
    ("--shards", "experts.shards", int, "expert shards"),
    ("--slots", "experts.slots", int, "experts that a shard has room for in each layer"),
    ("--placement", "experts.placement", str, "contiguous, latest, or a placement file"),
    ("--max-model-len", "dense.max_model_len", int, "tokens of the longest sequence"),
    ("--max-num-seqs", "dense.max_num_seqs", int, "sequences in one step"),
    ("--kv-cache-tokens", "dense.kv_cache_tokens", int, "tokens that one group's KV pages hold"),
    ("--host", "http.host", str, "address to listen on"),
    ("--port", "http.port", int, "port to listen on; 0: one that is free"),
    ("--api-keys-file", "http.api_keys_file", str, "accepted API keys, one a line"),
    ("--ray-address", "ray.address", str, "an existing Ray cluster, instead of one of our own"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = parser().parse_args(argv)
    try:
        status = _run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        if not _output_is_gone():
            raise
        return UNREAD
    return status


def _run(options: argparse.Namespace) -> int:
    try:
        status: int = options.run(options)
    except UserError as error:
        return _fail(options, error, USAGE)
    except (ClusterError, RemoraError) as error:
        return _fail(options, error, FAILED)
    except KeyboardInterrupt:
        return 130
    return status


def config_of(options: argparse.Namespace) -> RemoraConfig:
    """The configuration that the command line describes. Raises ConfigError."""
    overrides = {}
    if options.model is not None:
        overrides["model"] = options.model
    for _, key, _, _ in FLAGS:
        value = getattr(options, key, None)
        if value is not None:
            overrides[key] = value
    if options.eager:
        overrides["executor"] = "eager"
    overrides.update(parse_override(text) for text in options.set)
    if options.model is None and options.config is None and options.preset is None:
        raise ConfigError(
            "nothing to serve: give a MODEL, --config FILE or --preset"
            f" ({', '.join(preset_names())})"
        )
    return load_config(options.config, preset=options.preset, overrides=overrides)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="remora", description="Serve Mixture-of-Experts language models over expert shards."
    )
    top.add_argument("--version", action="version", version=f"remora {version('remora')}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="bring a model up and serve it until Ctrl-C")
    _add_config(serve)
    serve.set_defaults(run=_serve)
    plan = commands.add_parser("plan", help="placement, memory and bytes, without a cluster")
    _add_config(plan)
    plan.set_defaults(run=_plan)
    bench = commands.add_parser(
        "bench", help="how fast it decodes: MODEL in a cluster of its own, else one that runs"
    )
    _add_config(bench)
    _add_bench(bench)
    add_placement(commands)
    add_trace(commands)
    add_rebalance(commands).set_defaults(run=_rebalance)
    for command in add_operations(commands):
        command.set_defaults(run=_operate)
    add_cancel(commands).set_defaults(run=_cancel)
    add_autoscale(commands)
    add_sim(commands)
    for name, text in (
        ("status", "what a deployment is doing"),
        ("stop", "take a deployment down"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("name", nargs="?", help="deployment; may be left out if one runs")
        command.add_argument("--ray-address", help="Ray cluster that it runs in")
        command.add_argument("--json", action="store_true", help="machine-readable output")
        command.set_defaults(run=_manage, command=name)
        if name == "status":
            command.add_argument(
                "--watch", action="store_true", help="again and again, until Ctrl-C"
            )
    return top


def add_placement(commands: Any) -> None:
    """`remora placement export | import | check`."""
    placement = commands.add_parser("placement", help="which shard holds which experts, as a file")
    actions = placement.add_subparsers(required=True, metavar="ACTION")
    export = actions.add_parser("export", help="write the placement of a deployment that runs")
    export.add_argument("file", help="YAML file to write")
    export.add_argument("--deployment", metavar="NAME", help="may be left out if one runs")
    export.add_argument("--ray-address", help="Ray cluster that it runs in")
    apply = actions.add_parser("import", help="have a deployment that runs hold what a file says")
    apply.add_argument("file", help="YAML or JSON file")
    apply.add_argument("--deployment", dest="name", metavar="NAME", help="if several run")
    add_how(apply)
    apply.set_defaults(run=_operate)
    check = actions.add_parser("check", help="whether a file is a placement, and what is in it")
    check.add_argument("file", help="YAML or JSON file")
    check.add_argument("--model", help="checkpoint that it must fit")
    check.add_argument("--shards", type=_count, help="shards of the deployment that it must fit")
    check.add_argument("--slots", type=_count, help="slots of a shard in a layer (experts.slots)")
    for action, run in ((export, _placement_export), (check, _placement_check)):
        action.add_argument("--json", action="store_true", help="machine-readable output")
        action.set_defaults(run=run)


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="checkpoint directory or hub id")
    parser.add_argument("--config", metavar="FILE", help="YAML configuration")
    parser.add_argument("--preset", help=f"one of: {', '.join(preset_names())}")
    for flag, key, kind, text in FLAGS:
        parser.add_argument(flag, dest=key, type=kind, help=text, default=None)
    parser.add_argument("--eager", action="store_true", help="never compile (executor: eager)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any configuration key"
    )
    parser.add_argument("--json", action="store_true", help="machine-readable output")


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--deployment", metavar="NAME", help="one that runs, if there are several")
    parser.add_argument(
        "--phases", action="store_true", help="also where the time of a decode step goes"
    )
    parser.add_argument(
        "--batches", type=_counts, default=(1, 8, 32), help="sequences at once (default 1,8,32)"
    )
    parser.add_argument("--prompt-tokens", type=_count, default=32, help="default 32")
    parser.add_argument("--new-tokens", type=_several, default=65, help="default 65")
    parser.set_defaults(run=_bench)


def _count(text: str, least: int = 1) -> int:
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"{value}: at least {least}")
    return value


def _several(text: str) -> int:
    return _count(text, least=2)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_count(part) for part in text.split(","))


def _serve(options: argparse.Namespace) -> int:
    config = config_of(options)
    from remora.cluster.serve_command import run_serve  # Ray and torch, only where needed

    return run_serve(config, as_json=options.json)


def _plan(options: argparse.Namespace) -> int:
    config = config_of(options)
    from remora.cluster.memory_plan import plan_deployment, plan_text
    from remora.cluster.model_source import local_checkpoint

    config = config.model_copy(update={"model": local_checkpoint(config.model)})
    plan = plan_deployment(config)
    print(json.dumps(plan) if options.json else plan_text(plan))
    return OK


def _bench(options: argparse.Namespace) -> int:
    wanted = {
        "batches": options.batches,
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "phases": options.phases,
    }
    address = getattr(options, "ray.address")
    if any((options.model, options.config, options.preset)):
        config = config_of(options)
        if address is not None:
            raise ConfigError(
                "bench MODEL starts a Ray cluster of its own; to measure a deployment that runs in"
                f" {address}, leave the model out and say --deployment NAME"
            )
        if options.deployment is not None:
            raise ConfigError(
                f"--deployment {options.deployment} measures one that runs: leave MODEL, --config"
                " and --preset out"
            )
        from remora.cluster.bench_command import BenchPlan, bench_own

        return bench_own(config, BenchPlan(**wanted), as_json=options.json)
    own = [(flag, key) for flag, key, _, _ in FLAGS if key != "ray.address"]
    said = [flag for flag, key in own if getattr(options, key) is not None]
    said += [f"--{name}" for name in ("eager", "set") if getattr(options, name)]
    if said:
        raise ConfigError(
            f"{', '.join(said)}: only with a MODEL, --config or --preset; a deployment that runs is"
            " measured as it is"
        )
    name, instance = _which(options.deployment, address)
    if name is None:
        raise ConfigError("nothing to measure: give a MODEL, or start a deployment (remora serve)")
    from remora.cluster.bench_command import BenchPlan, bench_running

    return bench_running(name, instance, address, BenchPlan(**wanted), as_json=options.json)


def _manage(options: argparse.Namespace) -> int:
    name, instance = _which(options.name, options.ray_address)
    if name is None:
        return missing("no deployment runs on this machine", options.json)
    from remora.cluster import manage_command  # imports Ray: the token must be in place

    if options.command == "stop":
        return manage_command.run_stop(name, instance, options.ray_address, as_json=options.json)
    return manage_command.run_status(
        name, instance, options.ray_address, as_json=options.json, watch=options.watch
    )


def _operate(options: argparse.Namespace) -> int:
    return _on_deployment(options, run_operation)


def _cancel(options: argparse.Namespace) -> int:
    return _on_deployment(options, run_cancel)


def _rebalance(options: argparse.Namespace) -> int:
    check_options(options)
    return run_trace(options) if options.trace else _on_deployment(options, run_rebalance)


def _on_deployment(options: argparse.Namespace, run: Callable[..., int]) -> int:
    """What a command does to the deployment that it means."""
    name, instance = _which(options.name, options.ray_address)
    if name is None:
        return missing("no deployment runs on this machine", options.json)
    return run(name, instance, options)


def _placement_export(options: argparse.Namespace) -> int:
    name, instance = _which(options.deployment, options.ray_address)
    if name is None:
        return missing("no deployment runs on this machine", options.json)
    from remora.cluster.placement_command import run_export

    return run_export(name, instance, options.ray_address, Path(options.file), as_json=options.json)


def _placement_check(options: argparse.Namespace) -> int:
    from remora.cluster.placement_command import run_check

    return run_check(
        Path(options.file),
        model=options.model,
        shards=options.shards,
        slots=options.slots,
        as_json=options.json,
    )


def _which(name: str | None, ray_address: str | None) -> tuple[str | None, Instance | None]:
    """The deployment that is meant, with the way into its Ray cluster put in place."""
    if ray_address is not None:
        if name is None:
            raise ConfigError("with --ray-address the name of the deployment is needed, too")
        return name, None
    name, instance = which_instance(name)
    if instance is not None:
        use_token(instance)
    return name, instance


def _output_is_gone() -> bool:
    """Whether it is standard output that nobody reads (`| head`); it is thrown away then, or the
    interpreter would try again to write it when it ends."""
    look = select.poll()
    look.register(sys.stdout, 0)
    if not any(flags & select.POLLERR for _, flags in look.poll(0)):
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
    return True


def _fail(options: argparse.Namespace, error: Exception, status: int) -> int:
    if getattr(options, "json", False):
        fields: dict[str, Any] = {"error": {"type": type(error).__name__, "message": str(error)}}
        print(json.dumps(fields))
    else:
        print(f"remora: {error}", file=sys.stderr)
    return status
