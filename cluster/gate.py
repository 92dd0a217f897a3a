"""The outermost layer of the ingress: request ids, keys, trace context, access log.

Plain ASGI and only on the first message of a response, so that a streamed token costs nothing here.
"""

import logging
import re
import time
import uuid
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from remora.cluster.errors_http import as_request_error, error_response
from remora.cluster.metrics import IngressMetrics
from remora.cluster.security import KeyRing
from remora.comm.errors import RequestError

SERVE_LOGGER = "ray.serve"
# Below Serve's own, which its replicas keep in a file that Ray rotates. INFO whatever Serve tells.
logger = logging.getLogger(f"{SERVE_LOGGER}.remora.access")
logger.setLevel(logging.INFO)
# What Serve goes by: `enable_access_log` of its LoggingConfig; and nobody rotates standard error.
AS_SERVE_DOES = {"serve_access_log": True, "log_to_stderr": False}

OPEN_PATHS = frozenset({"/health", "/ready", "/metrics", "/openapi.json"})
ADMIN_PREFIX = "/v1/ep/"
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """Who may call what."""

    api: KeyRing
    admin: KeyRing


class Gate:
    """ASGI middleware around the whole application.

    Args:
        access_log: a line for each request.
        echo_request_id: False where the server does it already (Ray Serve).
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Keys,
        metrics: IngressMetrics,
        access_log: bool = True,
        echo_request_id: bool = True,
    ) -> None:
        self._access_log = access_log
        self._echo = echo_request_id
        self._app = app
        self._keys = keys
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        request_id = headers.get(b"x-request-id", "")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = uuid.uuid4().hex
        traceparent: str | None = headers.get(b"traceparent", "")
        if not _TRACEPARENT.fullmatch(traceparent or ""):
            traceparent = None
        scope.setdefault("state", {})
        scope["state"]["request_id"] = request_id
        scope["state"]["traceparent"] = traceparent
        started_s, status = time.perf_counter(), 0
        echoed = (b"x-request-id", request_id.encode("latin-1"))

        async def send_first(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._echo:
                    message["headers"] = [*message.get("headers", ()), echoed]
            await send(message)

        try:
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            self._check_keys(path, headers.get(b"authorization"))
        except RequestError as refusal:
            await error_response(refusal)(scope, receive, send_first)
        else:
            try:
                await self._app(scope, receive, send_first)
            except Exception as failure:
                if status:  # its end is missing: the server closes the connection
                    raise
                await error_response(as_request_error(failure))(scope, receive, send_first)
        finally:
            route = getattr(scope.get("route"), "path", "other")  # bounded: routes, not paths
            self._metrics.http.labels(route, str(status or 499)).inc()
            if self._access_log:
                logger.info(
                    "%s %s %d %.1f ms request_id=%s%s",
                    scope["method"],
                    route,
                    status or 499,  # nothing was sent: the client hung up
                    1e3 * (time.perf_counter() - started_s),
                    request_id,
                    f" traceparent={traceparent}" if traceparent else "",
                    extra=AS_SERVE_DOES,
                )

    def _check_keys(self, path: str, authorization: str | None) -> None:
        if path.startswith(ADMIN_PREFIX):
            if self._keys.admin.is_open:
                raise RequestError(
                    "admin routes are closed: no admin key is configured",
                    status=403,
                    type="permission_error",
                    code="admin_closed",
                )
            self._keys.admin.check(authorization)
        elif path not in OPEN_PATHS:
            self._keys.api.check(authorization)


def replace_access_log() -> None:
    """Have Serve tell no requests itself in this process: its line has no trace context, and goes
    to standard error, too."""
    own = logging.getLogger(SERVE_LOGGER)  # records of loggers below it do not pass its filters
    own.addFilter(lambda record: not getattr(record, "serve_access_log", False))
