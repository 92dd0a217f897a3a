"""The autoscaler of one deployment: samples, the pure decision, its log, and what is done about it.

It runs in the coordinator. Ingresses tell it their totals (`report`); every `sample_every_s` a
sample of the pool is decided about and logged. With mode `act` a decision is asked of the
deployment as any operator would ask (`Operations`): scaling as an operation, rebalancing as a round
of the online loop. Nothing is asked while an operation or a round runs; then the sample says so,
and the decision is to wait.
"""

import logging
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any, Final

from remora.autoscale.autoscale_policy import AutoscalePolicy
from remora.autoscale.autoscale_sample import AutoscaleState
from remora.autoscale.autoscaler import Decision, decide
from remora.autoscale.ingress_load import IngressLoad, LoadMeter
from remora.cluster.autoscale_log import AutoscaleLog
from remora.cluster.operation import ScaleTo
from remora.cluster.operation_request import Operations
from remora.comm.errors import RemoraError
from remora.comm.view import View

logger = logging.getLogger(__name__)

FRESH_PERIODS: Final = 3.0  # of `sample_every_s`; an ingress that is silent for longer is gone
ACTION: Final = "autoscale_action"  # lines of what was asked for, and what came of it


class Autoscaler:
    """See the head of this file. Threads may call.

    Args:
        operations: the deployment.
        running: id of the operation that runs, or None.
        view: the view in force.
        wall: Unix seconds; samples carry them.
    """

    def __init__(
        self,
        policy: AutoscalePolicy,
        *,
        sample_every_s: float,
        operations: Operations,
        running: Callable[[], str | None],
        view: Callable[[], View],
        log: AutoscaleLog,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._policy, self._every_s = policy, sample_every_s
        self._operations, self._running, self._view = operations, running, view
        self._log, self._wall = log, wall
        self._meter = LoadMeter(FRESH_PERIODS * sample_every_s)
        self._state: AutoscaleState | None = None  # until the first sample: the log's
        self._lock = threading.Lock()  # guards the meter, the state, and what is shown
        self._log_lock = threading.Lock()  # the log; taken first: who is asked waits for no disk
        self._rebalancing: str | None = None  # id of a round that is being made
        self._last: Decision | None = None
        self._last_s: float | None = None
        self._action: dict[str, Any] | None = None
        self._advice: dict[str, Any] | None = None
        self._counts = {"up": 0, "down": 0, "rebalance": 0}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="remora-autoscale", daemon=True)

    def start(self) -> None:
        """Sample until `close`."""
        logger.info("autoscaling %s, mode %s", self._policy.pool, self._policy.mode)
        self._thread.start()

    def close(self) -> None:
        """No more samples; what was asked for goes on."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()
        self._log.close()

    def report(self, load: IngressLoad) -> None:
        """Take what an ingress tells."""
        with self._lock:
            self._meter.report(load, self._wall())

    def step(self) -> Decision:
        """Sample, decide, log, and act where the policy's mode says so. Of one thread at a time."""
        if self._state is None:
            self._state = self._log.recalled()  # of an earlier life: its cooldowns, the load it saw
        now_s = self._wall()
        operation = self._rebalancing or self._running()
        self._note_end(operation)
        units = self._units()
        with self._lock:
            sample = self._meter.sample(now_s, units=units, operation=operation)
            before = self._state
        # A forecast of the library's takes seconds, in which ingresses report and operators ask.
        decision, after = decide(self._policy, before, sample)
        with self._log_lock:
            with self._lock:
                self._state = after
                self._last, self._last_s = decision, now_s
                if decision.verdict in ("scale", "rebalance"):
                    self._count(decision)
                if decision.effect == "advise":  # the next decisions are to wait for its cooldown
                    self._advice = decision.model_dump(mode="json") | {"unix_s": now_s}
            self._log.decided(before, sample, decision)
        if decision.effect != "none":
            say = f"{decision.units} -> {decision.target_units}: {decision.reason}"
            logger.info("autoscale %s (%s) %s", decision.verdict, decision.effect, say)
        if decision.effect == "act":
            self._act(decision, f"autoscale-{decision.verdict}-{secrets.token_hex(4)}")
        return decision

    def gauges(self) -> dict[str, float]:
        """Metrics by name; empty before the first sample."""
        with self._lock:
            if self._last is None:
                return {}
            found = {f"remora_autoscale_{name}": float(n) for name, n in self._counts.items()}
            found["remora_autoscale_units"] = float(self._last.units)
            found["remora_autoscale_target_units"] = float(self._last.target_units)
            return found

    def status(self) -> dict[str, Any]:
        """For `remora status`: what was decided last, advised last, and last asked for."""
        with self._lock:
            last = self._last
            return {
                "pool": self._policy.pool,
                "mode": self._policy.mode,
                "ingresses": self._meter.sources,
                "log": str(self._log.path),
                "last": None if last is None else last.model_dump(mode="json"),
                "last_unix_s": self._last_s,
                "advice": self._advice,
                "action": self._action,
                "decided": dict(self._counts),
            }

    # -- inside, in the thread ----------------------------------------------------------------

    def _run(self) -> None:
        while not self._closing.wait(self._every_s):
            try:
                self.step()
            except RemoraError as error:  # nothing serves just now
                logger.warning("no sample: %s", error)
            except Exception:  # of one sample; an autoscaler that is silently gone is worse
                logger.exception("a sample failed")

    def _units(self) -> int:
        view = self._view()
        if self._policy.pool == "experts":
            return len(view.placement.slots)
        return sum(member.role == "dense" for member in view.members)

    def _count(self, decision: Decision) -> None:
        way = "up" if decision.target_units > decision.units else "down"
        self._counts["rebalance" if decision.verdict == "rebalance" else way] += 1

    def _target(self, decision: Decision) -> ScaleTo:
        """It gives way: while there is no room for it, operators can do what they want."""
        if self._policy.pool == "experts":
            return ScaleTo(shards=decision.target_units, gives_way=True)
        return ScaleTo(dense_groups=decision.target_units, gives_way=True)

    def _act(self, decision: Decision, operation_id: str) -> None:
        if decision.verdict == "rebalance":
            self._rebalancing = operation_id
            threading.Thread(
                target=self._rebalance, args=(operation_id,), name="remora-autoscale-rebalance",
                daemon=True,
            ).start()  # fmt: skip
            return
        try:
            operation = self._operations.request(operation_id, self._target(decision))
            self._note(operation_id, operation["outcome"], operation["reason"])
        except RemoraError as refused:
            self._note(operation_id, "refused", str(refused))

    def _note_end(self, running: str | None) -> None:
        """What came of the last action, once it is over."""
        action = self._action
        if action is None or action["outcome"] != "running" or running == action["operation_id"]:
            return
        try:
            operation = self._operations.wait(action["operation_id"], 0.0)
        except RemoraError as forgotten:
            self._note(action["operation_id"], "forgotten", str(forgotten))
            return
        if operation["outcome"] != "running":
            self._note(action["operation_id"], operation["outcome"], operation["reason"])

    def _rebalance(self, operation_id: str) -> None:
        """A plan takes up to minutes, so it has a thread; samples meanwhile say that it runs."""
        try:
            self._note_round(operation_id, self._operations.rebalance(operation_id, dry_run=False))
        except RemoraError as refused:
            self._note(operation_id, "refused", str(refused))
        except Exception as failure:
            logger.exception("a rebalance failed")
            self._note(operation_id, "failed", f"{type(failure).__name__}: {failure}")
        finally:
            self._rebalancing = None

    def _note_round(self, operation_id: str, report: dict[str, Any]) -> None:
        """What came of a round: a move, whose end is noted later, or why there is none."""
        if "not_applied" in report:
            self._note(operation_id, "refused", report["not_applied"])
        elif "operation" in report:
            operation = report["operation"]
            self._note(operation_id, operation["outcome"], operation["reason"])
        else:
            self._note(operation_id, report["verdict"], report["reason"])

    def _note(self, operation_id: str, outcome: str, reason: str) -> None:
        fields = {"operation_id": operation_id, "outcome": outcome, "reason": reason}
        if outcome in ("refused", "failed"):
            logger.warning("autoscale %s %s: %s", operation_id, outcome, reason)
        with self._log_lock:
            with self._lock:
                state, self._action = self._state, fields | {"unix_s": self._wall()}
            assert state is not None, "what is noted was decided"
            self._log.noted(ACTION, self._action, state)
