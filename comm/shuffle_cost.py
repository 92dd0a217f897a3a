"""What a token shuffle is worth: bytes of dispatch and of the group's own exchanges, by link price.

For each form, per token and MoE layer, in bytes times the price of the link they cross
(`shuffle.DEVICE_PRICE`, `HOST_PRICE`):

    dispatch     far copies, out and back
    exchanges    none, exact   all-reduce behind attention, gather behind the experts
                 speculative   reduce-scatter, gather, and the bundles from which ranks learn; where
                               the group has no reduce-scatter, all-reduce in its place

Copies come from random bundles sent through the very code that shuffles (`copy_costs`,
`slice_order`): uniform routing, which real routing beats. All-reduce counts what our groups do:
every rank gives its part to every other.

Shape suffixes: R ranks, S shards, T tokens, K top-k.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from remora.comm.shuffle import (
    DEVICE_PRICE,
    HOST_PRICE,
    Form,
    copy_costs,
    copy_prices,
    slice_order,
)

# Share of the copies between no shuffle and a perfect one that guessing saves; the demo model's
# held-out text gave more (benchmarks/shuffle.py).
GAP_CLOSED: Final = 0.6
GAIN_MIN: Final = 0.05  # a form must save this share of what "none" costs
STEP_TOKENS: Final = 32
SAMPLE_STEPS: Final = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupFacts:
    """What the choice depends on."""

    rank_hosts: Sequence[str]
    shard_hosts: Sequence[str]
    num_experts: int
    top_k: int
    row_bytes: int
    replies_per_copy: float  # rows back for a row out: 1 when presummed, more when ordered
    device_price: int = DEVICE_PRICE  # 0 where ranks and shards share the memory of one host
    scatters: bool = True  # a slice of a sum takes fewer bytes than all of it (not over NCCL)


@dataclass(frozen=True, slots=True, kw_only=True)
class FormCost:
    """Priced bytes of one token in one MoE layer."""

    dispatch: float
    exchange: float

    @property
    def total(self) -> float:
        """What is compared."""
        return self.dispatch + self.exchange


def form_costs(facts: GroupFacts) -> dict[Form, FormCost]:
    """The three forms, "none" first."""
    plain, best = _copies(facts)
    guessed = plain - GAP_CLOSED * (plain - best)
    bytes_each = facts.row_bytes * (1.0 + facts.replies_per_copy)
    size = len(facts.rank_hosts)
    link = _link_price(facts)
    gather = (size - 1) * facts.row_bytes * link
    bundles = (size - 1) * 2 * facts.top_k * link
    whole = (size + 1) * gather
    sliced = 2 * gather if facts.scatters else whole
    return {
        "none": FormCost(dispatch=plain * bytes_each, exchange=whole),
        "exact": FormCost(dispatch=best * bytes_each, exchange=whole),
        "speculative": FormCost(dispatch=guessed * bytes_each, exchange=sliced + bundles),
    }


def choose_form(facts: GroupFacts) -> Form:
    """The form of the least cost; "none" unless it saves `GAIN_MIN`."""
    costs = form_costs(facts)
    best = min(costs, key=lambda form: costs[form].total)
    if costs[best].total < (1.0 - GAIN_MIN) * costs["none"].total:
        return best
    return "none"


def _link_price(facts: GroupFacts) -> float:
    """Mean price of a byte between two ranks."""
    hosts = facts.rank_hosts
    pairs = [(a, b) for a in range(len(hosts)) for b in range(len(hosts)) if a != b]
    prices = [facts.device_price if hosts[a] == hosts[b] else HOST_PRICE for a, b in pairs]
    return float(np.mean(prices)) if prices else 0.0


def _copies(facts: GroupFacts) -> tuple[float, float]:
    """Price of a token's copies in runs of rows, and in the best slices."""
    prices = copy_prices(facts.rank_hosts, facts.shard_hosts)
    prices[prices == DEVICE_PRICE] = facts.device_price
    table = (np.arange(facts.num_experts) * len(facts.shard_hosts)) // facts.num_experts
    generator = np.random.default_rng(0)
    plain = best = 0
    for _ in range(SAMPLE_STEPS):
        draws = generator.random((STEP_TOKENS, facts.num_experts))
        index_TK = np.argsort(draws, axis=1)[:, : facts.top_k].astype(np.int64)
        cost_TR = np.empty((STEP_TOKENS, len(facts.rank_hosts)), np.int64)
        copy_costs(index_TK, table.astype(np.int16)[:, None], prices, cost_TR)
        ranks = np.arange(len(facts.rank_hosts)).repeat(STEP_TOKENS // len(facts.rank_hosts))
        plain += int(cost_TR[np.arange(STEP_TOKENS), ranks].sum())
        best += int(cost_TR[slice_order(-cost_TR), ranks].sum())
    return plain / (SAMPLE_STEPS * STEP_TOKENS), best / (SAMPLE_STEPS * STEP_TOKENS)
