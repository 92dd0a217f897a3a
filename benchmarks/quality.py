"""What int8 and int4 experts cost in quality: perplexity of the demo model on held-out text.

    .venv/bin/python benchmarks/quality.py --quick --json out.json

The same windows of the same text (none of it was trained on) through the same engine, its experts
once in bfloat16 and once in each quantised form, as a deployment would load and compute them. The
ratio is exp of the difference of mean losses; its range is that over the domains.
"""

import json
import math
import sys
from pathlib import Path

import common
import torch
from engines_report import Bar, Spread
from locations import DEMO_MODEL, TEXTS, text_files

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.local_engine import LocalEngine

from remora.actors.tokenizer import Tokenizer
from remora.kernels.experts_dtype import ExpertsDtype

WINDOW = 256  # tokens, as the demo model was trained
FORMS: tuple[ExpertsDtype, ...] = ("int8", "int4")


def windows(model: Path, data: Path, per_domain: int) -> dict[str, torch.Tensor]:
    """Token windows [B, WINDOW] of each domain's held-out texts."""
    tokenizer = Tokenizer(model)
    found: dict[str, torch.Tensor] = {}
    for path in text_files(data, "heldout"):
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


def losses_of(model: Path, form: ExpertsDtype, texts: dict[str, torch.Tensor]) -> dict[str, float]:
    """Loss of each domain with experts held in this form."""
    engine = LocalEngine.load(
        model, dtype=torch.bfloat16, mode="presummed", exact=False, experts_dtype=form
    )
    return {domain: loss_of(engine, tokens_BL) for domain, tokens_BL in texts.items()}


def main() -> None:
    """Measure both and print."""
    parser = common.parser(__doc__)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--data", type=Path, default=TEXTS)
    args = parser.parse_args()
    texts = windows(args.model, args.data, 2 if args.quick else 8)
    plain = losses_of(args.model, "auto", texts)
    rows, bars = [], []
    for form in FORMS:
        ratios = []
        for domain, loss in losses_of(args.model, form, texts).items():
            ratios.append(math.exp(loss - plain[domain]))
            rows.append(
                {
                    "experts": form,
                    "domain": domain,
                    "windows": len(texts[domain]),
                    "loss bf16": round(plain[domain], 4),
                    "loss": round(loss, 4),
                    "perplexity ratio": round(ratios[-1], 5),
                }
            )
        overall = math.exp(sum(map(math.log, ratios)) / len(ratios))
        value = Spread(overall, min(ratios), max(ratios))
        name = f"{form}_perplexity_ratio"
        bars.append(Bar(name=name, value=value, unit="x", op="<", target=1.01))
    common.finish("quality", args, rows, bars)


if __name__ == "__main__":
    main()
