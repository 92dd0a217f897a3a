"""The section `autoscale` of the configuration."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from remora.autoscale.autoscale_policy import (
    SAMPLE_EVERY_MAX_S,
    SAMPLE_EVERY_MIN_S,
    AutoscalePolicy,
    check_live,
    read_policy,
)
from remora.comm.checked import Section, parse_section


def policy_in(path: Path) -> dict[str, Any]:
    """The policy in a file, as plain data. Raises ConfigError."""
    return read_policy(path.expanduser()).model_dump(exclude_unset=True)


class AutoscaleConfig(Section):
    """Whether the deployment resizes itself (docs/autoscaling.md)."""

    policy: AutoscalePolicy | Path | None = None  # of a pool, or the file of one; None: it does not
    # between two samples of the pool
    sample_every_s: Annotated[
        float, Field(ge=SAMPLE_EVERY_MIN_S, le=SAMPLE_EVERY_MAX_S, allow_inf_nan=False)
    ] = 5.0
    log_dir: Path | None = None  # of decisions, by deployment; None: beside the coordinator's log

    @model_validator(mode="after")
    def _samples_fit(self) -> "AutoscaleConfig":
        if isinstance(self.policy, AutoscalePolicy):
            check_live(self.policy, self.sample_every_s)
        return self

    def loaded(self) -> "AutoscaleConfig":
        """With the policy itself where a file was named. Raises ConfigError: it holds none."""
        if not isinstance(self.policy, Path):
            return self
        data = self.model_dump() | {"policy": policy_in(self.policy)}
        return parse_section(data, AutoscaleConfig, source=f"autoscale.policy {self.policy}")
