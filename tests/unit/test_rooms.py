"""The rules of the house, held: import arrows, pure cores, flat rooms, and sizes that only shrink.

`docs/architecture.md` and `CONTRIBUTING.md` say what the rules are for. The checks read source
text; nothing is imported. Each takes its input as an argument, so that `test_checks_see` can show
that it would catch what it is there to catch.
"""

import ast
import functools
import itertools
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# room -> what it may import of remora
ARROWS = {
    "kernels": set[str](),
    "comm": {"kernels"},
    "autoscale": {"comm"},
    "actors": {"comm", "kernels"},
    "cluster": {"actors", "autoscale", "comm", "kernels", "manifests"},
    "manifests": set[str](),
}
# room -> packages that belong to another room
FORBIDDEN = {
    "kernels": {"ray", "transformers", "fastapi", "grpc", "msgspec", "asyncio"},
    "comm": {"ray", "transformers", "fastapi"},
    "actors": {"fastapi", "ray.serve"},
    "autoscale": {"ray", "torch", "transformers", "fastapi", "asyncio", "time", "random"},
    "cluster": set[str](),
    "manifests": set[str](),
}
IMPURE = {"ray", "asyncio", "time", "random", "torch"}  # for *_state.py and autoscale, and beyond
PICKLES = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}

LINES_MAX = 400
FUNCTION_LINES_MAX = 70
# Files and functions over the bound when the rule came, with their size then. An entry may only
# shrink, and leaves when its file fits. Nothing new is added.
OVERSIZE: dict[str, int] = {}


def _sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


SOURCES = _sources(*ARROWS)
ALL_PYTHON = _sources(*ARROWS, "tests", "benchmarks")


@functools.cache
def parsed(text: str) -> ast.Module:
    """The syntax tree; several checks read each file."""
    return ast.parse(text)


