"""An expert shard in this process: its native loop gives what its Python loop gives, and counts it.

The tests of `comm` hold the loop together with a toy kernel; here it drives the real one.
"""

from pathlib import Path

import pytest
import torch
from support.checkpoints import make_checkpoint
from torch import Tensor

from remora.actors.expert_actor import ExpertActor
from remora.actors.launch import ShardLaunch
from remora.actors.model_spec import inspect_model
from remora.comm import native
from remora.comm.dispatch import Combine, Dispatcher
from remora.comm.errors import PeerLostError
from remora.comm.peers import PeerSet
from remora.comm.view import Placement, View

TOKEN = b"a token of the tests, 32 bytes.."
MOST = tuple(range(7))  # of eight experts: the last is nowhere


def rows(num_rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_rows)
    hidden_TD = torch.randn(num_rows, width, generator=generator).to(dtype)
    index_TK = torch.rand(num_rows, 7, generator=generator).argsort(1)[:, :2].contiguous()
    return hidden_TD, index_TK, torch.rand(num_rows, 2, generator=generator)


def answers(
    path: Path, architecture: str, dtype: torch.dtype, mode: Combine
) -> tuple[list[Tensor], int]:
    """Of a few layers' rows, by a shard started now; and how many calls it says it served."""
    spec = inspect_model(path)
    launch = ShardLaunch(
        deployment="d", uid="shard-0", incarnation=3, model=str(path), dtype=str(dtype)[6:],
        exact=True, token=TOKEN, num_threads=1,
        experts_by_layer={layer: MOST for layer in spec.moe_layers},
    )  # fmt: skip
    actor = ExpertActor(launch)
    peers = PeerSet(token=TOKEN, self_host="in-process")
    try:
        member = actor.start()
        claimed = Placement(  # the view is wrong about expert 7
            num_experts=8, moe_layers=spec.moe_layers,
            slots={"shard-0": (tuple(range(8)),) * len(spec.moe_layers)},
        )  # fmt: skip
        view = View(epoch=1, members=(member,), placement=claimed)
        dispatcher = Dispatcher(view=view, peers=peers, combine=mode)
        heard = []
        for num_rows in (1, 5, 40):
            batch = rows(num_rows, spec.hidden_size, dtype)
            heard += [dispatcher.moe(layer, *batch, num_rows) for layer in spec.moe_layers]
        layer = spec.moe_layers[0]
        hidden_TD, index_TK, weights_TK = rows(3, spec.hidden_size, dtype)
        index_TK[1, 0] = 7
        with pytest.raises(PeerLostError, match=r"does not hold experts \[7\]"):
            dispatcher.moe(layer, hidden_TD, index_TK, weights_TK, 3)
        status = actor.status()
        assert status["compute_s"] > 0 and status["peers"] == 1
        pump = actor._pump
        assert (pump is not None) == (native.native_extension() is not None)
        assert pump is None or pump.calls_served == len(heard)
        return heard, status["calls_served"]
    finally:
        peers.close()
        actor.stop()


@pytest.mark.parametrize("mode", ["ordered", "presummed"])
@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [("qwen3_moe", torch.bfloat16), ("gpt_oss", torch.float32)],
    ids=["qwen3_moe", "gpt_oss"],
)
def test_native_and_python_loops_give_the_same_bits(
    architecture: str, dtype: torch.dtype, mode: Combine, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path = make_checkpoint(tmp_path, architecture)
    here, served = answers(path, architecture, dtype, mode)
    monkeypatch.setattr(native, "_EXTENSION", None)
    there, served_in_python = answers(path, architecture, dtype, mode)
    assert len(here) == len(there) > 0 and all(map(torch.equal, here, there))
    assert served == served_in_python == len(here)
