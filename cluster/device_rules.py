"""Which devices and transports go together; what does not is refused with what is allowed."""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from remora.cluster.config import RemoraConfig

Device = Literal["auto", "cpu", "cuda"]


def resolve(device: Device, num_gpus: float) -> Literal["cpu", "cuda"]:
    """What computes: the GPU where one is asked of Ray, unless it is said otherwise."""
    if device == "auto":
        return "cuda" if num_gpus > 0 else "cpu"
    return device


def check_devices(config: "RemoraConfig") -> None:
    """Raises ValueError for what cannot run, naming the keys."""
    dense, experts = config.dense, config.experts
    for section, placed in (("dense", dense), ("experts", experts)):
        if placed.computes_on == "cuda" and placed.num_gpus == 0:
            raise ValueError(
                f"{section}.device = cuda with {section}.num_gpus = 0: Ray shows a process no GPU"
                f" then; set {section}.num_gpus, or {section}.device: cpu"
            )
    if dense.computes_on == "cuda" and config.numerics == "exact":
        raise ValueError(
            "dense.device = cuda with numerics = exact: torch's linears on a GPU round with the"
            " batch; allowed are numerics: fast, or dense.device: cpu"
        )
    if dense.computes_on == "cuda" and config.executor == "compiled":
        raise ValueError(
            "dense.device = cuda with executor = compiled: layers are compiled for the CPU only;"
            " allowed are auto and eager"
        )
    held = config.experts_dtype
    if experts.computes_on == "cuda" and held != "auto":
        raise ValueError(
            f"experts.device = cuda with experts_dtype = {held}: {held} experts are computed on the"
            " CPU; allowed are experts_dtype: auto, or experts.device: cpu"
        )
    if dense.computes_on == "cuda" and dense.tensor_parallel > 1 and dense.num_gpus < 1:
        raise ValueError(
            f"dense.tensor_parallel = {dense.tensor_parallel} with dense.num_gpus ="
            f" {dense.num_gpus:g}: NCCL wants a GPU for each rank, so at least 1"
        )
    if experts.transport == "nccl":
        _check_nccl(config)


def _check_nccl(config: "RemoraConfig") -> None:
    """Raises ValueError where processes do not have one GPU each."""
    dense, experts = config.dense, config.experts
    for section, placed in (("dense", dense), ("experts", experts)):
        if placed.computes_on != "cuda" or placed.num_gpus < 1:
            raise ValueError(
                f"experts.transport = nccl with {section}.device = {placed.computes_on} and"
                f" {section}.num_gpus = {placed.num_gpus:g}: NCCL joins GPUs, one for each process;"
                " set device: cuda and num_gpus: 1 for dense and experts, or transport: auto or tcp"
            )
    if dense.tensor_parallel > 1:
        raise ValueError(
            f"experts.transport = nccl with dense.tensor_parallel = {dense.tensor_parallel}: ranks"
            " of a group reach shards over sockets (auto or tcp); with nccl it is 1"
        )
