"""What an actor is told at its start, and what it tells about itself while it loads."""

import os
from dataclasses import dataclass

import msgspec

RAY_NAMESPACE = "remora"


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far one actor's start has come; bytes of weights."""

    phase: str  # "starting", "loading", "ready", "died: ..."
    bytes_done: int
    bytes_total: int


class Tuning(msgspec.Struct, frozen=True, kw_only=True):
    """What every data-plane process is told about the machine it runs on."""

    num_threads: int  # of torch and of our kernels
    bind_ip: str  # address its sockets listen on
    transport: str  # "auto": Unix sockets on one host, TCP between hosts; "tcp": always TCP


def actor_name(deployment: str, uid: str, incarnation: int) -> str:
    """Ray name of one life of one member, in namespace `remora`."""
    return f"remora/{deployment}/{uid}#{incarnation}"


def coordinator_name(deployment: str) -> str:
    """Ray name of a deployment's coordinator, in namespace `remora`."""
    return f"remora/{deployment}/coordinator"


def thread_environment(num_threads: int) -> dict[str, str]:
    """Environment of a data-plane process; must be set before it starts.

    A waiting OpenMP thread that spins takes the core another process needs (measured: one linear
    62 us alone, 4,100 us beside another spinner; design notes of peers), hence passive waiting.
    """
    return {
        "OMP_NUM_THREADS": str(num_threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "MKL_NUM_THREADS": str(num_threads),
        "TOKENIZERS_PARALLELISM": "false",
        **{
            name: os.environ[name]
            for name in ("REMORA_NO_KERNELS", "REMORA_CACHE_DIR")
            if name in os.environ
        },
    }
