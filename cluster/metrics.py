"""Prometheus metrics of one ingress: names `remora_*`, base units, bounded labels, own registry.

Our own `/metrics` because Ray rebuilds histograms from bucket midpoints, which moves their sums.
"""

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from remora.autoscale.ingress_load import LoadTotals
from remora.comm.messages import EngineStats, Traffic

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_TTFT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_REQUEST_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)

_GAUGES: tuple[tuple[str, str, Callable[[EngineStats], float]], ...] = (
    ("remora_requests_running", "Sequences in the engine's batch", lambda s: s.num_running),
    ("remora_requests_waiting", "Sequences queued in the engine", lambda s: s.num_waiting),
    (
        "remora_kv_cache_usage_ratio",
        "KV pages in use, 0 to 1",
        lambda s: s.kv_blocks_used / max(1, s.kv_blocks_total),
    ),
    ("remora_view_epoch", "Epoch of the placement in use", lambda s: s.epoch),
)
_TOTALS: tuple[tuple[str, str, Callable[[EngineStats], float]], ...] = (
    (
        "remora_prefix_cache_hits",
        "Prompt tokens taken from the prefix cache",
        lambda s: s.prefix_hit_tokens_total,
    ),
    (
        "remora_preemptions",
        "Sequences that gave their pages back",
        lambda s: s.preemptions_total,
    ),
    ("remora_engine_steps", "Steps of the dense group", lambda s: s.steps_total),
)

EXPERTS_WITHOUT_REPLICA = "remora_experts_without_replica"
COORDINATOR_GAUGES: tuple[tuple[str, str], ...] = (
    (
        "remora_rebalance_predicted_gain_ratio",
        "Share of copies and load that the last move was to save",
    ),
    (
        "remora_rebalance_achieved_gain_ratio",
        "Share that it saves on the traffic since; absent until enough came",
    ),
    ("remora_seconds_since_last_rebalance", "Since the last move was decided"),
    ("remora_members_hung", "Members ended for want of progress, in the coordinator's life"),
    (EXPERTS_WITHOUT_REPLICA, "Experts of all layers that no living shard holds"),
    ("remora_experts_with_one_replica", "Experts of all layers that one living shard holds"),
    ("remora_autoscale_units", "Units of the pool that the policy is for"),
    ("remora_autoscale_target_units", "Units that the last decision wants"),
    ("remora_autoscale_up", "Decisions for more units since the coordinator's start"),
    ("remora_autoscale_down", "Decisions for fewer units since then"),
    ("remora_autoscale_rebalance", "Decisions to rebalance since then"),
)


