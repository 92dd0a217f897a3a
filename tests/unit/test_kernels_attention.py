"""Paged attention against its slow twin, and the promise that a row's bits depend on the row alone.

Every test runs on the torch path and on each instruction set that the machine has.

Shape suffixes: L context length, T rows of a step, H query heads, J key/value heads, d head width.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from support.attention_isas import ISAS, best_isa, is_here
from torch import Tensor

from remora.kernels import attention
from remora.kernels.attention import KVPages, build_plan, paged_attention, write_kv
from remora.kernels.reference_attention import attention_reference


@pytest.fixture(autouse=True, params=["torch", *ISAS])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which implementation runs."""
    name = str(request.param)
    if name == "torch":
        monkeypatch.setattr(attention, "native_available", lambda: False)
    elif not is_here(name):
        pytest.skip(f"no {name} here")
    else:
        monkeypatch.setattr(attention, "_ISA_MAX", ISAS.index(name))
    return name


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True, kw_only=True)
class Case:
    """Shapes and rules of one attention layer."""

    num_heads: int = 4
    num_kv_heads: int = 2
    k_dim: int = 16
    v_dim: int = 16
    sliding_window: int | None = None
    attention_chunk: int | None = None
    soft_cap: float | None = None
    sinks: bool = False

    def arguments(self) -> dict[str, object]:
        generator = torch.Generator().manual_seed(7)
        return {
            "scale": self.k_dim**-0.5,
            "sliding_window": self.sliding_window,
            "attention_chunk": self.attention_chunk,
            "soft_cap": self.soft_cap,
            "sinks_H": torch.randn(self.num_heads, generator=generator) if self.sinks else None,
        }


