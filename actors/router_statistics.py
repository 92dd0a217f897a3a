"""What the router keeps of traffic, and plans from. Any thread may call.

Histories are saved every `SAVE_EVERY_TOKENS` tokens and when the router stops (`history_file.py`).
"""

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from remora.actors.plan_outcome import LayerOutcome, PlacementCost, PlanOutcome
from remora.actors.router_state import HomesLearned
from remora.comm.bundles import LayerBundles, count_bundles
from remora.comm.errors import ClusterError, FrameError
from remora.comm.grouping import GroupingProblem, bundle_cost, plan_placement
from remora.comm.history_file import pack_history, unpack_history
from remora.comm.objective import Objective
from remora.comm.predict import RoutingCounts, Use, fit
from remora.comm.prompt_copies import PromptCopies, prompt_copies
from remora.comm.sketch import RoutingSketch, decode_sketch
from remora.comm.statistics import HistoryLimits, RoutingHistory
from remora.comm.topology import Topology, held_of, placement_from
from remora.comm.view import Placement, View

logger = logging.getLogger(__name__)

PLAN_TOKENS_MIN: Final = 256.0  # fewer say too little of what comes
SAVE_EVERY_TOKENS: Final = 50_000.0  # a router that is killed loses no more
HOMES_EVERY_TOKENS: Final = 20_000.0  # between two looks at what hosts' tokens cost, at most
HOMES_TOKENS_MIN: Final = 1_000.0
TOKEN_BYTES_MAX: Final = 32 << 20  # of counts by token id
TOKEN_IDS_MAX: Final = 1 << 18  # ids beyond share rows
TOKENS_KEPT_MAX: Final = 400_000.0  # samples with ids; then all counts are halved
FRESH: Final = HistoryLimits(bytes_max=8 << 20)


def topology_of(view: View, slots: int | None) -> Topology:
    """Shards of a view, their hosts, and their slots.

    Args:
        slots: of a shard in a layer; None: the most that it holds of any.
    """
    uids = tuple(sorted(view.placement.slots))
    host_of = {member.uid: member.endpoint.host for member in view.members}
    hosts = tuple(sorted({host_of[member.uid] for member in view.members}))
    return Topology(
        uids=uids,
        hosts=hosts,
        host_of_S=tuple(hosts.index(host_of[uid]) for uid in uids),
        slots_S=tuple(slots or max(map(len, view.placement.slots[uid])) for uid in uids),
    )


def with_homes(bundles: LayerBundles, home_G: Sequence[int]) -> LayerBundles:
    """What came from hosts without a dense group as what those that have one will send: spread
    over them.

    Ray names a machine anew with each start, so that all traffic of before is of such hosts; and a
    host that gave its group up may still have shards.

    Args:
        home_G: host of each dense group, an index as in `source_B`.
    """
    gone = np.flatnonzero(~np.isin(bundles.source_B, home_G))
    if not len(gone) or not home_G:
        return bundles
    heaviest_first = gone[np.argsort(-bundles.weight_B[gone], kind="stable")]
    source_B = bundles.source_B.copy()
    source_B[heaviest_first] = np.resize(np.array(home_G, np.int16), len(gone))
    return count_bundles(bundles.experts_BK, source_B, bundles.weight_B)


def plan_from(
    layers: list[LayerBundles],
    placement: Placement,
    topology: Topology,
    seed: int,
    objective: Objective | None = None,
    *,
    epoch: int = 0,
    tokens: float | None = None,
) -> PlanOutcome:
    """The best placement found for `layers` against the one in force.

    Args:
        epoch: of the view that has it; 0: none has.
        tokens: that `layers` tell as much as; None: their weight.
    """
    old_L = tuple(held_of(placement, topology.uids))
    problem = GroupingProblem(
        layers=tuple(layers), num_experts=placement.num_experts, topology=topology, old_L=old_L
    )
    result = plan_placement(problem, seed=seed, objective=objective)
    before = [bundle_cost(b, h, topology, seed=seed) for b, h in zip(layers, old_L, strict=True)]
    outcomes = tuple(
        LayerOutcome(
            layer=layer,
            copies_before=old.copies_per_token,
            copies_after=new.copies_per_token,
            load_before=old.load_max_over_mean,
            load_after=new.load_max_over_mean,
            moved=int((held & ~old_held).sum()),
        )
        for layer, old, new, held, old_held in zip(
            placement.moe_layers, before, result.costs_L, result.held_L, old_L, strict=True
        )
    )
    return PlanOutcome(
        placement=placement_from(
            list(result.held_L), uids=topology.uids, moe_layers=placement.moe_layers
        ),
        epoch=epoch,
        tokens=float(np.mean([b.num_tokens for b in layers])) if tokens is None else tokens,
        layers=outcomes,
    )


