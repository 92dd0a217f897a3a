"""The configuration path: presets, files, overrides, and errors that name what is wrong."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from remora.cluster.config import (
    RemoraConfig,
    load_config,
    parse_config,
    parse_override,
    preset_names,
)
from remora.comm.errors import ConfigError


def test_every_preset_is_a_configuration() -> None:
    assert "tiny_cpu" in preset_names()
    for name in preset_names():
        assert load_config(preset=name, overrides={"model": "/m"}).model == "/m"


def test_later_sources_win(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: /some/model/\nexperts: {shards: 4}\nhttp: {port: 9000}\n")
    config = load_config(path, preset="tiny_cpu", overrides={"http.port": 0, "numerics": "exact"})
    assert (config.experts.shards, config.http.port, config.numerics) == (4, 0, "exact")
    assert config.experts.num_cpus == 0.25  # still the preset's
    assert config.combine == "ordered"
    assert config.model_id == "model"


def test_relative_model_is_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "ckpt").mkdir()
    path = tmp_path / "c.yaml"
    path.write_text("model: ckpt\n")
    assert load_config(path).model == str((tmp_path / "ckpt").resolve())


def test_args_round_trip() -> None:
    config = load_config(preset="tiny_cpu", overrides={"model": "m", "security.token_file": "/t"})
    assert parse_config(config.to_args()) == config


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"model": "m", "denes": {}}, ["'denes'", "did you mean dense", "experts"]),
        ({"model": "m", "dense": {"group": 1}}, ["'dense.group'", "groups", "max_num_seqs"]),
        ({"model": "m", "http": {"zzz": 1}}, ["'http.zzz'", "port"]),
        ({"model": "m", "numerics": "sloppy"}, ["numerics", "'fast' or 'exact'", "'sloppy'"]),
        ({}, ["model", "required"]),
        ({"model": ""}, ["model"]),
        ({"model": "m", "name": "Not OK"}, ["name", "'Not OK'"]),
        ({"model": "m", "experts": {"shards": 0}}, ["experts.shards", "1", "got 0"]),
        ({"model": "m", "experts": None}, ["experts"]),
        ({"model": "m", "dense": {"tensor_parallel": 3}}, ["dense.tensor_parallel", "1, 2 or 4"]),
        ({"model": "m", "dense": {"block_size": 32}}, ["block_size = 32", "only 16"]),
        ({"model": "m", "dense": {"kv_cache_tokens": 1, "kv_cache_gib": 1}}, ["both set"]),
        ({"model": "m", "dense": {"max_num_seqs": 9, "max_tokens_per_step": 8}}, ["= 8", "= 9"]),
        ({"model": "m", "http": {"request_timeout_s": float("nan")}}, ["request_timeout_s"]),
        ({"model": "m", "http": {"port": 70000}}, ["http.port", "65535"]),
    ],
)
def test_errors_name_key_value_and_what_is_allowed(
    data: dict[str, object], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(data)
    for word in words:
        assert word in str(caught.value)


def test_bad_files_are_config_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "none.yaml")
    path = tmp_path / "bad.yaml"
    for text in ("- a\n- b\n", "a: [", "just words"):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"bad\.yaml"):
            load_config(path)
    with pytest.raises(ConfigError, match="tiny_cpu"):
        load_config(preset="tiny-cpu")


def test_an_unknown_key_is_told_with_the_part_that_has_it(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("dense: {groups: 2}\n")
    with pytest.raises(ConfigError, match=r"^overrides: unknown key 'dense\.gruops'"):
        load_config(path, overrides={"model": "m", "dense.gruops": 2})
    with pytest.raises(ConfigError, match=r"preset tiny_cpu \+ .*c\.yaml \+ overrides: http\.port"):
        load_config(path, preset="tiny_cpu", overrides={"model": "m", "http.port": 70000})
    path.write_text("dense: {gruops: 2}\n")
    with pytest.raises(ConfigError, match=r"^\S*c\.yaml: unknown key 'dense\.gruops'"):
        load_config(path, overrides={"model": "m", "dense.groups": 2})


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: m\nhttp: {host: 0.0.0.0}\ndense: {groups: 1}\nhttp: {port: 9000}\n")
    with pytest.raises(ConfigError, match=r"'http' stands here twice(?s:.*)line 4"):
        load_config(path)
    with pytest.raises(ConfigError, match="'zone' stands here twice"):
        parse_override("experts.labels={zone: a, zone: b}")


def test_overrides() -> None:
    assert parse_override("dense.groups=2") == ("dense.groups", 2)
    assert parse_override("experts.labels={zone: a}") == ("experts.labels", {"zone": "a"})
    for bad in ("dense.groups", "=3", "a=[", ""):
        with pytest.raises(ConfigError):
            parse_override(bad)
    labels = {"model": "m", "experts.labels": {"zone": "a"}}
    both = load_config(preset="tiny_cpu", overrides=labels | {"experts.shards": 3}).experts
    assert (both.labels, both.shards, both.num_cpus) == ({"zone": "a"}, 3, 0.25)
    with pytest.raises(ConfigError, match="not a section"):
        load_config(overrides={"model": "m", "model.x": 1})


def test_relative_paths_are_the_callers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = {"http.api_keys_file": "keys", "security.token_file": "~/token", "model": "m"}
    config = load_config(overrides=overrides)
    assert config.http.api_keys_file == tmp_path / "keys" and config.http.admin_keys_file is None
    assert config.security.token_file == Path.home() / "token"
    assert config.model == "m", "a hub id stays one"


def test_frozen() -> None:
    config = RemoraConfig(model="m")
    with pytest.raises(ValidationError):
        config.model = "other"  # type: ignore[misc]


def test_num_kv_blocks() -> None:
    dense = RemoraConfig(model="m").dense
    assert dense.num_kv_blocks(bytes_per_token=100, max_model_len=2048) == 64 * 64
    small = dense.model_copy(update={"kv_cache_tokens": 100})
    assert small.num_kv_blocks(bytes_per_token=100, max_model_len=96) == 6
    with pytest.raises(ConfigError, match="max_model_len = 97"):
        small.num_kv_blocks(bytes_per_token=100, max_model_len=97)
    big = dense.model_copy(update={"kv_cache_gib": 1.0})
    assert big.num_kv_blocks(bytes_per_token=1 << 10, max_model_len=1) == 1 << 16
