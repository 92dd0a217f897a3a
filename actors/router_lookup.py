"""Where the router of a deployment listens, as its clients ask Ray.

Apart from the router's own actor: who only asks need not import what plans placements.
"""

from typing import Any, Final

import ray

from remora.actors.launch import RAY_NAMESPACE, router_name

ASK_S: Final = 5.0


def router_address(deployment: str) -> str | None:
    """Where the router of a deployment listens; None when there is none that answers now."""
    try:
        actor = ray.get_actor(router_name(deployment), namespace=RAY_NAMESPACE)
        address: Any = ray.get(actor.address.remote(), timeout=ASK_S)
    except (ValueError, ray.exceptions.RayError):  # none of that name; gone, or just starting
        return None
    return str(address)
