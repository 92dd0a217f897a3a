"""How well experts are predicted before the gate runs: F1 by MoE layer on held-out documents.

    .venv/bin/python benchmarks/predict.py --quick --json out.json
    .venv/bin/python benchmarks/predict.py --plan plan.trace --heldout heldout.trace

Traces come from `remora trace record` (`--plan`, `--heldout`); without them the demo model's are
recorded from the shared texts first. Predictors learn on `plan` documents and are judged on
`heldout` ones: of all domains together, and of each domain with that domain left out of learning.
Predicted are as many experts as a token chooses, so precision, recall and F1 are one number. Beside
it: the share of tokens whose busiest device is predicted, with experts in contiguous runs over
`--devices`; confidence minus hits, how far the predictor's own estimate is off; time for 64 tokens.
"""

import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import common
import numpy as np
from engines_report import Bar, Spread
from locations import DEMO_MODEL, TEXTS, text_files
from numpy.typing import NDArray

from remora.actors.trace_offline import RecordPlan, TextFile, record_texts
from remora.comm.predict import (
    SCALE,
    Predictor,
    RoutingCounts,
    Use,
    device_scores,
    fit,
    top_experts,
)
from remora.comm.predict_devices import TwoLayerTable
from remora.comm.trace import Trace, join
from remora.comm.trace_reader import read_trace

ROWS = 64  # tokens of a batch that is timed
Scores = Callable[[int], NDArray[np.int32]]  # MoE layer -> [T, E]


@dataclass(frozen=True)
class Judged:
    """What a predictor did on one set of tokens, by layer."""

    f1_L: list[float]
    device_L: list[float]
    bias: float  # confidence minus hits


def main() -> None:
    """Learn, judge, print."""
    parser = common.parser(__doc__)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--data", type=Path, default=TEXTS)
    parser.add_argument("--plan", type=Path, help="trace to learn from")
    parser.add_argument("--heldout", type=Path, help="trace to judge on")
    parser.add_argument("--devices", type=int, default=8)
    args = parser.parse_args()
    plan, heldout = traces(args)
    device_E = np.arange(plan.header.num_experts) * args.devices // plan.header.num_experts
    rows: list[common.Row] = []
    found = judge_all(plan, heldout, device_E)
    for name, judged in found.items():
        rows.append(row_of("all domains", name, judged))
    outside: dict[str, list[float]] = {}
    for domain in heldout.domains:
        inside_T = plan.domain_mask(domain)
        for name, judged in judge_all(
            plan.select(~inside_T), heldout.select(heldout.domain_mask(domain)), device_E
        ).items():
            rows.append(row_of(f"without {domain}", name, judged))
            outside.setdefault(name, []).append(float(np.mean(judged.f1_L)))
    rows += [
        {"predictor": name, "F1 with its domain left out": Spread.of(values)}
        for name, values in outside.items()
    ]
    common.finish("predict", args, rows, bars_of(found, outside, timed(plan, heldout)))


def traces(args: Namespace) -> tuple[Trace, Trace]:
    """What was asked for, or recorded now."""
    if (args.plan is None) != (args.heldout is None):
        raise SystemExit("--plan and --heldout come together")
    if args.plan is not None:
        return read_trace(args.plan), read_trace(args.heldout)
    per_domain = 4_000 if args.quick else 50_000
    made = []
    with tempfile.TemporaryDirectory() as folder:
        for split, share in (("plan", 2), ("heldout", 1)):
            parts = []
            for path in text_files(args.data, split):
                output = Path(folder) / f"{path.stem}.trace"
                record_texts(
                    str(args.model),
                    [TextFile(path=path, domain=path.name.partition(".")[0])],
                    output,
                    RecordPlan(window=256, tokens_max=share * per_domain, batch=16),
                )
                parts.append(read_trace(output))
            made.append(join(parts))
    return made[0], made[1]


def learn(trace: Trace) -> RoutingCounts:
    """Counts of a whole trace."""
    header = trace.header
    counts = RoutingCounts(
        num_layers=len(header.moe_layers),
        num_experts=header.num_experts,
        top_k=header.top_k,
        vocab_size=header.vocab_size,
    )
    counts.learn(trace.token_T, trace.experts_LTK)
    return counts


def judge_all(plan: Trace, heldout: Trace, device_E: NDArray[np.int64]) -> dict[str, Judged]:
    """Every predictor, learned on one and judged on the other."""
    counts = learn(plan)
    experts_LTK = heldout.experts_LTK.astype(np.int64)
    token_T = heldout.token_T.astype(np.int64)

    def of(use: Use) -> Scores:
        predictor = fit(counts, use)

        def scores(layer: int) -> NDArray[np.int32]:
            previous = experts_LTK[layer - 1] if layer >= 1 and use.layers >= 1 else None
            before = experts_LTK[layer - 2] if layer >= 2 and use.layers >= 2 else None
            return predictor.scores(layer, token_T, previous, before)

        return scores

    token, near = of(Use(layers=0)), of(Use(token=False))
    ladder: dict[str, Scores] = {
        "base rates": of(Use(token=False, layers=0)),
        "token id": token,
        "previous layer": near,
        "more confident of both": lambda layer: more_confident(
            token(layer), near(layer), plan.header.top_k
        ),
        "two previous layers": of(Use(token=False, layers=2)),
        "token id + previous layer": of(Use()),
        "token id + two layers": of(Use(layers=2)),
    }
    found = {name: judge(scores, experts_LTK, device_E) for name, scores in ladder.items()}
    found["two-layer device table"] = judge_two_layer(plan, experts_LTK, device_E)
    return found


