"""Loads the C++ kernels; without them every function of this room serves through torch, slower.

`REMORA_NO_KERNELS=1` forces the torch path at run time. `REMORA_ISA` (`portable`, `avx2`, `avx512`,
`avx512_bf16`, `amx_bf16`) lowers what the C++ kernels choose from the machine; it never raises it.
`amx_emulated` runs the tiling of AMX in plain C++ on any machine: for tests, slow.
"""

import hashlib
import importlib
import importlib.util
import logging
import os
from pathlib import Path
from typing import Final

import torch

logger = logging.getLogger(__name__)


def _load() -> bool:
    """Loads `remora.kernels._C`, which registers the `remora::` ops; whether it is there."""
    if os.environ.get("REMORA_NO_KERNELS") == "1":
        return False
    if importlib.util.find_spec("remora.kernels._C") is None:
        logger.warning("the C++ kernels were not built (make setup), serving through torch")
        return False
    try:
        importlib.import_module("remora.kernels._C")
    except ImportError as error:  # built for another torch or another libstdc++
        logger.warning("remora.kernels._C does not load, serving through torch: %s", error)
        return False
    built, here = str(torch.ops.remora.source_hash()), _source_hash()
    if built != here:  # an editable install whose checkout moved on
        logger.warning("C++ kernels built from sources %s, these are %s: make setup", built, here)
    return True


def _source_hash() -> str:
    """Of csrc, which the wheel carries too; as `setup.py` does it."""
    digest = hashlib.blake2b(digest_size=6)
    for path in sorted((Path(__file__).parent / "csrc").iterdir()):
        if path.suffix in (".cpp", ".h"):
            digest.update(path.read_bytes())
    return digest.hexdigest()


_AVAILABLE: Final = _load()


def native_available() -> bool:
    """Whether the C++ kernels are loaded (decided once, when this module is imported)."""
    return _AVAILABLE


def native_source_hash() -> str:
    """Hash of the sources of the loaded C++ kernels, or `torch` where they are not used."""
    return str(torch.ops.remora.source_hash()) if _AVAILABLE else "torch"


def native_isa() -> str:
    """Instruction set of the C++ kernels (`avx512_bf16`, ...); `torch` where they are not used."""
    if not _AVAILABLE:
        return "torch"
    return str(torch.ops.remora.isa())


def start_team() -> None:
    """Starts the kernels' helper threads, as many as torch's count asks for.

    They live as long as the process and have the priority of the thread that first needs them: a
    process that loads at idle priority has the thread do this that is to serve.
    """
    if _AVAILABLE and torch.get_num_threads() > 1:
        torch.ops.remora.team_probe(torch.get_num_threads(), -1)
