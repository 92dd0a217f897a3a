"""What a plan of the router comes to; apart from what makes it, whose imports take a second."""

from dataclasses import dataclass

import numpy as np

from remora.comm.view import Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerOutcome:
    """One layer of a plan."""

    layer: int  # decoder layer
    copies_before: float  # rows to remote hosts, per token
    copies_after: float
    load_before: float  # largest over mean load of a shard
    load_after: float
    moved: int  # copies that some shard must fetch


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOutcome:
    """A plan against the placement in force; costs on what was reported."""

    placement: Placement
    epoch: int  # of the view that it was made against; 0: of none, from a trace
    tokens: float  # that the statistics tell as much as
    layers: tuple[LayerOutcome, ...]

    def mean(self, name: str) -> float:
        """Mean over the layers of one field of `LayerOutcome`."""
        return float(np.mean([getattr(layer, name) for layer in self.layers]))

    @property
    def moved_experts(self) -> int:
        """Copies that some shard must fetch, over all layers."""
        return sum(layer.moved for layer in self.layers)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementCost:
    """What one placement costs on what was reported."""

    tokens: float  # as of a plan
    copies: float
    load: float
