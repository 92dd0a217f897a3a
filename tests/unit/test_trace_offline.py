"""Traces of texts: what is recorded is what the model's own gates choose, text by text."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.serving import DEMO_MODEL
from transformers import AutoModelForCausalLM

from remora.actors import trace_offline
from remora.actors.tokenizer import Tokenizer
from remora.actors.trace_offline import RecordPlan, TextFile, read_texts, record_texts
from remora.cluster.cli import main
from remora.cluster.trace_command import info_text, trace_info
from remora.comm.errors import TraceError
from remora.comm.trace_reader import read_trace

TEXTS = ["def add(a, b):\n    return a + b\n", "To be, or not to be, that is the question", "x"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in float32, so that no rounding decides between experts."""
    path = tmp_path_factory.mktemp("float32")
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    model.save_pretrained(path)
    for file in DEMO_MODEL.glob("tokenizer*"):
        shutil.copy(file, path)
    return path


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "play.plan.jsonl"
    path.write_text("\n".join([json.dumps(TEXTS[0]), json.dumps({"text": TEXTS[1]})]) + "\n")
    return path


def test_what_is_recorded_is_what_the_gates_choose(
    checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    (tmp_path / "x.txt").write_text(TEXTS[2])
    files = [
        TextFile(path=texts, domain="play"),
        TextFile(path=tmp_path / "x.txt", domain="letters"),
    ]
    plan = RecordPlan(window=9, tokens_max=10_000, batch=3, with_weights=True)
    output = tmp_path / "t.trace"
    count = record_texts(str(checkpoint), files, output, plan)
    trace = read_trace(output)
    tokenizer = Tokenizer(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    at = request = 0
    for text, domain in zip(TEXTS, ("play", "play", "letters"), strict=True):
        ids = tokenizer.encode(text)
        for begin in range(0, len(ids), plan.window):
            window = ids[begin : begin + plan.window]
            with torch.inference_mode():
                logits_L = model(torch.tensor([window]), output_router_logits=True).router_logits
            rows = slice(at, at + len(window))
            assert trace.token_T[rows].tolist() == window
            assert trace.position_T[rows].tolist() == list(range(len(window)))
            assert set(trace.request_T[rows].tolist()) == {request}
            assert {trace.domains[d] for d in trace.domain_T[rows].tolist()} == {domain}
            for layer, logits_TE in enumerate(logits_L):
                top = logits_TE.float().softmax(-1).topk(trace.header.top_k)
                np.testing.assert_array_equal(trace.experts_LTK[layer, rows], top.indices)
                assert trace.weights_LTK is not None
                weights = top.values / top.values.sum(-1, keepdim=True)
                np.testing.assert_allclose(trace.weights_LTK[layer, rows], weights, atol=2e-3)
            at, request = at + len(window), request + 1
    assert at == count == trace.num_tokens


def test_the_command_is_bounded_and_tells_what_it_wrote(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "t.trace"
    arguments = ["trace", "record", str(DEMO_MODEL), "--text", str(texts), "-o", str(output)]
    assert main([*arguments, "--max-tokens", "7", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["tokens"], found["whole"], found["domains"]) == (7, True, {"play": 7})
    assert main([*arguments, "--json"]) == 2
    assert "exists already" in json.loads(capsys.readouterr().out)["error"]["message"]
    output.write_bytes(output.read_bytes()[:-3])
    assert main(["trace", "info", str(output)]) == 0
    assert "not whole" in capsys.readouterr().out
    text = info_text(trace_info(output) | {"tokens_left_out": 1234})
    assert "1,234 tokens more were routed and not recorded" in text


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["trace", "record", "-o", "x", "--text", "y"], "come together"),
        (["trace", "record", "-o", "x", "--weights"], "--weights: of use with a CHECKPOINT"),
        (["trace", "record", "-o", "x", "--domain", "law"], "--domain: of use with a CHECKPOINT"),
        (["trace", "record", "-o", "x", "--window", "8"], "--window: of use with a CHECKPOINT"),
        (
            [
                *("trace", "record", "m", "--text", "y", "-o", "x"),
                *("--seconds", "9", "--deployment", "d"),
            ],
            "--deployment, --seconds: no deployment is recorded",
        ),
        (["trace", "record", "-o", "x", "--seconds", "0"], "--seconds 0"),
        (["trace", "record", "-o", "x", "--ray-address", "a:1"], "--deployment NAME"),
        (
            ["trace", "record", str(DEMO_MODEL), "-o", "/no/such/dir/x", "--text", "/etc/hostname"],
            "written",
        ),
        (["trace", "info", "/no/such/file"], "cannot be read"),
        (["trace", "info", "/etc/hostname"], "not a routing trace"),
    ],
)
def test_mistakes_are_told(
    arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--json"]) == 2
    assert word in json.loads(capsys.readouterr().out)["error"]["message"]


@pytest.mark.parametrize(
    ("content", "word"), [(None, "cannot be read"), ("{", "no JSON"), (b"\xff", "cannot be read")]
)
def test_a_text_that_cannot_be_read_costs_no_trace(
    content: str | bytes | None, word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither one that is there, with --force, nor a second try without it."""
    text, output = tmp_path / "t.jsonl", tmp_path / "t.trace"
    if content is not None:
        text.write_bytes(content if isinstance(content, bytes) else content.encode())
    arguments = ["trace", "record", str(DEMO_MODEL), "--text", str(text), "-o", str(output)]
    assert main(arguments) == 2
    assert word in capsys.readouterr().err and not output.exists()
    output.write_bytes(b"what was recorded before")
    assert main([*arguments, "--force"]) == 2
    assert output.read_bytes() == b"what was recorded before"


def test_what_fails_once_the_model_is_loaded_costs_no_trace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, output = tmp_path / "t.jsonl", tmp_path / "t.trace"
    text.write_text('"good"\n{\n')
    arguments = ["trace", "record", str(DEMO_MODEL), "--text", str(text), "-o", str(output)]
    for _ in range(2):
        assert main(arguments) == 2
        assert "line 2: no JSON" in capsys.readouterr().err, "not: it exists already"
    output.write_bytes(b"what was recorded before")
    assert main([*arguments, "--force"]) == 2
    assert output.read_bytes() == b"what was recorded before"


def test_lines_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    for line, text in (("{", "no JSON"), ('{"t": 1}', "must be a string"), ("3", "must be")):
        path.write_text('"good"\n' + line + "\n")
        with pytest.raises(TraceError, match=f"line 2: {text}"):
            list(read_texts(path))


def test_of_a_long_text_nothing_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace_offline, "TEXT_CHARS_MAX", 16)
    text = "all of it is read, however long it is"
    (tmp_path / "t.txt").write_text(text)
    pieces = list(read_texts(tmp_path / "t.txt"))
    assert "".join(pieces) == text and len(pieces) == 3
    path = tmp_path / "t.jsonl"
    path.write_text('"short"\n' + json.dumps(text) + "\n")
    with pytest.raises(TraceError, match="line 2: longer than 16 characters"):
        list(read_texts(path))
