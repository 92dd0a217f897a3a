"""Which part of which parameter each rank of a tensor-parallel dense group holds. Pure.

    attention      by heads; key/value heads are replicated where there are fewer of them than ranks
    dense MLPs     by inner width, shared experts too
    vocabulary     embedding and head by rows, in runs of `part_of`
    all the rest   whole on every rank (routers, norms, low-rank projections), and said so

Which linears are cut by columns and which by rows the model's own plan (`base_model_tp_plan`) says
where it does; the names of `HEADS` and `MLP` say it where that plan leaves attention whole
(phimoe, granitemoe, hunyuan_v1_moe, deepseek_v3), gathers it (olmoe), does not name an MLP, or is
absent (gpt_oss). What is not recognised stays whole. A linear cut by rows gives a partial sum,
which its module adds up over the ranks; a norm over all heads needs all ranks' sums of squares.

Shapes: H query heads, J key/value heads.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

import torch
from torch import Tensor

from remora.actors.model_probe import AttentionSpec
from remora.comm.collectives import part_of
from remora.comm.errors import ConfigError

Kind = Literal["columns", "packed", "rows", "whole"]

# What `transformers` calls them. The gathers around norms are not needed: see `norms` below.
DECLARED: Final[dict[str, Kind]] = {
    "colwise": "columns",
    "colwise_gather_output": "columns",
    "packed_colwise": "packed",
    "rowwise": "rows",
    "rowwise_split_input": "rows",
    "mla_kv_a_proj": "whole",
    "replicated_with_grad_allreduce": "whole",
}
HEADS: Final[dict[str, Kind]] = {  # linears of an attention module
    "q_proj": "columns",
    "q_b_proj": "columns",
    "k_proj": "columns",
    "v_proj": "columns",
    "kv_b_proj": "columns",
    "o_proj": "rows",
    "q_a_proj": "whole",
    "kv_a_proj_with_mqa": "whole",
}
MLP: Final[dict[str, Kind]] = {"gate_proj": "columns", "up_proj": "columns", "down_proj": "rows"}
QUERIES: Final = {"q_proj", "q_b_proj"}
KEYS_VALUES: Final = {"k_proj", "v_proj"}
LATENT: Final = "kv_b_proj"  # expands to keys and values of every head
SINKS: Final = "sinks"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What the plan looks at."""

    layers: str  # name of the list of decoder layers
    shapes: Mapping[str, tuple[int, ...]]  # parameters and buffers outside the experts, full
    linears: frozenset[str]  # nn.Linear modules that the model calls
    attention: tuple[AttentionSpec, ...]  # one per decoder layer, full
    declared: Mapping[str, str]  # the model's own plan: pattern -> kind
    embedding: str | None = None  # nn.Embedding of the token ids
    head: str | None = None  # nn.Linear to logits


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """What a rank keeps of one parameter: `spans` of dimension `dim`, joined in order."""

    dim: int
    spans: tuple[tuple[int, int], ...]

    def shape(self, full: tuple[int, ...]) -> tuple[int, ...]:
        """Shape that is left of `full`."""
        count = sum(end - begin for begin, end in self.spans)
        return (*full[: self.dim], count, *full[self.dim + 1 :])

    def of(self, tensor: Tensor) -> Tensor:
        """This part of a whole tensor, with memory of its own."""
        parts = [tensor.narrow(self.dim, begin, end - begin) for begin, end in self.spans]
        return torch.cat(parts, dim=self.dim) if len(parts) > 1 else parts[0].clone()


@dataclass(slots=True, kw_only=True)
class TpPlan:
    """One rank's part.

    Attributes:
        cuts: parameters that are cut.
        zeros: biases of partial sums: rank 0 adds them, on the others they are zeros.
        sums: linears whose results are partial sums.
        norms: norms over all heads.
        vocabulary: the embedding and the head where they are cut.
        whole: parameters that every rank holds, as patterns (`*` for the layer) with their reason.
    """

    rank: int
    size: int
    cuts: dict[str, Cut] = field(default_factory=dict)
    zeros: set[str] = field(default_factory=set)
    sums: list[str] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    vocabulary: list[str] = field(default_factory=list)
    whole: dict[str, str] = field(default_factory=dict)

    def local_attention(self, spec: AttentionSpec, is_cut: bool) -> AttentionSpec:
        """Attention of a layer as this rank computes it."""
        if not is_cut:
            return spec
        return _with_heads(
            spec, spec.num_heads // self.size, max(1, spec.num_kv_heads // self.size)
        )


def make_plan(facts: ModelFacts, rank: int, size: int) -> TpPlan:
    """The part of rank `rank` of `size`.

    Raises:
        ConfigError: the heads of an attention layer cannot be divided by `size`.
    """
    plan = TpPlan(rank=rank, size=size)
    for index, spec in enumerate(facts.attention):
        prefix = f"{facts.layers}.{index}."
        for parent, names in sorted(_by_parent(facts.linears, prefix).items()):
            if "o_proj" in names:
                _cut_attention(plan, facts, parent, names, index, spec)
            else:
                _cut_mlp(plan, facts, parent, names)
    for module in (facts.embedding, facts.head):
        if module is not None:
            _cut_vocabulary(plan, facts, module)
    _note_whole(plan, facts)
    return plan


