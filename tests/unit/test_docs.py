"""What the pages name exists: links, files, commands, flags, keys, metrics, targets of make.

Each check takes its text as an argument, so that `test_checks_see` can show that it would catch
what it is there to catch.
"""

import argparse
import ast
import contextlib
import importlib
import io
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from remora.cluster import config_page
from remora.cluster.cli import parser
from remora.cluster.config import RemoraConfig
from remora.comm.checked import Section

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (
    *("actors", "autoscale", "cluster", "comm", "kernels", "manifests"),
    *("benchmarks", "docs", "examples", "tests", ".ci"),
)
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted(path for path in (ROOT / "examples").glob("*.*") if path.is_file()),
]
# With the first word of a section of the configuration, and no key: of the status, or a package.
NO_KEYS = {"router.address", "autoscale.log", "ray.serve", "ray.init"}


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def files() -> frozenset[str]:
    """What lies in the checkout, by its path."""
    below = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.*"))
    return frozenset(_name(path) for path in [*ROOT.glob("*.*"), *below])


def spans(text: str) -> list[str]:
    """What stands in backticks in the running text."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def anchors(text: str) -> set[str]:
    """Headings of a page, as a link names them."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def link_faults(page: Path, text: str) -> Iterator[str]:
    """Links to files that are not there, or to headings that are not in them."""
    for target in re.findall(r"\]\(([^()\s]+)\)", re.sub(r"`[^`\n]+`", "", text)):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name
        if not path.exists():
            yield f"no file {target}"
        elif anchor and anchor not in anchors(path.read_text() if name else text):
            yield f"no heading {target}"


def file_faults(text: str) -> Iterator[str]:
    """Sources and pages that are not there; a name alone may be in any folder."""
    known = files()
    for span in spans(text):
        if re.fullmatch(r"[\w./-]+\.(py|cpp|h|proto|md)", span):
            if span not in known and not any(path.endswith(f"/{span}") for path in known):
                yield f"no file {span}"


def commands(text: str) -> Iterator[str]:
    """Lines of code blocks that call `remora`, from that word on, without comments and pipes."""
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    blocks += re.findall(r"^    .+$", text, re.MULTILINE)
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        line = re.sub(r"(^|\s)#.*", "", line)
        found = re.search(r"(?:^\s*(?:\$ )?|\s-- )remora ([a-z].*)", line)
        if found is not None:
            yield re.split(r"[|;>]", found[1].translate({ord("["): None, ord("]"): None}))[0]


def command_faults(text: str) -> Iterator[str]:
    """Commands that the command line refuses."""
    for command in commands(text):
        refusal = io.StringIO()
        try:
            with contextlib.redirect_stderr(refusal):
                parser().parse_args(shlex.split(command))
        except SystemExit:
            yield f"remora {command}: {refusal.getvalue().splitlines()[-1]}"


@cache
def parsers() -> dict[tuple[str, ...], argparse.ArgumentParser]:
    """The parser behind each chain of subcommands."""
    found: dict[tuple[str, ...], argparse.ArgumentParser] = {}
    todo: list[tuple[tuple[str, ...], argparse.ArgumentParser]] = [((), parser())]
    while todo:
        words, one = todo.pop()
        found[words] = one
        for action in one._actions:
            if isinstance(action, argparse._SubParsersAction):
                todo += [((*words, word), sub) for word, sub in action.choices.items()]
    return found


