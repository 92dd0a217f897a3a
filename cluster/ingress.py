"""The OpenAI-compatible application: routes, bodies, answers. `build_app` gives one ASGI app.

Bodies are read and checked by hand (pydantic's JSON mode): limits apply before anything is parsed,
and every refusal has the one error body.
"""

from fastapi import FastAPI, Request
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import Response

from remora.cluster.chat import encode_chat
from remora.cluster.errors_http import handle_error
from remora.cluster.gate import Gate
from remora.cluster.generation import Generation
from remora.cluster.http_body import json_response, read_json
from remora.cluster.metrics import CONTENT_TYPE
from remora.cluster.openai_schema import (
    ChatRequest,
    ChatResponse,
    CompletionRequest,
    CompletionResponse,
    DetokenizeRequest,
    DetokenizeResponse,
    HealthResponse,
    ModelCard,
    ModelList,
    TokenizeRequest,
    TokenizeResponse,
)
from remora.cluster.openapi import error_responses, openapi_of
from remora.cluster.operation_routes import add_operation_routes
from remora.cluster.request_plan import check_ids, check_model
from remora.cluster.service import Service
from remora.cluster.sse import EventStream, Format, collect
from remora.comm.errors import RemoraError, RequestError

_BODY_ERRORS = (400, 401, 404, 413, 415)
_RUN_ERRORS = (*_BODY_ERRORS, 429, 500, 503, 504)


def build_app(service: Service, *, echo_request_id: bool = True) -> FastAPI:
    """The application over one service; `echo_request_id` as in `Gate`."""
    gate = Middleware(
        Gate,
        keys=service.keys,
        metrics=service.serving.metrics,
        access_log=service.access_log,
        echo_request_id=echo_request_id,
    )
    app = FastAPI(
        title="Remora",
        version="0.1.0",
        description="OpenAI-compatible serving of Mixture-of-Experts models",
        docs_url=None,  # their assets would come from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        middleware=[gate],
    )
    for kind in (HTTPException, ValidationError, RemoraError):  # others are the gate's
        app.add_exception_handler(kind, handle_error)
    app.openapi = lambda: openapi_of(app)  # type: ignore[method-assign]
    _add_generation(app, service)
    _add_models(app, service)
    _add_tokenizer(app, service)
    _add_health(app, service)
    add_operation_routes(app, service.operations, service.body_bytes_max)
    openapi_of(app)  # it tells of no HEAD
    for route in app.routes:
        if isinstance(route, APIRoute) and route.methods and "GET" in route.methods:
            route.methods.add("HEAD")  # load balancers probe with it; the server drops the body
    return app


def _add_generation(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/completions",
        response_model=CompletionResponse,
        responses=error_responses(*_RUN_ERRORS),
    )
    async def completions(request: Request) -> Response:
        """Continue a prompt, or several."""
        data = await read_json(request, service.body_bytes_max)
        body = await service.parse(CompletionRequest, data)
        return await _respond(request, bool(body.stream), *await service.completion(body))

    @app.post(
        "/v1/chat/completions", response_model=ChatResponse, responses=error_responses(*_RUN_ERRORS)
    )
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation."""
        data = await read_json(request, service.body_bytes_max)
        body = await service.parse(ChatRequest, data)
        return await _respond(request, bool(body.stream), *await service.chat(body))


def _add_models(app: FastAPI, service: Service) -> None:
    model = service.model
    card = ModelCard(
        id=model.id,
        object="model",
        created=model.created_unix_s,
        owned_by="remora",
        root=model.root,
        max_model_len=model.max_model_len,
    )

    @app.get("/v1/models", responses=error_responses(401))
    async def list_models() -> ModelList:
        """The model served here."""
        return ModelList(object="list", data=[card])

    @app.get("/v1/models/{model_id:path}", responses=error_responses(401, 404))
    async def get_model(model_id: str) -> ModelCard:
        """One model."""
        check_model(model_id, model)
        return card


def _add_tokenizer(app: FastAPI, service: Service) -> None:
    model, tokenizer = service.model, service.tokenizer

    @app.post(
        "/tokenize", response_model=TokenizeResponse, responses=error_responses(*_BODY_ERRORS)
    )
    async def tokenize(request: Request) -> Response:
        """Token ids of a text or of a conversation."""
        data = await read_json(request, service.body_bytes_max)
        body = await service.parse(TokenizeRequest, data)
        check_model(body.model, model)
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("one of prompt and messages is needed", param="prompt")
        if body.messages is not None:
            ids = await service.off_loop(
                encode_chat, body.messages, body.chat_template_kwargs, tokenizer
            )
        else:
            special = body.add_special_tokens is not False
            text = body.prompt or ""
            ids = await service.off_loop(tokenizer.encode, text, add_special_tokens=special)
        return json_response(
            {
                "count": len(ids),
                "max_model_len": model.max_model_len,
                "tokens": ids,
                "token_strs": await service.off_loop(list, map(tokenizer.token_text, ids)),
            }
        )

    @app.post(
        "/detokenize", response_model=DetokenizeResponse, responses=error_responses(*_BODY_ERRORS)
    )
    async def detokenize(request: Request) -> Response:
        """Text of token ids, special tokens spelled out."""
        data = await read_json(request, service.body_bytes_max)
        body = await service.parse(DetokenizeRequest, data)
        check_model(body.model, model)
        check_ids(body.tokens, model, "tokens")
        text = await service.off_loop(tokenizer.decode, body.tokens, skip_special_tokens=False)
        return json_response({"prompt": text})


def _add_health(app: FastAPI, service: Service) -> None:
    engine, metrics = service.serving.engine, service.serving.metrics

    def health(status: str) -> HealthResponse:
        return HealthResponse(
            status=status,
            dense_groups=engine.num_groups,
            dense_groups_serving=engine.num_serving,
            experts_without_replica=metrics.experts_without_replica,
        )

    @app.get("/health")
    async def get_health() -> HealthResponse:
        """Liveness: this process answers, whatever its engines do."""
        return health("alive")

    @app.get("/ready", responses=error_responses(503))
    async def get_ready() -> HealthResponse:
        """Readiness: some dense group is connected and serves; `degraded`: not each of them does,
        or requests wait for an expert that no living shard holds."""
        if engine.num_serving == 0:
            raise RequestError(
                f"no dense group serves: {engine.why_not() or 'none is connected'}",
                status=503,
                type="service_unavailable_error",
                code="not_ready",
            )
        is_full = engine.num_serving == engine.num_groups and not metrics.experts_without_replica
        return health("ready" if is_full else "degraded")

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def get_metrics() -> Response:
        """Prometheus exposition."""
        text = metrics.render()
        return Response(text, headers={"content-type": CONTENT_TYPE})


async def _respond(
    request: Request, stream: bool, generation: Generation, form: Format
) -> Response:
    if stream:
        return EventStream(generation, form)
    answer = await collect(generation, form, request.receive)
    return Response(status_code=499) if answer is None else json_response(answer)
