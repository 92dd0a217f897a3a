"""Numbers that decoder layers carry, where nothing needs them."""

import ast
import functools
import inspect
import textwrap
from collections.abc import Hashable
from typing import Any, cast

from remora.actors import model_build


def forget_layer_numbers(model: Any) -> None:
    """A number that differs between equal layers would make each of them compile anew: it goes
    where it only names a layer's part of the cache, which pages have no use for."""
    _, layers = model_build.decoder_layers(model)
    for module in layers.modules():
        if hasattr(module, "layer_idx") and _only_names_cache(cast(Hashable, type(module))):
            cast(Any, module).layer_idx = 0


@functools.cache
def _only_names_cache(kind: Any) -> bool:
    """Whether a class uses `layer_idx`, after construction, only to name its part of the cache."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for function in (node for node in functions if node.name != "__init__"):
        calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
        naming = {
            id(argument)
            for call in calls
            if isinstance(call.func, ast.Attribute) and call.func.attr == "update"
            for argument in call.args
        }
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute) and node.attr == "layer_idx":
                if id(node) not in naming:
                    return False
    return True
