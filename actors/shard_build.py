"""Builds a shard: experts modules of a model without weights, and slots filled from a checkpoint.

Legend as in `shard_model.py`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from remora.actors import model_build
from remora.actors.draft import Draft, current_draft
from remora.actors.expert_gate import find_gate
from remora.actors.expert_reader import ExpertReader
from remora.actors.expert_state import ExpertDigest, ExpertState
from remora.actors.manifest import digest_expert
from remora.actors.model_spec import ModelSpec
from remora.actors.shard_model import ExpertLayer, ShardExperts
from remora.actors.weights import Progress, WeightPlan
from remora.comm.errors import WeightsError
from remora.kernels.device import CPU, home_of, make_experts
from remora.kernels.experts_dtype import ExpertsDtype

if TYPE_CHECKING:
    from remora.kernels.experts import PackedExperts
    from remora.kernels.gpu_experts import GpuExperts


def build_shard(
    path: str | Path,
    spec: ModelSpec,
    experts_by_layer: Mapping[int, Sequence[int]],
    *,
    dtype: torch.dtype,
    exact: bool,
    experts_dtype: ExpertsDtype = "auto",
    num_slots: int | None = None,
    num_copies: int = 0,
    progress: Progress | None = None,
    device: torch.device = CPU,
    draft: Draft | None = None,
) -> ShardExperts:
    """Load experts of a checkpoint into slots.

    Args:
        path: checkpoint directory.
        spec: of `inspect_model(path)`.
        experts_by_layer: decoder layer -> logical experts, in slot order.
        dtype: served dtype, float32 or bfloat16.
        exact: only whole tiles of rows reach torch's own kernels.
        experts_dtype: hold weights in int8 or int4, quantised here; `dtype` is bfloat16 then.
        num_slots: slots per layer; None: as many as the layer is given experts. A layer without
            a slot is left out.
        num_copies: slots of a layer beside them, for second copies; they take no memory before they
            are filled. None on a GPU.
        progress: called with (bytes done, bytes in all).
        device: where the experts live and compute; rows come and go on the CPU.
        draft: made in advance, and used up; it is made again where it is none of this call.

    Raises:
        WeightsError: naming file and tensor; or a slot does not hold what was written into it.
        RuntimeError: a GPU without Triton, or that is not there.
    """
    assert set(experts_by_layer) <= set(spec.moe_layers), (
        f"layers {sorted(experts_by_layer)} wanted, of MoE layers {spec.moe_layers}"
    )
    most = max(map(len, experts_by_layer.values()), default=0)
    assert num_slots is None or most <= num_slots, f"{most} experts of a layer, {num_slots} slots"
    draft = current_draft(draft, path, spec, dtype)
    with draft.checkpoint:
        reader = ExpertReader(draft, spec)
        for index in experts_by_layer:
            reader.check(index)
        counter = _Counter(reader, experts_by_layer, progress)
        layers: dict[int, ExpertLayer] = {}
        num_slots_of = {
            index: len(experts) if num_slots is None else num_slots
            for index, experts in experts_by_layer.items()
        }
        num_copies = num_copies if device.type == "cpu" else 0
        room = {index: count for index, count in num_slots_of.items() if count}
        state = ExpertState(room, num_copies)
        for index in state.layers:
            held = _empty_layer(
                spec,
                reader.sites[index],
                reader.plan,
                num_slots_of[index] + num_copies,
                dtype=dtype,
                exact=exact,
                experts_dtype=experts_dtype,
                device=device,
            )
            layers[index] = held
            for slot, expert in enumerate(experts_by_layer[index]):
                tensors = reader.read(index, expert)
                digest, read = _fill(held.packed, slot, index, expert, tensors, experts_dtype)
                if not state.settle(slot, digest, read.digest):
                    raise WeightsError(
                        f"layer {index} expert {expert}: slot {slot} holds {digest.digest} after"
                        f" loading, not {read.digest}, which was read: is the memory sound?"
                    )
                held.slot_of_E[expert] = held.slot_there_E[expert] = slot
                counter.loaded(index)
    return ShardExperts(
        spec, reader, layers, state, dtype=dtype, exact=exact, experts_dtype=experts_dtype
    )


def _fill(
    packed: "PackedExperts | GpuExperts",
    slot: int,
    layer: int,
    expert: int,
    tensors: Mapping[str, Tensor],
    experts_dtype: ExpertsDtype,
) -> tuple[ExpertDigest, ExpertDigest]:
    """Write an expert into a slot: digests of what the slot holds now, and of what it was to hold.

    Raises:
        WeightsError: it cannot be held in the quantised form.
    """
    try:
        packed.load_slot(slot, tensors)
    except ValueError as wrong:
        raise WeightsError(f"layer {layer} expert {expert}: {wrong}") from None
    if experts_dtype != "auto":
        held = digest_expert(layer, expert, packed.export_slot(slot))
        return held, held  # what is quantised is known by what a slot holds alone
    read = digest_expert(layer, expert, tensors)
    if packed.holds(slot, tensors):  # sooner found than a second digest
        return read, read
    return digest_expert(layer, expert, packed.export_slot(slot)), read


class _Counter:
    """Reports bytes loaded."""

    def __init__(
        self,
        reader: ExpertReader,
        experts_by_layer: Mapping[int, Sequence[int]],
        progress: Progress | None,
    ) -> None:
        self._of_layer = {layer: reader.nbytes(layer) for layer in experts_by_layer}
        self._total = sum(self._of_layer[i] * len(e) for i, e in experts_by_layer.items())
        self._done = 0
        self._progress = progress

    def loaded(self, layer: int) -> None:
        """One more expert of `layer`."""
        self._done += self._of_layer[layer]
        if self._progress is not None:
            self._progress(self._done, self._total)


def _empty_layer(
    spec: ModelSpec,
    site: model_build.ExpertsSite,
    plan: WeightPlan,
    num_slots: int,
    *,
    dtype: torch.dtype,
    exact: bool,
    experts_dtype: ExpertsDtype,
    device: torch.device,
) -> ExpertLayer:
    host: Any = site.module
    shapes = dict(spec.expert.shapes)
    for name in shapes:
        del host._parameters[name]
    for name, parameter in list(host.named_parameters()):  # what all experts share: a norm
        path, _, leaf = name.rpartition(".")
        loaded = plan.load(f"{site.name}.{name}")[f"{site.name}.{name}"]
        host.get_submodule(path)._parameters[leaf] = torch.nn.Parameter(
            loaded, requires_grad=parameter.requires_grad
        )
    if device.type == "cuda":
        host.to(device)  # what is left of it: that norm
    down = shapes["down_proj"]
    width = down[0] if host.is_transposed else down[1]
    gate = find_gate(host, width)
    packed = make_experts(
        device,
        num_slots,
        hidden_size=spec.hidden_size,
        intermediate_size=width,
        dtype=dtype,
        gate=gate or (host._apply_gate if host.has_gate else host.act_fn),
        post=host.post_expert_norm if host.has_post_expert_norm else None,
        has_gate=host.has_gate,
        has_bias=host.has_bias,
        is_transposed=host.is_transposed,
        exact=exact,
        experts_dtype=experts_dtype,
    )
    assert packed.slot_shapes() == shapes, f"{site.name}: {packed.slot_shapes()} != {shapes}"
    slot_of_E = torch.full((spec.num_experts,), -1, dtype=torch.int64)
    return ExpertLayer(
        host=host,
        name=site.name,
        packed=packed,
        slot_of_E=slot_of_E,
        slot_there_E=slot_of_E.to(home_of(device)),
        gate=gate,
    )
