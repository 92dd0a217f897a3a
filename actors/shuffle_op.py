"""The opaque ops of a decoder layer whose rows are divided among the ranks behind its attention.

    slice_sum     partial sums of all rows        -> this rank's slice of their sum (reduce-scatter)
    slice_rows    rows that every rank has        -> this rank's slice of them
    restore_rows  this rank's slice, finished     -> all rows, in the order of the step (all-gather)
    whole_rows    slices                          -> all rows, slice behind slice
    part_sum      partial sums of `whole_rows`    -> this rank's slice of their sum

The first three read the order of the rows from the step's context (`tp_shuffle.TokenShuffle`); in
steps that count for nothing rows stay as they are. The last two serve what is divided by width
inside such a layer (shared experts). Eager layers call the bodies at once, compiled ones the ops.

Legend: T token rows of the step, a multiple of the number of ranks; C rows of a slice, T / ranks;
D columns. Tensors are [1, rows, D] or [rows, D].
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from remora.actors.step_context import steps
from remora.comm.collectives import Group
from remora.comm.slices import gather_slices, own_slice, sum_slice

_library = torch.library.Library("remora_slice", "DEF")
_groups: dict[int, Group] = {}  # of the engines whose layers are divided


def divide(engine_id: int, group: Group) -> None:
    """Layers of an engine divide their rows among `group` from now on."""
    _groups[engine_id] = group


def _order(engine_id: int, num_rows: int) -> Tensor:
    """Of the layer that runs: int64 [T]."""
    context = steps.current(engine_id)
    if context.shuffle is None:
        return torch.arange(num_rows)
    return context.shuffle.predicted_order(context.layer, num_rows)


def _slice_sum(part: Tensor, engine_id: int, size: int) -> Tensor:
    flat = part.flatten(0, -2)
    rows = sum_slice(flat, _order(engine_id, len(flat)), _groups[engine_id])
    return rows.view(*part.shape[:-2], *rows.shape)


def _slice_rows(rows: Tensor, engine_id: int, size: int) -> Tensor:
    order = _order(engine_id, rows.shape[-2])
    own = own_slice(order, _groups[engine_id])  # made on the host, wherever the rows are
    return rows.index_select(-2, own.to(rows.device))


def _restore_rows(rows: Tensor, like: Tensor, engine_id: int) -> Tensor:
    num_rows, group = like.shape[-2], _groups[engine_id]
    order = _order(engine_id, num_rows)
    whole = gather_slices(rows.flatten(0, -2), order, num_rows, group)
    context = steps.current(engine_id)
    if context.shuffle is not None:
        context.shuffle.close_layer()
    return whole.view(like.shape)


def _whole_rows(rows: Tensor, engine_id: int, size: int) -> Tensor:
    flat = rows.flatten(0, -2)
    whole = _groups[engine_id].gather_rows(flat, size * len(flat))
    return whole.view(*rows.shape[:-2], *whole.shape)


def _part_sum(part: Tensor, like: Tensor, engine_id: int) -> Tensor:
    flat = part.flatten(0, -2)
    rows = sum_slice(flat, torch.arange(len(flat)), _groups[engine_id])
    return rows.view(*part.shape[:-2], *rows.shape)


def _fake_slice(rows: Tensor, engine_id: int, size: int) -> Tensor:
    return rows.new_empty((*rows.shape[:-2], rows.shape[-2] // size, rows.shape[-1]))


def _fake_restored(rows: Tensor, like: Tensor, engine_id: int) -> Tensor:
    return like.new_empty(like.shape)


def _fake_whole(rows: Tensor, engine_id: int, size: int) -> Tensor:
    return rows.new_empty((*rows.shape[:-2], rows.shape[-2] * size, rows.shape[-1]))


def _fake_part(part: Tensor, like: Tensor, engine_id: int) -> Tensor:
    return part.new_empty((*like.shape[:-1], part.shape[-1]))


_OPS: dict[str, tuple[str, Callable[..., Tensor], Callable[..., Tensor]]] = {
    "slice_sum": ("Tensor part, int engine_id, int size", _slice_sum, _fake_slice),
    "slice_rows": ("Tensor rows, int engine_id, int size", _slice_rows, _fake_slice),
    "restore_rows": ("Tensor rows, Tensor like, int engine_id", _restore_rows, _fake_restored),
    "whole_rows": ("Tensor rows, int engine_id, int size", _whole_rows, _fake_whole),
    "part_sum": ("Tensor part, Tensor like, int engine_id", _part_sum, _fake_part),
}
for _name, (_signature, _body, _fake) in _OPS.items():
    _library.define(f"{_name}({_signature}) -> Tensor")
    _library.impl(_name, _body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"remora_slice::{_name}", _fake, lib=_library)


def slice_sum(part: Tensor, engine_id: int, size: int) -> Tensor:
    """[.., T, D] partial sums, the same rows on every rank -> [.., C, D] of this rank's slice."""
    if torch.compiler.is_compiling():
        out: Tensor = torch.ops.remora_slice.slice_sum(part, engine_id, size)
        return out
    return _slice_sum(part, engine_id, size)


def slice_rows(rows: Tensor, engine_id: int, size: int) -> Tensor:
    """[.., T, D], the same on every rank -> [.., C, D] of this rank's slice."""
    if torch.compiler.is_compiling():
        out: Tensor = torch.ops.remora_slice.slice_rows(rows, engine_id, size)
        return out
    return _slice_rows(rows, engine_id, size)


def restore_rows(rows: Tensor, like: Tensor, engine_id: int) -> Tensor:
    """[.., C, D] of every rank -> [.., T, D] on every rank; `like` has that shape."""
    if torch.compiler.is_compiling():
        out: Tensor = torch.ops.remora_slice.restore_rows(rows, like, engine_id)
        return out
    return _restore_rows(rows, like, engine_id)


def whole_rows(rows: Tensor, engine_id: int, size: int) -> Tensor:
    """[.., C, D] of every rank -> [.., size * C, D] on every rank, in the order of the ranks."""
    if torch.compiler.is_compiling():
        out: Tensor = torch.ops.remora_slice.whole_rows(rows, engine_id, size)
        return out
    return _whole_rows(rows, engine_id, size)


def part_sum(part: Tensor, like: Tensor, engine_id: int) -> Tensor:
    """[.., size * C, D] partial sums of `whole_rows` -> [.., C, D]; `like` has C rows."""
    if torch.compiler.is_compiling():
        out: Tensor = torch.ops.remora_slice.part_sum(part, like, engine_id)
        return out
    return _part_sum(part, like, engine_id)


def whole_rows_class(kind: type[Any], engine_id: int, size: int) -> type[Any]:
    """`kind` (a module from rows to partial sums of rows) for rows of a slice: a class like it."""

    def forward(self: Any, rows: Tensor) -> Tensor:
        part = kind.forward(self, whole_rows(rows, engine_id, size))
        return part_sum(part, rows, engine_id)

    return type(f"WholeRows{kind.__name__}", (kind,), {"forward": forward})
