"""Living actors of the Ray cluster that a test is in: what the programs of benchmarks/ use."""

from collections.abc import Callable

from support.programs import benchmarks_on_path, program

with benchmarks_on_path():
    _found = program("ray_actors")
living_actors: Callable[[], dict[str, int]] = _found.living_actors
living_names: Callable[[str], list[str]] = _found.living_names
process_of: Callable[[str], int] = _found.process_of
