"""Plain data -> frozen pydantic model, with refusals that say what is allowed.

Configuration (`cluster/config.py`) and autoscaling policies (`autoscale/autoscale_policy.py`) are
both read this way: an unknown key, at any depth, is a `ConfigError` that names it, its nearest
allowed neighbour and all that is allowed.
"""

import difflib
import types
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from remora.comm.errors import ConfigError


class Section(BaseModel):
    """A mapping of known keys; frozen, unknown ones refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, protected_namespaces=())


SectionT = TypeVar("SectionT", bound=Section)


def parse_section(data: Mapping[str, Any], model: type[SectionT], *, source: str) -> SectionT:
    """Checked `model` from plain data.

    Raises:
        ConfigError: unknown key (named, with what is allowed and the nearest), or a bad value.
    """
    try:
        return model.model_validate(dict(data))
    except ValidationError as error:
        refuse_unknown(data, model, source=source)  # pydantic names no allowed key
        lines = []
        for item in error.errors():
            where = ".".join(str(part) for part in item["loc"]) or "value"
            got = "" if item["type"] in ("missing", "value_error") else f", got {item['input']!r}"
            lines.append(f"{where}: {item['msg'].removeprefix('Value error, ')}{got}")
        raise ConfigError(f"{source}: " + "; ".join(lines)) from None


def refuse_unknown(data: Mapping[str, Any], model: type[BaseModel], *, source: str) -> None:
    """Raises ConfigError for a key that `model` does not have, at any depth."""
    for path, allowed in _unknown_keys(data, model, ""):
        key = path.rpartition(".")[2]
        near = difflib.get_close_matches(key, allowed, n=2, cutoff=0.6)
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise ConfigError(f"{source}: unknown key {path!r}{hint}; allowed: {', '.join(allowed)}")


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, as YAML does: PyYAML would forget what came first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As the base class."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} stands here twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def yaml_value(text: str, source: str) -> Any:
    """What a YAML text says. Raises ConfigError: not YAML, or a mapping with a key twice."""
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not YAML: {error}") from None


def yaml_mapping(text: str, source: str) -> dict[str, Any]:
    """The mapping that a YAML text is; an empty text is an empty one.

    Raises:
        ConfigError: as `yaml_value`, or not a mapping.
    """
    data = yaml_value(text, source)
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: a mapping of keys is needed, got {type(data).__name__}")
    return data


def _unknown_keys(
    data: Mapping[str, Any], model: type[BaseModel], prefix: str
) -> Iterator[tuple[str, list[str]]]:
    allowed = sorted(model.model_fields)
    for key, value in data.items():
        if key not in model.model_fields:
            yield f"{prefix}{key}", allowed
            continue
        section = _section_of(model.model_fields[key].annotation)
        if section is not None and isinstance(value, Mapping):
            yield from _unknown_keys(value, section, f"{prefix}{key}.")


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if get_origin(annotation) in (Union, types.UnionType):
        return next((s for a in get_args(annotation) if (s := _section_of(a)) is not None), None)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return None
