"""Text that comes in pieces: the parts join to the whole, and no stop string ever shows."""

import itertools
import random
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from support.serving import demo_tokenizer
from tokenizers import decoders, models
from transformers import PreTrainedTokenizerFast

from remora.actors.tokenizer import Tokenizer
from remora.cluster.detokenize import StopScanner, naive_stop

texts = st.text(alphabet="ab. \n", max_size=30)
stops = st.lists(st.text(alphabet="ab. \n", min_size=1, max_size=4), max_size=4)


def scan(pieces: list[str], stops: list[str]) -> tuple[str, str | None, list[str]]:
    scanner = StopScanner(stops)
    out = []
    for piece in pieces:
        out.append(scanner.push(piece))
        if scanner.matched is not None:
            break
    else:
        out.append(scanner.finish())
    assert scanner.num_sent == sum(len(part) for part in out)
    return "".join(out), scanner.matched, out


@settings(max_examples=300)
@given(text=texts, stops=stops, cuts=st.lists(st.integers(0, 30), max_size=8))
def test_scanner_equals_its_slow_twin_however_the_text_is_cut(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(bounds)]
    sent, matched, _ = scan(pieces, stops)
    assert (sent, matched) == naive_stop(text, stops)


def test_nothing_of_a_stop_string_is_sent_early() -> None:
    sent, matched, parts = scan(["one <", "/", "en", "d", "> two"], ["</end>"])
    assert (sent, matched) == ("one ", "</end>")
    assert parts == ["one ", "", "", "", ""]


def test_held_text_comes_out_when_it_was_no_stop() -> None:
    sent, matched, parts = scan(["a</e", "x", "</en"], ["</end>"])
    assert (sent, matched) == ("a</ex</en", None)
    assert parts == ["a", "</ex", "", "</en"]


def test_min_tokens_makes_a_stop_string_plain_text() -> None:
    scanner = StopScanner(["x"])
    assert scanner.push("axb", may_stop=False) == "axb"
    assert scanner.push("cx") == "c" and scanner.matched == "x"


WORDS = ["h\u00e9llo", " \U0001f600", "\u65e5\u672c\u8a9e", "\n", "a", " the", "<|im_end|>",
         "\u200d", "\U0001f469\u200d\U0001f469\u200d\U0001f467", "\ufffd", "\u00e9"]  # fmt: skip


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_stream_equals_decoding_at_once(seed: int, skip: bool) -> None:
    """Byte-level BPE: any token ids at all, characters cut in the middle included."""
    tokenizer = demo_tokenizer()
    chance = random.Random(seed)
    for _ in range(60):
        if chance.random() < 0.5:
            ids = [chance.randrange(tokenizer.vocab_size) for _ in range(chance.randint(1, 30))]
        else:
            ids = tokenizer.encode("".join(chance.choice(WORDS) for _ in range(12)))
            ids[chance.randrange(len(ids))] = chance.randrange(300)
        prompt = [chance.randrange(tokenizer.vocab_size) for _ in range(chance.randint(0, 8))]
        stream = tokenizer.stream(prompt, skip_special_tokens=skip)
        text = "".join(stream.push(token_id) for token_id in ids) + stream.finish()
        assert text == tokenizer.decode(ids, skip_special_tokens=skip), (ids, prompt)


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = ["<s>", *BYTES, "hello", " world", "!"]  # by id


def byte_fallback(directory: Path) -> Tokenizer:
    """As SentencePiece checkpoints have it: bytes of a run are UTF-8 together, or none of them."""
    vocab = {piece: index for index, piece in enumerate(PIECES)}
    model = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    model.add_special_tokens(["<s>"])
    model.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    PreTrainedTokenizerFast(tokenizer_object=model).save_pretrained(str(directory))
    return Tokenizer(directory)


def naive_text(ids: list[int], *, skip: bool) -> str:
    """Slow twin for byte fallback: of a run of bytes the characters before the first wrong byte,
    and U+FFFD for each byte from there on."""
    text = ""
    pieces = [PIECES[token_id] for token_id in ids if not (skip and PIECES[token_id] == "<s>")]
    for is_run, group in itertools.groupby(pieces, lambda piece: piece in BYTES):
        if not is_run:
            text += "".join(group)
            continue
        run = bytes(BYTES.index(piece) for piece in group)
        length = next(n for n in range(len(run), -1, -1) if is_text(run[:n]))
        text += run[:length].decode() + "\ufffd" * (len(run) - length)
    return text


def is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_bytes_that_never_become_a_character_end_no_stream(tmp_path: Path) -> None:
    """A line break comes out at once; the byte behind it makes both no UTF-8 when decoded."""
    stream = byte_fallback(tmp_path).stream([])
    ids = [PIECES.index(piece) for piece in ("hello", "<0x0A>", "<0xF0>", " world", "!")]
    parts = [stream.push(token_id) for token_id in ids]
    assert parts == ["hello", "\n", "", "\ufffd world", "!"]


def test_streams_of_byte_fallback_are_text_wherever_they_can_be(tmp_path: Path) -> None:
    tokenizer = byte_fallback(tmp_path)
    texts = st.sampled_from(["\n", "\u00e9", "\U0001f600"])
    characters = texts.map(lambda text: [PIECES.index(BYTES[byte]) for byte in text.encode()])
    singles = ["hello", " world", "<s>", *(BYTES[byte] for byte in b"\n \xc3\xa9\xf0\x9f\xff")]
    streams = st.lists(
        characters | st.sampled_from(singles).map(lambda piece: [PIECES.index(piece)]), max_size=12
    )

    @settings(max_examples=400)
    @given(prompt=streams, parts=streams, skip=st.booleans())
    def check(prompt: list[list[int]], parts: list[list[int]], skip: bool) -> None:
        before, ids = list(itertools.chain(*prompt)), list(itertools.chain(*parts))
        stream = tokenizer.stream(before, skip_special_tokens=skip)
        text = "".join(stream.push(token_id) for token_id in ids) + stream.finish()
        assert text == naive_text(ids, skip=skip)
        at_once = tokenizer.decode(ids, skip_special_tokens=skip)
        assert text == at_once or "\ufffd" in at_once

    check()


def test_token_bytes_join_to_the_text() -> None:
    tokenizer = demo_tokenizer()
    text = "caf\u00e9 \U0001f600 \u65e5\u672c\n"
    ids = tokenizer.encode(text)
    assert b"".join(tokenizer.token_bytes(token_id) for token_id in ids) == text.encode()
    parts = [tokenizer.token_text(token_id) for token_id in ids]
    assert any(part.startswith("bytes:\\x") for part in parts)
    assert len(set(parts)) == len({*ids})  # distinct tokens have distinct names


def test_the_chat_template_tells_what_ends_a_turn() -> None:
    tokenizer = demo_tokenizer()
    assert tokenizer.turn_end_id == tokenizer.encode("<|im_end|>", add_special_tokens=False)[0]