class IngressMetrics:
    """Everything one ingress counts.

    Args:
        stats: dense group uid -> its newest gauges; read at every scrape.
        routed: sequences by who chose their group; the same.
        traffic: dense group uid -> what it told of its links, a second old at most.
        replays: sequences that went on at another dense group.

    Attributes:
        load: totals for the autoscaler; None: there is none, and nothing is counted for it.
        coordinator: gauges of the coordinator's loops by name, as the coordinator told them last.
    """

    def __init__(
        self,
        stats: Callable[[], Mapping[str, EngineStats]],
        routed: Callable[[], Mapping[str, int]] = dict,
        traffic: Callable[[], Mapping[str, Traffic]] = dict,
        replays: Callable[[], int] = int,
    ) -> None:
        self.coordinator: Mapping[str, float] = {}
        self.load: LoadTotals | None = None
        self.registry = CollectorRegistry()
        reg = self.registry
        self.ttft_s = Histogram(
            "remora_time_to_first_token_seconds",
            "Acceptance of a request to its first token",
            buckets=_TTFT_S,
            registry=reg,
        )
        self.inter_token_s = Histogram(
            "remora_inter_token_latency_seconds",
            "Between two outputs of one sequence",
            buckets=_TOKEN_S,
            registry=reg,
        )
        self.duration_s = Histogram(
            "remora_request_duration_seconds",
            "Acceptance of a request to its end",
            buckets=_REQUEST_S,
            registry=reg,
        )
        self.prompt_tokens = Counter("remora_prompt_tokens", "Prompt tokens accepted", registry=reg)
        self.generation_tokens = Counter(
            "remora_generation_tokens", "Tokens generated", registry=reg
        )
        self.finished = Counter(
            "remora_requests_finished", "Sequences by how they ended", ["reason"], registry=reg
        )
        self.http = Counter(
            "remora_http_responses",
            "Responses by route and status",
            ["route", "status"],
            registry=reg,
        )
        self.rejected = Counter("remora_requests_rejected", "Requests answered 429", registry=reg)
        self.admitted = Gauge(
            "remora_ingress_sequences", "Sequences admitted and not ended", registry=reg
        )
        reg.register(_EngineCollector(stats))
        reg.register(_RouterCollector(routed, lambda: self.coordinator))
        reg.register(_TrafficCollector(traffic))
        reg.register(_ReplayCollector(replays))

    @property
    def experts_without_replica(self) -> int | None:
        """Experts of all layers that no living shard holds; None: the coordinator does not tell."""
        told = self.coordinator.get(EXPERTS_WITHOUT_REPLICA)
        return None if told is None else int(told)

    def refuse(self, num_sequences: int) -> None:
        """A request was answered 429."""
        self.rejected.inc()
        if self.load is not None:
            self.load.arrived += num_sequences

    def accept(self, num_sequences: int, prompt_tokens: int) -> None:
        """A request was let in."""
        self.admitted.inc(num_sequences)
        self.prompt_tokens.inc(prompt_tokens)
        if self.load is not None:
            self.load.arrived += num_sequences
            self.load.accepted += num_sequences
            self.load.prompt_tokens += prompt_tokens

    def release(self, num_sequences: int, took_s: float) -> None:
        """A request is over, however it ended."""
        self.admitted.dec(num_sequences)
        self.duration_s.observe(took_s)
        if self.load is not None:
            self.load.ended += num_sequences

    def output(self, num_tokens: int, *, first_s: float | None, since_s: float) -> None:
        """A sequence got tokens.

        Args:
            first_s: after acceptance, where they are its first; else None.
            since_s: since its last output; not looked at for the first.
        """
        self.generation_tokens.inc(num_tokens)
        histogram = self.inter_token_s if first_s is None else self.ttft_s
        seconds = since_s if first_s is None else first_s
        histogram.observe(seconds)
        if self.load is not None:
            self.load.generated_tokens += num_tokens
            (self.load.itl if first_s is None else self.load.ttft).observe(seconds)

    def render(self) -> bytes:
        """The exposition text."""
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    def __init__(self, stats: Callable[[], Mapping[str, EngineStats]]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        for name, text, value in _GAUGES:
            gauge = GaugeMetricFamily(name, text, labels=["group"])
            for uid, group in stats.items():
                gauge.add_metric([uid], value(group))
            yield gauge
        for name, text, value in _TOTALS:
            total = CounterMetricFamily(name, text, labels=["group"])
            for uid, group in stats.items():
                total.add_metric([uid], value(group))
            yield total


class _RouterCollector(Collector):
    def __init__(
        self,
        routed: Callable[[], Mapping[str, int]],
        coordinator: Callable[[], Mapping[str, float]],
    ) -> None:
        self._routed, self._coordinator = routed, coordinator

    def collect(self) -> Iterable[Metric]:
        total = CounterMetricFamily(
            "remora_routed_sequences", "Sequences by who chose their group", labels=["by"]
        )
        for who, count in self._routed().items():
            total.add_metric([who], count)
        yield total
        values = self._coordinator()
        for name, text in COORDINATOR_GAUGES:
            if name in values:
                yield GaugeMetricFamily(name, text, value=values[name])


class _ReplayCollector(Collector):
    def __init__(self, replays: Callable[[], int]) -> None:
        self._replays = replays

    def collect(self) -> Iterable[Metric]:
        yield CounterMetricFamily(
            "remora_request_replays",
            "Sequences that went on at another dense group, or at a new life of theirs",
            value=self._replays(),
        )


class _TrafficCollector(Collector):
    """Cost of placement; of a tensor-parallel group what its rank 0 sends."""

    def __init__(self, traffic: Callable[[], Mapping[str, Traffic]]) -> None:
        self._traffic = traffic

    def collect(self) -> Iterable[Metric]:
        traffic = self._traffic()
        copies = GaugeMetricFamily(
            "remora_remote_copies_per_token",
            "Rows sent to other hosts by token and MoE layer, lately",
            labels=["group"],
        )
        local = GaugeMetricFamily(
            "remora_local_activation_ratio",
            "Activated experts on the group's own host, lately, 0 to 1",
            labels=["group"],
        )
        volume = CounterMetricFamily(
            "remora_alltoall_bytes",
            "Bytes of dispatch (out) and combine (in), frames included",
            labels=["group", "level", "direction"],
        )
        load = GaugeMetricFamily(
            "remora_expert_load_ratio",
            "Activated experts of a shard by the mean of all shards, lately",
            labels=["group", "shard"],
        )
        for uid, group in traffic.items():
            copies.add_metric([uid], group.remote_copies_per_token)
            local.add_metric([uid], group.local_activation_ratio)
            for level in ("host", "remote"):
                peers = [peer for peer in group.peers if peer.level == level]
                volume.add_metric([uid, level, "out"], sum(p.sent_bytes for p in peers))
                volume.add_metric([uid, level, "in"], sum(p.received_bytes for p in peers))
            for peer in group.peers:
                load.add_metric([uid, peer.uid], peer.load_ratio)
        return (copies, local, volume, load)
