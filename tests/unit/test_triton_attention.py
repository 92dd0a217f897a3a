"""Paged attention for GPUs under Triton's interpreter, against one head at a time in float64.

Spans are short here, so that a few dozen keys are split as thousands would be.
Shape suffixes: L context length, T rows of a step, H query heads, J key/value heads, d head width.
"""

import itertools
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.triton_dot import row_by_row_dot
from torch import Tensor

from remora.kernels import gpu_attention
from remora.kernels.attention import build_plan
from remora.kernels.gpu_attention import gpu_attend
from remora.kernels.gpu_pages import GpuKVPages, GpuPlan, gpu_write_kv
from remora.kernels.reference_attention import attention_reference

pytest.importorskip("triton")
# Rows of a tile that are nobody's are 0 / 0; they are not stored.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True, scope="module")
def short_spans() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_attention, "SPAN", 64)  # the least: one product
        yield


@dataclass(frozen=True, kw_only=True)
class Case:
    """Shapes and rules of one attention layer."""

    num_heads: int = 4
    num_kv_heads: int = 2
    k_dim: int = 16
    v_dim: int = 16
    rules: dict[str, float] = field(default_factory=dict)
    sinks: bool = False

    def arguments(self) -> dict[str, object]:
        sinks_H = torch.linspace(-1, 2, self.num_heads) if self.sinks else None
        return {"scale": self.k_dim**-0.5, "sinks_H": sinks_H, **self.rules}


CASES = {
    "gqa": Case(),
    "mha_odd_dims": Case(num_heads=3, num_kv_heads=3, k_dim=13, v_dim=7),
    "mla_expanded": Case(num_heads=2, num_kv_heads=2, k_dim=48, v_dim=32),
    "more_heads_than_rows": Case(num_heads=20, num_kv_heads=1, k_dim=16, v_dim=24),
    "window": Case(rules={"sliding_window": 9}),
    "window_of_one": Case(rules={"sliding_window": 1}),
    "chunks": Case(rules={"attention_chunk": 24}),
    "soft_cap": Case(rules={"soft_cap": 2.0}),
    "sinks_window": Case(num_heads=6, sinks=True, rules={"sliding_window": 70}),
}


@dataclass(frozen=True, kw_only=True)
class Sequence:
    """A context with its queries, keys and values, and blocks in the pool."""

    q_LHd: Tensor
    k_LJd: Tensor
    v_LJd: Tensor
    table: list[int]

    @property
    def length(self) -> int:
        return self.q_LHd.shape[0]


