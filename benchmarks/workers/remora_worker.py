"""Remora behind the workers' protocol: a real Ray cluster, one dense group, two expert shards.

"generate" talks to the dense rank's control socket as an ingress does (engine level); "http" goes
through Ray Serve, the proxy and the OpenAI routes. "deploy" adds a deployment beside those there
are, such as one in the other numerics.
"""

import asyncio
import atexit
import itertools
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack
from typing import Any

from protocol import Loaded, Prompts, run_worker
from sse_client import stream_all


class Client:
    """The engine level of one deployment."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._payloads: AsyncIterator[bytes] = aiter(stream)
        self._numbers = itertools.count()

    async def generate(self, prompts: Prompts, num_new: int) -> dict[str, float]:
        """Submits every prompt at once; returns when the last has ended."""
        from remora.comm.messages import (
            SamplingParams,
            StepOutputs,
            Submit,
            decode_to_ingress,
            encode,
        )

        params = SamplingParams(max_tokens=num_new, temperature=0.0, ignore_eos=True)
        submits = [
            encode(Submit(request_id=f"bench-{n}", prompt_ids=ids, params=params))
            for n, ids in zip(self._numbers, prompts, strict=False)
        ]
        begin = time.perf_counter()
        for data in submits:
            self._stream.send(data)
        waiting_first, running = set[str](), len(prompts)
        first_s, num_tokens = 0.0, 0
        while running:
            message = decode_to_ingress(await anext(self._payloads))
            assert isinstance(message, StepOutputs), message
            for output in message.outputs:
                num_tokens += len(output.token_ids)
                if output.error is not None:
                    raise RuntimeError(output.error)
                if output.request_id not in waiting_first:
                    waiting_first.add(output.request_id)
                    first_s = time.perf_counter() - begin
                running -= output.finish_reason is not None
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "first_s": first_s, "num_tokens": num_tokens}


class Remora:
    """The Ray cluster of this process and what is deployed in it."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._loop = asyncio.new_event_loop()
        self._clients: dict[str, Client] = {}
        self._until_the_end = ExitStack()
        self._http: tuple[str, int, str] | None = None

    def start(self) -> None:
        """As `remora serve` does: a Ray cluster of its own, the data plane, then Serve."""
        from remora.cluster.local_ray import check_free, own_ray

        config = check_free(self.config("fast", "fast"))
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

    def config(self, name: str, numerics: str) -> Any:
        """The configuration of one deployment."""
        from remora.cluster.config import parse_config

        return parse_config(
            {
                "name": name,
                "model": self._options["model"],
                "served_model_name": name,
                "numerics": numerics,
                "executor": self._options["executor"],
                "dense": {"num_cpus": 0, "max_num_seqs": 64, **self._options.get("dense", {})},
                "experts": {"num_cpus": 0, "shards": 2, **self._options.get("experts", {})},
                "http": {"host": "127.0.0.1", "port": 0},
            },
            source="benchmarks/serve.py",
        )

    def deploy(self, name: str, numerics: str) -> dict[str, Any]:
        """Brings another deployment up in the same Ray cluster."""
        self._deploy(self.config(name, numerics))
        return {"deployments": list(self._clients)}

    def _deploy(self, config: Any) -> None:
        """Brings a deployment up and connects to its dense rank."""
        from remora.cluster.bootstrap import ensure_cluster
        from remora.comm.aio import connect_async

        handle = ensure_cluster(config)
        member = handle.dense_members()[0]
        stream = self._loop.run_until_complete(
            connect_async(
                member.endpoint,
                handle.token,
                member.endpoint.host,
                name="benchmark",
                incarnation=member.incarnation,
            )
        )
        self._clients[config.name] = Client(stream)

    def generate(self, prompts: Prompts, num_new: int, name: str) -> dict[str, float]:
        """At the engine level of deployment `name`."""
        return self._loop.run_until_complete(self._clients[name].generate(prompts, num_new))

    def http(self, prompts: Prompts, num_new: int) -> dict[str, float]:
        """Through the OpenAI routes of the deployment that "serve" was asked for."""
        assert self._http is not None, "nothing is served over HTTP"
        host, port, model = self._http
        return self._loop.run_until_complete(stream_all(host, port, model, prompts, num_new))


def load(options: dict[str, Any]) -> Loaded:
    """Options: model (directory), executor, http, dense and experts (sections of the config)."""
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
    }


if __name__ == "__main__":
    run_worker(load)
