"""`remora serve` on this machine, a real model behind a real Ray cluster, as a newcomer runs it."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI
from support.light_commands import run_commands
from support.router_rig import wait_for
from support.serving import DEMO_MODEL, demo_tokenizer

REMORA = Path(sys.executable).parent / "remora"
NAME = f"live-{os.getpid()}"
START_S = 240.0
STOP_S = 60.0
CHAT: Any = [{"role": "user", "content": "Tell me about the sea."}]


def start(name: str, cwd: Path, *more: str) -> tuple[subprocess.Popen[str], dict[str, Any]]:
    """`remora serve --json`; returns when its ready line came."""
    command = [str(REMORA), "serve", str(DEMO_MODEL), "--preset", "tiny_cpu", "--name", name]
    with (cwd / "stderr.txt").open("w") as errors:
        process = subprocess.Popen(
            [*command, "--port", "0", "--json", "--eager", *more],
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "REMORA_RUNTIME_DIR": str(cwd)},
        )
    assert process.stdout is not None
    deadline_s = time.monotonic() + START_S
    while time.monotonic() < deadline_s:
        ready, _, _ = select.select([process.stdout], [], [], 1.0)
        line = process.stdout.readline() if ready else ""
        if line.startswith("{"):
            fields: dict[str, Any] = json.loads(line)
            if fields.get("event") == "ready":
                return process, fields
            raise AssertionError(fields)
        if process.poll() is not None:
            break
    process.kill()
    process.wait()
    process.stdout.close()
    raise AssertionError(f"not ready: {(cwd / 'stderr.txt').read_text()[-4000:]}")


def end(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """Signal a `remora serve` and see it end well."""
    process.send_signal(number)
    assert process.wait(STOP_S) == 0
    assert process.stdout is not None
    process.stdout.close()


def run(cwd: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """A `remora` command with --json."""
    done = subprocess.run(
        [str(REMORA), *arguments, "--json"],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "REMORA_RUNTIME_DIR": str(cwd)},
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines, done.stderr[-2000:]
    return done.returncode, json.loads(lines[-1])


def run_all(cwd: Path, *commands: Sequence[str]) -> list[tuple[int, dict[str, Any]]]:
    """Commands that do not depend on each other, at once."""
    with ThreadPoolExecutor(len(commands)) as pool:
        return list(pool.map(lambda arguments: run(cwd, *arguments), commands))


def descendants(pid: int) -> set[int]:
    """Processes below `pid`, by /proc."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                stat = (entry / "stat").read_text()
                parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    found, todo = set[int](), [pid]
    while todo:
        parent = todo.pop()
        children = {child for child, its in parents.items() if its == parent} - found
        found |= children
        todo.extend(children)
    return found


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def held(pids: set[int]) -> set[Path]:
    """Shared memory segments and Ray sessions that these processes have open: theirs alone."""
    found = set()
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            for entry in Path(f"/proc/{pid}/fd").iterdir():
                target = Path(os.readlink(entry))
                if target.is_relative_to("/dev/shm"):
                    found.add(target)
                elif target.is_relative_to("/tmp") and target.parts[2].startswith("rm-"):
                    found.add(Path(*target.parts[:3]))
    return found


def end_leaving_nothing(process: subprocess.Popen[str], number: signal.Signals, cwd: Path) -> None:
    """Signal a `remora serve`; its processes end, and shared memory, session and record with it."""
    below = descendants(process.pid)
    assert below
    theirs = held(below)
    assert any(path.name.startswith("rm-") for path in theirs), theirs
    end(process, number)
    deadline_s = time.monotonic() + 20
    while any(alive(pid) for pid in below) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    assert not [pid for pid in below if alive(pid)]
    assert not [path for path in theirs if path.exists()]
    assert list(cwd.glob("remora-*/*.json")) == []
    assert list(cwd.glob("remora-*/*/*/coordinator.wal*")) == []


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def served(home: Path) -> Iterator[dict[str, Any]]:
    process, fields = start(NAME, home)
    yield {**fields, "pid": process.pid}
    end_leaving_nothing(process, signal.SIGINT, home)


