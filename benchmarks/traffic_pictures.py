"""Pictures of `traffic.py` as PNG: co-activation and grouping, traffic against load."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import matplotlib
import numpy as np
from numpy.typing import NDArray
from traffic_baselines import coactivation, contiguous, loads
from traffic_data import Trace
from traffic_ladder import REMORA, Result, Shape

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # after the choice of a backend without a screen

COLOURS = {"B0": "#888888", "B1": "#888888", "B2": "#888888", "B3": "#1b6ca8", "B4": "#b5651d",
           "B5": "#8d6a9f", "B6": "#d1495b"}  # fmt: skip


def heat_maps(trace: Trace, layer: int, shape: Shape, path: Path) -> None:
    """Experts of one layer in contiguous order and in the order of the shards Remora puts them on
    (first copies): how much more often two are picked by one token than if they had no taste."""
    topology = shape.topology(trace.num_experts)
    assert topology is not None, f"{trace.num_experts} experts do not divide over {shape}"
    one = trace.layers([layer])
    experts_TK = one.experts_TLK[:, 0]
    both_EE = coactivation(experts_TK, trace.num_experts)
    load_E = loads(experts_TK, trace.num_experts)
    lift_EE = both_EE * len(experts_TK) / np.maximum(np.outer(load_E, load_E), 1)
    before = contiguous(trace.num_experts, topology).argmax(0)
    after = REMORA.place(one, topology)[0].argmax(0)
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.4), layout="constrained")
    for axis, shard_E, title in (
        (axes[0], before, "contiguous"),
        (axes[1], after, "grouped by Remora"),
    ):
        order = np.argsort(shard_E, kind="stable")
        share = _within(both_EE, shard_E)
        image = axis.imshow(lift_EE[np.ix_(order, order)], vmin=0, vmax=4, cmap="magma")
        for edge in np.flatnonzero(np.diff(shard_E[order])) + 0.5:
            axis.axhline(edge, color="white", linewidth=0.4)
            axis.axvline(edge, color="white", linewidth=0.4)
        axis.set_title(f"{title}: {share:.0%} of it inside a shard", fontsize=10)
        axis.set_xlabel("expert, by shard")
    figure.colorbar(image, ax=axes, label="co-activation / independent", shrink=0.8)
    figure.suptitle(f"Co-activation, {trace.name}, MoE layer {layer}, {shape}", fontsize=11)
    _save(figure, path)


def _within(both_EE: NDArray[np.float64], shard_E: NDArray[np.int64]) -> float:
    return float(both_EE[shard_E[:, None] == shard_E[None, :]].sum() / both_EE.sum())


def traffic_against_load(
    results: Sequence[Result], scenario: str, shapes: Sequence[Shape], path: Path
) -> None:
    """Each method a point: remote copies of a token over load max/mean, means over layers and
    folds; round-robin sources hollow, request homes full."""
    figure, axes = plt.subplots(
        1, len(shapes), figsize=(4.6 * len(shapes), 4.4), layout="constrained", squeeze=False
    )
    for axis, shape in zip(axes[0], shapes, strict=True):
        own = [r for r in results if r.scenario == scenario and r.shape == shape]
        for method in dict.fromkeys(r.method for r in own):
            for sources in ("round-robin", "homes"):
                means = [r.mean for r in own if (r.method, r.sources) == (method, sources)]
                if not means:
                    continue
                x, y = fmean(m.load for m in means), fmean(m.copies for m in means)
                colour = COLOURS[method[:2]]
                full = sources == "homes"
                axis.scatter(x, y, s=40, color=colour if full else "none", edgecolors=colour)
                if full:
                    axis.annotate(method, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=7)  # fmt: skip  # noqa: E501
        axis.set_title(f"{scenario}, {shape}")
        axis.set_xlabel("load max / mean over the held-out set")
        axis.set_ylabel("remote copies per token and layer")
        axis.margins(x=0.25)
        axis.grid(alpha=0.3)
    figure.suptitle("hollow: round-robin sources; full: request homes", fontsize=9)
    _save(figure, path)


def _save(figure: "plt.Figure", path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(figure)