def cost_of(
    layers: list[LayerBundles], placement: Placement, topology: Topology, tokens: float
) -> PlacementCost:
    """What `placement` costs on `layers`, which tell as much as that many tokens."""
    held_L = held_of(placement, topology.uids)
    costs = [bundle_cost(b, h, topology) for b, h in zip(layers, held_L, strict=True)]
    return PlacementCost(
        tokens=tokens,
        copies=float(np.mean([c.copies_per_token for c in costs])),
        load=float(np.mean([c.load_max_over_mean for c in costs])),
    )


def _is_of(counted: RoutingSketch | RoutingHistory, placement: Placement) -> bool:
    """Whether it is of a model of that shape."""
    shape = (placement.num_experts, placement.moe_layers)
    return (counted.num_experts, counted.moe_layers) == shape


def _check_model(sketch: RoutingSketch, placement: Placement | None) -> None:
    """The first sketch says what is counted from then on: one from elsewhere must not."""
    if placement is not None and not _is_of(sketch, placement):
        raise FrameError(
            f"a sketch of {sketch.num_experts} experts in {len(sketch.moe_layers)} layers, of"
            f" another model than serves: {placement.num_experts} in {len(placement.moe_layers)}"
        )


class _CopiesOfPrompt:
    def __init__(self, table: PromptCopies) -> None:
        self._table = table

    def __call__(self, token_ids: Sequence[int]) -> Mapping[str, float]:
        return dict(zip(self._table.hosts, self._table.of(token_ids).tolist(), strict=True))


