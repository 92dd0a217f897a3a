"""From a checked body to what the engine runs: prompts as token ids, resolved parameters, seeds.

Seeds. A request without `seed` gets a random one for every sequence. With one, choice 0 of every
prompt uses it as it is and choice i > 0 SplitMix64 of it and i: the same prompt and seed give the
same choices wherever the prompt stands in a batch.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from remora.cluster.openai_schema import SamplingRequest
from remora.comm.errors import RequestError
from remora.comm.messages import SamplingParams

COMPLETION_TOKENS = 16  # max_tokens of /v1/completions where none is given, as OpenAI has it
GREEDY_BELOW = 1e-5  # a temperature under this divides logits into overflow: it means greedy
_MASK_64 = (1 << 64) - 1
_SEED_MASK = (1 << 63) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What an ingress knows of the model it serves."""

    id: str  # as clients name it
    root: str  # the checkpoint it came from
    created_unix_s: int
    max_model_len: int  # tokens, prompt + output
    vocab_size: int  # token ids are in [0, vocab_size)
    fingerprint: str  # `system_fingerprint`


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """The deployment's bounds on one request."""

    batch_max: int
    n_max: int
    logprobs_max: int
    queue_max: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt of a request."""

    ids: list[int]
    text: str | None  # None when it came as token ids
    params: SamplingParams  # without the seed of a sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One request, resolved: what `Generation` runs. Choice c is choice c % n of prompt c // n."""

    prompts: tuple[Prompt, ...]
    n: int
    seed: int | None
    stops: tuple[str, ...]
    skip_special_tokens: bool
    priority: int
    domain: str | None = None  # of routing statistics
    turn_end_id: int | None = None  # of a chat: ends the answer like eos, and is not reported
    scores_end: bool = False  # the token that ends has log-probabilities in the answer, too

    @property
    def num_sequences(self) -> int:
        """Sequences that the engine will run."""
        return len(self.prompts) * self.n


def check_model(name: str | None, model: ModelInfo) -> None:
    """Raises `RequestError` 404 `model_not_found` unless `name` is the model served here."""
    if name is not None and name != model.id:
        raise RequestError(
            f"the model {name[:128]!r} does not exist; served here: {model.id!r}",
            status=404,
            param="model",
            code="model_not_found",
            type="not_found_error",
        )


def check_counts(num_prompts: int, n: int, limits: RequestLimits) -> None:
    """Raises `RequestError` when a request asks for too many sequences at once."""
    if n > limits.n_max:
        raise RequestError(f"n = {n}: at most {limits.n_max} is allowed", param="n")
    if num_prompts > limits.batch_max:
        raise RequestError(
            f"{num_prompts} prompts: at most {limits.batch_max} are allowed in one request",
            param="prompt",
        )
    if num_prompts * n > limits.queue_max:
        raise RequestError(
            f"{num_prompts} prompts x n = {n} are {num_prompts * n} sequences: at most"
            f" {limits.queue_max} are allowed at once",
            param="n",
        )


def check_ids(ids: Sequence[int], model: ModelInfo, param: str) -> None:
    """Raises `RequestError` for a token id outside the vocabulary."""
    highest = max(ids, default=0)
    if highest >= model.vocab_size:
        raise RequestError(
            f"{param}: token id {highest} is outside the vocabulary: 0 to {model.vocab_size - 1}",
            param=param,
        )


def resolve_max_tokens(
    num_prompt: int, asked: int | None, default: int | None, model: ModelInfo, param: str
) -> int:
    """Tokens that may be generated after a prompt of `num_prompt` tokens.

    Args:
        asked: what the client said; None: `default`, as far as it fits (None: all that fits).

    Raises:
        RequestError: prompt, or prompt and `asked`, exceed the context.
    """
    room = model.max_model_len - num_prompt
    if num_prompt == 0:
        raise RequestError("the prompt is empty: at least one token is needed", param="prompt")
    if room < 0 or (room == 0 and asked != 0) or (asked is not None and asked > room):
        wanted = f" and {asked} were asked for in {param}" if asked is not None else ""
        lower = f" or lower {param}" if room > 0 else ""
        raise RequestError(
            f"this model's maximum context length is {model.max_model_len} tokens, but the prompt"
            f" has {num_prompt}{wanted}: shorten the prompt{lower}",
            param="prompt" if asked is None else param,
            code="context_length_exceeded",
        )
    if asked is not None:
        return asked
    return room if default is None else min(default, room)


def resolve_sampling(
    request: SamplingRequest,
    model: ModelInfo,
    *,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
    turn_end_id: int | None = None,
) -> SamplingParams:
    """The engine's parameters: defaults applied, everything in range; the seed comes later.

    Raises:
        RequestError: parameters that contradict each other or the model.
    """
    min_tokens = request.min_tokens or 0
    if min_tokens > max_tokens:
        raise RequestError(
            f"min_tokens = {min_tokens} is above max_tokens = {max_tokens}", param="min_tokens"
        )
    bias = {int(key): value for key, value in (request.logit_bias or {}).items()}
    check_ids(list(bias), model, "logit_bias")
    stop_ids = tuple(request.stop_token_ids or ())
    check_ids(stop_ids, model, "stop_token_ids")
    if turn_end_id is not None and turn_end_id not in stop_ids and not request.ignore_eos:
        stop_ids = (*stop_ids, turn_end_id)
    temperature = _or(request.temperature, 1.0)
    top_p = _or(request.top_p, 1.0)
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=0.0 if temperature < GREEDY_BELOW or top_p == 0 else temperature,
        top_p=1.0 if top_p == 0 else top_p,  # nothing but the best token: greedy, above
        top_k=max(request.top_k or 0, 0),
        min_p=_or(request.min_p, 0.0),
        presence_penalty=_or(request.presence_penalty, 0.0),
        frequency_penalty=_or(request.frequency_penalty, 0.0),
        repetition_penalty=_or(request.repetition_penalty, 1.0),
        logit_bias=bias,
        min_tokens=min_tokens,
        stop_token_ids=stop_ids,
        ignore_eos=bool(request.ignore_eos),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def check_logprobs(count: int | None, limits: RequestLimits, param: str) -> None:
    """Raises `RequestError` when more log-probabilities are asked for than are allowed."""
    if count is not None and count > limits.logprobs_max:
        raise RequestError(
            f"{param} = {count}: at most {limits.logprobs_max} is allowed", param=param
        )


def sequence_seed(seed: int | None, choice: int) -> int:
    """Seed of choice `choice` (0 .. n-1) of a prompt, in [0, 2**63)."""
    if seed is None:
        return secrets.randbits(63)
    if choice:  # of neighbouring seeds, too, all choices differ: so not of their sum alone
        seed = splitmix64(splitmix64(seed) + choice)
    return seed & _SEED_MASK


def splitmix64(state: int) -> int:
    """One output of SplitMix64 (Steele, Lea and Flood 2014) from any integer, in [0, 2**64)."""
    z = (state + 0x9E3779B97F4A7C15) & _MASK_64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return z ^ (z >> 31)


def with_seed(params: SamplingParams, seed: int) -> SamplingParams:
    """The parameters of one sequence."""
    return msgspec.structs.replace(params, seed=seed)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
