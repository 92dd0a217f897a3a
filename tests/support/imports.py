"""What importing a module of ours imports at once, by its source."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "transformers", "numpy", "numba", "safetensors"}


def imported_at_once(module: str) -> set[str]:
    """Modules that importing one of ours imports: at the top of files, not for types alone."""
    seen: set[str] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        path = ROOT / f"{name.removeprefix('remora.').replace('.', '/')}.py"
        if name in seen or not path.exists():
            seen.add(name)
            continue
        seen.add(name)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                todo += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                todo += [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
    return {name.partition(".")[0] for name in seen} | seen
