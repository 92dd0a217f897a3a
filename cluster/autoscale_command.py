"""`remora autoscale check | replay`: policy files, and logged decisions made again."""

import json
from argparse import ArgumentParser, Namespace, _SubParsersAction
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remora.comm.errors import ConfigError

if TYPE_CHECKING:
    from remora.autoscale.autoscale_policy import AutoscalePolicy
    from remora.autoscale.decision_lines import Difference

OK, DIFFERS = 0, 1
SHOWN_MAX = 20  # differences printed as text; --json has more


def add_autoscale(commands: "_SubParsersAction[ArgumentParser]") -> None:
    """The command line of it."""
    command = commands.add_parser("autoscale", help="policy files, and decisions made again")
    actions = command.add_subparsers(required=True, metavar="ACTION")
    check = actions.add_parser("check", help="whether a file is a policy, and what it comes to")
    check.add_argument("file", type=Path, help="YAML file of kind AutoscalePolicy")
    check.set_defaults(run=run_check)
    replay = actions.add_parser(
        "replay", help="decide again from a log; exit status 1 if a decision is another one now"
    )
    replay.add_argument("log", type=Path, help="JSON lines, as the autoscaler writes them")
    replay.add_argument(
        "--policy", type=Path, metavar="FILE", help="decide by this one, not by that in the log"
    )
    replay.set_defaults(run=run_replay)
    for action in (check, replay):
        action.add_argument("--json", action="store_true", help="machine-readable output")


def run_check(options: Namespace) -> int:
    """Prints the policy with its defaults. Raises ConfigError: it is none."""
    from remora.autoscale.autoscale_policy import read_policy, sampling

    policy = read_policy(options.file)
    if options.json:
        least_s, most_s = sampling(policy)
        found = {
            "units_max": policy.units_max,
            "sample_every_min_s": least_s,
            "sample_every_max_s": most_s,
        }
        print(json.dumps(policy.model_dump(mode="json") | found))
    else:
        print("\n".join(_policy_lines(policy)))
    return OK


def run_replay(options: Namespace) -> int:
    """Prints what differs; the exit status says whether anything does.

    Raises:
        ConfigError: the log or the policy cannot be read.
    """
    from remora.autoscale.autoscale_policy import read_policy
    from remora.autoscale.decision_lines import replay

    policy = read_policy(options.policy) if options.policy is not None else None
    try:
        with options.log.open(encoding="utf-8") as lines:
            found = replay(lines, source=str(options.log), policy=policy)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{options.log}: cannot read the log: {error}") from None
    if options.json:
        report = {
            "decisions": found.decisions,
            "num_differences": found.num_differences,
            "cut_off": found.cut_off,
            "differences": [_fields(difference) for difference in found.differences],
        }
        print(json.dumps(report))
    else:
        for difference in found.differences[:SHOWN_MAX]:
            print("\n".join(_difference_lines(difference)))
        if found.num_differences > SHOWN_MAX:
            print(f"... and {found.num_differences - SHOWN_MAX} more")
        if found.cut_off is not None:
            print(f"left out: {found.cut_off}")
        print(f"{found.decisions} decisions, {found.num_differences} differ")
    return DIFFERS if found.num_differences else OK


def autoscale_lines(status: dict[str, Any] | None) -> list[str]:
    """The autoscaler in `remora status`."""
    if status is None:
        return []
    last, advice, action = status["last"], status["advice"], status["action"]
    lines = [f"  autoscale  {status['pool']}, mode {status['mode']}: no sample yet"]
    if last is not None:
        change = f"{last['units']} -> {last['target_units']} units"
        lines = [
            f"  autoscale  {status['pool']}, mode {status['mode']}: {last['verdict']} {change}"
            f" ({last['reason']})"
        ]
    if advice is not None:
        at = datetime.fromtimestamp(advice["unix_s"], UTC).isoformat(timespec="seconds")
        change = f"{advice['verdict']} {advice['units']} -> {advice['target_units']} units"
        lines.append(f"  autoscale  advice of {at}: {change} ({advice['reason']})")
    if action is not None:
        lines.append(f"  autoscale  {action['operation_id']}: {action['outcome']}".rstrip())
        if action["reason"]:
            lines[-1] += f" ({action['reason']})"
    return lines


def _fields(difference: "Difference") -> dict[str, Any]:
    return {
        "line": difference.line,
        "at_s": difference.at_s,
        "field": difference.field,
        "logged": difference.logged.model_dump(mode="json"),
        "replayed": difference.replayed.model_dump(mode="json"),
    }


def _difference_lines(difference: "Difference") -> list[str]:
    lines = [f"line {difference.line}, at {difference.at_s:.3f} s: {difference.field} differs"]
    for name, one in (("logged", difference.logged), ("replayed", difference.replayed)):
        change = f"{one.units} -> {one.target_units}"
        lines.append(f"  {name:<9} {one.verdict} {change} ({one.effect}): {one.reason}")
    return lines


def _policy_lines(policy: "AutoscalePolicy") -> list[str]:
    from remora.autoscale.autoscale_policy import sampling

    least_s, most_s = sampling(policy)
    targets = policy.targets
    held = []
    for name, latency in (("ttft", targets.ttft), ("itl", targets.itl)):
        if latency is not None:
            held.append(f"{name} {latency.percentile} <= {latency.seconds:g} s")
    for name in ("queue_per_unit", "ongoing_per_unit", "kv_use", "imbalance"):
        bound = getattr(targets, name)
        if bound is not None:
            held.append(f"{name} <= {bound:g}")
    paid = " (budget)" if policy.units_max < policy.bounds.max_units else ""
    lines = [
        f"policy of pool {policy.pool}, mode {policy.mode}",
        f"  targets     {', '.join(held)}",
        f"  units       {policy.bounds.min_units} to {policy.units_max}{paid},"
        f" +{policy.bounds.step_up_max} / -{policy.bounds.step_down_max} a decision",
        f"  windows     up {policy.reactive.window_s:g} s, down {policy.reactive.down_window_s:g} s"
        f" below {policy.reactive.down_below:.0%}",
        f"  samples     every {least_s:.3g} to {most_s:.3g} s (autoscale.sample_every_s)",
        f"  cooldowns   up {policy.cooldowns.up_s:g} s, down {policy.cooldowns.down_s:g} s",
    ]
    if (predictive := policy.predictive) is not None:
        lines.append(
            f"  forecast    {predictive.horizon_s:g} s ahead, best of"
            f" {', '.join(predictive.forecasters)}"
        )
    if (cost := policy.cost) is not None:
        least, most = (cost.per_hour(n) for n in (policy.bounds.min_units, policy.units_max))
        lines.append(f"  cost        {least:g} to {most:g} an hour")
    return lines
