"""Ray Serve's `autoscaling_config.policy` for ingress replicas: the pure decision of all pools.

Serve's controller makes one `IngressPolicy` and calls it several times a second. It looks at what
Serve measured (requests under way, on replicas and queued at handles), decides at most once in
`sample_every_s`, and returns at once: no I/O, no lock, no wait, and windows, series and forecasters
are bounded (`check_ingress`). A thread of its own logs each decision with its inputs, on the host
of the controller. Delays and factors are the policy's own, so Serve's are set to none.
"""

import logging
from pathlib import Path
from typing import Any

from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from remora.autoscale.autoscale_policy import AutoscalePolicy, parse_policy
from remora.autoscale.autoscale_sample import AutoscaleState, Sample
from remora.autoscale.autoscaler import decide
from remora.cluster.autoscale_log import INGRESS_FILE, AutoscaleLog, BackgroundLog
from remora.cluster.log_folder import folder_below

logger = logging.getLogger("ray.serve")  # what another tells stands in no log of the controller

PATH = "remora.cluster.serve_policy:IngressPolicy"
LOOK_BACK_S = 20.0  # that Serve takes the mean over: two of the reports that it asks replicas for


def serve_autoscaling(
    policy: AutoscalePolicy, *, initial: int, every_s: float, log_dir: Path | None, name: str
) -> AutoscalingConfig:
    """`autoscaling_config` of the ingress deployment.

    Args:
        initial: replicas to begin with.
        every_s: between decisions.
        log_dir, name: of decisions, as `folder_below` takes them.
    """
    kwargs = {
        "policy": policy.model_dump(mode="json"),
        "sample_every_s": every_s,
        "log_dir": None if log_dir is None else str(log_dir),
        "name": name,
    }
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
        log_dir, name: of decisions, as `folder_below` takes them.

    Raises:
        ConfigError: it is none.
    """

    def __init__(
        self, policy: dict[str, Any], sample_every_s: float, log_dir: str | None, name: str
    ) -> None:
        parsed = parse_policy(policy, source="policy_kwargs")
        base = None if log_dir is None else Path(log_dir)

        def make_log() -> AutoscaleLog:
            log = AutoscaleLog(folder_below(base, name), parsed, file=INGRESS_FILE)
            logger.info("decisions about ingress replicas are logged in %s", log.path)
            return log

        self._policy, self._every_s = parsed, sample_every_s
        self._log = BackgroundLog(make_log)
        self._state = AutoscaleState()
        self._wanted: int | None = None
        self._decided_s: float | None = None

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Replicas that there are to be, and Serve's state of the policy, which is none."""
        assert context.current_time is not None, "Serve's controller tells the time"
        now_s = context.current_time
        if self._wanted is not None and self._decided_s is not None:
            if 0 <= now_s - self._decided_s < self._every_s:  # below: its clock was set back
                return self._wanted, {}
        self._decided_s = now_s
        # Of the replicas that were asked for, not of those that run: one that starts is not asked
        # for twice, and one that finds no room keeps the others from nothing.
        target = context.target_num_replicas
        ongoing = max(0.0, float(context.total_num_requests))
        sample = Sample(at_s=now_s, units=target, ongoing=ongoing, load=ongoing)
        before = self._state
        decision, self._state = decide(self._policy, before, sample)
        self._log.decided(before, sample, decision)
        self._wanted = target
        if decision.effect != "none":
            change = f"{decision.units} -> {decision.target_units}: {decision.reason}"
            logger.info("ingress replicas (%s) %s", decision.effect, change)
        if decision.effect == "act":
            self._wanted = decision.target_units
        return self._wanted, {}
