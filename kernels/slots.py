"""Slots of one layer's experts: which are taken, and what an expert's tensors must be."""

from collections.abc import Mapping

import torch
from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]


class ExpertSlots:
    """What holders of experts have in common, whatever their layout and device.

    Args:
        num_slots: S.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._loaded: set[int] = set()

    @property
    def loaded_slots(self) -> frozenset[int]:
        """Slots that hold an expert."""
        return frozenset(self._loaded)

    def clear_slot(self, slot: int) -> None:
        """Forgets the expert of a slot; its room may be loaded again."""
        self._loaded.discard(slot)

    def export_slot(self, slot: int) -> dict[str, Tensor]:
        """One expert's tensors on the CPU, contiguous, sorted by name."""
        raise NotImplementedError

    def holds(self, slot: int, tensors: Mapping[str, Tensor]) -> bool:
        """Whether `export_slot` gives these tensors (on the CPU), bit for bit."""
        held = self.export_slot(slot)
        return held.keys() == tensors.keys() and all(
            same_bits(held[name], tensor) for name, tensor in tensors.items()
        )

    def slot_layout(self) -> str | None:
        """What bytes of a slot mean: equal texts, equal meanings. None: nobody may copy them."""
        return None

    def slot_parts(self, slot: int) -> list[Tensor]:
        """The memory of a slot as uint8 vectors, in an order that the layout stands for.

        Raises:
            ValueError: `slot_layout` is None.
        """
        raise ValueError(f"slots of {type(self).__name__} are not copied byte by byte")

    def mark_loaded(self, slot: int) -> None:
        """Somebody has written an expert's bytes into `slot_parts`."""
        self._loaded.add(slot)

    def check_load(
        self,
        slot: int,
        tensors: Mapping[str, Tensor],
        shapes: Shapes,
        dtypes: Mapping[str, torch.dtype],
    ) -> None:
        """Whether `tensors` are an expert for `slot`.

        Raises:
            ValueError: a name that is missing or unknown, a wrong shape or dtype.
        """
        assert 0 <= slot < self.num_slots, f"slot {slot} of {self.num_slots}"
        if tensors.keys() != shapes.keys():
            raise ValueError(f"an expert has tensors {sorted(shapes)}, got {sorted(tensors)}")
        for name, tensor in tensors.items():
            if tuple(tensor.shape) != shapes[name] or tensor.dtype != dtypes[name]:
                raise ValueError(
                    f"{name} must be {list(shapes[name])} {dtypes[name]}, "
                    f"got {list(tensor.shape)} {tensor.dtype}"
                )

    def check_loaded(self, slot: int) -> None:
        """An empty slot has nothing to export."""
        assert slot in self._loaded, f"slot {slot} is empty; loaded: {sorted(self._loaded)}"


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits: a NaN equals itself, 0 is not -0."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    flat = (tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(*flat)


def expert_shapes(
    weights: Shapes, *, has_bias: bool, is_transposed: bool
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one expert's tensors as the model has them.

    Args:
        weights: projection -> (outputs, inputs).
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in weights.items():
        shapes[name] = shape[::-1] if is_transposed else shape
        if has_bias:
            shapes[f"{name}_bias"] = shape[:1]
    return shapes
