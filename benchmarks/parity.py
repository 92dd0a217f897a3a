"""How many architectures serve exactly the tokens that `transformers` generates.

    .venv/bin/python benchmarks/parity.py --json out.json

Each architecture, as a random small checkpoint in both layouts (hub and fused), runs through the
real dense model and two expert shards in this process (`tests/support/parity.py`, the code of the
parity tests), with `--tp 2` on two tensor-parallel dense ranks, threads that share memory. An
architecture counts where, in both layouts, greedy float32 tokens are equal over
64 positions of prompts whose outputs do not repeat, and the bfloat16 error of the logits against
float32 is at most twice `transformers`' own. `--quick` changes nothing but is accepted: it is fast.
"""

import sys
import tempfile
from pathlib import Path

import common
import torch
from common import Row
from engines_report import Bar, Spread

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.checkpoints import ARCHITECTURES
from support.parity import NEW_TOKENS, Parity, compare


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--tp", type=int, default=1, help="ranks of the dense group (1)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    identical = 0
    for architecture in ARCHITECTURES:
        with tempfile.TemporaryDirectory() as directory:
            layouts = compare(architecture, Path(directory), tp=args.tp)
        identical += all(parity.is_identical for parity in layouts)
        rows += [row_of(parity) for parity in layouts]
    suffix = "" if args.tp == 1 else f"_tp{args.tp}"
    name = f"architectures_identical{suffix}"
    bar = Bar(name=name, value=Spread.of([identical]), unit="", op=">=", target=15)
    common.finish(f"parity{suffix}", args, rows, [bar])


def row_of(parity: Parity) -> Row:
    """One line of the table."""
    ratio = parity.bf16_error_ratio
    return {
        "architecture": parity.architecture,
        "layout": parity.layout,
        "prompts": parity.num_prompts,
        "positions": NEW_TOKENS,
        "different": parity.num_different,
        "float32 logit error": f"{parity.logit_error_float32:.1e}",
        "bf16 error / theirs": "" if ratio is None else f"{ratio:.2f}",
        "identical": parity.is_identical,
    }


if __name__ == "__main__":
    main()
