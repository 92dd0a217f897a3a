"""Text <-> token ids: the checkpoint's own tokenizer and chat template, through `transformers`.

Encoding and templates may take long: callers run them off the event loop. Decoding is incremental
(`TextStream`) and costs about 2 us a token (measured, byte-level BPE of 8,192, a VM of two cores).
"""

import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from remora.comm.errors import RequestError, UnsupportedModelError

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
TEMPLATE_OPTIONS = frozenset({"add_generation_prompt", "continue_final_message", "documents"})
CONTEXT_TOKENS = 6  # prompt tokens a stream starts from: enough to know whether a space is meant


class Tokenizer:
    """The tokenizer of one checkpoint directory.

    Raises:
        UnsupportedModelError: no tokenizer there, or one without a Rust implementation.
    """

    def __init__(self, path: str | Path) -> None:
        from transformers import AutoTokenizer  # slow import, needed only where text is

        try:
            self._outer: Any = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise UnsupportedModelError(f"{path}: cannot load a tokenizer: {error}") from error
        if not getattr(self._outer, "is_fast", False):
            raise UnsupportedModelError(
                f"{path}: {type(self._outer).__name__} has no tokenizer.json form, which is needed"
            )
        self._inner: Any = self._outer.backend_tokenizer
        self.vocab_size: int = self._inner.get_vocab_size(with_added_tokens=True)
        self.has_chat_template: bool = bool(self._outer.chat_template)
        decoder = json.loads(self._inner.to_str()).get("decoder") or {}
        self._is_byte_level = "ByteLevel" in json.dumps(decoder)
        self._specials: set[int] = {
            token_id
            for token_id, token in self._inner.get_added_tokens_decoder().items()
            if token.special
        }
        self._token_bytes: dict[int, bytes] = {}  # bounded by the vocabulary
        own = inspect.signature(self._outer.apply_chat_template).parameters
        self._template_options = frozenset(own)  # the rest are variables of the template
        self.turn_end_id: int | None = self._find_turn_end() if self.has_chat_template else None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. The GIL is released meanwhile."""
        ids: list[int] = self._inner.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD, unknown ids vanish."""
        text: str = self._inner.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for, also where they are a part of a character."""
        known = self._token_bytes.get(token_id)
        if known is None:
            known = self._token_bytes[token_id] = self._find_token_bytes(token_id)
        return known

    def token_text(self, token_id: int) -> str:
        """One token for people: its text, or `bytes:\\xNN...` where it is a part of a character."""
        data = self.token_bytes(token_id)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def render_chat(self, messages: list[dict[str, Any]], kwargs: dict[str, Any]) -> str:
        """The chat template's text, with the generation prompt unless `kwargs` say otherwise.

        Args:
            kwargs: variables of the template, and `TEMPLATE_OPTIONS`.

        Raises:
            RequestError: there is no template, or it refuses these messages.
        """
        if not self.has_chat_template:
            raise RequestError(
                "this model has no chat template: use /v1/completions", code="no_chat_template"
            )
        taken = sorted(kwargs.keys() & self._template_options - TEMPLATE_OPTIONS)
        if taken:  # a template of the client's own would be a program of its own
            raise RequestError(
                f"chat_template_kwargs: {', '.join(taken)} cannot be set; allowed are variables of"
                f" the model's template, and {', '.join(sorted(TEMPLATE_OPTIONS))}",
                param="chat_template_kwargs",
            )
        options = {"add_generation_prompt": True, **kwargs, "tokenize": False}
        try:
            text: str = self._outer.apply_chat_template(messages, **options)
        except Exception as error:  # a template is the checkpoint's program: anything may come
            raise RequestError(
                f"messages: the model's chat template refuses them: {error}", param="messages"
            ) from error
        return text

    def stream(
        self, prompt_ids: Sequence[int], *, skip_special_tokens: bool = True
    ) -> "TextStream":
        """Incremental decoding of what follows `prompt_ids`."""
        return TextStream(self, prompt_ids, skip_special_tokens)

    def _find_token_bytes(self, token_id: int) -> bytes:
        piece = self._inner.id_to_token(token_id)
        if piece is None:
            return b""
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])  # byte fallback
        if self._is_byte_level and token_id not in self._specials:
            try:
                return bytes(_BYTE_OF_CHAR[char] for char in piece)
            except KeyError:  # an added token, spelled as itself
                return str(piece).encode()
        return self.decode([token_id], skip_special_tokens=False).encode()

    def _find_turn_end(self) -> int | None:
        """The special token that the template puts after an assistant's words, if it does.

        A checkpoint may forget it in its eos list; a chat then would never stop.
        """
        mark = "remora-turn-mark"
        turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": mark}]
        try:
            text = self.render_chat(turns, {"add_generation_prompt": False})
        except RequestError:
            return None
        _, found, after = text.partition(mark)
        if not found:
            return None
        head = self.encode(after.lstrip(), add_special_tokens=False)[:1]
        return head[0] if head and head[0] in self._specials else None


class TextStream:
    """Turns token ids into text as they come; the parts join to what decoding at once gives.

    Characters split over tokens wait until they are whole. Decoded are only the tokens since text
    last came out and those that it came from, so a token costs the same at any length. (The
    `DecodeStream` of `tokenizers` does the same and raises where text changes behind what it gave.)
    """

    __slots__ = ("_decode", "_given", "_ids", "_num_given", "_skip")

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], skip_special_tokens: bool
    ) -> None:
        self._decode: Callable[[list[int], bool], str] = tokenizer._inner.decode
        self._skip = skip_special_tokens
        self._ids = list(prompt_ids[-CONTEXT_TOKENS:])
        self._given = self._decode(self._ids, self._skip)  # text of the first `_num_given` ids
        if self._given.endswith(REPLACEMENT):  # within a character: the output stands for itself
            self._ids, self._given = [], ""
        self._num_given = len(self._ids)

    def push(self, token_id: int) -> str:
        """Text that one more token completes; often one token's, sometimes empty."""
        self._ids.append(token_id)
        text = self._decode(self._ids, self._skip)
        if len(text) <= len(self._given) or text.endswith(REPLACEMENT):
            return ""
        return self._give(text)

    def finish(self) -> str:
        """Text of the tokens still held: a character that never became whole (U+FFFD)."""
        return self._give(self._decode(self._ids, self._skip))

    def _give(self, text: str) -> str:
        """What is new in `text`, which is that of all `_ids`; the new ids are the context then."""
        held = self._ids[self._num_given :]
        if text.startswith(self._given):
            new = text[len(self._given) :]
        else:  # byte fallback: bytes that follow made those before them no UTF-8, after the fact
            new = self._decode(held, self._skip)
        self._ids, self._num_given = held, len(held)
        self._given = self._decode(held, self._skip)
        return new


def _byte_of_char() -> dict[str, int]:
    """Inverse of the printable alphabet of byte-level BPE (GPT-2's `bytes_to_unicode`)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    rest = [byte for byte in range(256) if byte not in set(printable)]
    table.update({chr(256 + index): byte for index, byte in enumerate(rest)})
    return table


_BYTE_OF_CHAR = _byte_of_char()
