"""docs/commands.md is what `cluster/command_page.py` makes of the code."""

import re
from pathlib import Path

from remora.cluster import command_page

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "commands.md"
ROOMS = ("actors", "autoscale", "cluster", "comm", "kernels")


def test_the_page_is_what_the_program_prints() -> None:
    again = "`.venv/bin/python -P -m remora.cluster.command_page > docs/commands.md`"
    assert PAGE.read_text() == command_page.page(), f"make it again: {again}"


def test_every_flag_says_what_it_does() -> None:
    assert " None |" not in PAGE.read_text()


def test_every_variable_of_ours_is_there() -> None:
    paths = [path for room in ROOMS for path in (ROOT / room).rglob("*.*")]
    sources = [p.read_text() for p in paths if p.suffix in (".py", ".cpp", ".h")]
    read = set(re.findall(r'"(REMORA_[A-Z_]+)"', "\n".join(sources)))
    assert read == {name for name in command_page.ENVIRONMENT if name.startswith("REMORA_")}