CASES = {
    "gqa": Case(),
    "mha_odd_dims": Case(num_heads=3, num_kv_heads=3, k_dim=13, v_dim=7),
    "mla_expanded": Case(num_heads=2, num_kv_heads=2, k_dim=192, v_dim=128),
    "one_kv_head": Case(num_heads=8, num_kv_heads=1, k_dim=64, v_dim=80),
    "window": Case(sliding_window=9),
    "window_of_one": Case(sliding_window=1),
    "wide_window": Case(sliding_window=150),
    "chunks": Case(attention_chunk=24),
    "soft_cap": Case(soft_cap=2.0),
    "sinks_window": Case(num_heads=6, sinks=True, sliding_window=70, k_dim=64, v_dim=64),
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
        table = [blocks.pop() for _ in range(-(-n // 16))]
        q, k, v = (
            torch.randn((n, heads, dim), generator=generator).to(dtype)
            for heads, dim in (
                (case.num_heads, case.k_dim),
                (case.num_kv_heads, case.k_dim),
                (case.num_kv_heads, case.v_dim),
            )
        )
        result.append(Sequence(q_LHd=q * 2, k_LJd=k, v_LJd=v, table=table))
    return result


def make_pages(case: Case, sequences: list[Sequence], dtype: torch.dtype) -> KVPages:
    """Pages full of NaN: nothing that was not written may be seen."""
    num_blocks = max(max(s.table) for s in sequences) + 1
    pages = KVPages.allocate(num_blocks, case.num_kv_heads, case.k_dim, case.v_dim, dtype)
    pages.k_NJWBE.fill_(torch.nan)
    pages.v_NJPDE.fill_(torch.nan)
    return pages


def run_step(
    case: Case,
    pages: KVPages,
    parts: list[tuple[Sequence, int, int]],
    num_padding: int = 0,
) -> list[Tensor]:
    """One step over (sequence, start, end) parts: writes K/V, attends -> one output a part."""
    lengths = [end - start for _, start, end in parts]
    plan = build_plan(
        [start for _, start, _ in parts],
        lengths,
        [s.table for s, _, _ in parts],
        sum(lengths) + num_padding,
    )

    def rows(name: str) -> Tensor:
        x = torch.cat([getattr(s, name)[start:end] for s, start, end in parts])
        return torch.cat([x, torch.full((num_padding, *x.shape[1:]), torch.nan, dtype=x.dtype)])

    write_kv(pages, rows("k_LJd"), rows("v_LJd"), plan.slot_mapping_T)
    out = paged_attention(rows("q_LHd"), pages, plan, **case.arguments())  # type: ignore[arg-type]
    assert out.shape == (plan.num_rows, case.num_heads, case.v_dim)
    assert torch.equal(out[plan.num_tokens :], torch.zeros_like(out[plan.num_tokens :]))
    return list(torch.split(out[: plan.num_tokens], lengths))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1.5e-2)], ids=["fp32", "bf16"]
)
def test_matches_the_twin(name: str, dtype: torch.dtype, tolerance: float) -> None:
    case = CASES[name]
    sequences = make_sequences(case, [1, 47, 170], dtype, seed=1)
    pages = make_pages(case, sequences, dtype)
    outputs = run_step(case, pages, [(s, 0, s.length) for s in sequences], num_padding=2)
    for s, out in zip(sequences, outputs, strict=True):
        expected = attention_reference(s.q_LHd, s.k_LJd, s.v_LJd, **case.arguments())  # type: ignore[arg-type]
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_bits_do_not_depend_on_the_step(name: str, dtype: torch.dtype) -> None:
    """Whole prompt, random chunks beside other sequences, token by token: the same bits."""
    case = CASES[name]
    sequences = make_sequences(case, [150, 33, 67], dtype, seed=2)
    whole = [
        run_step(case, make_pages(case, sequences, dtype), [(s, 0, s.length)])[0] for s in sequences
    ]
    rng = np.random.default_rng(3)
    pages = make_pages(case, sequences, dtype)
    done = [0] * len(sequences)
    while any(d < s.length for d, s in zip(done, sequences, strict=True)):
        parts = []
        for i in rng.permutation(len(sequences)).tolist():
            s = sequences[i]
            size = int(rng.choice([1, 1, 2, 5, 16, 40]))
            if done[i] < s.length and rng.random() < 0.8:
                parts.append((i, done[i], min(s.length, done[i] + size)))
        if not parts:
            continue
        outputs = run_step(
            case, pages, [(sequences[i], a, b) for i, a, b in parts], int(rng.integers(3))
        )
        for (i, a, b), out in zip(parts, outputs, strict=True):
            assert torch.equal(out, whole[i][a:b]), (i, a, b)
            done[i] = b


def test_bits_do_not_depend_on_threads(two_threads: None) -> None:
    case = CASES["gqa"]
    sequences = make_sequences(case, [700, 40], torch.bfloat16, seed=4)
    parts = [(s, 0, s.length) for s in sequences]
    shared = run_step(case, make_pages(case, sequences, torch.bfloat16), parts)
    torch.set_num_threads(1)
    alone = run_step(case, make_pages(case, sequences, torch.bfloat16), parts)
    assert all(torch.equal(a, b) for a, b in zip(shared, alone, strict=True))


def test_blocks_behind_the_window_are_never_touched() -> None:
    """A block manager hands them to somebody else, whose bytes may be anything."""
    case = Case(sliding_window=20)
    (s,) = make_sequences(case, [90], torch.float32, seed=5)
    pages = make_pages(case, [s], torch.float32)
    expected = run_step(case, pages, [(s, 0, 90)])[0][80:]
    for block in s.table[:3]:  # positions 0..47; row 80 sees 61..80
        pages.k_NJWBE[block] = torch.nan
        pages.v_NJPDE[block] = torch.nan
    freed = Sequence(
        q_LHd=s.q_LHd, k_LJd=s.k_LJd, v_LJd=s.v_LJd, table=[-1, 10**6, -1, *s.table[3:]]
    )
    plan = build_plan([80], [10], [freed.table], 10)
    with pytest.raises(ValueError, match="block 1000000 of"):
        paged_attention(s.q_LHd[80:], pages, plan, **case.arguments())  # type: ignore[arg-type]
    freed.table[1] = -1
    assert torch.equal(run_step(case, pages, [(freed, 80, 90)])[0], expected)


def test_inputs_may_be_slices_of_one_projection() -> None:
    """Queries, keys and values as views into [T, (H + 2 J) d], as a fused projection gives them."""
    generator = torch.Generator().manual_seed(6)
    qkv = torch.randn((37, 8, 16), generator=generator)
    q, k, v = qkv[:, :4], qkv[:, 4:6], qkv[:, 6:]
    plan = build_plan([0], [37], [[2, 0, 1]], 37)
    results = []
    for dense in (False, True):
        pages = KVPages.allocate(3, 2, 16, 16, torch.float32)
        a, b, c = (x.contiguous() if dense else x for x in (q, k, v))
        write_kv(pages, b, c, plan.slot_mapping_T)
        results.append(paged_attention(a, pages, plan, scale=0.25))
    assert torch.equal(*results)


def test_nothing_hides_a_nan() -> None:
    """A broken row must be seen to be broken, and must not break its neighbours."""
    case = CASES["gqa"]
    good, bad = make_sequences(case, [30, 30], torch.float32, seed=8)
    alone = run_step(case, make_pages(case, [good, bad], torch.float32), [(good, 0, 30)])[0]
    bad.k_LJd[11] = torch.nan
    pages = make_pages(case, [good, bad], torch.float32)
    first, second = run_step(case, pages, [(good, 0, 30), (bad, 0, 30)])
    assert torch.equal(first, alone)
    assert torch.isnan(second[11:]).all()


def test_plan() -> None:
    plan = build_plan([0, 30, 16], [2, 3, 1], [[5], np.array([7, 1, 9, 4]), [3, 2]], 8)
    assert plan.num_tokens == 6
    assert plan.query_start_S1.tolist() == [0, 2, 5, 6]
    assert plan.positions_T.tolist() == [0, 1, 30, 31, 32, 16, 0, 0]
    assert plan.slot_mapping_T.tolist() == [80, 81, 30, 31, 144, 32, -1, -1]
    assert plan.block_table_SM.tolist() == [[5, -1, -1], [7, 1, 9], [3, 2, -1]]
    empty = build_plan([], [], [], 4)
    assert empty.num_tokens == 0
    pages = KVPages.allocate(1, 1, 8, 8, torch.float32)
    write_kv(pages, torch.ones(4, 1, 8), torch.ones(4, 1, 8), empty.slot_mapping_T)
    out = paged_attention(torch.ones(4, 2, 8), pages, empty, scale=1.0)
    assert torch.equal(out, torch.zeros(4, 2, 8))
    assert not pages.k_NJWBE.any()


@pytest.mark.parametrize(
    ("starts", "lengths", "tables", "num_rows", "message"),
    [
        ([0], [0], [[1]], 4, "lengths >= 1"),
        ([-1], [2], [[1]], 4, "starts must be >= 0"),
        ([0], [17], [[1]], 17, "1 blocks for 17 tokens, needs 2"),
        ([0], [5], [[1]], 4, "5 tokens do not fit in 4 rows"),
        ([0, 0], [1], [[1]], 4, "2 starts, 1 lengths"),
        ([0], [1], [[-1]], 4, "negative id"),
    ],
)
def test_plan_refuses(
    starts: list[int], lengths: list[int], tables: list[list[int]], num_rows: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_plan(starts, lengths, tables, num_rows)


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="float16"):
        KVPages.allocate(1, 1, 8, 8, torch.float16)
    with pytest.raises(ValueError, match="only 16"):
        KVPages.allocate(1, 1, 8, 8, torch.float32, block_size=32)
    pages = KVPages.allocate(2, 2, 8, 8, torch.float32)
    assert pages.nbytes == sum(tensor.nbytes for tensor in pages.tensors)
    plan = build_plan([0], [1], [[2]], 1)
    kv = torch.zeros(1, 2, 8)
    with pytest.raises(ValueError, match=r"slot 32|block 2"):
        write_kv(pages, kv, kv, plan.slot_mapping_T)
    with pytest.raises(ValueError, match="block 2 of 2"):
        paged_attention(torch.zeros(1, 4, 8), pages, plan, scale=1.0)
    plan = build_plan([0], [1], [[1]], 1)
    with pytest.raises(ValueError, match="3 query heads over 2"):
        paged_attention(torch.zeros(1, 3, 8), pages, plan, scale=1.0)
    with pytest.raises(ValueError, match="bfloat16"):
        paged_attention(torch.zeros(1, 4, 8, dtype=torch.bfloat16), pages, plan, scale=1.0)
    with pytest.raises(ValueError, match="the pages take"):
        write_kv(pages, kv[:, :1], kv, plan.slot_mapping_T)


def test_ops_can_be_traced(path: str) -> None:
    """Their schemas say what they write, and their fake versions give the real shapes."""
    if path != best_isa():
        pytest.skip("ops of the C++ path, once")
    pages = KVPages.allocate(2, 2, 8, 8, torch.float32)
    plan = build_plan([0], [5], [[1]], 6)
    kv = torch.ones(6, 2, 8)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.remora.write_kv.default,
        (kv, kv, pages.k_NJWBE, pages.v_NJPDE, plan.slot_mapping_T),
        test_utils=checks,
    )
    rules = (plan.packed, 0.5, 0, 0, 0.0, None, 3)
    torch.library.opcheck(
        torch.ops.remora.paged_attention.default,
        (torch.ones(6, 4, 8), pages.k_NJWBE, pages.v_NJPDE, 8, *rules),
        test_utils=checks,
    )
    q, k = torch.ones(1, 4, 6, 8), torch.ones(1, 2, 6, 8)
    torch.library.opcheck(
        torch.ops.remora.attend.default,
        (q, k, k, pages.k_NJWBE, pages.v_NJPDE, *rules),
        test_utils=checks,
    )
