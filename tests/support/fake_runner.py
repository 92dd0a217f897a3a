"""A model runner without a model: tokens are a function of the tokens before them, K/V is checked.

The "K/V" of a position is a digest of all tokens up to it. The runner writes it through the block
tables of a step and, before it samples, reads every position back: a block shared too early,
freed too early, written twice or put in the wrong place cannot look right.
"""

from remora.actors.dense_events import DenseLimits, Slice, SliceResult, StepPlan
from remora.comm.messages import TokenLogprobs

_MASK = (1 << 61) - 1


def digest(parent: int, token_id: int) -> int:
    """Digest of a sequence of tokens from that of all but the last; 0 for none."""
    return ((parent ^ (token_id + 1)) * 0x9E3779B97F4A7C15 + 0xD1B54A32D192ED03) % _MASK + 1


def digests(token_ids: list[int]) -> list[int]:
    """Digest of each leading part, the empty one first: len(token_ids) + 1 of them."""
    chain = [0]
    for token_id in token_ids:
        chain.append(digest(chain[-1], token_id))
    return chain


def fake_token(prefix_digest: int, vocab_size: int) -> int:
    """The token that follows a prefix."""
    return (prefix_digest >> 7) % vocab_size


def fake_logprobs(prefix_digest: int, token_id: int) -> TokenLogprobs:
    """Log-probabilities of a token after a prefix."""
    return TokenLogprobs(token_id, -((prefix_digest ^ token_id) % 97) / 10, 1)


class FakeRunner:
    """Executes step plans.

    Args:
        limits: those of the state machine.
        says: for a request id, the tokens to sample at output 0, 1, ... instead of `fake_token`.
    """

    def __init__(self, limits: DenseLimits, says: dict[str, list[int]] | None = None) -> None:
        self.limits = limits
        self.says = {} if says is None else says
        self.num_tokens_total = 0
        self.kv: list[int | None] = [None] * (limits.num_blocks * limits.block_size)

    def run(self, plan: StepPlan) -> list[SliceResult]:
        """Writes and checks the K/V of the step's tokens; returns what was sampled."""
        cells: list[int] = []
        for piece in plan.slices:
            chain = digests(piece.sequence.token_ids[: piece.position])
            assert piece.sequence.token_ids[piece.start : piece.position] == piece.token_ids
            for position in range(piece.start, piece.position):
                cells.append(self._cell(piece, position))
                self.kv[cells[-1]] = chain[position + 1]
        assert len(cells) == plan.num_tokens <= self.limits.max_tokens_per_step
        assert len(set(cells)) == len(cells), f"a cell written twice in step {plan.step_id}"
        self.num_tokens_total += len(cells)
        return [self._read(piece) for piece in plan.slices]

    def _cell(self, piece: Slice, position: int) -> int:
        index, offset = divmod(position, self.limits.block_size)
        return piece.block_table[index] * self.limits.block_size + offset

    def _read(self, piece: Slice) -> SliceResult:
        tokens = piece.prompt_ids + piece.output_ids
        chain = digests(tokens)
        found = [self.kv[self._cell(piece, p)] for p in range(piece.position)]
        assert found == chain[1 : piece.position + 1], (
            f"{piece.sequence}: wrong K/V, first at {_first_difference(found, chain[1:])}"
        )
        prompt_logprobs = [
            fake_logprobs(chain[p + 1], tokens[p + 1])
            for p in range(piece.start, piece.start + piece.num_prompt_logprobs)
        ]
        if not piece.sample:
            return SliceResult(prompt_logprobs=prompt_logprobs)
        assert piece.position == len(tokens), f"{piece.sequence} samples at {piece.position}"
        script = self.says.get(piece.request_id, [])
        if piece.num_outputs < len(script):
            token_id = script[piece.num_outputs]
        else:
            token_id = fake_token(chain[-1], self.limits.vocab_size)
        logprobs = None
        if piece.params.logprobs is not None:
            logprobs = fake_logprobs(chain[-1], token_id)
        return SliceResult(token_id=token_id, logprobs=logprobs, prompt_logprobs=prompt_logprobs)


def _first_difference(found: list[int | None], expected: list[int]) -> int:
    return next(i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b)
