"""Batch sampling: one token for each row of logits, and log-probabilities of the raw distribution.

Shape suffixes: B rows, V vocabulary, C candidates left of a row.

A row's result depends on its logits and its parameters alone, to the bit: rows are worked on one
by one in arrays whose shape does not depend on the batch, equal values go to the lowest token id,
and randomness is counter-based, keyed by (seed, position). Order of the steps as in transformers:
penalties, bias, mask, temperature, top-k, top-p, min-p.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Top-p sorts only weights above a floor (the best weighs 1); the next floor when they fall short.
_TOP_P_FLOORS = (2.0**-3, 2.0**-6, 2.0**-10, 2.0**-15, 0.0)
_CDF_BLOCK = 512  # weights of one block of the two-level inverse CDF


@dataclass(frozen=True, slots=True, kw_only=True)
class RowParams:
    """How one row is sampled. `temperature == 0` is greedy; `top_k == 0` means no limit.

    `prompt_ids` and `output_ids` are read only when a penalty is on. Seed and position key the RNG:
    the same pair always draws the same number.
    """

    temperature: float = 1.0  # >= 0
    top_p: float = 1.0  # 0 < top_p <= 1
    top_k: int = 0  # >= 0
    min_p: float = 0.0  # 0 <= min_p <= 1, relative to the most likely token
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0  # > 0; counts the prompt too
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    masked_ids: Sequence[int] = ()  # never chosen: eos and stop ids before min_tokens
    prompt_ids: Sequence[int] = ()
    output_ids: Sequence[int] = ()
    seed: int = 0  # 0 <= seed < 2**64
    position: int = 0  # of the token to be drawn; 0 <= position < 2**64
    num_logprobs: int | None = None  # None: none; k: the chosen token's and the k most likely

    @property
    def keeps_logits(self) -> bool:
        """Whether the row's logits are used as they come from the model."""
        return not (self.logit_bias or self.masked_ids or self.has_penalty)

    @property
    def has_penalty(self) -> bool:
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLogprobs:
    """Natural log-probabilities of one row under the raw model distribution."""

    logprob: float  # of the token asked about
    rank: int  # 1 = most likely; of equals the lowest id comes first
    top_ids: list[int]  # most likely first
    top_logprobs: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledBatch:
    """One token a row."""

    token_ids: list[int]  # [B]
    logprobs: list[RowLogprobs | None]  # [B]; None where the row did not ask
    failed_rows: tuple[
        int, ...
    ] = ()  # NaN, +inf or nothing left to choose: the token means nothing


def sample(logits_BV: Tensor, rows: Sequence[RowParams]) -> SampledBatch:
    """Chooses a token for each row of `logits_BV` (float32, [B, V], left unchanged).

    Raises ValueError when shapes, dtypes or token ids do not fit. A row whose logits are broken
    fails alone: it is named in `failed_rows`.
    """
    if logits_BV.ndim != 2 or logits_BV.dtype != torch.float32 or len(rows) != logits_BV.shape[0]:
        raise ValueError(
            f"logits {tuple(logits_BV.shape)} {logits_BV.dtype} for {len(rows)} rows: "
            "expected float32 [B, V] with one row each"
        )
    logits_BV = logits_BV.detach().contiguous()
    array_BV: NDArray[np.float32] = logits_BV.numpy()
    token_ids = [0] * len(rows)
    failed: list[int] = []
    for b, row in enumerate(rows):
        chosen = _sample_row(array_BV[b], row)
        if chosen is None:
            failed.append(b)
        else:
            token_ids[b] = chosen
    bad = frozenset(failed)
    logprobs = [
        None
        if row.num_logprobs is None or b in bad
        else _row_logprobs(array_BV[b], token_ids[b], row.num_logprobs)
        for b, row in enumerate(rows)
    ]
    return SampledBatch(token_ids=token_ids, logprobs=logprobs, failed_rows=tuple(sorted(failed)))


def raw_logprobs(
    logits_BV: Tensor, token_ids: Sequence[int], num_logprobs: int
) -> list[RowLogprobs]:
    """Log-probabilities of given tokens (prompt_logprobs, echo) and of the most likely ones.

    `logits_BV`: float32 [B, V]; one token id a row. Raises ValueError for ids out of range.
    """
    array_BV: NDArray[np.float32] = logits_BV.detach().contiguous().numpy()
    _check_ids(token_ids, array_BV.shape[1])
    return [
        _row_logprobs(array_BV[b], token, num_logprobs)
        for b, token in zip(range(array_BV.shape[0]), token_ids, strict=True)
    ]


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits: Philox4x32-10 keyed by seed, counted by position."""
    x = philox4x32(
        (position & _MASK32, position >> 32 & _MASK32, 0, 0), (seed & _MASK32, seed >> 32)
    )
    return ((x[0] << 21) | (x[1] >> 11)) * 2.0**-53


_MASK32 = 0xFFFFFFFF


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, ...]:
    """Ten rounds of Philox4x32 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK32, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK32
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return c0, c1, c2, c3


def _check_ids(ids: Sequence[int], vocabulary: int) -> None:
    if len(ids) and not 0 <= min(ids) <= max(ids) < vocabulary:
        raise ValueError(f"token ids {min(ids)}..{max(ids)}: the vocabulary has {vocabulary}")


