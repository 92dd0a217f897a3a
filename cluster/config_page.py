"""The page docs/configuration.md, from the code: every key, route, field of a request and metric.

    .venv/bin/python -P -m remora.cluster.config_page > docs/configuration.md

Meanings are the comments beside the fields, the docstrings of the routes and the help texts of the
metrics; `tests/unit/test_config_page.py` holds the page against them.
"""

import ast
import functools
import inspect
import tokenize
from collections.abc import Iterable, Iterator
from io import StringIO
from types import SimpleNamespace
from typing import Any, cast

from fastapi.routing import APIRoute

from remora.cluster.config import RemoraConfig
from remora.cluster.gate import OPEN_PATHS
from remora.cluster.ingress import build_app
from remora.cluster.metrics import COORDINATOR_GAUGES, IngressMetrics
from remora.cluster.openai_schema import (
    NOT_SERVED,
    ChatRequest,
    CompletionRequest,
    SamplingRequest,
)
from remora.cluster.service import Service
from remora.comm.checked import Section
from remora.comm.messages import EngineStats, PeerTraffic, Traffic

_HEAD = """\
# Configuration keys, HTTP routes, metrics

Made from the code by `.venv/bin/python -P -m remora.cluster.config_page`, which a test holds it
against.

A key is set in a YAML file (`--config`), by `--set KEY=VALUE`, or by a flag where there is one
([commands.md](commands.md)); flags win over the file, the file over the preset. A key that does not
exist is refused by name."""
_ROUTES = """\
## HTTP routes

{open_paths} take no key, `/v1/ep/*` admin keys alone,
the others API keys where there are any. `/openapi.json` has bodies, answers and statuses."""
_BODIES = """\
### Fields of a request

Both bodies: {common}.

`/v1/completions` also: {completion}.

`/v1/chat/completions` also: {chat}.

`null` is as if the field were absent. Types and bounds are in `/openapi.json`. Of `priority` the
smaller goes first; `domain` is a label for [routing statistics](statistics.md). `tools`,
`functions`, `suffix`, `best_of` and `response_format` may only say what is done without them.

Refused (400): {refused}. Fields that nobody knows are ignored."""
_METRICS = """\
## Metrics

`GET /metrics` of an ingress: what that ingress saw, and what dense groups and the coordinator told
it. A histogram is `_bucket`, `_sum` and `_count`; counters and histograms of what that ingress saw
have a gauge `_created`, the time of their start, too. [statistics.md](statistics.md) says what
"lately" is."""
_POLICY = "AutoscalePolicy"


def main() -> None:
    """Prints the page."""
    print(page(), end="")


def page() -> str:
    """All of it, ending in a newline."""
    open_paths = ", ".join(f"`{path}`" for path in sorted(OPEN_PATHS))
    about = _ROUTES.format(open_paths=open_paths)
    parts = [_HEAD, *sections(RemoraConfig, ""), about, *routes(), bodies(), _METRICS, *metrics()]
    return "\n\n".join(parts) + "\n"


def sections(model: type[Section], prefix: str) -> Iterator[str]:
    """A heading and a table for a section, and for those below it."""
    properties = model.model_json_schema()["properties"]
    below: list[tuple[str, type[Section]]] = []
    lines = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            below.append((f"{prefix}{name}.", inner))
            continue
        schema = properties[name]
        if field.is_required():
            default = "required"
        else:
            default = "empty" if field.default_factory else _default(schema["default"])
        cells = (f"`{prefix}{name}`", _value(schema), default, comments_of(model).get(name, ""))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    title = f"`{prefix[:-1]}`" if prefix else "The deployment"
    about = " ".join((model.__doc__ or "").split())
    yield f"## {title}"
    yield about
    yield "\n".join(line.rstrip() for line in lines)
    for inner_prefix, section in below:
        yield from sections(section, inner_prefix)


@functools.cache
def comments_of(model: type[Section]) -> dict[str, str]:
    """Field -> the comment above it and beside it, of a class and those that it inherits from."""
    found: dict[str, str] = {}
    for owner in reversed(model.__mro__):
        if issubclass(owner, Section) and owner is not Section:
            found |= _comments_in(inspect.getsource(owner))
    return found


