"""Every architecture on tensor-parallel dense ranks: the tokens of one rank.

Those are the tokens of `transformers` (`test_parity.py`); `benchmarks/parity.py --tp 2` compares
with it directly, in bfloat16 too. Ranks are threads of this process over real shared memory; each
holds its part of the weights.
"""

from pathlib import Path

import pytest
import torch
from support.checkpoints import ARCHITECTURES, VOCAB, make_checkpoint
from support.local_engine import LocalEngine
from support.tp_engine import TpEngine, groups_of

from remora.actors.dense_model import build_dense
from remora.actors.model_spec import inspect_model
from remora.comm.errors import ConfigError

NEW_TOKENS = 40
# Key/value heads on two ranks each; expanded latents; sinks and biases; norms over all heads.
ON_FOUR = ("qwen3_moe", "deepseek_v3", "gpt_oss", "minimax_m2")
RANKS = [(name, size) for name in ON_FOUR for size in (2, 4)]
OTHERS = [
    pytest.param(name, 2, marks=pytest.mark.long) for name in ARCHITECTURES if name not in ON_FOUR
]


def prompts(count: int) -> torch.Tensor:
    """int64 [count, 24]."""
    return torch.randint(3, VOCAB, (count, 24), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(("architecture", "size"), [*RANKS, *OTHERS])
def test_ranks_say_what_one_says(architecture: str, size: int, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, architecture)
    one = LocalEngine.load(path, dtype=torch.float32)
    several = TpEngine.load_ranks(path, one, size)
    expected = one.greedy(prompts(3), NEW_TOKENS)
    assert torch.equal(several.greedy(prompts(3), NEW_TOKENS), expected)
    assert len(set(expected.flatten().tolist())) > NEW_TOKENS // 2  # else equality proves little
    error = (several.forced(prompts(3)) - one.forced(prompts(3))).abs().max()
    assert float(error) < 1e-3
    several.close()


@pytest.mark.parametrize("layout", ["hub", "fused"])
def test_ranks_hold_parts(layout: str, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "mixtral", layout=layout)
    one = LocalEngine.load(path, dtype=torch.float32)
    two = TpEngine.load_ranks(path, one, 2)
    halves = [engine.dense.nbytes for engine in (two, *two.others)]
    assert halves[0] == halves[1] < 0.52 * one.dense.nbytes
    assert [a.num_kv_heads for a in two.dense.spec.attention] == [1, 1, 1]
    two.close()


def test_heads_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "mixtral")
    spec = inspect_model(path)
    groups = groups_of(3)
    with pytest.raises(ConfigError, match=r"4 query heads and 2 key/value heads.* 1, 2, 4 ranks"):
        build_dense(path, spec, dtype=torch.float32, exact=False, group=groups[1])
    for group in groups:
        group.close()


def test_exact_rows_do_not_know_each_other(tmp_path: Path) -> None:
    """A sequence alone and among others: bitwise equal logits at one number of ranks."""
    path = make_checkpoint(tmp_path, "olmoe")
    whole = LocalEngine.load(path, dtype=torch.bfloat16)
    two = TpEngine.load_ranks(path, whole, 2)
    together = two.forced(prompts(5))
    alone = torch.cat([two.forced(prompts(5)[i : i + 1]) for i in range(5)])
    assert torch.equal(together, alone)
    two.close()
