"""The slow, obvious twins of `remora.kernels.attention` and `remora.kernels.sampling`.

Float64, one head or one row of logits at a time, whole softmax, full sorts.
Shape suffixes: L context length, H query heads, J key/value heads, V vocabulary, d head width.
"""

import math
from collections import Counter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from remora.kernels.sampling import RowParams, uniform


def attention_reference(
    q_LHd: Tensor,
    k_LJd: Tensor,
    v_LJd: Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    attention_chunk: int | None = None,
    soft_cap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Causal attention of one whole sequence, as in `paged_attention` -> float64 [L, H, d]."""
    length, num_heads, _ = q_LHd.shape
    group = num_heads // k_LJd.shape[1]
    i_L1, j_1L = torch.arange(length)[:, None], torch.arange(length)[None, :]
    visible_LL = j_1L <= i_L1
    if sliding_window is not None:
        visible_LL &= j_1L > i_L1 - sliding_window
    if attention_chunk is not None:
        visible_LL &= j_1L // attention_chunk == i_L1 // attention_chunk
    out_LHd = torch.zeros((length, num_heads, v_LJd.shape[2]), dtype=torch.float64)
    for h in range(num_heads):
        score_LL = (q_LHd[:, h].double() @ k_LJd[:, h // group].double().T) * scale
        if soft_cap is not None:
            score_LL = soft_cap * torch.tanh(score_LL / soft_cap)
        score_LL[~visible_LL] = -torch.inf
        if sinks_H is not None:
            sink_L1 = sinks_H[h].double().expand(length, 1)
            weight_LL = torch.softmax(torch.cat([score_LL, sink_L1], 1), 1)[:, :-1]
        else:
            weight_LL = torch.softmax(score_LL, 1)
        out_LHd[:, h] = weight_LL @ v_LJd[:, h // group].double()
    return out_LHd


def processed_logits_reference(logits_V: NDArray[np.float32], row: RowParams) -> list[float]:
    """Logits after penalties, bias and mask, token by token."""
    counts = Counter(row.output_ids)
    seen = set(row.prompt_ids) | set(row.output_ids)
    result = []
    for token, value in enumerate(logits_V.tolist()):
        if token in seen:
            value = value * row.repetition_penalty if value < 0 else value / row.repetition_penalty
        value -= row.frequency_penalty * counts[token]
        value -= row.presence_penalty * (counts[token] > 0)
        value += row.logit_bias.get(token, 0.0)
        result.append(-math.inf if token in row.masked_ids else value)
    return result


def kept_probabilities_reference(logits_V: NDArray[np.float32], row: RowParams) -> dict[int, float]:
    """What the token is drawn from: token -> probability after every filter, summing to 1."""
    scores = [value / row.temperature for value in processed_logits_reference(logits_V, row)]
    order = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    if 0 < row.top_k < len(order):
        limit = scores[order[row.top_k - 1]]
        order = [token for token in order if scores[token] >= limit]
    weights = {token: math.exp(scores[token] - scores[order[0]]) for token in order}
    weights = {token: weight for token, weight in weights.items() if weight > 0}
    total = math.fsum(weights.values())
    kept: dict[int, float] = {}
    before = 0.0
    for token, weight in weights.items():  # most likely first
        if kept and before >= row.top_p * total:
            break
        kept[token] = weight
        before += weight
    kept = {token: weight for token, weight in kept.items() if weight >= row.min_p}  # the best is 1
    total = math.fsum(kept.values())
    return {token: weight / total for token, weight in kept.items()}


def sample_reference(logits_V: NDArray[np.float32], row: RowParams) -> int:
    """The token of one row: the most likely (lowest id of equals), or drawn by inverse CDF."""
    if row.temperature == 0.0:
        scores = processed_logits_reference(logits_V, row)
        return scores.index(max(scores))
    kept = sorted(kept_probabilities_reference(logits_V, row).items())
    target, running = uniform(row.seed, row.position), 0.0
    for token, probability in kept:
        running += probability
        if running > target:
            return token
    return kept[-1][0]