@cache
def flags() -> frozenset[str]:
    """Every flag of every program of ours."""
    programs = [*(ROOT / "cluster").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    programs += [*(ROOT / "examples").glob("*.py"), *(ROOT / "tests").glob("conftest.py")]
    return frozenset(re.findall(r'"(--[a-z][\w-]*)"', "\n".join(p.read_text() for p in programs)))


def flag_faults(text: str) -> Iterator[str]:
    """Flags in backticks that the command beside them, or any program, does not have."""
    for span in spans(text):
        if span.startswith("--"):
            known: frozenset[str] | set[str] = flags()
        elif span.startswith("remora "):
            words = tuple(span.split()[1:])
            chain = next(words[:n] for n in (2, 1, 0) if words[:n] in parsers())
            known = set(parsers()[chain]._option_string_actions)
        else:
            continue
        yield from (
            f"{span}: no flag {flag}"
            for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", span)
            if flag not in known
        )


def is_key(path: list[str]) -> bool:
    """Whether the configuration has such a key, or section (the path of one, or `section.*`)."""
    model: object = RemoraConfig
    for name in path:
        if not (isinstance(model, type) and issubclass(model, Section)):
            return False
        if name == "*":
            return True
        if name not in model.model_fields:
            return False
        model = model.model_fields[name].annotation
    return True


def key_faults(text: str) -> Iterator[str]:
    """Dotted names that begin with a section of the configuration and are no key."""
    sections = {name for name in RemoraConfig.model_fields if is_key([name, "*"])}
    for span in spans(text):
        path = re.match(r"[a-z]+(\.[a-z_*]+)+(?=$|[ :=])", span)
        if path and path[0].split(".")[0] in sections and path[0] not in NO_KEYS:
            if not is_key(path[0].split(".")) and not span.endswith(".py"):
                yield f"no key {span}"


@cache
def metrics() -> frozenset[str]:
    """Names of all metrics."""
    (table,) = config_page.metrics()
    return frozenset(re.findall(r"^\| `(\w+)`", table, re.MULTILINE))


def metric_faults(text: str) -> Iterator[str]:
    """Metrics that no ingress has."""
    for span in spans(text):
        name = re.match(r"remora_[a-z_]+", span)
        if name and name[0] not in metrics():
            yield f"no metric {span}"


def target_faults(text: str) -> Iterator[str]:
    """Targets that the Makefile does not have, benchmarks that are not there or called otherwise
    than a reader can."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    called = re.findall(r"(?:^|`|\$ |    )make ([a-z_-]+)", text, re.MULTILINE)
    yield from (f"no make {t}" for t in called if t not in targets and not t.startswith("bench-"))
    programs = re.findall(r"make bench-([a-z_]+)", text)
    programs += re.findall(r"python benchmarks/([a-z_]+)\.py", text)
    yield from (f"no benchmark {p}" for p in programs if f"benchmarks/{p}.py" not in files())
    calls = re.findall(r"(?:^ *(?:\$ )?|`)([^`\n]*)python benchmarks/", text, re.MULTILINE)
    known = (".venv/bin/", "sudo .venv/bin/")
    yield from (f"called by {call!r}" for call in calls if call not in known)


def import_faults(text: str) -> Iterator[str]:
    """What examples in Python take from us and is not there."""
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            source = (isinstance(node, ast.ImportFrom) and node.module) or ""
            if not source.startswith("remora."):
                continue
            assert isinstance(node, ast.ImportFrom)
            module, folder = importlib.import_module(source), source.removeprefix("remora.")
            for name in (alias.name for alias in node.names):
                if not hasattr(module, name) and f"{folder}/{name}.py" not in files():
                    yield f"no {name} in {source}"


def faults(page: Path, text: str) -> list[str]:
    """All that is wrong with a page."""
    checks = (
        *(file_faults, command_faults, flag_faults, key_faults),
        *(metric_faults, target_faults, import_faults),
    )
    found = [*link_faults(page, text)] if page.suffix == ".md" else []
    return found + [fault for check in checks for fault in check(text)]


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_what_a_page_names_exists(page: Path) -> None:
    text = page.read_text()
    if page.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    found = faults(page, text)
    assert not found, "\n".join(found)


def test_checks_see() -> None:
    text = """\
# A page

[here](#a-page) [there](#b-page) [README](README.md#numerics-two-modes) [none](none.md)
`cluster/cli.py` `cli.py` `cluster/no.py` `--slots` `--slits` `remora drain --json`
`remora drain --shards 2` `dense.groups` `router.rebalance.*` `dense.gruops=2`
`remora_view_epoch{group}` `remora_view_epochs` `make test` `make tests`

```console
$ remora trace info FILE | less    # fine
$ remora trace info FILE \\
    --seconds 3
$ make bench-none
$ .venv/bin/python benchmarks/parity.py
$ alone .venv/bin/python benchmarks/parity.py
```

```python
from remora.comm import grpc_base, grpc_basis
```
"""
    assert faults(ROOT / "page.md", text) == [
        "no heading #b-page",
        "no file none.md",
        "no file cluster/no.py",
        "remora trace info FILE      --seconds 3:"
        " remora: error: unrecognized arguments: --seconds 3",
        "--slits: no flag --slits",
        "remora drain --shards 2: no flag --shards",
        "no key dense.gruops=2",
        "no metric remora_view_epochs",
        "no make tests",
        "no benchmark none",
        "called by 'alone .venv/bin/'",
        "no grpc_basis in remora.comm",
    ]
