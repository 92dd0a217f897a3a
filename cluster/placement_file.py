"""Placement files: which shard is to hold which experts, as YAML or JSON (docs/placement.md).

    num_experts: 4
    moe_layers: [1, 2]            # decoder layers that have routed experts
    slots:
      shard-0: [[0, 1], [0, 3]]   # one list for each of them: logical experts in slot order
      shard-1: [[2, 3], [1, 2, 3]]

The fields are those of `comm.view.Placement`; an expert in several shards has replicas.
"""

import contextlib
from itertools import islice
from pathlib import Path

import msgspec

from remora.comm.errors import ConfigError
from remora.comm.view import Placement

LATEST = "placement.yaml"  # in `router.state_dir`: what was last decided
FILE_BYTES_MAX = 64 << 20
NAMED_MAX = 8  # experts or shards that an error lists


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What stands in a file: fields of `Placement`, and no others."""

    num_experts: int
    moe_layers: tuple[int, ...]
    slots: dict[str, tuple[tuple[int, ...], ...]]


def read_placement(path: Path) -> Placement:
    """The placement in a file, complete in itself.

    Raises:
        ConfigError: the file cannot be read, is no placement, or lacks an expert somewhere.
    """
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise ConfigError(f"placement {path}: over {FILE_BYTES_MAX} bytes")
        data = path.read_bytes()
        found = msgspec.yaml.decode(data, type=_File)  # JSON is YAML
    except OSError as unreadable:
        raise ConfigError(f"placement {path}: {unreadable.strerror}") from None
    except msgspec.DecodeError as wrong:
        raise ConfigError(f"placement {path}: {wrong}") from None
    placement = Placement(
        num_experts=found.num_experts, moe_layers=found.moe_layers, slots=found.slots
    )
    return checked_placement(placement, source=f"placement {path}")


def checked_placement(placement: Placement, *, source: str) -> Placement:
    """A placement that is complete in itself. Raises ConfigError: it is none."""
    fault = _fault(placement)
    if fault is not None:
        raise ConfigError(f"{source}: {fault}")
    return placement


def write_placement(path: Path, placement: Placement) -> None:
    """Write a file that `read_placement` takes, whole or not at all; one layer a line.

    Raises:
        ConfigError: it cannot be written there.
    """
    lines = [
        f"num_experts: {placement.num_experts}",
        f"moe_layers: {list(placement.moe_layers)}",
        "slots:",
    ]
    for uid, layers in placement.slots.items():
        lines.append(f"  {uid}:")
        lines += [f"    - {list(experts)}" for experts in layers]
    half = path.with_name(f".{path.name}.half")
    try:
        half.write_text("\n".join(lines) + "\n", encoding="utf-8")
        half.replace(path)
    except OSError as failed:
        with contextlib.suppress(OSError):  # that folder is why
            half.unlink(missing_ok=True)
        raise ConfigError(f"placement {path}: cannot be written: {failed.strerror}") from None


def check_fits(
    placement: Placement,
    *,
    source: str,
    num_experts: int,
    moe_layers: tuple[int, ...],
    shard_uids: tuple[str, ...] | None = None,
    slots: int | None = None,
) -> None:
    """Raises ConfigError unless a placement is one of this model, these shards and these slots.

    Args:
        source: names it in the error.
        shard_uids, slots: None: any.
    """
    if placement.num_experts != num_experts:
        raise ConfigError(
            f"{source}: num_experts = {placement.num_experts}: the model has {num_experts} experts"
            " a layer"
        )
    if placement.moe_layers != moe_layers:
        raise ConfigError(
            f"{source}: moe_layers = {list(placement.moe_layers)}: the model's MoE layers are"
            f" {list(moe_layers)}"
        )
    if shard_uids is not None:
        unknown = sorted(set(placement.slots) - set(shard_uids))
        if unknown:
            raise ConfigError(
                f"{source}: no such shards: {few(unknown)}; this deployment has"
                f" {few(list(shard_uids))} (experts.shards = {len(shard_uids)})"
            )
    for uid, layers in placement.slots.items():
        for layer, experts in zip(moe_layers, layers, strict=True):
            if slots is not None and len(experts) > slots:
                raise ConfigError(
                    f"{source}: {uid} layer {layer}: {len(experts)} experts, but experts.slots ="
                    f" {slots}"
                )


def whole_placement(placement: Placement, shard_uids: tuple[str, ...]) -> Placement:
    """One that `check_fits` these shards, for all of them: those that it does not name hold
    nothing."""
    nothing: tuple[tuple[int, ...], ...] = ((),) * len(placement.moe_layers)
    whole = {uid: placement.slots.get(uid, nothing) for uid in shard_uids}
    return msgspec.structs.replace(placement, slots=whole)


def _fault(placement: Placement) -> str | None:
    """What makes it no placement, if anything does."""
    num_layers, num_experts = len(placement.moe_layers), placement.num_experts
    if num_experts < 1 or num_layers < 1 or not placement.slots:
        return "at least one expert, one layer and one shard are needed"
    if list(placement.moe_layers) != sorted(set(placement.moe_layers)):
        return f"moe_layers = {list(placement.moe_layers)}: must ascend"
    for uid, layers in placement.slots.items():
        if len(layers) != num_layers:
            return f"{uid}: {len(layers)} lists of experts for {num_layers} MoE layers"
    for index, layer in enumerate(placement.moe_layers):
        held: set[int] = set()
        for uid, layers in placement.slots.items():
            experts = layers[index]
            if len(set(experts)) < len(experts):
                return f"{uid} layer {layer}: an expert stands twice in {list(experts)}"
            wrong = [expert for expert in experts if not 0 <= expert < num_experts]
            if wrong:
                return f"{uid} layer {layer}: experts {few(wrong)} are not in 0..{num_experts - 1}"
            held.update(experts)
        num_missing = num_experts - len(held)
        if num_missing:  # a file may say any number of experts: they are not listed
            first = islice((e for e in range(num_experts) if e not in held), NAMED_MAX)
            return f"layer {layer}: no shard holds experts {few(list(first), num_missing)}"
    return None


def few(items: list[int] | list[str], num_items: int | None = None) -> str:
    """The first of them, and how many more there are.

    Args:
        num_items: where `items` are the first of so many.
    """
    text = ", ".join(str(item) for item in items[:NAMED_MAX])
    more = (len(items) if num_items is None else num_items) - NAMED_MAX
    return f"{text} and {more} more" if more > 0 else text
