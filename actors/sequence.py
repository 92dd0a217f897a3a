"""One sequence of a dense rank: its tokens, its KV blocks and how far it has come. Pure.

A sequence is *waiting* (no blocks), *running* (blocks for every token it knows) or *finished*.
Preemption moves it from running back to waiting: its blocks go, its tokens stay, and it is
recomputed later as if its outputs had been part of the prompt.

    num_computed <= len(token_ids) == len(prompt_ids) + len(output_ids)
    running: len(block_table) * block_size >= len(token_ids) - 1  (the newest may lack its block)
"""

import enum

from remora.comm.messages import SamplingParams, Submit, TokenLogprobs

Source = int | str  # one ingress connection: whom the outputs go to


class Phase(enum.Enum):
    """Where a sequence stands."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """One request as the scheduler and, read-only, the model runner see it.

    Attributes:
        request_id: name given by the ingress; unique among the requests of one source.
        source: the ingress connection that asked.
        params: resolved sampling parameters.
        arrival: serial number of the arrival; unique in the life of the state machine.
        order: (priority, arrival); who is smaller goes first.
        domain: the client's name for this kind of traffic, for statistics.
        prompt_ids: tokens of the prompt; never changes.
        output_ids: tokens sampled so far, here or where it ran before; grows by one for each
            sampled step.
        token_ids: prompt_ids + output_ids.
        num_computed: leading tokens whose K/V is in the blocks (prefix hits included).
        block_table: block of position p is block_table[p // block_size]. On release it is replaced,
            never emptied, so that a step in flight keeps the table it was planned with.
        block_keys: content keys of the leading full blocks, as far as they were needed.
        num_published: leading blocks of the table that were offered to the prefix cache.
        prompt_logprobs: of positions 1.. as far as computed.
        num_cached_tokens: prompt tokens taken from the prefix cache when it first ran.
        num_preemptions: how often it had to give its blocks back.
        has_emitted: whether an output has been sent, by us or by whom it ran at before.
        eos_ids: the model's end tokens; empty with `ignore_eos`.
        stop_ids: eos_ids and those of the request, as far as the model can sample them: a
            checkpoint's list, or the ingress' tokenizer, may know tokens that the model has not.
    """

    __slots__ = (
        "arrival",
        "block_keys",
        "block_table",
        "domain",
        "eos_ids",
        "has_emitted",
        "num_cached_tokens",
        "num_computed",
        "num_preemptions",
        "num_published",
        "order",
        "output_ids",
        "params",
        "phase",
        "prompt_ids",
        "prompt_logprobs",
        "request_id",
        "source",
        "stop_ids",
        "token_ids",
    )

    def __init__(
        self,
        submit: Submit,
        source: Source,
        arrival: int,
        eos_token_ids: frozenset[int],
        vocab_size: int,
    ) -> None:
        self.request_id: str = submit.request_id
        self.source: Source = source
        self.params: SamplingParams = submit.params
        self.arrival: int = arrival
        self.order: tuple[int, int] = (submit.priority, arrival)
        self.domain: str | None = submit.domain
        self.prompt_ids: list[int] = submit.prompt_ids
        self.output_ids: list[int] = list(submit.output_ids)
        self.token_ids: list[int] = submit.prompt_ids + submit.output_ids
        self.num_computed: int = 0
        self.block_table: list[int] = []
        self.block_keys: list[bytes] = []
        self.num_published: int = 0
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.num_cached_tokens: int = 0
        self.num_preemptions: int = 0
        self.has_emitted: bool = bool(submit.output_ids)
        self.phase: Phase = Phase.WAITING
        self.eos_ids: frozenset[int] = frozenset() if submit.params.ignore_eos else eos_token_ids
        asked = self.eos_ids.union(submit.params.stop_token_ids)
        self.stop_ids: frozenset[int] = frozenset(i for i in asked if 0 <= i < vocab_size)

    def __repr__(self) -> str:
        return (
            f"<{self.request_id!r} of {self.source!r} {self.phase.value} order={self.order} "
            f"tokens={len(self.prompt_ids)}+{len(self.output_ids)} computed={self.num_computed} "
            f"blocks={self.block_table} preemptions={self.num_preemptions}>"
        )

    @property
    def needs_prompt_logprobs(self) -> bool:
        """Whether prompt positions are still to be computed for their log-probabilities."""
        return (
            self.params.prompt_logprobs is not None
            and len(self.prompt_logprobs) < len(self.prompt_ids) - 1
        )
