"""Dense ranks and shards over the fake NCCL: views, members, toy experts, and the slow twin."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from support.comm_rig import expert_output
from support.fake_nccl import CpuDevice, FakeNccl, World
from torch import Tensor

from remora.comm.nccl_link import Link
from remora.comm.nccl_plan import DecodeShape, Roster, home_shards
from remora.comm.nccl_shard import ShardExchange
from remora.comm.nccl_source import SourceExchange
from remora.comm.replicas import replica_tables
from remora.comm.view import Endpoint, Member, Placement, View

LAYERS = (0, 2)


def view_of(num_sources: int, placement: Placement, epoch: int = 1, lives: int = 1) -> View:
    """A view whose source i and shard i share host i."""
    uids = [f"dense-{i}" for i in range(num_sources)] + list(placement.slots)
    members = tuple(
        Member(
            uid=uid,
            incarnation=lives,
            role="dense" if uid.startswith("dense") else "shard",
            endpoint=Endpoint(host=uid.split("-")[1], tcp_address=""),
            actor_name=uid,
        )
        for uid in uids
    )
    return View(epoch=epoch, members=members, placement=placement)


def random_placement(num_shards: int, num_experts: int, seed: int) -> Placement:
    """Every expert on one to three shards, at random; a shard may hold nothing."""
    rng = np.random.default_rng(seed)
    slots: dict[str, list[list[int]]] = {f"shard-{s}": [] for s in range(num_shards)}
    for _ in LAYERS:
        held = [set[int]() for _ in range(num_shards)]
        for expert in range(num_experts):
            num = int(rng.integers(1, min(3, num_shards) + 1))
            for shard in rng.choice(num_shards, num, replace=False):
                held[shard].add(expert)
        for shard, experts in enumerate(held):
            slots[f"shard-{shard}"].append(sorted(experts))
    return Placement(
        num_experts=num_experts,
        moe_layers=LAYERS,
        slots={uid: tuple(map(tuple, layers)) for uid, layers in slots.items()},
    )


@dataclass
class ToyExperts:
    """`DeviceExperts` of `comm_rig.expert_output`, capturable; NaN from those it does not hold."""

    held: dict[int, set[int]]
    dtype: torch.dtype
    _space: dict[Any, dict[str, Tensor]] = field(default_factory=dict)

    def masked(
        self, layer: int, rows_MD: Tensor, expert_MK: Tensor, weight_MK: Tensor, out_BD: Tensor,
        *, presummed: bool,
    ) -> None:  # fmt: skip
        (m, k), d = expert_MK.shape, rows_MD.shape[1]
        if (m, k, d) not in self._space:  # at the warming step, not under capture
            self._space[m, k, d] = {
                "scale": torch.zeros(m, k),
                "none": torch.zeros(m, k, dtype=torch.bool),
                "term": torch.zeros(m, k, d),
                "row": torch.zeros(m, k, d, dtype=self.dtype),
                "wide": torch.zeros(m, d),
                "sum": torch.zeros(m, d),
            }
        space = self._space[m, k, d]
        scale = space["scale"]
        scale.copy_(expert_MK).mul_(0.03125).add_(0.25).add_(layer * 0.5)
        torch.lt(expert_MK, 0, out=space["none"])
        scale.masked_fill_(space["none"], float("nan"))  # a masked pair must leave no trace
        space["term"].copy_(rows_MD[:, None].expand(m, k, d)).mul_(scale[:, :, None])
        space["row"].copy_(space["term"])
        if not presummed:
            out_BD.copy_(space["row"].view(m * k, d))
            return
        space["sum"].zero_()
        for column in range(k):
            space["wide"].copy_(space["row"][:, column]).mul_(weight_MK[:, column, None])
            space["wide"].masked_fill_(space["none"][:, column, None], 0.0)
            space["sum"].add_(space["wide"])
        out_BD.copy_(space["sum"])

    def exact(
        self, layer: int, rows_MD: Tensor, row_P: Tensor, expert_P: Tensor, weight_P: Tensor,
        *, presummed: bool,
    ) -> Tensor:  # fmt: skip
        here_P = torch.tensor([expert in self.held[layer] for expert in expert_P.tolist()])
        out_PD = expert_output(rows_MD[row_P.long()], expert_P, layer)
        out_PD[~here_P.bool()] = float("nan")  # of an aborted step, or the test will see it
        if not presummed:
            return out_PD
        sum_MD = torch.zeros(rows_MD.shape)
        sum_MD.index_add_(0, row_P.long(), out_PD.float() * weight_P[:, None])
        return sum_MD.to(rows_MD.dtype)


def toy_experts(view: View, uid: str, dtype: torch.dtype) -> ToyExperts:
    layers = view.placement.slots[uid]
    return ToyExperts({i: set(held) for i, held in zip(LAYERS, layers, strict=True)}, dtype)


def shape_of(view: View, roster: Roster, capacity: int, **options: Any) -> DecodeShape:
    return DecodeShape(
        num_sources=roster.num_sources,
        num_shards=roster.num_shards,
        num_experts=view.placement.num_experts,
        capacity=capacity,
        **options,
    )


def source_of(
    link: Link, view: View, shape: DecodeShape, dtype: torch.dtype, deadline_s: float = 30.0
) -> SourceExchange:
    uids = list(link.roster.shard_uids)
    host = {m.uid: m.endpoint.host for m in view.members}
    local = [host[uid] == host[link.uid] for uid in uids]
    tables = replica_tables(view, uids)
    homes = {i: home_shards(table, local, link.rank) for i, table in tables.items()}
    return SourceExchange(
        link, shape, dtype=dtype, home_tables=homes, replica_tables=tables,
        local_S=np.array(local, np.uint8), deadline_s=deadline_s,
    )  # fmt: skip


def shard_of(
    link: Link, view: View, shape: DecodeShape, dtype: torch.dtype, deadline_s: float = 30.0
) -> ShardExchange:
    experts = toy_experts(view, link.uid, dtype)
    return ShardExchange(link, shape, dtype=dtype, experts=experts, deadline_s=deadline_s)


Body = Callable[[Link, SourceExchange | ShardExchange], Any]


def run_members(
    view: View, body: Body, *, dtype: torch.dtype = torch.float32, capacity: int = 8,
    top_k: int = 4, width: int = 16, presummed: bool = False, world: World | None = None,
    generation: int = 7,
) -> dict[str, Any]:  # fmt: skip
    """Runs `body(link, exchange)` on every member of a fresh generation; its results by uid."""
    world = world or World()
    roster = Roster.of(view, generation)
    shape = shape_of(view, roster, capacity, top_k=top_k, width=width, presummed=presummed)
    unique_id = FakeNccl(world, "root").get_unique_id()

    def member(uid: str) -> Callable[[], Any]:
        def run() -> Any:
            nccl = FakeNccl(world, uid)
            rank = roster.rank_of(uid)
            comm = nccl.NcclCommunicator(len(roster.uids), unique_id, rank)
            link = Link(nccl, comm, CpuDevice(nccl), roster, uid)
            make = source_of if roster.is_source(rank) else shard_of
            result = body(link, make(link, view, shape, dtype))
            assert link.device.mark().ready(), "operations are outstanding"
            link.abort("over")
            return result

        return run

    return world.run({uid: member(uid) for uid in roster.uids})


def decode_naive(
    hidden_CD: Tensor, index_CK: Tensor, weight_CK: Tensor, layer: int, home_E: list[int]
) -> Tensor:
    """Slow twin of a presummed decode layer: each shard's part rounded, parts summed in the order
    in which a token's experts first name their shards."""
    out_CD = torch.zeros_like(hidden_CD)
    for t, (row_D, experts) in enumerate(zip(hidden_CD, index_CK.tolist(), strict=True)):
        parts: dict[int, Tensor] = {}
        for k, expert in enumerate(experts):
            if expert < 0:
                continue
            part = parts.setdefault(home_E[expert], torch.zeros(len(row_D)))
            made_1D = expert_output(row_D[None], torch.tensor([expert]), layer)
            part += made_1D[0].float() * weight_CK[t, k]
        total = torch.zeros(len(row_D))
        for part in parts.values():
            total += part.to(hidden_CD.dtype).float()
        out_CD[t] = total.to(hidden_CD.dtype)
    return out_CD