def _processed(logits_V: NDArray[np.float32], row: RowParams) -> NDArray[np.float32]:
    """Logits after penalties, bias and mask (a copy unless nothing changes them)."""
    if row.keeps_logits:
        return logits_V
    scores_V = logits_V.copy()
    if row.has_penalty:
        _check_ids(row.prompt_ids, scores_V.size)
        _check_ids(row.output_ids, scores_V.size)
        output = np.asarray(row.output_ids, dtype=np.int64)
        if row.repetition_penalty != 1.0:
            prompt = np.asarray(row.prompt_ids, dtype=np.int64)
            seen = np.unique(np.concatenate([prompt, output]))
            value, penalty = scores_V[seen], np.float32(row.repetition_penalty)
            scores_V[seen] = np.where(value < 0, value * penalty, value / penalty)
        ids, counts = np.unique(output, return_counts=True)
        scores_V[ids] -= (row.frequency_penalty * counts + row.presence_penalty).astype(np.float32)
    if row.logit_bias:
        _check_ids(tuple(row.logit_bias), scores_V.size)
        ids = np.fromiter(row.logit_bias.keys(), dtype=np.int64)
        scores_V[ids] += np.fromiter(row.logit_bias.values(), dtype=np.float32)
    if row.masked_ids:
        _check_ids(row.masked_ids, scores_V.size)
        scores_V[np.asarray(row.masked_ids, dtype=np.int64)] = -np.inf
    return scores_V


def _sample_row(logits_V: NDArray[np.float32], row: RowParams) -> int | None:
    """The row's token; None when there is no finite maximum."""
    scores_C = _processed(logits_V, row)
    if row.temperature == 0.0:
        best = int(scores_C.argmax())  # the first of equals; NaN counts as the largest
        return best if math.isfinite(scores_C[best]) else None
    top = scores_C.max()
    if not math.isfinite(top):
        return None
    ids_C: NDArray[np.int64] | None = None  # None: candidate c is token c
    if 0 < row.top_k < scores_C.size:
        limit = np.partition(scores_C, scores_C.size - row.top_k)[scores_C.size - row.top_k]
        ids_C = np.flatnonzero(scores_C >= limit)
        scores_C = scores_C[ids_C]
    with np.errstate(over="ignore", under="ignore"):  # a tiny temperature leaves only the best
        weights_C = np.exp((scores_C - top) / np.float32(max(row.temperature, 1e-30)))
    if row.top_p < 1.0:
        kept = _nucleus(weights_C, row.top_p)
        ids_C = kept if ids_C is None else ids_C[kept]
        weights_C = weights_C[kept]
    if row.min_p > 0.0:
        kept = np.flatnonzero(weights_C >= np.float32(row.min_p))  # the best weighs exactly 1
        ids_C = kept if ids_C is None else ids_C[kept]
        weights_C = weights_C[kept]
    chosen = _inverse_cdf(weights_C, uniform(row.seed, row.position))
    return chosen if ids_C is None else int(ids_C[chosen])


def _nucleus(weights_C: NDArray[np.float32], top_p: float) -> NDArray[np.int64]:
    """Indices of the smallest set of largest weights that reaches `top_p` of the sum, ascending."""
    target = top_p * float(weights_C.sum(dtype=np.float64))
    for floor in _TOP_P_FLOORS:
        candidates = weights_C if floor == 0.0 else weights_C[weights_C >= np.float32(floor)]
        ordered = np.sort(candidates)[::-1]
        running = np.cumsum(ordered, dtype=np.float64)
        if running[-1] >= target:
            break
    num_kept = min(int(np.searchsorted(running, target, side="left")) + 1, ordered.size)
    limit = ordered[num_kept - 1]
    kept_C = weights_C > limit
    num_equal = num_kept - int(np.count_nonzero(kept_C))
    kept_C[np.flatnonzero(weights_C == limit)[:num_equal]] = True
    return np.flatnonzero(kept_C)


def _inverse_cdf(weights_C: NDArray[np.float32], u: float) -> int:
    """The first index whose running sum exceeds `u` times the sum; never one of weight 0."""
    starts = np.arange(0, weights_C.size, _CDF_BLOCK)
    running = np.cumsum(np.add.reduceat(weights_C, starts, dtype=np.float64))
    target = u * float(running[-1])
    block = min(int(np.searchsorted(running, target, side="right")), starts.size - 1)
    before = float(running[block - 1]) if block else 0.0
    start = block * _CDF_BLOCK
    within = before + np.cumsum(weights_C[start : start + _CDF_BLOCK], dtype=np.float64)
    index = start + int(np.searchsorted(within, target, side="right"))
    # The two levels round differently: a target in that gap belongs to the last positive weight.
    positive = np.flatnonzero(weights_C[: min(index, start + _CDF_BLOCK - 1) + 1])
    end = start + within.size
    return index if index < end and weights_C[index] > 0 else int(positive[-1])


def _row_logprobs(logits_V: NDArray[np.float32], token: int, num_top: int) -> RowLogprobs:
    value, best = logits_V[token], logits_V.max()
    total = float(np.exp(logits_V - best).sum(dtype=np.float64))
    offset = float(best) + math.log(total)
    rank = 1 + int(np.count_nonzero(logits_V > value))
    rank += int(np.count_nonzero(logits_V[:token] == value))
    num_top = min(num_top, logits_V.size)
    top: NDArray[np.int64] = np.empty(0, dtype=np.int64)
    if num_top:
        limit = np.partition(logits_V, logits_V.size - num_top)[logits_V.size - num_top]
        candidates = np.flatnonzero(logits_V >= limit)
        top = candidates[np.argsort(-logits_V[candidates], kind="stable")][:num_top]
    return RowLogprobs(
        logprob=float(value) - offset,
        rank=rank,
        top_ids=top.tolist(),
        top_logprobs=[float(x) - offset for x in logits_V[top]],
    )
