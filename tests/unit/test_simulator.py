"""The simulator: it replays, says what it did, and finds machines that are broken on purpose."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from remora.actors.dense_state import DenseState
from remora.actors.expert_state import ExpertState
from remora.actors.health_state import Beat, HealthState
from remora.cluster import cli, operation_plan
from remora.cluster.coordinator_state import CoordinatorState
from remora.cluster.operation import Quiesce
from remora.cluster.operation_steps import OperationSteps
from remora.cluster.sim_dispatch import SimDispatch
from remora.cluster.sim_faults import Fault, read_faults
from remora.cluster.sim_log import SimLog
from remora.cluster.sim_rank import SimRank
from remora.cluster.sim_routes import SimRoutes
from remora.cluster.sim_shard import Found
from remora.cluster.simulation import run_seed
from remora.comm.errors import ConfigError
from remora.comm.view import View

SEEDS = range(40)
MUTANT_SEEDS = range(800)  # within so many seeds each mutant is found
LOST_AND_DAMAGED = (
    Fault(kind="kill", who="shard", step="over", when="before"),
    Fault(kind="flip", who="joiner", step="over", when="before"),
)
HANGS_IN_DRAIN = (Fault(kind="stop", who="dense", step="drain", when="before", for_s=2.9),)
FENCED_AND_CRASHED = (
    Fault(kind="stop", who="dense", step="drain", when="before", for_s=2.9),
    Fault(kind="torn log", who="coordinator", step="over", when="before"),
)
CUT_IN_DRAIN = (Fault(kind="cut", who="dense", step="drain", when="before", for_s=8.0),)
FLIPPED_IN_COPY = (Fault(kind="flip", who="shard", step="copy", when="before"),)
FLIPPED = (Fault(kind="flip", who="joiner", step="plan", when="before"),)
CRASHES = tuple(
    Fault(kind="kill", who="coordinator", step="over", when="before", operation=n) for n in (1, 2)
)
LOST_AND_NOT_RESTORED = (
    Fault(kind="kill", who="shard", step="over", when="before", operation=1),
    Fault(kind="out of memory", who="joiner", step="over", when="before", operation=1),
)
CRASHED_WHILE_ONE_GIVES_WAY = (
    Fault(kind="no place", who="shard", step="over", when="before", operation=1, for_s=30.0),
    Fault(kind="kill", who="coordinator", step="undo", when="before"),
)
BLOCKED = (Fault(kind="block", who="dense", step="over", when="before", for_s=120.0),)
STOPPED = (Fault(kind="stop", who="shard", step="over", when="before", for_s=60.0),)
KILLED_IN_DRAIN = (Fault(kind="kill", who="shard", step="drain", when="before"),)
Patch = pytest.MonkeyPatch


def test_seeds_hold_and_happen_again_in_the_same_way() -> None:
    first = [run_seed(seed) for seed in SEEDS]
    assert not [(o.seed, o.violation) for o in first if o.violation is not None]
    assert [run_seed(seed) for seed in SEEDS] == first
    assert sum(o.num_tokens for o in first) > 40 * len(SEEDS)
    assert {fault.split()[0] for o in first for fault in o.faults} >= {"kill", "stop", "cut"}


def test_hosts_that_go_away_are_left_in_time_or_die_with_what_is_there() -> None:
    for left_s, ended in ((9.0, False), (0.4, True)):
        gone = Fault(kind="drain node", who="shard", step="over", when="before", for_s=left_s)
        outcomes = [run_seed(seed, (gone,), traced=True) for seed in SEEDS[:10]]
        assert not [(o.seed, o.violation) for o in outcomes if o.violation is not None]
        lines = [line for o in outcomes for line in o.trace]
        assert any("operation evacuate-" in line for line in lines)
        assert any("dies with host-" in line for line in lines) == ended


def test_who_retires_by_a_round_that_is_committed_is_not_missed() -> None:
    """The operation fails in a later one, and somebody had wanted it to be done."""
    cut = partial(Fault, kind="cut", who="coordinator")
    silent = (
        cut(step="prepare", for_s=2.1),
        cut(step="verify", when="before", operation=1, for_s=9.0),
        cut(step="commit", when="before", for_s=6.0),
    )
    dies = Fault(kind="kill", who="shard", step="commit", when="after", operation=3)
    found = run_seed(143, (*silent, dies))
    assert found.violation is None and "ScaleTo failed" in found.operations


def test_faults_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "faults.yaml"
    path.write_text(
        "faults:\n- {kind: kill, who: joiner, step: prepare, when: during, operation: 1}\n"
        "- {kind: kill, who: coordinator, step: drain, when: before}\n"
    )
    outcomes = [run_seed(seed, read_faults(path)) for seed in SEEDS]
    assert not [o.violation for o in outcomes if o.violation is not None]
    struck = {fault.partition(",")[0] for o in outcomes for fault in o.faults}
    assert struck == {
        "kill joiner during prepare of operation 1", "kill coordinator before drain",
    }  # fmt: skip
    assert any("ScaleTo failed" in o.operations for o in outcomes), "its joiner died"
    path.write_text("faults: [{kind: kill, whom: shard}]")
    with pytest.raises(ConfigError, match="unknown field `whom`"):
        read_faults(path)
    path.write_text("faults: [{kind: thunder}]")
    with pytest.raises(ConfigError, match="'thunder'"):
        read_faults(path)
    for number in ("operation: -1", "for_s: -1", "for_s: .nan", "for_s: 1e9"):
        path.write_text(f"faults: [{{kind: stop, {number}}}]")
        with pytest.raises(ConfigError, match=number.partition(":")[0]):
            read_faults(path)


# -- machines that are broken on purpose ----------------------------------------------------------


def free_before_drain(patch: Patch) -> None:
    """Slots are freed while dense groups still route by the older view."""
    patch.setattr(OperationSteps, "_drain", OperationSteps._free)


def skip_the_digests(patch: Patch) -> None:
    patch.setattr(OperationSteps, "_digest_fault", lambda *_: None)


def publish_before_the_log(patch: Patch) -> None:
    """What a crash then forgets was in force already."""
    append = SimLog.append

    def skipping(self: SimLog, record: dict[str, object]) -> None:
        if record["t"] != "committed":
            append(self, record)

    patch.setattr(SimLog, "append", skipping)


def log_what_begins_alone(patch: Patch) -> None:
    """What waits for another operation to give way is not in the log."""
    append = SimLog.append

    def skipping(self: SimLog, record: dict[str, object]) -> None:
        if record["t"] != "accepted":
            append(self, record)

    patch.setattr(SimLog, "append", skipping)


def keep_what_was_copied(patch: Patch) -> None:
    """What an operation copied stays when it is undone, and when it is done."""
    patch.setattr(ExpertState, "keep", lambda *_: [])


def copy_on_when_it_is_undone(patch: Patch) -> None:
    """A copy under way ends in a slot although its operation is over."""
    patch.setattr(ExpertState, "check_turn", lambda *_: None)


def serve_what_was_not_verified(patch: Patch) -> None:
    settle = ExpertState.settle
    patch.setattr(
        ExpertState, "settle", lambda self, slot, found, _: settle(self, slot, found, found.digest)
    )
    patch.setattr(OperationSteps, "_digest_fault", lambda *_: None)
    patch.setattr(OperationSteps, "_canary_fault", lambda *_: None)


def never_restore(patch: Patch) -> None:
    patch.setattr(CoordinatorState, "_restore_lost", lambda *_: None)


def forget_who_died(patch: Patch) -> None:
    patch.setattr(CoordinatorState, "_member_lost", lambda *_: None)


def no_fences(patch: Patch) -> None:
    """Dense groups that do not answer are not waited for, nor cut off."""
    patch.setattr(OperationSteps, "_fences", lambda *_: [])


def held_steps_do_not_answer(patch: Patch) -> None:
    """A dense group that waits for a lost shard cannot say which view it goes by."""
    patch.setattr(SimRank, "_acknowledge", lambda *_: None)


def hold_for_newer_views_alone(patch: Patch) -> None:
    """A held step does not see that a shard is back, or lets it in again."""
    patch.setattr(SimRoutes, "look_again", lambda *_: False)


def ask_lives_of_a_view_to_come(patch: Patch) -> None:
    """A shard that joins again takes the place of its old life before its view is in force."""
    greet = SimRoutes.greet

    def greeted(self: SimRoutes, view: View) -> None:
        greet(self, view)
        self.connected |= self.ahead

    patch.setattr(SimRoutes, "greet", greeted)


def obey_anybody(patch: Patch) -> None:
    """An order of a coordinator that is over undoes what the next one has decided."""
    patch.setattr(ExpertState, "obey", lambda *_: None)


def second_copies_are_not_verified(patch: Patch) -> None:
    settle = ExpertState.settle_copy
    patch.setattr(
        ExpertState,
        "settle_copy",
        lambda self, slot, found, _: settle(self, slot, found, found.digest),
    )


def nobody_looks_for_progress(patch: Patch) -> None:
    """Who hangs is not ended."""
    patch.setattr(HealthState, "look", lambda *_: [])


def requests_that_run_alone_are_to_move(patch: Patch) -> None:
    """A dense group's beat does not tell what its engine has not taken."""
    beat = SimRank.beat

    def told(self: SimRank) -> Beat:
        stats = self.state.stats()
        return Beat(beat(self).progress, stats.num_running + stats.num_waiting)

    patch.setattr(SimRank, "beat", told)