def check_heads(attention: tuple[AttentionSpec, ...], size: int) -> None:
    """Raises ConfigError where the heads of a layer cannot be divided over `size` ranks."""
    for index, spec in enumerate(attention):
        _check_heads(index, spec, size)


def _check_heads(index: int, spec: AttentionSpec, size: int) -> None:
    heads, kv_heads = spec.num_heads, spec.num_kv_heads
    if heads % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0):
        return
    allowed = [
        str(n)
        for n in range(1, heads + 1)
        if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)
    ]
    raise ConfigError(
        f"dense.tensor_parallel = {size}: layer {index} has {heads} query heads and {kv_heads} "
        f"key/value heads; they divide over {', '.join(allowed)} ranks"
    )


def _kinds_of(
    facts: ModelFacts, parent: str, names: set[str], ours: Mapping[str, Kind]
) -> dict[str, Kind]:
    """How each linear of a module is cut: as the model says, else as `ours` does."""
    kinds: dict[str, Kind] = {}
    for name in names:
        declared = _declared(facts, f"{parent}.{name}")
        kind = DECLARED.get(declared) if declared else None
        kinds[name] = kind or ours.get(name, "whole")
    return kinds


def is_head_cut(plan: TpPlan, facts: ModelFacts, index: int) -> bool:
    """Whether the attention of decoder layer `index` is cut by heads."""
    prefix = f"{facts.layers}.{index}."
    return any(path.startswith(prefix) and path.endswith(".o_proj") for path in plan.sums)


def _cut_attention(
    plan: TpPlan,
    facts: ModelFacts,
    parent: str,
    names: set[str],
    index: int,
    spec: AttentionSpec,
) -> None:
    kinds = _kinds_of(facts, parent, names, HEADS)
    why = _why_not_by_heads(facts, parent, names, kinds, spec)
    if why is not None:
        plan.whole[_pattern(facts, parent)] = why
        return
    _check_heads(index, spec, plan.size)
    heads = _span(plan.rank, plan.size, spec.num_heads)
    kv_heads = heads if LATENT in names else _kv_span(plan.rank, plan.size, spec.num_kv_heads)
    for name in sorted(names):
        path = f"{parent}.{name}"
        span, count = heads, spec.num_heads
        if name in KEYS_VALUES:
            span, count = kv_heads, spec.num_kv_heads
        if kinds[name] == "columns":
            _cut_columns(plan, facts, path, _scaled(span, facts.shapes[f"{path}.weight"][0], count))
        elif kinds[name] == "rows":
            _cut_rows(plan, facts, path, _scaled(span, facts.shapes[f"{path}.weight"][1], count))
    if f"{parent}.{SINKS}" in facts.shapes:
        plan.cuts[f"{parent}.{SINKS}"] = Cut(dim=0, spans=(heads,))
    _cut_norms(plan, facts, parent, names, spec, heads, kv_heads)


def _cut_norms(
    plan: TpPlan,
    facts: ModelFacts,
    parent: str,
    names: set[str],
    spec: AttentionSpec,
    heads: tuple[int, int],
    kv_heads: tuple[int, int],
) -> None:
    """Norms over the full width of queries or keys; those of one head, or of a latent, stay."""
    if LATENT in names:
        return
    widths = {
        spec.num_kv_heads * spec.k_dim: (kv_heads, spec.num_kv_heads),
        spec.num_heads * spec.k_dim: (heads, spec.num_heads),
    }
    for name, shape in facts.shapes.items():
        path, _, leaf = name.rpartition(".")
        if path.rpartition(".")[0] != parent or leaf != "weight" or len(shape) != 1:
            continue
        span, count = widths.get(shape[0], ((0, 0), 1))
        if count == 1 or shape[0] == spec.k_dim:
            continue
        plan.cuts[name] = Cut(dim=0, spans=(_scaled(span, shape[0], count),))
        plan.norms.append(path)


def _cut_mlp(plan: TpPlan, facts: ModelFacts, parent: str, names: set[str]) -> None:
    """Gate and up by columns, down by rows, where their widths fit and divide."""
    kinds = _kinds_of(facts, parent, names, MLP)
    rows = [name for name in sorted(names) if kinds[name] == "rows"]
    columns = [name for name in sorted(names) if kinds[name] in ("columns", "packed")]
    if len(rows) != 1 or not columns:
        return
    width = facts.shapes[f"{parent}.{rows[0]}.weight"][1]
    for name in columns:
        outputs = facts.shapes[f"{parent}.{name}.weight"][0]
        if outputs != width * (2 if kinds[name] == "packed" else 1):
            plan.whole[_pattern(facts, parent)] = f"{name} of {outputs} does not fit width {width}"
            return
    if width % plan.size:
        plan.whole[_pattern(facts, parent)] = f"width {width} is no multiple of {plan.size}"
        return
    begin, end = _span(plan.rank, plan.size, width)
    for name in columns:
        spans = [(begin, end)]
        if kinds[name] == "packed":
            spans.append((width + begin, width + end))
        _cut_columns(plan, facts, f"{parent}.{name}", *spans)
    _cut_rows(plan, facts, f"{parent}.{rows[0]}", (begin, end))


