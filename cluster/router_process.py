"""The router's actor as the coordinator handles it: started, asked, stopped."""

import logging
from typing import Any

import ray

from remora.actors.launch import RAY_NAMESPACE, router_name
from remora.actors.model_spec import ModelSpec, resolve_dtype
from remora.actors.plan_outcome import PlacementCost, PlanOutcome
from remora.actors.router_actor import RouterActor, RouterLaunch
from remora.autoscale.rebalance import RebalancePolicy
from remora.cluster.config import RemoraConfig
from remora.cluster.members import answers_within
from remora.cluster.rebalance_report import move_sizes
from remora.cluster.rebalancer import Apply, Rebalancer
from remora.comm.errors import ClusterError, RemoraError, first_line
from remora.comm.objective import Objective
from remora.comm.view import Placement, View

logger = logging.getLogger(__name__)

THREADS = 8  # a plan, and readers beside it
STATUS_S = 5.0
STOP_S = 10.0
PLAN_S = 900.0


def router_launch(config: RemoraConfig, token: bytes) -> RouterLaunch:
    """What the router is told."""
    router = config.router
    return RouterLaunch(
        deployment=config.name,
        token=token,
        bind_ip=router.bind_address or config.bind_address,
        port=router.port,
        report_every_s=router.report_every_s,
        slots=config.experts.slots,
        state_dir=router.state_dir,
    )


def start_router(config: RemoraConfig, token: bytes) -> Any:
    """Create the router's actor; it starts beside the others. Ray starts it again when it dies."""
    remote: Any = ray.remote
    return (
        remote(RouterActor)
        .options(
            name=router_name(config.name),
            namespace=RAY_NAMESPACE,
            lifetime="detached",
            num_cpus=0,
            max_restarts=-1,
            max_concurrency=THREADS,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}},
        )
        .remote(router_launch(config, token))
    )


class RemotePlanner:
    """The router's actor as the online loop asks it (`rebalancer.Planner`)."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def plan(self, seed: int, objective: Objective) -> PlanOutcome:
        """Against the placement in force. Raises ClusterError."""
        outcome: Any = self._answer(self._handle.plan.remote(seed, objective))
        assert isinstance(outcome, PlanOutcome)
        return outcome

    def fresh_cost(self, placement: Placement) -> PlacementCost:
        """Of a placement, on what was reported since the router's start. Raises ClusterError."""
        cost: Any = self._answer(self._handle.fresh_cost.remote(placement))
        assert isinstance(cost, PlacementCost)
        return cost

    def _answer(self, pending: Any) -> Any:
        found = answers_within({"router": pending}, PLAN_S)["router"]
        if isinstance(found, ray.exceptions.RayTaskError) and isinstance(found.cause, RemoraError):
            raise found.cause
        if isinstance(found, Exception):
            raise ClusterError(f"the router does not answer: {first_line(found)}")
        return found


def make_rebalancer(
    config: RemoraConfig, spec: ModelSpec, view: View, handle: Any, *, apply: Apply
) -> Rebalancer:
    """The online loop of a deployment that serves; rounds where the configuration says so."""
    dtype = resolve_dtype(spec, config.dtype)
    rebalancer = Rebalancer(
        planner=RemotePlanner(handle),
        policy=RebalancePolicy(**config.router.rebalance.model_dump()),
        view=view,
        apply=apply,
        **move_sizes(spec, dtype, config.experts_dtype),
        folder=config.router.state_dir,
    )
    rebalancer.start(config.router.rebalance_every_s)
    return rebalancer


def router_status(handle: Any, rebalancer: Rebalancer | None) -> dict[str, Any] | None:
    """What the router says of itself, and what the online loop decided; None where it is off."""
    if handle is None:
        return None
    answer = answers_within({"router": handle.status.remote()}, STATUS_S)["router"]
    loop = {"rebalance": rebalancer.status() if rebalancer is not None else None}
    if isinstance(answer, Exception):
        return {"alive": False, "error": first_line(answer), **loop}
    return {"alive": True, **answer, **loop}


def stop_router(handle: Any) -> None:
    """Have it save what it counted and stop listening."""
    if handle is None:
        return
    answer = answers_within({"router": handle.stop.remote()}, STOP_S)["router"]
    if isinstance(answer, Exception):
        logger.warning("the router did not stop by itself: %s", first_line(answer))


def kill_router(handle: Any) -> None:
    """Its end, for good."""
    if handle is not None:
        ray.kill(handle, no_restart=True)
