"""Ray Serve's `autoscaling_config.policy` for ingress replicas: the pure decision of all pools.

Serve's controller makes one `IngressPolicy` and calls it several times a second. It looks at what
Serve measured (requests under way, on replicas and queued at handles), decides at most once in
`sample_every_s`, and returns at once: no I/O, no lock, no wait, and windows, series and forecasters
are bounded (`check_ingress`). Delays and factors are the policy's own, so Serve's are set to none.
"""

import logging
from typing import Any

from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from remora.autoscale.autoscale_policy import AutoscalePolicy, parse_policy
from remora.autoscale.autoscale_sample import AutoscaleState, Sample
from remora.autoscale.autoscaler import decide

logger = logging.getLogger(__name__)

PATH = "remora.cluster.serve_policy:IngressPolicy"
LOOK_BACK_S = 20.0  # that Serve takes the mean over: two of the reports that it asks replicas for


def serve_autoscaling(
    policy: AutoscalePolicy, *, initial: int, every_s: float
) -> AutoscalingConfig:
    """`autoscaling_config` of the ingress deployment.

    Args:
        initial: replicas to begin with.
        every_s: between decisions.
    """
    kwargs = {"policy": policy.model_dump(mode="json"), "sample_every_s": every_s}
    return AutoscalingConfig(
        min_replicas=policy.bounds.min_units,
        initial_replicas=min(max(initial, policy.bounds.min_units), policy.units_max),
        max_replicas=policy.units_max,
        look_back_period_s=LOOK_BACK_S,
        upscale_delay_s=0.0,
        downscale_delay_s=0.0,
        policy=AutoscalingPolicy(policy_function=PATH, policy_kwargs=kwargs),
    )


class IngressPolicy:
    """See the head of this file. Made by Serve's controller, from `policy_kwargs`.

    Args:
        policy: an AutoscalePolicy of pool ingress, as plain data.
        sample_every_s: between decisions.

    Raises:
        ConfigError: it is none.
    """

    def __init__(self, policy: dict[str, Any], sample_every_s: float) -> None:
        self._policy = parse_policy(policy, source="policy_kwargs")
        self._every_s = sample_every_s
        self._state = AutoscaleState()
        self._wanted: int | None = None

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Replicas that there are to be, and Serve's state of the policy, which is none."""
        assert context.current_time is not None, "Serve's controller tells the time"
        now_s = context.current_time
        seen_s = self._state.seen_s
        if self._wanted is not None and seen_s is not None:
            if 0 <= now_s - seen_s < self._every_s:  # below: its clock was set back
                return self._wanted, {}
        # Of the replicas that were asked for, not of those that run: one that starts is not asked
        # for twice, and one that finds no room keeps the others from nothing.
        target = context.target_num_replicas
        ongoing = max(0.0, float(context.total_num_requests))
        sample = Sample(at_s=now_s, units=target, ongoing=ongoing, load=ongoing)
        decision, self._state = decide(self._policy, self._state, sample)
        self._wanted = target
        if decision.effect != "none":
            change = f"{decision.units} -> {decision.target_units}: {decision.reason}"
            logger.info("ingress replicas (%s) %s", decision.effect, change)
        if decision.effect == "act":
            self._wanted = decision.target_units
        return self._wanted, {}
