"""What runs beside a coordinator's operations, when it comes back: gRPC, the loops over samples."""

import socket
import threading
from pathlib import Path

import pytest
from support.coordinator_lives import Lives, until
from support.imports import ROOT
from support.router_rig import view_of

from remora.cluster import beside
from remora.cluster import coordinator as module
from remora.cluster.coordinator import Coordinator
from remora.cluster.elastic import Elastic
from remora.cluster.manage_command import status_text
from remora.comm.errors import ClusterError
from remora.comm.view import View

POLICY = ROOT / "examples" / "autoscale-policy.yaml"
LISTEN = beside.Beside.listen


@pytest.fixture
def lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lives:
    return Lives(tmp_path, monkeypatch)


def test_a_view_that_is_committed_while_the_online_loop_is_made_is_planned_against(
    lives: Lives, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A coordinator that comes back goes on with the operation in flight at once. The loop kept to
    the view before, and no round had a plan until the next commit."""
    newer, told = view_of(2), []

    class Loop:
        def adopt_view(self, view: View) -> None:
            told.append(view.epoch)

    def made(_: object, __: object, view: View, *___: object, **____: object) -> Loop:
        told.append(view.epoch)
        coordinators[0]._publish(newer)
        return Loop()

    def resume(elastic: Elastic, *_: object) -> View:
        coordinators.append(elastic._publish.__self__)  # type: ignore[attr-defined]
        coordinators[0]._publish(view_of())
        return view_of()

    coordinators: list[Coordinator] = []
    lives.config = lives.config.model_copy(
        update={"router": lives.config.router.model_copy(update={"enabled": True})}
    )
    monkeypatch.setattr(Elastic, "resume", resume)
    monkeypatch.setattr(module, "find_actor", lambda _: object())
    monkeypatch.setattr(beside, "make_rebalancer", made)
    lives.write({"t": "base"})
    assert lives.made().view() == newer
    assert told == [1, 2]


def test_a_port_that_is_taken_when_a_coordinator_comes_back_is_listened_on_once_it_is_free(
    lives: Lives, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was tried once: no calls over gRPC for the rest of that life."""
    monkeypatch.setattr(beside.Beside, "listen", LISTEN)
    monkeypatch.setattr(beside, "AGAIN_EVERY_S", 0.05)
    lives.write({"t": "base"})
    with socket.create_server(("127.0.0.1", 0)) as before:
        port = before.getsockname()[1]
        own = {"port": port, "bind_address": "127.0.0.1"}
        lives.config = lives.config.model_copy(
            update={"elastic": lives.config.elastic.model_copy(update=own)}
        )
        coordinator = lives.made()
        assert coordinator.phase() == "serving"
        status = coordinator.status()
        assert status["operator"]["address"] == "", "the port is taken"
        assert f"no gRPC yet: the coordinator cannot listen on 127.0.0.1:{port}" in status_text(
            status
        )
    until(lambda: coordinator.status()["operator"]["address"] == f"127.0.0.1:{port}")
    assert "gRPC" not in status_text(coordinator.status())
    coordinator.stop()


def test_a_port_that_stays_taken_keeps_nobody_from_stopping(
    lives: Lives, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = threading.Event()

    def listen(_: beside.Beside) -> None:
        tried.set()
        raise ClusterError("the port is taken")

    monkeypatch.setattr(beside.Beside, "listen", listen)
    lives.write({"t": "base"})
    coordinator = lives.made()
    assert tried.is_set()
    coordinator.stop()
    assert coordinator.phase() == "stopped"


def test_an_autoscaler_that_cannot_start_when_a_coordinator_comes_back_starts_later(
    lives: Lives, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There was none before the next restart, and a deployment that served told of an error."""
    policy = lives.folder.parent / "policy.yaml"
    own = lives.config.autoscale.model_copy(update={"policy": policy})
    lives.config = lives.config.model_copy(update={"autoscale": own})
    monkeypatch.setattr(beside, "AGAIN_EVERY_S", 0.05)
    lives.write({"t": "base"})
    coordinator = lives.made()
    assert coordinator.phase() == "serving"
    status = coordinator.status()
    assert (status["autoscale"], status["error"]) == (None, None)
    assert f"no autoscaler yet: {policy}" in status_text(status)
    policy.write_text(POLICY.read_text())
    until(lambda: coordinator.status()["autoscale"] is not None)
    assert coordinator.status()["not_started"] == {}
    coordinator.stop()
