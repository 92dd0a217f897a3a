"""The `openai` client, unmodified, against a real port: answers have OpenAI's shapes."""

import http.client
import json
import threading
from collections.abc import Callable, Iterator

import openai
import pytest
from openai import OpenAI
from support.fake_engine import FakeEngine
from support.serving import MODEL, STORY, Server, demo_tokenizer, make_engine, serving

CHAT: list[dict[str, str]] = [{"role": "user", "content": "Tell me a story."}]


@pytest.fixture(scope="module")
def engine() -> Iterator[FakeEngine]:
    with make_engine() as engine:
        yield engine


@pytest.fixture(scope="module")
def server(engine: FakeEngine) -> Iterator[Server]:
    with serving(engine) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def story_ids() -> list[int]:
    return demo_tokenizer().encode(STORY)


def test_chat(client: OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=CHAT, temperature=0)  # type: ignore[arg-type]
    choice = answer.choices[0]
    assert choice.message.content == STORY
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "stop"
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    assert answer.usage.completion_tokens == len(story_ids()) + 1  # eos was generated too
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + len(story_ids()) + 1
    assert answer.model == MODEL and answer.id.startswith("chatcmpl-")


def test_chat_stream_has_the_shape_clients_rely_on(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL,
        messages=CHAT,  # type: ignore[arg-type]
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    first, *middle, finish, usage = chunks
    assert first.choices[0].delta.role == "assistant"
    assert first.choices[0].delta.content == ""
    assert "".join(c.choices[0].delta.content or "" for c in middle) == STORY
    assert all(c.choices[0].finish_reason is None and c.usage is None for c in middle)
    assert finish.choices[0].finish_reason == "stop"
    assert finish.choices[0].delta.content is None
    assert usage.choices == [] and usage.usage is not None
    assert usage.usage.completion_tokens == len(story_ids()) + 1
    assert len({c.id for c in chunks}) == 1


def test_chat_logprobs(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=CHAT,  # type: ignore[arg-type]
        temperature=0,
        logprobs=True,
        top_logprobs=2,
        max_tokens=4,
    )
    choice = answer.choices[0]
    assert choice.finish_reason == "length"
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert [len(token.top_logprobs) for token in choice.logprobs.content] == [2] * 4
    assert "".join(token.token for token in choice.logprobs.content) == choice.message.content
    data = b"".join(bytes(token.bytes or ()) for token in choice.logprobs.content)
    assert data.decode() == choice.message.content


def test_n_choices_are_derived_from_one_seed(client: OpenAI) -> None:
    def ask() -> list[str]:
        answer = client.completions.create(model=MODEL, prompt="x", n=3, seed=11, max_tokens=5)
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        return [choice.text for choice in answer.choices]

    first = ask()
    assert first == ask()
    assert len(set(first)) == 3
    alone = client.completions.create(model=MODEL, prompt="x", seed=11, max_tokens=5)
    assert alone.choices[0].text == first[0]


def test_without_a_seed_equal_prompts_differ(client: OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=["x"] * 12, max_tokens=8)
    assert len({choice.text for choice in answer.choices}) > 1


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_cut_and_hold_back(client: OpenAI, engine: FakeEngine, stream: bool) -> None:
    common = {"model": MODEL, "prompt": "x", "temperature": 0, "max_tokens": 100}
    stops = [" stop here", "nowhere", "swam!"]
    if stream:
        chunks = list(client.completions.create(**common, stop=stops, stream=True))  # type: ignore[call-overload]
        text = "".join(chunk.choices[0].text for chunk in chunks)
        finish = chunks[-1].choices[0].finish_reason
        assert not any("stop" in chunk.choices[0].text for chunk in chunks)
    else:
        answer = client.completions.create(**common, stop=stops)  # type: ignore[call-overload]
        text, finish = answer.choices[0].text, answer.choices[0].finish_reason
        assert answer.choices[0].stop_reason == " stop here"
    assert text == STORY[: STORY.index(" stop here")]
    assert finish == "stop"
    request_id = engine.submitted[-1].request_id
    # Aborted, unless the engine, which does not wait for us, had come to its end by then.
    _wait_until(lambda: request_id in engine.aborted or not engine.state.has_work)


def test_stop_token_ids_and_ignore_eos(client: OpenAI) -> None:
    ids = story_ids()
    extra = {"stop_token_ids": [ids[3]], "return_token_ids": True}
    answer = client.completions.create(
        model=MODEL, prompt="x", temperature=0, max_tokens=50, extra_body=extra
    )
    assert answer.choices[0].text == demo_tokenizer().decode(ids[:3])
    assert answer.choices[0].token_ids == ids[:4]  # type: ignore[attr-defined]
    assert answer.choices[0].stop_reason == ids[3]  # type: ignore[attr-defined]
    longer = client.completions.create(
        model=MODEL,
        prompt="x",
        temperature=0,
        max_tokens=len(ids) + 5,
        extra_body={"ignore_eos": True},
    )
    assert longer.choices[0].finish_reason == "length"
    assert longer.usage is not None and longer.usage.completion_tokens == len(ids) + 5


def test_min_tokens_outlives_stop_strings(client: OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL,
        prompt="x",
        temperature=0,
        max_tokens=20,
        stop=" a",
        extra_body={"min_tokens": 20},
    )
    assert answer.choices[0].finish_reason == "length"
    assert " a" in answer.choices[0].text


def test_batches_of_strings_and_of_token_ids(client: OpenAI) -> None:
    texts = ["one", "two", "three"]
    tokenizer = demo_tokenizer()
    by_text = client.completions.create(model=MODEL, prompt=texts, n=2, seed=3, max_tokens=6)
    ids = [tokenizer.encode(text) for text in texts]
    by_ids = client.completions.create(model=MODEL, prompt=ids, n=2, seed=3, max_tokens=6)
    assert [c.text for c in by_text.choices] == [c.text for c in by_ids.choices]
    assert [c.index for c in by_ids.choices] == list(range(6))
    assert by_ids.usage is not None
    assert by_ids.usage.prompt_tokens == sum(len(one) for one in ids)
    single = client.completions.create(model=MODEL, prompt=ids[1], seed=3, max_tokens=6)
    assert single.choices[0].text == by_ids.choices[2].text


def test_echo_with_logprobs_as_evaluation_harnesses_ask(client: OpenAI) -> None:
    """lm-eval: token ids in, echo, logprobs 1, max_tokens 1 (or 0), many prompts at once."""
    tokenizer = demo_tokenizer()
    prompts = [tokenizer.encode("The whale swam"), tokenizer.encode("A remora")]
    end: dict[str, int] = {"0": 100}
    for max_tokens, bias in ((0, {}), (1, {}), (1, end)):
        answer = client.completions.create(
            model=MODEL,
            prompt=prompts,
            echo=True,
            logprobs=1,
            max_tokens=max_tokens,
            temperature=0,
            logit_bias=bias,
        )
        finish = "stop" if bias else "length"
        assert {choice.finish_reason for choice in answer.choices} == {finish}
        for prompt, choice in zip(prompts, answer.choices, strict=True):
            logprobs = choice.logprobs
            assert logprobs is not None and logprobs.tokens is not None
            assert logprobs.token_logprobs is not None and logprobs.top_logprobs is not None
            assert len(logprobs.tokens) == len(prompt) + max_tokens
            assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
            assert all(value is not None and value < 0 for value in logprobs.token_logprobs[1:])
            for token, top in list(zip(logprobs.tokens, logprobs.top_logprobs, strict=True))[1:]:
                assert max(top, key=lambda name: top[name]) == token
            assert choice.text.startswith(tokenizer.decode(prompt))
            offsets = logprobs.text_offset
            assert offsets is not None
            if bias:  # the token that ends is scored, and is no text
                assert offsets.pop() == len(choice.text) and logprobs.tokens.pop()
            for token, offset in zip(logprobs.tokens, offsets, strict=True):
                assert choice.text[offset:].startswith(token)


def test_completion_stream_echoes_first(client: OpenAI) -> None:
    stream = client.completions.create(
        model=MODEL, prompt="A whale", echo=True, temperature=0, max_tokens=3, stream=True
    )
    texts = [chunk.choices[0].text for chunk in stream]
    assert texts[0] == "A whale"
    assert "".join(texts).startswith("A whale" + STORY[:4])


def test_streams_of_batches_interleave_to_whole_answers(client: OpenAI) -> None:
    stream = client.completions.create(
        model=MODEL, prompt=["a", "b"], n=2, seed=5, max_tokens=12, stream=True, logprobs=2
    )
    texts: dict[int, str] = {}
    tokens: dict[int, list[str]] = {}
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            if choice.logprobs is not None:
                tokens.setdefault(choice.index, []).extend(choice.logprobs.tokens or [])
    whole = client.completions.create(model=MODEL, prompt=["a", "b"], n=2, seed=5, max_tokens=12)
    assert [texts[i] for i in range(4)] == [choice.text for choice in whole.choices]
    assert all(len(tokens[i]) == 12 for i in range(4))


def test_continuous_usage(client: OpenAI) -> None:
    stream = client.completions.create(
        model=MODEL,
        prompt="x",
        temperature=0,
        max_tokens=4,
        stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},  # type: ignore[typeddict-unknown-key]
    )
    chunks = list(stream)
    counts = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage is not None]
    assert len(counts) == len(chunks)
    assert counts == sorted(counts) and counts[-1] == 4


