"""One sequence as its client sees it, and what may be sent of it.

`Choice` turns step outputs into `Piece`s: text that no stop string can take back,
log-probabilities, the end. Which dense group they come from, or whether it was one, makes no
difference here (`emit_log.py`).
"""

import uuid
from dataclasses import dataclass

from remora.actors.tokenizer import Tokenizer
from remora.cluster.detokenize import StopScanner
from remora.cluster.request_plan import Job, Prompt
from remora.comm.errors import RequestError
from remora.comm.messages import SamplingParams, SequenceOutput, TokenLogprobs


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """One reported token: its log-probabilities and where its text begins in the answer."""

    logprobs: TokenLogprobs
    offset: int  # characters of the answer before it


@dataclass(slots=True)
class Piece:
    """What one step adds to one choice."""

    choice: "Choice"
    text: str
    tokens: list[TokenInfo]  # with logprobs only
    token_ids: list[int]
    is_last: bool  # not `choice.finish_reason`: a later piece may have set that already


class Choice:
    """Tokens and text state of one sequence."""

    __slots__ = (
        "_held_ids",
        "_held_tokens",
        "_num_decoded",
        "_scanner",
        "_scores_end",
        "_stream",
        "_turn_end_id",
        "finish_reason",
        "index",
        "last_s",
        "params",
        "prompt",
        "prompt_logprobs",
        "request_id",
        "stop_reason",
        "token_ids",
    )

    def __init__(
        self, index: int, prompt: Prompt, params: SamplingParams, job: Job, tokenizer: Tokenizer
    ) -> None:
        self.index = index
        self.request_id = uuid.uuid4().hex
        self.prompt = prompt
        self.params = params
        self.token_ids: list[int] = []
        self.prompt_logprobs: list[TokenLogprobs] | None = None
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.last_s = 0.0
        self._turn_end_id = job.turn_end_id
        self._scores_end = job.scores_end
        self._stream = tokenizer.stream(prompt.ids, skip_special_tokens=job.skip_special_tokens)
        self._scanner = StopScanner(job.stops)
        self._num_decoded = 0  # characters decoded, held ones included
        self._held_tokens: list[TokenInfo] = []  # reported with the text they belong to
        self._held_ids: list[int] = []

    def absorb(self, output: SequenceOutput) -> Piece | None:
        """Take one step's output in; None when nothing can be sent yet.

        Raises:
            RequestError: the engine gave this sequence up.
        """
        if output.finish_reason in ("error", "abort"):
            raise RequestError(
                f"the engine could not finish this request: {output.error or 'it was aborted'}",
                status=500,
                type="server_error",
                code="engine_error",
            )
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        text = self._decode(output)
        if self._scanner.matched is not None:
            self.finish_reason, self.stop_reason = "stop", self._scanner.matched
        elif output.finish_reason is not None:
            self.finish_reason = output.finish_reason
            if output.stop_reason != self._turn_end_id:
                self.stop_reason = output.stop_reason
        if not text and self.finish_reason is None:
            return None
        tokens, self._held_tokens = self._held_tokens, []
        token_ids, self._held_ids = self._held_ids, []
        return Piece(self, text, tokens, token_ids, self.finish_reason is not None)

    def _decode(self, output: SequenceOutput) -> str:
        text = ""
        scanner, num_last = self._scanner, len(output.token_ids) - 1
        for position, token_id in enumerate(output.token_ids):
            self.token_ids.append(token_id)
            self._held_ids.append(token_id)
            offset = self._num_decoded
            if position == num_last and output.finish_reason == "stop":  # it is no text
                if output.logprobs and self._scores_end:
                    self._held_tokens.append(TokenInfo(output.logprobs[position], offset))
                break
            piece = self._stream.push(token_id)
            self._num_decoded += len(piece)
            if output.logprobs:
                self._held_tokens.append(TokenInfo(output.logprobs[position], offset))
            text += scanner.push(piece, may_stop=len(self.token_ids) > self.params.min_tokens)
            if scanner.matched is not None:
                break
        if output.finish_reason is not None and scanner.matched is None:
            text += scanner.push(self._stream.finish())
            if scanner.matched is None:
                text += scanner.finish()
        if scanner.matched is not None:
            self._drop_after(scanner.num_sent)
        return text

    def _drop_after(self, num_chars: int) -> None:
        """Tokens that lie in the stop string are not reported."""
        self._held_tokens = [token for token in self._held_tokens if token.offset < num_chars]
