"""Prompts on tiles of AMX (`fast` numerics) against the slow twin: emulated ones, and real ones.

Shape suffixes: T rows of a step, H query heads, J key/value heads, d head width.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from remora.kernels import attention
from remora.kernels.attention import KVPages, attend, build_plan
from remora.kernels.native import native_available, native_isa
from remora.kernels.reference_attention import attention_reference

pytestmark = pytest.mark.skipif(not native_available(), reason="C++ kernels not built")

LEVELS = {"emulated": 5, "real": 4}
# (query heads, key/value heads), (k_dim, v_dim)
HEADS = [(4, 2), (3, 3), (16, 1), (2, 2)]
DIMS = [(64, 64), (32, 16), (192, 128), (96, 80), (64, 7)]


@pytest.fixture(autouse=True, params=LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Which tiles run, in one thread."""
    if request.param == "real" and native_isa() != "amx_bf16":
        pytest.skip("no AMX here")
    monkeypatch.setattr(attention, "_ISA_MAX_FAST", LEVELS[request.param])
    if request.param == "emulated":  # portable vectors then serve what tiles do not
        monkeypatch.setattr(attention, "_ISA_MAX", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield LEVELS[request.param]
    torch.set_num_threads(before)


class Prompt:
    """A context of which the rows from `start` on are new, in pages that hold NaN elsewhere."""

    def __init__(
        self, start: int, length: int, heads: tuple[int, int], dims: tuple[int, int], seed: int
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        end = start + length
        self.start = start
        self.q, self.k, self.v = (
            torch.randn((1, num, end, width), generator=generator).bfloat16()
            for num, width in ((heads[0], dims[0]), (heads[1], dims[0]), (heads[1], dims[1]))
        )
        self.q = self.q * 2
        num_blocks = -(-end // 16)
        self.table = torch.randperm(num_blocks + 2, generator=generator).tolist()[:num_blocks]
        self.pages = KVPages.allocate(num_blocks + 2, heads[1], *dims, torch.bfloat16)
        self.pages.k_NJWBE.fill_(torch.nan)
        self.pages.v_NJPDE.fill_(torch.nan)
        if start:
            self.attend(0, start, scale=1.0)

    def attend(self, begin: int, end: int, *, exact: bool = True, **rules: Any) -> Tensor:
        plan = build_plan([begin], [end - begin], [self.table], end - begin + 1)
        new = (
            torch.cat([x[:, :, begin:end], torch.full_like(x[:, :, :1], torch.nan)], 2)
            for x in (self.q, self.k, self.v)
        )
        out = attend(*new, self.pages, plan, exact=exact, **rules)
        assert torch.equal(out[:, -1], torch.zeros_like(out[:, -1]))
        return out[0, :-1]

    def expected(self, **rules: Any) -> Tensor:
        q, k, v = (x[0].transpose(0, 1) for x in (self.q, self.k, self.v))
        return attention_reference(q, k, v, **rules)[self.start :]

    def check(self, **rules: Any) -> Tensor:
        """Runs on tiles, against the twin. Raises AssertionError where exact vectors ran."""
        end = self.q.shape[2]
        vectors = self.attend(self.start, end, **rules)
        tiles = self.attend(self.start, end, exact=False, **rules)
        torch.testing.assert_close(tiles.double(), self.expected(**rules), rtol=2e-2, atol=2e-2)
        return (tiles != vectors).any()


@given(
    start=st.integers(0, 600),
    length=st.integers(2, 150),
    heads=st.sampled_from(HEADS),
    dims=st.sampled_from(DIMS),
    window=st.sampled_from([None, None, 1, 5, 40, 300]),
    chunk=st.sampled_from([None, None, None, 24, 200]),
    soft_cap=st.sampled_from([None, None, 2.0]),
    sinks=st.booleans(),
    threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40)
def test_matches_the_twin(
    start: int,
    length: int,
    heads: tuple[int, int],
    dims: tuple[int, int],
    window: int | None,
    chunk: int | None,
    soft_cap: float | None,
    sinks: bool,
    threads: int,
    seed: int,
) -> None:
    """Every rule, any chunk of a prompt, any rest of a tile, contexts cut between threads."""
    torch.set_num_threads(threads)
    prompt = Prompt(start, length, heads, dims, seed)
    logits = torch.randn(heads[0], generator=torch.Generator().manual_seed(seed))
    prompt.check(
        scale=dims[0] ** -0.5,
        sliding_window=window,
        attention_chunk=chunk,
        soft_cap=soft_cap,
        sinks_H=logits if sinks else None,
    )


@pytest.mark.parametrize(("heads", "length"), [((4, 2), 8), ((1, 1), 16), ((16, 1), 2)])
def test_tiles_are_used_from_sixteen_rows_on(heads: tuple[int, int], length: int) -> None:
    """Of one key/value head; their sums round otherwise, so some bit differs from the vectors'."""
    rules = {"scale": 0.125}
    assert Prompt(300, length, heads, (64, 64), 1).check(**rules)
    assert not Prompt(300, length - 1, heads, (64, 64), 1).check(**rules)


@pytest.mark.parametrize(
    ("dims", "scale"), [((80, 64), 0.1), ((64, 64), -0.1)], ids=["half_a_tile", "negative_scale"]
)
def test_falls_back(dims: tuple[int, int], scale: float) -> None:
    assert not Prompt(30, 100, (4, 2), dims, 1).check(scale=scale)


def test_extremes() -> None:
    """Scores far apart, a maximum that rises with every key, equal scores: none overflows."""
    prompt = Prompt(0, 300, (2, 1), (64, 64), 2)
    prompt.k *= 100
    prompt.check(scale=1.0)
    rising = torch.arange(300).view(1, 1, 300, 1).bfloat16()
    prompt.q, prompt.k = torch.ones_like(prompt.q), rising.expand(1, 1, 300, 64)
    prompt.check(scale=0.125)
    prompt.k = torch.zeros_like(prompt.k)
    prompt.check(scale=0.125)


def test_nothing_hides_a_nan() -> None:
    """A broken key shows in the rows that see it, and in no others; so does a broken query."""
    prompt = Prompt(0, 200, (4, 2), (64, 64), 3)
    prompt.k[:, 0, 70] = torch.nan
    prompt.q[:, 3, 5] = torch.nan
    out = prompt.attend(0, 200, exact=False, scale=0.125)
    assert torch.isnan(out[70:, :2]).all()
    assert not torch.isnan(out[:70, :2]).any()
    assert torch.isnan(out[5, 3]).all()
    assert not torch.isnan(out[:, 2]).any()
    assert not torch.isnan(out[torch.arange(200) != 5, 3]).any()


def test_decode_beside_a_prompt_is_exact(level: int) -> None:
    """Lone rows of a step keep their kernel, however many heads share their keys."""
    generator = torch.Generator().manual_seed(4)
    plan = build_plan([0, 90], [40, 1], [[3, 1, 2], [0, 4, 5, 6, 7, 8]], 41)
    pages = KVPages.allocate(9, 1, 64, 64, torch.bfloat16)
    pages.k_NJWBE.copy_(torch.randn(pages.k_NJWBE.shape, generator=generator))
    pages.v_NJPDE.copy_(torch.randn(pages.v_NJPDE.shape, generator=generator))
    q, k, v = (torch.randn((1, h, 41, 64), generator=generator).bfloat16() for h in (32, 1, 1))
    exact, fast = (attend(q, k, v, pages, plan, scale=0.1, exact=e) for e in (True, False))
    assert torch.equal(exact[:, 40], fast[:, 40])
    assert not torch.equal(exact[:, :40], fast[:, :40])
