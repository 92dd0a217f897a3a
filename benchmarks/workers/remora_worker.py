"""Remora behind the workers' protocol: a real Ray cluster, one dense group, two expert shards.

"generate" talks to the dense rank's control socket as an ingress does (engine level); "http" goes
through Ray Serve, the proxy and the OpenAI routes. "deploy" adds a deployment beside those there
are, such as one in the other numerics; "undeploy" takes it away. "phases" says where a decode step
goes, "footprint" what the deployment costs in memory and time to start (`remora_footprint.py`).
"""

import asyncio
import atexit
import random
from contextlib import ExitStack
from typing import Any

from protocol import Loaded, Prompts, run_worker
from remora_footprint import footprint, pin
from sse_client import stream_all


class Remora:
    """The Ray cluster of this process and what is deployed in it."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._loop = asyncio.new_event_loop()
        self._configs: dict[str, Any] = {}
        self._handles: dict[str, Any] = {}
        self._loads: dict[str, Any] = {}
        self._until_the_end = ExitStack()
        self._http: tuple[str, int, str] | None = None

    def start(self) -> None:
        """As `remora serve` does: a Ray cluster of its own, the data plane, then Serve."""
        from remora.cluster.local_ray import check_free, own_ray

        config = check_free(self.config("fast", self._options.get("overrides", {})))
        self._until_the_end.enter_context(own_ray(config))
        self._deploy(config)
        if self._options["http"]:
            self._serve(config)

    def _serve(self, config: Any) -> None:
        from ray import serve

        from remora.cluster.app import application
        from remora.cluster.local_ray import proxy_port

        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": config.http.host, "port": proxy_port(config)},
            logging_config={"log_level": "WARNING", "enable_access_log": False},
        )
        serve.run(application(config), name=config.name, route_prefix="/")
        self._http = (config.http.host, config.http.port, config.model_id)

    def close(self) -> None:
        """Takes everything down."""
        self._until_the_end.close()

    def config(self, name: str, overrides: dict[str, Any]) -> Any:
        """The configuration of one deployment; `overrides` are dotted keys."""
        from remora.cluster.config import load_config

        base = {
            "name": name,
            "model": self._options["model"],
            "served_model_name": name,
            "executor": self._options["executor"],
            "dense.num_cpus": 0,
            "dense.max_num_seqs": 64,
            "experts.num_cpus": 0,
            "experts.shards": 2,
            "http.host": "127.0.0.1",
            "http.port": 0,
            "elastic.hang_s": 3600,  # while another engine is measured this one is stopped
        }
        return load_config(overrides=base | overrides)

    def deploy(
        self, name: str, overrides: dict[str, Any], pinned: dict[str, list[int]] | None = None
    ) -> dict[str, Any]:
        """Brings another deployment up in the same Ray cluster.

        Args:
            overrides: dotted configuration keys.
            pinned: CPUs by uid (`dense-0`, `shard-1`) of processes that may not use all.
        """
        self._deploy(self.config(name, overrides))
        for uid, cpus in (pinned or {}).items():
            pin(self._handles[name], uid, cpus)
        return {"deployments": list(self._handles)}

    def undeploy(self, name: str) -> dict[str, Any]:
        """Takes a deployment down."""
        from remora.cluster.bootstrap import stop_cluster

        self._loop.run_until_complete(self._loads.pop(name).close())
        stop_cluster(name)
        del self._handles[name], self._configs[name]
        return {"deployments": list(self._handles)}

    def _deploy(self, config: Any) -> None:
        """Brings a deployment up and connects to its dense rank."""
        from remora.cluster.bench_load import EngineLoad
        from remora.cluster.bootstrap import ensure_cluster

        handle = ensure_cluster(config)
        load = self._loop.run_until_complete(EngineLoad.connect(handle))
        self._configs[config.name] = config
        self._handles[config.name] = handle
        self._loads[config.name] = load

    def generate(self, prompts: Prompts, num_new: int, name: str) -> dict[str, float]:
        """At the engine level of deployment `name`."""
        timing = self._loop.run_until_complete(self._loads[name].generate(prompts, num_new))
        return {
            "seconds": timing.seconds,
            "first_s": timing.first_s,
            "num_tokens": timing.num_tokens,
        }

    def http(self, prompts: Prompts, num_new: int) -> dict[str, float]:
        """Through the OpenAI routes of the deployment that "serve" was asked for."""
        assert self._http is not None, "nothing is served over HTTP"
        host, port, model = self._http
        return self._loop.run_until_complete(stream_all(host, port, model, prompts, num_new))

    def phases(self, name: str, prompts: Prompts, num_new: int) -> dict[str, Any]:
        """Readings of the rank's counters after the first and the last token of a batch."""
        from remora.cluster.bench_command import rank_actor, sample_batch

        actor = rank_actor(self._handles[name])
        sample = sample_batch(self._loads[name], actor, prompts, num_new)
        done = self._loop.run_until_complete(sample)
        return {"before": done.before, "after": done.after}

    def loops(self, batches: list[int]) -> dict[str, float]:
        """Microseconds of a step inside generated loops, by batch size."""
        from remora.actors.loop_profile import loops_step_us

        model = self._options["model"]
        found = loops_step_us(model, dtype="auto", exact=False, batches=batches)
        return {str(batch): spent_us for batch, spent_us in found.items()}

    def footprint(self, name: str) -> dict[str, float]:
        """Memory and start of deployment `name`, against empty twins of its actors."""
        rng = random.Random(0)
        for batch in (1, 32):  # what only grows with use has grown
            prompts = [[rng.randrange(8, 30000) for _ in range(512)] for _ in range(batch)]
            self.generate(prompts, 8, name)
        again = self.config(f"{name}-again", {})
        return footprint(self._handles[name], self._configs[name], again)


def load(options: dict[str, Any]) -> Loaded:
    """Options: model (directory), executor, http, overrides (dotted configuration keys)."""
    import torch

    from remora.kernels.fingerprint import kernel_fingerprint

    remora = Remora(options)
    remora.start()
    atexit.register(remora.close)
    info = {"torch": torch.__version__, "kernels": kernel_fingerprint()}
    return info, {
        "generate": remora.generate,
        "http": remora.http,
        "deploy": remora.deploy,
        "undeploy": remora.undeploy,
        "phases": remora.phases,
        "loops": remora.loops,
        "footprint": remora.footprint,
    }


if __name__ == "__main__":
    run_worker(load)
