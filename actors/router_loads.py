"""What dense groups send to which shard, as they tell the router: each hears of all others' pairs.

    others_LS = exchange.report("dense-0", incarnation, epoch, sent_LS)

Everybody prices shards by the load of all (`comm/choice.py`), and sees by itself only its own.
Pure; one view at a time: pairs of another epoch went by another placement and say nothing.

Shape suffixes: L MoE layers, S shards in ascending order of uid.
"""

import numpy as np
from numpy.typing import NDArray

from remora.comm.view import View


class LoadExchange:
    """Totals under one view; bounded by its dense groups, layers and shards."""

    def __init__(self) -> None:
        self._epoch = 0
        self._shape = (0, 0)
        self._lives: dict[str, int] = {}  # group -> incarnation
        self._all_LS: NDArray[np.int64] = np.zeros((0, 0), np.int64)
        self._own: dict[str, NDArray[np.int64]] = {}  # group -> [L, S], ever
        self._told: dict[str, NDArray[np.int64]] = {}  # of the others, ever

    def adopt(self, view: View) -> None:
        """Count for `view` from now on."""
        self._epoch = view.epoch
        self._shape = (len(view.placement.moe_layers), len(view.placement.slots))
        self._lives = {m.uid: m.incarnation for m in view.members if m.role == "dense"}
        self._all_LS = np.zeros(self._shape, np.int64)
        self._own, self._told = {}, {}

    def report(
        self, group: str, incarnation: int, epoch: int, sent_LS: NDArray[np.int64]
    ) -> NDArray[np.int64] | None:
        """Count what a group sent since its last report.

        Args:
            sent_LS: non-negative.

        Returns:
            `[L, S]`: what the others sent since its last report. None: it speaks of another view,
            is no group of this one, or is the only one.

        Raises:
            ValueError: the shape is not that of the view.
        """
        if epoch != self._epoch or self._lives.get(group) != incarnation or len(self._lives) < 2:
            return None
        if sent_LS.shape != self._shape:
            raise ValueError(f"pairs of {sent_LS.shape} layers and shards, not {self._shape}")
        known_LS = self._own.get(group)
        if known_LS is None:  # its first: what was before is no news
            self._told[group] = self._all_LS.copy()
            known_LS = np.zeros(self._shape, np.int64)
        self._all_LS += sent_LS
        self._own[group] = known_LS + sent_LS
        others_LS = self._all_LS - self._own[group]
        fresh_LS = others_LS - self._told[group]
        self._told[group] = others_LS
        return fresh_LS
