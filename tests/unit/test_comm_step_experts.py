"""Layers of a step asked without Python (`Dispatcher.step_experts`): same bits, and hand-overs."""

import ctypes
import queue
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support.comm_rig import (
    TOKEN,
    WAIT_S,
    Shards,
    answer,
    counted,
    everywhere,
    member,
    random_batch,
    serving,
    shards,
)
from torch import Tensor

from remora.actors import attention_op
from remora.comm import native
from remora.comm.connection import Connection, Frame
from remora.comm.dispatch import Combine, Dispatcher
from remora.comm.errors import PeerLostError
from remora.comm.peers import PeerSet
from remora.comm.view import View
from remora.comm.wire import Kind
from remora.kernels.attention import KVPages, build_plan
from remora.kernels.native import native_available
from remora.kernels.step import RoutingNotes, enter_step, leave_step, step_layers

pytestmark = pytest.mark.skipif(
    native.native_extension() is None or not native_available(), reason="not built"
)
ENGINE = (1 << 40) + 1  # no model of another test has it
NUM_LAYERS = 3  # decoder layers; 0 and 2 have experts


@pytest.fixture(scope="module")
def rig() -> Iterator[Shards]:
    with shards(num_shards=2, placement=everywhere("shard-0", "shard-1")) as rig:
        yield rig


class Asked:
    """A step whose layers ask as compiled ones do. `in_python`: those that Python was asked for."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        dispatcher: Dispatcher,
        num_rows: int,
        num_tokens: int,
    ) -> None:
        pages = [KVPages.allocate(1, 1, 16, 16, torch.float32)] * NUM_LAYERS
        self._layers = step_layers(pages, [(1.0, None, None)] * NUM_LAYERS)
        plan = build_plan([0], [num_tokens], [list(range(-(-num_tokens // 16)))], num_rows)
        self._cursor = ctypes.c_int64(-1)
        self.in_python: list[int] = []
        self._dispatcher, self._num_tokens = dispatcher, num_tokens
        self.index_L = np.array([0, -1, 1], np.int32)
        self.noted_LTK = np.full((2, num_tokens, 4), -7, np.int64)
        self.notes = RoutingNotes(
            base=self.noted_LTK.ctypes.data, pitch=self.noted_LTK.strides[0],
            num_bytes=self.noted_LTK.strides[0], index=self.index_L.ctypes.data,
            num_layers=NUM_LAYERS, layers_seen=0,
        )  # fmt: skip
        address = dispatcher.step_experts()
        assert address
        enter_step(ENGINE, self._layers, plan, exact=True, cursor=self._cursor, experts=address,
                   notes=self.notes)  # fmt: skip
        monkeypatch.setattr(attention_op.steps, "current", lambda engine_id: self)
        self.plan, self.failure = plan, None

    @property
    def layer(self) -> int:
        return self._cursor.value

    def experts(self, layer: int, *batch: Any) -> Tensor:
        self.in_python.append(layer)
        return self._dispatcher.moe(layer, *batch)

    def ask(self, layer: int, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        self._cursor.value = layer
        found: Tensor = torch.ops.remora.step_experts(*batch, ENGINE)
        return found

    def __enter__(self) -> "Asked":
        return self

    def __exit__(self, *_: object) -> None:
        leave_step(ENGINE)


@pytest.mark.parametrize("mode", ["ordered", "presummed"])
def test_same_bits_as_asked_from_python_and_what_was_routed_is_noted(
    rig: Shards, mode: Combine, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = [PeerSet(token=TOKEN, self_host="a") for _ in range(2)]
    ours, twin = (Dispatcher(view=rig.view, peers=peers, combine=mode) for peers in sets)
    twin.moe(0, *random_batch(2), 2)  # connections are described with the first layer of each
    ours.moe(0, *random_batch(2), 2)
    for seed in range(12):
        num_tokens, padding = (1, 2, 8, 14)[seed % 4], (0, 2)[seed % 2]
        dtype = (torch.float32, torch.bfloat16)[seed % 3 == 0]
        hidden, index, weights = random_batch(num_tokens + padding, dtype=dtype, seed=seed)
        batch = hidden, index, weights.to((torch.float32, torch.bfloat16)[seed % 5 == 0])
        with Asked(monkeypatch, ours, num_tokens + padding, num_tokens) as asked:
            for place, layer in enumerate((0, 2)):
                expected = twin.moe(layer, *batch, num_tokens)
                assert torch.equal(asked.ask(layer, batch), expected)
                assert np.array_equal(asked.noted_LTK[place], index[:num_tokens].numpy())
        assert asked.in_python == [] and asked.notes.layers_seen == 2
    for uid in rig.view.placement.slots:
        assert counted(sets[0].counters.link(uid)) == counted(sets[1].counters.link(uid))
    for peers in sets:
        peers.close()


def test_what_the_client_does_not_read_goes_to_python(
    rig: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    """int32 indices are no reason to leave the next layer to Python; a layer without a table is."""
    peers = PeerSet(token=TOKEN, self_host="a")
    dispatcher = Dispatcher(view=rig.view, peers=peers, combine="ordered")
    hidden, index, weights = random_batch(4)
    expected = dispatcher.moe(0, hidden, index, weights, 4)
    with Asked(monkeypatch, dispatcher, 4, 4) as asked:
        assert torch.equal(asked.ask(0, (hidden, index.int(), weights)), expected)
        assert torch.equal(asked.ask(0, (hidden, index, weights)), expected)
        assert asked.in_python == [0] and asked.notes.layers_seen == 1
        with pytest.raises(Exception, match="1"):
            asked.ask(1, (hidden, index, weights))
        assert isinstance(asked.failure, Exception)  # what compiled code would make a text of
        assert torch.equal(asked.ask(2, (hidden, index, weights)),
                           dispatcher.moe(2, hidden, index, weights, 4))  # fmt: skip
        assert asked.in_python == [0, 1, 2]
    peers.close()


@pytest.mark.parametrize("case", ["stale first", "lost"])
def test_a_layer_under_way_that_turns_out_unusual_is_finished_in_python(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so are the layers behind it, until the next step."""
    answers: queue.Queue[Any] = queue.Queue()

    def on_frame(connection: Connection, frame: Frame) -> None:
        connection.outstanding -= 1
        parts = answers.get(timeout=WAIT_S)(frame)
        if parts is None:
            connection.sock.shutdown(2)
            return
        for part in parts:
            assert connection.transmit(part, 0, 0)

    def plain(frame: Frame) -> list[bytes]:
        return [answer(frame)]

    with serving(on_frame) as (server, _):
        peers = PeerSet(token=TOKEN, self_host="b")
        view = View(
            epoch=1, members=(member(server.endpoint("a")),), placement=everywhere("shard-0")
        )
        dispatcher = Dispatcher(view=view, peers=peers, combine="presummed")
        batch = random_batch(3)
        answers.put(plain)
        dispatcher.moe(0, *batch, 3)
        with Asked(monkeypatch, dispatcher, 3, 3) as asked:
            if case == "stale first":
                answers.put(lambda f: [answer(f, sequence=10**9), answer(f)])
                assert torch.equal(asked.ask(0, batch), torch.ones(3, 64))
                assert peers.counters.link("shard-0").stale_replies == 1
            else:
                for _ in range(4):
                    answers.put(lambda f: None)
                with pytest.raises(PeerLostError):
                    asked.ask(0, batch)
                assert isinstance(asked.failure, PeerLostError)
                while not answers.empty():
                    answers.get()
            answers.put(plain)
            assert torch.equal(asked.ask(2, batch), torch.ones(3, 64))
            assert asked.in_python == [0, 2]
        with Asked(monkeypatch, dispatcher, 3, 3) as asked:
            answers.put(plain)
            assert torch.equal(asked.ask(2, batch), torch.ones(3, 64))
            assert asked.in_python == []
        peers.close()


