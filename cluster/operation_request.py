"""What callers ask of a deployment that serves, checked: one set of bodies for all ways in.

The command line, gRPC (`coordinator_server.py`) and HTTP (`operation_routes.py`) all make one of
these and take its `target`. Unknown fields and values of another type are refused.
"""

from typing import Annotated, Any, Protocol

from pydantic import AfterValidator, ConfigDict, Field, ValidationInfo, field_validator

from remora.cluster.operation import Drain, PlaceAs, ScaleTo, Target
from remora.cluster.placement_file import check_fits, checked_placement
from remora.comm.checked import Section
from remora.comm.view import Placement, View

ID_CHARS_MAX = 128
UIDS_MAX = 4096
OWN_PREFIXES = ("restore-", "take-over-", "evacuate-", "replace-")  # the coordinator's own


def _not_ours(value: str) -> str:
    if value.startswith(OWN_PREFIXES):
        raise ValueError(
            f"ids that begin with {' or '.join(map(repr, OWN_PREFIXES))} are the coordinator's own"
        )
    return value


OperationId = Annotated[
    str,
    Field(pattern=rf"^[A-Za-z0-9][A-Za-z0-9._:-]{{0,{ID_CHARS_MAX - 1}}}$"),
    AfterValidator(_not_ours),
]
Uid = Annotated[str, Field(min_length=1, max_length=128)]
Uids = Annotated[tuple[Uid, ...], Field(max_length=UIDS_MAX)]
Expert = Annotated[int, Field(ge=0, le=1 << 20)]


class Body(Section):
    """What every operation is asked with."""

    model_config = ConfigDict(strict=True)

    operation_id: OperationId  # asking again with the same one does nothing twice


class ScaleBody(Body):
    """So many shards and dense groups there are to be; what is left out stays as it is."""

    shards: Annotated[int, Field(ge=1, le=UIDS_MAX)] | None = None
    dense_groups: Annotated[int, Field(ge=1, le=UIDS_MAX)] | None = Field(
        default=None, validate_default=True
    )
    retire: Uids = ()  # members that are not to be among them

    @field_validator("dense_groups")
    @classmethod
    def _of_something(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is None and info.data.get("shards", 0) is None:
            raise ValueError("shards or dense_groups is required")
        return value

    @property
    def target(self) -> Target:
        """What is asked for."""
        return ScaleTo(self.shards, self.retire, self.dense_groups)


class DrainBody(Body):
    """All experts off some shards, all requests off some dense groups; then these are ended."""

    uids: Annotated[Uids, Field(min_length=1)]

    @property
    def target(self) -> Target:
        """What is asked for."""
        return Drain(self.uids)


class PlacementBody(Section):
    """A placement: for each shard, one list for each of `moe_layers`, experts in slot order."""

    model_config = ConfigDict(strict=True)

    num_experts: Annotated[int, Field(ge=1, le=1 << 20)]
    moe_layers: Annotated[tuple[Expert, ...], Field(max_length=4096)]
    slots: Annotated[dict[Uid, tuple[tuple[Expert, ...], ...]], Field(max_length=UIDS_MAX)]

    @classmethod
    def of(cls, placement: Placement) -> "PlacementBody":
        """A placement as it is told."""
        fields = ("num_experts", "moe_layers", "slots")
        return cls(**{name: getattr(placement, name) for name in fields})

    def checked(self, served: Placement) -> Placement:
        """The placement. Raises ConfigError: not complete, or none of the model of `served`."""
        placement = Placement(
            num_experts=self.num_experts, moe_layers=self.moe_layers, slots=self.slots
        )
        checked_placement(placement, source="placement")
        check_fits(
            placement,
            source="placement",
            num_experts=served.num_experts,
            moe_layers=served.moe_layers,
        )
        return placement


class PlaceBody(Body):
    """The shards that there are hold this."""

    placement: PlacementBody

    @property
    def target(self) -> Target:
        """What is asked for."""
        return PlaceAs(self.placement.slots)


class RebalanceBody(Body):
    """Plan from counted traffic, and move what is worth it."""

    dry_run: bool = False  # plan only


class OperationAnswer(Section):
    """How an operation is. Seconds count from its begin."""

    operation_id: str
    kind: str
    outcome: str
    step: str
    reason: str
    target: dict[str, Any] | None = None
    joiners: dict[str, int]  # uid -> incarnation
    retirees: tuple[str, ...]
    round: int
    num_rounds: int
    moved: int
    safe_to_delete: tuple[str, ...]
    serving_s: float | None
    ended_s: float | None


class PlacementAnswer(Section):
    """The placement in force."""

    epoch: int
    view_hash: str
    placement: PlacementBody


class Operations(Protocol):
    """A deployment as operators see it: its coordinator, or a handle on it.

    All of them raise ClusterError where nothing serves, or nobody answers.
    """

    def request(self, operation_id: str, target: Target) -> dict[str, Any]:
        """As `Coordinator.request`."""

    def wait(self, operation_id: str, timeout_s: float) -> dict[str, Any]:
        """As `Coordinator.wait`."""

    def cancel(self, operation_id: str | None) -> dict[str, Any]:
        """As `Coordinator.cancel`."""

    def rebalance(self, operation_id: str, *, dry_run: bool) -> dict[str, Any]:
        """As `Coordinator.rebalance`."""

    def status(self) -> dict[str, Any]:
        """As `Coordinator.status`."""

    def view(self) -> View:
        """As `Coordinator.view`."""


def begin(operations: Operations, body: ScaleBody | DrainBody | PlaceBody) -> dict[str, Any]:
    """Begin what a body asks for, or find the operation of its id.

    Raises:
        ConfigError, ClusterError: as `Coordinator.request`; or a placement that does not fit.
    """
    if isinstance(body, PlaceBody):
        body.placement.checked(operations.view().placement)
    return operations.request(body.operation_id, body.target)
