"""What int8 experts cost in quality: perplexity of the demo model on held-out text.

    .venv/bin/python benchmarks/quality.py --quick --json out.json

The same windows of the same text (none of it was trained on) through the same engine, its experts
once in bfloat16 and once in int8. The ratio is exp of the difference of mean losses; its range is
that over the domains.
"""

import json
import sys
from pathlib import Path

import common
import torch
from engines_report import Bar, Spread

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.local_engine import LocalEngine

from remora.actors.tokenizer import Tokenizer

SHARED = Path(__file__).resolve().parents[2] / "shared"
WINDOW = 256  # tokens, as the demo model was trained


def windows(model: Path, data: Path, per_domain: int) -> dict[str, torch.Tensor]:
    """Token windows [B, WINDOW] of each domain's held-out texts."""
    tokenizer = Tokenizer(model)
    found: dict[str, torch.Tensor] = {}
    for path in sorted(data.glob("*.heldout.jsonl")):
        kept: list[list[int]] = []
        for line in path.read_text().splitlines():
            tokens = tokenizer.encode(json.loads(line))
            if len(tokens) >= WINDOW:
                kept.append(tokens[:WINDOW])
            if len(kept) == per_domain:
                break
        if kept:
            found[path.name.partition(".")[0]] = torch.tensor(kept)
    return found


def loss_of(engine: LocalEngine, tokens_BL: torch.Tensor) -> float:
    """Mean negative log-likelihood a token, in nats."""
    total = 0.0
    for window_L in tokens_BL:
        logits = engine.forced(window_L[None])[0, :-1].double()
        log_probs = torch.log_softmax(logits, dim=-1)
        total -= float(log_probs.gather(1, window_L[1:, None]).mean())
    return total / len(tokens_BL)


def main() -> None:
    """Measure both and print."""
    parser = common.parser(__doc__)
    parser.add_argument("--model", type=Path, default=SHARED / "models" / "remora-demo")
    parser.add_argument("--data", type=Path, default=SHARED / "data" / "text")
    args = parser.parse_args()
    engines = {
        is_int8: LocalEngine.load(
            args.model, dtype=torch.bfloat16, mode="presummed", exact=False, is_int8=is_int8
        )
        for is_int8 in (False, True)
    }
    rows, losses, ratios = [], [], []
    for domain, tokens_BL in windows(args.model, args.data, 2 if args.quick else 8).items():
        plain, int8 = (loss_of(engines[is_int8], tokens_BL) for is_int8 in (False, True))
        losses.append(int8 - plain)
        ratios.append(float(torch.tensor(int8 - plain).exp()))
        rows.append(
            {
                "domain": domain,
                "windows": len(tokens_BL),
                "loss bf16": round(plain, 4),
                "loss int8": round(int8, 4),
                "perplexity ratio": round(ratios[-1], 5),
            }
        )
    overall = float(torch.tensor(losses).mean().exp())
    value = Spread(overall, min(ratios), max(ratios))
    bar = Bar(name="int8_perplexity_ratio", value=value, unit="x", op="<", target=1.01)
    common.finish("quality", args, rows, [bar])


if __name__ == "__main__":
    main()
