"""The one configuration path: YAML file or preset -> overrides -> frozen pydantic model.

An unknown key, at any depth, is a `ConfigError` that names it, its nearest allowed neighbour and
all that is allowed. Serve's `args`, the CLI's flags and YAML files all go through `parse_config`.
"""

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from remora.autoscale.autoscale_policy import AutoscalePolicy, check_windows
from remora.cluster.autoscale_config import AutoscaleConfig
from remora.cluster.device_rules import Device, check_devices, resolve
from remora.cluster.http_config import HttpConfig
from remora.cluster.instances import NAME
from remora.comm.checked import Section, parse_section, refuse_unknown, yaml_mapping, yaml_value
from remora.comm.errors import ConfigError
from remora.kernels.experts_dtype import ExpertsDtype

Positive = Annotated[int, Field(ge=1, le=2**31)]
Fraction = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0, le=1e7, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]


class _Placed(Section):
    """What Ray needs to place one actor, and how many threads torch may use inside it."""

    num_cpus: Fraction = 1.0  # logical CPUs, as Ray counts them
    num_gpus: Fraction = 0.0  # the same of GPUs
    resources: dict[str, float] = Field(default_factory=dict)  # Ray custom resources
    labels: dict[str, str] = Field(default_factory=dict)  # Ray node labels that must match
    threads: Positive | None = None  # None: a host's cores, shared out
    device: Device = "auto"  # what computes; auto: the GPU where num_gpus asks for one

    @property
    def computes_on(self) -> Literal["cpu", "cuda"]:
        """`device`, resolved."""
        return resolve(self.device, self.num_gpus)


