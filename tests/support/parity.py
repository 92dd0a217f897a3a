"""Remora against `transformers` on one random checkpoint: the same tokens, and as small an error.

Greedy tokens in float32 must be equal over prompts whose outputs do not repeat (a model caught in a
loop agrees with anything). In bfloat16 the error of the logits against a float32 reference is
compared with that of `transformers` itself. Legend: B prompts, L positions, V vocabulary.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from support.checkpoints import VOCAB, make_checkpoint
from support.local_engine import LocalEngine, reference_model
from support.tp_engine import TpEngine
from torch import Tensor

PROMPT_TOKENS = 24
NEW_TOKENS = 64
CANDIDATES = 8  # prompts tried
PROMPTS_MIN = 3  # prompts that must remain when those with repeating outputs are left out
REPEAT_TOKENS = 4  # an output repeats when a run of this many tokens comes twice
BF16_ERROR_RATIO_MAX = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """One architecture in one layout."""

    architecture: str
    layout: str
    num_prompts: int
    num_positions: int  # per prompt
    num_different: int  # positions where the float32 tokens differ
    logit_error_float32: float  # largest difference of float32 logits
    bf16_error_ratio: float | None  # RMS error of bfloat16 logits, ours over transformers'

    @property
    def is_identical(self) -> bool:
        """What the bar counts."""
        within = self.bf16_error_ratio is None or self.bf16_error_ratio <= BF16_ERROR_RATIO_MAX
        return self.num_prompts >= PROMPTS_MIN and self.num_different == 0 and within


@dataclass(frozen=True, slots=True)
class Reference:
    """What `transformers` says: token ids [B, P + new] and logits [B, P + new, V]."""

    sequences_BL: Tensor
    logits_BLV: Tensor
    bf16_error: float

    @property
    def new_tokens(self) -> Tensor:
        """Tokens that it generated, [B, new]."""
        return self.sequences_BL[:, PROMPT_TOKENS:]


def compare(architecture: str, directory: Path, *, tp: int = 1) -> list[Parity]:
    """Both layouts of `architecture`, written below `directory`; bfloat16 with the first.

    `tp`: ranks that the dense side is divided over, threads of this process.
    """
    hub = make_checkpoint(directory / "hub", architecture, layout="hub")
    fused = make_checkpoint(directory / "fused", architecture, layout="fused")
    reference = make_reference(hub)
    return [
        compare_layout(architecture, "hub", hub, reference, with_bf16=True, tp=tp),
        compare_layout(architecture, "fused", fused, reference, with_bf16=False, tp=tp),
    ]


def make_reference(path: Path) -> Reference:
    """Generate with `transformers` in float32, keep outputs that do not repeat, run both dtypes."""
    model = reference_model(path, torch.float32)
    generator = torch.Generator().manual_seed(5)
    prompts = torch.randint(3, VOCAB, (CANDIDATES, PROMPT_TOKENS), generator=generator)
    sequences = model.generate(
        prompts, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    kept = [row for row in sequences if not repeats(row[PROMPT_TOKENS:])]
    assert len(kept) >= PROMPTS_MIN, f"{path}: only {len(kept)} outputs do not repeat"
    chosen = torch.stack(kept[:PROMPTS_MIN])
    coarse = reference_model(path, torch.bfloat16)
    with torch.no_grad():
        logits = model(chosen).logits
        error = rms(coarse(chosen).logits.float() - logits)
    return Reference(chosen, logits, error)


def compare_layout(
    architecture: str,
    layout: str,
    path: Path,
    reference: Reference,
    *,
    with_bf16: bool,
    tp: int = 1,
) -> Parity:
    """Remora on two in-process shards against what `transformers` said."""
    engine = load_engine(path, torch.float32, tp)
    made = engine.greedy(reference.sequences_BL[:, :PROMPT_TOKENS], NEW_TOKENS)
    logits = engine.forced(reference.sequences_BL)
    ratio = None
    if with_bf16:
        coarse = load_engine(path, torch.bfloat16, tp)
        error = rms(coarse.forced(reference.sequences_BL) - reference.logits_BLV)
        ratio = error / reference.bf16_error
    return Parity(
        architecture=architecture,
        layout=layout,
        num_prompts=len(made),
        num_positions=made.shape[1],
        num_different=int((made != reference.new_tokens).sum()),
        logit_error_float32=float((logits - reference.logits_BLV).abs().max()),
        bf16_error_ratio=ratio,
    )


def load_engine(path: Path, dtype: torch.dtype, tp: int) -> LocalEngine:
    """The checkpoint on two shards and `tp` dense ranks."""
    whole = LocalEngine.load(path, dtype=dtype)
    return whole if tp == 1 else TpEngine.load_ranks(path, whole, tp)


def repeats(tokens: Tensor) -> bool:
    """Whether a run of `REPEAT_TOKENS` tokens comes twice."""
    runs = [tuple(run) for run in tokens.unfold(0, REPEAT_TOKENS, 1).tolist()]
    return len(set(runs)) < len(runs)


def rms(error: Tensor) -> float:
    """Root of the mean square."""
    return float(error.double().pow(2).mean().sqrt())
