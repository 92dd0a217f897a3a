"""A model cut down to one rank's part, and the modules that bring the ranks' parts together.

    facts -> tp_plan.make_plan -> shrink (meta device) -> the same probe again -> load -> join

The probe sees the shrunk model run with the plan's shapes and local heads, so a plan that does not
fit its model fails there and not in its numbers. Legend: T token rows, D model width, C columns of
one rank, V vocabulary.
"""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remora.actors import model_build, model_probe
from remora.actors.model_spec import AttentionSpec, ModelSpec
from remora.actors.tp_plan import ModelFacts, TpPlan, is_head_cut, make_plan
from remora.comm.collectives import Group, group_sum, part_of
from remora.comm.errors import UnsupportedModelError


def facts_of(
    model: Any, attention: tuple[AttentionSpec, ...], linears: frozenset[str]
) -> ModelFacts:
    """What a plan looks at, of a whole model on the meta device; the others as in `ModelSpec`."""
    modules = {module: name for name, module in model.named_modules()}
    experts = tuple(f"{site.name}." for site in model_build.expert_sites(model))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    can_cut = type(embedding) is nn.Embedding, type(head) is nn.Linear
    if head is not None and embedding.weight is head.weight:  # they share what they are cut to
        can_cut = (all(can_cut),) * 2
    head_name = modules.get(head, "")
    return ModelFacts(
        layers=model_build.decoder_layers(model)[0],
        shapes={
            name: tuple(tensor.shape)
            for name, tensor in model.state_dict().items()
            if not name.startswith(experts)
        },
        linears=linears,
        attention=attention,
        declared=dict(model.tp_plan or {}),
        embedding=modules.get(embedding) if can_cut[0] else None,
        head=head_name if can_cut[1] and head_name in linears else None,
    )


def shrink(model: Any, plan: TpPlan) -> None:
    """Parameters on the meta device become as large as this rank's part of them."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, cut in plan.cuts.items():
        old = parameters[name]
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        new = torch.empty(cut.shape(tuple(old.shape)), dtype=old.dtype, device="meta")
        module._parameters[leaf] = nn.Parameter(new, requires_grad=False)
        if isinstance(module, nn.Linear) and leaf == "weight":
            module.out_features, module.in_features = new.shape


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a pass tells about a model's layers, as `shuffle_surgery` needs it.

    Attributes:
        ends: sums (path inside the layers, from the layer's index on) that are all that the module
            around them returns, or its first result.
        arguments: names that each decoder layer is called with, behind its rows; None where it is
            given more than rows by position.
    """

    ends: frozenset[str]
    arguments: tuple[frozenset[str] | None, ...]


def local_spec(
    model: Any, spec: ModelSpec, facts: ModelFacts, plan: TpPlan
) -> tuple[ModelSpec, Shape]:
    """`spec` with the attention that this rank computes, seen by the probe in the shrunk model.

    Raises:
        UnsupportedModelError: the shrunk model does not run, or has other heads than planned.
    """
    with _seeing_shape(model, facts, plan) as shape:
        watch = model_probe.watch_one_pass(model)
    local = []
    for index, full in enumerate(facts.attention):
        wanted = plan.local_attention(full, is_head_cut(plan, facts, index))
        seen = watch.layers[index].attention
        if seen != wanted:
            raise UnsupportedModelError(
                f"{spec.model_type}: layer {index} cut for tensor parallelism has {seen}, "
                f"planned was {wanted}"
            )
        local.append(wanted)
    return dataclasses.replace(spec, attention=tuple(local)), shape()


