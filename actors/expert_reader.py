"""One expert after the other from a checkpoint, when a shard starts and later while it serves."""

from typing import Any

from torch import Tensor

from remora.actors.draft import Draft
from remora.actors.model_spec import ModelSpec


class ExpertReader:
    """Reads single experts of a checkpoint, in the served dtype.

    Args:
        draft: its checkpoint may be closed between reads: a read opens what it needs.

    Attributes:
        sites: the experts modules of the model on the meta device, by decoder layer.
        plan: of all its tensors.
    """

    def __init__(self, draft: Draft, spec: ModelSpec) -> None:
        self._checkpoint, self.plan = draft.checkpoint, draft.plan
        self.sites: dict[int, Any] = {site.layer: site for site in draft.sites}
        self._names = [name for name, _ in spec.expert.shapes]

    def targets(self, layer: int) -> dict[str, str]:
        """The parameters that a decoder layer's experts are rows of, by their own names."""
        return {name: f"{self.sites[layer].name}.{name}" for name in self._names}

    def check(self, layer: int) -> None:
        """Every expert of a layer is there, as far as headers tell. Raises WeightsError."""
        for target in self.targets(layer).values():
            self.plan.check_experts(target)

    def nbytes(self, layer: int) -> int:
        """Checkpoint bytes of one expert."""
        return sum(self.plan.expert_nbytes(target) for target in self.targets(layer).values())

    def read(self, layer: int, expert: int) -> dict[str, Tensor]:
        """One expert's tensors, as the experts class names them. Raises WeightsError."""
        return {n: self.plan.load_expert(t, expert) for n, t in self.targets(layer).items()}

    def close(self) -> None:
        """Close the checkpoint's files until the next read."""
        self._checkpoint.close()
