"""Decode over narrow links: what grouping is worth when bytes are what costs.

    .venv/bin/python benchmarks/links.py [--quick] [--json PATH]      # root

Four network namespaces are hosts, on links of 1 Gbit/s and of 100 Mbit/s; a raylet in each; one
expert shard and one dense group a host. The same model is deployed three times, all resident,
measured in alternation: B1 (contiguous placement), B3 (EPLB, 25 % spare slots), B6 (Remora's
grouping with the same spare slots, and request homes). The replica choice and everything else is
the same code. Batch 32 (8 sequences a group), prompts of 128 tokens, 128 new ones. Bytes are those
that the kernel counted on the links.
"""

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import quantiles
from typing import Any

import common
import links_plans
from engines_report import Bar, Spread
from links_cluster import RayHosts, log_dir
from locations import DEMO_MODEL, HERE, TEXTS, text_files
from netns import Hosts, usable

NUM_HOSTS = 4
BATCH = 32
PROMPT_TOKENS = 128
NEW_TOKENS = 128
SPARE = 0.25
PLAN_TOKENS_EACH = 2_700  # of each domain


def checkpoint_of(model: str) -> Path:
    """Directory of `demo` or of a shape of `make_checkpoint.py`."""
    if model == "demo":
        return DEMO_MODEL
    from make_checkpoint import SHAPES, write_checkpoint

    path = HERE / "out" / model
    if not (path / "config.json").exists():
        write_checkpoint(path, SHAPES[model], seed=0)
    return path


def texts(split: str) -> list[Path]:
    """Text files of one split."""
    return text_files(TEXTS, split)


def grouped(prompts: Sequence[list[int]], homes: Any, host_of_group: Sequence[int]) -> Any:
    """Prompts by dense group: those whose home is the group's host."""
    return [
        [p for p, home in zip(prompts, homes, strict=True) if home == host]
        for host in host_of_group
    ]


@contextlib.contextmanager
def deployed(
    cluster: RayHosts, plans: links_plans.Plans, checkpoint: Path, executor: str, folder: Path
) -> Iterator[dict[str, list[int]]]:
    """Every method as a deployment; for each, the host of each dense group (index of a shard)."""
    from remora.cluster.placement_file import write_placement

    hosts_of: dict[str, list[int]] = {}
    try:
        for method in links_plans.METHODS:
            path = folder / f"{checkpoint.name}-{method}.yaml"
            write_placement(path, plans.placement(method))
            nodes = cluster.ask(
                "deploy", name=method, overrides=overrides(method, checkpoint, path, executor)
            )
            shard_of = {nodes[uid]: i for i, uid in enumerate(plans.topology.uids)}
            hosts_of[method] = [shard_of[nodes[f"dense-{g}"]] for g in range(NUM_HOSTS)]
        yield hosts_of
    finally:
        for method in hosts_of:
            cluster.ask("undeploy", name=method)


def overrides(method: str, checkpoint: Path, placement: Path, executor: str) -> dict[str, Any]:
    """Configuration of one deployment: a shard and a dense group on each host."""
    return {
        "model": str(checkpoint),
        "executor": executor,
        "bind_address": "0.0.0.0",
        "dense.groups": NUM_HOSTS,
        "dense.num_cpus": 0,
        "dense.threads": 1,
        "dense.resources": {f"dense_{method}": 1},
        "dense.max_model_len": PROMPT_TOKENS + NEW_TOKENS + 1,
        "dense.prefix_caching": False,
        "experts.shards": NUM_HOSTS,
        "experts.placement": str(placement),
        "experts.num_cpus": 0,
        "experts.threads": 1,
        "experts.resources": {f"shard_{method}": 1},
    }


def sample(hosts: Hosts, cluster: RayHosts, method: str, prompts: Any) -> dict[str, float]:
    """One batch: decode tokens/s, step times, and bytes of all links."""
    every = range(1, NUM_HOSTS + 1)
    before = [hosts.counters(host) for host in every]
    done = cluster.ask("generate", name=method, prompts=prompts, num_new=NEW_TOKENS)
    seen = [hosts.counters(h).since(b) for h, b in zip(every, before, strict=True)]
    gaps_ms = [1e3 * gap for gap in done["gaps_s"]]
    cuts = quantiles(gaps_ms, n=100)
    return {
        "tokens_per_s": (done["num_tokens"] - BATCH) / (done["seconds"] - done["first_s"]),
        "gap_p50_ms": cuts[49],
        "gap_p99_ms": cuts[98],
        "kib_per_token": sum(link.sent_bytes for link in seen) / done["num_tokens"] / 1024,
    }


