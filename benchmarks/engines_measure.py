"""What is measured of each engine, and in which order: cases, samples, alternating rounds.

A round takes every case in turn and, within a case, every engine; the order of the engines rotates
with the rounds. Prompts are random and new for each sample (no prefix cache helps), and the same
for all engines of a round and case, but for two ways into one engine. Ratios are taken within a
round, so that what changes on the machine between rounds falls out of them.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median

from engines_process import CpuMeter, CpuShares, Engine

PROMPT_TOKENS = 32
PREFILL_TOKENS = 512
FIRST_ID, END_ID = 8, 30000  # ordinary tokens of both checkpoints' vocabulary (32,000)
SECONDS_MIN = 1.0  # of decode runs in one sample
FIRST_REPEATS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One thing to measure.

    Throughput, tokens/s: `num_new` = 1: prompt tokens over the time until every sequence has its
    first token; else decode, batch x (num_new - 1) / (t(num_new) - t(1)).
    """

    name: str
    batch: int
    prompt_tokens: int
    num_new: int
    op: str = "generate"

    @property
    def is_prefill(self) -> bool:
        """Whether only prompts are run."""
        return self.num_new == 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """An engine and which deployment of it to measure, under the name that reports give it."""

    name: str
    engine: Engine
    op: str = "generate"
    arguments: dict[str, str] = field(default_factory=dict)

    def generate(self, prompts: list[list[int]], num_new: int) -> float:
        """Seconds until all is done. Raises ValueError when too few tokens came."""
        answer = self.engine.ask(self.op, prompts=prompts, num_new=num_new, **self.arguments)
        wanted = len(prompts) * num_new
        if answer["num_tokens"] != wanted:
            raise ValueError(f"{self.name} made {answer['num_tokens']} tokens, not {wanted}")
        seconds: float = answer["seconds"]
        return seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One measurement."""

    tokens_per_s: float
    first_ms: float  # until every sequence of the batch had its first token
    cpu: CpuShares


Samples = dict[tuple[str, str], list[Sample]]  # (case, target) -> one for each round


def serve_cases(batches: Iterable[int], num_new: int) -> list[Case]:
    """Prefill of one long prompt, and decode at each batch size."""
    prefill = Case(name="prefill", batch=1, prompt_tokens=PREFILL_TOKENS, num_new=1)
    return [prefill, *(decode_case(batch, num_new) for batch in batches)]


def decode_case(batch: int, num_new: int) -> Case:
    """Decode at one batch size."""
    return Case(name=f"decode_b{batch}", batch=batch, prompt_tokens=PROMPT_TOKENS, num_new=num_new)


def random_prompts(case: Case, rng: random.Random) -> list[list[int]]:
    """Token ids without a common beginning."""
    return [
        [rng.randrange(FIRST_ID, END_ID) for _ in range(case.prompt_tokens)]
        for _ in range(case.batch)
    ]


def sample(target: Target, case: Case, rng: random.Random) -> tuple[float, float]:
    """(tokens/s, milliseconds to the first token of all).

    t(1) is a median of `FIRST_REPEATS`; t(num_new) of as many as `SECONDS_MIN` hold, since what
    disturbs t(1) of a fast engine would else change the difference out of all proportion.
    """
    target.generate(random_prompts(case, rng), 1)  # caches and threads wake up
    first_s = median(target.generate(random_prompts(case, rng), 1) for _ in range(FIRST_REPEATS))
    if case.is_prefill:
        return case.batch * case.prompt_tokens / first_s, 1e3 * first_s
    whole_s = [target.generate(random_prompts(case, rng), case.num_new)]
    while sum(whole_s) < SECONDS_MIN:
        whole_s.append(target.generate(random_prompts(case, rng), case.num_new))
    decode_s = max(median(whole_s) - first_s, 1e-9)
    return case.batch * (case.num_new - 1) / decode_s, 1e3 * first_s


def warm_up(targets: Sequence[Target], cases: Sequence[Case], shield: bool) -> None:
    """Each engine meets each shape once, unmeasured."""
    for target in targets:
        with _Alone(target, targets, shield):
            for case in cases:
                rng = random.Random(f"warm-up {case.name}")
                target.generate(random_prompts(case, rng), 1)
                if not case.is_prefill:
                    target.generate(random_prompts(case, rng), min(4, case.num_new))


def measure(
    targets: Sequence[Target],
    cases: Sequence[Case],
    *,
    rounds: int,
    shield: bool,
    seed: str,
    on_sample: Callable[[int, Case, Target, Sample], None],
    beside: Callable[[Case], None] | None = None,
) -> Samples:
    """Alternating rounds over resident engines; see the head of this file.

    Args:
        shield: make the measured engine real-time (root only).
        seed: of the prompts; another seed gives other prompts.
        on_sample: told of each sample as it is taken.
        beside: called in every round after each case, with every engine held.
    """
    samples: Samples = {}
    for number in range(rounds):
        for case in cases:
            turn = number % len(targets)
            for target in [*targets[turn:], *targets[:turn]]:
                rng = random.Random(f"{seed} {number} {case.name} {target.op}")
                with _Alone(target, targets, shield):
                    meter = CpuMeter(target.engine, [t.engine for t in targets])
                    tokens_per_s, first_ms = sample(target, case, rng)
                    cpu = meter.stop()
                taken = Sample(tokens_per_s=tokens_per_s, first_ms=first_ms, cpu=cpu)
                samples.setdefault((case.name, target.name), []).append(taken)
                on_sample(number, case, target, taken)
            if beside is not None:
                for target in targets:
                    target.engine.hold()
                beside(case)
    return samples


class _Alone:
    """Only this target's engine may take the cores."""

    def __init__(self, target: Target, targets: Sequence[Target], shield: bool) -> None:
        self._engine = target.engine
        self._others = {id(t.engine): t.engine for t in targets if t.engine is not target.engine}
        self._shield = shield

    def __enter__(self) -> None:
        for other in self._others.values():
            other.hold()
        self._engine.release()
        if self._shield:
            self._engine.shield(True)

    def __exit__(self, *failure: object) -> None:
        if self._shield:
            self._engine.shield(False)
