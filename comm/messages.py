"""Messages between ingress and dense groups: what one frame of the control stream carries.

Encoded with msgpack by `msgspec` (typed, no code runs on decode). Rows of tensors travel in
`comm.wire` frames instead. Token ids are Python ints in the model's vocabulary.
"""

from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "abort", "error"]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How one sequence is sampled. Everything is resolved: defaults applied, the seed chosen.

    `temperature == 0` is greedy. `top_k == 0` means no limit. Penalties as OpenAI and transformers
    define them: presence and frequency count generated tokens, repetition counts prompt too.
    """

    max_tokens: int  # >= 0; 0 only with prompt_logprobs or echo
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    min_tokens: int = 0  # eos and stop ids are masked before this many tokens
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int = 0  # 0 <= seed < 2**63; key of the counter-based RNG with the position
    logprobs: int | None = None  # None: none; k: the chosen token's and the k most likely
    prompt_logprobs: int | None = None  # the same for prompt positions 1.. (position 0 has none)


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Log-probabilities (natural, of the raw model distribution) at one position."""

    token_id: int
    logprob: float
    rank: int  # 1 = most likely
    top_ids: list[int] = []
    top_logprobs: list[float] = []


class Submit(msgspec.Struct, frozen=True, kw_only=True, tag="submit"):
    """Ingress -> dense group: run this sequence. `request_id` is unique for the cluster's life.

    One whose dense group was lost goes on elsewhere: `output_ids` are the tokens it has had. They
    count as generated (limits, penalties, the position that keys the RNG) and are not sent again.
    """

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    priority: int = 0  # lower runs first; equal in order of arrival
    domain: str | None = None  # the client's name for this kind of traffic; statistics alone use it
    output_ids: list[int] = []  # fewer than max_tokens; then without prompt_logprobs


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Ingress -> dense group: nobody waits for this sequence; free it within one step."""

    request_id: str


class SequenceOutput(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one step produced for one sequence."""

    request_id: str
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] = []  # one for each of token_ids when asked for
    prompt_logprobs: list[TokenLogprobs] | None = None  # once, with the first output
    num_cached_tokens: int = 0  # prompt tokens taken from the prefix cache; with the first output
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None  # the stop token id, when one ended it
    error: str | None = None  # with finish_reason "error"


class EngineStats(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Gauges and running totals of one dense rank, as of the step that carries them."""

    num_running: int = 0
    num_waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    prefix_hit_tokens_total: int = 0
    preemptions_total: int = 0
    steps_total: int = 0
    executor: str = "eager"  # "eager" or "compiled"
    epoch: int = 0


class PeerTraffic(msgspec.Struct, frozen=True, kw_only=True):
    """Frames that one dense rank exchanged with one shard; running totals."""

    uid: str
    level: Literal["host", "remote"]  # the shard's host is the rank's own, or another
    sent_bytes: int  # dispatch
    received_bytes: int  # combine
    load_ratio: float  # (token, expert) pairs lately sent to it over the mean of all shards


class Traffic(msgspec.Struct, frozen=True, kw_only=True):
    """What one dense rank's tokens cost on the way to the shards."""

    peers: list[PeerTraffic]
    remote_copies_per_token: float  # lately; rows to other hosts by token and MoE layer
    local_activation_ratio: float  # lately; pairs on the rank's own host by all pairs


class StepOutputs(msgspec.Struct, frozen=True, kw_only=True, tag="step"):
    """Dense group -> ingress: everything one step produced for that ingress, in one message."""

    outputs: list[SequenceOutput]
    stats: EngineStats


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    """Ingress -> dense group: answer with your gauges."""

    nonce: int


class Pong(msgspec.Struct, frozen=True, kw_only=True, tag="pong"):
    """Dense group -> ingress: the gauges asked for by `Ping`, and whether its shards answer."""

    nonce: int
    stats: EngineStats
    serving: bool = True
    why_not: str | None = None
    retires: bool = False
    traffic: Traffic | None = None  # None: it has no shards yet


ToEngine = Submit | Abort | Ping
ToIngress = StepOutputs | Pong

_encoder = msgspec.msgpack.Encoder()
_to_engine_decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_to_ingress_decoder: msgspec.msgpack.Decoder[ToIngress] = msgspec.msgpack.Decoder(ToIngress)


def encode(message: ToEngine | ToIngress) -> bytes:
    """msgpack bytes of one message."""
    return _encoder.encode(message)


def decode_to_engine(data: bytes | memoryview) -> ToEngine:
    """Inverse of `encode` at a dense group. Raises `msgspec.DecodeError` (or its subclass)."""
    return _to_engine_decoder.decode(data)


def decode_to_ingress(data: bytes | memoryview) -> ToIngress:
    """Inverse of `encode` at an ingress. Raises `msgspec.DecodeError` (or its subclass)."""
    return _to_ingress_decoder.decode(data)