@pytest.fixture(scope="module")
def client(served: dict[str, Any]) -> Iterator[OpenAI]:
    with OpenAI(base_url=served["url"], api_key="any", max_retries=0, timeout=120) as client:
        yield client


def test_routing_is_recorded_while_it_serves(
    client: OpenAI, served: dict[str, Any], home: Path
) -> None:
    """Requests go on until the trace has what was asked for; prompt and answer are in it."""
    output = home / "live.trace"
    with ThreadPoolExecutor() as pool:
        recording = pool.submit(
            run, home, "trace", "record", "--deployment", NAME, "-o", str(output),
            "--max-tokens", "60", "--seconds", "120",
        )  # fmt: skip
        while not recording.done():
            client.completions.create(
                model=served["model"], prompt="The sea", max_tokens=20, temperature=0
            )
        status, found = recording.result()
    assert status == 0
    assert (found["tokens"], found["whole"]) == (60, True)
    assert found["decode_tokens"] > 0 and found["requests"] >= 2
    assert found["sources"] == {"dense-0": 60} and found["tokens_left_out"] >= 0
    assert run(home, "trace", "record", "--deployment", "no-such", "-o", "x")[0] == 3


def test_an_openai_client_gets_all_it_asks_for(client: OpenAI, served: dict[str, Any]) -> None:
    model = served["model"]
    whole = client.chat.completions.create(model=model, messages=CHAT, max_tokens=12, temperature=0)
    assert whole.usage is not None and whole.usage.completion_tokens == 12
    stream = client.chat.completions.create(
        model=model, messages=CHAT, max_tokens=12, temperature=0, stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == whole.choices[0].message.content
    scored = client.chat.completions.create(
        model=model,
        messages=CHAT,
        max_tokens=6,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
    )
    assert scored.choices[0].logprobs is not None
    for token in scored.choices[0].logprobs.content or []:
        assert token.top_logprobs[0].token == token.token  # greedy
        assert [t.logprob for t in token.top_logprobs] == sorted(
            (t.logprob for t in token.top_logprobs), reverse=True
        )


def test_seeds_choices_and_batches(client: OpenAI, served: dict[str, Any]) -> None:
    common: dict[str, Any] = {"model": served["model"], "max_tokens": 8, "seed": 7}
    several = client.completions.create(prompt="The whale", n=3, **common)
    texts = [choice.text for choice in several.choices]
    assert len(set(texts)) > 1
    again = client.completions.create(prompt="The whale", n=3, **common)
    assert [choice.text for choice in again.choices] == texts
    ids = [demo_tokenizer().encode(text) for text in ("The whale", "def main():")]
    batch = client.completions.create(prompt=ids, **common)
    assert len(batch.choices) == 2
    word = texts[0].strip().split()[-1]
    stopped = client.completions.create(prompt="The whale", stop=[word], **common)
    assert word not in stopped.choices[0].text and stopped.choices[0].finish_reason == "stop"


def test_echo_scores_a_prompt(client: OpenAI, served: dict[str, Any]) -> None:
    ids = demo_tokenizer().encode("The sea is")
    answer = client.completions.create(
        model=served["model"], prompt=[ids], echo=True, logprobs=1, max_tokens=0
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.token_logprobs is not None
    assert logprobs.token_logprobs[0] is None
    assert all(value is not None and value < 0 for value in logprobs.token_logprobs[1:])


def test_a_cancelled_stream_frees_its_pages(client: OpenAI, served: dict[str, Any]) -> None:
    stream = client.completions.create(
        model=served["model"],
        prompt="The",
        max_tokens=2000,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    stream.close()
    base = served["url"].removesuffix("/v1")
    deadline_s = time.monotonic() + 30
    while time.monotonic() < deadline_s:
        metrics = httpx.get(f"{base}/metrics").text
        running = [x for x in metrics.splitlines() if x.startswith("remora_requests_running{")]
        if running and all(line.endswith(" 0.0") for line in running):
            return
        time.sleep(0.2)  # the gauge is what is waited for; it comes with the next ping
    raise AssertionError(metrics)


def test_status_and_a_second_instance_of_the_name(home: Path, served: dict[str, Any]) -> None:
    port = served["url"].split(":")[2].split("/")[0]
    serve = ("serve", str(DEMO_MODEL), "--name")
    (status, fields), (same, of_name), (taken, of_port), (gone, _) = run_all(
        home,
        ("status",),
        (*serve, NAME, "--port", "0"),
        (*serve, "other", "--port", port),
        ("stop", "nobody", "--ray-address", "127.0.0.1:1"),
    )
    assert status == 0 and fields["phase"] == "serving" and fields["name"] == NAME
    assert set(fields["members"]) == {"dense-0", "shard-0", "shard-1"}
    assert same == 2 and NAME in of_name["error"]["message"]
    assert taken == 2 and port in of_port["error"]["message"]
    assert gone == 1


def test_its_placement_can_be_exported(home: Path, served: dict[str, Any]) -> None:
    path = home / "placement.yaml"
    export = ("placement", "export", str(path))
    (status, facts), (nobody, _) = run_all(home, export, (*export, "--deployment", "nobody"))
    assert (status, facts["deployment"], facts["epoch"]) == (0, NAME, 1)
    assert nobody == 3
    status, again = run(home, "placement", "check", str(path), "--model", str(DEMO_MODEL))
    assert status == 0 and again["replicas"] == facts["replicas"]


def test_each_request_is_a_line_in_a_file_that_ray_rotates(
    home: Path, served: dict[str, Any]
) -> None:
    """It went nowhere; Serve's own line goes to a replica's standard error, too."""
    trace = f"00-{'4b' * 16}-{'f0' * 8}-01"
    headers = {"x-request-id": "of-this-test", "traceparent": trace}
    assert httpx.get(f"{served['url']}/models", headers=headers, timeout=60).status_code == 200
    [record] = home.glob(f"remora-*/{NAME}.json")
    logs = Path(json.loads(record.read_text())["session"]) / "session_latest" / "logs"
    [file] = logs.glob(f"serve/replica_{NAME}_ingress_*.log")
    end = f" ms request_id=of-this-test traceparent={trace}\n"
    wait_for(lambda: end in file.read_text())  # once the answer has been sent
    assert file.read_text().count(" request_id=of-this-test") == 1
    assert not [error for error in logs.glob("*.err") if "of-this-test" in error.read_text()]


def test_who_asks_it_imports_none_of_what_it_runs(home: Path, served: dict[str, Any]) -> None:
    """Ray imports the class of the coordinator in all that get its handle, and what answers are
    made of: 1.7 s of torch in each command."""
    file = str(home / "asked.yaml")
    ask = [
        ("status",),
        ("placement", "export", file),
        ("placement", "import", file),
        ("scale", "--shards", "2"),
        ("rebalance", "--dry-run"),
        ("trace", "record", "--seconds", "0.1", "-o", str(home / "asked.trace")),
    ]
    found = run_commands(ask, {"REMORA_RUNTIME_DIR": str(home)})
    for command, done in zip(ask, found, strict=True):
        assert done["status"] == 0 and done["costly"] == [], (command, done)


@pytest.mark.long
def test_a_second_instance_beside_it_leaves_nothing(tmp_path: Path, served: dict[str, Any]) -> None:
    process, fields = start(f"{NAME}-b", tmp_path)
    assert fields["url"] != served["url"]
    with httpx.Client(timeout=120) as http:
        for url in (fields["url"], served["url"]):  # both answer
            answer = http.post(f"{url}/completions", json={"prompt": "x", "max_tokens": 2})
            assert answer.status_code == 200
    end_leaving_nothing(process, signal.SIGTERM, tmp_path)


def test_a_model_that_is_none_is_told_before_anything_starts(home: Path) -> None:
    plan = ("plan", str(DEMO_MODEL), "--shards", "4")
    (none, fields), (status, planned) = run_all(home, ("serve", "/nowhere/model"), plan)
    assert none == 2 and "/nowhere/model" in fields["error"]["message"]
    assert status == 0 and len(planned["shards"]) == 4
