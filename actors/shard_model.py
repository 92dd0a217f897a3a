"""The expert side of a model: experts in slots, computed with the model's own gate.

The experts modules of `transformers` are kept without their weights, one a layer: activation,
bias, clamping and layout are inherited from them (`_apply_gate`, `act_fn`, `post_expert_norm`).
The linears around them are ours, and so is the gate where one of ours computes the same
(`expert_gate`): then a layer is one native call (`kernels/expert_shard.py`). Legend: S slots, N
routed pairs (row, expert), M rows that came, D model width, I expert width, U = 2I with a gate and
I without.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from remora.actors.expert_reader import ExpertReader
from remora.actors.expert_state import ExpertDigest, ExpertState
from remora.actors.manifest import Manifest, digest_expert
from remora.actors.model_spec import ModelSpec
from remora.kernels import native
from remora.kernels.expert_shard import NativeShard
from remora.kernels.experts import PackedExperts
from remora.kernels.experts_dtype import ExpertsDtype
from remora.kernels.gates import Gate
from remora.kernels.linear import ROW_TILE
from remora.kernels.memory import give_back
from remora.kernels.quantization import held_as
from remora.kernels.routing import RouteSort, gather_rows, presum, route_sort

if TYPE_CHECKING:
    from remora.kernels.gpu_experts import GpuExperts

CombineMode = Literal["ordered", "presummed"]


@dataclass(slots=True, kw_only=True)
class ExpertLayer:
    """One MoE layer of this shard."""

    host: Any  # transformers' experts module, without weights
    name: str  # its full module name
    packed: "PackedExperts | GpuExperts"
    slot_of_E: Tensor  # int64 [E]: logical expert -> slot, -1 where the expert is not here
    slot_there_E: Tensor  # the same where the weights are
    gate: Gate | None  # ours that computes what the host's does, if there is one


class ShardExperts:
    """Routed experts of one shard. Calls are independent of each other; one thread calls.

    Attributes:
        dtype: served dtype; rows come and go in it.
        state: which slot holds what; changed by the methods here alone.
        reader: what it was loaded from, for more.
        experts_dtype: what weights are held in; "auto": in `dtype`.
        native: the same for a native caller, of the layers that it can compute; None without C++
            kernels.
    """

    def __init__(
        self,
        spec: ModelSpec,
        reader: ExpertReader,
        layers: dict[int, ExpertLayer],
        state: ExpertState,
        *,
        dtype: torch.dtype,
        exact: bool,
        experts_dtype: ExpertsDtype,
    ) -> None:
        self.spec = spec
        self.reader = reader
        self.dtype = dtype
        self.experts_dtype: ExpertsDtype = experts_dtype
        self._layers = layers
        self.state = state
        self._exact = exact
        self.native = NativeShard() if native.native_available() else None
        if self.native is not None:
            for index, held in layers.items():
                packed = held.packed
                if not isinstance(packed, PackedExperts) or held.host.has_post_expert_norm:
                    continue
                if held.gate is not None:
                    self.native.add_layer(index, packed, held.gate, held.slot_of_E)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots that a view may fill."""
        state = self.state
        return sum(state.num_slots(n) * self.nbytes_of(n) for n in self._layers)

    @property
    def copies_nbytes(self) -> int:
        """Bytes of second copies."""
        return sum(self.nbytes_of(layer) for layer, _ in list(self.state.copies))

    @property
    def manifest(self) -> Manifest:
        """Digests of every expert held."""
        return Manifest.of(held_as(self.experts_dtype, self.dtype), dict(self.state.digests))

    def forward(
        self,
        layer: int,
        rows_MD: Tensor,
        pair_row_N: Tensor,
        pair_expert_N: Tensor,
        pair_weight_N: Tensor,
        mode: CombineMode,
    ) -> Tensor:
        """Expert outputs of the routed pairs.

        Args:
            layer: decoder layer, one of `state.layers`.
            rows_MD: [M, D] in `dtype`.
            pair_row_N: int32 or int64, row of each pair, 0 <= row < M.
            pair_expert_N: int32 or int64, logical expert of each pair; all held
                (`state.not_mine` is empty).
            pair_weight_N: float32 or bfloat16; only `presummed` reads it.
            mode: `ordered`: one row per pair, not weighted, in pair order; `presummed`: one row
                per row that came, the weighted sum of its pairs (float32 inside).

        Returns:
            [N, D] or [M, D] in `dtype`.
        """
        held = self._layers[layer]
        slot_N = held.slot_of_E[pair_expert_N.long()]
        assert slot_N.numel() == 0 or int(slot_N.min()) >= 0, (
            f"layer {layer}: experts {self.state.not_mine(layer, pair_expert_N.tolist())} are not"
            " held"
        )
        if not isinstance(held.packed, PackedExperts):
            there = held.packed.device
            moved = [x.to(there) for x in (rows_MD, pair_row_N, pair_expert_N, pair_weight_N)]
            return self.forward_there(layer, *moved, mode=mode).to(rows_MD.device)
        pairs = pair_row_N, pair_expert_N, pair_weight_N
        if self.native is not None and layer in self.native:
            return self.native.call(layer, rows_MD, *pairs, presummed=mode == "presummed")
        return self.forward_in_steps(layer, rows_MD, *pairs, mode)

    def forward_there(
        self,
        layer: int,
        rows_MD: Tensor,
        pair_row_N: Tensor,
        pair_expert_N: Tensor,
        pair_weight_N: Tensor,
        *,
        mode: CombineMode,
    ) -> Tensor:
        """As `forward` on a GPU, whose tensors these are; without waiting. Not held: zeros, of any
        MoE layer: a layer without a slot is asked too where all shards answer every step."""
        held = self._layers.get(layer)
        if held is None:
            num_rows = rows_MD.shape[0] if mode == "presummed" else pair_row_N.shape[0]
            return rows_MD.new_zeros(num_rows, self.spec.hidden_size)
        assert not isinstance(held.packed, PackedExperts), f"layer {layer} is on the CPU"
        index_N = pair_expert_N.long()
        slot_N = held.slot_there_E[index_N.clamp(min=0)].masked_fill(index_N < 0, -1)
        with torch.no_grad():
            return held.packed.forward(rows_MD, pair_row_N, slot_N, pair_weight_N, mode)

    def missing_there(self, layer: int, experts: Tensor) -> Tensor:
        """Which of `experts` (on the GPU, negative = none) are not held: bool, same shape."""
        held = self._layers.get(layer)
        if held is None:
            return experts >= 0
        slots = held.slot_there_E[experts.long().clamp(min=0)]
        return (experts >= 0) & (slots < 0)

    def forward_in_steps(
        self,
        layer: int,
        rows_MD: Tensor,
        pair_row_N: Tensor,
        pair_expert_N: Tensor,
        pair_weight_N: Tensor,
        mode: CombineMode,
    ) -> Tensor:
        """As `forward`, one operator after the other: for gates and norms that only torch knows."""
        held = self._layers[layer]
        pair_row_N = pair_row_N.long()
        with torch.no_grad():
            sort = route_sort(held.slot_of_E[pair_expert_N.long()], held.packed.num_slots)
            out_ND = self._compute(held, rows_MD, pair_row_N, sort)
            if mode == "presummed":
                rows = rows_MD.shape[0]
                return presum(out_ND, pair_row_N, pair_weight_N, rows, sort.place_N)
            return gather_rows(out_ND, sort.place_N)

    def fill_slot(
        self, layer: int, expert: int, slot: int, tensors: Mapping[str, Tensor]
    ) -> ExpertDigest:
        """Write an expert into a free slot; the digest of what the slot holds now comes back.

        Nobody is served from it before `settle`. Another thread may do this while the shard
        serves: no call reads a slot that is not published.

        Raises:
            ValueError: tensors of the wrong names, shapes or dtype.
        """
        assert slot in self.state.free_slots(layer), f"layer {layer} slot {slot} is not free"
        self._layers[layer].packed.load_slot(slot, tensors)
        return self._digest(layer, expert, slot)

    def copy_slot(
        self, layer: int, expert: int, slot: int, write: Callable[[str, list[memoryview]], bool]
    ) -> ExpertDigest | None:
        """As `fill_slot`, where `write` puts bytes of a layout into the slot's memory.

        Returns:
            The digest; None: `write` said that it could not, or slots of this kind are not copied.
        """
        assert slot in self.state.free_slots(layer), f"layer {layer} slot {slot} is not free"
        packed = self._layers[layer].packed
        layout = packed.slot_layout()
        if layout is None or not write(layout, _memory(packed.slot_parts(slot))):
            return None
        packed.mark_loaded(slot)
        return self._digest(layer, expert, slot)

    def held_memory(self, layer: int, expert: int) -> tuple[str, list[memoryview]] | None:
        """Layout and bytes of an expert that is held, or of a second copy; None: it is neither, or
        cannot be copied.

        Valid while it is held: who reads on when it is not gets other bytes, and finds that by the
        digest.
        """
        slot = self.state.slot_in_memory(layer, expert)
        if slot is None:
            return None
        packed = self._layers[layer].packed
        layout = packed.slot_layout()
        return None if layout is None else (layout, _memory(packed.slot_parts(slot)))

    def nbytes_of(self, layer: int) -> int:
        """Bytes of one slot of a decoder layer."""
        packed = self._layers[layer].packed
        return packed.weight_nbytes // packed.num_slots

    def _digest(self, layer: int, expert: int, slot: int) -> ExpertDigest:
        return digest_expert(layer, expert, self._layers[layer].packed.export_slot(slot))

    def settle(self, slot: int, found: ExpertDigest, wanted: str) -> bool:
        """As `ExpertState.settle`: an expert is served from the next call on, or a slot is bad."""
        is_good = self.state.settle(slot, found, wanted)
        if is_good:
            self._publish(found.layer, found.expert, slot)
        self._give_up_beyond(found.layer)
        return is_good

    def drop_expert(self, layer: int, expert: int) -> None:
        """Serve an expert no more; its slot is free, unless it stays as a second copy."""
        slot = self.state.drop(layer, expert)
        if slot is not None:
            self._layers[layer].packed.clear_slot(slot)
        self._publish(layer, expert, -1)

    def settle_copy(self, slot: int, found: ExpertDigest, wanted: str) -> bool:
        """As `settle`, of a second copy, that nobody is served from."""
        is_good = self.state.settle_copy(slot, found, wanted)
        self._give_up_beyond(found.layer)
        return is_good

    def wants_copy(self, layer: int, expert: int) -> bool:
        """Whether a second copy can be made: of what is here in no form, in slots of a kind that
        others may copy from."""
        held = self._layers.get(layer)
        if held is None or held.packed.slot_layout() is None:
            return False
        return self.state.slot_in_memory(layer, expert) is None and self.state.may_copy(layer)

    def adopt_copy(self, layer: int, expert: int) -> str | None:
        """Serve what has been a second copy, from the next call on; its digest, or None: there is
        none."""
        slot = self.state.adopt_copy(layer, expert)
        if slot is not None:
            self._publish(layer, expert, slot)
        return self.state.digest_of(layer, expert)

    def give_up_copy(self, layer: int, expert: int) -> None:
        """Forget a second copy, and give its memory back to the system."""
        packed = self._layers[layer].packed
        slot = self.state.give_up_copy(layer, expert)
        packed.clear_slot(slot)
        for part in packed.slot_parts(slot):
            give_back(part)

    def _give_up_beyond(self, layer: int) -> None:
        for pair in self.state.copies_beyond(layer):
            self.give_up_copy(*pair)

    def _publish(self, layer: int, expert: int, slot: int) -> None:
        held = self._layers[layer]
        held.slot_of_E[expert] = held.slot_there_E[expert] = slot

    def _compute(
        self, held: ExpertLayer, rows_MD: Tensor, pair_row_N: Tensor, sort: RouteSort
    ) -> Tensor:
        """Outputs of the pairs in slot order: [N', D], N' >= N (rows beyond are padding)."""
        order_N = pair_row_N[sort.order_N]
        if self._exact and held.gate is None:
            # torch's elementwise kernels have scalar tails: only whole tiles of rows reach them.
            order_N = torch.nn.functional.pad(order_N, (0, -order_N.numel() % ROW_TILE), value=-1)
        assert isinstance(held.packed, PackedExperts), "a GPU computes a layer in one piece"
        x_ND = gather_rows(rows_MD, order_N)
        up_NU = held.packed.up(x_ND, sort.offsets_S1)
        out_ND = held.packed.down(_gate(held, up_NU), sort.offsets_S1)
        if held.host.has_post_expert_norm:
            out_ND = held.host.post_expert_norm(out_ND)
        return out_ND


def _memory(parts: list[Tensor]) -> list[memoryview]:
    return [part.numpy().data.cast("B") for part in parts]


def _gate(held: ExpertLayer, up_NU: Tensor) -> Tensor:
    """What stands between the two linears: [N, U] -> [N, I]."""
    if held.gate is not None:
        return held.gate.apply(up_NU)
    gate = held.host._apply_gate if held.host.has_gate else held.host.act_fn
    out: Tensor = gate(up_NU)
    return out.contiguous()
