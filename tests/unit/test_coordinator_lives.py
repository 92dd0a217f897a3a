"""What a coordinator does with the log of one that died: adopt, wait, begin again, end."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from support.coordinator_rig import World
from support.operations import SLOTS, world_operations
from support.router_rig import view_of

from remora.actors.launch import STANDBY, actor_name
from remora.cluster import beside, elastic
from remora.cluster import coordinator as module
from remora.cluster.config import RemoraConfig, load_config
from remora.cluster.coordinator import Coordinator
from remora.cluster.coordinator_calls import Limits
from remora.cluster.coordinator_recovery import recovered
from remora.cluster.elastic import ENDING, Elastic
from remora.cluster.manage_command import status_text
from remora.cluster.operation import Operation, ScaleTo
from remora.cluster.wal import FILE, Wal, decode_records
from remora.comm.errors import ClusterError, WeightsError
from remora.comm.view import View

NAME = "lives"
SOON_S = 20.0
RESUME = Elastic.resume
SERVE, LISTEN = beside.Beside.serve, beside.Beside.listen


class Lives:
    """A coordinator's surroundings, without Ray: who lives, and whether its model can be read."""

    def __init__(self, folder: Path) -> None:
        overrides = {
            "name": NAME,
            "model": "/nowhere/model",
            "router.enabled": False,
            "elastic.log_dir": str(folder),
        }
        self.config: RemoraConfig = load_config(None, overrides=overrides)
        self.folder = folder / NAME
        self.is_again = True
        self.living: View | None = view_of()
        self.is_readable = True
        self.why: Exception = WeightsError("it is not there")
        self.swept: list[list[dict[str, Any]]] = []  # what the log held when all was ended
        self.deployed = threading.Event()

    def write(self, *records: dict[str, Any]) -> None:
        wal, _ = Wal.open(self.folder)
        for record in records:
            wal.append(record)
        wal.close()

    def made(self) -> Coordinator:
        return Coordinator(self.config.model_dump(mode="json"), b"x" * 32)

    def inspect(self, _: str) -> None:
        if not self.is_readable:
            raise self.why

    def sweep(self, _: str) -> None:
        log = self.folder / FILE
        self.swept.append(decode_records(log.read_bytes(), log)[0] if log.exists() else [])


@pytest.fixture
def lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lives]:
    found = Lives(tmp_path)
    monkeypatch.setattr(module, "is_next_life", lambda: found.is_again)
    monkeypatch.setattr(module, "inspect_model", found.inspect)
    monkeypatch.setattr(module, "end_all", found.sweep)
    monkeypatch.setattr(module, "LOCK_S", 0.05)
    monkeypatch.setattr(module, "ADOPT_EVERY_S", 0.05)
    monkeypatch.setattr(Elastic, "resume", lambda *_: found.living)
    monkeypatch.setattr(beside.Beside, "listen", lambda _: None)
    monkeypatch.setattr(beside.Beside, "serve", lambda *_: None)
    yield found


def until(condition: Callable[[], bool]) -> None:
    done = threading.Event()
    for _ in range(int(SOON_S / 0.02)):
        if condition():
            return
        done.wait(0.02)
    raise AssertionError("not within the time")


def test_who_asks_a_thread_that_has_failed_hears_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever watches the coordinator then ends it, and its next life reads the log."""
    with world_operations(tmp_path) as operations:
        operations.runner.come_round()
        operations.runner.soon(lambda: operations.view().members[99].uid)  # type: ignore[arg-type, return-value]
        heard = threading.Event()

        def ask() -> None:
            operations.runner.come_round()
            heard.set()

        asking = threading.Thread(target=ask)
        asking.start()
        until(lambda: "operations cannot go on" in caplog.text)
        assert not heard.wait(0.2)
    asking.join(SOON_S)
    assert heard.is_set(), "once it is closed nobody waits for it"


def test_who_waits_for_an_operation_costs_nothing_until_it_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of up to 64 encoded all that it leads to at each event, under the lock of operations:
    20 ms for 256 experts in 60 layers on 64 shards."""
    public, told = Operation.public, []

    def counted(operation: Operation) -> dict[str, object]:
        told.append(operation.outcome)
        return public(operation)

    with world_operations(tmp_path) as operations:
        operations.holds = True
        operations.request("up", ScaleTo(3))
        monkeypatch.setattr(Operation, "public", counted)
        runner = operations.runner
        waiting = [threading.Thread(target=runner.wait, args=("up", SOON_S)) for _ in range(3)]
        for each in waiting:
            each.start()
        # that all of them wait nothing public says
        until(lambda: len(runner._changed._waiters) == 3)  # type: ignore[attr-defined]
        for _ in range(10):
            runner.lost("nobody", 1)
        runner.come_round()
        assert told == []
        operations.release()
        for each in waiting:
            each.join(SOON_S)
    assert told == ["done"] * 3