class DenseConfig(_Placed):
    """The dense groups: attention, norms, gates, shared experts, LM head and KV pages."""

    groups: Annotated[int, Field(ge=1, le=1024)] = 1  # dense groups, each with its own requests
    tensor_parallel: Literal[1, 2, 4] = 1  # ranks of one group; must divide the heads
    # which rank takes which rows to the shards (docs/token-shuffle.md)
    token_shuffle: Literal["auto", "none", "exact", "speculative"] = "auto"
    max_num_seqs: Annotated[int, Field(ge=1, le=4096)] = 64  # sequences in one step
    max_tokens_per_step: Annotated[int, Field(ge=1, le=1 << 20)] = 512  # prefill chunk + decode
    max_model_len: Positive | None = None  # tokens, prompt + output; None: the model's own
    # of one group; at most one of kv_cache_*
    kv_cache_tokens: Positive | None = None
    # the same in memory; neither: 1,024 tokens for each of max_num_seqs
    kv_cache_gib: Annotated[float, Field(gt=0, le=1 << 20, allow_inf_nan=False)] | None = None
    block_size: Annotated[int, Field(ge=1, le=1024)] = 16  # tokens in one KV page; only 16 today
    prefix_caching: bool = True  # prompts that begin alike share KV pages
    max_waiting: Annotated[int, Field(ge=1, le=1 << 20)] = 4096  # sequences queued in one group

    @model_validator(mode="after")
    def _consistent(self) -> "DenseConfig":
        if self.block_size != 16:
            raise ValueError(f"block_size = {self.block_size}: only 16 is supported yet")
        if self.token_shuffle not in ("auto", "none") and self.tensor_parallel == 1:
            raise ValueError(
                f"token_shuffle = {self.token_shuffle!r} needs several ranks: set tensor_parallel"
            )
        if self.kv_cache_tokens is not None and self.kv_cache_gib is not None:
            raise ValueError("kv_cache_tokens and kv_cache_gib are both set: one is allowed")
        if self.max_tokens_per_step < self.max_num_seqs:
            raise ValueError(
                f"max_tokens_per_step = {self.max_tokens_per_step} is below max_num_seqs ="
                f" {self.max_num_seqs}: every running sequence needs one token a step"
            )
        return self

    def num_kv_blocks(self, *, bytes_per_token: int, max_model_len: int) -> int:
        """Pages of `block_size` tokens in one dense group.

        Args:
            bytes_per_token: K and V of one token over all layers.
            max_model_len: tokens of the longest sequence; it must fit alone.

        Raises:
            ConfigError: the room asked for is smaller than one sequence of `max_model_len`.
        """
        needed = -(-max_model_len // self.block_size)
        if self.kv_cache_tokens is not None:
            num_blocks = self.kv_cache_tokens // self.block_size
        elif self.kv_cache_gib is not None:
            num_blocks = int(self.kv_cache_gib * 2**30) // (bytes_per_token * self.block_size)
        else:  # every running sequence may hold 1,024 tokens, and the longest one fits thrice
            average = -(-min(max_model_len, 1024) // self.block_size)
            num_blocks = max(3 * needed, self.max_num_seqs * average)
        if num_blocks < needed:
            raise ConfigError(
                f"dense.kv_cache_*: room for {num_blocks * self.block_size} tokens, but one"
                f" sequence may hold max_model_len = {max_model_len}: raise it or lower that"
            )
        return num_blocks


class ExpertsConfig(_Placed):
    """The expert shards: slots of expert weights, stateless per call."""

    shards: Annotated[int, Field(ge=1, le=4096)] = 2  # expert shards
    slots: Positive | None = None  # of a shard in a MoE layer; None: what the placement needs
    # latest: what was last decided (router.state_dir); or a placement file (docs/placement.md)
    placement: Literal["contiguous", "latest"] | Path = "contiguous"
    # auto: Unix socket + memfd on the same host, else TCP; nccl: between GPUs
    transport: Literal["auto", "tcp", "nccl"] = "auto"
    call_timeout_s: Seconds = 30.0  # one dispatch to one shard


class RebalanceConfig(Section):
    """When a better placement is worth its moves (autoscale/rebalance.py)."""

    horizon_tokens: Annotated[float, Field(gt=0, le=1e15)] = 1e6  # that it will serve
    gain_min: Annotated[float, Field(ge=0, le=1)] = 0.05  # share of the cost that it must save
    confirmations: Annotated[int, Field(ge=1, le=100)] = 2  # plans in a row that must say so
    cooldown_s: Annotated[float, Field(ge=0, le=1e7)] = 600.0  # between two moves
    tokens_min: Annotated[float, Field(ge=1, le=1e12)] = 5_000.0  # of statistics
    moves_max: Positive = 4096  # experts in one round, over all layers


class RouterConfig(Section):
    """The router: dense groups for requests, statistics of traffic, plans (docs/router.md)."""

    enabled: bool = True  # without it ingresses choose alone, and nothing is counted
    bind_address: str | None = None  # of its gRPC server; None: that of the data plane
    port: Annotated[int, Field(ge=0, le=65535)] = 0  # 0: one that is free
    route_timeout_s: Seconds = 0.05  # an ingress decides alone after this
    report_every_s: Seconds = 2.0  # asked of dense groups
    state_dir: Path | None = None  # histories, decisions, placements; None: kept nowhere
    rebalance_every_s: Seconds | None = None  # between plans of the online loop; None: by hand only
    rebalance: RebalanceConfig = RebalanceConfig()


class ElasticConfig(Section):
    """Operations on a deployment that serves (docs/elasticity.md)."""

    bind_address: str | None = None  # of the gRPC service; None: that of the data plane
    port: Annotated[int, Field(ge=0, le=65535)] = 0  # of it; 0: one that is free
    log_dir: Path | None = None  # of the coordinator's log; None: a private folder of its host
    # processes started and imported, for the next shards; each takes what a shard asks of Ray
    warm_standby: Annotated[int, Field(ge=0, le=64)] = 0
    warm_dense: Annotated[int, Field(ge=0, le=64)] = 0  # the same for dense groups of one rank
    # of memory in which a shard keeps second copies of experts that only others serve; 0: none
    dram_copies_mib: Annotated[float, Field(ge=0, le=1 << 24, allow_inf_nan=False)] = 0.0
    # at which one shard takes experts while others serve, at most; less when steps get slower
    copy_mib_per_s: Annotated[float, Field(ge=1, le=1 << 20, allow_inf_nan=False)] = 1024.0
    drain_timeout_s: Seconds = 60.0  # then a dense rank that keeps an old view is fenced
    hang_s: Seconds = 20.0  # without a sign of progress a member is ended and started again
    hold_s: Annotated[float, Field(ge=0, le=1e7)] = 120.0  # requests wait for lost experts
    # for members that find no place; None: where an autoscaler of Ray's runs, as far as it tells
    nodes_may_come: bool | None = None


class SecurityConfig(Section):
    """How the processes of one cluster know each other."""

    # 16 bytes or more, white space at the ends apart; None: a random token, kept by the coordinator
    token_file: Path | None = None


class RayConfig(Section):
    """The Ray cluster underneath."""

    address: str | None = None  # None: a cluster of its own on this machine
    num_cpus: Positive | None = None  # of an own local cluster; None: what the machine has
    object_store_mib: Annotated[int, Field(ge=80, le=1 << 20)] = 100  # of an own local cluster


class RemoraConfig(Section):
    """Everything that one deployment is."""

    name: Name = "remora"  # deployment: names actors, the Serve application and its routes
    model: str = Field(min_length=1)  # checkpoint directory, or hub id
    served_model_name: str | None = None  # None: the last part of `model`
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: the checkpoint's
    experts_dtype: ExpertsDtype = "auto"  # int8, int4: quantised at load
    numerics: Literal["fast", "exact"] = "fast"  # exact: tokens depend on the request alone
    executor: Literal["auto", "eager", "compiled"] = "auto"  # of decoder layers
    bind_address: str = "127.0.0.1"  # of the data plane's TCP listeners
    start_timeout_s: Seconds = 900.0  # until all is up, and for who joins later
    dense: DenseConfig = DenseConfig()
    experts: ExpertsConfig = ExpertsConfig()
    router: RouterConfig = RouterConfig()
    elastic: ElasticConfig = ElasticConfig()
    autoscale: AutoscaleConfig = AutoscaleConfig()
    http: HttpConfig = HttpConfig()
    security: SecurityConfig = SecurityConfig()
    ray: RayConfig = RayConfig()

    @model_validator(mode="after")
    def _latest_is_somewhere(self) -> "RemoraConfig":
        if self.experts.placement == "latest" and self.router.state_dir is None:
            raise ValueError("experts.placement = latest: router.state_dir must say where it lies")
        return self

    @model_validator(mode="after")
    def _standbys_are_of_use(self) -> "RemoraConfig":
        for key in ("warm_standby", "warm_dense", "dram_copies_mib"):
            value = getattr(self.elastic, key)
            if value and self.experts.transport == "nccl":
                raise ValueError(
                    f"elastic.{key} = {value} with experts.transport = nccl: only members that died"
                    " join a communicator yet, and no expert moves; allowed is 0"
                )
        if self.elastic.warm_dense and self.dense.tensor_parallel > 1:
            raise ValueError("elastic.warm_dense: a group of several ranks has no standby; use 0")
        return self

    @model_validator(mode="after")
    def _queues_fit(self) -> "RemoraConfig":
        admitted = self.http.queue_max * self.http.replicas_max
        if admitted > self.dense.max_waiting:  # others may be gone
            raise ValueError(
                f"http.queue_max x ingress_replicas = {admitted} is above dense.max_waiting ="
                f" {self.dense.max_waiting}: what is admitted must fit into one group"
            )
        return self

    @model_validator(mode="after")
    def _ingresses_are_sampled(self) -> "RemoraConfig":
        if isinstance(self.http.autoscale, AutoscalePolicy):
            check_windows(self.http.autoscale, self.autoscale.sample_every_s)
        return self

    @model_validator(mode="after")
    def _policy_can_be_held_to(self) -> "RemoraConfig":
        policy = self.autoscale.policy
        if not isinstance(policy, AutoscalePolicy):
            return self
        if policy.targets.imbalance is not None and not self.router.enabled:
            raise ValueError(
                "autoscale.policy: targets.imbalance is rebalanced first, and without the router"
                " nothing is: allowed is router.enabled = true, or no such target"
            )
        if policy.mode == "act" and self.experts.transport == "nccl":
            raise ValueError(
                "autoscale.policy: mode = act with experts.transport = nccl: no member comes or"
                " goes there yet; allowed are observe and advise"
            )
        return self

    @model_validator(mode="after")
    def _devices_fit(self) -> "RemoraConfig":
        check_devices(self)
        return self

    @property
    def combine(self) -> Literal["ordered", "presummed"]:
        """How expert outputs are summed: the numerics contract decides it."""
        return "ordered" if self.numerics == "exact" else "presummed"

    @property
    def model_id(self) -> str:
        """The name clients say in `model`."""
        return self.served_model_name or Path(self.model.rstrip("/")).name

    def to_args(self) -> dict[str, Any]:
        """Plain JSON data that `parse_config` takes back, such as the `args` of Serve."""
        return self.model_dump(mode="json")


def parse_config(data: Mapping[str, Any], *, source: str = "configuration") -> RemoraConfig:
    """Checked configuration from plain data.

    Raises:
        ConfigError: unknown key (named, with what is allowed and the nearest), or a bad value.
    """
    return parse_section(data, RemoraConfig, source=source)


def load_config(
    source: str | Path | None = None,
    *,
    preset: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> RemoraConfig:
    """Reads a YAML file and/or a preset of `remora.manifests`; `overrides` are dotted keys.

    Later wins: preset, file, overrides. A relative `model` of a file is relative to that file when
    it names a directory there; paths are made absolute.

    Raises:
        ConfigError: no such file or preset, not a YAML mapping, or as `parse_config`; an unknown
            key is told with the part that has it, a bad value with all of them.
    """
    parts: dict[str, dict[str, Any]] = {}  # by what an error calls them
    if preset is not None:
        parts[f"preset {preset}"] = yaml_mapping(_preset_text(preset), f"preset {preset}")
    if source is not None:
        parts[str(source)] = _file_content(Path(source))
    data: dict[str, Any] = {}
    for part in parts.values():
        data = _merged(data, part)
    if overrides:
        parts["overrides"] = {}
        for key, value in overrides.items():
            _set_dotted(parts["overrides"], key, value)
            _set_dotted(data, key, value)  # in the place of a mapping, where `_merged` adds to it
    for label, part in parts.items():
        refuse_unknown(part, RemoraConfig, source=label)
    label = " + ".join(parts) or "configuration"
    config = _with_absolute_paths(parse_config(data, source=label))
    return parse_config(config.to_args(), source=label)  # policies that were read say more


def _file_content(path: Path) -> dict[str, Any]:
    """What a configuration file says. Raises ConfigError: it cannot be read, or is no mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error}") from None
    content = yaml_mapping(text, str(path))
    model = content.get("model")
    if isinstance(model, str) and (path.parent / model).is_dir():
        content["model"] = str((path.parent / model).resolve())
    return content


def _with_absolute_paths(config: RemoraConfig) -> RemoraConfig:
    """Relative paths are the caller's; actors run in other working directories. A policy is read
    here: who runs it may be on another host."""

    def absolute(section: Section, names: tuple[str, ...]) -> dict[str, Any]:
        paths = {name: getattr(section, name) for name in names}
        return {name: path.expanduser().resolve() for name, path in paths.items() if path}

    experts: dict[str, Any] = {}
    if isinstance(config.experts.placement, Path):
        experts = absolute(config.experts, ("placement",))
    http_config = config.http.loaded()
    http = absolute(http_config, ("api_keys_file", "admin_keys_file"))
    security = absolute(config.security, ("token_file",))
    router = absolute(config.router, ("state_dir",))
    autoscale = config.autoscale.loaded()
    elastic = absolute(config.elastic, ("log_dir",))
    update: dict[str, Any] = {
        "experts": config.experts.model_copy(update=experts),
        "router": config.router.model_copy(update=router),
        "autoscale": autoscale.model_copy(update=absolute(autoscale, ("log_dir",))),
        "elastic": config.elastic.model_copy(update=elastic),
        "http": http_config.model_copy(update=http),
        "security": config.security.model_copy(update=security),
    }
    if Path(config.model).is_dir():
        update["model"] = str(Path(config.model).resolve())
    return config.model_copy(update=update)


def preset_names() -> list[str]:
    """Presets that come with the package."""
    names = (entry.name for entry in resources.files("remora.manifests").iterdir())
    files = [name for name in names if name.endswith(".yaml") and not name.startswith("serve_")]
    return sorted(name.removesuffix(".yaml") for name in files)


def parse_override(text: str) -> tuple[str, Any]:
    """`dense.groups=2` -> ("dense.groups", 2), the value read as YAML. Raises ConfigError."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {text!r}: allowed is KEY=VALUE, such as dense.groups=2")
    return key.strip(), yaml_value(value, f"override {text!r}")


def _preset_text(preset: str) -> str:
    names = preset_names()
    if preset not in names:
        raise ConfigError(f"preset {preset!r} does not exist; allowed: {', '.join(names)}")
    return (resources.files("remora.manifests") / f"{preset}.yaml").read_text(encoding="utf-8")


def _merged(base: dict[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in top.items():
        old = result.get(key)
        both = isinstance(old, dict) and isinstance(value, Mapping)
        result[key] = _merged(old, value) if both and old is not None else value
    return result


def _set_dotted(data: dict[str, Any], key: str, value: Any) -> None:
    parts = key.split(".")
    for part in parts[:-1]:
        child = data.get(part)
        if child is None:
            child = {}
        if not isinstance(child, dict):
            raise ConfigError(f"override {key!r}: {part!r} is not a section")
        data[part] = dict(child)  # never write into a preset's or a caller's own mapping
        data = data[part]
    data[parts[-1]] = value
