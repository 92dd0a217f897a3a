"""What clients send and get: the OpenAI-compatible bodies, as pydantic models.

Requests are checked strictly (a bool is no integer, no NaN, no infinity), `null` means absent, and
unknown fields are ignored, but for those that other servers know and that would change what comes
(`NOT_SERVED`). Lists stop at their first bad item: a body is bounded, a report of every
fault in it would not be. What depends on the model or the deployment (context length, vocabulary,
`n_max`) is checked where the request is planned. The models also are our OpenAPI file.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

STOP_MAX = 64
STOP_CHARS_MAX = 1024
TOKEN_MAX = 2**31 - 1
BIAS_MAX = 1024
DOMAIN_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"

TokenId = Annotated[int, Field(ge=0, le=TOKEN_MAX)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Text = Annotated[str, Field(min_length=1)]
StopText = Annotated[str, Field(min_length=1, max_length=STOP_CHARS_MAX)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**64 - 1)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
BiasKey = Annotated[str, Field(pattern=r"^[0-9]{1,10}$")]


def _check_few(value: Any) -> Any:
    """Before its items are looked at: every bad item would be an error of its own."""
    if isinstance(value, dict) and len(value) > BIAS_MAX:
        raise ValueError(f"{len(value)} entries, at most {BIAS_MAX} are allowed")
    return value


_few_biases = BeforeValidator(_check_few)

# Of vLLM's bodies: who sends one counts on it.
NOT_SERVED = (
    "bad_words", "guided_choice", "guided_grammar", "guided_json", "guided_regex",
    "include_stop_str_in_output", "prompt_logprobs", "structured_outputs",
    "truncate_prompt_tokens", "use_beam_search",
)  # fmt: skip


def _check_served(body: Any) -> Any:
    """Before fields are looked at, which would not be found."""
    for name in NOT_SERVED if isinstance(body, dict) else ():
        value = body.get(name)
        if value is not None and value is not False and value not in ("", [], {}):
            raise ValueError(f"{name} is not supported")
    return body


def _real(low: float, high: float) -> Any:
    return Field(default=None, ge=low, le=high, allow_inf_nan=False)


class Request(BaseModel):
    """Base of every request body."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, protected_namespaces=())


class StreamOptions(Request):
    """What a stream carries beside text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingRequest(Request):
    """What chat and completions have in common."""

    _served = model_validator(mode="before")(_check_served)

    model: str | None = None
    frequency_penalty: float | None = _real(-2, 2)
    presence_penalty: float | None = _real(-2, 2)
    repetition_penalty: float | None = _real(0.01, 100)
    temperature: float | None = _real(0, 2)
    top_p: float | None = _real(0, 1)
    top_k: Annotated[int, Field(ge=-1, le=TOKEN_MAX)] | None = None
    min_p: float | None = _real(0, 1)
    logit_bias: Annotated[dict[BiasKey, Bias], Field(max_length=BIAS_MAX), _few_biases] | None = (
        None
    )
    n: Annotated[int, Field(ge=1, le=4096)] | None = None
    seed: Seed | None = None
    stop: (
        StopText | Annotated[list[StopText], Field(max_length=STOP_MAX, fail_fast=True)] | None
    ) = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=256, fail_fast=True)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=TOKEN_MAX)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    priority: Annotated[int, Field(ge=-(2**31), le=TOKEN_MAX)] | None = None
    domain: Annotated[str, Field(pattern=DOMAIN_PATTERN)] | None = None  # of routing statistics
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """The stop strings, none given or several."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Whether every chunk of a stream carries usage so far."""
        return self.include_usage and bool(
            self.stream_options and self.stream_options.continuous_usage_stats
        )


class CompletionRequest(SamplingRequest):
    """Body of `/v1/completions`."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)]
    )
    max_tokens: Annotated[int, Field(ge=0, le=TOKEN_MAX)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=1024)] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None


class TextPart(Request):
    """One part of a message's content; only text is served."""

    type: Literal["text"]
    text: str


class Message(Request):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[dict[str, Any]], Field(max_length=0)] | None = None

    @property
    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content or ())


Messages = Annotated[list[Message], Field(min_length=1, fail_fast=True)]


class ResponseFormat(Request):
    """Only free text is served yet."""

    type: Literal["text"]


class ChatRequest(SamplingRequest):
    """Body of `/v1/chat/completions`."""

    messages: Messages
    max_tokens: Annotated[int, Field(ge=1, le=TOKEN_MAX)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=TOKEN_MAX)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=1024)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    functions: Annotated[list[dict[str, Any]], Field(max_length=0)] | None = None
    function_call: Literal["none", "auto"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    echo: Literal[False] | None = None

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """What the chat template is told; a message that is continued gets no turn after it."""
        found = dict(self.chat_template_kwargs or {})
        if self.continue_final_message:
            found |= {"continue_final_message": True, "add_generation_prompt": False}
        if self.add_generation_prompt is not None:
            found["add_generation_prompt"] = self.add_generation_prompt
        return found


class TokenizeRequest(Request):
    """Body of `/tokenize`: a prompt, or messages through the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(Request):
    """Body of `/detokenize`."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


# Answers. Built by hand where they stream; these models describe them in the OpenAPI file.


class Answer(BaseModel):
    """Base of every answer."""

    model_config = ConfigDict(protected_namespaces=())


class ErrorDetail(Answer):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Answer):
    """The body of every error."""

    error: ErrorDetail


class PromptTokensDetails(Answer):
    """Where prompt tokens came from."""

    cached_tokens: int


class Usage(Answer):
    """Tokens of a request over all its prompts and choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(Answer):
    """Log-probabilities as `/v1/completions` has them; the first of an echoed prompt is null."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(Answer):
    """One continuation."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class CompletionResponse(Answer):
    """Answer of `/v1/completions`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class TopLogprob(Answer):
    """One candidate of a position."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """The chosen token of a position and its rivals."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    """Log-probabilities as chat has them."""

    content: list[TokenLogprob]


class ChatMessage(Answer):
    """What the model said."""

    role: Literal["assistant"]
    content: str
    refusal: str | None = None


class ChatChoice(Answer):
    """One answer of a chat."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatResponse(Answer):
    """Answer of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None


class ModelCard(Answer):
    """One model served here."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: int


class ModelList(Answer):
    """Answer of `/v1/models`."""

    object: Literal["list"]
    data: list[ModelCard]


class TokenizeResponse(Answer):
    """Answer of `/tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str]


class DetokenizeResponse(Answer):
    """Answer of `/detokenize`."""

    prompt: str


class HealthResponse(Answer):
    """Answer of `/health` and `/ready`."""

    status: str
    dense_groups: int
    dense_groups_serving: int
    # that no living shard holds, over all layers; null: the coordinator has not told
    experts_without_replica: int | None
