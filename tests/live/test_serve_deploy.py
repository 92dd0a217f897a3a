"""`serve deploy` of the packaged application on a running Ray cluster, and its handle.

A driver of its own: it starts a local Ray with a dashboard (which `serve deploy` talks to), waits
for the application, and calls the handle as another Serve application would.
"""

import json
import os
import select
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from openai import OpenAI
from support.serving import DEMO_MODEL

BIN = Path(sys.executable).parent
START_S = 240.0
NAME = f"deploy-{os.getpid()}"

# Commands come line by line on its standard input, answers go out as JSON lines.
DRIVER = """
import json, os, sys
import ray
from ray import serve
from remora.cluster.bootstrap import find_cluster, neutral_runtime_env

dashboard_port, session, name = int(sys.argv[1]), sys.argv[2], sys.argv[3]
ray.init(address="local", num_cpus=4, object_store_memory=100 << 20, include_dashboard=True,
         dashboard_port=dashboard_port, log_to_driver=False, configure_logging=False,
         runtime_env=neutral_runtime_env(), _temp_dir=session)
print(json.dumps({"address": ray.get_runtime_context().gcs_address}), flush=True)
for line in sys.stdin:
    command = json.loads(line)
    if command["do"] == "status":
        apps = serve.status().applications
        answer = {n: " ".join([a.status.value, a.message, *(d.message for d in
                  a.deployments.values())]) for n, a in apps.items()}
    elif command["do"] == "complete":
        handle = serve.get_app_handle(name)
        answer = handle.complete.remote(command["body"]).result(timeout_s=120)
    elif command["do"] == "generate":
        handle = serve.get_app_handle(name).options(stream=True)
        answer = list(handle.generate.remote(command["body"]))
    elif command["do"] == "cluster":
        answer = find_cluster(name) is not None
    elif command["do"] == "delete":
        serve.delete(name)
        answer = True
    elif command["do"] == "end":
        break
    print(json.dumps(answer), flush=True)
ray.shutdown()
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


class Driver:
    """The process that owns the Ray cluster."""

    def __init__(self, folder: Path) -> None:
        self.dashboard = free_port()
        self.session = f"/tmp/rmt-{os.getpid()}"  # short: Unix sockets lie in it
        self.environment = {
            **os.environ,
            "RAY_AUTH_TOKEN": os.urandom(32).hex(),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self.environment.pop("RAY_AUTH_MODE", None)
        with (folder / "driver.txt").open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-c", DRIVER, str(self.dashboard), self.session, NAME],
                cwd=folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=self.environment,
            )
        self.address = self.answer()["address"]

    def answer(self, timeout_s: float = START_S) -> Any:
        assert self.process.stdout is not None
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            ready, _, _ = select.select([self.process.stdout], [], [], 1.0)
            if ready:
                line = self.process.stdout.readline()
                assert line, "the driver ended"
                if line[0] in '{["tf':
                    return json.loads(line)
        raise AssertionError("the driver does not answer")

    def ask(self, do: str, **fields: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **fields}) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()
        shutil.rmtree(self.session, ignore_errors=True)

    def wait_for(self, do: str, wanted: Any, timeout_s: float = START_S) -> None:
        deadline_s = time.monotonic() + timeout_s
        seen = None
        while time.monotonic() < deadline_s:
            seen = self.ask(do)
            if (callable(wanted) and wanted(seen)) or seen == wanted:
                return
            assert "DEPLOY_FAILED" not in str(seen), seen
            time.sleep(0.5)  # Serve tells its state only when asked
        raise AssertionError(f"{do}: {seen}")


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    driver = Driver(tmp_path_factory.mktemp("driver"))
    yield driver
    driver.end()


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    """The packaged Serve configuration, as an operator would edit it."""
    import remora.manifests

    packaged = Path(str(remora.manifests.__file__)).parent / "serve_tiny_cpu.yaml"
    config: dict[str, Any] = yaml.safe_load(packaged.read_text())
    config["http_options"]["port"] = free_port()
    application = config["applications"][0]
    application["name"] = NAME
    application["args"] |= {
        "name": NAME,
        "model": str(DEMO_MODEL),
        "executor": "eager",
    }
    return config


@pytest.fixture(scope="module")
def url(driver: Driver, config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where it serves."""
    deploy(driver, config, tmp_path_factory.mktemp("deploy"))
    driver.wait_for("status", lambda apps: apps.get(NAME, "").startswith("RUNNING"))
    return f"http://127.0.0.1:{config['http_options']['port']}"


def deploy(driver: Driver, config: dict[str, Any], folder: Path) -> None:
    """`serve deploy`: returns once Serve has taken the configuration, before it has come up."""
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [str(BIN / "serve"), "deploy", "-a", f"http://127.0.0.1:{driver.dashboard}", str(path)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        env={**driver.environment, "RAY_AUTH_MODE": "token"},
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_openai_client(url: str) -> None:
    with OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=120) as client:
        model = client.models.list().data[0].id
        common: Any = {
            "model": model,
            "messages": [{"role": "user", "content": "Hello"}],
            "max_tokens": 8,
            "temperature": 0,
        }
        whole = client.chat.completions.create(**common)
        stream = client.chat.completions.create(**common, stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert text == whole.choices[0].message.content
    answer = httpx.post(f"{url}/v1/completions", json={"prompt": "x", "temperature": 9})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "temperature"
    answer = httpx.get(f"{url}/ready", headers={"X-Request-Id": "r-1"})
    assert answer.status_code == 200
    assert answer.headers.get_list("x-request-id") == ["r-1"]


def test_another_application_calls_the_handle(driver: Driver, url: str) -> None:
    body = {"prompt": "The whale", "max_tokens": 6, "temperature": 0}
    whole = driver.ask("complete", body=body)
    pieces = driver.ask("generate", body=body)
    assert "".join(piece["text"] for piece in pieces) == whole["choices"][0]["text"]
    assert pieces[-1]["finish_reason"] == "length"
    over_http = httpx.post(f"{url}/v1/completions", json=body).json()
    assert over_http["choices"][0]["text"] == whole["choices"][0]["text"]


@pytest.mark.long
def test_an_upgrade_that_cannot_be_leaves_what_serves(
    driver: Driver, config: dict[str, Any], url: str, tmp_path: Path
) -> None:
    """And so does one that can: the old ingress answers until the new one does."""
    body = {"prompt": "The whale", "max_tokens": 2, "temperature": 0}

    def status_of(**fields: Any) -> int:
        answer = httpx.post(f"{url}/v1/completions", json=body | fields, timeout=60)
        return answer.status_code

    def answers_until(wanted: str) -> str:
        while not (told := str(driver.ask("status")[NAME])).startswith(wanted):
            assert status_of() == 200, told
        return told

    (application,) = config["applications"]
    args = application["args"]
    refused = {**config, "applications": [{**application, "args": {**args, "numerics": "exact"}}]}
    deploy(driver, refused, tmp_path)
    answers_until("DEPLOYING")
    assert "numerics fast, not exact" in answers_until("DEPLOY_FAILED")
    assert status_of() == 200

    closed = {**config, "applications": [{**application, "args": {**args, "http.n_max": 1}}]}
    deploy(driver, closed, tmp_path)
    answers_until("DEPLOYING")
    answers_until("RUNNING")
    assert status_of(n=2) == 400


def test_deleting_the_application_takes_the_data_plane_down(driver: Driver, url: str) -> None:
    assert driver.ask("cluster") is True
    driver.ask("delete")
    driver.wait_for("cluster", False, 60)
