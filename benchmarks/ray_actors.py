"""Living actors of the Ray cluster that this process is connected to, whatever else runs here."""

from typing import Any

import ray
from ray.util.state import list_actors


def living_actors(*filters: tuple[str, str, str]) -> list[Any]:
    """What Ray says of them, process ids included."""
    address = ray.get_runtime_context().gcs_address  # else Ray looks for a cluster by itself
    alive = ("state", "=", "ALIVE")
    return list(list_actors(address=address, filters=[*filters, alive], detail=True))


def living_names(deployment: str) -> list[str]:
    """Full names of those of a deployment: `remora/<deployment>/<uid>#<incarnation>`."""
    names = [actor.name or "" for actor in living_actors()]
    return [name for name in names if name.startswith(f"remora/{deployment}/")]


def process_of(actor_name: str) -> int:
    """Process of a living actor."""
    [actor] = living_actors(("name", "=", actor_name))
    assert isinstance(actor.pid, int) and actor.pid > 0
    return actor.pid
