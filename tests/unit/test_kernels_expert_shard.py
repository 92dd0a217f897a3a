"""One call for a layer's experts: the same bits as one operator after the other."""

import ctypes
from dataclasses import dataclass

import pytest
import torch
from support.isa_script import run_under
from torch import Tensor

from remora.kernels import native
from remora.kernels.expert_shard import NativeShard
from remora.kernels.experts import PackedExperts
from remora.kernels.gates import SILU, Gate
from remora.kernels.routing import gather_rows, presum, route_sort

pytestmark = pytest.mark.skipif(not native.native_available(), reason="C++ kernels not built")

NUM_EXPERTS = 7
CLAMPED = Gate(layout="interleaved", alpha=1.702, gate_max=7.0, up_max=7.0, up_shift=1.0)


class ExpertCall(ctypes.Structure):
    """`RemoraExpertCall` of kernels/csrc/expert_call.h."""

    _fields_ = (
        ("rows", ctypes.c_void_p),
        ("num_rows", ctypes.c_int64),
        ("pair_row", ctypes.c_void_p),
        ("pair_expert", ctypes.c_void_p),
        ("pair_weight", ctypes.c_void_p),
        ("num_pairs", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("presummed", ctypes.c_int32),
    )


@dataclass
class Layer:
    """Random experts in shuffled slots, and both ways to compute them."""

    experts: PackedExperts
    gate: Gate
    slot_of_E: Tensor
    shard: NativeShard

    def in_steps(
        self, rows: Tensor, row: Tensor, expert: Tensor, weight: Tensor, presummed: bool
    ) -> Tensor:
        sort = route_sort(self.slot_of_E[expert.long()], self.experts.num_slots)
        x = gather_rows(rows, row.long()[sort.order_N])
        up = self.experts.up(x, sort.offsets_S1)
        out = self.experts.down(self.gate.apply(up), sort.offsets_S1)
        if presummed:
            return presum(out, row.long(), weight, rows.shape[0], sort.place_N)
        return gather_rows(out, sort.place_N)


def make_layer(
    dtype: torch.dtype, gate: Gate = SILU, hidden: int = 64, width: int = 64, bias: bool = False
) -> Layer:
    generator = torch.Generator().manual_seed(hidden + width)
    experts = PackedExperts(
        NUM_EXPERTS,
        hidden_size=hidden,
        intermediate_size=width,
        dtype=dtype,
        has_gate=gate.columns == 2,
        has_bias=bias,
    )
    slot_of_E = torch.randperm(NUM_EXPERTS, generator=generator)
    for slot in slot_of_E.tolist():
        tensors = {
            name: (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(dtype)
            for name, shape in experts.slot_shapes().items()
        }
        experts.load_slot(slot, tensors)
    slot_of_E[3] = -1  # one that is not held
    shard = NativeShard()
    assert shard.add_layer(5, experts, gate, slot_of_E)
    return Layer(experts, gate, slot_of_E, shard)


def make_pairs(num_rows: int, num_pairs: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    held = torch.tensor([e for e in range(NUM_EXPERTS) if e != 3])
    row = torch.randint(0, max(1, num_rows), (num_pairs,), generator=generator)
    expert = held[torch.randint(0, len(held), (num_pairs,), generator=generator)]
    return row.int(), expert.int(), torch.rand(num_pairs, generator=generator)


@pytest.mark.parametrize("presummed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "gate,hidden,width,bias",
    [
        (SILU, 64, 128, False),  # halves of whole groups
        (SILU, 96, 40, True),  # halves that share a group
        (Gate(activation="gelu_tanh"), 32, 7, False),  # padding of both
        (CLAMPED, 96, 56, True),
        (CLAMPED, 32, 7, True),
        (Gate(activation="relu2", layout="none"), 64, 72, False),
        (Gate(activation="gelu", layout="none"), 200, 33, True),
    ],
)
def test_the_bits_are_those_of_the_steps(
    threads: int,
    gate: Gate,
    hidden: int,
    width: int,
    bias: bool,
    dtype: torch.dtype,
    presummed: bool,
) -> None:
    layer = make_layer(dtype, gate, hidden, width, bias)
    for num_rows, num_pairs in ((1, 1), (3, 8), (40, 90), (5, 0), (0, 0), (300, 1500)):
        rows = torch.randn(num_rows, hidden).to(dtype)
        pairs = make_pairs(num_rows, num_pairs)
        expected = layer.in_steps(rows, *pairs, presummed)
        assert torch.equal(layer.shard.call(5, rows, *pairs, presummed=presummed), expected)


def test_wide_layers_on_two_threads(threads: int) -> None:
    layer = make_layer(torch.bfloat16, hidden=512, width=256)
    for num_rows in (1, 4, 33):
        rows = torch.randn(num_rows, 512).bfloat16()
        pairs = make_pairs(num_rows, 4 * num_rows)
        for presummed in (True, False):
            expected = layer.in_steps(rows, *pairs, presummed)
            assert torch.equal(layer.shard.call(5, rows, *pairs, presummed=presummed), expected)


def native_calls(layer: Layer, *calls: tuple[Tensor, Tensor, Tensor, Tensor, bool]) -> list[Tensor]:
    """Through the C interface, all in one invocation; the outputs, preset to 99."""
    outs = [
        torch.full((len(rows) if presummed else len(row), rows.shape[1]), 99.0).to(rows.dtype)
        for rows, row, _, _, presummed in calls
    ]
    structs = (ExpertCall * len(calls))(
        *(
            ExpertCall(
                rows.data_ptr(),
                len(rows),
                row.data_ptr(),
                expert.data_ptr(),
                weight.data_ptr(),
                len(row),
                out.data_ptr(),
                presummed,
            )
            for (rows, row, expert, weight, presummed), out in zip(calls, outs, strict=True)
        )
    )
    prototype = ctypes.CFUNCTYPE(
        ctypes.c_int, ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32
    )
    entry = prototype(layer.shard.entry)
    verdict = entry(layer.shard.handle, 5, ctypes.addressof(structs), len(calls))
    assert verdict == 0 or all((out == 99).all() for out in outs)
    return [] if verdict else outs


def test_calls_of_several_are_merged() -> None:
    layer = make_layer(torch.bfloat16)
    calls = [
        (torch.randn(n, 64).bfloat16(), *make_pairs(n, p, seed=n), n % 2 == 0)
        for n, p in ((2, 5), (7, 30), (1, 1), (4, 0), (12, 300))
    ]
    for call, out in zip(calls, native_calls(layer, *calls), strict=True):
        assert torch.equal(out, layer.in_steps(*call))


def test_what_is_not_its_own_is_left_alone() -> None:
    layer = make_layer(torch.float32)
    rows, (row, expert, weight) = torch.randn(4, 64), make_pairs(4, 6)
    good = (rows, row, expert, weight, True)
    assert native_calls(layer, good)
    for place, bad in ((row, 4), (row, -1), (expert, 3), (expert, 7), (expert, -1)):
        before = place[2].item()
        place[2] = bad
        assert native_calls(layer, good, (rows, row.clone(), expert.clone(), weight, False)) == []
        with pytest.raises(IndexError):
            layer.shard.call(5, rows, row, expert, weight, presummed=True)
        place[2] = before
    with pytest.raises(RuntimeError, match="layer 6 is not held"):
        layer.shard.call(6, rows, row, expert, weight, presummed=True)


def test_a_slot_counts_as_soon_as_it_is_loaded() -> None:
    layer = make_layer(torch.float32)
    (slot,) = set(range(NUM_EXPERTS)) - set(layer.slot_of_E.tolist())
    rows, one = torch.randn(1, 64), torch.zeros(1, dtype=torch.int32)
    wanted = torch.full((1,), 3, dtype=torch.int32)
    with pytest.raises(IndexError, match="expert of layer 5 is not held"):
        layer.shard.call(5, rows, one, wanted, torch.ones(1), presummed=False)
    layer.experts.load_slot(slot, layer.experts.export_slot(int(layer.slot_of_E[0])))
    layer.slot_of_E[3] = slot
    copied = layer.shard.call(5, rows, one, wanted, torch.ones(1), presummed=False)
    first = layer.shard.call(5, rows, one, one, torch.ones(1), presummed=False)
    assert torch.equal(copied, first)


def test_rows_that_need_padding_are_left_to_python() -> None:
    experts = PackedExperts(2, hidden_size=33, intermediate_size=8, dtype=torch.bfloat16)
    assert not NativeShard().add_layer(0, experts, SILU, torch.arange(2))


SCRIPT = """
import ctypes, resource, threading
import torch
from remora.kernels.expert_shard import NativeShard
from remora.kernels.experts import PackedExperts
from remora.kernels.gates import SILU

def shard_of(hidden, width):
    experts = PackedExperts(1, hidden_size=hidden, intermediate_size=width, dtype=torch.bfloat16)
    shapes = experts.slot_shapes()
    experts.load_slot(0, {n: torch.zeros(s, dtype=torch.bfloat16) for n, s in shapes.items()})
    shard = NativeShard()
    assert shard.add_layer(0, experts, SILU, torch.zeros(1, dtype=torch.int64))
    return shard

PROTOTYPE = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32
)

def asker(shard, hidden, num_rows_max):
    rows, out = (torch.zeros(num_rows_max, hidden, dtype=torch.bfloat16) for _ in range(2))
    row = torch.arange(num_rows_max, dtype=torch.int32)
    expert, weight = torch.zeros_like(row), torch.ones(num_rows_max)
    entry = PROTOTYPE(shard.entry)

    def ask(num_rows):
        call = (ctypes.c_int64 * 8)(
            rows.data_ptr(), num_rows, row.data_ptr(), expert.data_ptr(), weight.data_ptr(),
            num_rows, out.data_ptr(), 1,
        )
        return entry(shard.handle, 0, ctypes.addressof(call), 1)

    return ask
"""


def test_a_process_may_end_while_a_thread_computes() -> None:
    """The shard used to be freed under the kernel: a process that ended crashed."""
    run_under(
        "amx_bf16",
        SCRIPT
        + """
begun = threading.Event()

def serve():
    ask = asker(shard_of(1024, 1024), 1024, 150)
    while ask(150) == 0:
        begun.set()

threading.Thread(target=serve, daemon=True).start()
assert begun.wait(60)
""",
    )


@pytest.mark.skipif(native.native_isa() == "portable", reason="kernels take no memory here")
def test_a_worker_without_memory_ends_the_call() -> None:
    """Its tasks were never done then, and those who waited for them looked for ever."""
    verdicts = run_under(
        "avx2",
        SCRIPT
        + """
HIDDEN = 1 << 17  # a group of so many inputs widens to 32 MiB, which the heap never has at hand
torch.set_num_threads(2)
ask = asker(shard_of(HIDDEN, 64), HIDDEN, 12)
print(ask(11))  # few rows: weights are widened in registers
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limits = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20), limits[1]))
print(ask(12))
resource.setrlimit(resource.RLIMIT_AS, limits)
print(ask(12))
""",
    )
    assert verdicts.split() == ["0", "4", "0"]
