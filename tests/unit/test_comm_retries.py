"""Dispatch and combine when shards disappoint: not theirs, lost, late, failing, faulty wires."""

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from support.comm_rig import (
    TOKEN,
    WAIT_S,
    at_home,
    close_enough,
    everywhere,
    member,
    random_batch,
    serving,
    shards,
    toy_compute,
)
from torch import Tensor

from remora.comm.dispatch import Combine, Dispatcher
from remora.comm.errors import ClusterError, DeadlineError, FencedError, PeerLostError
from remora.comm.expert_protocol import ExpertCall, NotMineError
from remora.comm.faulty import Faults, FaultyLink
from remora.comm.peer import PeerLimits
from remora.comm.peers import PeerSet
from remora.comm.routes import Routes
from remora.comm.view import Member, Placement, View

pytestmark = pytest.mark.usefixtures("plane")
MODES = pytest.mark.parametrize("mode", ["ordered", "presummed"])


@pytest.fixture
def peers() -> Iterator[PeerSet]:
    peers = PeerSet(token=TOKEN, self_host="a", limits=PeerLimits(region_bytes=1 << 20))
    yield peers
    peers.close()


@MODES
def test_not_mine_looks_again_at_the_view(peers: PeerSet, mode: Combine) -> None:
    """The view is stale: expert 3 has moved. One refresh, same result."""
    moved = Placement(
        num_experts=16,
        moe_layers=(0, 2),
        slots={"shard-0": ((0, 1, 2, 4, 5, 6, 7),) * 2, "shard-1": ((*range(8, 16), 3),) * 2},
    )
    asked: list[int] = []

    def holding(uid: str) -> Callable[[ExpertCall], Tensor]:
        def compute(call: ExpertCall) -> Tensor:
            held = moved.slots[uid][0]
            missing = sorted({e for e in call.pair_expert_P.tolist() if e not in held})
            if missing:
                raise NotMineError(missing)
            return toy_compute(call)

        return compute

    with shards(hosts="ab", compute=holding) as rig:

        def newer(epoch: int) -> View:
            asked.append(epoch)
            return View(epoch=2, members=rig.view.members, placement=moved)

        dispatcher = Dispatcher(view=rig.view, peers=peers, combine=mode, refresh_view=newer)
        batch = random_batch(40)
        got = dispatcher.moe(0, *batch, 40)
        assert close_enough(got, at_home(*batch, 40, 0), mode)
        assert asked == [1] and dispatcher.view.epoch == 2
        assert dispatcher.counters.link("shard-0").not_mine == 1
        assert close_enough(dispatcher.moe(2, *batch, 40), at_home(*batch, 40, 2), mode)
        assert asked == [1]


def test_not_mine_without_a_newer_view(peers: PeerSet) -> None:
    """Another replica serves; with none, the error says who disappointed. Bounded either way."""

    def unwilling(uid: str) -> Callable[[ExpertCall], Tensor]:
        def compute(call: ExpertCall) -> Tensor:
            if uid == "shard-0" and 5 in call.pair_expert_P.tolist():
                raise NotMineError([5])
            return toy_compute(call)

        return compute

    batch = random_batch(40)
    with shards(compute=unwilling, placement=everywhere("shard-0", "shard-1")) as rig:
        dispatcher = Dispatcher(view=rig.view, peers=peers, combine="ordered")
        assert torch.equal(dispatcher.moe(0, *batch, 40), at_home(*batch, 40, 0))
    with shards(compute=unwilling) as rig:
        dispatcher = Dispatcher(
            view=rig.view, peers=peers, combine="ordered", refresh_view=lambda epoch: rig.view
        )
        with pytest.raises(PeerLostError, match=r"shard-0 does not hold experts \[5\] of layer 0"):
            dispatcher.moe(0, *batch, 40)
        fine = (batch[0], batch[1] % 4, batch[2])  # and the dispatcher goes on
        assert torch.equal(dispatcher.moe(0, *fine, 40), at_home(*fine, 40, 0))


@MODES
def test_a_lost_shard_is_replaced_by_its_replicas(peers: PeerSet, mode: Combine) -> None:
    with shards(hosts="ab", placement=everywhere("shard-0", "shard-1")) as rig:
        dispatcher = Dispatcher(view=rig.view, peers=peers, combine=mode)
        batch = random_batch(40)
        dispatcher.moe(0, *batch, 40)
        rig.servers["shard-0"].close()
        got = dispatcher.moe(0, *batch, 40)
        assert close_enough(got, at_home(*batch, 40, 0), mode)
        assert dispatcher.counters.link("shard-0").losses == 1
        rig.servers["shard-1"].close()
        with pytest.raises(PeerLostError):
            dispatcher.moe(0, *batch, 40)