def imports(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Every module that a file imports, wherever in it, and the line; "." starts a relative one.

    `from a.b import c` gives both `a.b` and `a.b.c`: `c` may be a module.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield base, node.lineno
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


def within(module: str, packages: set[str]) -> bool:
    """Whether `module` is one of `packages` or lies in one."""
    return any(module == package or module.startswith(package + ".") for package in packages)


def arrow_faults(room: str, text: str) -> list[str]:
    """Imports in a file of `room` that the arrows forbid."""
    faults = []
    for module, line in imports(parsed(text)):
        if module.startswith("."):
            faults.append(f"{line}: relative import {module!r}; say remora.{room}")
        elif module.split(".")[0] in ARROWS:
            faults.append(f"{line}: {module} is not a package; say remora.{module}")
        elif module.startswith("remora.") and module.split(".")[1] not in ARROWS[room] | {room}:
            faults.append(f"{line}: {room} may not import {module}")
        elif within(module, FORBIDDEN[room]):
            faults.append(f"{line}: {module} belongs to another room than {room}")
        elif within(module, PICKLES):
            faults.append(f"{line}: {module}: nothing is pickled here (safetensors, msgspec)")
    return faults


def impure_chains(start: str, texts: dict[str, str]) -> list[str]:
    """Ways from module `start` through our own modules to an impure one, as "a -> b -> torch"."""
    seen, todo, faults = {start}, [(start, start)], []
    while todo:
        module, chain = todo.pop()
        for target, line in imports(parsed(texts[module])):
            if within(target, IMPURE):
                faults.append(f"{chain}:{line} -> {target}")
            elif target in texts and target not in seen:
                seen.add(target)
                todo.append((target, f"{chain}:{line} -> {target}"))
    return faults


def swallowed(text: str) -> list[str]:
    """Handlers that catch everything and do nothing, and suppressions of everything."""
    broad = {"Exception", "BaseException"}
    faults = []
    for node in ast.walk(parsed(text)):
        if isinstance(node, ast.ExceptHandler):
            everything = node.type is None or (
                isinstance(node.type, ast.Name) and node.type.id in broad
            )
            if everything and all(isinstance(do, ast.Pass | ast.Continue) for do in node.body):
                faults.append(f"{node.lineno}: an exception is swallowed")
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
            if any(isinstance(arg, ast.Name) and arg.id in broad for arg in node.args):
                faults.append(f"{node.lineno}: suppress() of everything")
    return faults


def function_sizes(text: str) -> Iterator[tuple[str, int]]:
    """(name, lines without the docstring) of each function; an inner one counts in its outer."""
    for node in ast.walk(parsed(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        doc = node.body[0] if ast.get_docstring(node, clean=False) is not None else None
        doc_lines = (doc.end_lineno or 0) - doc.lineno + 1 if doc is not None else 0
        yield node.name, (node.end_lineno or 0) - node.lineno + 1 - doc_lines


def distribution_name(requirement: str) -> str:
    """`Ray[serve]>=2.60` -> `ray`, in the normal form of package names."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=~! ;]", requirement)[0]).lower()


def undocumented(text: str) -> list[str]:
    """Public classes and functions at the top level of a file that have no docstring."""
    return [
        f"{node.lineno}: {node.name} has no docstring"
        for node in parsed(text).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and ast.get_docstring(node) is None
    ]


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_imports_follow_the_arrows(path: Path) -> None:
    faults = arrow_faults(path.relative_to(ROOT).parts[0], path.read_text())
    assert not faults, "\n".join(f"{_name(path)}:{fault}" for fault in faults)


def drawn_arrows(text: str) -> dict[str, set[str]]:
    """Room -> rooms that an arrow of the page's picture goes to from it."""
    arrows: dict[str, set[str]] = {room: set() for room in ARROWS}
    for chain in re.findall(r"\w+(?: -> \w+)+", text):
        rooms = chain.split(" -> ")
        for start, end in itertools.pairwise(rooms):
            arrows[start].add(end)
    return arrows


def reached(room: str, arrows: dict[str, set[str]]) -> set[str]:
    """Rooms that arrows lead to from `room`, one behind the other."""
    return arrows[room].union(*(reached(end, arrows) for end in arrows[room]))


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_pages_draw_the_arrows(page: str) -> None:
    """What is drawn is allowed and used; nothing is allowed that no arrows lead to."""
    arrows = drawn_arrows((ROOT / page).read_text())
    for room, ends in arrows.items():
        allowed = ARROWS[room] - {"manifests"}  # data, in no picture
        assert ends <= allowed <= reached(room, arrows), room
        texts = "\n".join(path.read_text() for path in _sources(room))
        assert not [end for end in ends if f"from remora.{end}" not in texts], room


def test_the_table_of_rooms_says_what_is_forbidden() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| `(\w+)/` \|[^|]*\|([^|]*)\|$", page, re.MULTILINE)
    assert {room for room, _ in rows} == set(ARROWS)
    for room, never in rows:
        packages = {"clocks": "time", "chance": "random"}
        said = {packages.get(name, name) for name in re.findall(r"[\w.]+", never)}
        assert said <= FORBIDDEN[room], room


def test_cores_are_pure() -> None:
    """`*_state.py` and autoscale reach no ray, asyncio, time, random, torch, by any way."""
    texts = {f"remora.{_name(p)[:-3].replace('/', '.')}": p.read_text() for p in SOURCES}
    cores = [m for m in texts if m.endswith("_state") or m.startswith("remora.autoscale.")]
    faults = [chain for core in cores for chain in impure_chains(core, texts)]
    assert not faults, "\n".join(faults)


def test_dependencies_are_declared() -> None:
    """What a room imports is a dependency of ours, not only somebody else's."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["gpu"], *extras["forecast"]]
    declared = {distribution_name(requirement) for requirement in wanted}
    homes = packages_distributions()
    missing = set()
    for path in SOURCES:
        for module, line in imports(parsed(path.read_text())):
            top = module.split(".")[0]
            if top in sys.stdlib_module_names or top in ("remora", ""):
                continue
            if not declared & {distribution_name(home) for home in homes.get(top, [top])}:
                missing.add(f"{_name(path)}:{line}: {top}")
    assert not missing, "not in pyproject.toml:\n" + "\n".join(sorted(missing))


def test_rooms_are_flat() -> None:
    """A package inside a room works in the editable install and is missing from the wheel."""
    deep = [p for p in SOURCES if len(p.relative_to(ROOT).parts) != 2]
    assert not deep, f"Python files below a room: {[_name(p) for p in deep]}"
    bare = [room for room in ARROWS if not (ROOT / room / "py.typed").exists()]
    assert not bare, f"rooms without py.typed: {bare}"
    assert not (ROOT / "__init__.py").exists(), "the root is no package"


@pytest.mark.parametrize("path", ALL_PYTHON, ids=_name)
def test_code_is_plain(path: Path) -> None:
    text = path.read_text()
    faults = swallowed(text)
    if path in SOURCES:
        faults += undocumented(text)
    marks = ("TO" + "DO", "FIX" + "ME", "X" + "XX")
    faults += [
        f"{number}: {mark}"
        for number, line in enumerate(text.splitlines(), 1)
        for mark in marks
        if mark in line
    ]
    assert not faults, "\n".join(f"{_name(path)}:{fault}" for fault in faults)


def test_sizes_only_shrink() -> None:
    """Files of 400 lines, functions of 70; `OVERSIZE` lists what is larger and may only shrink."""
    native = sorted(path for room in ARROWS for path in (ROOT / room / "csrc").glob("*.*"))
    sizes = {_name(p): len(p.read_text().splitlines()) for p in [*ALL_PYTHON, *native]}
    over = {name: size for name, size in sizes.items() if size > LINES_MAX}
    for path in ALL_PYTHON:
        for function, size in function_sizes(path.read_text()):
            if size > FUNCTION_LINES_MAX:
                over[f"{_name(path)}::{function}"] = size
    grown = {name: size for name, size in over.items() if size > OVERSIZE.get(name, 0)}
    assert not grown, f"over {LINES_MAX} lines a file or {FUNCTION_LINES_MAX} a function: {grown}"
    fits = sorted(set(OVERSIZE) - set(over))
    assert not fits, f"these fit by now, take them out of OVERSIZE: {fits}"


def test_checks_see() -> None:
    """Each check finds what was planted for it."""
    assert arrow_faults("comm", "from remora.actors import blocks")
    assert arrow_faults("comm", "def f():\n    import remora.cluster.config")
    assert arrow_faults("comm", "from . import wire")
    assert arrow_faults("comm", "import kernels.routing")
    assert arrow_faults("actors", "from ray import serve")
    assert arrow_faults("actors", "import pickle")
    assert not arrow_faults("actors", "import ray\nfrom remora.comm import wire")
    texts = {"a_state": "from remora.comm import b", "remora.comm.b": "import torch.nn"}
    assert impure_chains("a_state", texts) == ["a_state:1 -> remora.comm.b:1 -> torch.nn"]
    assert not impure_chains("a_state", {"a_state": "import timeit, randomart"})
    assert swallowed("try:\n    f()\nexcept Exception:\n    pass")
    assert swallowed("with contextlib.suppress(Exception):\n    f()")
    assert not swallowed("try:\n    f()\nexcept KeyError:\n    pass")
    assert distribution_name("Prometheus_Client[x]>=0.2,<1") == "prometheus-client"
    assert undocumented("def f():\n    return 1") and not undocumented("def _f(): ...")
    assert list(function_sizes('def f():\n    """a\n    b"""\n    return 1')) == [("f", 2)]
