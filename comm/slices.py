"""Sums and gathers in which every rank has a slice of the rows, in an order that all ranks know.

    sum_slice(part, order, group)                  reduce-scatter: this rank's slice of the sum
    gather_slices(rows, order, num_rows, group)    all-gather: all rows, each where it belongs

Rank r has the rows `order[begin:end]`, begin and end as `part_of` the length of the order says. The
sum of a row has the bits that `Group.sum` gives it: float32, in the order of the ranks, rounded
once. Ranks that do not agree on an order do not mix rows up: the exchange fails (not over NCCL).

In shared memory these are C++ (kernels/csrc/group_slices.cpp); over gloo a reduce-scatter is an
all-to-all of bytes and the sum is taken here. NCCL's group serves through its sum and gather, which
nobody waits for: there orders are not compared.

Shape suffixes: T rows, D columns, C rows of this rank's slice.
"""

import hashlib
from typing import Final

import torch
from torch import Tensor

from remora.comm.collectives import GlooGroup, Group, SharedGroup, part_of

_TAG_BYTES: Final = 8


def own_slice(order_T: Tensor, group: Group) -> Tensor:
    """The rows of this rank, int64 [C]."""
    begin, end = part_of(group.rank, group.size, len(order_T))
    return order_T[begin:end]


def sum_slice(part_TD: Tensor, order_T: Tensor, group: Group) -> Tensor:
    """[C, D]: the rows of this rank's slice, summed over all ranks' `part_TD`.

    Args:
        part_TD: float32 or bfloat16, of one shape on every rank.
        order_T: int64, rows of `part_TD`, each at most once; the same on every rank.

    Raises:
        RuntimeError: the group is aborted, a rank is late, or has another order.
    """
    if isinstance(group, SharedGroup):
        out: Tensor = torch.ops.remora.group_sum_slice(part_TD, order_T, group.number)
        return out
    if not isinstance(group, GlooGroup):
        return group.sum(part_TD)[own_slice(order_T, group)]
    spans = [part_of(rank, group.size, len(order_T)) for rank in range(group.size)]
    slices = [part_TD[order_T[begin:end]] for begin, end in spans]
    mine = slices[group.rank]
    if group.is_dry:
        return torch.zeros_like(mine)
    received = _exchange(slices, [len(mine)] * group.size, order_T, group, "sum_slice")
    total = received[0].float()
    for rows in received[1:]:
        total = total + rows.float()
    return total.to(mine.dtype)


def gather_slices(rows_CD: Tensor, order_T: Tensor, num_rows: int, group: Group) -> Tensor:
    """[num_rows, D] on every rank: row `order_T[i]` is row i of all slices behind each other.

    Args:
        rows_CD: this rank's slice, of a dtype of two bytes at least.
        order_T: int64, as in `sum_slice`. Rows that it leaves out are zeros.

    Raises:
        RuntimeError: as `sum_slice`.
    """
    if isinstance(group, SharedGroup):
        out: Tensor = torch.ops.remora.group_gather_slices(rows_CD, order_T, num_rows, group.number)
        return out
    whole = rows_CD.new_zeros((num_rows, rows_CD.shape[1]))
    if not isinstance(group, GlooGroup):
        # NCCL sends few dtypes: what is of the same size takes their place, and nobody computes.
        sent = torch.float16 if rows_CD.dtype.itemsize == 2 else torch.float32
        gathered = group.gather_rows(rows_CD.contiguous().view(sent), len(order_T))
        whole[order_T] = gathered.view(rows_CD.dtype)
        return whole
    if group.is_dry:
        return whole
    counts = [e - b for b, e in (part_of(r, group.size, len(order_T)) for r in range(group.size))]
    received = _exchange([rows_CD] * group.size, counts, order_T, group, "gather_slices")
    whole[order_T] = torch.cat(received)
    return whole


def _exchange(
    rows: list[Tensor], counts: list[int], order_T: Tensor, group: GlooGroup, operation: str
) -> list[Tensor]:
    """Rows [C, D] for every rank against as many as `counts` says from each.

    A message begins with a digest of the order, which the counters count too (`_TAG_BYTES`).

    Raises:
        RuntimeError: a rank has another order; as `GlooGroup.all_to_all`.
    """
    width, dtype = rows[0].shape[1], rows[0].dtype
    digest = hashlib.blake2b(order_T.numpy().tobytes(), digest_size=_TAG_BYTES).digest()
    head = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
    sent = [torch.cat([head, part.contiguous().flatten().view(torch.uint8)]) for part in rows]
    sizes = [_TAG_BYTES + count * width * dtype.itemsize for count in counts]
    received = group.all_to_all(sent, sizes, operation)
    strangers = [r for r, part in enumerate(received) if not part[:_TAG_BYTES].equal(head)]
    if strangers:
        reason = f"ranks {group.rank} and {strangers[0]} do not agree on what is exchanged"
        group.abort(reason)
        raise RuntimeError(f"tensor-parallel group: {reason}")
    return [part[_TAG_BYTES:].clone().view(dtype).view(-1, width) for part in received]
