"""Every architecture that Remora promises, in both layouts, against `transformers`.

The bars of issue 2: float32 greedy tokens equal over 64 positions on prompts whose outputs do not
repeat, and a bfloat16 error of the logits of at most twice `transformers`' own.
"""

import re
from pathlib import Path

import pytest
import torch
from support.checkpoints import ARCHITECTURES
from support.parity import BF16_ERROR_RATIO_MAX, NEW_TOKENS, PROMPTS_MIN, compare, repeats


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tokens_and_errors_are_those_of_transformers(architecture: str, tmp_path: Path) -> None:
    hub, fused = compare(architecture, tmp_path)
    for parity in (hub, fused):
        assert parity.num_prompts >= PROMPTS_MIN
        assert parity.num_positions == NEW_TOKENS >= 64
        assert parity.num_different == 0, parity
        assert parity.logit_error_float32 < 1e-3, parity
        assert parity.is_identical, parity
    assert hub.bf16_error_ratio is not None
    assert hub.bf16_error_ratio <= BF16_ERROR_RATIO_MAX, hub


def test_the_readme_names_those_that_are_compared() -> None:
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    listed = re.search(r"in both weight layouts, of: ([\w, \n]+)\.", readme)
    assert listed is not None
    named = re.split(r",\s+|\s+and\s+", listed[1])
    assert sorted(named) == sorted(ARCHITECTURES)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [([1, 2, 3, 4, 5, 6, 7, 8], False), ([1, 2, 3, 4, 9, 1, 2, 3, 4], True), ([7] * 8, True)],
)
def test_a_loop_is_seen(tokens: list[int], expected: bool) -> None:
    assert repeats(torch.tensor(tokens)) is expected
