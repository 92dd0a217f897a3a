"""The command line without a cluster: configuration, exit statuses, plan, what is written down."""

import io
import json
import os
import stat
from pathlib import Path

import pytest
from support.serving import DEMO_MODEL

from remora.cluster.cli import config_of, main
from remora.cluster.cli import parser as cli_parser
from remora.cluster.config import ConfigError
from remora.cluster.instances import (
    Instance,
    find_instance,
    instance_names,
    instances_dir,
    which_instance,
    written_down,
)
from remora.cluster.security import KeyRing, load_keys


def test_flags_and_set_override_the_preset() -> None:
    options = cli_parser().parse_args(
        [
            *("serve", "--preset", "tiny_cpu", "--shards", "4", "--port", "0", "--eager"),
            *("--set", "dense.groups=2", "--set", "experts.labels={zone: a}", str(DEMO_MODEL)),
        ]
    )
    config = config_of(options)
    assert (config.experts.shards, config.dense.groups, config.http.port) == (4, 2, 0)
    assert config.executor == "eager" and config.experts.labels == {"zone": "a"}
    assert config.model == str(DEMO_MODEL.resolve())


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["serve"], "nothing to serve"),
        (["serve", "m", "--set", "dense.gruops=1"], "did you mean groups"),
        (["serve", "m", "--set", "novalue"], "KEY=VALUE"),
        (["serve", "m", "--config", "/no/such.yaml"], "/no/such.yaml"),
        (["serve", "m", "--preset", "huge"], "tiny_cpu"),
        (["serve", "m", "--shards", "0"], "experts.shards"),
        (["plan", "/no/such/model"], "/no/such/model"),
        (["plan", str(DEMO_MODEL), "--shards", "33"], "32 experts"),
        (["plan", str(DEMO_MODEL), "--kv-cache-tokens", "64"], "max_model_len"),
        (["plan", str(DEMO_MODEL), "--max-model-len", "1000000"], "knows positions up to"),
        (
            ["plan", str(DEMO_MODEL), "--numerics", "exact", "--set", "dense.threads=8"],
            "exact numerics allow",
        ),
        (["status", "--ray-address", "127.0.0.1:1"], "name of the deployment is needed"),
        (["status", "../prod"], "no name of a deployment"),
        (
            ["rebalance", "--hosts", "4", "--slots", "9"],
            "--hosts, --slots: of use with --trace alone",
        ),
        (["bench", "--shards", "4", "--eager"], "--shards, --eager: only with a MODEL"),
        (["bench", "m", "--deployment", "one"], "--deployment one measures one that runs"),
        (["bench"], "nothing to measure"),
        (["bench", "--ray-address", "127.0.0.1:1"], "name of the deployment is needed"),
        (["bench", str(DEMO_MODEL), "--ray-address", "127.0.0.1:1"], "leave the model out"),
        (["bench", str(DEMO_MODEL), "--batches", "65"], "max_num_seqs"),
    ],
)
def test_what_cannot_be_is_status_2_and_says_so(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    word: str,
) -> None:
    monkeypatch.setenv("REMORA_RUNTIME_DIR", str(tmp_path))  # a deployment may run here
    assert main([*arguments, "--json"]) == 2
    assert word in json.loads(capsys.readouterr().out)["error"]["message"]
    assert main(arguments) == 2
    assert word in capsys.readouterr().err


@pytest.mark.parametrize("is_unbuffered", [False, True])  # PYTHONUNBUFFERED: nothing is left over
def test_a_reader_that_leaves_is_no_error(
    monkeypatch: pytest.MonkeyPatch, is_unbuffered: bool
) -> None:
    """`remora plan ... | head`: no traceback, neither then nor when the interpreter ends."""
    reader, writer = os.pipe()
    os.close(reader)
    buffering = 0 if is_unbuffered else -1
    binary = os.fdopen(writer, "wb", buffering)
    with io.TextIOWrapper(binary, write_through=is_unbuffered) as output:
        monkeypatch.setattr("sys.stdout", output)
        assert main(["plan", str(DEMO_MODEL)]) == 141
        output.flush()


