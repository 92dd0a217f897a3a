"""The online loop of one deployment: plans asked of the router, decided, logged, written down.

What is decided is applied while the deployment serves (`docs/elasticity.md`), and written to
`router.state_dir`, where a start with `experts.placement: latest` finds it. The gain is measured on
the traffic that the router counted, and logged beside what had been predicted.
"""

import contextlib
import hashlib
import json
import logging
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

from remora.actors.plan_outcome import PlacementCost, PlanOutcome
from remora.autoscale.rebalance import RebalanceMemory, RebalancePolicy, decide, objective_of
from remora.cluster.decision_log import DecisionLog
from remora.cluster.placement_file import LATEST, read_placement, write_placement
from remora.cluster.rebalance_report import Round, round_of
from remora.comm.errors import ClusterError, ConfigError, OperationRunsError, RemoraError
from remora.comm.objective import Objective
from remora.comm.view import Placement, View

logger = logging.getLogger(__name__)

Apply = Callable[[str, Placement], dict[str, Any]]  # operation id, placement -> the operation
BEFORE: Final = "placement.before.yaml"  # what the last move replaced
SEED: Final = 0
MEASURE_EVERY_S: Final = 60.0  # where there are no rounds


class _Known(NamedTuple):
    """Of the last move, and since."""

    memory: RebalanceMemory
    moved: dict[str, Any] | None
    gauges: dict[str, float]
    before: bytes | None  # what is in BEFORE


class Planner(Protocol):
    """What the loop asks the router; each raises ClusterError when it cannot be answered now."""

    def plan(self, seed: int, objective: Objective) -> PlanOutcome:
        """Against the placement in force."""

    def fresh_cost(self, placement: Placement) -> PlacementCost:
        """Of a placement, on what was reported since the deployment started."""


