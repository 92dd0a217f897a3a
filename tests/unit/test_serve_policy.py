"""The policy of ingress replicas, as the Ray Serve that is installed takes and calls it."""

import inspect
import itertools
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.autoscaling import policy_of, sample_of

from remora.autoscale.autoscale_policy import AutoscalePolicy, parse_policy
from remora.autoscale.autoscale_sample import AutoscaleState, Sample
from remora.autoscale.autoscaler import Decision, decide
from remora.autoscale.decision_lines import replay
from remora.cluster.autoscale_log import (
    INGRESS_FILE,
    THREAD,
    WAITING_MAX,
    AutoscaleLog,
    BackgroundLog,
)
from remora.cluster.cli import main
from remora.cluster.config import load_config
from remora.cluster.instances import FOLDER_ENV
from remora.comm.errors import ConfigError

with warnings.catch_warnings():  # Ray Serve's own, while it is imported
    warnings.simplefilter("ignore")
    from ray.serve._private.autoscaling_state import _resolve_policy_callable
    from ray.serve._private.common import DeploymentID
    from ray.serve.autoscaling_policy import _apply_autoscaling_config
    from ray.serve.config import AutoscalingConfig, AutoscalingContext

    from remora.cluster.app import application, config_from_args
    from remora.cluster.serve_policy import PATH, serve_autoscaling

TARGETS = {"ongoing_per_unit": 10}
REACTIVE = {"window_s": 15, "samples_min": 2, "down_window_s": 60}


def ingress_policy(**sections: Any) -> AutoscalePolicy:
    given = {"pool": "ingress", "targets": TARGETS, "reactive": REACTIVE, **sections}
    return policy_of(**given)


@pytest.fixture(autouse=True)
def threads_end() -> Iterator[None]:
    """Who writes the log of a policy ends with it."""
    yield
    written()


def written() -> None:
    """What policies that are gone have decided is on the disk."""
    for thread in threading.enumerate():
        if thread.name == THREAD:
            thread.join(20.0)
            assert not thread.is_alive(), "its policy is gone"


def called(
    policy: AutoscalePolicy, log_dir: Path | None, every_s: float = 5.0
) -> tuple[AutoscalingConfig, Any]:
    """Through Serve's own pickling, making and wrapping of a policy."""
    config = serve_autoscaling(policy, initial=2, every_s=every_s, log_dir=log_dir, name="remora")
    sent = AutoscalingConfig.model_validate(config.model_dump())  # as a Serve config file has it
    return config, _apply_autoscaling_config(_resolve_policy_callable(sent.policy))


class Serve:
    """What Serve's controller does of it: contexts, bounds left out."""

    def __init__(self, policy: AutoscalePolicy, log_dir: Path | None) -> None:
        self.config, self.call = called(policy, log_dir)
        self.running = self.target = 2
        self.now_s = 1000.0
        self.state: dict[str, Any] = {}

    def tick(self, ongoing: float, seconds: float = 5.0) -> int:
        self.now_s += seconds
        given: dict[str, Any] = dict.fromkeys(inspect.signature(AutoscalingContext).parameters)
        given |= {
            "deployment_id": DeploymentID("ingress", "remora"),
            "deployment_name": "ingress",
            "current_num_replicas": self.running,
            "target_num_replicas": self.target,
            "running_replicas": [],
            "total_num_requests": lambda: ongoing,
            "total_queued_requests": 0.0,
            "policy_state": self.state,
            "capacity_adjusted_min_replicas": 1,
            "capacity_adjusted_max_replicas": 8,
            "current_time": self.now_s,
            "config": self.config,
        }
        wanted, self.state = self.call(AutoscalingContext(**given))
        self.target = int(wanted)
        return self.target


def test_serves_own_schema_takes_it(tmp_path: Path) -> None:
    config, _ = called(ingress_policy(), tmp_path)
    assert (config.min_replicas, config.initial_replicas, config.max_replicas) == (1, 2, 8)
    assert (config.upscale_delay_s, config.downscale_delay_s) == (0.0, 0.0)
    assert config.policy.policy_function == PATH
    again = AutoscalingConfig.model_validate_json(config.model_dump_json())
    assert again.policy == config.policy
    wanted = set(inspect.signature(AutoscalingContext).parameters)
    assert {"current_time", "total_num_requests", "target_num_replicas"} <= wanted


