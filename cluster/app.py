"""The Ray Serve application: `remora.cluster.app:build` for `serve run`, `deploy`, RayService.

`build` only describes. Each ingress replica, when it starts, creates or adopts the data plane
(idempotent, by name) and connects to it: an upgrade of the application keeps the data plane, its
deletion takes it down. Other Serve applications call `generate` and `complete` on the handle.

Streaming through Serve's Python proxy costs about 220 us of CPU a chunk, proxy and replica
together; with `RAY_SERVE_ENABLE_HA_PROXY=1` (or direct ingress) in the environment of `ray start`
about 13 us, as the replica writes to its own socket (measured, 32 streams, Zen 5, 2026-11-22).
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any

from pydantic import ValidationError
from ray import serve
from ray.serve import Application

from remora.actors.launch import NORMAL_PRIORITY
from remora.autoscale.autoscale_policy import AutoscalePolicy
from remora.cluster.bootstrap import ClusterHandle, ensure_cluster, find_cluster, stop_cluster
from remora.cluster.config import RemoraConfig, load_config
from remora.cluster.connect import connected_service
from remora.cluster.errors_http import as_request_error, from_validation
from remora.cluster.gate import replace_access_log
from remora.cluster.generation import Generation
from remora.cluster.ingress import build_app
from remora.cluster.model_source import local_checkpoint
from remora.cluster.openai_schema import ChatRequest, CompletionRequest
from remora.cluster.serve_policy import serve_autoscaling
from remora.cluster.sse import Format, collect
from remora.comm.errors import ClusterError, RequestError

logger = logging.getLogger(__name__)

ONGOING_ABOVE_QUEUE = 1024  # requests Serve lets in above our own bound: refusals are ours to make
SHUTDOWN_S = 20.0
# Of the replicas, so many new ones beside those that an upgrade replaces: the old ones serve until
# they are up, and go on where they do not come up (what must not change under way, a mistake).
SURGE_PERCENT = 20


def build(args: Mapping[str, Any]) -> Application:
    """The application of one configuration.

    Args:
        args: a configuration as plain data, and optionally `preset` or `config` (a YAML file) to
            start from. Dotted keys (`dense.groups`) are allowed, as `serve run` gives them.

    Raises:
        ConfigError: an unknown key or a bad value, named.
    """
    return application(config_from_args(args))


def config_from_args(args: Mapping[str, Any]) -> RemoraConfig:
    """The configuration that Serve's `args` describe. Raises ConfigError."""
    data = dict(args)
    preset, source = data.pop("preset", None), data.pop("config", None)
    return load_config(source, preset=preset, overrides=_flat(data))


def application(config: RemoraConfig) -> Application:
    """The application of a checked configuration."""
    http = config.http.loaded()
    replicas: dict[str, Any] = {"num_replicas": http.ingress_replicas}
    if isinstance(http.autoscale, AutoscalePolicy):
        scaling = serve_autoscaling(
            http.autoscale,
            initial=http.ingress_replicas,
            every_s=config.autoscale.sample_every_s,
            log_dir=config.autoscale.log_dir or config.elastic.log_dir,
            name=config.name,
        )
        replicas = {"autoscaling_config": scaling}
    make = serve.deployment(
        name="ingress",
        graceful_shutdown_timeout_s=SHUTDOWN_S,
        max_surge_percent=SURGE_PERCENT,
        **replicas,
        max_ongoing_requests=http.queue_max + ONGOING_ABOVE_QUEUE,
        ray_actor_options={
            "num_cpus": 0,
            "runtime_env": {
                "env_vars": {
                    "OMP_NUM_THREADS": "1",
                    "TOKENIZERS_PARALLELISM": "false",
                    **NORMAL_PRIORITY,
                }
            },
        },
    )
    bound: Application = make(serve.ingress()(IngressReplica)).bind(config.to_args())
    return bound


class IngressReplica:
    """One ingress replica."""

    async def __init__(self, args: Mapping[str, Any]) -> None:  # type: ignore[misc] # Serve awaits
        """Adopt the data plane, load the tokenizer, connect.

        Raises:
            RemoraError: the data plane cannot be brought up.
        """
        replace_access_log()
        config = config_from_args(args)
        self._name = config.name
        cluster = await asyncio.to_thread(_bring_up, config)
        self._service = await connected_service(config, cluster)

    def __serve_build_asgi_app__(self) -> Any:
        """Serve calls this after the constructor for the application it is to serve."""
        return build_app(self._service, echo_request_id=False)

    async def complete(self, request: dict[str, Any]) -> dict[str, Any]:
        """A whole answer for another Serve application.

        Args:
            request: a body as `/v1/chat/completions` (with `messages`) or `/v1/completions` take.

        Raises:
            RequestError, ClusterError: as over HTTP.
        """
        generation, form = await self._planned(request)
        answer = await collect(generation, form, None)
        assert answer is not None, "nobody can hang up on a handle"
        return answer

    async def generate(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Pieces of an answer as they come; closing the iterator aborts the request.

        Yields dictionaries of `index` (choice), `text`, `token_ids` and `finish_reason` (None until
        the choice's last piece).

        Raises:
            RequestError, ClusterError: as over HTTP.
        """
        generation, _ = await self._planned(request)
        try:
            await generation.start()
            while pieces := await generation.next():
                for piece in pieces:
                    yield {
                        "index": piece.choice.index,
                        "text": piece.text,
                        "token_ids": piece.token_ids,
                        "finish_reason": piece.choice.finish_reason if piece.is_last else None,
                    }
        finally:
            generation.close()

    async def __del__(self) -> None:
        """Disconnect; when the application is being deleted, take the data plane down too."""
        service = getattr(self, "_service", None)
        if service is None:  # the constructor failed
            return
        await service.close()
        if await asyncio.to_thread(_is_being_deleted):
            await asyncio.to_thread(_take_down, self._name)

    async def _planned(self, request: dict[str, Any]) -> tuple[Generation, Format]:
        try:
            if "messages" in request:
                return await self._service.chat(ChatRequest.model_validate(request))
            return await self._service.completion(CompletionRequest.model_validate(request))
        except ValidationError as error:
            raise from_validation(error) from None
        except RequestError:
            raise
        except Exception as error:
            raise as_request_error(error) from error


def _bring_up(config: RemoraConfig) -> ClusterHandle:
    resolved = config.model_copy(update={"model": local_checkpoint(config.model)})
    return ensure_cluster(resolved)


def _is_being_deleted() -> bool:
    name = serve.get_replica_context().app_name
    applications = serve.status().applications
    return name not in applications or applications[name].status == "DELETING"


def _take_down(name: str) -> None:
    if find_cluster(name) is None:  # `remora stop`, or another replica of this application
        return
    try:
        stop_cluster(name)
    except ClusterError as error:
        logger.warning("the data plane of %s did not stop by itself: %s", name, error)


def _flat(data: Mapping[str, Any]) -> dict[str, Any]:
    """Sections as dotted keys, so that they override single keys of a preset."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}.{inner}": content for inner, content in value.items()})
        else:
            flat[key] = value
    return flat