def test_another_broken_pipe_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> int:
        raise BrokenPipeError("a socket of ours")

    monkeypatch.setattr("remora.cluster.cli._plan", broken)
    with pytest.raises(BrokenPipeError, match="of ours"):
        main(["plan", str(DEMO_MODEL)])


def test_status_without_any_is_3(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("REMORA_RUNTIME_DIR", str(tmp_path))
    for command in ("status", "stop"):
        assert main([command]) == 3
        assert "no deployment" in capsys.readouterr().err


def test_a_name_that_is_none_of_ours_is_told_with_those_that_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("REMORA_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("remora.cluster.instances._is_remora", lambda pid: pid == os.getpid())
    one = Instance(
        name="one", pid=os.getpid(), ray_address="a:1", ray_token="t", url="u", model="m"
    )
    with written_down(one):
        for command in ("status", "stop", "rebalance"):
            assert main([command, "nope"]) == 3
            message = capsys.readouterr().err
            assert "'nope'" in message and "one" in message and "--ray-address" in message


def test_plan_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(DEMO_MODEL), "--shards", "3", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    total = plan["dense"]["weights_bytes"]
    total += sum(shard["weights_bytes"] for shard in plan["shards"].values())
    assert total == 2 * plan["parameters"]  # bfloat16
    one = plan["decode_step"][0]
    assert 1 <= one["row_copies_per_token_and_layer"] <= 3
    assert main(["plan", str(DEMO_MODEL), "--numerics", "exact"]) == 0
    assert "ordered" in capsys.readouterr().out


def test_instances_are_private_and_forgotten(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("REMORA_RUNTIME_DIR", str(tmp_path))
    common = {"ray_address": "a:1", "ray_token": "t", "url": "u", "model": "m"}
    mine = Instance(name="one", pid=os.getpid(), **common)
    monkeypatch.setattr("remora.cluster.instances._is_remora", lambda pid: pid == os.getpid())
    with written_down(mine):
        path = instances_dir() / "one.json"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(instances_dir().stat().st_mode) == 0o700
        assert which_instance(None) == ("one", mine)
        session = tmp_path / "session"
        session.mkdir()
        with written_down(Instance(name="gone", pid=2**22 + 1, session=str(session), **common)):
            assert instance_names() == ["one"]  # the other was killed
            assert not session.exists()
        with written_down(Instance(name="two", pid=os.getpid(), **common)):
            with pytest.raises(ConfigError, match="one, two"):
                which_instance(None)
    assert find_instance("one") is None
    path.write_text("{half")
    assert find_instance("one") is None and path.exists(), "of another version: not ours to remove"
    theirs = tmp_path / "theirs.json"
    theirs.write_text("{}")
    with pytest.raises(ConfigError, match="no name of a deployment"):
        which_instance(str(theirs.with_suffix("")))
    assert theirs.exists()


def test_a_folder_that_cannot_be_made_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("REMORA_RUNTIME_DIR", str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match="set REMORA_RUNTIME_DIR"):
        instances_dir()


def test_keys_come_from_files_and_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SOME_KEYS", " a , b,")
    path = tmp_path / "keys"
    path.write_text("# ours\nc\n  # d\n\n")
    ring = load_keys(path, "SOME_KEYS")
    assert all(ring.accepts(key) for key in "abc") and not ring.accepts("d")
    assert KeyRing([]).is_open and not ring.is_open
    monkeypatch.setenv("SOME_KEYS", " ,")
    with pytest.raises(ConfigError, match=r"\$SOME_KEYS holds no key"):
        load_keys(None, "SOME_KEYS")
    monkeypatch.delenv("SOME_KEYS")
    assert load_keys(None, "SOME_KEYS").is_open
    path.write_text("# nothing\n")
    with pytest.raises(ConfigError, match="holds no key"):
        load_keys(path, "SOME_KEYS")
    with pytest.raises(ConfigError, match="keys file"):
        load_keys(tmp_path / "none", "SOME_KEYS")