def make_sequences(case: Case, lengths: list[int], dtype: torch.dtype, seed: int) -> list[Sequence]:
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randperm(sum(-(-n // 16) for n in lengths) + 3, generator=generator).tolist()
    result = []
    for n in lengths:
        q, k, v = (
            torch.randn((n, heads, dim), generator=generator).to(dtype)
            for heads, dim in (
                (case.num_heads, case.k_dim),
                (case.num_kv_heads, case.k_dim),
                (case.num_kv_heads, case.v_dim),
            )
        )
        table = [blocks.pop() for _ in range(-(-n // 16))]
        result.append(Sequence(q_LHd=q * 2, k_LJd=k, v_LJd=v, table=table))
    return result


def make_pages(case: Case, sequences: list[Sequence], dtype: torch.dtype) -> GpuKVPages:
    """Pages full of NaN: nothing that was not written may be seen."""
    num_blocks = max(max(s.table) for s in sequences) + 1
    pages = GpuKVPages.allocate(num_blocks, case.num_kv_heads, case.k_dim, case.v_dim, dtype, CPU)
    pages.k_NJBd.fill_(torch.nan)
    pages.v_NJBd.fill_(torch.nan)
    return pages


def run_step(
    case: Case,
    pages: GpuKVPages,
    parts: list[tuple[Sequence, int, int]],
    num_padding: int = 0,
    *,
    exact: bool = False,
) -> list[Tensor]:
    """One step over (sequence, start, end) parts: writes K/V, attends -> one output a part."""
    lengths = [end - start for _, start, end in parts]
    starts, tables = [start for _, start, _ in parts], [s.table for s, _, _ in parts]
    plan = GpuPlan.of(build_plan(starts, lengths, tables, sum(lengths) + num_padding), CPU)

    def rows(name: str) -> Tensor:
        x = torch.cat([getattr(s, name)[start:end] for s, start, end in parts])
        return torch.cat([x, torch.full((num_padding, *x.shape[1:]), torch.nan, dtype=x.dtype)])

    gpu_write_kv(pages, rows("k_LJd"), rows("v_LJd"), plan)
    out = gpu_attend(rows("q_LHd"), pages, plan, exact=exact, **case.arguments())  # type: ignore[arg-type]
    assert out.shape == (plan.host.num_rows, case.num_heads, case.v_dim)
    assert torch.equal(out[sum(lengths) :], torch.zeros_like(out[sum(lengths) :]))
    return list(torch.split(out[: sum(lengths)], lengths))


def check(case: Case, sequence: Sequence, first: int, out: Tensor) -> None:
    """Rows `first`.. of a sequence against the twin."""
    expected = attention_reference(
        sequence.q_LHd,
        sequence.k_LJd,
        sequence.v_LJd,
        **case.arguments(),  # type: ignore[arg-type]
    )[first : first + out.shape[0]]
    tolerance = TOLERANCE[out.dtype]
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float16) for name in CASES), ("gqa", torch.float32), ("window", torch.float32)],
)
def test_matches_the_twin(name: str, dtype: torch.dtype) -> None:
    """Prompts, then one more token of each: programs walk the spans, or share them."""
    case = CASES[name]
    sequences = make_sequences(case, [2, 18, 83], dtype, seed=1)
    pages = make_pages(case, sequences, dtype)
    for parts in (
        [(s, 0, s.length - 1) for s in sequences],
        [(s, s.length - 1, s.length) for s in sequences],
    ):
        for (s, start, _), out in zip(parts, run_step(case, pages, parts, 2), strict=True):
            check(case, s, start, out)


def test_bfloat16() -> None:
    case = CASES["gqa"]
    (s,) = make_sequences(case, [69], torch.bfloat16, seed=2)
    pages = make_pages(case, [s], torch.bfloat16)
    with row_by_row_dot():
        check(case, s, 0, run_step(case, pages, [(s, 0, 67)])[0])
        check(case, s, 67, run_step(case, pages, [(s, 67, 69)])[0])


@settings(max_examples=6)
@given(data=st.data())
def test_random_steps(data: st.DataObject) -> None:
    """Window and chunk edges anywhere, chunks of prompts beside decoding sequences."""
    rules: dict[str, float] = {}
    if data.draw(st.booleans()):
        rules["sliding_window"] = data.draw(st.sampled_from([1, 16, 17, 64, 65]))
    if data.draw(st.booleans()):
        rules["attention_chunk"] = data.draw(st.sampled_from([7, 16, 64]))
    case = Case(
        num_heads=data.draw(st.sampled_from([1, 3])),
        num_kv_heads=1,
        rules=rules,
        sinks=data.draw(st.booleans()),
    )
    lengths = data.draw(st.lists(st.integers(1, 80), min_size=1, max_size=2))
    sequences = make_sequences(case, lengths, torch.float32, seed=sum(lengths))
    pages = make_pages(case, sequences, torch.float32)
    cuts = [data.draw(st.integers(0, s.length - 1)) for s in sequences]
    first = [(s, 0, cut) for s, cut in zip(sequences, cuts, strict=True) if cut]
    if first:
        run_step(case, pages, first)
    second = [(s, cut, s.length) for s, cut in zip(sequences, cuts, strict=True)]
    for (s, cut, _), out in zip(second, run_step(case, pages, second, 1), strict=True):
        check(case, s, cut, out)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("gqa", torch.float32),
        ("sinks_window", torch.float16),
        ("chunks", torch.float16),
        ("more_heads_than_rows", torch.float16),
    ],
)
def test_exact_bits_do_not_depend_on_the_step(name: str, dtype: torch.dtype) -> None:
    """Whole prompt, chunks beside another sequence, token by token: the same bits."""
    case = CASES[name]
    long, other = make_sequences(case, [84, 28], dtype, seed=3)
    (whole,) = run_step(case, make_pages(case, [long], dtype), [(long, 0, 84)], exact=True)
    rng = np.random.default_rng(4)
    pages = make_pages(case, [long, other], dtype)
    bounds = [0, 1, 3, 40, 64, 65, 83, 84]
    for step, (start, end) in enumerate(itertools.pairwise(bounds)):
        parts = [(long, start, end), (other, step * 4, step * 4 + 4)]
        position = int(rng.integers(2))
        outputs = run_step(case, pages, parts[:: -1 if position else 1], 1, exact=True)
        assert torch.equal(outputs[position], whole[start:end]), (start, end)


def test_spans_are_shared_out_within_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond it one program walks them: the same bits, and no memory for partial sums."""
    case = CASES["gqa"]
    (s,) = make_sequences(case, [150], torch.float16, seed=11)
    shared, walked = (make_pages(case, [s], torch.float16) for _ in range(2))
    for pages in (shared, walked):
        run_step(case, pages, [(s, 0, 149)], exact=True)
    (expected,) = run_step(case, shared, [(s, 149, 150)], exact=True)
    monkeypatch.setattr(gpu_attention, "SCRATCH_BYTES_MAX", 0)
    monkeypatch.setattr(gpu_attention, "_Scratch", None)
    assert torch.equal(run_step(case, walked, [(s, 149, 150)], exact=True)[0], expected)


def test_no_step_takes_gigabytes_of_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Expanded MLA of 128 heads, 64 sequences of 32,768 keys; and few sequences are shared out."""
    monkeypatch.setattr(gpu_attention, "SPAN", 512)
    pages = GpuKVPages.allocate(1, 128, 192, 128, torch.bfloat16, CPU)
    cut = gpu_attention.Cut.of(pages, 128, short=True, exact=False)
    assert gpu_attention.spans_apart(64 * 128, cut, 128, 32_768) == 1
    assert gpu_attention.spans_apart(8, cut, 128, 131_072) == 256


