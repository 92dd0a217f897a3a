"""Which gate a model's experts have, found by trying: the kernels' own are held against it.

Architectures write the same few gates in different words (`_apply_gate`, activations, clamps). What
counts is what they compute: a gate of ours is used where it gives their numbers, on values that lie
densely around everything a gate does, and beyond every clamp.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from remora.kernels.gates import ACTIVATIONS, Gate, Layout

_TOLERANCE: Final = 2e-6  # of (1 + |gate|) (1 + |up|): float32 rounding, times the slope
_NUM_ROWS: Final = 24
_QUICK_GELU_ALPHA: Final = 1.702


def find_gate(host: Any, width: int) -> Gate | None:
    """The kernels' gate that computes what `host` does between its linears, or None.

    Args:
        host: a `transformers` experts module (`_apply_gate`, or `act_fn` where it has no gate).
        width: I, its expert width.
    """
    gated = bool(host.has_gate)
    apply = host._apply_gate if gated else host.act_fn
    probe_NU = _probe(width * (2 if gated else 1), _numbers_of(host))
    with torch.no_grad():
        theirs_NI = apply(probe_NU.clone())
    if theirs_NI.shape != (_NUM_ROWS, width) or theirs_NI.device.type != "cpu":
        return None
    for gate in _candidates(gated, _numbers_of(host)):
        if _agrees(gate, probe_NU, theirs_NI):
            return gate
    return None


def _numbers_of(host: Any) -> list[float]:
    """Floats among the module's own attributes: its limits and slopes, under whatever name."""
    found = {float(value) for value in vars(host).values() if isinstance(value, float)}
    return sorted(value for value in found if value > 0 and math.isfinite(value))


def _probe(num_columns: int, numbers: list[float]) -> Tensor:
    """Random values of every size, zeros, and values just inside and outside each number."""
    generator = torch.Generator().manual_seed(num_columns)
    scale = torch.tensor([0.1, 1.0, 3.0, 10.0, 100.0, 3000.0]).repeat(_NUM_ROWS // 6)[:, None]
    probe = torch.randn((_NUM_ROWS, num_columns), generator=generator) * scale
    special = [0.0, *(sign * n * f for n in numbers for sign in (1, -1) for f in (0.99, 1.01))]
    where = torch.randint(0, 8 * len(special), probe.shape, generator=generator)
    for i, value in enumerate(special):
        probe[where == i] = value
    return probe


def _candidates(gated: bool, numbers: list[float]) -> Iterator[Gate]:
    if not gated:
        for activation in ACTIVATIONS:
            yield Gate(activation=activation, layout="none")
        yield Gate(layout="none", alpha=_QUICK_GELU_ALPHA)
        return
    layouts: tuple[Layout, ...] = ("concatenated", "interleaved")
    for layout in layouts:
        for activation in ACTIVATIONS:
            plain = Gate(activation=activation, layout=layout)
            yield plain
            for limit in numbers:
                yield replace(plain, gate_max=limit, up_max=limit)
                yield replace(plain, act_max=limit, up_max=limit)
        for alpha in {*numbers, 1.0, _QUICK_GELU_ALPHA}:
            yield Gate(layout=layout, alpha=alpha)
            for limit in numbers:
                for shift in (0.0, 1.0):
                    yield Gate(
                        layout=layout, alpha=alpha, gate_max=limit, up_max=limit, up_shift=shift
                    )


def _agrees(gate: Gate, probe_NU: Tensor, theirs_NI: Tensor) -> bool:
    size_NU = 1 + probe_NU.abs()
    if gate.layout == "none":
        gate_NI, factor_NI = size_NU, torch.ones(())
    elif gate.layout == "interleaved":
        gate_NI, factor_NI = size_NU[:, ::2], size_NU[:, 1::2]
    else:
        gate_NI, factor_NI = size_NU.chunk(2, dim=-1)
    if gate.activation == "relu2":
        gate_NI = gate_NI**2
    error_NI = (gate.apply(probe_NU) - theirs_NI).abs()
    return bool((error_NI <= _TOLERANCE * gate_NI * factor_NI).all())