@contextlib.contextmanager
def _seeing_shape(model: Any, facts: ModelFacts, plan: TpPlan) -> Iterator[Callable[[], Shape]]:
    """Watch one pass; what is yielded gives the `Shape` afterwards."""
    prefix, layers = model_build.decoder_layers(model)
    assert prefix == facts.layers, f"{prefix} != {facts.layers}"
    arguments: list[frozenset[str] | None] = [None] * len(layers)
    sums: dict[str, Tensor] = {}
    ends: set[str] = set()

    def see_layer(index: int) -> Callable[..., None]:
        def hook(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
            arguments[index] = frozenset(kwargs) if len(args) == 1 else None

        return hook

    def see_sum(path: str) -> Callable[..., None]:
        def hook(_: Any, args: Any, output: Tensor) -> None:
            sums[path] = output

        return hook

    def see_parent(path: str) -> Callable[..., None]:
        def hook(_: Any, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if first is sums.get(path):
                ends.add(path.removeprefix(f"{prefix}."))

        return hook

    handles = [
        layer.register_forward_pre_hook(see_layer(index), with_kwargs=True)
        for index, layer in enumerate(layers)
    ]
    for path in plan.sums:
        handles.append(model.get_submodule(path).register_forward_hook(see_sum(path)))
        parent = model.get_submodule(path.rpartition(".")[0])
        handles.append(parent.register_forward_hook(see_parent(path)))
    try:
        yield lambda: Shape(ends=frozenset(ends), arguments=tuple(arguments))
    finally:
        for handle in handles:
            handle.remove()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One rank's part of a model."""

    plan: TpPlan
    group: Group
    shape: Shape
    head_width: int | None  # logits of the whole head where it is cut

    def whole_logits(self, local_RC: Tensor) -> Tensor:
        """[R, V] on rank 0 from every rank's columns; of no use on the others."""
        if self.head_width is None:
            return local_RC
        return self.group.gather_columns(local_RC, self.head_width)


def take_part(model: Any, spec: ModelSpec, group: Group) -> tuple[Part, ModelSpec]:
    """Shrink `model` (meta device, whole) to the part of this rank of `group`.

    Returns:
        The part, and `spec` with the attention that this rank computes.

    Raises:
        ConfigError: the heads cannot be divided by the number of ranks.
        UnsupportedModelError: the shrunk model does not run as planned.
    """
    facts = facts_of(model, spec.attention, spec.linears)
    plan = make_plan(facts, group.rank, group.size)
    shrink(model, plan)
    head_width = facts.shapes[f"{facts.head}.weight"][0] if facts.head else None
    local, shape = local_spec(model, spec, facts, plan)
    return Part(plan=plan, group=group, shape=shape, head_width=head_width), local


def whole_text(plan: TpPlan) -> str:
    """What every rank holds, for people."""
    names = [f"{name} ({why})" if why else name for name, why in sorted(plan.whole.items())]
    return f"whole on every rank: {', '.join(names) or 'no matrix'}; norms and other vectors"


def join(model: Any, part: Part) -> None:
    """Put the modules in that add up and look up over the ranks; after loading, before wrapping.

    Raises:
        UnsupportedModelError: a norm over all heads that is no plain RMS norm.
    """
    plan, group = part.plan, part.group
    for name in plan.zeros:
        model.get_parameter_or_buffer(name).zero_()
    for path in plan.sums:
        _replace(model, path, lambda linear: SummedLinear(linear, group))
    for path in plan.norms:
        _replace(model, path, lambda norm: WideNorm(norm, group))
    embedding = model.get_input_embeddings()
    for path in plan.vocabulary:
        if model.get_submodule(path) is embedding:
            _replace(model, path, lambda table: VocabularyEmbedding(table, group))


def _replace(model: Any, path: str, make: Callable[[Any], nn.Module]) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, make(model.get_submodule(path)))


class SummedLinear(nn.Module):
    """A linear over this rank's inputs whose results are added up over the ranks.

    `is_partial`: whoever comes behind adds them up (`shuffle_surgery`).
    """

    def __init__(self, linear: Any, group: Group) -> None:
        super().__init__()
        self.is_partial = False
        self.linear: Any = linear
        self.group = group.number
        self.is_native = group.is_native

    @property
    def weight(self) -> Tensor:
        """This rank's columns; models ask for its dtype."""
        weight: Tensor = self.linear.weight
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] of this rank -> [..., D], the same on every rank unless it is partial."""
        if self.is_partial:
            partial: Tensor = self.linear(x)
            return partial
        return group_sum(self.linear(x), self.group, self.is_native)


class VocabularyEmbedding(nn.Module):
    """An embedding of this rank's run of the token ids."""

    table: Tensor
    begin: Tensor

    def __init__(self, table: nn.Embedding, group: Group) -> None:
        super().__init__()
        self.register_buffer("table", table.weight.detach(), persistent=False)
        begin, end = part_of(group.rank, group.size, table.num_embeddings)
        # A tensor, not a constant: ranks then share what is compiled.
        self.register_buffer("begin", torch.tensor(begin), persistent=False)
        self.group = group.number
        self.is_native = group.is_native
        assert self.table.shape[0] == end - begin, f"{tuple(self.table.shape)} rows"

    @property
    def weight(self) -> Tensor:
        """This rank's rows; models ask for its dtype."""
        return self.table

    def forward(self, token_ids: Tensor) -> Tensor:
        """int64 ids of any rank -> [..., D]: zeros are added to the one row that is somewhere."""
        places = token_ids - self.begin
        is_here = (places >= 0) & (places < self.table.shape[0])
        rows = F.embedding(places.where(is_here, 0), self.table)
        return group_sum(rows.where(is_here[..., None], 0), self.group, self.is_native)