def _comments_in(source: str) -> dict[str, str]:
    comments: dict[int, tuple[bool, str]] = {}  # line -> whether it stands alone, text
    for token in tokenize.generate_tokens(StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            alone = token.line[: token.start[1]].isspace()
            comments[token.start[0]] = alone, token.string.removeprefix("#").strip()
    (body,) = ast.parse(source).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for node in body.body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        above: list[str] = []
        line = node.lineno - 1
        while comments.get(line, (False, ""))[0]:
            above.insert(0, comments[line][1])
            line -= 1
        beside = [
            comments[at][1]
            for at in range(node.lineno, (node.end_lineno or node.lineno) + 1)
            if at in comments
        ]
        found[node.target.id] = " ".join([*above, *beside]).replace("None:", "null:")
    return found


def _value(schema: dict[str, Any]) -> str:
    """What a key may be, from its JSON schema."""
    if "anyOf" in schema:
        return ", ".join(_value(one) for one in schema["anyOf"])
    if "$ref" in schema:
        assert schema["$ref"].endswith(f"/{_POLICY}"), schema
        return "a policy ([autoscaling.md](autoscaling.md#policy-file))"
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{choice}`" for choice in schema["enum"])
    if schema.get("format") == "path":
        return "a path"
    kind = {
        "boolean": "`true`, `false`",
        "integer": "an integer",
        "null": "`null`",
        "number": "a number",
        "object": "a mapping",
        "string": "text",
    }[schema["type"]]
    return " ".join([kind, *_bounds(schema)])


def _bounds(schema: dict[str, Any]) -> Iterator[str]:
    least, most = schema.get("minimum"), schema.get("maximum")
    if "exclusiveMinimum" in schema:
        yield f"over {_number(schema['exclusiveMinimum'])}"
        if most is not None:
            yield f"to {_number(most)}"
    elif least is not None and most is not None:
        yield f"{_number(least)} to {_number(most)}"
    if "pattern" in schema:
        yield f"like `{schema['pattern']}`"
    if schema.get("minLength"):
        yield "not empty"


def _number(value: float) -> str:
    """Exact; digits in threes where they are many."""
    short = f"{value:g}"
    return f"{value:,.0f}" if value >= 1e4 and (float(short) != value or value < 1e9) else short


def _default(value: object) -> str:
    if value is None:
        return "`null`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, int | float):
        return f"`{_number(value).replace(',', '')}`"  # as it may be written
    return f"`{value}`"


def routes() -> Iterator[str]:
    """A table of what the endpoint answers."""
    lines = ["| request | what it is |", "|---|---|"]
    for route in build_app(_nothing_behind()).routes:
        if isinstance(route, APIRoute):
            (method,) = (route.methods or set()) - {"HEAD"}
            lines.append(f"| `{method} {route.path}` | {' '.join(route.description.split())} |")
    yield "\n".join(lines)


def bodies() -> str:
    """Names of the fields that requests for text may have."""
    common = SamplingRequest.model_fields
    return _BODIES.format(
        common=_listed(common),
        completion=_listed(CompletionRequest.model_fields.keys() - common.keys()),
        chat=_listed(ChatRequest.model_fields.keys() - common.keys()),
        refused=_listed(NOT_SERVED),
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def _nothing_behind() -> Service:
    """As much of a service as routes are made from; none of them is called."""
    model = SimpleNamespace(id="m", created_unix_s=0, root="m", max_model_len=1)
    serving = SimpleNamespace(metrics=IngressMetrics(dict), engine=None)
    parts = {"keys": None, "tokenizer": None, "operations": None}
    sizes = {"body_bytes_max": 1 << 20, "access_log": False}
    return cast(Service, SimpleNamespace(serving=serving, model=model, **parts, **sizes))


def metrics() -> Iterator[str]:
    """A table of what an ingress counts."""
    peer = PeerTraffic(uid="s", level="host", sent_bytes=0, received_bytes=0, load_ratio=0)
    traffic = Traffic(peers=[peer], remote_copies_per_token=0, local_activation_ratio=0)
    counted = IngressMetrics(
        lambda: {"dense-0": EngineStats()}, lambda: {"router": 0}, lambda: {"dense-0": traffic}
    )
    counted.coordinator = dict.fromkeys((name for name, _ in COORDINATOR_GAUGES), 0.0)
    counted.finished.labels("stop")
    counted.http.labels("/health", "200")
    lines = ["| name | kind | labels | help |", "|---|---|---|---|"]
    for metric in counted.registry.collect():
        labels = {label for sample in metric.samples for label in sample.labels} - {"le"}
        name = metric.name + ("_total" if metric.type == "counter" else "")
        shown = ", ".join(f"`{label}`" for label in sorted(labels))
        cells = (f"`{name}`", metric.type, shown, metric.documentation)
        lines.append(("| " + " | ".join(cells) + " |").replace("|  |", "| |"))
    yield "\n".join(lines)


if __name__ == "__main__":
    main()
