"""Policy files: what is refused and how it is said, bounds, and the two commands."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from support.autoscaling import BASE, decisions_of, policy_of, sample_of

from remora.autoscale.autoscale_policy import check_windows, parse_policy, read_policy
from remora.autoscale.autoscale_sample import AutoscaleState
from remora.autoscale.decision_lines import decision_line, start_line
from remora.cluster.cli import main
from remora.cluster.config import load_config, parse_config
from remora.comm.errors import ConfigError

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "autoscale-policy.yaml"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "Autoscale"}, ["kind", "AutoscalePolicy"]),
        ({"version": 2}, ["version", "1"]),
        ({"pool": "hosts"}, ["pool", "experts", "dense", "ingress"]),
        ({"mode": "auto"}, ["mode", "observe", "advise", "act"]),
        ({"tragets": {}}, ["unknown key 'tragets'", "did you mean targets", "bounds"]),
        ({"targets": {}}, ["at least one of ttft"]),
        ({"targets": {"tfft": {"seconds": 1}}}, ["'targets.tfft'", "ttft", "queue_per_unit"]),
        ({"targets": {"ttft": {"second": 1}}}, ["'targets.ttft.second'", "percentile, seconds"]),
        ({"targets": {"ttft": {"seconds": 0}}}, ["targets.ttft.seconds", "greater than 0", "0"]),
        ({"targets": {"ttft": {"percentile": "p98", "seconds": 1}}}, ["percentile", "p99"]),
        ({"targets": {"kv_use": 1.1}}, ["targets.kv_use", "1.1"]),
        ({"targets": {"kv_use": float("nan")}}, ["targets.kv_use"]),
        ({"targets": {"imbalance": 1.5}, "pool": "dense"}, ["only pool experts", "dense"]),
        ({"bounds": {"min_units": 3, "max_units": 2}}, ["min_units = 3", "max_units = 2"]),
        ({"bounds": {"min_units": 0, "max_units": 2}}, ["bounds.min_units", "0"]),
        ({"bounds": {}}, ["bounds.max_units", "required"]),
        ({"reactive": {"window_s": 60, "down_window_s": 30}}, ["down_window_s = 30", "60"]),
        ({"reactive": {"down_below": 1}}, ["reactive.down_below", "less than 1"]),
        (
            {"reactive": {"window_s": 5, "down_window_s": 3600}},
            ["no autoscale.sample_every_s fits: at least 3.516", "at most 1.667", "= 3)"],
        ),
        ({"cooldowns": {"rebalance_again_s": 1}}, ["rebalance_again_s = 1"]),
        ({"predictive": {"load_per_unit": 1, "season_s": 1e6}}, ["8192 steps", "step_s larger"]),
        ({"predictive": {"load_per_unit": 1, "forecasters": ["holt"]}}, ["seasonal_naive"]),
        ({"predictive": {"load_per_unit": 1, "forecasters": ["arima"]}}, ["moving_average"]),
        (
            {"cost": {"host_hour": 3, "budget_per_hour": 2}},
            ["budget_per_hour pays for 0 units", "min_units = 1"],
        ),
    ],
)
def test_what_cannot_be_is_refused_with_what_is_allowed(
    change: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_policy({**BASE, **change}, source="p.yaml")
    for word in ("p.yaml", *words):
        assert word in str(refused.value)


@pytest.mark.parametrize(
    ("budget", "per_host", "units"), [(0.3, 1, 3), (0.29, 1, 2), (0.2, 4, 8), (None, 1, 8)]
)
def test_the_budget_bounds_the_units(budget: float | None, per_host: int, units: int) -> None:
    cost = {"host_hour": 0.1, "units_per_host": per_host, "budget_per_hour": budget}
    policy = policy_of(cost=cost)
    assert policy.units_max == units
    assert policy.cost is not None
    assert policy.cost.per_hour(per_host + 1) == pytest.approx(0.2)


def test_a_policy_is_the_same_after_a_round_trip() -> None:
    policy = read_policy(EXAMPLE)
    assert parse_policy(json.loads(policy.model_dump_json())) == policy
    assert policy.units_max == 12, "the example's budget pays for 6 hosts of 2 units"


def test_the_example_has_every_key() -> None:
    """docs/autoscaling.md says so; what it leaves out is of another pool."""

    def left_out(section: BaseModel, prefix: str) -> Iterator[str]:
        for name in type(section).model_fields:
            value = getattr(section, name)
            if name not in section.model_fields_set:
                yield prefix + name
            elif isinstance(value, BaseModel):
                yield from left_out(value, f"{prefix}{name}.")

    assert [*left_out(read_policy(EXAMPLE), "")] == ["targets.ongoing_per_unit"]


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    for content, word in (
        (b"a: [", "not YAML"),
        (b"- a", "a mapping"),
        (b"\xff", "cannot read"),
        (b"#" * (1 << 17), "at most 65536"),
        (b"", "kind"),
    ):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=word):
            read_policy(file)
    with pytest.raises(ConfigError, match="cannot read"):
        read_policy(tmp_path / "none.yaml")


def test_a_window_holds_two_samples_that_come_a_little_late() -> None:
    """One was enough to be accepted, and each began the windows anew: the pool never shrank."""
    policy = policy_of(reactive={"window_s": 30, "samples_min": 1, "down_window_s": 120})
    late, _ = decisions_of(policy, [sample_of(30.02 * n) for n in range(50)])
    assert {d.verdict for d in late} == {"keep"}
    with pytest.raises(ValueError, match=r"sample_every_s = 30: at most 15, .* 2 samples"):
        check_windows(policy, 30.0)
    check_windows(policy, 15.0)
    made, _ = decisions_of(policy, [sample_of(15.02 * n) for n in range(50)])
    assert "scale" in {d.verdict for d in made}


def test_check_says_what_a_policy_comes_to(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["autoscale", "check", str(EXAMPLE)]) == 0
    text = capsys.readouterr().out
    assert (
        "pool experts, mode advise" in text
        and "2 to 12 (budget)," in text
        and "ttft p99 <= 2 s" in text
        and "every 0.293 to 10 s (autoscale.sample_every_s)" in text
    )
    assert main(["autoscale", "check", str(EXAMPLE), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["units_max"], found["sample_every_max_s"]) == (12, 10.0)
    bad = tmp_path / "bad.yaml"
    bad.write_text(yaml.safe_dump({**BASE, "windows": 3}))
    assert main(["autoscale", "check", str(bad)]) == 2
    assert "unknown key 'windows'" in capsys.readouterr().err


def _log(path: Path) -> list[str]:
    """A log in which a pool of 2 is asked too much and then nothing."""
    policy = policy_of()
    samples = [sample_of(10.0 * n, waiting=50) for n in range(6)]
    samples += [sample_of(60 + 10.0 * n, units=5) for n in range(30)]
    made, _ = decisions_of(policy, samples)
    lines = [start_line(policy, AutoscaleState())]
    lines += [decision_line(*pair) for pair in zip(samples, made, strict=True)]
    path.write_text("\n".join(lines) + "\n")
    return lines


def test_replay_agrees_with_an_honest_log(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    log = tmp_path / "decisions.jsonl"
    _log(log)
    assert main(["autoscale", "replay", str(log)]) == 0
    assert "36 decisions, 0 differ" in capsys.readouterr().out


def test_replay_finds_a_decision_that_is_another_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    log = tmp_path / "decisions.jsonl"
    lines = _log(log)
    changed = json.loads(lines[3])
    assert changed["decision"]["verdict"] == "scale", "the third sample fills the window"
    changed["decision"]["target_units"] += 1
    log.write_text("\n".join([*lines[:3], json.dumps(changed), *lines[4:]]))
    assert main(["autoscale", "replay", str(log), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["decisions"], report["num_differences"]) == (36, 1)
    (difference,) = report["differences"]
    assert (difference["line"], difference["field"]) == (4, "target_units")
    assert main(["autoscale", "replay", str(log)]) == 1
    assert "line 4" in capsys.readouterr().out


def test_replay_by_another_policy_shows_where_it_parts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    log, other = tmp_path / "decisions.jsonl", tmp_path / "other.yaml"
    _log(log)
    other.write_text(yaml.safe_dump({**BASE, "targets": {"queue_per_unit": 1000}}))
    assert main(["autoscale", "replay", str(log), "--policy", str(other), "--json"]) == 1
    first = json.loads(capsys.readouterr().out)["differences"][0]
    assert first["logged"]["verdict"] == "scale" and first["replayed"]["verdict"] == "keep"
    other.write_text(yaml.safe_dump(BASE))
    assert main(["autoscale", "replay", str(log), "--policy", str(other)]) == 0
    capsys.readouterr()
    other.write_text(yaml.safe_dump({**BASE, "pool": "dense"}))
    assert main(["autoscale", "replay", str(log), "--policy", str(other)]) == 2
    assert ":1: a log of pool experts; the policy is of dense" in capsys.readouterr().err


def test_damaged_logs_are_refused_by_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    log = tmp_path / "decisions.jsonl"
    lines = _log(log)
    for content, word in (
        ("", "nothing to replay"),
        ("\n".join(lines[1:]), ":1: a decision before"),
        (f"{lines[0]}\n{lines[1][:40]}", ":2: not a whole JSON line"),
        ("\n".join([*lines[:3], lines[3][:40], *lines[4:]]), ":4: not a whole JSON line"),
        (f"{lines[0]}\n[]", ":2: an object"),
        (f'{lines[0]}\n{{"kind": "autoscale_decision"}}', ":2: a line of kind"),
        (f"{lines[0]}\n{lines[1].replace('waiting', 'waited')}", "unknown key 'sample.waited'"),
    ):
        log.write_text(content)
        assert main(["autoscale", "replay", str(log)]) == 2
        assert word in capsys.readouterr().err
    assert main(["autoscale", "replay", str(tmp_path / "none")]) == 2
    assert "cannot read the log" in capsys.readouterr().err


def test_a_log_that_ends_in_the_middle_of_a_line_replays_up_to_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    log = tmp_path / "decisions.jsonl"
    lines = _log(log)
    log.write_text("\n".join([*lines[:-1], lines[-1][:40]]))
    assert main(["autoscale", "replay", str(log)]) == 0
    text = capsys.readouterr().out
    assert "35 decisions, 0 differ" in text and f"left out: {log}:37: not a whole JSON" in text
    assert main(["autoscale", "replay", str(log), "--json"]) == 0
    assert ":37: not a whole" in json.loads(capsys.readouterr().out)["cut_off"]


def test_a_policy_is_read_with_the_configuration(tmp_path: Path) -> None:
    config = load_config(overrides={"model": "m", "autoscale.policy": str(EXAMPLE)})
    policy = config.autoscale.policy
    assert not isinstance(policy, Path | None) and policy.pool == "experts"
    assert parse_config(config.to_args()) == config, "it travels as data"
    assert parse_config({"model": "m", "autoscale": {"policy": str(EXAMPLE)}}).autoscale.loaded()
    (tmp_path / "p.yaml").write_text("kind: AutoscalePolicy\nversoin: 1\n")
    with pytest.raises(ConfigError, match=r"p\.yaml.*'versoin'.*version"):
        load_config(overrides={"model": "m", "autoscale.policy": str(tmp_path / "p.yaml")})


@pytest.mark.parametrize(
    ("sections", "every_s", "complaint"),
    [
        ({"pool": "ingress", "targets": {"ongoing_per_unit": 4}}, 5.0, "is Ray Serve.s"),
        ({}, 15.0, "samples_min = 3"),
        ({"reactive": {"down_window_s": 3600}}, 1.0, "at most 1024 samples"),
        ({}, 0.01, "sample_every_s"),
        (
            {"predictive": {"load_per_unit": 9, "step_s": 0.2, "season_s": 60, "horizon_s": 2}},
            5.0,
            "at most 4, .*step_s = 0.2 bridges 20",
        ),
    ],
)
def test_policies_that_cannot_be_held_to(
    sections: dict[str, Any], every_s: float, complaint: str
) -> None:
    policy = policy_of(**sections).model_dump(mode="json")
    with pytest.raises(ConfigError, match=complaint):
        parse_config({"model": "m", "autoscale": {"policy": policy, "sample_every_s": every_s}})


@pytest.mark.parametrize(
    ("sections", "key", "value", "complaint"),
    [
        ({"targets": {"imbalance": 1.5}}, "router", {"enabled": False}, "router.enabled = true"),
        ({"mode": "act"}, "experts", {"transport": "nccl"}, "allowed are observe and advise"),
    ],
)
def test_a_deployment_that_cannot_do_what_its_policy_wants_is_refused(
    sections: dict[str, Any], key: str, value: dict[str, Any], complaint: str
) -> None:
    """Each decision was refused, and shards were added for what had never been rebalanced."""
    on_gpus = {"num_gpus": 1}
    config: dict[str, Any] = {"model": "m", "dense": on_gpus, "experts": on_gpus}
    config["autoscale"] = {"policy": policy_of(**sections).model_dump(mode="json")}
    parse_config(config)
    config[key] = config.get(key, {}) | value
    with pytest.raises(ConfigError, match=complaint):
        parse_config(config)
