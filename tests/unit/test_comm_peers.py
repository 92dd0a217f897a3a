"""`PeerSet`: calls, credits, arenas, and every way in which a peer can let us down."""

import gc
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.comm_rig import (
    TOKEN,
    WAIT_S,
    echo_body,
    member,
    serve,
    service,
    serving,
    toy_compute,
)
from torch import Tensor

from remora.comm.call import Call
from remora.comm.connection import Connection, Frame
from remora.comm.errors import ClusterError, DeadlineError, PeerLostError
from remora.comm.expert_protocol import ExpertCall, NotMineError
from remora.comm.peer import Peer, PeerLimits
from remora.comm.peers import PeerSet
from remora.comm.server import FrameServer
from remora.comm.view import Endpoint, Placement, View
from remora.comm.wire import Dtype, Flag, Kind

pytestmark = pytest.mark.usefixtures("plane")
HOSTS = pytest.mark.parametrize("host", ["a", "b"], ids=["unix", "tcp"])


def echo(call: ExpertCall) -> Tensor:
    return call.out_MD.copy_(call.rows_ND)


def connect(endpoint: Endpoint, host: str = "a", **options: int) -> tuple[PeerSet, Peer]:
    peers = PeerSet(token=TOKEN, self_host=host, limits=PeerLimits(**options))
    return peers, peers.connect(member(endpoint))


def begin(peers: PeerSet, peer: Peer, num_rows: int = 4, width: int = 16) -> Call:
    """Starts an echo call."""
    rows_ND, body = echo_body(num_rows, width)
    call = peer.begin(len(body), rows_ND.nbytes)
    assert call is not None, "no credit"
    call.body[:] = body
    peers.start(
        call, flags=Flag.PRESUMMED, num_rows=num_rows, num_pairs=num_rows, width=width,
        dtype=Dtype.FLOAT32,
    )  # fmt: skip
    return call


def ask(peers: PeerSet, peer: Peer, num_rows: int = 4, width: int = 16) -> None:
    call = begin(peers, peer, num_rows, width)
    peers.exchange([call], WAIT_S)
    assert bytes(call.reply_body) == echo_body(num_rows, width)[0].numpy().tobytes()
    call.release()


