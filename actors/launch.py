"""What an actor is told at its start, and what it tells about itself while it loads.

Nothing heavy is imported here: a process that joins reads this file before it has taken idle
priority (`light_process.py`).
"""

import ipaddress
import os
from dataclasses import dataclass

import msgspec
import ray

from remora.comm.view import Endpoint, Member, Role
from remora.kernels.experts_dtype import ExpertsDtype

RAY_NAMESPACE = "remora"
NO_RAY_HOST = "in-process"  # host label outside Ray: everything is in one process

# Ray puts its workers at niceness 15 once they have started, and starts them at 0: for the 0.8 s of
# CPU that a start takes, processes that serve had a thirtieth of the share (measured: streams stood
# for 400 ms). With this in its environment a worker stays at 0.
NORMAL_PRIORITY = {"RAY_worker_niceness": "0"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far one actor's start has come; bytes of weights."""

    phase: str  # "starting", "loading", "compiling", "ready", "died: ..."
    bytes_done: int = 0
    bytes_total: int = 0


class NcclLaunch(msgspec.Struct, frozen=True, kw_only=True):
    """How rows travel over NCCL."""

    capacity_max: int  # rows of a dense rank in a step of fixed sizes; more go in exact ones
    step_timeout_s: float


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """What every data-plane process is told."""

    deployment: str
    uid: str
    incarnation: int
    model: str  # checkpoint directory
    dtype: str  # "auto", "float32" or "bfloat16"
    exact: bool
    token: bytes  # the cluster's
    device: str = "cpu"  # what computes: "cpu" or "cuda", the GPU that Ray gave the process
    num_threads: int  # of torch and of our kernels
    bind_ip: str = "127.0.0.1"  # address its sockets listen on
    nccl: NcclLaunch | None = None  # rows travel over NCCL, not over sockets
    use_unix: bool = True  # listen on a Unix socket too, for peers of the same host
    report_every_s: float | None = None  # dense groups, to the router; None: there is none
    process_name: str | None = None  # in Ray; None: `actor_name`. Of a standby that was given this


class ShardLaunch(Launch, frozen=True, kw_only=True):
    """What an expert shard is told: decoder layer -> logical experts in slot order."""

    experts_by_layer: dict[int, tuple[int, ...]]
    num_slots: int | None = None  # of one layer; None: as many as it is given experts
    num_copies: int = 0  # slots of each layer beside them, for second copies
    experts_dtype: ExpertsDtype = "auto"  # what weights are held in
    copy_bytes_per_s: float | None = None  # at most, of experts that come later; None: any rate
    load_idle: bool = False  # load in time that nobody else wants: others serve beside it


def actor_name(deployment: str, uid: str, incarnation: int) -> str:
    """Ray name of one life of one member, in namespace `remora`."""
    return f"remora/{deployment}/{uid}#{incarnation}"


class ReplicaSource(msgspec.Struct, frozen=True, kw_only=True):
    """A shard from whose memory experts may be copied."""

    uid: str
    incarnation: int
    endpoint: Endpoint  # of its copies


class CopyOrder(msgspec.Struct, frozen=True, kw_only=True):
    """Experts that a shard is to take in, keyed by (decoder layer, expert), in this order."""

    digests: dict[tuple[int, int], str]  # what each is to be
    replicas: dict[tuple[int, int], tuple[str, ...]] = {}  # uids to copy from, best first
    sources: tuple[ReplicaSource, ...] = ()  # of those uids; the checkpoint is the last resort
    term: int = 0  # of the coordinator that orders
    share: float | None = None  # of the machine, to begin with (`CopyRate`); None: all, to the end
    is_urgent: bool = False  # requests wait for it: not at idle priority


STANDBY = "standby-"  # begins the uid of a process that waits to become a shard


def coordinator_name(deployment: str) -> str:
    """Ray name of a deployment's coordinator, in namespace `remora`."""
    return f"remora/{deployment}/coordinator"


def router_name(deployment: str) -> str:
    """Ray name of a deployment's router, in namespace `remora`."""
    return f"remora/{deployment}/router"


def host_label() -> str:
    """Which host this process is on: its Ray node, whatever the filesystem says."""
    if not ray.is_initialized():
        return NO_RAY_HOST
    label: str = ray.get_runtime_context().get_node_id()
    return label


def advertised_ip(bind_ip: str) -> str | None:
    """What peers must dial when `bind_ip` is a wildcard; None when it is an address itself."""
    if not ipaddress.ip_address(bind_ip).is_unspecified:
        return None
    ip: str = ray.util.get_node_ip_address()
    return ip


def member_of(launch: Launch, role: Role, endpoint: Endpoint) -> Member:
    """How a started process appears in the view."""
    return Member(
        uid=launch.uid,
        incarnation=launch.incarnation,
        role=role,
        endpoint=endpoint,
        actor_name=launch.process_name
        or actor_name(launch.deployment, launch.uid, launch.incarnation),
    )


def take_threads(num_threads: int) -> None:
    """Set this thread's share of the cores; call it in the one thread that calls torch."""
    import torch  # who calls this has it; see the head of this file

    torch.set_num_threads(num_threads)


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
        **NORMAL_PRIORITY,
        # Prefill's activations are megabytes: give them back to the heap, not to the kernel, or
        # every layer pays for fresh pages (measured: 1.26 -> 0.48 ms a layer of 512 rows).
        "MALLOC_MMAP_THRESHOLD_": str(256 << 20),
        "MALLOC_TRIM_THRESHOLD_": str(512 << 20),
        "MALLOC_TOP_PAD_": str(16 << 20),
        **{
            name: os.environ[name]
            for name in ("REMORA_NO_KERNELS", "REMORA_ISA", "REMORA_CACHE_DIR")
            if name in os.environ
        },
    }
