"""Deployments in a Ray cluster over network namespaces; runs in the host without a shaped link.

"deploy" brings one up and says which host each member is on; "generate" gives every dense group its
prompts at once and tells tokens, seconds and the gaps between steps of each.
"""

import asyncio
import time
from typing import Any

from protocol import Loaded, Prompts, run_worker

NODE_WITHIN_S = 120.0


class Links:
    """The driver of one Ray cluster and what is deployed in it."""

    def __init__(self, address: str) -> None:
        import ray

        from remora.actors.launch import RAY_NAMESPACE
        from remora.cluster.bootstrap import neutral_runtime_env

        until_s = time.monotonic() + NODE_WITHIN_S
        while not ray.is_initialized():
            try:
                ray.init(
                    address=address,
                    namespace=RAY_NAMESPACE,
                    runtime_env=neutral_runtime_env(),
                    log_to_driver=False,
                    configure_logging=False,
                )
            except ConnectionError:  # the head has only just been started
                if time.monotonic() > until_s:
                    raise
                time.sleep(0.5)  # it tells nobody when it listens
        self._loop = asyncio.new_event_loop()
        self._loads: dict[str, list[Any]] = {}

    def await_node(self, ip: str) -> dict[str, Any]:
        """The Ray node at `ip`, once it lives."""
        import ray

        until_s = time.monotonic() + NODE_WITHIN_S
        while True:
            for node in ray.nodes():
                if node["Alive"] and node["NodeManagerAddress"] == ip:
                    return {"node": node["NodeID"]}
            if time.monotonic() > until_s:
                raise TimeoutError(f"no raylet at {ip} within {NODE_WITHIN_S:g} s")
            time.sleep(0.2)  # Ray tells nobody of a new node

    def deploy(self, name: str, overrides: dict[str, Any]) -> dict[str, Any]:
        """Brings deployment `name` up; the Ray node of each of its members by uid."""
        from remora.cluster.bench_load import EngineLoad
        from remora.cluster.bootstrap import ensure_cluster
        from remora.cluster.config import load_config

        handle = ensure_cluster(load_config(overrides={"name": name} | overrides))
        self._loads[name] = [
            self._loop.run_until_complete(EngineLoad.connect(handle, group=group))
            for group in range(len(handle.dense_members()))
        ]
        return {member.uid: member.endpoint.host for member in handle.view().members}

    def undeploy(self, name: str) -> dict[str, Any]:
        """Takes a deployment down."""
        from remora.cluster.bootstrap import stop_cluster

        for load in self._loads.pop(name):
            self._loop.run_until_complete(load.close())
        stop_cluster(name)
        return {}

    def generate(self, name: str, prompts: list[Prompts], num_new: int) -> dict[str, Any]:
        """`prompts[g]` go to dense group g; all at once."""

        async def all_groups() -> list[Any]:
            asked = [
                load.generate(each, num_new)
                for load, each in zip(self._loads[name], prompts, strict=True)
                if each
            ]
            return await asyncio.gather(*asked)

        timings = self._loop.run_until_complete(all_groups())
        return {
            "num_tokens": sum(t.num_tokens for t in timings),
            "seconds": max(t.seconds for t in timings),
            "first_s": max(t.first_s for t in timings),
            "gaps_s": [gap for t in timings for gap in t.gaps_s],
        }


def load(options: dict[str, Any]) -> Loaded:
    """Options: address of the Ray cluster."""
    import torch

    links = Links(options["address"])
    return {"torch": torch.__version__}, {
        "await_node": links.await_node,
        "deploy": links.deploy,
        "undeploy": links.undeploy,
        "generate": links.generate,
    }


if __name__ == "__main__":
    run_worker(load)