def test_it_grows_once_while_replicas_start_and_shrinks_later(tmp_path: Path) -> None:
    serve = Serve(ingress_policy(), tmp_path)
    assert [serve.tick(15.0) for _ in range(4)] == [2, 2, 2, 2]
    grown = [serve.tick(45.0) for _ in range(6)]
    assert grown[-1] == 5 and sorted(set(grown)) == [2, 5], grown
    serve.running = 5
    assert {serve.tick(45.0) for _ in range(6)} == {5}
    seen = []
    for _ in range(60):
        seen.append(serve.tick(4.0))
        serve.running = seen[-1]
    assert seen == sorted(seen, reverse=True) and seen[-1] < 5
    assert seen.index(4) * 5 >= 60, "not before its window is quiet"


def test_a_replica_that_finds_no_room_is_let_go_with_the_load(tmp_path: Path) -> None:
    """It would be asked for for ever, and Ray's autoscaler would get a node for it."""
    serve, room = Serve(ingress_policy(), tmp_path), 4
    for ongoing, target in ((75.0, 8), (0.0, 1)):
        for _ in range(400):
            serve.tick(ongoing)
            serve.running = min(room, serve.target)
        assert serve.target == target


def test_a_clock_that_was_set_back_is_not_waited_for(tmp_path: Path) -> None:
    serve = Serve(ingress_policy(), tmp_path)
    for _ in range(20):
        serve.tick(15.0)
    serve.tick(15.0, seconds=-3600.0)
    assert [serve.tick(75.0) for _ in range(4)][-1] > 2


def test_a_clock_that_was_set_back_a_little_fills_no_log(tmp_path: Path) -> None:
    """Serve asks ten times a second, and each was a decision until the clock had come round."""
    serve = Serve(ingress_policy(), tmp_path)
    for _ in range(4):
        serve.tick(15.0)
    serve.tick(15.0, seconds=-30.0)
    for _ in range(200):
        serve.tick(15.0, seconds=0.1)
    del serve
    written()
    with (tmp_path / "remora" / INGRESS_FILE).open() as lines:
        found = replay(lines)
    assert found.decisions <= 4 + 1 + 4 and found.num_differences == 0


def test_between_samples_it_says_what_it_said(tmp_path: Path) -> None:
    serve = Serve(ingress_policy(), tmp_path)
    ticks = [serve.tick(45.0, seconds=0.1) for _ in range(600)]
    changes = [n for n, (a, b) in enumerate(itertools.pairwise(ticks)) if a != b]
    assert len(changes) == 1


@pytest.mark.parametrize("mode", ["observe", "advise"])
def test_other_modes_change_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: str
) -> None:
    serve = Serve(ingress_policy(mode=mode), tmp_path)
    with caplog.at_level("INFO", "ray.serve"):  # others have no handler in Serve's controller
        assert {serve.tick(100.0) for _ in range(20)} == {2}
    told = [r for r in caplog.records if "(advise) 2 -> 6" in r.getMessage()]
    assert {r.name for r in told} == ({"ray.serve"} if mode == "advise" else set())


def test_it_never_blocks_and_its_work_is_bounded(tmp_path: Path) -> None:
    predictive = {
        "load_per_unit": 10, "horizon_s": 60, "step_s": 5, "season_s": 1800,
        "forecasters": ["seasonal_naive", "moving_average", "holt"],
    }  # fmt: skip
    policy = ingress_policy(predictive=predictive)
    serve = Serve(policy, tmp_path)
    started_s = time.thread_time()
    for number in range(1500):  # two hours: windows and series are full
        serve.tick(20.0 + number % 7)
        serve.running = serve.target
    busy_s = time.thread_time() - started_s
    assert busy_s < 1500 * 0.1, "Serve's control loop turns ten times a second"