class RouterStatistics:
    """The history of one deployment.

    Args:
        slots: `experts.slots` of the deployment.
        path: where it is saved; None: nowhere.
    """

    def __init__(self, *, slots: int | None, path: Path | None) -> None:
        self._slots = slots
        self._path = path
        self._lock = threading.Lock()
        self._history: RoutingHistory | None = None
        self._fresh: RoutingHistory | None = None  # since this placement serves, nothing restored
        self._counts: RoutingCounts | None = None  # by token id, of samples
        self._is_only_restored = False  # the history: no sketch says that it is of this model
        self._saving = threading.Lock()  # taken before `_lock`
        self._reports = 0
        self._since_homes = 0.0
        self._since_save = 0.0

    def add(
        self, data: bytes, reporter: str | None = None, placement: Placement | None = None
    ) -> None:
        """Count one sketch.

        Args:
            reporter: the group; None: the only one of its host.
            placement: in force; None: not known yet.

        Raises:
            FrameError: it is none, or one of another model than serves, or was counted before.
        """
        sketch = decode_sketch(data)
        _check_model(sketch, placement)
        with self._lock:
            if self._history is not None and self._is_only_restored:
                try:
                    self._history.check(sketch)
                except FrameError as another:  # a folder that served another model before
                    self._set_aside(another)
                    self._history = None
            if self._history is None:
                self._history = RoutingHistory.of(sketch)
            before = self._history.tokens_total
            self._history.add(sketch, reporter)  # first: it says whether the sketch can be used
            self._is_only_restored = False
            if self._fresh is None:
                self._fresh = RoutingHistory.of(sketch, FRESH)
            self._fresh.add(sketch, reporter)
            self._learn(sketch)
            self._reports += 1
            new = self._history.tokens_total - before
            self._since_homes += new
            self._since_save += new
            is_due = self._since_save >= SAVE_EVERY_TOKENS
            if is_due:
                self._since_save = 0.0
        if is_due:
            self.save()

    def _learn(self, sketch: RoutingSketch) -> None:
        """Which experts token ids choose; `_lock` is held."""
        if sketch.sample is None:
            return
        num_layers = len(sketch.moe_layers)
        if self._counts is None:
            self._counts = RoutingCounts(
                num_layers=num_layers,
                num_experts=sketch.num_experts,
                top_k=sketch.top_k,
                vocab_size=TOKEN_IDS_MAX,
                token_bytes_max=TOKEN_BYTES_MAX,
                context=False,
            )
        experts_LNK = sketch.sample.experts_LNK(num_layers, sketch.top_k)
        self._counts.learn(sketch.sample.token_N(), experts_LNK)
        if self._counts.num_tokens > TOKENS_KEPT_MAX:
            self._counts.decay(0.5)

    def homes_are_due(self, is_new_view: bool) -> bool:
        """Whether `homes` would say something new."""
        with self._lock:
            total = self._history.tokens_total if self._history else 0.0
            due = min(HOMES_EVERY_TOKENS, max(HOMES_TOKENS_MIN, total / 4))
            return total >= HOMES_TOKENS_MIN and (is_new_view or self._since_homes >= due)

    def homes(self, view: View) -> HomesLearned:
        """What tokens are expected to cost, by host of their dense group, under `view`.

        Raises:
            ClusterError: too little was reported.
        """
        topology = topology_of(view, self._slots)
        with self._lock:
            self._since_homes = 0.0  # counts from here on: it takes seconds
        copies = self.copies_by_host(view)
        with self._lock:
            if self._counts is None:
                return HomesLearned(copies)
            predictor = fit(self._counts, Use(layers=0))
        return HomesLearned(
            copies, _CopiesOfPrompt(prompt_copies(predictor, view.placement, topology))
        )

    def copies_by_host(self, view: View) -> dict[str, float]:
        """Remote copies of a token, per layer, by host of its dense group, under `view`."""
        topology, layers, _ = self._bundles(view)
        copies = {}
        held_L = held_of(view.placement, topology.uids)
        for index, host in enumerate(topology.hosts):
            there = [
                LayerBundles(
                    experts_BK=bundles.experts_BK,
                    source_B=np.full_like(bundles.source_B, index),
                    weight_B=bundles.weight_B,
                )
                for bundles in layers
            ]
            costs = [bundle_cost(b, h, topology) for b, h in zip(there, held_L, strict=True)]
            copies[host] = float(np.mean([cost.copies_per_token for cost in costs]))
        return copies

    def plan(self, view: View, seed: int, objective: Objective | None = None) -> PlanOutcome:
        """A placement for what was reported, against that of `view`.

        Raises:
            ClusterError: too little was reported.
        """
        topology, layers, tokens = self._bundles(view)
        return plan_from(
            layers, view.placement, topology, seed, objective, epoch=view.epoch, tokens=tokens
        )

    def start_fresh(self) -> None:
        """Forget what `fresh_cost` is measured on: another placement serves from now on."""
        with self._lock:
            self._fresh = None

    def fresh_cost(self, view: View, placement: Placement) -> PlacementCost:
        """What a placement of the same shards costs on what came since this router's start.

        Raises:
            ClusterError: too little came.
        """
        topology, layers, tokens = self._bundles(view, fresh=True)
        return cost_of(layers, placement, topology, tokens)

    def heat(self) -> dict[tuple[int, int], float]:
        """Tokens of late by (decoder layer, expert); of none where nothing was reported."""
        with self._lock:
            history = self._history
            if history is None:
                return {}
            load_LE, layers = history.load_LE(), history.moe_layers
        by_layer = zip(layers, load_LE.tolist(), strict=True)
        return {(layer, e): load for layer, loads in by_layer for e, load in enumerate(loads)}

    def status(self) -> dict[str, Any]:
        """For `remora status`."""
        with self._lock:
            history = self._history
            return {
                "reports": self._reports,
                "tokens": history.tokens_total if history else 0.0,
                "bytes": history.nbytes if history else 0,
                "domains": len(history.recent_shares()) if history else 0,
                "labels": history.labels() if history else [],
                "shared_labels": history.domains.shared_labels() if history else [],
                "tokens_with_ids": self._counts.num_tokens if self._counts else 0.0,
            }

    def _bundles(
        self, view: View, *, fresh: bool = False
    ) -> tuple[Topology, list[LayerBundles], float]:
        """Of every layer, by hosts of `view`, and how many tokens they tell as much as."""
        topology = topology_of(view, self._slots)
        home_G = [topology.hosts.index(m.endpoint.host) for m in view.members if m.role == "dense"]
        with self._lock:
            history = self._fresh if fresh else self._history
            if history is not None and not _is_of(history, view.placement):
                history = None  # of a model that was served before, until the first sketch comes
            seen = history.mix_tokens() if history else 0.0
            if history is None or seen < PLAN_TOKENS_MIN:
                raise ClusterError(
                    f"{seen:.0f} tokens were reported: at least {PLAN_TOKENS_MIN:.0f} are needed"
                )
            layers = history.bundles(topology.hosts)
        return topology, [with_homes(bundles, home_G) for bundles in layers], seen

    def restore(self) -> None:
        """Take up what an earlier router saved; what cannot be used is set aside, with a warning:
        statistics come again by themselves."""
        if self._path is None or not self._path.exists():
            return
        try:
            history = unpack_history(self._path.read_bytes())
        except (OSError, FrameError) as unusable:
            self._set_aside(unusable)
            return
        with self._lock:
            self._history, self._is_only_restored = history, True

    def _set_aside(self, why: Exception) -> None:
        """What was saved is not used, and not lost either."""
        if self._path is None:
            return
        logger.warning("%s: %s: statistics begin anew", self._path, why)
        try:
            self._path.replace(self._path.with_suffix(".unusable"))
        except OSError as failed:
            logger.warning("%s: cannot be set aside: %s", self._path, failed.strerror)

    def save(self) -> None:
        """Keep what was counted for the next router, whole or not at all."""
        if self._path is None:
            return
        with self._saving:  # two at once would write the same half
            with self._lock:
                if self._history is None:
                    return
                data = pack_history(self._history)
            half = self._path.with_suffix(".half")
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with half.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())  # else a host that dies may leave an empty file
                half.replace(self._path)
            except OSError as failed:
                logger.warning("%s: statistics are not kept: %s", self._path, failed.strerror)
