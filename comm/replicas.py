"""A placement as the tables that `choice.choose` reads.

Shape suffixes: E experts, R most replicas of one expert.
"""

import numpy as np
from numpy.typing import NDArray

from remora.comm.view import View


def replica_tables(view: View, uids: list[str]) -> dict[int, NDArray[np.int16]]:
    """Per decoder layer `[E, R]`: indices into `uids` that hold each expert, padded with -1."""
    tables: dict[int, NDArray[np.int16]] = {}
    for index, layer in enumerate(view.placement.moe_layers):
        holders: list[list[int]] = [[] for _ in range(view.placement.num_experts)]
        for shard, uid in enumerate(uids):
            for expert in view.placement.slots[uid][index]:
                holders[expert].append(shard)
        table_ER = np.full((len(holders), max(1, *map(len, holders))), -1, np.int16)
        for expert, shards in enumerate(holders):
            table_ER[expert, : len(shards)] = shards
        tables[layer] = table_ER
    return tables


def remove_replica(table_ER: NDArray[np.int16], expert: int, shard: int) -> None:
    """Takes out a replica that turned out not to be there; no effect when it is not listed."""
    held = [s for s in table_ER[expert].tolist() if s >= 0 and s != shard]
    table_ER[expert] = -1
    table_ER[expert, : len(held)] = held
