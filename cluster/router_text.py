"""The router in `remora status`, for people."""

from typing import Any


def router_lines(router: dict[str, Any] | None) -> list[str]:
    """What an operator looks for first: whether it lives, what it did, what the loop decided."""
    if router is None:
        return [_line("off", "ingresses choose dense groups by themselves")]
    if not router["alive"]:
        lines = [_line("dead", f"{router['error']} (ingresses choose by themselves meanwhile)")]
    else:
        lines = [_line("ready", _facts(router)), *([known] if (known := _known(router)) else [])]
    return lines + _rebalance(router.get("rebalance"))


def _line(state: str, text: str) -> str:
    return f"  {'router' if state else '':<10} {state:<8} {text}".rstrip()


def _facts(router: dict[str, Any]) -> str:
    routed = router["routed"]
    return (
        f"{router['address']}, {routed['sequences']} sequences routed,"
        f" {routed['alone']} by ingresses alone, {router['calls']['Report']} reports"
    )


def _known(router: dict[str, Any]) -> str:
    found = router["statistics"]
    if not found["tokens"]:
        return ""
    labels = f" (named: {', '.join(found['labels'])})" if found["labels"] else ""
    if found["shared_labels"]:
        labels += f"; as one count {', '.join('+'.join(each) for each in found['shared_labels'])}"
    domains = f"{found['domains']} domain{'s' * (found['domains'] != 1)}"
    return _line("", f"knows {found['tokens']:.0f} tokens of {domains}{labels}")


def _rebalance(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return []
    last, gauges, lines = found["last"], found["gauges"], []
    if last is not None:
        gain = f", predicted gain {last['predicted_gain_ratio']:.1%}"
        why = f"{last['verdict']} ({last['reason']}){gain}"
        if "not_applied" in last:
            why += f", not applied: {last['not_applied']}"
        lines.append(_line("", f"last plan {last['age_s']:.0f} s ago: {why}"))
    since_s = gauges.get("remora_seconds_since_last_rebalance")
    if since_s is not None:
        predicted = gauges["remora_rebalance_predicted_gain_ratio"]
        achieved = gauges.get("remora_rebalance_achieved_gain_ratio")
        so_far = "not known yet" if achieved is None else f"{achieved:.1%}"
        text = f"last move {since_s:.0f} s ago: predicted gain {predicted:.1%}, achieved {so_far}"
        lines.append(_line("", text))
    return lines
