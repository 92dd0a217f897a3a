"""What a coordinator does with the log of one that died: adopt, wait, begin again, end."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from support.coordinator_lives import NAME, SOON_S, Lives, until
from support.coordinator_rig import World
from support.operations import SLOTS, world_operations
from support.router_rig import view_of

from remora.actors.launch import STANDBY, actor_name
from remora.cluster import coordinator as module
from remora.cluster import elastic
from remora.cluster.coordinator import Coordinator
from remora.cluster.coordinator_calls import Limits
from remora.cluster.coordinator_recovery import recovered
from remora.cluster.coordinator_state import CoordinatorState
from remora.cluster.elastic import ENDING, Elastic
from remora.cluster.operation import Effect, Operation, ScaleTo
from remora.cluster.operation_plan import FreeMemory
from remora.cluster.wal import FILE, Wal, WalError, decode_records
from remora.comm.errors import ClusterError, WeightsError

RESUME = Elastic.resume


@pytest.fixture
def lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lives:
    return Lives(tmp_path, monkeypatch)


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


def test_what_was_accepted_is_planned_with_the_memory_that_hosts_have(
    lives: Lives, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when it is asked for; it began whether or not it fits."""
    it = World(SLOTS, num_experts=4, room=4)
    it.placeless.add("shard-2")
    it.ask("replace-x:1", ScaleTo(3, gives_way=True))
    it.answer_all()
    it.ask("mine", ScaleTo(4))
    assert it.log[-1]["t"] == "accepted"
    begun: list[Callable[[], list[Effect]]] = []
    machines: list[CoordinatorState] = []

    def run(operations: Elastic, state: CoordinatorState, *others: Any) -> None:
        free = FreeMemory(slot_bytes=1 << 20, by_host={"host-0": 1 << 20})
        operations._tasks = cast(Any, SimpleNamespace(free_memory=lambda _: free))
        machines.append(state)
        begun.append(others[-1])

    monkeypatch.setattr(elastic, "limits_of", lambda *_: Limits())
    monkeypatch.setattr(elastic, "find_actor", lambda found: found)
    monkeypatch.setattr(elastic, "end_strays", lambda *_: None)
    monkeypatch.setattr(Elastic, "_run", run)
    adopting = Elastic(
        lives.config, b"", Wal.open(lives.folder)[0], publish=lambda _: None,
        changed=lambda *_: None,
    )  # fmt: skip
    RESUME(adopting, json.loads(msgspec.json.encode(it.log)), cast(Any, None), None)
    adopting.let_go()
    it.state, effects = machines[0], begun[0]()
    it.unplaced.clear()
    it._carry_out(effects)
    it.settle()
    mine = it.state.history["mine"]
    assert mine.outcome == "failed" and mine.reason.startswith("no memory for 2 more shards")
    it.check_at_rest()


def test_a_log_that_another_life_still_holds_is_waited_for(
    lives: Lives, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A volume of the network may keep the lock of a host that is gone for a minute or two. Who
    asks for the deployment meanwhile hears why, and does not have the coordinator removed."""
    held, _ = Wal.open(lives.folder)
    held.append({"t": "base"})
    coordinator = lives.made()
    with pytest.raises(WalError, match="another coordinator writes it"):
        coordinator.deploy()
    assert coordinator.phase() == "new"
    monkeypatch.setattr(module, "LOCK_S", SOON_S)
    threading.Timer(0.3, held.close).start()
    assert coordinator.deploy() == view_of()


def test_stop_waits_for_no_log_that_another_life_holds(
    lives: Lives, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waited until the lock was there, or 120 s had passed."""
    monkeypatch.setattr(module, "ADOPT_EVERY_S", 1000.0)
    monkeypatch.setattr(module, "LOCK_S", 1000.0)
    held, _ = Wal.open(lives.folder)
    held.append({"t": "base"})
    coordinator = lives.made()
    coordinator.stop()
    assert coordinator.phase() == "stopped" and len(lives.swept) == 1
    with pytest.raises(ClusterError, match="has been stopped"):
        coordinator.deploy()
    held.close()


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