def share_slots_with_second_copies(patch: Patch) -> None:
    """A second copy that is served takes the room of what moves there."""
    patch.setattr(ExpertState, "copies_beyond", lambda *_: [])
    patch.setattr(ExpertState, "may_copy", lambda *_: True)


def end_groups_that_have_requests(patch: Patch) -> None:
    """A dense group that retires is not asked to finish what it has."""
    begin = OperationSteps._begin
    patch.setattr(
        OperationSteps,
        "_begin",
        lambda self, step, limit_s, tasks: begin(
            self, step, limit_s, [task for task in tasks if not isinstance(task, Quiesce)]
        ),
    )


def nobody_joins_instead(patch: Patch) -> None:
    """Dense groups retire, and the number that was asked for is not there."""
    planned = operation_plan._with_groups
    patch.setattr(
        operation_plan, "_with_groups", lambda plan, leave, _, now: planned(plan, leave, 0, now)
    )


def forget_whom_the_last_one_fenced(patch: Patch) -> None:
    """A new coordinator lets nobody in again whose fence is not in the log."""
    patch.setattr(CoordinatorState, "_has_left_older_views", lambda *_: None)


def emit_twice(patch: Patch) -> None:
    absorb = DenseState._absorb
    patch.setattr(
        DenseState, "_absorb",
        lambda self, piece, result: _twice(absorb(self, piece, result), piece.position),
    )  # fmt: skip


