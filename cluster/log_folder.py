"""Where a deployment keeps its logs."""

from pathlib import Path

import ray

from remora.cluster.instances import instances_dir


def folder_below(base: Path | None, name: str) -> Path:
    """The folder of deployment `name` below `base`, as it is configured; None: in a private folder
    of this host and of the Ray cluster that this process is connected to.

    Raises:
        ConfigError: the private folder cannot be made, or is somebody else's.
    """
    if base is None:
        base = instances_dir() / ray.get_runtime_context().get_session_name()
    return base / name