def _cut_vocabulary(plan: TpPlan, facts: ModelFacts, module: str) -> None:
    span = part_of(plan.rank, plan.size, facts.shapes[f"{module}.weight"][0])
    _cut_columns(plan, facts, module, span)
    plan.vocabulary.append(module)


def _cut_columns(plan: TpPlan, facts: ModelFacts, path: str, *spans: tuple[int, int]) -> None:
    for leaf in ("weight", "bias"):
        if f"{path}.{leaf}" in facts.shapes:
            plan.cuts[f"{path}.{leaf}"] = Cut(dim=0, spans=spans)


def _cut_rows(plan: TpPlan, facts: ModelFacts, path: str, span: tuple[int, int]) -> None:
    plan.cuts[f"{path}.weight"] = Cut(dim=1, spans=(span,))
    plan.sums.append(path)
    if f"{path}.bias" in facts.shapes and plan.rank:
        plan.zeros.add(f"{path}.bias")


def _why_not_by_heads(
    facts: ModelFacts, parent: str, names: set[str], kinds: Mapping[str, Kind], spec: AttentionSpec
) -> str | None:
    """Why an attention module stays whole; None where it can be cut by heads."""
    unknown = sorted(names - HEADS.keys())
    if unknown:
        return f"attention with {', '.join(unknown)}"
    other = sorted(name for name in names if kinds[name] != HEADS[name])
    if other:
        return f"the model's plan cuts {', '.join(other)} otherwise"
    if spec.has_sinks and f"{parent}.{SINKS}" not in facts.shapes:
        return "sinks that are no parameter of the attention module"
    outputs = facts.shapes[f"{parent}.o_proj.weight"][1]
    if outputs != spec.num_heads * spec.v_dim:
        return f"o_proj takes {outputs} values, {spec.num_heads} heads give {spec.v_dim} each"
    for name in names & (QUERIES | KEYS_VALUES | {LATENT}):
        count = spec.num_kv_heads if name in KEYS_VALUES else spec.num_heads
        if facts.shapes[f"{parent}.{name}.weight"][0] % count:
            return f"{name} does not divide into {count} heads"
    return None


def _note_whole(plan: TpPlan, facts: ModelFacts) -> None:
    """What every rank holds: matrices one by one, vectors (norms, biases) together."""
    for name, shape in facts.shapes.items():
        if name not in plan.cuts and len(shape) > 1:
            plan.whole.setdefault(_pattern(facts, name), "")


def _declared(facts: ModelFacts, path: str) -> str | None:
    """What the model's own plan says of a module, `*` standing for a number."""
    for name in (path, re.sub(r"\.\d+(?=\.|$)", ".*", path)):
        if name in facts.declared:
            return facts.declared[name]
    return None


def _by_parent(linears: frozenset[str], prefix: str) -> dict[str, set[str]]:
    parents: dict[str, set[str]] = {}
    for path in _under(linears, prefix):
        parent, _, name = path.rpartition(".")
        parents.setdefault(parent, set()).add(name)
    return parents


def _under(names: frozenset[str], prefix: str) -> Iterator[str]:
    return (name for name in sorted(names) if name.startswith(prefix))


def _pattern(facts: ModelFacts, name: str) -> str:
    return re.sub(rf"^{re.escape(facts.layers)}\.\d+", f"{facts.layers}.*", name)


def _span(rank: int, size: int, count: int) -> tuple[int, int]:
    return rank * count // size, (rank + 1) * count // size


def _kv_span(rank: int, size: int, count: int) -> tuple[int, int]:
    """Key/value heads of a rank: its run, or the one that its query heads look at."""
    if count >= size:
        return _span(rank, size, count)
    return rank * count // size, rank * count // size + 1


def _scaled(span: tuple[int, int], width: int, count: int) -> tuple[int, int]:
    """A run of heads as a run of `width` values, which `count` heads share equally."""
    each = width // count
    return span[0] * each, span[1] * each


def _with_heads(spec: AttentionSpec, num_heads: int, num_kv_heads: int) -> AttentionSpec:
    return AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        k_dim=spec.k_dim,
        v_dim=spec.v_dim,
        scale=spec.scale,
        sliding_window=spec.sliding_window,
        soft_cap=spec.soft_cap,
        has_sinks=spec.has_sinks,
    )
