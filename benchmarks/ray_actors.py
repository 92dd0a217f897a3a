"""Living actors of the Ray cluster that this process is connected to, whatever else runs here."""

import ray


def living_actors() -> dict[str, int]:
    """Process of each living actor, by its name ("" of one without).

    As Ray's GCS has it: the public list (`ray.util.state`) comes from a dashboard, whose nine
    processes take as long to start as a deployment.
    """
    actors = ray._private.state.actors(actor_state_name="ALIVE").values()
    return {actor["Name"]: actor["Pid"] for actor in actors}


def living_names(deployment: str) -> list[str]:
    """Full names of those of a deployment: `remora/<deployment>/<uid>#<incarnation>`."""
    return [name for name in living_actors() if name.startswith(f"remora/{deployment}/")]


def process_of(actor_name: str) -> int:
    """Process of a living actor."""
    pid = living_actors()[actor_name]
    assert pid > 0
    return pid