def test_prefix_cache_shows_in_usage(client: OpenAI) -> None:
    prompt = "The quick brown fox jumps over the lazy dog again and again. " * 3
    first = client.completions.create(model=MODEL, prompt=prompt, max_tokens=1)
    again = client.completions.create(model=MODEL, prompt=prompt, max_tokens=1)
    assert first.usage is not None and again.usage is not None
    assert again.usage.prompt_tokens_details is not None
    assert again.usage.prompt_tokens_details.cached_tokens >= 16


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "remora"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-4")
    assert caught.value.code == "model_not_found"


def test_a_closed_stream_is_aborted_within_a_step(client: OpenAI, engine: FakeEngine) -> None:
    engine.pace_s = 0.01
    try:
        stream = client.completions.create(
            model=MODEL,
            prompt="x",
            max_tokens=200,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        next(iter(stream))
        request_id = engine.submitted[-1].request_id
        stream.close()
        _wait_until(lambda: request_id in engine.aborted)
        _wait_until(lambda: not engine.state.has_work)
    finally:
        engine.pace_s = 0.0


def test_a_client_that_gives_up_waiting_is_aborted(server: Server, engine: FakeEngine) -> None:
    """Not a stream: nothing has been sent when the client hangs up."""
    engine.hold()
    before = len(engine.submitted)
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=30)
    body = json.dumps({"prompt": "x", "max_tokens": 200, "ignore_eos": True})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    _wait_until(lambda: len(engine.submitted) > before)
    connection.close()
    request_id = engine.submitted[before].request_id
    _wait_until(lambda: request_id in engine.aborted)
    engine.release()
    _wait_until(lambda: not engine.state.has_work)


def _wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    pause = threading.Event()
    for _ in range(int(timeout_s / 0.01)):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError(f"not within {timeout_s} s: {condition}")
