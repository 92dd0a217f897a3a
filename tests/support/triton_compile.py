"""Compiles Triton kernels for a GPU that is not there, through the host code that launches them.

`compiling(capability)` makes every launch compile down to a cubin (ptxas is in Triton's wheel) and
stop there. It needs a process in which `TRITON_INTERPRET` was never set: run as a script, with a
compute capability, this file compiles what is served in bfloat16 and prints it as JSON.
"""

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from remora.kernels import gpu_experts, gpu_pages, triton_runtime
from remora.kernels.attention import build_plan
from remora.kernels.gates import SILU, Gate
from remora.kernels.gpu_attention import gpu_attend
from remora.kernels.gpu_experts import CombineMode, GpuExperts
from remora.kernels.gpu_pages import GpuKVPages, GpuPlan, gpu_write_kv


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel as it would be loaded."""

    name: str
    shared_nbytes: int
    num_registers: int  # a thread; 255 is all there are
    spill_nbytes: int  # of stack a thread: registers that did not suffice
    uses_tensor_cores: bool


class _Driver:
    """As much of a driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._target.arch  # kernels are cached by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling(capability: int) -> Iterator[list[Compiled]]:
    """Launches on CPU tensors compile for `capability` (80: A100, 90: H100) and do not run.

    The list grows by one entry a kernel that had not been compiled before.
    """
    assert not triton_runtime.INTERPRETED, "TRITON_INTERPRET was set"
    found: dict[str, Compiled] = {}
    results: list[Compiled] = []

    def launch(kernel: JITFunction[Any], grid: tuple[int, ...]) -> Any:
        def compile_only(*args: Any, **kwargs: Any) -> None:
            assert all(0 < size for size in grid), f"{kernel.fn.__name__}: empty grid {grid}"
            compiled = kernel.warmup(*args, grid=grid, **kwargs)
            if compiled.hash not in found:
                found[compiled.hash] = _inspect(compiled)
                results.append(found[compiled.hash])

        return compile_only

    getitem = JITFunction.__getitem__
    triton.runtime.driver.set_active(_Driver(capability))
    JITFunction.__getitem__ = launch
    try:
        yield results
    finally:
        JITFunction.__getitem__ = getitem


def _inspect(compiled: Any) -> Compiled:
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    path = Path(triton.knobs.cache.dir) / f"{compiled.hash}.cubin"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(compiled.asm["cubin"])
    text = subprocess.run(
        [cuobjdump, "--dump-resource-usage", path], check=True, capture_output=True, text=True
    ).stdout
    path.unlink()
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED):(\d+)", text)}
    return Compiled(
        name=compiled.name,
        shared_nbytes=compiled.metadata.shared,
        num_registers=usage["REG"],
        spill_nbytes=usage["STACK"],
        uses_tensor_cores="mma" in compiled.asm["ptx"],
    )


def compile_experts(gate: Gate, num_pairs: int, mode: CombineMode, **flags: bool) -> None:
    """An expert layer of eight slots for so many pairs."""
    hidden, width, cpu = 512, 256, torch.device("cpu")
    experts = GpuExperts(
        8,
        hidden_size=hidden,
        intermediate_size=width,
        dtype=torch.bfloat16,
        device=cpu,
        gate=gate,
        has_gate=gate.columns == 2,
        **flags,
    )
    pair = torch.zeros(num_pairs, dtype=torch.int32)
    rows = torch.zeros(16, hidden, dtype=torch.bfloat16)
    experts.forward(rows, pair, pair, torch.zeros(num_pairs), mode)


def compile_attention(heads: int, kv_heads: int, k_dim: int, v_dim: int, *, exact: bool) -> None:
    """Decode and prefill over a long context, with every rule there is."""
    cpu, dtype = torch.device("cpu"), torch.bfloat16
    pages = GpuKVPages.allocate(80, kv_heads, k_dim, v_dim, dtype, cpu)
    for num_tokens in (1, 200):
        plan = GpuPlan.of(build_plan([1000], [num_tokens], [list(range(80))], num_tokens), cpu)
        k, v = (torch.zeros(num_tokens, kv_heads, d, dtype=dtype) for d in (k_dim, v_dim))
        gpu_write_kv(pages, k, v, plan)
        gpu_attend(
            torch.zeros(num_tokens, heads, k_dim, dtype=dtype),
            pages,
            plan,
            scale=0.1,
            sliding_window=700,
            attention_chunk=900,
            soft_cap=30.0,
            sinks_H=torch.zeros(heads),
            exact=exact,
        )


def main() -> None:
    """What is served in bfloat16, in every size of tile."""
    for module in (gpu_experts, gpu_pages):
        module.check_device = lambda device: None
    with compiling(int(sys.argv[1])) as kernels:
        for num_pairs in (8, 300, 2000):
            compile_experts(SILU, num_pairs, "presummed")
        clamped = Gate(alpha=1.702, gate_max=7.0, up_max=7.0, up_shift=1.0, layout="interleaved")
        compile_experts(clamped, 8, "ordered", exact=True, has_bias=True, is_transposed=True)
        compile_experts(Gate(activation="gelu"), 8, "ordered", int8=True)
        compile_experts(Gate(activation="relu2", layout="none"), 8, "ordered")
        compile_attention(32, 8, 128, 128, exact=False)
        compile_attention(16, 16, 192, 128, exact=True)
        compile_attention(8, 8, 256, 256, exact=False)
    print(json.dumps([dataclasses.asdict(kernel) for kernel in kernels]))


if __name__ == "__main__":
    main()
