"""Which requests a dense rank refuses, and when an accepted one is over. Pure."""

from remora.actors.dense_events import DenseLimits, Slice, SliceResult
from remora.actors.sequence import Sequence
from remora.comm.messages import FinishReason, Submit


def num_blocks_at_most(submit: Submit, block_size: int) -> int:
    """Blocks that the request fills when it runs to `max_tokens`; the last token needs no K/V."""
    num_tokens = max(len(submit.prompt_ids), len(submit.prompt_ids) + submit.params.max_tokens - 1)
    return -(-num_tokens // block_size)


def refusal(submit: Submit, limits: DenseLimits) -> str | None:
    """Why this request can never run here, with the numbers; None when it can."""
    num_prompt, max_tokens = len(submit.prompt_ids), submit.params.max_tokens
    if num_prompt == 0:
        return "the prompt is empty; it must have at least one token"
    if max_tokens < 0:
        return f"max_tokens is {max_tokens}; it must not be negative"
    if num_prompt + max_tokens > limits.max_model_len:
        return (
            f"prompt of {num_prompt} tokens + max_tokens {max_tokens} "
            f"> max_model_len {limits.max_model_len}"
        )
    if submit.output_ids and len(submit.output_ids) >= max_tokens:
        return f"{len(submit.output_ids)} tokens were generated before, max_tokens is {max_tokens}"
    if submit.output_ids and submit.params.prompt_logprobs is not None:
        return "prompt_logprobs come with the first token, and this sequence has had that"
    num_blocks = num_blocks_at_most(submit, limits.block_size)
    if num_blocks > limits.num_blocks:
        return (
            f"prompt of {num_prompt} tokens + max_tokens {max_tokens} needs {num_blocks} KV blocks "
            f"of {limits.block_size} tokens; there are {limits.num_blocks}"
        )
    named_ids = submit.prompt_ids + submit.output_ids + list(submit.params.logit_bias)
    lowest, highest = min(named_ids), max(named_ids)
    if lowest < 0 or highest >= limits.vocab_size:
        wrong = lowest if lowest < 0 else highest
        return f"token id {wrong} is outside the vocabulary: 0 to {limits.vocab_size - 1}"
    return None


def check_result(piece: Slice, result: SliceResult, vocab_size: int) -> None:
    """Raises `AssertionError` unless the model runner answered what the slice asked."""
    token_id = result.token_id
    name = piece.sequence.request_id
    assert (token_id is not None) == piece.sample, (
        f"{name!r}: sampled token {token_id} for a slice with sample={piece.sample}"
    )
    assert token_id is None or 0 <= token_id < vocab_size, (
        f"{name!r}: sampled token {token_id} is outside 0 to {vocab_size - 1}"
    )
    wants_logprobs = piece.sample and piece.sequence.params.logprobs is not None
    assert (result.logprobs is not None) == wants_logprobs, (
        f"{name!r}: logprobs {result.logprobs} for a slice where wanted={wants_logprobs}"
    )
    assert len(result.prompt_logprobs) == piece.num_prompt_logprobs, (
        f"{name!r}: {len(result.prompt_logprobs)} prompt logprobs != {piece.num_prompt_logprobs}"
    )


def finish_of(sequence: Sequence) -> tuple[FinishReason | None, int | None]:
    """(finish_reason, stop_reason) of a running sequence after its newest token.

    A stop token ends it only after `min_tokens` others, as the sampler masks it until then. The
    stop reason is the token for `stop_token_ids` and None for the model's own eos. The model's
    length needs no check here: `refusal` holds prompt + max_tokens <= max_model_len.
    """
    params = sequence.params
    num_outputs = len(sequence.output_ids)
    if num_outputs > params.min_tokens and sequence.output_ids[-1] in sequence.stop_ids:
        token_id = sequence.output_ids[-1]
        return "stop", None if token_id in sequence.eos_ids else token_id
    if num_outputs >= params.max_tokens:
        return "length", None
    return None, None
