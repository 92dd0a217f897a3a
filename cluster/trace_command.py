"""`remora trace record` and `remora trace info`: routing traces of texts, or of a deployment."""

import json
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace, _SubParsersAction
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from remora.cluster.instances import missing, use_token, which_instance
from remora.cluster.model_source import local_checkpoint
from remora.comm.errors import ConfigError
from remora.comm.trace import DECODE, LABELS_MAX
from remora.comm.trace_reader import TraceReader

OK = 0
TOKENS_MAX = 10_000_000
WINDOW = 256
SECONDS = 60.0
SECONDS_MAX = 86_400.0
CLEAR_LINE = "\r\x1b[K"  # of a terminal
_OF_TEXTS = ("weights", "domain", "window")
_OF_DEPLOYMENT = ("deployment", "ray_address", "seconds")


def add_trace(commands: "_SubParsersAction[ArgumentParser]") -> None:
    """`trace` and what comes behind it."""
    trace = commands.add_parser("trace", help="routing traces: record and look at them")
    actions = trace.add_subparsers(required=True, metavar="ACTION")
    record = actions.add_parser(
        "record", help="write which experts tokens choose: of texts, or of a deployment that runs"
    )
    record.add_argument("checkpoint", nargs="?", help="checkpoint directory or hub id, with --text")
    record.add_argument("--deployment", metavar="NAME", help="one that runs, if there are several")
    record.add_argument("--ray-address", help="Ray cluster that it runs in")
    record.add_argument(
        "--seconds", type=float, help=f"of a deployment, at most (default {SECONDS:g})"
    )
    record.add_argument(
        "--output", "-o", type=Path, required=True, metavar="FILE", help="where it is written"
    )
    record.add_argument(
        "--force", action="store_true", help="replace FILE, once the new one is whole"
    )
    record.add_argument("--max-tokens", type=_positive, default=100_000, help="default 100,000")
    record.add_argument("--weights", action="store_true", help="gate weights too (texts only)")
    record.add_argument(
        "--text", action="append", type=Path, default=[], metavar="FILE",
        help=".jsonl with a string or {text: ...} a line, or one plain text; may be repeated",
    )  # fmt: skip
    record.add_argument(
        "--domain", action="append", default=[], metavar="NAME",
        help="label of the --text of the same rank; default: its name up to the first dot",
    )  # fmt: skip
    record.add_argument(
        "--window", type=_positive, help=f"tokens of a text read at once (default {WINDOW})"
    )
    record.add_argument("--json", action="store_true", help="machine-readable output")
    record.set_defaults(run=_record)
    info = actions.add_parser("info", help="what a trace holds")
    info.add_argument("file", type=Path)
    info.add_argument("--json", action="store_true", help="machine-readable output")
    info.set_defaults(run=_info)


def _positive(text: str) -> int:
    value = int(text)
    if not 1 <= value <= TOKENS_MAX:
        raise ArgumentTypeError(f"{value}: 1 to {TOKENS_MAX}")
    return value


def _record(options: Namespace) -> int:
    if options.checkpoint is None and not options.text:
        return _record_deployment(options)
    if options.checkpoint is None or not options.text:
        raise ConfigError("a CHECKPOINT and --text FILE come together; neither: a deployment")
    return _record_texts(options)


def _refuse(options: Namespace, names: Sequence[str], why: str) -> None:
    """Raises ConfigError where an option was given that would be dropped."""
    wrong = [
        f"--{n.replace('_', '-')}" for n in names if getattr(options, n) not in (None, False, [])
    ]
    if wrong:
        raise ConfigError(f"{', '.join(wrong)}: {why}")


def _record_deployment(options: Namespace) -> int:
    _refuse(options, _OF_TEXTS, "of use with a CHECKPOINT and --text alone")
    seconds = SECONDS if options.seconds is None else options.seconds
    if not 0 < seconds <= SECONDS_MAX:
        raise ConfigError(f"--seconds {seconds:g}: more than 0, at most {SECONDS_MAX:g}")
    name, instance = options.deployment, None
    if options.ray_address is None:
        name, instance = which_instance(name)
        if name is None:
            return missing("no deployment runs on this machine", options.json)
    elif name is None:
        raise ConfigError("with --ray-address, --deployment NAME is needed")
    if instance is not None:
        use_token(instance)
    from remora.cluster.trace_live import record_deployment  # imports Ray: the token is in place

    address = instance.ray_address if instance else options.ray_address
    changes: list[str] = []

    def say(change: str) -> None:
        changes.append(change)
        if not options.json:
            print(f"{CLEAR_LINE if sys.stderr.isatty() else ''}{change}", file=sys.stderr)

    left_out = record_deployment(
        name,
        address,
        options.output,
        tokens_max=options.max_tokens,
        seconds=seconds,
        overwrite=options.force,
        progress=_show_progress,
        say=say,
    )
    if left_out is None:
        return missing(f"there is no deployment {name!r} here", options.json)
    return _tell(options, {"tokens_left_out": left_out, "changes": changes})


