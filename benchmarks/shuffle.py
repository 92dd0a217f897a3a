"""Token shuffle: how much a guessed one saves of what an oracle saves, and what a real group moves.

    benchmarks/shuffle.py                                       records the demo model first
    benchmarks/shuffle.py --plan PLAN.trace --heldout OTHER.trace --no-live

Simulation (`shuffle_gap.py`): four ranks beside four shards, experts placed in runs. Live
(`shuffle_live.py`): two ranks and two shards as actors on this machine.
"""

import json
from pathlib import Path

import common
import numpy as np
import shuffle_live
from engines_report import Bar, Spread
from locations import DEMO_MODEL, TEXTS, text_files
from shuffle_gap import Gap, Routed, shuffle_gap

from remora.actors.trace_offline import RecordPlan, TextFile, record_texts
from remora.comm.trace_reader import read_trace

NUM_RANKS = 4
STEPS = 8, 32, 128  # tokens
TARGET = 0.6
TOKENS_MAX = 1_000_000  # of a recording
TOKENS_MAX_QUICK = 45_000  # enough documents for the largest steps


def main() -> None:
    """Parse flags, measure, report."""
    parser = common.parser(__doc__)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--texts", type=Path, default=TEXTS)
    parser.add_argument("--plan", type=Path, help="trace to learn from")
    parser.add_argument("--heldout", type=Path, help="trace to judge on")
    parser.add_argument("--no-live", action="store_true", help="simulation alone")
    args = parser.parse_args()
    tokens_max = TOKENS_MAX_QUICK if args.quick else TOKENS_MAX
    asked = None if args.no_live else _texts(args.texts, "heldout")
    learned, judged = (
        _routed(given) if given else _record(args.model, args.texts, split, tokens_max)
        for split, given in (("plan", args.plan), ("heldout", args.heldout))
    )
    gaps = simulate(learned, judged)
    rows: list[common.Row] = [_row(step, gap) for step, gap in gaps.items()]
    if asked is not None:
        rows += shuffle_live.measure(args.model, asked, quick=args.quick)
    closed = Spread.of([gap.closed for gap in gaps.values()])
    name = "shuffle_oracle_gap_closed"
    bars = [Bar(name=name, value=closed, unit="share", op=">=", target=TARGET)]
    common.finish("shuffle", args, rows, bars)


def simulate(learned: Routed, judged: Routed) -> dict[int, Gap]:
    """By tokens of a step, as far as there are documents for one."""
    num_documents = min(len(learned.length_Q), len(judged.length_Q))
    steps = [step for step in STEPS if step <= num_documents]
    if not steps:
        raise SystemExit(f"{num_documents} documents: a step takes at least {STEPS[0]}")
    num_layers, num_experts = learned.experts_NLK.shape[1], int(learned.experts_NLK.max()) + 1
    shard_LE = np.tile(np.arange(num_experts) * NUM_RANKS // num_experts, (num_layers, 1))
    return {step: shuffle_gap(learned, judged, shard_LE, step) for step in steps}


def _record(model: Path, texts: Path, split: str, tokens_max: int) -> Routed:
    """Texts of every domain alike, recorded once (minutes) and kept."""
    files = text_files(texts, split)
    share = tokens_max // len(files)
    folder = Path.home() / ".cache" / "remora" / f"shuffle-{model.name}-{split}-{share}"
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for file in files:
        path = folder / f"{file.stem}.trace"
        if not path.exists():
            half = path.with_suffix(".half")  # what was cut off is no recording
            plan = RecordPlan(window=256, tokens_max=share, batch=16)
            record_texts(str(model), [TextFile(path=file, domain=None)], half, plan, overwrite=True)
            half.replace(path)
        parts.append(_routed(path))
    return Routed(
        token_N=np.concatenate([part.token_N for part in parts]),
        experts_NLK=np.concatenate([part.experts_NLK for part in parts]),
        length_Q=np.concatenate([part.length_Q for part in parts]),
    )


def _routed(path: Path) -> Routed:
    trace = read_trace(path)
    order = np.lexsort((trace.position_T, trace.request_T))
    return Routed(
        token_N=trace.token_T[order].astype(np.int64),
        experts_NLK=np.ascontiguousarray(trace.experts_LTK.transpose(1, 0, 2)[order]),
        length_Q=np.unique(trace.request_T, return_counts=True)[1],
    )


def _texts(folder: Path, split: str) -> list[str]:
    lines = [
        json.loads(line)
        for path in text_files(folder, split)
        for line in path.read_text().splitlines()
    ]
    order = np.random.default_rng(0).permutation(len(lines))
    return [lines[i] for i in order]


def _row(step_tokens: int, gap: Gap) -> dict[str, float | int | str]:
    return {
        "tokens_of_a_step": step_tokens,
        "copies_none": round(gap.none, 4),
        "copies_speculative": round(gap.speculative, 4),
        "copies_oracle": round(gap.oracle, 4),
        "gap_closed": round(gap.closed, 4),
        "by_layer": " ".join(f"{share:.2f}" for share in gap.closed_by_layer),
    }


if __name__ == "__main__":
    main()
