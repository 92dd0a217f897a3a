"""The emit log of a sequence that runs: all that another dense group needs to go on with it."""

import asyncio

import msgspec

from remora.cluster.inbox import Inbox
from remora.comm.messages import SequenceOutput, Submit


class EmitLog:
    """One sequence between its submission and its end.

    Attributes:
        submit: what the client asked for.
        inbox: where its outputs go.
        token_ids: received so far.
        num_replays: how often it went to another dense group because one had died.
        timer: ends its wait for a dense group, while there is none.
    """

    __slots__ = ("inbox", "num_replays", "submit", "timer", "token_ids")

    def __init__(self, submit: Submit, inbox: Inbox) -> None:
        self.submit = submit
        self.inbox = inbox
        self.token_ids: list[int] = list(submit.output_ids)
        self.num_replays = 0
        self.timer: asyncio.TimerHandle | None = None

    @property
    def request_id(self) -> str:
        """The name of the sequence."""
        return self.submit.request_id

    def take(self, output: SequenceOutput) -> None:
        """An output on its way to the client: what is in the log is never asked for again."""
        self.token_ids += output.token_ids
        self.inbox.put(output)

    def rest(self) -> Submit:
        """Asks for what is missing yet. Log-probabilities of the prompt came with the first token;
        seed, penalties and limits count from `output_ids`, so nothing else of it changes."""
        if not self.token_ids:
            return self.submit
        params = self.submit.params
        if params.prompt_logprobs is not None:
            params = msgspec.structs.replace(params, prompt_logprobs=None)
        return msgspec.structs.replace(self.submit, params=params, output_ids=list(self.token_ids))