def _record_texts(options: Namespace) -> int:
    _refuse(options, _OF_DEPLOYMENT, "no deployment is recorded with a CHECKPOINT and --text")
    if options.domain and len(options.domain) != len(options.text):
        raise ConfigError(
            f"{len(options.domain)} times --domain for {len(options.text)} times --text"
        )
    names = options.domain or [path.name.partition(".")[0] for path in options.text]
    if len(names) > LABELS_MAX:
        raise ConfigError(f"{len(names)} texts, at most {LABELS_MAX}")
    from remora.actors.trace_offline import RecordPlan, TextFile, record_texts  # torch

    plan = RecordPlan(
        window=options.window or WINDOW,
        tokens_max=options.max_tokens,
        with_weights=options.weights,
    )
    files = [TextFile(path=p, domain=n) for p, n in zip(options.text, names, strict=True)]
    record_texts(
        local_checkpoint(options.checkpoint),
        files,
        options.output,
        plan,
        overwrite=options.force,
        progress=_show_progress,
    )
    return _tell(options)


def _show_progress(num_tokens: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{num_tokens:,} tokens", end="", file=sys.stderr, flush=True)


def _tell(options: Namespace, more: dict[str, Any] | None = None) -> int:
    found = trace_info(options.output) | (more or {})
    print(json.dumps(found) if options.json else info_text(found))
    return OK


def _info(options: Namespace) -> int:
    found = trace_info(options.file)
    print(json.dumps(found) if options.json else info_text(found))
    return OK


def trace_info(path: Path) -> dict[str, Any]:
    """What a trace holds, as plain data; one block in memory.

    Raises:
        TraceError: as `TraceReader`.
    """
    reader = TraceReader(path)
    header = reader.header
    tokens_by_domain: dict[str, int] = {}
    tokens_by_source: dict[str, int] = {}
    load_LE = np.zeros((len(header.moe_layers), header.num_experts))
    num_tokens = num_decode = 0
    requests: set[int] = set()
    for block in reader.blocks():
        num_tokens += block.num_tokens
        num_decode += int((block.phase_T == DECODE).sum())
        requests.update(np.unique(block.request_T).tolist())
        for label_T, names, totals in (
            (block.domain_T, block.domains, tokens_by_domain),
            (block.source_T, block.sources, tokens_by_source),
        ):
            count = np.bincount(label_T[label_T >= 0], minlength=len(names))
            for name, number in zip(names, count.tolist(), strict=True):
                if number:
                    totals[name] = totals.get(name, 0) + number
        for layer, ids_TK in enumerate(block.experts_LTK):
            load_LE[layer] += np.bincount(ids_TK[ids_TK >= 0], minlength=header.num_experts)
    load = (load_LE.max(axis=1) / np.maximum(load_LE.mean(axis=1), 1e-12)).tolist()
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "model": header.model,
        "note": header.note,
        "whole": reader.is_whole,
        "tokens": num_tokens,
        "decode_tokens": num_decode,
        "requests": len(requests),
        "num_experts": header.num_experts,
        "top_k": header.top_k,
        "moe_layers": list(header.moe_layers),
        "has_token_ids": header.vocab_size > 0,
        "has_weights": header.has_weights,
        "domains": tokens_by_domain,
        "sources": tokens_by_source,
        "expert_load_max_over_mean": [round(value, 3) for value in load],
    }


def info_text(found: dict[str, Any]) -> str:
    """The same for people."""
    tokens, size = found["tokens"], found["bytes"]
    loads = found["expert_load_max_over_mean"]
    lines = [
        f"{found['file']}: {tokens:,} tokens of {found['requests']:,} requests"
        f" ({found['decode_tokens']:,} decoded), {size:,} bytes"
        + (f" ({size / tokens:.1f} a token)" if tokens else ""),
        f"  {found['model']}: top {found['top_k']} of {found['num_experts']} experts in"
        f" {len(loads)} MoE layers; token ids {_yes(found['has_token_ids'])}, gate weights"
        f" {_yes(found['has_weights'])}",
    ]
    if tokens:
        lines.append(f"  busiest expert: {min(loads):.2f} to {max(loads):.2f} times the mean")
    for kind in ("domains", "sources"):
        if found[kind]:
            parts = (f"{name} {number:,}" for name, number in found[kind].items())
            lines.append(f"  {kind}: {', '.join(parts)}")
    if found.get("tokens_left_out"):
        lines.append(f"  {found['tokens_left_out']:,} tokens more were routed and not recorded")
    if not found["whole"]:
        lines.append("  it is not whole: whoever recorded it did not finish")
    return "\n".join(lines)


def _yes(value: bool) -> str:
    return "yes" if value else "no"
