"""Which layers may divide their rows behind attention, read off their forward, and why not."""

import re
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from remora.actors import shuffle_op
from remora.actors.dense_surgery import CursorLayer
from remora.actors.shuffle_surgery import slice_layers
from remora.actors.tp_shuffle import Sliced
from remora.actors.tp_surgery import SummedLinear
from remora.comm.collectives import DryGroup

WIDTH = 8
GROUP = DryGroup(0, 2)


class Experts(nn.Module):
    has_gate = has_bias = True

    def _apply_gate(self) -> None: ...

    def forward(self, rows: Tensor) -> Tensor:
        return rows * 2


class Moe(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()

    def forward(self, rows: Tensor, *_: Any) -> Tensor:
        return self.experts(rows)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.o_proj = SummedLinear(nn.Linear(WIDTH, WIDTH), GROUP)

    def forward(self, rows: Tensor, mask: Tensor | None = None) -> tuple[Tensor, None]:
        return self.o_proj(rows), None


class Layer(nn.Module):
    """The usual shape."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.moe = Attention(), Moe()
        self.norm, self.other = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.scale = 0.5

    def attend(self, rows: Tensor, **given: Any) -> Tensor:
        return rows + self.attention(self.norm(rows), **given)[0] * self.scale

    def forward(self, rows: Tensor, **given: Any) -> Any:
        rows = self.attend(rows, **given)
        return rows + self.moe(self.other(rows))


class Parallel(Layer):
    def forward(self, rows: Tensor, **given: Any) -> Any:
        return rows + self.attention(self.norm(rows))[0] + self.moe(self.norm(rows))


class GivesTwo(Layer):
    def forward(self, rows: Tensor, **given: Any) -> Any:
        return Layer.forward(self, rows, **given), rows


class Mixes(Layer):
    """Shifts rows behind attention, as a short convolution does."""

    def forward(self, rows: Tensor, **given: Any) -> Any:
        rows = self.attend(rows, **given)
        return rows + self.moe(torch.roll(rows, 1, dims=1))


class MixesInModule(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv1d(4, 4, 1)  # type: ignore[assignment]


class TakesIds(Layer):
    def forward(self, rows: Tensor, **given: Any) -> Any:
        rows = self.attend(rows)
        return rows + self.moe(self.other(rows), given["mask"])


class Branches(Layer):
    def forward(self, rows: Tensor, **given: Any) -> Any:
        if rows.sum() > 0:
            return rows
        return Layer.forward(self, rows, **given)


def sliced(layer: Layer, *, ends: bool = True, by_position: bool = False) -> Sliced:
    shape = SimpleNamespace(
        ends={"0.attention.o_proj"} if ends else set(),
        arguments=(None if by_position else frozenset({"mask"}),),
    )
    part: Any = SimpleNamespace(group=GROUP, shape=shape)
    return slice_layers([CursorLayer(layer, 0, 99)], part, 99)


def test_a_layer_of_the_usual_shape_computes_on_its_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Layer()
    layer = Layer()
    layer.load_state_dict(plain.state_dict())
    assert str(sliced(layer)) == "speculative in layers 0"
    seen: list[int] = []
    layer.moe.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    # One rank with the sums of all: its slice is every second row.
    own, rows = slice(0, None, 2), torch.randn(1, 6, WIDTH)
    monkeypatch.setattr(shuffle_op, "_slice_sum", lambda part, *_: part[:, own])
    monkeypatch.setattr(shuffle_op, "_slice_rows", lambda part, *_: part[:, own])
    monkeypatch.setattr(shuffle_op, "_restore_rows", lambda part, like, _: part)
    assert torch.equal(layer(rows, mask=None), plain(rows, mask=None)[:, own])
    assert seen == [3]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Parallel, "the experts do not follow attention"),
        (GivesTwo, "the layer gives more than rows"),
        (Mixes, "roll.* behind attention is not known to work row by row"),
        (MixesInModule, "other behind attention is neither a norm nor the experts"),
        (TakesIds, "moe behind attention is given more than rows"),
        (Branches, "cannot be traced: TraceError"),
    ],
)
def test_other_layers_stay_as_they_are(kind: type[Layer], reason: str) -> None:
    layer = kind()
    found = sliced(layer)
    assert found.layers == [] and type(layer) is kind
    assert not layer.attention.o_proj.is_partial
    [said] = found.others.values()
    assert re.search(reason, said), said


def test_what_other_threads_compute_while_one_traces() -> None:
    """torch.fx puts itself in the place of all modules' calls: a rank beside this one goes on."""
    layer, other = Layer(), nn.LayerNorm(WIDTH)
    sent = torch.randn(2, WIDTH)
    answers: list[Tensor] = []

    class Meanwhile(Layer):
        def forward(self, rows: Tensor, **given: Any) -> Any:
            def compute() -> None:
                answers.extend([other(sent), layer.norm(sent)])

            thread = threading.Thread(target=compute)
            thread.start()
            thread.join()
            return Layer.forward(self, rows, **given)

    layer.__class__ = Meanwhile
    assert str(sliced(layer)) == "speculative in layers 0"
    assert [type(answer) for answer in answers] == [Tensor, Tensor]
    assert torch.equal(answers[0], other(sent)) and torch.equal(answers[1], layer.norm(sent))


def test_sums_that_do_not_end_attention_stay() -> None:
    assert "something follows the sum" in sliced(Layer(), ends=False).others[0]
    assert "by position" in sliced(Layer(), by_position=True).others[0]


def test_what_is_said_at_the_start() -> None:
    some = Sliced(layers=[1, 2, 3, 5], others={0: "odd", 4: "odd", 6: "new"})
    assert str(some) == (
        "speculative in layers 1-3, 5, exact in layers 0, 4 (odd), exact in layers 6 (new)"
    )
    assert str(Sliced()) == "no layer"
