"""Loads the native data plane; without it dispatch, combine and the shards' loop run in Python.

`REMORA_NO_KERNELS=1` forces the Python paths at run time, here as in `remora.kernels`.
"""

import ctypes
import hashlib
import importlib
import importlib.util
import logging
import os
from pathlib import Path
from typing import Any, Final

import torch

from remora.comm.accounting import LinkCounters
from remora.kernels.native import native_available as kernels_available

logger = logging.getLogger(__name__)


def _load() -> Any:
    """`remora.comm._C`, or None where it is not wanted or not there."""
    if os.environ.get("REMORA_NO_KERNELS") == "1":
        return None
    if importlib.util.find_spec("remora.comm._C") is None:
        logger.warning("the native data plane was not built (make setup), serving through Python")
        return None
    try:
        extension = importlib.import_module("remora.comm._C")
    except ImportError as error:  # built for another Python or another libstdc++
        logger.warning("remora.comm._C does not load, serving through Python: %s", error)
        return None
    built, here = extension.SOURCE_HASH, _source_hash()
    if built != here:  # an editable install whose checkout moved on
        logger.warning("native data plane built from %s, sources are %s: make setup", built, here)
    ours = ctypes.sizeof(LinkCounters)
    assert extension.COUNTERS_BYTES == ours, f"{extension.COUNTERS_BYTES} != {ours}: make setup"
    return extension


def _source_hash() -> str:
    """Of what the extension is made from, which the wheel carries too; as `setup.py` does it."""
    csrc = Path(__file__).parent / "csrc"
    paths = sorted(path for path in csrc.iterdir() if path.suffix in (".cpp", ".h"))
    digest = hashlib.blake2b(digest_size=6)
    kernels = csrc.parents[1] / "kernels" / "csrc"
    for path in (*paths, kernels / "expert_call.h", kernels / "step_experts.h"):
        digest.update(path.read_bytes())
    return digest.hexdigest()


_EXTENSION: Final = _load()


def native_extension() -> Any:
    """The loaded extension, or None (decided once, when this module is imported)."""
    return _EXTENSION


def park_address() -> int:
    """Address of the kernels' `void team_park()`, called before this thread waits; 0 = none."""
    return _team_address("team_park_address")


def wake_address() -> int:
    """Address of the kernels' `void team_wake()`, called after such a wait; 0 = none."""
    return _team_address("team_wake_address")


def _team_address(op: str) -> int:
    return int(getattr(torch.ops.remora, op)()) if kernels_available() else 0