def open_descriptors() -> set[str]:
    links = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.add(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:
            pass  # the directory's own descriptor
    return links


def mapped_arenas() -> int:
    gc.collect()
    return Path("/proc/self/maps").read_text().count("remora-arena")


@pytest.fixture(autouse=True, scope="module")
def quick_collections() -> Iterator[None]:
    """Collect what these tests make, not the half a million objects of torch and numba."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """No descriptor, no mapping, no name in a filesystem survives a test."""
    gc.collect()
    before = (open_descriptors(), mapped_arenas(), sorted(os.listdir("/dev/shm")))
    yield
    gc.collect()
    assert open_descriptors() <= before[0]
    assert mapped_arenas() <= before[1]
    mine = [n for n in os.listdir("/dev/shm") if "remora" in n and n not in before[2]]
    assert mine == []


@HOSTS
def test_small_large_and_beyond_the_region(host: str) -> None:
    """Through the socket, through the arena, and inline again when it fits no region."""
    shard = service(echo, width=16)
    with serve(shard) as (server, _):
        peers, peer = connect(server.endpoint("a"), host, region_bytes=1 << 20)
        for num_rows in (0, 1, 500, 20_000):  # 20,000 x 64 bytes: over a region, and a buffer
            before = peers.counters.link("shard-0").arena_bytes
            ask(peers, peer, num_rows)
            shared = peers.counters.link("shard-0").arena_bytes - before
            assert (shared > 0) == (host == "a" and num_rows == 500)
        peers.close()


def test_a_shard_computes_in_place() -> None:
    """With an arena, input and output are the requester's memory: no copy on the way."""
    seen: queue.Queue[tuple[int, int]] = queue.Queue()

    def compute(call: ExpertCall) -> Tensor:
        seen.put((call.rows_ND.data_ptr() % 64, call.out_MD.data_ptr() % 64))
        return torch.mul(call.rows_ND, 2.0, out=call.out_MD)

    shard = service(compute, width=16)
    with serve(shard) as (server, _):
        peers, peer = connect(server.endpoint("a"), arena_bytes_min=0)
        call = begin(peers, peer, 100)
        peers.exchange([call], WAIT_S)
        rows = torch.frombuffer(call.reply_body, dtype=torch.float32)
        assert torch.equal(rows.view(100, 16), 2 * echo_body(100, 16)[0])
        del rows
        assert seen.get(timeout=WAIT_S) == (0, 0)  # aligned for vector loads
        call.release()
        peers.close()


def test_arena_is_unmapped_when_the_requester_closes() -> None:
    shard = service(echo, width=16)
    before = mapped_arenas()
    with serve(shard) as (server, lost):
        peers, peer = connect(server.endpoint("a"))
        ask(peers, peer)
        assert mapped_arenas() == before + 2  # ours and the shard's view of it
        del peer
        peers.close()
        lost.get(timeout=WAIT_S)
        assert mapped_arenas() == before


@HOSTS
def test_deadline_names_the_peer_and_the_late_answer_is_dropped(host: str) -> None:
    gate = threading.Event()

    def compute(call: ExpertCall) -> Tensor:
        gate.wait(WAIT_S)
        return echo(call)

    shard = service(compute, width=16)
    with serve(shard) as (server, _):
        peers, peer = connect(server.endpoint("a"), host, num_regions=2)
        with pytest.raises(DeadlineError, match=r"shard-0 did not answer within 0.02 s"):
            peers.exchange([begin(peers, peer)], 0.02)
        counters = peers.counters.link("shard-0")
        assert (counters.deadlines, counters.late_replies) == (1, 0)
        second = begin(peers, peer, 7)
        assert peer.begin(8, 8) is None  # the late call's region is not free: it will be written
        gate.set()
        peers.exchange([second], WAIT_S)
        assert bytes(second.reply_body) == echo_body(7, 16)[0].numpy().tobytes()
        assert counters.late_replies == 1
        second.release()
        calls = [begin(peers, peer) for _ in range(2)]  # both credits are back
        peers.exchange(calls, WAIT_S)
        for call in calls:
            call.release()
        peers.close()


def reply(connection: Connection, frame: Frame, **changes: int) -> None:
    header = frame.header
    fields = {"sequence": header.sequence, "incarnation": 1, "num_rows": header.num_rows}
    rows = bytes(frame.body[: header.num_rows * header.width * 4])
    connection.send(Kind.COMBINED, rows, **(fields | changes))


@HOSTS
@pytest.mark.parametrize("case", ["duplicate", "old sequence", "other incarnation", "large"])
def test_answers_to_nothing_are_dropped_and_counted(host: str, case: str) -> None:
    def handler(connection: Connection, frame: Frame) -> None:
        connection.outstanding -= 1
        if case == "duplicate":
            reply(connection, frame)
        elif case == "old sequence":
            reply(connection, frame, sequence=10**9)
        elif case == "other incarnation":
            reply(connection, frame, incarnation=2)
        else:  # too large for the receive buffer: skipped, not stored
            connection.send(Kind.COMBINED, bytes(3 << 20), sequence=10**9, incarnation=1)
        reply(connection, frame)

    with serving(handler) as (server, _):
        peers, peer = connect(server.endpoint("a"), host)
        ask(peers, peer)
        ask(peers, peer)
        ask(peers, peer)
        assert peers.counters.link("shard-0").stale_replies in (2, 3)  # the last may be unread
        peers.close()


@HOSTS
@pytest.mark.parametrize("case", ["too long", "no answer kind", "region", "garbage"])
def test_answers_that_cannot_be_end_the_connection(host: str, case: str) -> None:
    def handler(connection: Connection, frame: Frame) -> None:
        fields = {"sequence": frame.header.sequence, "incarnation": 1}
        if case == "too long":
            connection.send(Kind.COMBINED, bytes(1 << 19), **fields)
        elif case == "no answer kind":
            connection.send(Kind.DISPATCH, **fields)
        elif case == "region":
            fields |= {"region": 3, "reply_offset": 64}
            connection.send(Kind.COMBINED, flags=int(Flag.ARENA), **fields)
        else:
            connection.transmit(b"garbage " * 20, 0, 0)

    with serving(handler) as (server, _):
        peers, peer = connect(server.endpoint("a"), host)
        with pytest.raises(PeerLostError, match=r"shard-0 .*: no frame: "):
            peers.exchange([begin(peers, peer)], WAIT_S)
        with pytest.raises(PeerLostError):
            peer.begin(1, 1)
        assert peers.live_uids == [] and peers.counters.link("shard-0").losses == 1
        peers.close()


def test_errors_come_back_with_their_text(caplog: pytest.LogCaptureFixture) -> None:
    def compute(call: ExpertCall) -> Tensor:
        raise RuntimeError(f"layer {call.layer} is broken")

    shard = service(compute, width=16)
    with serve(shard) as (server, _):
        peers, peer = connect(server.endpoint("a"))
        with pytest.raises(ClusterError, match="shard-0: RuntimeError: layer 0 is broken"):
            peers.exchange([begin(peers, peer)], WAIT_S)
        assert peers.live_uids == ["shard-0"]  # the connection is fine
        peers.close()


def test_a_call_whose_pairs_point_nowhere_is_refused() -> None:
    shard = service(echo, width=16)
    with serve(shard) as (server, _):
        peers, peer = connect(server.endpoint("a"))
        _, body = echo_body(4, 16)
        for bad_row in (4, -1):
            call = peer.begin(len(body), 4 * 64)
            assert call is not None
            call.body[:] = body
            call.body[256:260] = bad_row.to_bytes(4, "little", signed=True)
            peers.start(call, num_rows=4, num_pairs=4, width=16, dtype=Dtype.FLOAT32)
            with pytest.raises(ClusterError, match="pair rows"):
                peers.exchange([call], WAIT_S)
        call = peer.begin(len(body), 4 * 64)
        assert call is not None
        peers.start(call, num_rows=5, num_pairs=4, width=16, dtype=Dtype.FLOAT32)
        with pytest.raises(ClusterError, match="the body has"):
            peers.exchange([call], WAIT_S)
        peers.close()


def test_not_mine_is_an_answer() -> None:
    def compute(call: ExpertCall) -> Tensor:
        raise NotMineError([3, 5])

    shard = service(compute, width=16)
    with serve(shard) as (server, _):
        peers, peer = connect(server.endpoint("a"))
        [call] = peers.exchange([begin(peers, peer)], WAIT_S)
        assert call.reply is not None and call.reply.kind == Kind.NOT_MINE
        assert bytes(call.reply_body) == b"\x03\0\0\0\x05\0\0\0"
        call.release()
        peers.close()


def test_views_are_applied_by_difference() -> None:
    shard = service(toy_compute)
    placement = Placement(num_experts=1, moe_layers=(0,), slots={})
    with serve(shard) as (server, lost):
        endpoint = server.endpoint("a")
        dead = Endpoint(host="z", tcp_address="127.0.0.1:1")
        first = View(
            epoch=1,
            members=(member(endpoint, "x"), member(endpoint, "y"), member(dead, "dead")),
            placement=placement,
        )
        second = View(epoch=2, members=first.members[1:2], placement=placement)
        peers = PeerSet(token=TOKEN, self_host="a")
        assert list(peers.apply_view(first)) == ["dead"]
        kept = peers.peer("y")
        assert peers.live_uids == ["x", "y"] and peers.apply_view(second) == {}
        assert peers.live_uids == ["y"] and peers.peer("y") is kept
        lost.get(timeout=WAIT_S)
        with pytest.raises(PeerLostError, match="not connected to x"):
            peers.peer("x")
        peers.close()
        del kept


CHILD = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch
from support.comm_rig import TOKEN, echo_body, member
from remora.comm.server import FrameServer
from remora.comm.peers import PeerSet
from remora.comm.view import Endpoint
from remora.comm.wire import HEADER_BYTES, Flag, Kind, encode_frame

def die_in_the_middle(connection, frame):
    answer = encode_frame(bytes(1 << 20), kind=Kind.COMBINED, incarnation=1,
                          sequence=frame.header.sequence)
    connection.sock.setblocking(True)
    connection.sock.sendall(answer[: HEADER_BYTES + 5000])
    os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[1] == "server":
    server = FrameServer(host_ip="127.0.0.1", token=TOKEN, on_frame=die_in_the_middle)
    endpoint = server.endpoint("a")
    print(endpoint.tcp_address, endpoint.unix_path, flush=True)
    server.run()
else:
    peers = PeerSet(token=TOKEN, self_host="a")
    peer = peers.connect(member(Endpoint(host="a", tcp_address="-", unix_path=sys.argv[1])))
    call = peer.begin(1 << 20, 1 << 20)
    peers.start(call, num_rows=1)
    print("sent", flush=True)
    peers.exchange([call], 60.0)
"""


def child(*arguments: str) -> "subprocess.Popen[str]":
    code = CHILD.format(tests=str(Path(__file__).parents[1]))
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True, cwd="/"
    )


def test_a_server_killed_in_the_middle_of_its_answer() -> None:
    for host in "ab":
        with child("server") as process:
            assert process.stdout is not None
            tcp, unix = process.stdout.readline().split()
            peers, peer = connect(Endpoint(host="a", tcp_address=tcp, unix_path=unix), host)
            call = begin(peers, peer, num_rows=1 << 14)
            with pytest.raises(PeerLostError, match=r"shard-0 .*(closed|reset)"):
                peers.exchange([call], WAIT_S)
            assert process.wait(WAIT_S) == -signal.SIGKILL
            with pytest.raises(PeerLostError):
                peers.connect(member(Endpoint(host="a", tcp_address=tcp, unix_path=unix)))
            peers.close()
            del call, peer


def test_a_requester_killed_while_its_call_is_computed() -> None:
    """The shard notices, answers nobody, and the arena vanishes with its last mapping."""
    frames: queue.Queue[int] = queue.Queue()

    def handler(connection: Connection, frame: Frame) -> None:
        frames.put(frame.header.length)
        assert mapped_arenas() > before

    before = mapped_arenas()
    with serving(handler) as (server, lost):
        assert isinstance(server, FrameServer)
        with child(str(server.endpoint("a").unix_path)) as process:
            assert frames.get(timeout=WAIT_S) == 1 << 20
            process.send_signal(signal.SIGKILL)
            process.wait(WAIT_S)
        connection = lost.get(timeout=WAIT_S)
        assert not connection.send_control(b"anybody?")
        assert mapped_arenas() == before
