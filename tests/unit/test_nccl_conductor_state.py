"""The conductor's machine: which generation comes next, what is given up, when steps are held."""

from support.nccl_cluster import thrice
from support.nccl_rig import view_of

from remora.comm import nccl_conductor_state as conductor
from remora.comm.nccl_messages import Built, NotBuilt, Stop, Ticket, TicketBroken, TicketOver
from remora.comm.view import Placement


def once(num_shards: int) -> Placement:
    """One replica of each expert: nobody can be spared."""
    whole = thrice(num_shards + 3)
    held = {
        f"shard-{i}": (tuple(range(i, whole.num_experts, num_shards)),) * len(whole.moe_layers)
        for i in range(num_shards)
    }
    return Placement(num_experts=whole.num_experts, moe_layers=whole.moe_layers, slots=held)


def in_use(state: conductor.ConductorState, out: list[conductor.Instruction]) -> list[str]:
    """Members of the generation that `out` begins, once it is in use."""
    (make,) = (i for i in out if isinstance(i, conductor.MakeId))
    assert state.next is not None
    uids = state.next.roster.uids
    state.handle(conductor.IdMade(make.generation, bytes(128)))
    sent = [i for uid in uids for i in state.handle(Built(uid, make.generation))]
    (warm,) = (i.message for i in sent if isinstance(i, conductor.Send))
    assert isinstance(warm, Ticket) and warm.mode == "warm"
    for uid in uids:
        state.handle(TicketOver(uid, warm.number))
    assert state.current is not None
    return list(state.current.uids)


def commit_one(state: conductor.ConductorState) -> None:
    """A step on the generation in use."""
    state.handle(conductor.StepWanted("exact"))
    assert state.running is not None and state.current is not None
    number, step = state.running.number, state.step
    for uid in state.current.uids:
        state.handle(TicketOver(uid, number))
    assert state.step == step + 1


def test_a_new_view_is_tried_as_often_as_the_first() -> None:
    """What failed before it says nothing about its members."""
    state = conductor.ConductorState()
    for view in (view_of(1, thrice(4), epoch=1), view_of(1, thrice(3), epoch=2)):
        out = state.handle(conductor.ViewCame(view))
        for _ in range(conductor.BUILDS_MAX - 1):
            (make,) = (i for i in out if isinstance(i, conductor.MakeId))
            out = state.handle(NotBuilt("shard-0", make.generation, "no memory"))
            assert not any(isinstance(i, conductor.GiveUp) for i in out), view.epoch
        (make,) = (i for i in out if isinstance(i, conductor.MakeId))
        out = state.handle(NotBuilt("shard-0", make.generation, "no memory"))
        assert conductor.GiveUp("the communicator failed 3 times: shard-0: no memory") in out


def test_what_cannot_be_built_is_given_up_while_steps_go_on_without_it() -> None:
    """Steps on the generation in use say nothing of the one that is to take its place."""
    state = conductor.ConductorState()
    in_use(state, state.handle(conductor.ViewCame(view_of(1, thrice(3), epoch=1))))
    old = state.current
    out = state.handle(conductor.ViewCame(view_of(1, thrice(4), epoch=2)))
    for _ in range(conductor.BUILDS_MAX):
        commit_one(state)
        (make,) = (i for i in out if isinstance(i, conductor.MakeId))
        out = state.handle(NotBuilt("shard-3", make.generation, "no memory"))
    assert conductor.GiveUp("the communicator failed 3 times: shard-3: no memory") in out
    commit_one(state)
    assert state.current is old and state.next is None


def test_a_build_that_takes_too_long_is_given_up_and_names_who_is_silent() -> None:
    state, view = conductor.ConductorState(), view_of(1, thrice(3))
    (make,) = state.handle(conductor.ViewCame(view))
    assert isinstance(make, conductor.MakeId)
    late = conductor.BuildLate(make.generation, 60.0)
    state.handle(conductor.IdMade(make.generation, bytes(128)))
    for uid in ("dense-0", "shard-1"):
        state.handle(Built(uid, make.generation))
    stop, gave_up = state.handle(late)
    assert isinstance(stop, conductor.Send) and isinstance(stop.message, Stop)
    assert gave_up == conductor.GiveUp("no communicator within 60 s: no word of shard-0, shard-2")
    in_use(state, state.handle(conductor.ViewCame(view)))  # somebody has looked
    assert state.handle(late) == []
    assert state.current is not None
    assert state.handle(conductor.BuildLate(state.current.generation, 60.0)) == []


def test_who_is_lost_is_done_without_where_experts_have_replicas() -> None:
    state, view = conductor.ConductorState(), view_of(1, thrice(4))
    in_use(state, state.handle(conductor.ViewCame(view)))
    left = in_use(state, state.handle(conductor.MemberLost("shard-1", 1, "it died")))
    assert left == ["dense-0", "shard-0", "shard-2", "shard-3"]
    left = in_use(state, state.handle(conductor.MemberLost("shard-0", 1, "it died")))
    assert left == ["dense-0", "shard-2", "shard-3"]
    (*_, hold) = state.handle(conductor.MemberLost("shard-3", 1, "it died"))
    assert isinstance(hold, conductor.Hold)
    assert "layer 0 expert" in hold.why and "it died" in hold.why


def test_steps_are_held_until_members_can_be_reached_again() -> None:
    """The same life over a new stream, or a next one by a next view; the step that was wanted runs
    then."""
    state, view = conductor.ConductorState(), view_of(1, once(2))
    in_use(state, state.handle(conductor.ViewCame(view)))
    state.handle(conductor.StepWanted("exact", sources=("dense-0",)))
    out = state.handle(conductor.MemberLost("shard-1", 1, "its stream broke"))
    assert any(isinstance(i, conductor.Hold) for i in out)
    assert state.running is not None  # the others have not answered that it is over
    for uid in ("dense-0", "shard-0"):
        state.handle(TicketBroken(uid, state.running.number, "stopped"))
    absent = {"shard-1": "no answer"}
    (hold,) = state.handle(conductor.ViewCame(view, absent))
    assert isinstance(hold, conductor.Hold)
    assert "shard-1" in in_use(state, state.handle(conductor.ViewCame(view)))
    assert state.running is not None and (state.running.mode, state.running.step) == ("exact", 1)
