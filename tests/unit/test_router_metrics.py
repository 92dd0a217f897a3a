"""What `/metrics` tells of the router and of rebalancing."""

from remora.cluster.metrics import IngressMetrics


def test_the_router_and_rebalancing_are_told_once_something_is_known() -> None:
    routed = {"router": 0, "alone": 0}
    metrics = IngressMetrics(dict, lambda: routed)
    text = metrics.render().decode()
    assert 'remora_routed_sequences_total{by="router"} 0.0' in text
    assert "remora_rebalance" not in text, "absent before the first move"
    routed["alone"] = 3
    metrics.coordinator = {
        "remora_rebalance_predicted_gain_ratio": 0.25,
        "remora_seconds_since_last_rebalance": 12.0,
    }
    text = metrics.render().decode()
    assert 'remora_routed_sequences_total{by="alone"} 3.0' in text
    assert "remora_rebalance_predicted_gain_ratio 0.25" in text
    assert "remora_seconds_since_last_rebalance 12.0" in text
    assert "achieved" not in text, "not before enough traffic came"