def test_equal_calls_give_equal_bits() -> None:
    case = CASES["gqa"]
    sequences = make_sequences(case, [60, 3], torch.float16, seed=5)
    parts = [(s, 0, s.length) for s in sequences]
    one = run_step(case, make_pages(case, sequences, torch.float16), parts)
    two = run_step(case, make_pages(case, sequences, torch.float16), parts)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_blocks_behind_the_window_are_never_touched() -> None:
    case = Case(rules={"sliding_window": 20})
    (s,) = make_sequences(case, [90], torch.float16, seed=6)
    pages = make_pages(case, [s], torch.float16)
    run_step(case, pages, [(s, 0, 80)])
    expected = run_step(case, pages, [(s, 80, 90)])[0]
    pages.k_NJBd[s.table[:3]] = torch.nan
    pages.v_NJBd[s.table[:3]] = torch.nan
    freed = Sequence(q_LHd=s.q_LHd, k_LJd=s.k_LJd, v_LJd=s.v_LJd, table=[-1, -1, -1, *s.table[3:]])
    assert torch.equal(run_step(case, pages, [(freed, 80, 90)])[0], expected)


def test_nothing_hides_a_nan() -> None:
    case = CASES["gqa"]
    good, bad = make_sequences(case, [30, 30], torch.float32, seed=8)
    pages = make_pages(case, [good, bad], torch.float32)
    alone = run_step(case, pages, [(good, 0, 30)])[0]
    bad.k_LJd[11] = torch.nan
    first, second = run_step(case, pages, [(good, 0, 30), (bad, 0, 30)])
    assert torch.equal(first, alone)
    assert torch.isnan(second[11:]).all() and not torch.isnan(second[:11]).any()


def test_inputs_may_be_slices_of_one_projection() -> None:
    qkv = torch.randn((37, 8, 16), generator=torch.Generator().manual_seed(9))
    q, k, v = qkv[:, :4], qkv[:, 4:6], qkv[:, 6:]
    plan = GpuPlan.of(build_plan([0], [37], [[2, 0, 1]], 37), CPU)
    results = []
    for dense in (False, True):
        pages = GpuKVPages.allocate(3, 2, 16, 16, torch.float32, CPU)
        a, b, c = (x.contiguous() if dense else x for x in (q, k, v))
        gpu_write_kv(pages, b, c, plan)
        results.append(gpu_attend(a, pages, plan, scale=0.25))
    assert torch.equal(*results)


def test_only_padding() -> None:
    plan = GpuPlan.of(build_plan([], [], [], 4), CPU)
    pages = GpuKVPages.allocate(1, 1, 8, 8, torch.float32, CPU)
    gpu_write_kv(pages, torch.ones(4, 1, 8), torch.ones(4, 1, 8), plan)
    assert torch.equal(
        gpu_attend(torch.ones(4, 2, 8), pages, plan, scale=1.0), torch.zeros(4, 2, 8)
    )
    assert not pages.k_NJBd.any()


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="float64"):
        GpuKVPages.allocate(1, 1, 8, 8, torch.float64, CPU)
    with pytest.raises(ValueError, match="positive sizes"):
        GpuKVPages.allocate(1, 1, 0, 8, torch.float32, CPU)
    with pytest.raises(RuntimeError, match="sees no GPU"):
        GpuKVPages.allocate(1, 1, 8, 8, torch.float32, torch.device("cuda"))
    pages = GpuKVPages.allocate(2, 2, 8, 8, torch.float32, CPU)
    assert pages.nbytes == sum(tensor.nbytes for tensor in pages.tensors)
    plan = GpuPlan.of(build_plan([0], [1], [[2]], 1), CPU)
    kv = torch.zeros(1, 2, 8)
    with pytest.raises(ValueError, match="block 2 of 2"):
        gpu_write_kv(pages, kv, kv, plan)
    with pytest.raises(ValueError, match="block 2 of 2"):
        gpu_attend(torch.zeros(1, 4, 8), pages, plan, scale=1.0)
    plan = GpuPlan.of(build_plan([0], [1], [[1]], 1), CPU)
    with pytest.raises(ValueError, match="3 query heads over 2"):
        gpu_attend(torch.zeros(1, 3, 8), pages, plan, scale=1.0)
    with pytest.raises(ValueError, match="bfloat16"):
        gpu_attend(torch.zeros(1, 4, 8, dtype=torch.bfloat16), pages, plan, scale=1.0)
    with pytest.raises(ValueError, match="the pages take"):
        gpu_write_kv(pages, kv[:, :1], kv, plan)
