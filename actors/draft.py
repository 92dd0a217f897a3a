"""A checkpoint's model before the first weight is read: its structure, and where each of its
parameters comes from.

Of a warm standby that joins, making this takes longer than the weights of a small model do: it is
made when the standby gets warm.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from remora.actors import model_build
from remora.actors.checkpoint_files import Checkpoint
from remora.actors.layer_numbers import forget_layer_numbers
from remora.actors.model_spec import ModelSpec
from remora.actors.weights import WeightPlan

Files = frozenset[tuple[str, int, int]]  # name, bytes, time of the last change in nanoseconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """What `build_dense` and `build_shard` take weights by, once: a dense rank's model is made of
    the draft's.

    Attributes:
        model: on the meta device; what it computes at construction is real.
        sites: its experts modules.
        checkpoint: closed; a read opens what it needs.
        plan: where weights come from.
    """

    model: Any
    sites: tuple[model_build.ExpertsSite, ...]
    checkpoint: Checkpoint
    plan: WeightPlan
    dtype: torch.dtype
    files: Files

    def is_of(self, path: str | Path, dtype: torch.dtype) -> bool:
        """Whether it is what `draft_model` would make now: of the same files, unchanged."""
        here = self.checkpoint.directory
        return here == Path(path) and self.dtype == dtype and self.files == _files(here)


class Known:
    """What a process has seen of a checkpoint before it was told which member it is.

    Args:
        spec: None: nothing yet.
        draft: of the dtype that the checkpoint names.
    """

    def __init__(self, spec: ModelSpec | None = None, draft: Draft | None = None) -> None:
        self.spec = spec
        self._draft = draft

    def take_draft(self) -> Draft | None:
        """For whoever fills it: a draft makes one model."""
        draft, self._draft = self._draft, None
        return draft


def draft_model(path: str | Path, spec: ModelSpec, dtype: torch.dtype) -> Draft:
    """Look at a checkpoint's files and build its model without weights.

    Args:
        path: checkpoint directory.
        spec: of `inspect_model(path)`.
        dtype: served dtype, float32 or bfloat16.

    Raises:
        WeightsError: naming file and tensor.
    """
    model, sites = structure(spec, dtype)
    files = _files(Path(path))  # before they are looked at: a later change is seen then
    with Checkpoint.open(path) as checkpoint:
        plan = WeightPlan(model, checkpoint, dtype)
    return Draft(
        model=model, sites=sites, checkpoint=checkpoint, plan=plan, dtype=dtype, files=files
    )


def current_draft(
    draft: Draft | None, path: str | Path, spec: ModelSpec, dtype: torch.dtype
) -> Draft:
    """`draft`, if it was made in advance and holds; else one made now. Raises as `draft_model`."""
    if draft is not None and draft.is_of(path, dtype):
        return draft
    return draft_model(path, spec, dtype)


def structure(
    spec: ModelSpec, dtype: torch.dtype
) -> tuple[Any, tuple[model_build.ExpertsSite, ...]]:
    """The model on the meta device, its own buffers real, and its experts modules."""
    model = model_build.build_meta(spec.config, dtype)
    model_build.compute_buffers(model)
    forget_layer_numbers(model)
    return model, model_build.expert_sites(model)


def _files(directory: Path) -> Files:
    try:
        found = [(path.name, path.stat()) for path in directory.glob("*.safetensors*")]
    except OSError:  # gone while it was looked at, as `Checkpoint.open` will say
        return frozenset()
    return frozenset((name, stat.st_size, stat.st_mtime_ns) for name, stat in found)
