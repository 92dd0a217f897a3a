"""Our OpenAPI file: the request models as they are checked, every status that may come back."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from remora.cluster.openai_schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ErrorBody,
    TokenizeRequest,
)
from remora.cluster.operation_request import DrainBody, PlaceBody, RebalanceBody, ScaleBody

ERROR_STATUSES = {
    400: "The request cannot be served as it is",
    401: "No accepted API key",
    403: "No admin key is configured: these routes are closed",
    404: "No such model, route or operation",
    409: "Another operation runs, or the id is another one's",
    413: "The body is too large",
    415: "The body is not application/json",
    429: "The queue is full; see Retry-After",
    500: "The engine failed",
    503: "The cluster cannot answer now",
    504: "The request took too long",
}
_BODIES: dict[str, type[BaseModel]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
    "/v1/ep/scale": ScaleBody,
    "/v1/ep/drain": DrainBody,
    "/v1/ep/rebalance": RebalanceBody,
    "/v1/ep/placement": PlaceBody,
}
_STREAMED = ("/v1/completions", "/v1/chat/completions")


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses` for some error statuses."""
    return {s: {"model": ErrorBody, "description": ERROR_STATUSES[s]} for s in statuses}


def openapi_of(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, built once; bodies are read by hand, so they are added here."""
    if app.openapi_schema is not None:
        return app.openapi_schema
    document = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes
    )
    schemas = document["components"]["schemas"]
    for path, model in _BODIES.items():
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(schema.pop("$defs", {}))
        schemas[model.__name__] = schema
        methods = document["paths"][path]
        operation = methods.get("post") or methods["put"]
        operation["requestBody"] = {
            "required": True,
            "content": {
                "application/json": {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}
            },
        }
        if path in _STREAMED:
            content = operation["responses"]["200"]["content"]
            content["text/event-stream"] = {
                "schema": {"description": "Events of JSON chunks; the last one is [DONE]"}
            }
    components = document["components"]
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    app.openapi_schema = document
    return document
