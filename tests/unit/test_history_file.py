"""Histories over a router's restart: the same plans, and nothing believed that is damaged."""

from pathlib import Path

import numpy as np
import pytest
from support.router_rig import view_of
from support.router_traffic import encoded, paired_tokens, sketch_of

from remora.actors.router_statistics import SAVE_EVERY_TOKENS, RouterStatistics
from remora.comm.errors import ClusterError, FrameError
from remora.comm.history_file import pack_history, unpack_history
from remora.comm.statistics import HistoryLimits, RoutingHistory

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
