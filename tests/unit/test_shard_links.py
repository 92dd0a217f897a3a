"""What a dense rank asks of its shards at connect."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.comm_rig import TOKEN, random_batch, shards

from remora.actors.shard_links import peer_limits
from remora.comm.auth import ClientHandshake
from remora.comm.dispatch import Dispatcher
from remora.comm.limits import ROWS_PER_CALL_MAX
from remora.comm.peers import PeerSet


def limits_of(num_rows: int, *, width: int, top_k: int, exact: bool) -> Any:
    """For steps of `num_rows` rows in bfloat16."""
    spec = SimpleNamespace(hidden_size=width, top_k=top_k)
    model: Any = SimpleNamespace(spec=spec, dtype=torch.bfloat16)
    launch: Any = SimpleNamespace(max_tokens_per_step=num_rows, exact=exact)
    return peer_limits(model, launch)


@pytest.mark.parametrize("exact", [True, False])
def test_a_region_is_as_large_as_a_call_and_not_as_a_step(exact: bool) -> None:
    few, most, step = (
        limits_of(rows, width=7168, top_k=8, exact=exact)
        for rows in (100, ROWS_PER_CALL_MAX, 1 << 20)
    )
    assert few.region_bytes < most.region_bytes == step.region_bytes
    ClientHandshake(TOKEN, region_bytes=step.region_bytes)  # it has four bytes for it


@pytest.mark.parametrize("exact", [True, False])
def test_the_largest_calls_of_a_step_fit_their_regions(exact: bool) -> None:
    """Else rows would leave in more slices than the dispatcher is told to make."""
    limits = limits_of(2000, width=64, top_k=4, exact=exact)
    peers = PeerSet(token=TOKEN, self_host="a", limits=limits)
    with shards(num_shards=1) as rig:
        combine: Any = "ordered" if exact else "presummed"
        dispatcher = Dispatcher(view=rig.view, peers=peers, combine=combine)
        hidden_TD, index_TK, weights_TK = random_batch(2000, dtype=torch.bfloat16)
        dispatcher.moe(0, hidden_TD, index_TK, weights_TK, 2000)
        assert dispatcher.counters.link("shard-0").sent_frames == -(-2000 // ROWS_PER_CALL_MAX)
    peers.close()
