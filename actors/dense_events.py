"""What goes into and comes out of `DenseState`: limits, events, instructions, step plans. Pure.

    RequestArrived, AbortRequested, SourceLost, StatusChanged --+
    StepDone, StepFailed (answer the step in flight) -----------+--> handle() -> [Emit, ...]
                                                                     next_step() -> StepPlan | None

One step is in flight at a time. Every other event may come while it runs. What is built for every
sequence of every step is a `msgspec.Struct`: building one costs a tenth of a frozen dataclass.
"""

from dataclasses import dataclass

import msgspec

from remora.actors.sequence import Sequence, Source
from remora.comm.messages import SamplingParams, StepOutputs, Submit, TokenLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseLimits:
    """Bounds of one dense rank; fixed for its life. Raises `ValueError` when they contradict."""

    num_blocks: int  # KV blocks of the rank
    max_model_len: int  # prompt + output tokens of one sequence
    vocab_size: int  # token ids are in [0, vocab_size)
    eos_token_ids: frozenset[int] = frozenset()
    block_size: int = 16  # tokens in one block
    max_num_seqs: int = 256  # sequences that hold blocks
    max_tokens_per_step: int = 2048  # rows of one step; at least max_num_seqs
    max_waiting: int = 4096  # sequences in the queue; over it arrivals are refused
    prefix_caching: bool = True

    def __post_init__(self) -> None:
        for name in (
            "num_blocks",
            "max_model_len",
            "vocab_size",
            "block_size",
            "max_num_seqs",
            "max_waiting",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.max_tokens_per_step < self.max_num_seqs:
            raise ValueError(
                f"max_tokens_per_step {self.max_tokens_per_step} < max_num_seqs "
                f"{self.max_num_seqs}: every running sequence decodes one token a step"
            )


# Events


@dataclass(frozen=True, slots=True)
class RequestArrived:
    """An ingress asks for a sequence."""

    submit: Submit
    source: Source


@dataclass(frozen=True, slots=True)
class AbortRequested:
    """Nobody waits for this sequence of this source. Unknown ids are ignored: it may be over."""

    request_id: str
    source: Source


@dataclass(frozen=True, slots=True)
class SourceLost:
    """The connection to an ingress is gone: all its requests end, nothing is sent to it."""

    source: Source


@dataclass(frozen=True, slots=True)
class StatusChanged:
    """What the shell knows and the stats carry: the executor in use and the placement's epoch."""

    executor: str
    epoch: int


class SliceResult(msgspec.Struct, frozen=True, kw_only=True):
    """What the model runner computed for one slice."""

    token_id: int | None = None  # the sampled token, exactly when `Slice.sample`
    logprobs: TokenLogprobs | None = None  # exactly when sampled and `params.logprobs` is set
    prompt_logprobs: list[TokenLogprobs] = []  # `Slice.num_prompt_logprobs` of them
    error: str | None = None  # this slice alone went wrong; the rest then means nothing


@dataclass(frozen=True, slots=True)
class StepDone:
    """The step in flight is computed. `results` has one entry for each slice, in their order."""

    step_id: int
    results: list[SliceResult]


@dataclass(frozen=True, slots=True)
class StepFailed:
    """The step in flight could not be computed: every request in it ends with an error."""

    step_id: int
    message: str


Event = RequestArrived | AbortRequested | SourceLost | StatusChanged | StepDone | StepFailed


# Instructions


@dataclass(frozen=True, slots=True)
class Emit:
    """Send one message to one ingress. A step gives at most one for each source."""

    source: Source
    outputs: StepOutputs


Instruction = Emit


# What to run


class Slice(msgspec.Struct, frozen=True, kw_only=True):
    """The tokens of one sequence that one step computes.

    Valid until the answer to the step is handled: until then nothing it refers to changes, even
    when the request is aborted meanwhile.
    """

    sequence: Sequence  # read-only; `sequence.arrival` is a unique key for a runner's caches
    token_ids: list[int]  # tokens to compute, at positions start .. start + len(token_ids) - 1
    start: int  # K/V of positions 0 .. start - 1 is already in the blocks
    block_table: list[int]  # covers at least positions 0 .. start + len(token_ids) - 1
    sample: bool  # sample the next token from the logits of the last row
    num_prompt_logprobs: int = 0  # rows 0 .. n-1: log-probs of the prompt token that follows each

    @property
    def request_id(self) -> str:
        """The ingress' name of the request."""
        return self.sequence.request_id

    @property
    def params(self) -> SamplingParams:
        """Sampling parameters; `params.prompt_logprobs` top entries for each prompt row."""
        return self.sequence.params

    @property
    def prompt_ids(self) -> list[int]:
        """All tokens of the prompt (for penalties)."""
        return self.sequence.prompt_ids

    @property
    def output_ids(self) -> list[int]:
        """All tokens generated so far, those before a preemption included (for penalties)."""
        return self.sequence.output_ids

    @property
    def num_outputs(self) -> int:
        """Tokens generated so far; eos and stop ids are masked while it is < min_tokens."""
        return len(self.sequence.output_ids)

    @property
    def num_tokens(self) -> int:
        """Rows of this slice."""
        return len(self.token_ids)

    @property
    def position(self) -> int:
        """Index in the whole sequence of the token to be sampled: the RNG's counter."""
        return self.start + len(self.token_ids)


class StepPlan(msgspec.Struct, frozen=True, kw_only=True):
    """One step: decode slices (one token each) first, then chunks of prompts."""

    step_id: int
    slices: list[Slice]
    num_tokens: int  # rows of the step, before padding; <= max_tokens_per_step
