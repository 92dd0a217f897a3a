"""What int4 experts would cost in quality: perplexity of weights rounded to 4 bits (issue 3).

    .venv/bin/python benchmarks/prototypes/int4_quality.py --quick --json out.json

Round to nearest, -8..7, a scale for each 128, 64 or 32 inputs of an output (bfloat16). No kernel:
the rounded weights are served in bfloat16, on the windows of `benchmarks/quality.py`.
"""

import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import torch
from engines_report import Bar, Spread
from quality import SHARED, loss_of, windows
from safetensors.torch import load_file, save_file
from support.local_engine import LocalEngine
from torch import Tensor

GROUPS = (128, 64, 32)


def rounded(weight_OK: Tensor, group: int) -> Tensor:
    """`weight_OK` as int4 with a scale every `group` inputs would have it; K a multiple of it."""
    parts = weight_OK.float().reshape(*weight_OK.shape[:-1], -1, group)
    scale = (parts.abs().amax(dim=-1, keepdim=True) / 7).to(torch.bfloat16).float().clamp(min=1e-30)
    whole = (parts / scale).round().clamp(-8, 7) * scale
    return whole.reshape(weight_OK.shape).to(weight_OK.dtype)


def engine_of(model: Path, group: int | None) -> LocalEngine:
    """The model with its experts rounded, or as it is."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "model"
        shutil.copytree(model, copy)
        for path in copy.glob("*.safetensors") if group else ():
            tensors = {
                name: rounded(t, group) if ".experts." in name and t.shape[-1] % group == 0 else t
                for name, t in load_file(path).items()
            }
            save_file(tensors, path, metadata={"format": "pt"})
        return LocalEngine.load(
            copy, dtype=torch.bfloat16, mode="presummed", exact=False, is_int8=False
        )


def main() -> None:
    """Measure and print."""
    parser = common.parser(__doc__)
    parser.add_argument("--model", type=Path, default=SHARED / "models" / "remora-demo")
    parser.add_argument("--data", type=Path, default=SHARED / "data" / "text")
    args = parser.parse_args()
    texts = windows(args.model, args.data, 2 if args.quick else 8)
    plain = {
        d: loss_of(engine, t) for engine in [engine_of(args.model, None)] for d, t in texts.items()
    }
    rows, bars = [], []
    for group in GROUPS:
        engine = engine_of(args.model, group)
        ratios = {
            d: float(torch.tensor(loss_of(engine, t) - plain[d]).exp()) for d, t in texts.items()
        }
        rows += [
            {"group": group, "domain": d, "perplexity ratio": round(r, 4)}
            for d, r in ratios.items()
        ]
        mean = float(torch.tensor(list(ratios.values())).log().mean().exp())
        value = Spread(mean, min(ratios.values()), max(ratios.values()))
        bars.append(
            Bar(name=f"int4_g{group}_perplexity_ratio", value=value, unit="x", op="<", target=1.01)
        )
    common.finish("int4_quality", args, rows, bars)


if __name__ == "__main__":
    main()
