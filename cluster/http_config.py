"""The section `http` of the configuration."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from remora.autoscale.autoscale_policy import AutoscalePolicy
from remora.cluster.autoscale_config import policy_in
from remora.comm.checked import Section, parse_section


class HttpConfig(Section):
    """The OpenAI-compatible endpoint and its bounds."""

    host: str = "127.0.0.1"  # address to listen on
    port: Annotated[int, Field(ge=0, le=65535)] = 8000  # 0: one that is free
    api_keys_file: Path | None = None  # one key a line; also $REMORA_API_KEYS (comma separated)
    admin_keys_file: Path | None = None  # the same of /v1/ep/*; also $REMORA_ADMIN_KEYS
    ingress_replicas: Annotated[int, Field(ge=1, le=1024)] = 1  # with `autoscale`: to begin with
    autoscale: AutoscalePolicy | Path | None = None  # of the replicas, or the file of one
    body_bytes_max: Annotated[int, Field(ge=1024, le=1 << 30)] = 8 << 20  # of a request
    batch_max: Annotated[int, Field(ge=1, le=1 << 16)] = 2048  # prompts in one request
    n_max: Annotated[int, Field(ge=1, le=4096)] = 128  # `n` of a request
    logprobs_max: Annotated[int, Field(ge=0, le=1024)] = 20  # log-probabilities a token
    queue_max: Annotated[int, Field(ge=1, le=1 << 20)] = 1024  # sequences admitted per replica
    access_log: bool = True  # a line for each request (docs/elasticity.md, What is told)
    # from acceptance to the last token
    request_timeout_s: Annotated[float, Field(gt=0, le=1e7, allow_inf_nan=False)] = 3600.0

    @model_validator(mode="after")
    def _is_of_ingresses(self) -> "HttpConfig":
        if isinstance(self.autoscale, AutoscalePolicy) and self.autoscale.pool != "ingress":
            raise ValueError(f"autoscale: a policy of pool ingress, not {self.autoscale.pool}")
        return self

    @property
    def replicas_max(self) -> int:
        """Replicas that there may be."""
        policy = self.autoscale
        return policy.units_max if isinstance(policy, AutoscalePolicy) else self.ingress_replicas

    def loaded(self) -> "HttpConfig":
        """With the policy itself where a file was named. Raises ConfigError: it holds none."""
        if not isinstance(self.autoscale, Path):
            return self
        data = self.model_dump() | {"autoscale": policy_in(self.autoscale)}
        return parse_section(data, HttpConfig, source=f"http.autoscale {self.autoscale}")