def more_confident(
    first_TE: NDArray[np.int32], second_TE: NDArray[np.int32], top_k: int
) -> NDArray[np.int32]:
    """For each token, the scores of whoever is surer of its k best."""
    sure = [top_experts(score_TE, top_k)[1] for score_TE in (first_TE, second_TE)]
    return np.where((sure[0] >= sure[1])[:, None], first_TE, second_TE)


def judge(scores: Scores, experts_LTK: NDArray[np.int64], device_E: NDArray[np.int64]) -> Judged:
    """F1, busiest device, and bias of the confidence."""
    top_k = experts_LTK.shape[2]
    held_ED = np.eye(device_E.max() + 1, dtype=np.int64)[device_E]
    f1_L, device_L, biases = [], [], []
    for layer, true_TK in enumerate(experts_LTK):
        score_TE = scores(layer)
        best_TK, confidence_T = top_experts(score_TE, top_k)
        hit = float((best_TK[:, :, None] == true_TK[:, None, :]).any(axis=1).mean())
        f1_L.append(hit)
        biases.append(float(confidence_T.mean()) - hit)
        device_L.append(busiest(device_scores(score_TE, held_ED), device_E[true_TK]))
    return Judged(f1_L, device_L, float(np.mean(biases)))


def busiest(score_TD: NDArray[np.int64], device_TK: NDArray[np.int64]) -> float:
    """Share of tokens for which no device has more of their experts than the predicted one."""
    pairs_TD = (device_TK[:, :, None] == np.arange(score_TD.shape[1])).sum(axis=1)
    predicted_T = score_TD.argmax(axis=1)
    return float((pairs_TD[np.arange(len(pairs_TD)), predicted_T] == pairs_TD.max(axis=1)).mean())


def judge_two_layer(
    plan: Trace, experts_LTK: NDArray[np.int64], device_E: NDArray[np.int64]
) -> Judged:
    """The device-level table knows no experts: its F1 is not a number."""
    table = TwoLayerTable(num_layers=len(experts_LTK), num_devices=int(device_E.max()) + 1)
    table.learn(device_E[plan.experts_LTK])
    device_L = [
        busiest(
            table.scores(layer, device_E[experts_LTK[max(0, layer - 1)]]),
            device_E[experts_LTK[layer]],
        )
        for layer in range(len(experts_LTK))
    ]
    return Judged([float("nan")] * len(experts_LTK), device_L, float("nan"))


def row_of(learned: str, name: str, judged: Judged) -> common.Row:
    """One line of the table."""
    by_layer = {f"L{i}": round(value, 3) for i, value in enumerate(judged.f1_L)}
    return {
        "learned on": learned,
        "predictor": name,
        **by_layer,
        "F1": round(float(np.mean(judged.f1_L)), 3),
        "busiest device": round(float(np.mean(judged.device_L)), 3),
        "confidence - hits": round(judged.bias, 3),
    }


def timed(plan: Trace, heldout: Trace) -> dict[str, Spread]:
    """Microseconds for the scores of ROWS tokens, and seconds of a fit."""
    counts = learn(plan)
    begin = time.process_time()
    predictor: Predictor = fit(counts)
    fit_s = time.process_time() - begin
    token_T = heldout.token_T[:ROWS].astype(np.int64)
    previous_TK = heldout.experts_LTK[0, :ROWS].astype(np.int64)
    held_ED = np.ones((plan.header.num_experts, 8), np.int64)
    assert predictor.scores(1, token_T, previous_TK).max() <= 8 * SCALE
    figures = common.alternate(
        {
            "experts": lambda: predictor.scores(1, token_T, previous_TK),
            "devices": lambda: device_scores(predictor.scores(1, token_T, previous_TK), held_ED),
        },
        rounds=5,
        sample_s=0.2,
    )
    spreads = {name: Spread.of([1e6 * s for s in seconds]) for name, seconds in figures.items()}
    return spreads | {"fit": Spread.of([fit_s])}


def bars_of(
    found: dict[str, Judged], outside: dict[str, Sequence[float]], times: dict[str, Spread]
) -> list[Bar]:
    """The additive model against the token-id table, and what it costs."""

    def spread(name: str) -> Spread:
        return Spread.of(found[name].f1_L)

    best, token = "token id + two layers", "token id"
    gain = Spread.of([a - b for a, b in zip(found[best].f1_L, found[token].f1_L, strict=True)])
    outside_gain = Spread.of([a - b for a, b in zip(outside[best], outside[token], strict=True)])
    return [
        Bar(name="f1_token_table", value=spread(token), unit=""),
        Bar(name="f1_additive", value=spread(best), unit=""),
        Bar(name="f1_gain_over_token_table", value=gain, unit="", op=">=", target=0.01),
        Bar(name="f1_gain_domain_left_out", value=outside_gain, unit="", op=">=", target=0.01),
        Bar(name="scores_64_tokens", value=times["experts"], unit="us", op="<", target=30.0),
        Bar(name="device_scores_64_tokens", value=times["devices"], unit="us"),
        Bar(name="fit", value=times["fit"], unit="s"),
    ]


if __name__ == "__main__":
    main()
