"""Histories over a router's restart: the same plans, and nothing believed that is damaged."""

import errno
import os
import threading
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
from support.router_rig import view_of
from support.router_traffic import encoded, paired_tokens, sketch_of

from remora.actors.router_statistics import SAVE_EVERY_TOKENS, RouterStatistics
from remora.comm.errors import ClusterError, FrameError
from remora.comm.history_file import pack_history, unpack_history
from remora.comm.sketch import encode_sketch
from remora.comm.statistics import HistoryLimits, RoutingHistory
from remora.comm.view import Member, View

LAYERS = (1, 2)


def history() -> RoutingHistory:
    sketches = [
        sketch_of(paired_tokens(2, 700, seed=s, shift=s % 2), source="ab"[s % 2], moe_layers=LAYERS)
        for s in range(5)
    ]
    found = RoutingHistory.of(sketches[0])
    for sketch in sketches:
        found.add(sketch)
    return found


def assert_same(one: RoutingHistory, other: RoutingHistory) -> None:
    assert one.recent_shares() == other.recent_shares()
    assert one.tokens_total == other.tokens_total and one.sources == other.sources
    np.testing.assert_array_equal(one.load_LE(), other.load_LE())
    for first, second in zip(one.bundles(("a", "b")), other.bundles(("a", "b")), strict=True):
        np.testing.assert_array_equal(first.experts_BK, second.experts_BK)
        np.testing.assert_array_equal(first.source_B, second.source_B)
        np.testing.assert_allclose(first.weight_B, second.weight_B, rtol=1e-12)


def test_what_is_packed_comes_back_and_goes_on_alike() -> None:
    before = history()
    after = unpack_history(pack_history(before))
    assert_same(before, after)
    more = sketch_of(paired_tokens(2, 300, seed=9), source="c", moe_layers=LAYERS)
    before.add(more)
    after.add(more)
    assert_same(before, after)


def test_a_smaller_limit_holds_for_what_is_restored() -> None:
    small = HistoryLimits(bytes_max=2000)
    restored = unpack_history(pack_history(history()), small)
    assert restored.nbytes < 3 * history().nbytes / 4 or restored.nbytes <= 4000
    assert sum(b.num_tokens for b in restored.bundles(("a", "b"))) > 0