def measure(args: argparse.Namespace) -> None:
    """Every model, rate and method."""
    rows: list[dict[str, Any]] = []
    bars: list[Bar] = []
    resources = {f"{role}_{m}": 1.0 for role in ("dense", "shard") for m in links_plans.METHODS}
    folder = log_dir()
    print(f"logs: {folder}", flush=True)
    rounds = 3 if args.quick else 7
    prepared = {}
    for model in args.models:
        checkpoint = checkpoint_of(model)
        planning = links_plans.record(
            checkpoint, texts("plan"), window=256, tokens_each=PLAN_TOKENS_EACH
        )
        asked = links_plans.record(
            checkpoint, texts("heldout"), window=PROMPT_TOKENS, tokens_each=8 * PROMPT_TOKENS
        )
        prompts = links_plans.prompts_of(asked, BATCH, PROMPT_TOKENS)
        tokens = [prompts.token_T[prompts.request_T == q].tolist() for q in range(BATCH)]
        plans = links_plans.plan(planning, num_hosts=NUM_HOSTS, spare=SPARE)
        prepared[model] = (checkpoint, plans, prompts, tokens)
        print(f"{model}: planned", flush=True)
    with Hosts(count=NUM_HOSTS, mbit=None) as hosts, RayHosts(hosts, resources, folder) as cluster:
        for model, (checkpoint, plans, prompts, tokens) in prepared.items():
            homes = {m: plans.homes(m, prompts) for m in links_plans.METHODS}
            with deployed(cluster, plans, checkpoint, args.executor, folder) as hosts_of:
                asked_of = {m: grouped(tokens, homes[m], hosts_of[m]) for m in links_plans.METHODS}
                for method, each in asked_of.items():  # warm
                    cluster.ask("generate", name=method, prompts=each, num_new=NEW_TOKENS)
                for mbit in args.mbit:
                    hosts.shape(mbit)
                    found: dict[str, list[dict[str, float]]] = {m: [] for m in asked_of}
                    for turn in range(rounds):
                        order = links_plans.METHODS if turn % 2 else links_plans.METHODS[::-1]
                        for method in order:
                            found[method].append(sample(hosts, cluster, method, asked_of[method]))
                    rows += table_rows(model, mbit, found)
                    if mbit == 100:
                        bars.append(bar(model, found))
    common.finish("links", args, rows, bars)


def ratio(found: dict[str, list[dict[str, float]]], below: str) -> Spread:
    """Tokens/s of B6 over those of another method, within rounds."""
    return common.per_round(
        [each["tokens_per_s"] for each in found["b6"]],
        [each["tokens_per_s"] for each in found[below]],
    )


def table_rows(
    model: str, mbit: float, found: dict[str, list[dict[str, float]]]
) -> list[dict[str, Any]]:
    """One row a method."""
    return [
        {"model": model, "mbit": mbit, "method": method}
        | {name: Spread.of([each[name] for each in samples]) for name in samples[0]}
        | {"b6_vs_it": ratio(found, method)}
        for method, samples in found.items()
    ]


def bar(model: str, found: dict[str, list[dict[str, float]]]) -> Bar:
    """The issue's bar is for the demo model, whose routing is learned."""
    name = "links_100mbit_tokens_vs_b3"
    if model != "demo":
        return Bar(name=f"{model}_{name}", value=ratio(found, "b3"), unit="x")
    return Bar(name=name, value=ratio(found, "b3"), unit="x", op=">=", target=1.3)


def main() -> None:
    """Flags."""
    parser = common.parser(__doc__)
    parser.add_argument("--models", type=lambda t: t.split(","), default=["demo", "tiny"])
    parser.add_argument(
        "--mbit", type=lambda t: [float(x) for x in t.split(",")], default=[1000, 100]
    )
    parser.add_argument("--executor", choices=("eager", "compiled"), default="compiled")
    args = parser.parse_args()
    reason = usable()
    if reason is not None:
        raise SystemExit(f"links.py: {reason}")
    measure(args)


if __name__ == "__main__":
    main()
