"""What a shard tells of itself; apart from the shard, whose imports take seconds."""

import msgspec

from remora.actors.manifest import Manifest
from remora.comm.view import Endpoint, Member


class ShardFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A shard that can serve, for the coordinator."""

    member: Member
    manifest: Manifest
    room: dict[int, int]  # decoder layer -> slots, of every MoE layer
    copies: Endpoint | None = None  # where others copy its experts; None: they cannot
