"""`remora serve` in a Ray cluster that others use: what it has not started it does not end."""

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.serving import DEMO_MODEL

from remora.cluster.config import RemoraConfig, parse_config
from remora.cluster.instances import Instance, find_instance, written_down
from remora.comm.errors import ClusterError, ConfigError

with warnings.catch_warnings():  # Ray Serve's own, while it is imported
    warnings.simplefilter("ignore")
    from remora.cluster import local_ray, serve_command


class Others:
    """A Ray cluster, as far as the command sees it, and what it does there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, *, is_up: bool) -> None:
        monkeypatch.setenv("REMORA_RUNTIME_DIR", str(folder))
        monkeypatch.setattr("remora.cluster.instances._is_remora", lambda pid: True)
        self.stopped: list[str] = []
        self.refuses = False
        replaced: dict[str, Callable[..., Any]] = {
            "connect": lambda *_, **__: None,
            "is_up": lambda _: is_up,
            "ensure_cluster": self.ensure,
            "find_cluster": lambda _: object(),
            "stop_cluster": self.stopped.append,
            "_start_serve": lambda *_: "http://there",
            "_install_signals": lambda: None,
        }
        for name, instead in replaced.items():
            monkeypatch.setattr(serve_command, name, instead)
        monkeypatch.setattr(serve_command.ray, "shutdown", lambda: None)

    def ensure(self, config: RemoraConfig, report: Any) -> None:
        if self.refuses:
            raise ConfigError("already runs with another model")


CONFIG = parse_config({"name": "prod", "model": str(DEMO_MODEL), "ray": {"address": "a:1"}})


def serve(stack: ExitStack) -> None:
    serve_command._bring_up(CONFIG, stack, Console(quiet=True))


def test_a_refusal_leaves_the_deployment_that_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    others = Others(monkeypatch, tmp_path, is_up=True)
    others.refuses = True
    first = Instance(name="prod", pid=1, ray_address="a:1", ray_token=None, url="u", model="m")
    with written_down(first):
        with pytest.raises(ConfigError, match="another model"), ExitStack() as stack:
            serve(stack)
        assert others.stopped == [] and find_instance("prod") == first


def test_what_was_adopted_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    others = Others(monkeypatch, tmp_path, is_up=True)
    with ExitStack() as stack:
        serve(stack)
        assert find_instance("prod") is None, "it is known by who started it"
    assert others.stopped == []


@pytest.mark.parametrize("refuses", [False, True])
def test_what_it_started_it_ends(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, refuses: bool
) -> None:
    others = Others(monkeypatch, tmp_path, is_up=False)
    others.refuses = refuses
    try:
        with ExitStack() as stack:
            serve(stack)
            found = find_instance("prod")
            assert found is not None and found.url == "http://there"
    except ConfigError:
        assert refuses
    assert others.stopped == ["prod"] and find_instance("prod") is None


def test_the_command_to_paste_has_the_key_that_is_needed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wherever the keys come from: without it the first thing that is tried is answered 401."""
    monkeypatch.delenv("REMORA_API_KEYS", raising=False)
    serve_command._announce(CONFIG, "http://there", False)
    assert "Authorization" not in capsys.readouterr().out
    monkeypatch.setenv("REMORA_API_KEYS", "secret")
    serve_command._announce(CONFIG, "http://there", False)
    said = capsys.readouterr().out
    assert "-H 'Authorization: Bearer <key>'" in said and "secret" not in said


@pytest.mark.parametrize("variable", ["REMORA_API_KEYS", "REMORA_ADMIN_KEYS"])
def test_keys_that_would_not_reach_the_ingress_are_refused(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """It runs in the environment of the Ray cluster: its door would be open."""
    monkeypatch.setenv(variable, "secret")
    with pytest.raises(ConfigError, match=rf"\${variable}: .* a:1, .*\(http\.\w+_keys_file\)"):
        serve_command._check_ingress(CONFIG)


def test_a_ray_that_is_too_slow_to_start_is_told_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def slow(**_: object) -> None:
        raise Exception("The current node timed out during startup.")  # as Ray does

    monkeypatch.setattr(local_ray.ray, "init", slow)
    with pytest.raises(ClusterError, match="Ray does not start: The current node timed out"):
        with local_ray.own_ray(CONFIG):
            raise AssertionError("it is not up")