def test_anything_else_is_refused() -> None:
    data = pack_history(history())
    for bad in (b"", b"RMHIST1\n", data[:-1], b"x" + data, data + b"x"):
        with pytest.raises(FrameError):
            unpack_history(bad)
    for at in (3, 9, 40, len(data) // 2, len(data) - 1):
        turned = bytearray(data)
        turned[at] ^= 0x40
        with pytest.raises(FrameError):
            unpack_history(bytes(turned))


def test_a_restarted_router_plans_as_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "state" / "history.msgpack"
    first = RouterStatistics(slots=None, path=path)
    for source in ("a", "b"):
        first.add(encoded(paired_tokens(2, 2000), source, LAYERS))
    assert not path.exists()
    first.save()
    second = RouterStatistics(slots=None, path=path)
    second.restore()
    assert second.plan(view_of(), 0) == first.plan(view_of(), 0)
    with pytest.raises(ClusterError, match="0 tokens"):
        second.fresh_cost(view_of(), view_of().placement)


def test_a_plan_says_how_much_it_rests_on() -> None:
    """A little of a domain that is most of the traffic now, beside much of one that is over."""
    statistics = RouterStatistics(slots=None, path=None)
    for seed in range(20):
        statistics.add(encoded(paired_tokens(2, 5000, seed=seed), "a", LAYERS))
    for seed in range(3):
        statistics.add(encoded(paired_tokens(2, 500, seed=seed, num_experts=4), "a", LAYERS))
    assert 1500 < statistics.plan(view_of(), 0).tokens < 5000
    assert 1500 < statistics.fresh_cost(view_of(), view_of().placement).tokens < 5000
    with pytest.raises(ClusterError, match="at least 256 are needed"):
        turned = RouterStatistics(slots=None, path=None)
        turned.add(encoded(paired_tokens(2, 200), "a", LAYERS))
        turned.plan(view_of(), 0)


def other_model(num_tokens: int = 1000) -> bytes:
    ids = paired_tokens(2, num_tokens, num_experts=16)
    return encode_sketch(sketch_of(ids, source="a", moe_layers=LAYERS, num_experts=16))


def test_what_another_model_left_is_set_aside_with_the_first_sketch(tmp_path: Path) -> None:
    path = tmp_path / "history.msgpack"
    first = RouterStatistics(slots=None, path=path)
    first.add(other_model())
    first.save()
    second = RouterStatistics(slots=None, path=path)
    second.restore()
    second.add(encoded(paired_tokens(2, 2000), "a", LAYERS))
    assert second.status()["tokens"] == 2000 and second.plan(view_of(), 0).moved_experts == 8
    assert not path.exists() and path.with_suffix(".unusable").exists()
    with pytest.raises(FrameError, match="kept are"):
        second.add(other_model())
    assert second.status()["tokens"] == 2000, "now it is known which model this is"


def renamed(view: View) -> View:
    """The same deployment after Ray was started again: machines have other names."""

    def other(member: Member) -> Member:
        host = f"{member.endpoint.host} again"
        return msgspec.structs.replace(
            member, endpoint=msgspec.structs.replace(member.endpoint, host=host)
        )

    return msgspec.structs.replace(view, members=tuple(map(other, view.members)))


@pytest.mark.parametrize("groups", [("a",), ("a", "b")])
def test_hosts_of_before_a_restart_stand_for_those_that_serve_now(
    tmp_path: Path, groups: tuple[str, ...]
) -> None:
    """Else no token would be at home anywhere: too many copies, and none to be saved there."""
    view = view_of()
    members = [m for m in view.members if m.role == "shard" or m.endpoint.host in groups]
    view = msgspec.structs.replace(view, members=tuple(members))
    first = RouterStatistics(slots=6, path=tmp_path / "history.msgpack")
    for seed, source in enumerate(groups):
        first.add(encoded(paired_tokens(2, 4000, seed=seed), source, LAYERS))
    first.save()
    second = RouterStatistics(slots=6, path=tmp_path / "history.msgpack")
    second.restore()
    before, after = first.plan(view, 0), second.plan(renamed(view), 0)
    assert after.mean("copies_before") == pytest.approx(before.mean("copies_before"), rel=0.1)
    assert after.mean("copies_after") < 1.1 * before.mean("copies_after")
    if len(groups) == 1:
        assert after.placement == before.placement


def test_a_host_that_gave_its_group_up_sends_no_more() -> None:
    """It still has a shard: traffic that came from there counts as of the group that is left."""
    view = view_of()
    left = [m for m in view.members if m.role == "shard" or m.endpoint.host == "a"]
    statistics = RouterStatistics(slots=None, path=None)
    first_half = paired_tokens(2, 4000) // 2  # experts of the shard on host a alone
    statistics.add(encoded(first_half, "b", LAYERS))
    assert statistics.plan(view, 0).mean("copies_before") == pytest.approx(1)
    alone = msgspec.structs.replace(view, epoch=2, members=tuple(left))
    assert statistics.plan(alone, 0).mean("copies_before") == 0.0


def test_nothing_is_planned_from_what_another_model_left(tmp_path: Path) -> None:
    """Before the first sketch of this one: there is nothing yet, and that is what is said."""
    first = RouterStatistics(slots=None, path=tmp_path / "history.msgpack")
    first.add(other_model())
    first.save()
    second = RouterStatistics(slots=None, path=tmp_path / "history.msgpack")
    second.restore()
    with pytest.raises(ClusterError, match="0 tokens were reported"):
        second.plan(view_of(), 0)


def test_the_first_sketch_must_be_of_the_model_that_serves() -> None:
    """Else every later one, of the deployment's own groups, would be refused for good."""
    statistics = RouterStatistics(slots=None, path=None)
    placement = view_of().placement
    with pytest.raises(FrameError, match="another model than serves"):
        statistics.add(other_model(), "dense-0", placement)
    statistics.add(encoded(paired_tokens(2, 300), "a", LAYERS), "dense-0", placement)
    assert statistics.status()["tokens"] == 300


def test_a_sketch_of_another_model_leaves_nothing_behind() -> None:
    """Nor when it is the first after a placement changed."""
    statistics = RouterStatistics(slots=None, path=None)
    statistics.add(encoded(paired_tokens(2, 2000), "a", LAYERS))
    statistics.start_fresh()
    with pytest.raises(FrameError, match="kept are"):
        statistics.add(other_model())
    statistics.add(encoded(paired_tokens(2, 2000), "a", LAYERS))
    assert statistics.fresh_cost(view_of(), view_of().placement).copies > 0


def test_a_file_that_cannot_be_set_aside_stops_no_router(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "history.msgpack"
    path.write_bytes(b"no history")

    def refuse(self: Path, target: Path) -> Path:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "replace", refuse)
    statistics = RouterStatistics(slots=None, path=path)
    statistics.restore()
    assert "cannot be set aside: Read-only file system" in caplog.text
    statistics.add(encoded(paired_tokens(2, 300), "a", LAYERS))
    assert statistics.status()["tokens"] == 300


def test_two_saves_at_once_do_not_write_the_same_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "history.msgpack"
    statistics = RouterStatistics(slots=None, path=path)
    statistics.add(encoded(paired_tokens(2, 300), "a", LAYERS))
    writing, most = 0, 0
    sync = os.fsync

    def slow(file: int) -> None:
        nonlocal writing, most
        writing += 1
        most = max(most, writing)
        time.sleep(0.05)
        sync(file)
        writing -= 1

    monkeypatch.setattr(os, "fsync", slow)
    savers = [threading.Thread(target=statistics.save) for _ in range(3)]
    for saver in savers:
        saver.start()
    for saver in savers:
        saver.join()
    assert most == 1, "synced before it takes its place, one at a time"
    assert unpack_history(path.read_bytes()).tokens_total == 300


def test_it_is_saved_now_and_then_and_a_damaged_file_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "history.msgpack"
    statistics = RouterStatistics(slots=None, path=path)
    statistics.add(encoded(paired_tokens(2, int(SAVE_EVERY_TOKENS)), "a", LAYERS))
    assert path.exists()
    path.write_bytes(path.read_bytes()[:-3])
    again = RouterStatistics(slots=None, path=path)
    again.restore()
    assert again.status()["tokens"] == 0
    assert not path.exists() and path.with_suffix(".unusable").exists()