def test_a_cut_connection_is_made_again(peers: PeerSet) -> None:
    with shards() as rig:
        dispatcher = Dispatcher(view=rig.view, peers=peers, combine="ordered")
        batch = random_batch(40)
        dispatcher.moe(0, *batch, 40)  # its answer says that the server knows the connection
        for _ in range(3):
            for connection in rig.servers["shard-0"].connections:
                connection.sock.shutdown(2)
            assert torch.equal(dispatcher.moe(0, *batch, 40), at_home(*batch, 40, 0))
        assert dispatcher.counters.link("shard-0").losses == 3


def test_a_late_shard_is_a_suspect_until_the_next_epoch(peers: PeerSet) -> None:
    gate = threading.Event()

    def stuck(uid: str) -> Callable[[ExpertCall], Tensor]:
        def compute(call: ExpertCall) -> Tensor:
            if uid == "shard-0":
                gate.wait()
            return toy_compute(call)

        return compute

    with shards(compute=stuck, placement=everywhere("shard-0", "shard-1")) as rig:
        dispatcher = Dispatcher(view=rig.view, peers=peers, combine="ordered", deadline_s=0.05)
        batch = random_batch(40)
        for layer in (0, 2):
            assert torch.equal(dispatcher.moe(layer, *batch, 40), at_home(*batch, 40, layer))
        assert dispatcher.counters.link("shard-0").deadlines == 1
        gate.set()
        dispatcher._routes.apply(
            View(epoch=2, members=rig.view.members, placement=rig.view.placement)
        )
        assert torch.equal(dispatcher.moe(0, *batch, 40), at_home(*batch, 40, 0))
        assert dispatcher.counters.link("shard-0").sent_frames == 2
    gate.clear()
    with shards(compute=stuck) as rig:
        dispatcher._routes.apply(
            View(epoch=3, members=rig.view.members, placement=rig.view.placement)
        )
        with pytest.raises(DeadlineError, match="shard-0 did not answer"):
            dispatcher.moe(0, *batch, 40)
        gate.set()


