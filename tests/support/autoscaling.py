"""Policies and samples for tests of the autoscaler."""

from collections.abc import Iterable
from typing import Any

from remora.autoscale.autoscale_policy import AutoscalePolicy, parse_policy
from remora.autoscale.autoscale_sample import AutoscaleState, Sample
from remora.autoscale.autoscaler import Decision, decide

BASE: dict[str, Any] = {
    "kind": "AutoscalePolicy",
    "version": 1,
    "pool": "experts",
    "mode": "act",
    "targets": {
        "ttft": {"percentile": "p99", "seconds": 2.0},
        "queue_per_unit": 10,
        "kv_use": 0.8,
    },
    "bounds": {"min_units": 1, "max_units": 8, "step_up_max": 4, "step_down_max": 1},
    "reactive": {"window_s": 30, "samples_min": 3, "down_window_s": 120, "down_below": 0.6},
    "cooldowns": {"up_s": 60, "down_s": 120, "rebalance_s": 60, "rebalance_again_s": 600},
}
IDLE: dict[str, Any] = {"ttft_s": {"p99": 0.1}, "waiting": 0, "kv_use": 0.1, "load": 10.0}


def policy_of(**sections: Any) -> AutoscalePolicy:
    """`BASE` with whole sections replaced."""
    return parse_policy({**BASE, **sections})


def sample_of(at_s: float, units: int = 2, **fields: Any) -> Sample:
    """A sample of a pool with little to do, and what is said otherwise."""
    return Sample(at_s=at_s, units=units, **{**IDLE, **fields})


def decisions_of(
    policy: AutoscalePolicy, samples: Iterable[Sample], state: AutoscaleState | None = None
) -> tuple[list[Decision], AutoscaleState]:
    """Each decision in turn, and the state after the last."""
    state = state or AutoscaleState()
    made = []
    for sample in samples:
        decision, state = decide(policy, state, sample)
        made.append(decision)
    return made, state
