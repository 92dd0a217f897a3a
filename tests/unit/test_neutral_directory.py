"""The working directory of Ray's workers: on their import path, and nobody's to change."""

import importlib.machinery
import os
import stat
from pathlib import Path

from remora.cluster.bootstrap import NEUTRAL_DIR, neutral_runtime_env


def test_nothing_can_be_imported_from_where_workers_are() -> None:
    folder = Path(NEUTRAL_DIR)
    names = [entry.name.partition(".")[0] for entry in folder.iterdir()]
    assert names, "it is there"
    for name in [*names, "kernels", "comm", "actors"]:
        assert importlib.machinery.PathFinder.find_spec(name, [NEUTRAL_DIR]) is None, name


def test_only_the_system_can_change_it() -> None:
    found = os.stat(NEUTRAL_DIR)
    assert not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def test_it_is_used_where_it_lies() -> None:
    """What Ray unpacks, a second node of the same machine takes from under the first one's."""
    assert neutral_runtime_env() == {"working_dir": f"local://{NEUTRAL_DIR}"}
