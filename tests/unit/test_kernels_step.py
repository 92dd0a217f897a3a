"""Attention of a step by an engine's number, as compiled layers ask for it."""

import ctypes

import pytest
import torch

from remora.kernels.attention import KVPages, attend, build_plan
from remora.kernels.native import native_available
from remora.kernels.step import enter_step, leave_step, step_layers

pytestmark = pytest.mark.skipif(not native_available(), reason="C++ kernels not built")
ENGINE = 1 << 40  # no model of another test has it


def random_pages(generator: torch.Generator) -> KVPages:
    pages = KVPages.allocate(3, 2, 16, 16, torch.bfloat16)
    for x in (pages.k_NJWBE, pages.v_NJPDE):
        x.copy_(torch.randn(x.shape, generator=generator))
    return pages


def test_each_layer_attends_by_its_own_rules_over_its_own_pages() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, 3, 16, generator=generator).bfloat16()
    k, v = (torch.randn(1, 2, 3, 16, generator=generator).bfloat16() for _ in "kv")
    sinks_H = torch.randn(4, generator=generator)
    plan = build_plan([20, 5], [2, 1], [[2, 0], [1]], 3)
    layers = [(0.25, None, None), (0.5, 7, None), (0.25, None, 3.0)]
    for exact in (True, False):
        pages = [random_pages(generator) for _ in layers]
        mine = [KVPages.allocate(3, 2, 16, 16, torch.bfloat16) for _ in layers]
        for copy, original in zip(mine, pages, strict=True):
            copy.k_NJWBE.copy_(original.k_NJWBE)
            copy.v_NJPDE.copy_(original.v_NJPDE)
        cursor = ctypes.c_int64(-1)
        enter_step(ENGINE, step_layers(mine, layers), plan, exact=exact, cursor=cursor)
        try:
            for layer, (scale, window, cap) in enumerate(layers):
                cursor.value = layer
                sinks = sinks_H if layer == 1 else None
                found = torch.ops.remora.step_attention(q, k, v, sinks, ENGINE)
                expected = attend(
                    q, k, v, pages[layer], plan,
                    scale=scale, sliding_window=window, soft_cap=cap, sinks_H=sinks, exact=exact,
                )  # fmt: skip
                assert torch.equal(found, expected)
                assert torch.equal(mine[layer].k_NJWBE, pages[layer].k_NJWBE)
        finally:
            leave_step(ENGINE)


def test_an_engine_that_is_in_no_step_and_a_layer_that_is_not_there_are_named() -> None:
    q = torch.zeros(1, 2, 1, 16)
    with pytest.raises(RuntimeError, match=f"engine {ENGINE} is in no step"):
        torch.ops.remora.step_attention(q, q, q, None, ENGINE)
    pages = [KVPages.allocate(1, 2, 16, 16, torch.float32)]
    plan, cursor = build_plan([0], [1], [[0]], 1), ctypes.c_int64(1)
    layers = step_layers(pages, [(1.0, None, None)])
    enter_step(ENGINE, layers, plan, exact=True, cursor=cursor)
    try:
        with pytest.raises(RuntimeError, match="layer 1 of 1"):
            torch.ops.remora.step_attention(q, q, q, None, ENGINE)
    finally:
        leave_step(ENGINE)


def test_layers_need_pages_and_three_numbers_each() -> None:
    pages = [KVPages.allocate(1, 2, 16, 16, torch.float32)]
    with pytest.raises(ValueError, match="1 layers, 6 numbers: 3 a layer"):
        step_layers(pages, [(1.0, None, None)] * 2)