def test_every_decision_is_logged_with_its_inputs_and_replays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    serve = Serve(ingress_policy(), tmp_path)
    wanted = [serve.tick(4.0 if number < 20 else 45.0, seconds=2.5) for number in range(60)]
    assert max(wanted) == 5
    del serve
    written()
    path = tmp_path / "remora" / INGRESS_FILE
    with path.open() as lines:
        found = replay(lines)
    assert (found.decisions, found.num_differences) == (30, 0), "one in sample_every_s"
    assert '"ongoing": 45.0' in path.read_text().splitlines()[-1]
    assert main(["autoscale", "replay", str(path)]) == 0
    assert "30 decisions, 0 differ" in capsys.readouterr().out
    again = Serve(ingress_policy(), tmp_path)
    again.tick(4.0)
    del again
    written()
    assert sorted(one.name for one in path.parent.iterdir()) == [INGRESS_FILE, f"{INGRESS_FILE}.1"]


def test_a_disk_that_hangs_costs_lines_and_no_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hangs, writes = threading.Event(), threading.Event()

    class Slow(AutoscaleLog):
        def decided(self, before: AutoscaleState, sample: Sample, decision: Decision) -> None:
            writes.set()
            assert hangs.wait(20.0)
            super().decided(before, sample, decision)

    policy, state = policy_of(), AutoscaleState()
    log = BackgroundLog(lambda: Slow(tmp_path, policy, file=INGRESS_FILE))
    for number in range(WAITING_MAX + 10):
        sample = sample_of(5.0 * number)
        decision, after = decide(policy, state, sample)
        log.decided(state, sample, decision)
        state = after
        assert writes.wait(20.0), "the first is being written, and the others wait"
    hangs.set()
    while log._entries.qsize():
        assert any(thread.name == THREAD for thread in threading.enumerate())
    sample = sample_of(5.0 * (WAITING_MAX + 10))
    log.decided(state, sample, decide(policy, state, sample)[0])
    del log
    written()
    assert "9 decisions are not logged" in caplog.text
    counts = []
    for name in (f"{INGRESS_FILE}.1", INGRESS_FILE):
        with (tmp_path / name).open() as lines:
            found = replay(lines)
        assert found.num_differences == 0
        counts.append(found.decisions)
    assert counts == [WAITING_MAX + 1, 1]


def test_without_a_place_for_it_decisions_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(FOLDER_ENV, str(tmp_path / "file"))
    serve = Serve(ingress_policy(), None)
    assert [serve.tick(45.0) for _ in range(400)][-1] == 5
    del serve
    written()
    assert "no decision is logged: " in caplog.text and f"set {FOLDER_ENV}" in caplog.text


@pytest.mark.parametrize(
    ("sections", "complaint"),
    [
        ({"targets": {"kv_use": 0.5}}, "targets.kv_use is not measured there"),
        ({"targets": {"ongoing_per_unit": 5, "queue_per_unit": 5}}, "queue_per_unit is not"),
        ({"pool": "dense", "targets": TARGETS}, "only of pool ingress"),
    ],
)
def test_what_serve_does_not_measure_is_refused(sections: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        ingress_policy(**sections)


def test_a_configuration_with_it_is_an_application_with_it(tmp_path: Path) -> None:
    path = tmp_path / "ingress.yaml"
    path.write_text(ingress_policy().model_dump_json(exclude_unset=True))
    few = {"model": "m", "http.autoscale": str(path), "http.queue_max": 512}
    config = load_config(overrides=few)
    assert parse_policy(config.to_args()["http"]["autoscale"]).pool == "ingress"
    assert config_from_args(config.to_args()) == config
    found = application(config)._bound_deployment._deployment_config.autoscaling_config
    assert found is not None and found.max_replicas == 8
    assert found.policy.policy_function == PATH
    wrong = {"model": "m", "http.autoscale": policy_of().model_dump(mode="json")}
    with pytest.raises(ConfigError, match="a policy of pool ingress, not experts"):
        load_config(overrides=wrong)
    rare = few | {"autoscale.sample_every_s": 60}
    with pytest.raises(ConfigError, match="must hold 2 samples"):
        load_config(overrides=rare)
    many = few | {"http.queue_max": 513}
    with pytest.raises(ConfigError, match="what is admitted must fit"):
        load_config(overrides=many)
