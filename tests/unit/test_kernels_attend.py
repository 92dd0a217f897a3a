"""`attend`, the call of the hot path, against `write_kv` and `paged_attention`.

And contexts that several threads share.

Shape suffixes: T rows of a step, H query heads, J key/value heads, d head width.
"""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.attention_isas import ISAS, is_here
from torch import Tensor

from remora.kernels import attention
from remora.kernels.attention import (
    AttentionPlan,
    KVPages,
    attend,
    build_plan,
    paged_attention,
    write_kv,
)
from remora.kernels.native import native_available
from remora.kernels.reference_attention import attention_reference

native_only = pytest.mark.skipif(not native_available(), reason="C++ kernels not built")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_plan(
    generator: torch.Generator, parts: list[tuple[int, int]], rows: int
) -> AttentionPlan:
    """(start, length) of each sequence, blocks anywhere."""
    counts = [-(-(start + length) // 16) for start, length in parts]
    blocks = torch.randperm(sum(counts) + 2, generator=generator).tolist()
    tables = [[blocks.pop() for _ in range(count)] for count in counts]
    return build_plan([a for a, _ in parts], [n for _, n in parts], tables, rows)


def random_pages(
    generator: torch.Generator,
    plan: AttentionPlan,
    heads: int,
    dims: tuple[int, int],
    dtype: torch.dtype,
) -> KVPages:
    pages = KVPages.allocate(plan.block_id_max + 1, heads, *dims, dtype)
    for x in (pages.k_NJWBE, pages.v_NJPDE):
        x.copy_(torch.randn(x.shape, generator=generator))
    return pages


def copy_of(pages: KVPages) -> KVPages:
    return KVPages(
        k_NJWBE=pages.k_NJWBE.clone(),
        v_NJPDE=pages.v_NJPDE.clone(),
        k_dim=pages.k_dim,
        v_dim=pages.v_dim,
    )


def strided(generator: torch.Generator, how: str, heads: int, rows: int, width: int) -> Tensor:
    """[1, heads, rows, width] random float32 values in one of the layouts that models make."""
    if how == "projection":  # [T, all heads x d], seen by heads
        x = torch.randn((rows, heads + 3, width), generator=generator)
        return x[:, 1 : heads + 1].transpose(0, 1)[None]
    if how == "odd":  # the last dimension is not contiguous
        return torch.randn((1, heads, width, rows), generator=generator).transpose(2, 3)
    if how == "expanded":  # one key/value row for all heads, as latent attention has it
        return torch.randn((1, 1, rows, width), generator=generator).expand(1, heads, rows, width)
    return torch.randn((1, heads, rows, width), generator=generator)


PARTS = st.lists(
    st.tuples(st.integers(0, 700), st.sampled_from([1, 1, 1, 2, 7, 16, 33])), min_size=1, max_size=4
)


@given(
    parts=PARTS,
    padding=st.integers(0, 3),
    heads=st.sampled_from([(4, 2), (3, 3), (8, 1), (2, 2)]),
    dims=st.sampled_from([(64, 64), (13, 7), (96, 64), (32, 80)]),
    layouts=st.tuples(*[st.sampled_from(["plain", "projection", "odd", "expanded"])] * 3),
    dtypes=st.sampled_from(
        [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)] * 2
        + [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
    ),
    window=st.sampled_from([None, None, 5, 300]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=80)
def test_attend_is_write_and_attention(
    parts: list[tuple[int, int]],
    padding: int,
    heads: tuple[int, int],
    dims: tuple[int, int],
    layouts: tuple[str, str, str],
    dtypes: tuple[torch.dtype, torch.dtype],
    window: int | None,
    seed: int,
) -> None:
    """Bit for bit, in every layout, dtype and number of threads; the pages end up equal, too."""
    generator = torch.Generator().manual_seed(seed)
    rows = sum(n for _, n in parts) + padding
    plan = random_plan(generator, parts, rows)
    pages = random_pages(generator, plan, heads[1], dims, dtypes[1])
    expected_pages = copy_of(pages)
    sizes = zip(layouts, (heads[0], heads[1], heads[1]), (dims[0], *dims), strict=True)
    q, k, v = (strided(generator, how, h, rows, d).to(dtypes[0]) for how, h, d in sizes)
    rules = {
        "scale": 0.2,
        "sliding_window": window,
        "sinks_H": torch.randn(heads[0], generator=generator),
    }
    q_THd, k_TJd, v_TJd = (x[0].transpose(0, 1).to(dtypes[1]).contiguous() for x in (q, k, v))
    write_kv(expected_pages, k_TJd, v_TJd, plan.slot_mapping_T)
    expected = paged_attention(q_THd, expected_pages, plan, **rules)  # type: ignore[arg-type]
    for num_threads in (1, 2, 5):
        torch.set_num_threads(num_threads)
        mine = copy_of(pages)
        out = attend(q, k, v, mine, plan, **rules)  # type: ignore[arg-type]
        assert out.dtype == dtypes[0]
        assert out.is_contiguous()
        assert torch.equal(out, expected.to(dtypes[0])[None])
        assert torch.equal(mine.k_NJWBE, expected_pages.k_NJWBE)
        assert torch.equal(mine.v_NJPDE, expected_pages.v_NJPDE)


def test_attend_through_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a compiler: the same call, the same shapes, nearly the same values."""
    generator = torch.Generator().manual_seed(3)
    plan = random_plan(generator, [(40, 1), (0, 19)], 22)
    pages = random_pages(generator, plan, 2, (16, 16), torch.float32)
    mine = copy_of(pages)
    q = strided(generator, "projection", 4, 22, 16)
    k, v = (strided(generator, "projection", 2, 22, 16) for _ in "kv")
    expected = attend(q, k, v, pages, plan, scale=0.25)
    monkeypatch.setattr(attention, "native_available", lambda: False)
    out = attend(q, k, v, mine, plan, scale=0.25)
    assert out.shape == (1, 22, 4, 16)
    torch.testing.assert_close(out, expected)
    assert torch.equal(mine.k_NJWBE, pages.k_NJWBE)


@native_only
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("window", "attention_chunk"), [(None, None), (600, None), (None, 700)], ids=str
)
def test_shared_contexts_have_the_same_bits(
    monkeypatch: pytest.MonkeyPatch,
    isa: str,
    dtype: torch.dtype,
    window: int | None,
    attention_chunk: int | None,
) -> None:
    """However many threads share a context of six spans; prompt, its end, and one token alone."""
    if not is_here(isa):
        pytest.skip(f"no {isa} here")
    monkeypatch.setattr(attention, "_ISA_MAX", ISAS.index(isa))
    generator = torch.Generator().manual_seed(11)
    length, rules = (
        1301,
        {"scale": 0.3, "sliding_window": window, "attention_chunk": attention_chunk},
    )
    q, k, v = (torch.randn((1, h, length, 24), generator=generator).to(dtype) for h in (3, 1, 1))
    plan = random_plan(generator, [(0, length)], length)
    pages = random_pages(generator, plan, 1, (24, 24), dtype)
    whole = attend(q, k, v, pages, plan, **rules)  # type: ignore[arg-type]
    table = [plan.block_table_SM[0].tolist()]
    rows = slice(length - 9, length)
    expected = attention_reference(
        *(x[0].transpose(0, 1)[:length].float() for x in (q, k, v)),  # type: ignore[arg-type]
        scale=0.3,
        sliding_window=window,
        attention_chunk=attention_chunk,
    )
    tolerance = 1e-5 if dtype == torch.float32 else 1.5e-2
    torch.testing.assert_close(whole[0].double(), expected, rtol=tolerance, atol=tolerance)
    for num_threads in (1, 2, 3, 8):
        torch.set_num_threads(num_threads)
        monkeypatch.setattr(attention, "_ISA_MAX", ISAS.index(isa))
        for first in (0, length - 9, length - 1):
            part = build_plan([first], [length - first], table, length - first)
            out = attend(*(x[:, :, first:] for x in (q, k, v)), pages, part, **rules)  # type: ignore[arg-type]
            assert torch.equal(
                out[:, max(0, rows.start - first) :], whole[:, max(first, rows.start) :]
            )
            if first == 0:
                assert torch.equal(out, whole)


@native_only
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("batch", [1, 3])
def test_one_token_steps_are_shared_and_have_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, isa: str, batch: int
) -> None:
    """Decode over a context that is worth several threads, by heads and by spans.

    4,001 keys x 8 query heads x (64 + 64) are 4.1 million products for each key/value head, eight
    times what `attention_run.cpp` leaves to one thread. With one key/value head there is nothing
    to cut but spans.
    """
    if not is_here(isa):
        pytest.skip(f"no {isa} here")
    monkeypatch.setattr(attention, "_ISA_MAX", ISAS.index(isa))
    generator = torch.Generator().manual_seed(5)
    length = 4001
    for kv_heads in (1, 2):
        plan = random_plan(generator, [(length - 1 - 7 * s, 1) for s in range(batch)], batch)
        pages = random_pages(generator, plan, kv_heads, (64, 64), torch.float32)
        q, k, v = (
            torch.randn((1, h, batch, 64), generator=generator)
            for h in (8 * kv_heads, kv_heads, kv_heads)
        )
        alone = attend(q, k, v, pages, plan, scale=0.2)  # one thread: nothing is cut
        table, count = plan.block_table_SM[0].tolist(), length
        k_LJd = pages.k_NJWBE[table].permute(0, 3, 1, 2, 4).reshape(-1, kv_heads, 64)[:count]
        v_LJd = pages.v_NJPDE[table].permute(0, 2, 4, 1, 3).reshape(-1, kv_heads, 64)[:count]
        weights = torch.einsum(
            "jgd,ljd->jgl", q[0, :, 0].double().view(kv_heads, 8, 64), k_LJd.double()
        )
        expected = torch.einsum("jgl,ljd->jgd", (weights * 0.2).softmax(2), v_LJd.double())
        torch.testing.assert_close(
            alone[0, 0].double().view(kv_heads, 8, 64), expected, rtol=1e-5, atol=1e-5
        )
        for num_threads in (2, 3, 8):
            torch.set_num_threads(num_threads)
            assert torch.equal(attend(q, k, v, pages, plan, scale=0.2), alone)
        torch.set_num_threads(1)


def test_attend_refuses_what_does_not_fit() -> None:
    pages = KVPages.allocate(2, 2, 8, 8, torch.float32)
    plan = build_plan([0], [1], [[1]], 1)
    q, kv = torch.zeros(1, 4, 1, 8), torch.zeros(1, 2, 1, 8)
    with pytest.raises(ValueError, match="block 2 of 2"):
        attend(q, kv, kv, pages, build_plan([0], [1], [[2]], 1), scale=1.0)
    with pytest.raises(ValueError, match="3 query heads over 2"):
        attend(q[:, :3], kv, kv, pages, plan, scale=1.0)
    with pytest.raises(ValueError, match="0 query heads over 2"):
        attend(q[:, :0], kv, kv, pages, plan, scale=1.0)
    with pytest.raises(ValueError, match=r"queries|keys"):
        attend(q, kv[:, :1], kv, pages, plan, scale=1.0)
    with pytest.raises(ValueError, match=r"rows|pages take"):
        attend(q, kv, kv, pages, build_plan([0], [2], [[1]], 2), scale=1.0)
    with pytest.raises(ValueError, match="sinks"):
        attend(q, kv, kv, pages, plan, scale=1.0, sinks_H=torch.zeros(3))
    with pytest.raises(ValueError, match=r"fit the pages|the pages take"):
        attend(q, kv, torch.zeros(1, 2, 1, 30), pages, plan, scale=1.0)


@native_only
def test_attend_refuses_pages_that_its_loads_would_crash_on() -> None:
    aligned = KVPages.allocate(2, 2, 16, 16, torch.float32)
    pages = KVPages(
        k_NJWBE=torch.zeros(aligned.k_NJWBE.numel() + 1)[1:].view(aligned.k_NJWBE.shape),
        v_NJPDE=aligned.v_NJPDE,
        k_dim=16,
        v_dim=16,
    )
    q, kv = torch.zeros(1, 4, 1, 16), torch.zeros(1, 2, 1, 16)
    with pytest.raises(ValueError, match="multiples of 64 bytes"):
        attend(q, kv, kv, pages, build_plan([0], [1], [[1]], 1), scale=1.0)
