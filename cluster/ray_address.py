"""Connecting to a Ray cluster that others have started, with one sentence when that fails."""

import os
import socket
import tempfile
from pathlib import Path
from typing import Any

import ray

from remora.comm.errors import ClusterError

CONNECT_WITHIN_S = 5.0


def connect(address: str, **options: Any) -> None:
    """`ray.init` of a running cluster; `options` are its own.

    Raises:
        ClusterError: nothing listens there, or it does not take us.
    """
    check_answers(address)
    try:
        ray.init(address=address, log_to_driver=False, configure_logging=False, **options)
    except ConnectionError as error:
        if "AuthToken" in str(error.__cause__):
            raise ClusterError(
                f"the Ray cluster at {address} wants its token: set RAY_AUTH_MODE=token, with the"
                " token in RAY_AUTH_TOKEN or ~/.ray/auth_token, as for `ray start`"
            ) from error
        raise ClusterError(f"no Ray cluster answers at {address}: {error}") from error


def started_by_ray_start() -> str | None:
    """The cluster that `ray start` last started here, where Ray writes it down, if it answers.

    Ray's own "auto" would also try the private clusters of other instances, for half a minute.
    """
    folder = os.environ.get("RAY_TMPDIR", tempfile.gettempdir())
    try:
        address = (Path(folder) / "ray" / "ray_current_cluster").read_text().strip()
        check_answers(address)
    except (OSError, ClusterError):
        return None
    return address


def check_answers(address: str) -> None:
    """Raises ClusterError when nothing listens at `ip:port`; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():  # "auto", or a URL that Ray understands
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_WITHIN_S).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(f"no Ray cluster answers at {address}: {error}") from error