@pytest.mark.parametrize("why", [WeightsError("it is not there"), RuntimeError("Ray is away")])
def test_what_cannot_be_adopted_now_is_adopted_later(lives: Lives, why: Exception) -> None:
    """With an error that was none of ours Ray gave the coordinator up for good."""
    lives.write({"t": "base"})
    lives.is_readable = False
    lives.why = why
    coordinator = lives.made()
    assert coordinator.phase() == "new", "it does not say that it serves"
    assert str(why) in coordinator.status()["error"]
    with pytest.raises(ClusterError, match="there is no view"):
        coordinator.view()
    lives.is_readable = True
    until(lambda: coordinator.phase() == "serving")


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
    monkeypatch.setattr(beside.Beside, "serve", SERVE)
    monkeypatch.setattr(beside, "make_rebalancer", made)
    lives.write({"t": "base"})
    assert lives.made().view() == newer
    assert told == [1, 2]


def test_a_port_that_is_taken_when_a_coordinator_comes_back_is_listened_on_once_it_is_free(
    lives: Lives, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was tried once: no calls over gRPC for the rest of that life."""
    monkeypatch.setattr(beside.Beside, "listen", LISTEN)
    monkeypatch.setattr(beside, "LISTEN_EVERY_S", 0.05)
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
        assert f"127.0.0.1:{port}" in status_text(status)
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


def test_a_log_of_another_version_is_named(lives: Lives, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was a KeyError, with which Ray gives a coordinator up for good."""
    monkeypatch.setattr(Elastic, "resume", RESUME)
    monkeypatch.setattr(elastic, "limits_of", lambda *_: Limits())
    base = World({"shard-0": ((0,), (0,))}, num_experts=1, room=1).log[0]
    del base["term"]
    lives.write(base)
    lives.is_again = False  # a start, with the log on a volume
    log = str(lives.folder / FILE)
    with pytest.raises(ClusterError, match=rf"^{log}: another version .* no 'term'\): .* delete"):
        lives.made().deploy()
    assert len(decode_records(Path(log).read_bytes(), Path(log))[0]) == 1, "somebody may want it"
    with pytest.raises(ClusterError, match="base record"):
        recovered([{"of": "something else"}], Limits(), has_router=False)


@pytest.mark.parametrize(
    ("target", "uid"), [(ScaleTo(dense_groups=1), "dense-1"), (ScaleTo(1), "shard-1")]
)
def test_who_retires_and_was_a_standby_once_is_adopted_and_not_ended(
    lives: Lives, monkeypatch: pytest.MonkeyPatch, target: ScaleTo, uid: str
) -> None:
    """Its requests had to go on elsewhere: it was looked for by another name than it has."""
    it = World(SLOTS, num_experts=4, room=4)
    it.ask("down", target)
    while it.log[-1]["t"] != "committed":
        it._tell(it.queue.pop(0))
    name = actor_name(NAME, f"{STANDBY}77", 1)
    records = json.loads(msgspec.json.encode(it.log).replace(f"{uid}#1".encode(), name.encode()))
    assert all(m["uid"] != uid for m in records[-1]["view"]["members"]), "it is none any more"
    handles: dict[str, str] = {}
    kept: set[str] = set()
    monkeypatch.setattr(elastic, "limits_of", lambda *_: Limits())
    monkeypatch.setattr(elastic, "find_actor", lambda found: found)
    monkeypatch.setattr(elastic, "end_strays", lambda _, in_use: kept.update(in_use))
    monkeypatch.setattr(Elastic, "_run", lambda *_: None)
    adopting = Elastic(
        lives.config, b"", Wal.open(lives.folder)[0], publish=lambda _: None,
        changed=lambda which, handle, _: handles.update({which: handle}),
    )  # fmt: skip
    RESUME(adopting, records, cast(Any, None), None)
    adopting.let_go()
    assert handles[uid] == name and name in kept
    assert handles["dense-0"] == "dense-0#1" and len(kept) == len(handles) == 4


def test_a_log_that_another_life_still_holds_is_waited_for(lives: Lives) -> None:
    held, _ = Wal.open(lives.folder)
    held.append({"t": "base"})
    coordinator = lives.made()
    assert coordinator.phase() == "new"
    held.close()
    until(lambda: coordinator.phase() == "serving")
    wal, _ = Wal.open(lives.folder / "elsewhere")
    threading.Timer(0.3, wal.close).start()
    Wal.open(lives.folder / "elsewhere", SOON_S)[0].close()


def test_where_nothing_lives_another_life_begins_again(
    lives: Lives, monkeypatch: pytest.MonkeyPatch
) -> None:
    lives.write({"t": "base"})
    lives.living = None
    monkeypatch.setattr(Coordinator, "deploy", lambda _: lives.deployed.set())
    lives.made()
    assert lives.deployed.wait(SOON_S), "who serves requests would wait for it for ever"
    lives.deployed.clear()
    lives.write({"t": "base"})
    lives.is_again = False  # somebody has just asked for it, and deploys
    lives.made()
    assert not lives.deployed.wait(0.2)


def test_how_long_it_is_up_is_no_matter_of_the_date(
    lives: Lives, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host whose time was set after its start told of years, or of less than nothing."""
    clocks = SimpleNamespace(time=lambda: 0.0, monotonic=lambda: 100.0)
    monkeypatch.setattr(module, "time", clocks)
    coordinator = lives.made()
    clocks.time, clocks.monotonic = lambda: 1e9, lambda: 107.0
    assert coordinator.status()["uptime_s"] == 7.0


def test_what_was_being_stopped_is_ended(lives: Lives) -> None:
    lives.write(ENDING)
    coordinator = lives.made()
    assert coordinator.phase() == "failed" and len(lives.swept) == 1
    with pytest.raises(ClusterError, match="has been stopped"):
        coordinator.deploy()
    assert not lives.folder.exists()


def test_what_cannot_be_ended_now_is_ended_later(
    lives: Lives, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its log stayed locked by the very life that was to try again."""

    def silent(_: str) -> None:
        monkeypatch.setattr(module, "end_all", lives.sweep)
        raise RuntimeError("Ray is away")

    monkeypatch.setattr(module, "end_all", silent)
    lives.write(ENDING)
    coordinator = lives.made()
    assert coordinator.phase() == "new"
    until(lambda: coordinator.phase() == "failed")
    assert len(lives.swept) == 1 and not lives.folder.exists()


def test_the_log_goes_after_all_that_it_tells_of(
    lives: Lives, monkeypatch: pytest.MonkeyPatch
) -> None:
    lives.write({"t": "base"})
    coordinator = lives.made()
    monkeypatch.setattr(module, "stop_members", lambda _: lives.sweep(""))
    coordinator.stop()
    assert lives.swept == [[ENDING], [ENDING]], "another life would end the rest"
    assert coordinator.phase() == "stopped" and not lives.folder.exists()


def test_seconds_of_an_operation_go_on_on_another_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host's monotonic clock counts from its start: what one has written was nonsense to another,
    and an evacuation that was taken over had no time left, or for ever."""
    host = SimpleNamespace(unix_s=1e9, up_s=5.0)
    clocks = SimpleNamespace(time=lambda: host.unix_s, monotonic=lambda: host.up_s)
    monkeypatch.setattr(elastic, "time", clocks)
    begun_s = elastic.unix_clock()()
    host.unix_s, host.up_s = 1e9 + 60, 9e6
    clock = elastic.unix_clock()
    assert clock() - begun_s == 60
    host.unix_s, host.up_s = 5.0, 9e6 + 1  # somebody sets the time
    assert clock() - begun_s == 61
