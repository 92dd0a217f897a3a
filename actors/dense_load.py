"""The model of a dense rank, loaded in time that nobody else wants where others serve beside it."""

from collections.abc import Callable
from typing import TypeVar

import torch

from remora.actors.dense_launch import DenseLaunch
from remora.actors.dense_model import DenseModel, build_dense
from remora.actors.draft import Known
from remora.actors.launch import take_threads
from remora.actors.model_spec import ModelSpec, inspect_model, resolve_dtype
from remora.actors.thread_policy import run_idle
from remora.actors.tp_leader import Leader
from remora.actors.weights import Progress

T = TypeVar("T")


def look_at(launch: DenseLaunch, spec: ModelSpec | None) -> tuple[ModelSpec, torch.dtype]:
    """The checkpoint's model (`spec`, if it is known), and the dtype that it is served in.

    Raises:
        UnsupportedModelError, WeightsError: as `inspect_model`.
    """

    def look() -> tuple[ModelSpec, torch.dtype]:
        found = spec or inspect_model(launch.model)
        return found, resolve_dtype(found, launch.dtype)

    return _in_time(launch, look)


def load_dense(
    launch: DenseLaunch,
    spec: ModelSpec,
    dtype: torch.dtype,
    *,
    device: torch.device,
    leader: Leader | None,
    slice_rows: bool,
    progress: Progress,
    known: Known,
) -> DenseModel:
    """As `build_dense`; what is `known` of the model's structure is used up."""
    return _in_time(
        launch,
        lambda: build_dense(
            launch.model,
            spec,
            dtype=dtype,
            exact=launch.exact,
            max_positions=launch.max_model_len,
            progress=progress,
            group=leader.group if leader is not None else None,
            device=device,
            slice_rows=slice_rows,
            draft=known.take_draft(),
        ),
    )


def _in_time(launch: DenseLaunch, work: Callable[[], T]) -> T:
    """At idle priority if that was asked for: in a thread of its own, as who serves could not go
    back to normal priority."""
    if not launch.load_idle:
        return work()

    def alone() -> T:
        take_threads(launch.num_threads)
        return work()

    return run_idle("remora-load", alone)