class Rebalancer:
    """See the head of this file. Threads may call.

    Args:
        view: in force; later ones come by `adopt_view`.
        apply: has the deployment hold a placement; returns the operation when it is over, or raises
            a RemoraError.
        expert_bytes: one expert's weights in one layer.
        row_bytes: one copy of a row, there and back.
        folder: `router.state_dir`; None: nothing can be written.
    """

    def __init__(
        self,
        *,
        planner: Planner,
        policy: RebalancePolicy,
        view: View,
        apply: Apply,
        expert_bytes: int,
        row_bytes: int,
        folder: Path | None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._planner = planner
        self._policy = policy
        self._view = view
        self._apply = apply
        self._bytes = {"expert_bytes": expert_bytes, "row_bytes": row_bytes}
        self._folder = folder
        self._log = DecisionLog(folder) if folder is not None else None
        self._clock, self._wall = clock, wall
        self._lock = threading.Lock()
        self._adopting = threading.Lock()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._gauges: dict[str, float] = {}
        self._last: dict[str, Any] | None = None
        self._moved = self._last_move()
        self._memory = RebalanceMemory()
        if self._moved is not None:  # by an earlier life of the coordinator: its cooldown goes on
            since_s = max(0.0, wall() - self._moved["unix_s"])
            self._memory = RebalanceMemory(last_move_s=clock() - since_s)

    # -- by hand ------------------------------------------------------------------------------

    def propose(self) -> dict[str, Any]:
        """What a round would do now; nothing is remembered or written.

        Raises:
            ClusterError: the router has no plan to give.
        """
        with self._lock:
            _, found, report = self._plan()
            decision, _ = decide(
                self._policy, self._memory, found.proposal, tokens=found.tokens, now_s=self._clock()
            )
            return report | asdict(decision)

    def move(self, operation_id: str, begin: Apply) -> dict[str, Any]:
        """Plan, and begin to move experts if anything is worth it.

        Args:
            operation_id: of the move.
            begin: as `apply`, but does not wait.

        Raises:
            OperationRunsError: a round is being made.
            ClusterError: the router has no plan to give.
            ConfigError: `router.state_dir` cannot be written.
        """
        if not self._lock.acquire(blocking=False):
            raise OperationRunsError("a round of rebalancing is being made: one at a time")
        try:
            before, found, report = self._plan()
            if not found.proposal.layers:
                reason = "no layer is worth its moves"
                return self._note(report, {"verdict": "keep", "reason": reason})
            verdict = {"verdict": "move", "reason": "asked for"}
            former = self._known()
            report = self._move(before, found, report, operation_id, begin)
            if "not_applied" not in report:
                self._memory = RebalanceMemory(last_move_s=self._clock())
            report = self._note(report, verdict)
            if report.get("operation", {}).get("outcome") == "running":
                self._see_through(operation_id, found.placement, former)
            return report
        finally:
            self._lock.release()

    def adopt_view(self, view: View) -> None:
        """Plan against `view` from now on, unless it is older than that in force."""
        with self._adopting:  # not the other one: a move waits for its views
            if view.epoch > self._view.epoch:
                self._view = view

    # -- the loop -----------------------------------------------------------------------------

    def start(self, every_s: float | None) -> None:
        """A round every so often, until `close`; None: what moves by hand achieved is measured."""
        self._thread = threading.Thread(
            target=self._run, args=(every_s,), name="remora-rebalance", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """No more rounds; one that runs is not waited for."""
        self._closing.set()

    def step(self) -> dict[str, Any]:
        """One round of the loop: measure, plan, decide, log; move when it says so.

        Raises:
            RemoraError: as `move`.
        """
        self.measure()
        with self._lock:
            before, found, report = self._plan()
            decision, memory = decide(
                self._policy, self._memory, found.proposal, tokens=found.tokens, now_s=self._clock()
            )
            if decision.verdict == "move":
                operation_id = f"rebalance-{secrets.token_hex(4)}"
                report = self._move(before, found, report, operation_id, self._apply)
            if "not_applied" not in report:  # else nothing moved: it stays confirmed, for the next
                self._memory = memory
            return self._note(report, asdict(decision))

    def measure(self) -> None:
        """Log what the last move achieved, once its placement serves and enough came since."""
        name = "remora_rebalance_achieved_gain_ratio"
        moved, serves = self._moved, self._view.placement  # not under the lock: it takes seconds
        if moved is None or self._folder is None or name in self._gauges:
            return
        before = self._folder / BEFORE
        if not before.exists() or moved.get("placement") != _digest(serves):
            return  # it does not serve yet, or no more
        try:
            now = self._planner.fresh_cost(serves)
            if now.tokens < self._policy.tokens_min:
                return
            then = self._planner.fresh_cost(read_placement(before))
        except (ClusterError, ConfigError) as missing:
            logger.info("the last move is not measured yet: %s", missing)
            return
        load = self._policy.load_copies
        costs = [c.copies + load * max(0.0, c.load - 1) for c in (then, now)]
        gain = 1 - costs[1] / costs[0] if costs[0] > 0 else 0.0
        fields = {
            "tokens": round(now.tokens),
            "predicted_gain_ratio": moved["predicted_gain_ratio"],
            "achieved_gain_ratio": gain,
            "copies_before": then.copies,
            "copies_after": now.copies,
            "load_before": then.load,
            "load_after": now.load,
        }
        with self._lock:
            if self._moved is not moved:
                return  # another one has begun
            self._gauges[name] = gain
            if self._log is not None:
                self._log.append("achieved", fields, self._wall())

    def gauges(self) -> dict[str, float]:
        """By metric: predicted and achieved gain, and seconds since the last move."""
        found, moved = dict(self._gauges), self._moved  # not under the lock: a plan takes minutes
        if moved is not None:
            since_s = max(0.0, self._wall() - moved["unix_s"])
            found["remora_seconds_since_last_rebalance"] = since_s
            found["remora_rebalance_predicted_gain_ratio"] = moved["predicted_gain_ratio"]
        return found

    def status(self) -> dict[str, Any]:
        """For `remora status`: what the last round decided, and `gauges`."""
        last = self._last
        if last is not None:
            last = last | {"age_s": max(0.0, self._wall() - last["unix_s"])}
        return {"last": last, "gauges": self.gauges()}

    # -- inside, under the lock ---------------------------------------------------------------

    def _run(self, every_s: float | None) -> None:
        turn = self.measure if every_s is None else self.step
        while not self._closing.wait(MEASURE_EVERY_S if every_s is None else every_s):
            try:
                turn()
            except ClusterError as error:
                logger.info("no plan yet: %s", error)
            except Exception:  # of one round; a loop that is silently gone is worse
                logger.exception("a round of rebalancing failed")

    def _plan(self) -> tuple[Placement, Round, dict[str, Any]]:
        """The placement in force, what a round would change in it, and a report of that."""
        outcome = self._planner.plan(SEED, objective_of(self._policy, **self._bytes))
        view = self._view  # read once: another may come at any time
        if outcome.epoch != view.epoch:
            raise ClusterError(
                f"the view changed while a plan was made: it is for epoch {outcome.epoch}, and"
                f" {view.epoch} is in force"
            )
        found = round_of(self._policy, outcome, view.placement, **self._bytes)
        moves = [asdict(move) for move in found.moves]
        report = {"epoch": view.epoch, **found.fields(), "moves": moves}
        return view.placement, found, report

    def _move(
        self,
        before: Placement,
        found: Round,
        report: dict[str, Any],
        operation_id: str,
        apply: Apply,
    ) -> dict[str, Any]:
        """Write what is decided, and have it done; what came of both.

        LATEST is written first: a deployment that ends meanwhile, or has no room for it now, starts
        with it. BEFORE is what the last move that began has replaced.
        """
        if self._folder is not None:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
            except OSError as failed:
                text = f"router.state_dir {self._folder}: cannot be made: {failed.strerror}"
                raise ConfigError(text) from failed
            write_placement(self._folder / LATEST, found.placement)
            report = report | {"written": str(self._folder / LATEST)}
        try:
            operation = apply(operation_id, found.placement)
        except RemoraError as refused:
            logger.warning("a placement worth moving to is not applied: %s", refused)
            return report | {"not_applied": str(refused)}
        if operation["outcome"] == "failed":
            return report | {"not_applied": operation["reason"], "operation": operation}
        self._keep_before(before)
        report = report | {"operation": operation, "placement": _digest(found.placement)}
        done = operation["outcome"] == "done"
        return report | {"applied_epoch": self._view.epoch} if done else report

    def _known(self) -> _Known:
        before = None
        if self._folder is not None:
            with contextlib.suppress(OSError):  # there is none, or it is of no use
                before = (self._folder / BEFORE).read_bytes()
        return _Known(self._memory, self._moved, dict(self._gauges), before)

    def _see_through(self, operation_id: str, placement: Placement, former: _Known) -> None:
        """Wait, in a thread, for what a move by hand has begun. One that fails, or is cancelled,
        was none: `former` is what is known then."""
        begun = self._moved

        def wait() -> None:
            try:
                operation = self._apply(operation_id, placement)  # of that id: it is found
            except RemoraError as lost:
                logger.info("what becomes of %s is not known: %s", operation_id, lost)
                return
            with self._lock:
                if operation["outcome"] == "failed" and begun is not None and self._moved is begun:
                    self._take_back(begun, former, operation["reason"])

        threading.Thread(target=wait, name="remora-rebalance-end", daemon=True).start()

    def _take_back(self, begun: dict[str, Any], former: _Known, reason: str) -> None:
        self._memory, self._moved, self._gauges = former.memory, former.moved, former.gauges
        if self._last == begun:
            self._last = begun | {"not_applied": reason}
        if self._log is not None:
            self._log.append("failed", {"reason": reason, "epoch": begun["epoch"]}, self._wall())
        if self._folder is None:
            return
        try:
            if former.before is not None:
                (self._folder / BEFORE).write_bytes(former.before)
            else:
                (self._folder / BEFORE).unlink(missing_ok=True)
        except OSError as failed:
            logger.warning("%s: cannot be put back: %s", self._folder / BEFORE, failed.strerror)

    def _keep_before(self, before: Placement) -> None:
        if self._folder is None:
            return
        try:
            write_placement(self._folder / BEFORE, before)
        except ConfigError as failed:  # the move has begun all the same
            logger.warning("the gain of a move will not be measured: %s", failed)
            with contextlib.suppress(OSError):
                (self._folder / BEFORE).unlink(missing_ok=True)

    def _note(self, report: dict[str, Any], verdict: dict[str, Any]) -> dict[str, Any]:
        report = report | verdict
        unix_s = self._wall()
        line = {key: value for key, value in report.items() if key != "moves"}
        if self._log is not None:
            self._log.append("decision", line | {"unix_s": unix_s}, unix_s)
        self._last = line | {"unix_s": unix_s}
        if report["verdict"] == "move" and "not_applied" not in report:
            self._moved = line | {"unix_s": unix_s}
            self._gauges.pop("remora_rebalance_achieved_gain_ratio", None)
        logger.info("rebalance: %s (%s)", report["verdict"], report["reason"])
        return report

    def _last_move(self) -> dict[str, Any] | None:
        """The last move in the log, with what it achieved if that is known."""
        moved = None
        former: tuple[dict[str, Any] | None, dict[str, float]] = (None, {})
        for line in self._log.lines() if self._log is not None else ():
            if line["kind"] == "decision":
                if line["verdict"] == "move" and "not_applied" not in line:
                    former = (moved, self._gauges)
                    moved, self._gauges = line, {}
            elif line["kind"] == "failed":
                moved, self._gauges = former
            elif line["kind"] == "achieved":
                achieved = line["achieved_gain_ratio"]
                self._gauges = {"remora_rebalance_achieved_gain_ratio": achieved}
        return moved


def _digest(placement: Placement) -> str:
    """The same for placements whose shards hold the same, in whatever order experts are named."""
    held = {uid: [sorted(layer) for layer in layers] for uid, layers in placement.slots.items()}
    return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()[:16]