class WideNorm(nn.Module):
    """An RMS norm over the heads of all ranks: sums of squares are added up over the ranks.

    Args:
        norm: the model's own, with this rank's part of the weight.

    Raises:
        UnsupportedModelError: `norm` computes something else, on random values.
    """

    def __init__(self, norm: Any, group: Group) -> None:
        super().__init__()
        self.weight = norm.weight
        self.eps = float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0)) or 0.0)
        self.group = group.number
        self.is_native = group.is_native
        width = self.weight.shape[0]
        self.num_values = width  # as if it were alone, to be compared with the class' own
        forms = [form for form in (True, False) if self._is_like(norm, form)]
        if not forms:
            raise UnsupportedModelError(f"{type(norm).__name__} over all heads is no RMS norm")
        self.weighs_rounded = forms[0]
        # A head that several ranks hold is counted as often as its squares are.
        self.num_values = width * group.size

    def _is_like(self, norm: Any, weighs_rounded: bool) -> bool:
        """Whether this form gives what the class' own does, on random values and weights."""
        own = copy.deepcopy(norm)
        generator = torch.Generator().manual_seed(1)
        x = torch.randn((64, self.num_values), generator=generator).to(self.weight.dtype)
        with torch.no_grad():
            own.weight = nn.Parameter(x[0].clone())
            squares = x.float().pow(2).sum(-1, keepdim=True)
            mine = self._finish(x, x.float(), squares, own.weight, weighs_rounded)
            expected = own(x)
        if not torch.allclose(mine.float(), expected.float(), rtol=1e-2, atol=1e-3):
            return False
        # Which of the two is rounded first shows in the last bits of many values.
        allowed = 0.02 if x.dtype == torch.bfloat16 else 1.0
        return float((mine != expected).float().mean()) <= allowed

    def _finish(
        self, x: Tensor, x32: Tensor, squares: Tensor, weight: Tensor, weighs_rounded: bool
    ) -> Tensor:
        normed = x32 * torch.rsqrt(squares / self.num_values + self.eps)
        if weighs_rounded:
            return weight * normed.to(x.dtype)
        return (weight * normed).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] of this rank's heads, normed by the mean over all heads."""
        x32 = x.float()
        squares = group_sum(x32.pow(2).sum(-1, keepdim=True), self.group, self.is_native)
        return self._finish(x, x32, squares, self.weight, self.weighs_rounded)