def test_a_view_that_a_layer_of_python_takes_is_that_of_the_layers_behind_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They used to be asked for under the old one, by tables that were freed."""
    answers: queue.Queue[Any] = queue.Queue()
    epochs: list[int] = []

    def on_frame(connection: Connection, frame: Frame) -> None:
        connection.outstanding -= 1
        epochs.append(frame.header.epoch)
        assert connection.transmit(answers.get(timeout=WAIT_S)(frame), 0, 0)

    with serving(on_frame) as (server, _):
        peers = PeerSet(token=TOKEN, self_host="b")
        old, new = (
            View(
                epoch=epoch,
                members=(member(server.endpoint("a")),),
                placement=everywhere("shard-0"),
            )
            for epoch in (1, 2)
        )
        dispatcher = Dispatcher(
            view=old, peers=peers, combine="presummed", refresh_view=lambda epoch: new
        )
        hidden, index, weights = random_batch(3)
        answers.put(answer)
        dispatcher.moe(0, hidden, index, weights, 3)
        with Asked(monkeypatch, dispatcher, 3, 3) as asked:
            not_mine = index[0, :1].int().numpy().tobytes()
            answers.put(lambda f: answer(f, kind=int(Kind.NOT_MINE), num_rows=0, body=not_mine))
            answers.put(answer)
            assert torch.equal(asked.ask(0, (hidden, index.int(), weights)), torch.ones(3, 64))
            answers.put(answer)
            assert torch.equal(asked.ask(2, (hidden, index, weights)), torch.ones(3, 64))
            assert epochs == [1, 1, 2, 2] and asked.in_python == [0, 2]
        peers.close()
