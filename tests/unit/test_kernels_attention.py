"""Paged attention against its slow twin, and the promise that a row's bits depend on the row alone.

Shape suffixes: L context length, T rows of a step, H query heads, J key/value heads, d head width.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from remora.kernels.attention import KVPages, build_plan, paged_attention, write_kv
from remora.kernels.reference_attention import attention_reference


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
    return list(out[: plan.num_tokens].split(lengths))


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
