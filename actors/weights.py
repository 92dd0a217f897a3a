"""From a checkpoint's tensors to a model's parameters, through `transformers`' own mapping.

A hub checkpoint may name and cut its tensors otherwise than the model does (one tensor per expert,
other module names); `transformers` knows how (`conversion_mapping.py`). `WeightPlan` asks it which
checkpoint tensors make which parameters, from headers alone, so that what is missing is found
before a byte is read; then each process reads only what it owns, one parameter (or one expert) at
a time, and runs `transformers`' own conversion on it.
"""

import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from remora.actors.checkpoint_files import Checkpoint
from remora.actors.tp_plan import Cut
from remora.comm.errors import WeightsError

Progress = Callable[[int, int], None]  # (bytes done, bytes in all), of the checkpoint's bytes
WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(slots=True)
class _Group:
    """Checkpoint tensors that are converted together."""

    targets: list[str]  # parameters that come out
    converter: Any  # transformers WeightConverter, None: one tensor, perhaps renamed
    sources: dict[str, list[str]] = field(default_factory=dict)  # pattern -> tensors, natural order

    def names(self) -> list[str]:
        """Every checkpoint tensor of the group."""
        return [name for names in self.sources.values() for name in names]


class WeightPlan:
    """Which tensors of `checkpoint` make which parameters and persistent buffers of `model`.

    Args:
        model: a `transformers` model on the meta device, before surgery, in the served dtype.
        checkpoint: open while the plan is used.
        dtype: served dtype; what `transformers` keeps in float32 stays in float32.
    """

    def __init__(self, model: Any, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self._model = model
        self._checkpoint = checkpoint
        self._shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
        self._dtypes = _target_dtypes(model, dtype)
        self._tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
        self.cuts: Mapping[str, Cut] = {}  # parameters of which this process takes a part
        self.unexpected: list[str] = []  # checkpoint tensors that the model has no place for
        self._group_of: dict[str, _Group] = {}
        for group in _group_sources(model, checkpoint, self.unexpected):
            for target in group.targets:
                self._group_of[target] = group

    def source_of(self, target: str) -> str | None:
        """The parameter that `target` shares its values with where the checkpoint has only one."""
        if target in self._group_of:
            return None
        for one, other in self._tied.items():
            if target in (one, other):
                twin = other if target == one else one
                if twin in self._group_of:
                    return twin
        return None

    def check_complete(self, targets: Iterable[str]) -> None:
        """Every one of `targets` can be made, as far as the headers tell.

        Raises:
            WeightsError: naming the tensor that is missing or has the wrong shape or dtype.
        """
        for target in targets:
            name = self.source_of(target) or target
            group = self._group_of.get(name)
            if group is None:
                raise WeightsError(
                    f"{self._checkpoint.directory}: nothing in the checkpoint gives {target!r} "
                    f"{self._shapes[target]}"
                )
            for source in group.names():
                self._check_dtype(source, name)
            if group.converter is None:
                entry = self._checkpoint.tensors[group.names()[0]]
                if entry.shape != self._shapes[name]:
                    raise WeightsError(
                        f"{entry.file}: tensor {group.names()[0]!r} has shape {entry.shape}, "
                        f"the model wants {self._shapes[name]}"
                    )

    def nbytes(self, targets: Iterable[str]) -> int:
        """Checkpoint bytes that `load` reads for `targets`."""
        names = {n for t in targets if t in self._group_of for n in self._group_of[t].names()}
        return sum(self._checkpoint.tensors[name].nbytes for name in names)

    def load(self, target: str) -> dict[str, Tensor]:
        """`target` and what comes out of the same conversion with it, in their served dtypes.

        Raises:
            WeightsError: naming file and tensor.
        """
        group = self._group_of[target]
        cut = self.cuts.get(target)
        if cut is not None and cut.dim == 0 and group.converter is None:
            return {target: self._read_rows(group, target, cut)}
        loaded = self._convert(group, lambda name: (name, None))
        for name, tensor in loaded.items():
            if tuple(tensor.shape) != self._shapes[name]:
                raise self._wrong_shape(group, name, tensor, self._shapes[name])
            if name in self.cuts:
                loaded[name] = self.cuts[name].of(tensor)
        return loaded

    def _read_rows(self, group: _Group, target: str, cut: Cut) -> Tensor:
        """The rows of a tensor that are wanted, and no others."""
        name, dtype = group.names()[0], self._dtypes[target]
        parts = [self._checkpoint.read(name, begin, end - begin) for begin, end in cut.spans]
        return torch.cat(parts).to(dtype)

    def load_expert(self, target: str, expert: int) -> Tensor:
        """Row `expert` of `target` `[E, ...]`, without the first dimension; reads only that expert.

        Raises:
            WeightsError: naming file and tensor.
        """
        group = self._group_of[target]
        num_experts, *shape = self._shapes[target]

        def pick(names: list[str]) -> tuple[str, int | None]:
            if len(names) == 1 and num_experts > 1:
                return names[0], expert
            return names[expert], None

        one = _Group([target], group.converter)
        rows: dict[str, int | None] = {}
        for pattern, names in group.sources.items():
            name, rows[name] = pick(names)
            one.sources[pattern] = [name]
        tensor = self._convert(one, lambda name: (name, rows[name]))[target]
        if group.converter is not None and tensor.dim() == len(shape):
            tensor = tensor[None]
        if tuple(tensor.shape) != (1, *shape):
            raise self._wrong_shape(one, target, tensor, (1, *shape))
        return tensor[0]

    def check_experts(self, target: str) -> None:
        """`target` `[E, ...]` has every expert, as far as the headers tell.

        Raises:
            WeightsError: naming the tensor of the first expert that is missing.
        """
        self.check_complete([target])
        group = self._group_of[target]
        num_experts = self._shapes[target][0]
        for pattern, names in group.sources.items():
            if len(names) == 1 and "*" not in pattern:
                shape = self._checkpoint.tensors[names[0]].shape
                if shape[:1] != (num_experts,):
                    raise WeightsError(
                        f"{self._checkpoint.tensors[names[0]].file}: tensor {names[0]!r} has "
                        f"shape {shape}, the model has {num_experts} experts"
                    )
                continue
            for expert in range(num_experts):
                if expert >= len(names) or f".{expert}." not in names[expert]:
                    raise WeightsError(
                        f"{self._checkpoint.directory}: expert {expert} of {num_experts} is "
                        f"missing: no tensor {pattern!r} for {target!r}"
                    )
        if group.converter is not None and len(group.sources) != len(
            group.converter.source_patterns
        ):
            missing = sorted(set(group.converter.source_patterns) - set(group.sources))
            raise WeightsError(
                f"{self._checkpoint.directory}: no tensor {missing[0]!r}, which {target!r} needs"
            )

    def expert_nbytes(self, target: str) -> int:
        """Checkpoint bytes of one expert of `target`."""
        num_experts: int = self._shapes[target][0]
        return self.nbytes([target]) // num_experts

    def _convert(
        self, group: _Group, locate: Callable[[str], tuple[str, int | None]]
    ) -> dict[str, Tensor]:
        """The parameters of `group`; `locate` gives the tensor and the row to read for a source."""
        target = group.targets[0]
        dtype = self._dtypes[target]
        if group.converter is None:
            return {target: self._read(*locate(group.names()[0]), dtype)}
        converter = copy.deepcopy(group.converter)
        for pattern, names in group.sources.items():
            for name in names:
                # transformers calls these one by one, and frees what it has used
                read = functools.partial(self._read, *locate(name), dtype)
                converter.add_tensor(target, name, pattern, read)
        try:
            made = converter.convert(target, model=self._model, config=self._model.config)
        except (RuntimeError, ValueError, IndexError, KeyError, AttributeError) as error:
            raise WeightsError(
                f"{self._checkpoint.tensors[group.names()[0]].file}: {group.names()[0]!r} "
                f"and its kind do not convert to {target!r}: {error}"
            ) from error
        return {name: t[0] if isinstance(t, list) else t for name, t in made.items()}

    def _read(self, name: str, row: int | None, dtype: torch.dtype) -> Tensor:
        tensor = self._checkpoint.read(name, row)
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    def _check_dtype(self, source: str, target: str) -> None:
        entry = self._checkpoint.tensors[source]
        if self._dtypes[target].is_floating_point and entry.dtype not in WEIGHT_DTYPES:
            raise WeightsError(
                f"{entry.file}: tensor {source!r} has dtype {entry.dtype}: quantised weights are "
                f"not served"
            )

    def _wrong_shape(
        self, group: _Group, name: str, tensor: Tensor, wanted: tuple[int, ...]
    ) -> WeightsError:
        source = group.names()[0]
        entry = self._checkpoint.tensors[source]
        return WeightsError(
            f"{entry.file}: tensor {source!r} {entry.shape} gives {name!r} the shape "
            f"{tuple(tensor.shape)}, the model wants {wanted}"
        )


def _group_sources(model: Any, checkpoint: Checkpoint, unexpected: list[str]) -> list[_Group]:
    """Checkpoint tensors by the parameters they make, as `transformers` itself would sort them."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    converter_of = {p: converter for converter in converters for p in converter.source_patterns}
    wanted = model.state_dict()
    prefix = model.base_model_prefix
    groups: dict[str, _Group] = {}
    for name in sorted(checkpoint.tensors, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
        if target not in wanted and name in wanted:
            target, pattern = rename_source_key(name, [], [], prefix, wanted)
        if target not in wanted:
            unexpected.append(name)
            continue
        converter = None if pattern is None else converter_of[pattern]
        if target not in groups:
            groups[target] = _Group(_targets(target, converter), converter)
        groups[target].sources.setdefault(name if pattern is None else pattern, []).append(name)
    return list(groups.values())


def _targets(first: str, converter: Any) -> list[str]:
    """Every parameter that a conversion whose first target is `first` gives."""
    if converter is None:
        return [first]
    patterns = converter.target_patterns
    return [first, *(first.replace(patterns[0], pattern) for pattern in patterns[1:])]


def _target_dtypes(model: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Served dtype of every parameter and persistent buffer, by `transformers`' own rules.

    A meta parameter already has the model's dtype, or another that its class insists on; the dtype
    plan adds what is kept in float32 (`_keep_in_fp32_modules*`).
    """
    from transformers.core_model_loading import build_glob_alternation

    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    plan = model._get_dtype_plan(dtype)
    if plan:
        pattern, by_group, _ = build_glob_alternation(list(plan))
        for name in dtypes:
            match = pattern.search(name)
            if match is not None and match.lastgroup is not None:
                dtypes[name] = plan[by_group[match.lastgroup]]
    return dtypes
