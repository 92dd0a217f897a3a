"""Errors as clients see them: always `{"error": {"message", "type", "param", "code"}}`.

A message says what was wrong, the value (shortened) and what is allowed. Secrets and stack traces
never appear in it.
"""

import logging
import reprlib
from typing import Any

import msgspec
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from remora.comm.errors import (
    ClusterError,
    OperationIdTakenError,
    OperationRunsError,
    OverloadedError,
    RemoraError,
    RequestError,
    UnknownOperationError,
)

logger = logging.getLogger(__name__)

VALUE_CHARS_MAX = 64

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
_OPERATION_ERRORS: tuple[tuple[type[RemoraError], int, str], ...] = (
    (OperationIdTakenError, 409, "operation_id_taken"),
    (OperationRunsError, 409, "operation_runs"),
    (UnknownOperationError, 404, "operation_not_found"),
)
_FIELDS_NOT_YET = {
    "suffix": "suffix is not supported",
    "best_of": "best_of above 1 is not supported; use n",
    "tools": "tools are not supported yet",
    "tool_choice": "tool_choice is not supported yet",
    "functions": "functions are not supported yet",
    "function_call": "function_call is not supported yet",
    "response_format": "response_format other than {'type': 'text'} is not supported yet",
}
_PROMPT = (
    "prompt: allowed is a string, a list of strings, a list of token ids or a list of lists of"
    " token ids, none of them empty"
)


def error_response(error: RequestError, headers: dict[str, str] | None = None) -> Response:
    """The HTTP response of one refused request."""
    headers = dict(headers or {})
    if isinstance(error, OverloadedError):
        headers["Retry-After"] = str(error.retry_after_s)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(
        error_body(error),
        status_code=error.status,
        headers=headers,
        media_type="application/json",
    )


def error_body(error: RequestError) -> bytes:
    """JSON bytes of the error body."""
    detail = {
        "message": error.message,
        "type": error.type,
        "param": error.param,
        "code": error.code,
    }
    return msgspec.json.encode({"error": detail})


def as_request_error(error: BaseException) -> RequestError:
    """Any failure of a handler, as what the client is told."""
    if isinstance(error, RequestError):
        return error
    for kind, status, code in _OPERATION_ERRORS:
        if isinstance(error, kind):
            type_ = _TYPES.get(status, "conflict_error")
            return RequestError(str(error), status=status, type=type_, code=code)
    if isinstance(error, ClusterError):
        return RequestError(
            f"the serving cluster cannot answer now: {error}",
            status=503,
            type="service_unavailable_error",
            code="cluster_unavailable",
        )
    if isinstance(error, RemoraError):
        return RequestError(str(error))
    logger.error("unexpected failure of a request", exc_info=error)
    return RequestError(
        "internal error; the server's log has the details",
        status=500,
        type="server_error",
        code="internal_error",
    )


def from_validation(error: ValidationError) -> RequestError:
    """The first fault of a body, in one sentence that names the field.

    Of a union's branches the one that fits best is reported: where the type was right and the value
    was not, else where the fault lies deepest.
    """
    faults = error.errors(include_url=False, include_context=False)
    field = faults[0]["loc"][:1]
    fault = max(
        (fault for fault in faults if fault["loc"][:1] == field),
        key=lambda fault: (not fault["type"].endswith("_type"), len(fault["loc"])),
    )
    loc = [str(part) for part in fault["loc"]]
    if fault["type"] == "json_invalid":
        detail = fault["msg"].removeprefix("Invalid JSON: ")
        return RequestError(f"the body is not valid JSON: {detail}", code="invalid_json")
    if not loc and fault["type"] == "value_error":  # of a field that is not served
        said = fault["msg"].removeprefix("Value error, ")
        return RequestError(said, param=said.partition(" ")[0], code="unsupported_parameter")
    if not loc:
        return RequestError(f"the body must be a JSON object, got {_shown(fault['input'])}")
    name = loc[0]
    if name in _FIELDS_NOT_YET:
        return RequestError(_FIELDS_NOT_YET[name], param=name, code="unsupported_parameter")
    if fault["type"] == "missing":
        return RequestError(f"{'.'.join(loc)} is required", param=name, code="missing_parameter")
    if name == "prompt":
        return RequestError(f"{_PROMPT}; got {_shown(fault['input'])}", param="prompt")
    where = ".".join(part for part in loc if part.isidentifier() or part.isdigit())
    if fault["type"] == "value_error":  # a sentence of our own, with the value
        return RequestError(f"{where}: {fault['msg'].removeprefix('Value error, ')}", param=name)
    message = fault["msg"][:1].lower() + fault["msg"][1:]
    return RequestError(f"{where}: {message}, got {_shown(fault['input'])}", param=name)


def from_http(error: HTTPException) -> RequestError:
    """Starlette's own refusals: unknown routes, wrong methods."""
    messages = {404: "there is no such route", 405: "method not allowed on this route"}
    return RequestError(
        messages.get(error.status_code, str(error.detail)),
        status=error.status_code,
        type=_TYPES.get(error.status_code, "invalid_request_error"),
        code={404: "route_not_found", 405: "method_not_allowed"}.get(error.status_code),
    )


async def handle_error(request: Request, error: Exception) -> Response:
    """Exception handler of the application: every error leaves with the one body."""
    if isinstance(error, HTTPException):
        return error_response(from_http(error), dict(error.headers or {}))
    if isinstance(error, ValidationError):
        return error_response(from_validation(error))
    return error_response(as_request_error(error))


def _shown(value: Any) -> str:
    try:
        text = reprlib.repr(value)
    except ValueError:  # an integer of too many digits for Python to print
        text = "a very large integer"
    return text if len(text) <= VALUE_CHARS_MAX else text[:VALUE_CHARS_MAX] + "..."
