"""Scenarios of the rebalance policy as text: layers of a plan, `round`, what was decided.

`layer N copies=BEFORE,AFTER load=BEFORE,AFTER moved=M`; an expert has 100 bytes, a copy 10.
"""

from typing import Any

from remora.autoscale.rebalance import (
    LayerChange,
    RebalanceMemory,
    RebalancePolicy,
    decide,
    propose,
)

EXPERT_BYTES, ROW_BYTES = 100, 10


def replay(text: str) -> str:
    """The scenario with what the policy decides now."""
    policy, memory = RebalancePolicy(), RebalanceMemory()
    changes: list[LayerChange] = []
    parts = []
    for part in text.strip("\n").split("\n\n"):
        commands = part.split("\n----")[0]
        answers = []
        for line in commands.splitlines():
            if not line or line.startswith("#"):
                continue
            command, *words = line.split()
            options = dict(word.split("=") for word in words if "=" in word)
            if command == "policy":
                values: Any = {k: type(getattr(policy, k))(float(v)) for k, v in options.items()}
                policy = RebalancePolicy(**values)
            elif command == "plan":
                changes = []
            elif command == "layer":
                changes.append(_change(int(words[0]), options))
            else:
                proposal = propose(policy, changes, expert_bytes=EXPERT_BYTES, row_bytes=ROW_BYTES)
                decision, memory = decide(
                    policy,
                    memory,
                    proposal,
                    tokens=float(options.get("tokens", "10000")),
                    now_s=float(words[0]),
                )
                answers.append(
                    f"{words[0]} s: {decision.verdict} ({decision.reason}); layers"
                    f" {list(proposal.layers)}, {proposal.moved} moved,"
                    f" gain {proposal.gain_ratio:.3f}"
                )
        parts.append("\n".join([commands, "----", *answers]))
    return "\n\n".join(parts) + "\n"


def _change(layer: int, options: dict[str, str]) -> LayerChange:
    copies = [float(value) for value in options["copies"].split(",")]
    load = [float(value) for value in options.get("load", "1,1").split(",")]
    return LayerChange(
        layer=layer,
        copies_before=copies[0],
        copies_after=copies[1],
        load_before=load[0],
        load_after=load[1],
        moved=int(options["moved"]),
    )
