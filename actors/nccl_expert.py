"""An expert shard in step with the dense ranks over NCCL: its experts as the exchange calls them.

Legend: M rows of all sources, K top-k, P pairs, D model width, B rows of an answer.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from remora.actors.hardware import Hardware
from remora.actors.launch import NcclLaunch
from remora.actors.nccl_dense import shape_of
from remora.actors.shard_model import ShardExperts
from remora.comm.nccl_link import Link
from remora.comm.nccl_member import NcclMember
from remora.comm.nccl_messages import Refused, Ticket, ToConductor, ToMember
from remora.comm.nccl_shard import ShardExchange


class SlotExperts:
    """`DeviceExperts` over a shard's slots on a GPU; experts that are not held give zeros.

    Attributes:
        fault_1: int32 on the device, nonzero once an expert was asked for that is not held.
    """

    def __init__(self, shard: ShardExperts, device: torch.device) -> None:
        self._shard = shard
        self.fault_1 = torch.zeros(1, dtype=torch.int32, device=device)
        self._row_of: dict[tuple[int, int], Tensor] = {}  # (M, K) -> row of each pair

    def masked(
        self,
        layer: int,
        rows_MD: Tensor,
        expert_MK: Tensor,
        weight_MK: Tensor,
        out_BD: Tensor,
        *,
        presummed: bool,
    ) -> None:
        """See `DeviceExperts`."""
        num_rows, top_k = expert_MK.shape
        if (num_rows, top_k) not in self._row_of:
            at = rows_MD.device
            self._row_of[num_rows, top_k] = torch.arange(num_rows, device=at).repeat_interleave(
                top_k
            )
        row_N = self._row_of[num_rows, top_k]
        self._note_missing(layer, expert_MK)
        out_BD.copy_(
            self._shard.forward_there(
                layer, rows_MD, row_N, expert_MK.reshape(-1), weight_MK.reshape(-1),
                mode="presummed" if presummed else "ordered",
            )
        )  # fmt: skip

    def exact(
        self,
        layer: int,
        rows_MD: Tensor,
        row_P: Tensor,
        expert_P: Tensor,
        weight_P: Tensor,
        *,
        presummed: bool,
    ) -> Tensor:
        """See `DeviceExperts`."""
        self._note_missing(layer, expert_P)
        return self._shard.forward_there(
            layer,
            rows_MD,
            row_P,
            expert_P,
            weight_P,
            mode="presummed" if presummed else "ordered",
        )

    def _note_missing(self, layer: int, experts: Tensor) -> None:
        if experts.numel():
            self.fault_1.add_(self._shard.missing_there(layer, experts).any())


class NcclShard:
    """One shard. `serve` is the thread's that owns torch; `take` any.

    Args:
        hardware: the GPU.
        uid, incarnation: of this shard.
        shard: its experts, on that GPU.
        presummed: how answers come.
        launch: deadlines.
        reply: sends a message to the conductor.
    """

    def __init__(
        self,
        hardware: Hardware,
        *,
        uid: str,
        incarnation: int,
        shard: ShardExperts,
        presummed: bool,
        launch: NcclLaunch,
        reply: Callable[[ToConductor], None],
    ) -> None:
        assert hardware.nccl_device is not None, "NCCL joins GPUs"
        self._shard = shard
        self._presummed = presummed
        self._deadline_s = launch.step_timeout_s
        self._exchanges: dict[tuple[int, int], ShardExchange] = {}
        self.tickets_total = 0
        self.member = NcclMember(
            nccl=hardware.nccl(),
            device=hardware.nccl_device,
            uid=uid,
            incarnation=incarnation,
            reply=reply,
            work=self._work,
            emit=lambda step: None,
            step_deadline_s=launch.step_timeout_s,
        )

    def take(self, message: ToMember) -> None:
        """A message of the conductor's; a refusal is the dense ranks' business."""
        if not isinstance(message, Refused):
            self.member.post(message)

    def serve(self) -> None:
        """Until `close`. Raises ClusterError when this process must be replaced."""
        self.member.serve()

    def close(self) -> None:
        """Makes `serve` end after the ticket that runs."""
        self.member.close()

    def _work(self, link: Link, ticket: Ticket) -> None:
        exchange = self._exchange_of(link, ticket.capacity)
        call = exchange.exact if ticket.mode == "exact" else exchange.decode
        for layer in self._shard.spec.moe_layers:
            call(layer)
        self.tickets_total += 1

    def _exchange_of(self, link: Link, capacity: int) -> ShardExchange:
        generation = link.roster.generation
        if (generation, capacity) not in self._exchanges:
            kept = self._exchanges.items()
            self._exchanges = {k: v for k, v in kept if k[0] >= generation - 1}
            experts = SlotExperts(self._shard, link.device.torch_device)
            link.watch_fault(experts.fault_1)
            self._exchanges[generation, capacity] = ShardExchange(
                link,
                shape_of(link.roster, self._shard.spec, capacity, presummed=self._presummed),
                dtype=self._shard.dtype,
                experts=experts,
                deadline_s=self._deadline_s,
            )
        return self._exchanges[generation, capacity]
