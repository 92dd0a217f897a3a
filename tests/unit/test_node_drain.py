"""How a pod that ends waits until its members have left it."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from remora.cluster import bootstrap, node_drain
from remora.cluster.node_drain import (
    FAILED,
    HEAD_S,
    RECONNECT_ENV,
    main,
    once_answered,
    wait_until_left,
)
from remora.comm.errors import ClusterError, DeadlineError


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float, /) -> None:
        self.now_s += seconds


Told = Mapping[str, Any] | ClusterError | None


def waited(*told: Told) -> list[str]:
    """`wait_until_left` over 10 s, told these in turn, and then the last for ever."""
    answers = iter(told)
    last: list[Told] = []

    def look() -> Mapping[str, Any] | None:
        last[:] = [next(answers, *last)]
        if isinstance(last[0], ClusterError):
            raise last[0]
        return last[0]

    return wait_until_left("a", look, within_s=10, clock=Clock())


def known(*here: str, stay: Sequence[str] = (), refused: Sequence[str] = ()) -> Told:
    """Of node a, beside another one."""
    why = dict(zip("12", refused, strict=False))
    return {"draining": {"a": [*here], "b": ["shard-9"]}, "stay": [*stay], "refused": why}


NOT_YET: Told = {"draining": {"b": ["shard-9"]}, "stay": ["shard-9"], "refused": {}}


def test_a_pod_waits_until_its_members_have_left() -> None:
    away = ClusterError("it died")
    assert waited(NOT_YET, known("dense-0", "shard-0"), away, known("dense-0"), known()) == [
        "dense-0",
        "shard-0",
    ]
    assert waited(known("shard-0"), NOT_YET) == ["shard-0"], "Ray has ended the node: it was idle"
    assert waited(known()) == []
    assert waited(known("shard-0"), None) == ["shard-0"], "the deployment was stopped"
    assert waited(NOT_YET, None) == [], "an idle node, ended before the coordinator looked"


def test_a_pod_says_why_its_members_are_still_there() -> None:
    refused = known("shard-0", stay=["shard-0", "shard-9"], refused=["no memory"])
    with pytest.raises(ClusterError, match=r"^shard-0 cannot leave: no memory"):
        waited(known("shard-0"), refused)
    with pytest.raises(DeadlineError, match="within 10 s: dense-0, shard-0 are there"):
        waited(known("dense-0", "shard-0"))
    with pytest.raises(DeadlineError, match="within 10 s: it died"):
        waited(ClusterError("it died"))
    with pytest.raises(DeadlineError, match="did not look"):
        waited(NOT_YET)


def test_a_pod_waits_for_a_head_as_long_as_one_may_come() -> None:
    """It was on the same machine, which is drained; or the whole Ray cluster goes."""
    clock = Clock()

    def connected_from(at_s: float) -> bool:
        if clock.now_s < at_s:
            raise ClusterError(f"nobody answers at {clock.now_s:g}")
        return True

    assert once_answered(lambda: connected_from(60), within_s=HEAD_S, clock=clock)
    assert clock.now_s == 60
    with pytest.raises(ClusterError, match="nobody answers at"):
        once_answered(lambda: connected_from(1000), within_s=HEAD_S, clock=clock)
    assert clock.now_s <= 60 + HEAD_S


def test_a_pod_does_not_wait_for_a_head_until_its_grace_is_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """When a whole Ray cluster goes, KubeRay's 600 s would keep its pods, and GPUs, for so long."""
    monkeypatch.setenv(RECONNECT_ENV, "600")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # nobody listens there
    assert main(["any", "--within-s", "0.5"]) == FAILED
    assert "preStop: no Ray cluster answers at 127.0.0.1:1" in capsys.readouterr().err
    assert float(os.environ[RECONNECT_ENV]) == HEAD_S


@pytest.mark.parametrize("health", [None, {}, {"hung_total": 0, "last": []}])
def test_a_deployment_that_starts_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, health: dict[str, Any] | None
) -> None:
    """Until there is a view nothing is told of nodes: a KeyError ended the hook, and the pod."""
    monkeypatch.setattr(bootstrap, "find_cluster", lambda _: object())
    monkeypatch.setattr(bootstrap, "cluster_status", lambda _: {"health": health})
    with pytest.raises(ClusterError, match="'demo' does not serve"):
        node_drain._known_of_nodes("demo")
