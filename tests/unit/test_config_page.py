"""docs/configuration.md is what `cluster/config_page.py` makes of the code."""

from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field

from remora.cluster import config_page
from remora.cluster.config import parse_config
from remora.comm.checked import Section

PAGE = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"


class _Sample(Section):
    """A section."""

    # above, in
    # two lines;
    size: Annotated[int, Field(ge=1, le=2**31)] | None = 3  # beside; None: no bound
    plain: bool = False

    @property
    def other(self) -> int:  # no key
        return 1


def test_the_page_is_what_the_program_prints() -> None:
    again = "`.venv/bin/python -P -m remora.cluster.config_page > docs/configuration.md`"
    assert PAGE.read_text() == config_page.page(), f"make it again: {again}"


def test_comments_become_meanings() -> None:
    heading, about, table = config_page.sections(_Sample, "s.")
    assert heading == "## `s`" and about == "A section."
    assert table.splitlines()[2:] == [
        "| `s.size` | an integer 1 to 2,147,483,648, `null` | `3`"
        " | above, in two lines; beside; null: no bound |",
        "| `s.plain` | `true`, `false` | `false` |  |",
    ]


def test_every_key_says_what_it_means_and_its_default_is_allowed() -> None:
    rows = [line.split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    keys = [row for row in rows if len(row) == 4 and not row[0].startswith("| `remora_")]
    assert len(keys) > 70
    assert not [row[0] for row in keys if not row[3].strip(" |")]
    data: dict[str, object] = {"model": "m"}
    for name, _, default, _ in keys:
        if default not in ("required", "empty"):
            *path, last = name.strip("| `").split(".")
            section: dict[str, object] = data
            for part in path:
                section = section.setdefault(part, {})  # type: ignore[assignment]
            section[last] = yaml.safe_load(default.strip("`"))
    assert parse_config(data) == parse_config({"model": "m"})
