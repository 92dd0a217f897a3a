"""Tiles of AMX: rows that do not know each other, an emulation that gives the same bits.

Each instruction set is chosen once for a process, so the cases run in processes of their own.
"""

import pytest
from support.isa_script import run_under

from remora.kernels import native

pytestmark = pytest.mark.skipif(not native.native_available(), reason="C++ kernels not built")

# Experts with 1, 20, 40 and 70 rows: one tile of rows, two, several pairs of them; widths with and
# without tails of k and columns. Every routed row alone must give the bits it gives among others.
SCRIPT = """
import hashlib, sys, torch
from remora.kernels import native
from remora.kernels.expert_shard import NativeShard
from remora.kernels.experts import PackedExperts
from remora.kernels.gates import SILU
from remora.kernels.linear import PackedLinear
assert native.native_isa() == sys.argv[1], native.native_isa()
digest = hashlib.blake2b(digest_size=16)
torch.manual_seed(3)
for num_inputs, num_outputs in ((64, 64), (90, 55)):
    linear = PackedLinear.pack(torch.randn(num_outputs, num_inputs).bfloat16())
    x = torch.randn(200, num_inputs).bfloat16()
    y = linear(x)
    for count in (1, 2, 15, 16, 17, 31, 32, 33, 48, 70, 199):
        assert torch.equal(linear(x[-count:]), y[-count:]), (num_inputs, count)
    digest.update(y.view(torch.int16).numpy().tobytes())
for kind in ("auto", "int8", "int4"):
    for hidden, width in ((64, 64), (72, 40), (136, 56)):
        experts = PackedExperts(5, hidden_size=hidden, intermediate_size=width,
                                dtype=torch.bfloat16, experts_dtype=kind)
        for slot in range(5):
            experts.load_slot(slot, {name: torch.randn(shape).bfloat16() * shape[1] ** -0.5
                                     for name, shape in experts.slot_shapes().items()})
        shard = NativeShard()
        assert shard.add_layer(0, experts, SILU, torch.arange(5))
        expert = torch.tensor([0] + [1] * 20 + [2] * 40 + [3] * 70)
        expert = expert[torch.randperm(131)]
        row = torch.arange(131) % 77
        x, weight = torch.randn(77, hidden).bfloat16(), torch.rand(131)
        y = shard.call(0, x, row, expert, weight, presummed=False)
        assert y.isfinite().all() and y.abs().sum() > 0
        for pair in range(0, 131, 5):
            alone = shard.call(0, x[row[pair]][None], torch.zeros(1).int(), expert[pair][None],
                               weight[:1], presummed=False)
            assert torch.equal(alone[0], y[pair]), (kind, hidden, pair)
        bounds = torch.bincount(expert, minlength=5).cumsum(0)
        order = expert.argsort(stable=True)
        up = experts.up(x[row[order]], torch.cat([torch.zeros(1).long(), bounds]))
        gate, middle = up.float().chunk(2, dim=-1)
        rounded = (torch.nn.functional.silu(gate).bfloat16().float() * middle).bfloat16()
        down = experts.down(rounded, torch.cat([torch.zeros(1).long(), bounds]))
        assert (down - y[order]).abs().max() <= 0.03 * y.abs().max()
        digest.update(y.view(torch.int16).numpy().tobytes())
print(digest.hexdigest())
"""


def digest(isa: str) -> str:
    """What the script computed under this instruction set."""
    return run_under(isa, SCRIPT, isa)


def test_rows_on_emulated_tiles_do_not_know_each_other() -> None:
    assert digest("amx_emulated")


@pytest.mark.skipif(native.native_isa() != "amx_bf16", reason="no AMX here, or it is kept off")
def test_the_instructions_give_the_bits_of_the_emulation() -> None:
    assert digest("amx_bf16") == digest("amx_emulated")
