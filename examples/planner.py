"""Try a planner of your own on a recorded trace, beside EPLB and Remora's (docs/routing.md).

    remora trace record CHECKPOINT --text a.txt --text b.txt -o ab.trace
    .venv/bin/python examples/planner.py ab.trace --hosts 4 --slots 10 --output mine.yaml
    remora placement check mine.yaml --model CHECKPOINT --shards 4 --slots 10
    remora plan CHECKPOINT --shards 4 --slots 10 --placement mine.yaml

Every planner sees the requests with even numbers and is judged by `replay` on the others. Change
`my_layer`; the file that is written is its placement.

Shape suffixes: S shards, E experts of a layer, L MoE layers, T tokens, K top-k.
"""

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from remora.cluster.placement_file import write_placement
from remora.comm.bundles import LayerBundles, count_bundles
from remora.comm.eplb import eplb_held
from remora.comm.errors import RemoraError
from remora.comm.grouping import GroupingProblem, Held, LayerPlanner, plan_placement
from remora.comm.layer_plan import expert_loads
from remora.comm.objective import Objective
from remora.comm.replay import replay
from remora.comm.topology import Topology, placement_from, uniform_topology
from remora.comm.trace import Trace
from remora.comm.trace_reader import read_trace


def my_layer(
    bundles: LayerBundles,
    topology: Topology,
    num_experts: int,
    old: Held | None,
    objective: Objective,
    seed: int,
) -> Held:
    """Yours to change: experts by falling load, dealt to the shards in turn; spare slots get the
    hottest experts that a shard lacks.

    Args:
        bundles: sets of experts that tokens picked together, with sources and weights.
        old: placement in force `[S, E]`, or None.

    Returns:
        `[S, E]`: every expert somewhere, at most `topology.slots_S[s]` of them in shard s.
    """
    del old, objective, seed
    order_E = np.argsort(-expert_loads(bundles, num_experts), kind="stable")
    held_SE = np.zeros((topology.num_shards, num_experts), np.bool_)
    held_SE[np.arange(num_experts) % topology.num_shards, order_E] = True
    for own_E, slots in zip(held_SE, topology.slots_S, strict=True):
        lacking = order_E[~own_E[order_E]]
        own_E[lacking[: slots - own_E.sum()]] = True
    return held_SE


def eplb_layer(
    bundles: LayerBundles,
    topology: Topology,
    num_experts: int,
    old: Held | None,
    objective: Objective,
    seed: int,
) -> Held:
    """DeepSeek's load balancer: loads alone, nothing of what is picked together."""
    del old, objective, seed
    return eplb_held(expert_loads(bundles, num_experts), topology)


PLANNERS: dict[str, LayerPlanner | None] = {"EPLB": eplb_layer, "Remora": None, "mine": my_layer}


def main() -> None:
    """Plan, judge, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("trace", type=Path, help="file of `remora trace record`")
    parser.add_argument("--hosts", type=int, default=4, help="one shard each (default 4)")
    parser.add_argument("--slots", type=int, help="of a shard in a layer; default: a fourth spare")
    parser.add_argument("--output", type=Path, help="write the placement of `my_layer` here")
    args = parser.parse_args()
    try:
        run(args.trace, args.hosts, args.slots, args.output)
    except RemoraError as error:
        raise SystemExit(f"planner: {error}") from None


def run(path: Path, num_hosts: int, slots: int | None, output: Path | None) -> None:
    """All planners on one trace.

    Raises:
        RemoraError: no trace, a planner that returns no placement, or a file that cannot be
            written.
    """
    trace = read_trace(path)
    num_experts = trace.header.num_experts
    if num_hosts < 1:
        raise SystemExit(f"planner: --hosts {num_hosts}: at least 1")
    if slots is None:
        slots = min(num_experts, -(-5 * num_experts // (4 * num_hosts)))
    if not num_experts <= num_hosts * slots <= num_hosts * num_experts:
        least = -(-num_experts // num_hosts)
        raise SystemExit(
            f"planner: --slots {slots}: with --hosts {num_hosts}, {least} to {num_experts} slots"
            f" hold {num_experts} experts"
        )
    topology = uniform_topology(num_hosts=num_hosts, shards_per_host=1, slots=slots)
    seen_T = trace.request_T % 2 == 0
    if not trace.num_tokens:
        raise SystemExit("planner: no tokens are in the trace")
    if seen_T.all():
        raise SystemExit("planner: the trace has one request, and none is left to judge on")
    print(f"{num_hosts} hosts x {slots} slots, {num_experts} experts, held-out requests")
    print(f"{'planner':<10}{'copies a token':>16}{'load max/mean':>16}")
    for name, plan_layer in PLANNERS.items():
        held_L = planned(trace, seen_T, topology, plan_layer)
        copies, load = judged(trace, ~seen_T, topology, held_L)
        print(f"{name:<10}{copies:>16.3f}{load:>16.3f}")
    if output is not None:  # the last planner's
        layers = trace.header.moe_layers
        write_placement(output, placement_from(held_L, uids=topology.uids, moe_layers=layers))
        print(f"written to {output}")


def planned(
    trace: Trace, seen_T: NDArray[np.bool_], topology: Topology, plan_layer: LayerPlanner | None
) -> list[Held]:
    """Who holds what, from these tokens. Requests come from the hosts in turn."""
    source_T = _sources(trace, topology)
    layers = tuple(count_bundles(ids_TK[seen_T], source_T[seen_T]) for ids_TK in trace.experts_LTK)
    problem = GroupingProblem(
        layers=layers, num_experts=trace.header.num_experts, topology=topology
    )
    return list(plan_placement(problem, seed=0, plan_layer=plan_layer).held_L)


def judged(
    trace: Trace, judge_T: NDArray[np.bool_], topology: Topology, held_L: list[Held]
) -> tuple[float, float]:
    """Remote copies a token and load of the busiest shard over the mean; means over layers."""
    source_T = _sources(trace, topology)
    costs = [
        replay(ids_TK[judge_T], source_T[judge_T], held_SE, topology)
        for ids_TK, held_SE in zip(trace.experts_LTK, held_L, strict=True)
    ]
    copies = float(np.mean([cost.copies_per_token for cost in costs]))
    return copies, float(np.mean([cost.load_max_over_mean for cost in costs]))


def _sources(trace: Trace, topology: Topology) -> NDArray[np.int64]:
    """Host of each token: its request's number, halved so that both halves have every host."""
    return trace.request_T.astype(np.int64) // 2 % topology.num_hosts


if __name__ == "__main__":
    main()
