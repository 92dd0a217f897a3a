"""Routing traces for `traffic.py`: reading them, folds by sequence, the order of decoding.

Shape suffixes: T tokens, L MoE layers, K top-k, Q sequences.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from locations import ROUTING, TEXTS
from numpy.typing import NDArray

STEP_TOKENS = 32  # of a decode step over the whole deployment
SEED = 20261128


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Expert choices of real tokens, sequence after sequence, in order within each.

    `split_Q` is 0 where a sequence may be planned on and judged on (by fold), 1 for planning alone,
    2 for judging alone (it was held out when the model was trained).
    """

    name: str
    experts_TLK: NDArray[np.int16]  # logical experts, distinct within a row
    sequence_T: NDArray[np.int32]  # ascending
    domain_Q: NDArray[np.int32]  # index into `domains`
    split_Q: NDArray[np.int8]
    domains: tuple[str, ...]
    num_experts: int
    row_bytes: int  # of one row of hidden states, bfloat16
    expert_bytes: int  # of one expert's weights in one layer, bfloat16
    token_T: NDArray[np.int32] | None = None  # token ids, where the trace has them

    @property
    def num_layers(self) -> int:
        """L."""
        return self.experts_TLK.shape[1]

    @property
    def num_sequences(self) -> int:
        """Q."""
        return len(self.domain_Q)

    def of(self, sequences: NDArray[np.integer]) -> "Trace":
        """Those sequences alone, renumbered from 0 in their order in the trace."""
        wanted = np.unique(sequences)
        keep_T = np.isin(self.sequence_T, wanted)
        return replace(
            self,
            experts_TLK=self.experts_TLK[keep_T],
            sequence_T=np.searchsorted(wanted, self.sequence_T[keep_T]).astype(np.int32),
            domain_Q=self.domain_Q[wanted],
            split_Q=self.split_Q[wanted],
            token_T=None if self.token_T is None else self.token_T[keep_T],
        )

    def by_domain(self) -> dict[str, "Trace"]:
        """The sequences of each domain that has any, by its name."""
        of = {name: np.flatnonzero(self.domain_Q == d) for d, name in enumerate(self.domains)}
        return {name: self.of(own) for name, own in of.items() if len(own)}

    def layers(self, which: Sequence[int]) -> "Trace":
        """Those layers alone."""
        return replace(self, experts_TLK=self.experts_TLK[:, list(which)])

    def decode_order(self) -> "Trace":
        """The tokens as continuous batching decodes them; `sequence_T` no longer ascends.

        All sequences run side by side, each at a rate that its length sets, so that all end
        together and every step of STEP_TOKENS is full but the last.
        """
        length_Q = np.bincount(self.sequence_T, minlength=self.num_sequences)
        start_Q = np.cumsum(length_Q) - length_Q
        position_T = np.arange(len(self.sequence_T)) - start_Q[self.sequence_T]
        order = np.lexsort((self.sequence_T, (position_T + 0.5) / length_Q[self.sequence_T]))
        return replace(
            self,
            experts_TLK=self.experts_TLK[order],
            sequence_T=self.sequence_T[order],
            token_T=None if self.token_T is None else self.token_T[order],
        )


def folds(trace: Trace, count: int = 5) -> Iterator[tuple[Trace, Trace]]:
    """(to plan on, to judge on), by sequence and with every domain in each fold.

    Fold f is judged on its own sequences that are not for planning alone, and planned on those of
    the other folds that are not for judging alone.
    """
    fold_Q = np.empty(trace.num_sequences, np.int64)
    chance = np.random.default_rng(SEED)
    for domain in range(len(trace.domains)):
        for split in range(3):
            members = np.flatnonzero((trace.domain_Q == domain) & (trace.split_Q == split))
            fold_Q[chance.permutation(members)] = np.arange(len(members)) % count
    for fold in range(count):
        plan = np.flatnonzero((fold_Q != fold) & (trace.split_Q != 2))
        judge = np.flatnonzero((fold_Q == fold) & (trace.split_Q != 1))
        yield trace.of(plan), trace.of(judge)


def shift(trace: Trace, domain: int) -> tuple[Trace, Trace]:
    """(all other domains' planning sequences, all judged sequences of one domain)."""
    plan = np.flatnonzero((trace.domain_Q != domain) & (trace.split_Q != 2))
    judge = np.flatnonzero((trace.domain_Q == domain) & (trace.split_Q != 1))
    return trace.of(plan), trace.of(judge)


def join(traces: Sequence[Trace], name: str) -> Trace:
    """Traces of one model and one domain each, as one of several domains."""
    first = traces[0]
    offset, sequences = 0, []
    for trace in traces:
        sequences.append(trace.sequence_T + offset)
        offset += trace.num_sequences
    domains = tuple(dict.fromkeys(t.domains[0] for t in traces))
    with_tokens = all(t.token_T is not None for t in traces)
    return replace(
        first,
        name=name,
        experts_TLK=np.concatenate([t.experts_TLK for t in traces]),
        sequence_T=np.concatenate(sequences).astype(np.int32),
        domain_Q=np.concatenate(
            [np.full(t.num_sequences, domains.index(t.domains[0]), np.int32) for t in traces]
        ),
        split_Q=np.concatenate([t.split_Q for t in traces]),
        domains=domains,
        token_T=np.concatenate([t.token_T for t in traces if t.token_T is not None])
        if with_tokens
        else None,
    )


def deepseek_v2_lite(folder: Path = ROUTING) -> Trace | None:
    """Real routing of DeepSeek-V2-Lite (26 layers, 64 experts, top-6, width 2,048), no token ids;
    None when the files are not there."""
    traces = []
    for domain in ("law", "intent", "summary"):
        path = folder / f"deepseek_v2_lite_{domain}.npz"
        if not path.exists():
            return None
        with np.load(path) as arrays:
            lengths = arrays["sequence_lengths"]
            traces.append(
                Trace(
                    name="v2lite",
                    experts_TLK=arrays["expert_ids"].astype(np.int16),
                    sequence_T=np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
                    domain_Q=np.zeros(len(lengths), np.int32),
                    split_Q=np.zeros(len(lengths), np.int8),
                    domains=(domain,),
                    num_experts=64,
                    row_bytes=2048 * 2,
                    expert_bytes=3 * 2048 * 1408 * 2,
                )
            )
    return join(traces, "v2lite")


def texts(split: str, folder: Path = TEXTS) -> dict[str, list[str]]:
    """Documents of each domain; `split` is "plan" or "heldout". Empty when there are none."""
    found = sorted(folder.glob(f"*.{split}.jsonl"))
    return {
        path.name.removesuffix(f".{split}.jsonl"): [
            json.loads(line) for line in path.read_text().splitlines()
        ]
        for path in found
    }
