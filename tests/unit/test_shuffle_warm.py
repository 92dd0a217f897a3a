"""A rank's shuffle is compiled when the rank is ready: no request waits for numba."""

from types import SimpleNamespace
from typing import Any

import numba
import pytest
import torch

from remora.actors.tp_shuffle import Sliced, token_shuffle
from remora.comm import shuffle, shuffle_scores
from remora.comm.collectives import DryGroup


@pytest.mark.parametrize("form", ["none", "exact", "speculative"])
def test_steps_compile_nothing(form: shuffle.Form, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh: list[Any] = []
    names: list[tuple[Any, str]] = [(shuffle, "copy_costs"), (shuffle, "assign")]
    if form == "speculative":
        names += [(shuffle_scores, "_score"), (shuffle_scores, "_learn")]
    for module, name in names:
        fresh.append(numba.njit(getattr(module, name).py_func))
        monkeypatch.setattr(module, name, fresh[-1])
    spec: Any = SimpleNamespace(num_experts=4, vocab_size=50)
    sliced = Sliced(layers=[1]) if form == "speculative" else Sliced()
    ranks = token_shuffle(form, DryGroup(0, 2), spec, sliced)
    for compiled in fresh:
        compiled.disable_compile()  # it raises from here on where it would compile
    table = torch.tensor([[0], [1], [0], [1]], dtype=torch.int16).numpy()
    ranks.set_prices(shuffle.copy_prices(["a", "b"], ["a", "b"]), dict.fromkeys(range(2), table))
    index_TK = torch.tensor([[0, 1], [2, 3], [1, 2], [3, 0]])
    for _ in range(2):
        ranks.begin_step(torch.arange(4), 4)
        ranks.exact_order(0, index_TK, 0, 2)
        if form == "speculative":
            ranks.predicted_order(1, 4)
            ranks.note_slice(index_TK[:2])
            ranks.close_layer()
    assert ranks.copies_all > 0
