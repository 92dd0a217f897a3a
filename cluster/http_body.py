"""Bodies of HTTP requests, read by hand under a limit, and answers as JSON."""

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from remora.cluster.sse import to_json
from remora.comm.errors import RequestError


async def read_json(request: Request, bytes_max: int) -> bytes:
    """The body of a JSON request.

    Raises:
        RequestError: 415 for another content type, 413 over `bytes_max` (read no further).
    """
    content_type = request.headers.get("content-type", "application/json")
    media = content_type.partition(";")[0].strip().lower()
    if media != "application/json" and not (media.startswith("application/") and "+json" in media):
        raise RequestError(
            f"content type {media[:64]!r}: application/json is needed",
            status=415,
            code="unsupported_media_type",
        )
    too_large = RequestError(
        f"the body is larger than {bytes_max} bytes", status=413, code="body_too_large"
    )
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > bytes_max:
        raise too_large
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > bytes_max:
            raise too_large
    return bytes(data)


def json_response(content: dict[str, Any]) -> Response:
    """An answer as JSON."""
    return Response(to_json(content), media_type="application/json")