def _twice(output: object, position: int) -> object:
    if output is not None and position == 9:
        output.token_ids.append(output.token_ids[-1])  # type: ignore[attr-defined]
    return output


def mix_up_answers(patch: Patch) -> None:
    """A late answer counts for the newest call."""
    answered = SimDispatch.answered

    def mixed(self: SimDispatch, call: int, found: Found) -> None:
        step = self.step
        if step is not None and call not in step.waiting and step.waiting:
            call = min(step.waiting)
        answered(self, call, found)

    patch.setattr(SimDispatch, "answered", mixed)


# what is broken, the invariant that says so, and faults instead of those that the seed draws
MUTANTS: list[tuple[Callable[[Patch], None], str, tuple[Fault, ...] | None]] = [
    (free_before_drain, "5:", None),
    (skip_the_digests, "4:", LOST_AND_DAMAGED),
    (publish_before_the_log, "", None),
    (log_what_begins_alone, "7:", CRASHED_WHILE_ONE_GIVES_WAY),
    (keep_what_was_copied, "", None),
    (copy_on_when_it_is_undone, "6:", FLIPPED_IN_COPY),
    (serve_what_was_not_verified, "4:", None),
    (never_restore, "", None),
    (forget_who_died, "", None),
    (held_steps_do_not_answer, "3:", KILLED_IN_DRAIN),
    (emit_twice, "1:", None),
    (mix_up_answers, "", None),
    (no_fences, "5:", HANGS_IN_DRAIN),
    (end_groups_that_have_requests, "10:", ()),
    (nobody_joins_instead, "7:", ()),
    (forget_whom_the_last_one_fenced, "3:", FENCED_AND_CRASHED),
    (hold_for_newer_views_alone, "3:", CUT_IN_DRAIN),
    (ask_lives_of_a_view_to_come, "5:", LOST_AND_NOT_RESTORED),
    (obey_anybody, "", CRASHES),
    (second_copies_are_not_verified, "4:", FLIPPED),
    (nobody_looks_for_progress, "8:", STOPPED),
    (requests_that_run_alone_are_to_move, "8:", BLOCKED),
    (share_slots_with_second_copies, "9:", 2 * FLIPPED_IN_COPY),
]


@pytest.mark.parametrize(
    ("mutate", "number", "faults"), MUTANTS, ids=[m.__name__ for m, _, _ in MUTANTS]
)
def test_what_is_broken_is_found(
    mutate: Callable[[Patch], None],
    number: str,
    faults: tuple[Fault, ...] | None,
    monkeypatch: Patch,
) -> None:
    mutate(monkeypatch)
    for seed in MUTANT_SEEDS:
        found = run_seed(seed, faults).violation
        if found is not None and found.startswith(number):
            print(seed, found)
            return
    raise AssertionError(f"{mutate.__name__} survives {len(MUTANT_SEEDS)} seeds")


def test_the_command_tells_seeds_that_fail_and_replays_them(
    monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["sim", "--seeds", "5", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["seeds"], told["failed"]) == (5, []) and told["tokens"] > 0
    free_before_drain(monkeypatch)
    assert cli.main(["sim", "--seeds", "40"]) == 1
    out = capsys.readouterr().out
    again = out.partition("remora sim --seed ")[2].split()[0]
    assert cli.main(["sim", "--seed", again]) == 1
    trace = capsys.readouterr().out
    assert f"seed {again} FAILS: " in trace and "is committed" in trace
    assert cli.main(["sim", "--seeds", "0"]) == 2
    assert "--seeds 0: allowed is 1 to" in capsys.readouterr().err
