"""A pass of the compiler: linears that read the same rows become one call of the kernels.

Query, key and value, gate and up, the two compressions of latent attention: each of them alone is
too small to be worth a second thread, together they are (benchmarks' *tiny*, one row: three calls
of 6 to 12 us become one). Every output element is computed as before, bit for bit.
"""

from collections import defaultdict
from collections.abc import Sequence
from operator import getitem
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from remora.kernels.native import native_available

MERGED_MAX = 3  # the kernels have calls for two and for three


class MergeLinears(CustomGraphPass):
    """For `torch._inductor.config.post_grad_custom_pre_pass`."""

    def __call__(self, graph: fx.Graph) -> None:
        """Merge in place."""
        if not native_available():
            return
        by_rows: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        single = torch.ops.remora.packed_linear.default
        for node in graph.find_nodes(op="call_function", target=single):
            weights = [a for a in node.args[1:3] if isinstance(a, fx.Node)]
            if all(weight.op == "placeholder" for weight in weights):  # there from the start
                by_rows[node.args[0]].append(node)
        for nodes in by_rows.values():
            for group in in_groups(nodes):
                _merge(graph, group)

    def uuid(self) -> Any:
        """What compiled artefacts depend on."""
        return get_hash_for_files((__file__,), str(native_available()))


def in_groups(nodes: Sequence[Any]) -> list[Sequence[Any]]:
    """Runs of two or three that cover `nodes`, if there are two at all."""
    groups = []
    while len(nodes) > 1:
        size = 2 if len(nodes) in (2, 4) else MERGED_MAX
        groups.append(nodes[:size])
        nodes = nodes[size:]
    return groups


def _merge(graph: fx.Graph, nodes: Sequence[fx.Node]) -> None:
    merged_op = {2: torch.ops.remora.packed_linear_2, 3: torch.ops.remora.packed_linear_3}
    rows = nodes[0].args[0]
    weights = [argument for node in nodes for argument in node.args[1:4]]
    with graph.inserting_before(nodes[0]):
        merged = graph.call_function(merged_op[len(nodes)].default, (rows, *weights))
        merged.meta["val"] = tuple(node.meta["val"] for node in nodes)
        for index, node in enumerate(nodes):
            part = graph.call_function(getitem, (merged, index))
            part.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(part)
    for node in nodes:
        graph.erase_node(node)
