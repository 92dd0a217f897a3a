"""Remote copies that a prompt's tokens will make, by host of their dense group, from token ids.

    table = prompt_copies(fit(counts, Use(layers=0)), placement, topology)
    copies_H = table.of(token_ids)          # rows to other hosts, per token and layer

A token that finds an expert on a host goes there, and it goes nowhere for those on its own. So what
differs between hosts is the chance of a *hit*; `comm/predict.py` gives the chances of experts, and
those of one host are taken as if they were independent. Only differences between hosts matter: who
asks compares them.

Shape suffixes: H hosts, S shards, E experts, V rows of the token table, L MoE layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from remora.comm.predict import SCALE, Predictor
from remora.comm.topology import Topology, held_of
from remora.comm.view import Placement

_jit: Any = numba.njit(cache=True, nogil=True, boundscheck=False)


@_jit
def _add_hits(score_VE, held_HE, scale, hits_VH):  # type: ignore[no-untyped-def]
    for v in range(score_VE.shape[0]):
        for h in range(held_HE.shape[0]):
            miss = 1.0
            for e in range(held_HE.shape[1]):
                if held_HE[h, e]:
                    miss *= 1.0 - min(max(score_VE[v, e], 0), scale) / scale
            hits_VH[v, h] += 1.0 - miss


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptCopies:
    """Immutable: a new one is made from newer statistics, or for another placement."""

    hosts: tuple[str, ...]
    hits_VH: NDArray[np.float32]  # chance that a token finds an expert on a host, mean over layers

    def of(self, token_ids: Sequence[int]) -> NDArray[np.float64]:
        """`[H]` rows to other hosts, per token and layer, if the prompt's home is a host."""
        row_T = np.asarray(token_ids, np.int64) % len(self.hits_VH)
        hits_H = self.hits_VH[row_T].mean(axis=0, dtype=np.float64)
        copies_H: NDArray[np.float64] = hits_H.sum() - hits_H
        return copies_H

    @property
    def nbytes(self) -> int:
        """Of the table."""
        return self.hits_VH.nbytes


def prompt_copies(predictor: Predictor, placement: Placement, topology: Topology) -> PromptCopies:
    """The table for a placement, replicas included: what any shard of a host holds is there.

    Args:
        predictor: of token ids alone; its layers are the placement's.
    """
    num_layers, num_rows, num_experts = predictor.token_LVE.shape
    hits_VH = np.zeros((num_rows, topology.num_hosts), np.float32)
    host_S = np.asarray(topology.host_of_S)
    for layer, held_SE in enumerate(held_of(placement, topology.uids)):
        held_HE = np.zeros((topology.num_hosts, num_experts), np.bool_)
        np.logical_or.at(held_HE, host_S, held_SE)
        _add_hits(predictor.token_LVE[layer], held_HE, SCALE, hits_VH)
    hits_VH /= num_layers
    return PromptCopies(hosts=topology.hosts, hits_VH=hits_VH)
