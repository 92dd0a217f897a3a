"""What the token shuffle must do where rows lie on a GPU and exchanges are only enqueued (NCCL)."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.tp_engine import gloo_groups, nccl_groups
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from remora.actors import shuffle_op
from remora.actors.tp_group import Ranks
from remora.actors.tp_leader import Leader
from remora.actors.tp_shuffle import TokenShuffle
from remora.comm.collectives import DryGroup
from remora.comm.errors import ClusterError
from remora.comm.shuffle import Form, copy_prices
from remora.comm.shuffle_scores import OnlineScores


def test_rows_of_a_gpu_are_sliced_by_an_order_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that have a device and no values: torch checks devices, no GPU is needed."""
    engine_id, mode = -7, FakeTensorMode()
    shuffle_op.divide(engine_id, DryGroup(0, 2))
    with mode:
        rows = FakeTensor(mode, torch.empty((1, 6, 8), device="meta"), torch.device("cuda:0"))
        monkeypatch.setattr(shuffle_op, "_order", lambda *_: torch.arange(6))
        own = shuffle_op.slice_rows(rows, engine_id, 2)
    assert own.shape == (1, 3, 8) and own.device.type == "cuda"


def test_bundles_are_not_read_before_their_exchange_is_over() -> None:
    """The other rank has gone: a read would wait for its part for good."""
    groups = nccl_groups(2, reasons=(reasons := []))
    scores = OnlineScores(num_layers=1, num_experts=4, num_ranks=2, vocab_size=9)
    shuffle = TokenShuffle(groups[0], form="speculative", sliced=[0], scores=scores)
    hosts, table = ["a", "b"], torch.tensor([[0], [1], [0], [1]], dtype=torch.int16)
    shuffle.set_prices(copy_prices(hosts, hosts), {0: table.numpy()})
    shuffle.begin_step(torch.arange(4), 4)
    shuffle.predicted_order(0, 4)
    shuffle.note_slice(torch.tensor([[0, 1], [2, 3]]))
    groups[1].abort("rank 1 is gone")
    assert reasons
    with pytest.raises(ClusterError, match="rank 1 is gone"):
        shuffle.close_layer()
    for group in groups:
        group.close()


@pytest.mark.parametrize(("make", "best"), [(gloo_groups, "speculative"), (nccl_groups, "none")])
def test_auto_knows_that_nccl_sums_all_rows(make: Callable[[int], list[Any]], best: Form) -> None:
    """Between hosts, where a reduce-scatter is what makes guessing worth while."""
    groups = make(2)
    leader = Leader(
        "dense-0", Ranks(group=groups[0], links={}, hosts=["a", "b"], kernels=["k"] * 2), 1.0
    )
    launch: Any = SimpleNamespace(token_shuffle="auto", exact=False)
    spec: Any = SimpleNamespace(num_experts=64, top_k=6, hidden_size=2048)
    assert leader.settle_form(launch, spec, torch.bfloat16) == best
    for group in groups:
        group.close()