def test_a_shard_that_fails_fails_the_call(
    peers: PeerSet, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(uid: str) -> Callable[[ExpertCall], Tensor]:
        def compute(call: ExpertCall) -> Tensor:
            if call.layer == 2:
                raise RuntimeError("out of luck")
            return toy_compute(call)

        return compute

    with shards(compute=broken) as rig:
        dispatcher = Dispatcher(view=rig.view, peers=peers, combine="ordered")
        batch = random_batch(5)
        for _ in range(10):  # and no credit is lost on the way
            with pytest.raises(ClusterError, match="RuntimeError: out of luck"):
                dispatcher.moe(2, *batch, 5)
        assert torch.equal(dispatcher.moe(0, *batch, 5), at_home(*batch, 5, 0))


def test_no_replica_at_all_is_named_at_once(peers: PeerSet) -> None:
    placement = Placement(num_experts=16, moe_layers=(0,), slots={"shard-0": (tuple(range(15)),)})
    with shards(num_shards=1, placement=placement) as rig:
        dispatcher = Dispatcher(view=rig.view, peers=peers, combine="ordered")
        hidden_TD, _, weights_TK = random_batch(1, top_k=1)
        with pytest.raises(PeerLostError, match="expert 15 of layer 0 has no live replica"):
            dispatcher.moe(0, hidden_TD, torch.tensor([[15]]), weights_TK, 1)


def test_credits_lost_with_late_calls_come_back_by_connecting_again() -> None:
    """Frames that vanish (they do not on real streams) must not use up a peer for ever."""
    peers = PeerSet(token=TOKEN, self_host="a", limits=PeerLimits(num_regions=2))
    with shards(num_shards=1, hosts="a") as rig:
        link = FaultyLink(
            rig.view.members[0].endpoint, self_host="a", seed=1,
            to_server=Faults(drop=1.0, skip_frames=1),
        )  # fmt: skip
        faulty = Member(
            uid="shard-0", incarnation=1, role="shard", endpoint=link.endpoint("a"), actor_name="-"
        )
        view = View(epoch=1, members=(faulty,), placement=rig.view.placement)
        dispatcher = Dispatcher(view=view, peers=peers, combine="ordered", deadline_s=0.02)
        batch = random_batch(4)
        answered = 0
        for epoch in range(2, 9):
            dispatcher._routes.apply(
                View(epoch=epoch, members=view.members, placement=view.placement)
            )
            try:
                got = dispatcher.moe(0, *batch, 4)
            except DeadlineError:
                continue
            answered += 1
            assert torch.equal(got, at_home(*batch, 4, 0))
        assert answered == 3  # 1 answered, 2 credits lost, connected again, ...
        peers.close()
        link.close()


def test_a_peer_found_lost_between_two_dispatches(peers: PeerSet) -> None:
    with shards(placement=everywhere("shard-0", "shard-1")) as rig:
        dispatcher = Dispatcher(view=rig.view, peers=peers, combine="ordered")
        batch = random_batch(40)
        peers.disconnect("shard-0")
        assert torch.equal(dispatcher.moe(0, *batch, 40), at_home(*batch, 40, 0))
        peers.peer("shard-1").lose("cut by the test")
        assert torch.equal(dispatcher.moe(0, *batch, 40), at_home(*batch, 40, 0))


def test_a_greeted_life_takes_no_calls_before_its_view() -> None:
    """A shard that died is to join again and hold other experts; the view in force is older."""
    placement = Placement(num_experts=1, moe_layers=(0,), slots={"x": ((0,),)})
    with (
        serving(lambda *_: None, incarnation=1) as (old, _),
        serving(lambda *_: None, incarnation=2) as (new, lost),
    ):
        before, after, never = (
            View(
                epoch=epoch, members=(member(server.endpoint("a"), "x", life),), placement=placement
            )
            for epoch, server, life in ((1, old, 1), (2, new, 2), (2, new, 3))
        )
        peers = PeerSet(token=TOKEN, self_host="a")
        routes = Routes(before, peers, None)
        serves = peers.peer("x")
        peers.greet(after)
        assert peers.peer("x") is serves and serves.error is None

        old.close()
        serves.lose("killed by the test")
        peers.greet(after)
        routes.refresh()  # dials the old life in vain
        routes.look_again()
        assert peers.live_uids == [] and not routes.usable_S.any()

        with pytest.raises(FencedError):  # another offer, of a life that is not there
            peers.greet(never)
        lost.get(timeout=WAIT_S)  # of the offer before
        peers.greet(after)
        [greeted] = peers._ahead.values()
        routes.apply(after)
        assert peers.peer("x") is greeted and routes.usable_S.all()
        peers.greet(after)
        assert not peers._ahead, "it is in use"
        peers.close()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("host", ["a", "b"])
def test_faults_on_the_wire_never_change_a_result(seed: int, host: str) -> None:
    """Drops, duplicates, delays and cuts (and flips between hosts), seeded; printed on failure."""
    print(f"seed {seed}")
    flip = 0.0 if host == "a" else 0.05
    faults = Faults(drop=0.03, duplicate=0.1, cut=0.05, flip=flip, delay=0.05, delay_ms=2.0)
    peers = PeerSet(token=TOKEN, self_host="a", limits=PeerLimits(arena_bytes_min=0))
    with shards(hosts=host, placement=everywhere("shard-0", "shard-1")) as rig:
        link = FaultyLink(
            rig.view.members[0].endpoint, self_host="a", seed=seed,
            to_server=faults, to_client=faults,
        )  # fmt: skip
        faulty = Member(
            uid="shard-0", incarnation=1, role="shard", endpoint=link.endpoint(host), actor_name="-"
        )
        view = View(epoch=1, members=(faulty, rig.view.members[1]), placement=rig.view.placement)
        epoch = 1

        def forgiving(_: int) -> View:
            nonlocal epoch  # each look gives the faulty shard another chance
            epoch += 1
            return View(epoch=epoch, members=view.members, placement=view.placement)

        dispatcher = Dispatcher(
            view=view, peers=peers, combine="ordered", deadline_s=0.05, refresh_view=forgiving
        )
        answered = 0
        for step in range(60):
            batch = random_batch(6, seed=step)
            try:
                got = dispatcher.moe(0, *batch, 6)
            except (PeerLostError, DeadlineError):
                continue  # four faults in a row: an error, never a wrong row
            assert torch.equal(got, at_home(*batch, 6, 0))
            answered += 1
        assert answered >= 50 and sum(link.counts.values()) >= 5, link.counts
        peers.close()
        link.close()
