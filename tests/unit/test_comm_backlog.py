"""A requester that reads slower than its shard computes: its calls wait, it is not cut off."""

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from support.comm_rig import (
    TOKEN,
    WAIT_S,
    as_native,
    at_home,
    everywhere,
    member,
    random_batch,
    serve,
    toy_compute,
)
from support.pump_rig import WIDTH, ask, connected, frame, raw, receive, rows_of
from torch import Tensor

from remora.comm import native, server, turns
from remora.comm.connection import Connection
from remora.comm.dispatch import Dispatcher
from remora.comm.expert_protocol import ExpertCall, ExpertService
from remora.comm.peers import PeerSet
from remora.comm.server import ServerLimits
from remora.comm.transport import receive_exactly
from remora.comm.view import View
from remora.comm.wire import (
    ERROR_TEXT_BYTES_MAX,
    HEADER_BYTES,
    Dtype,
    Flag,
    Kind,
    answer_bytes_max,
    decode_header,
    encode_frame,
)

BUILT = pytest.mark.skipif(native.native_extension() is None, reason="not built")
PUMPED = pytest.mark.parametrize(
    "pumped", [pytest.param(True, marks=BUILT), False], ids=["native", "python"]
)
HOSTS = pytest.mark.parametrize("unix", [True, False], ids=["unix", "tcp"])
SEND_BYTES = 64 << 10  # that a socket of these servers takes at once, about
NUM_ROWS = 2000  # of a call that waits: 125 KiB back
ANSWER_BYTES = HEADER_BYTES + 4 * WIDTH * NUM_ROWS
LIMITS = ServerLimits(queue_bytes_max=5 * ANSWER_BYTES // 2)
NUM_CALLS = 60  # more than socket buffers and queue have room for


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a link to another host takes at once is little beside an answer."""
    tune = server.tune

    def narrowed(sock: socket.socket) -> None:
        tune(sock)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)

    monkeypatch.setattr(server, "tune", narrowed)


class Clock:
    """The server's; stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = time.monotonic()

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(server, "time", clock)
    monkeypatch.setattr(turns, "time", clock)
    return clock


class Slow:
    """A shard, and a requester that has sent `NUM_CALLS` and read nothing: one of them is held.

    Attributes:
        computed: rows of each call, in order.
        queued: bytes that waited for the requester, at each call.
        entered, gate: a call of two rows sets the one and waits for the other.
    """

    def __init__(self) -> None:
        self.computed: list[int] = []
        self.queued: list[int] = []
        self.entered, self.gate = threading.Event(), threading.Event()
        self.lost: queue.Queue[Connection]
        self.far: Connection
        self.sock: socket.socket
        self.sender: threading.Thread
        self.server: server.FrameServer

    def compute(self, call: ExpertCall) -> Tensor:
        num_rows = call.rows_ND.shape[0]
        self.computed.append(num_rows)
        self.queued += [c.queued_bytes for c in self.server.connections]
        if num_rows == 2:
            self.entered.set()
            assert self.gate.wait(WAIT_S)
        return call.out_MD.copy_(call.rows_ND)


@contextlib.contextmanager
def slow(pumped: bool, unix: bool = False) -> Iterator[Slow]:
    it = Slow()
    kernel = as_native(it.compute, width=WIDTH) if pumped else None
    shard = ExpertService(it.compute, incarnation=1, native=kernel)
    with serve(shard, limits=LIMITS) as (it.server, it.lost), raw(it.server, unix=unix) as it.sock:
        calls = b"".join(frame(s, NUM_ROWS) for s in range(1, NUM_CALLS + 1))

        def send() -> None:
            with contextlib.suppress(OSError):
                it.sock.sendall(calls)

        it.sender = threading.Thread(target=send)
        it.sender.start()
        with connected(it.server.endpoint("a"), "b") as peers:
            while max(it.queued, default=0) + 2 * ANSWER_BYTES <= LIMITS.queue_bytes_max:
                ask(peers, 1)
            for _ in range(2 * NUM_CALLS):  # a call that is not held goes ahead of some of these
                ask(peers, 1)
            [it.far] = [c for c in it.server.connections if c.queued_bytes]
        yield it
        it.server.close()
        it.sender.join()


def others_are_served(it: Slow) -> None:
    with connected(it.server.endpoint("a")) as peers:
        for _ in range(10):
            assert ask(peers, 3) == rows_of(3)


def wait_for_loss(it: Slow) -> None:
    while it.lost.get(timeout=WAIT_S) is not it.far:
        pass  # others have what they wanted


@PUMPED
def test_several_slices_to_one_shard_in_ordered_combine(pumped: bool) -> None:
    """Four credits, four answers of 512 KiB, room for one and a bit: all of them arrive."""
    queued: list[int] = []

    def compute(call: ExpertCall) -> Tensor:
        queued.extend(c.queued_bytes for c in far.connections)
        return toy_compute(call)

    shard = ExpertService(compute, incarnation=1, native=as_native(compute) if pumped else None)
    limits = ServerLimits(queue_bytes_max=600 << 10)
    with serve(shard, limits=limits) as (far, _):
        view = View(epoch=1, members=(member(far.endpoint("b")),), placement=everywhere("shard-0"))
        peers = PeerSet(token=TOKEN, self_host="a")
        dispatcher = Dispatcher(view=view, peers=peers, combine="ordered")
        batch = random_batch(2048)
        for _ in range(3):
            got = dispatcher.moe(0, *batch, 2048)
            assert torch.equal(got, at_home(*batch, 2048, 0))
        assert peers.counters.link("shard-0").losses == 0
        peers.close()
    assert len(queued) == 12 and max(queued) <= limits.queue_bytes_max


@PUMPED
@HOSTS
def test_calls_are_held_while_answers_are_not_read(pumped: bool, unix: bool) -> None:
    """Memory is bounded, others are served, and whoever reads at last gets everything in order."""
    with slow(pumped, unix) as it:
        held_at = it.computed.count(NUM_ROWS)
        others_are_served(it)
        assert it.computed.count(NUM_ROWS) == held_at < NUM_CALLS
        for s in range(1, NUM_CALLS + 1):
            assert receive(it.sock) == (Kind.COMBINED, s, NUM_ROWS, rows_of(NUM_ROWS))
        assert ANSWER_BYTES < max(it.queued) <= LIMITS.queue_bytes_max
        it.sock.sendall(frame(NUM_CALLS + 1) + encode_frame(b"?", kind=Kind.PING))
        assert [receive(it.sock)[0] for _ in range(2)] == [Kind.COMBINED, Kind.PONG]


@PUMPED
@HOSTS
def test_who_never_reads_is_dropped(pumped: bool, unix: bool, clock: Clock) -> None:
    with slow(pumped, unix) as it:
        clock.now += LIMITS.stall_s - 1
        others_are_served(it)
        assert it.far.close_reason is None
        until = time.monotonic() + WAIT_S
        while it.far.close_reason is None and time.monotonic() < until:
            clock.now += LIMITS.stall_s  # again: its kernel may take some bytes late
            others_are_served(it)
        wait_for_loss(it)
        assert "slow peer: took none of" in str(it.far.close_reason)
        assert it.far.queued_bytes == 0


@PUMPED
def test_time_begins_anew_with_every_byte_taken(pumped: bool, clock: Clock) -> None:
    """Also when the shard was too busy to see that the socket takes some."""
    with slow(pumped) as it, raw(it.server, unix=False) as other:
        other.sendall(frame(1, 2))
        assert it.entered.wait(WAIT_S)
        data = receive_exactly(it.sock, it.far.counters.sent_bytes - it.far.queued_bytes)
        clock.now += LIMITS.stall_s + 1
        it.gate.set()
        assert receive(other)[0] == Kind.COMBINED
        data += receive_exactly(it.sock, NUM_CALLS * ANSWER_BYTES - len(data))
        heads = [decode_header(memoryview(data), i * ANSWER_BYTES) for i in range(NUM_CALLS)]
        assert [head.sequence for head in heads] == list(range(1, NUM_CALLS + 1))
        assert it.far.close_reason is None


@PUMPED
@HOSTS
def test_a_requester_that_ends_while_its_call_is_held(pumped: bool, unix: bool) -> None:
    with slow(pumped, unix) as it:
        it.sock.shutdown(socket.SHUT_RDWR)
        it.sender.join()
        it.sock.close()
        wait_for_loss(it)
        others_are_served(it)


@PUMPED
@HOSTS
def test_a_held_call_does_not_keep_the_loop_awake(pumped: bool, unix: bool) -> None:
    used: queue.Queue[float] = queue.Queue()
    with slow(pumped, unix) as it:
        for pause_s in (0.0, 0.2):
            time.sleep(pause_s)
            it.server.call_soon(lambda: used.put(time.thread_time()))
        begun_s, ended_s = used.get(timeout=WAIT_S), used.get(timeout=WAIT_S)
    assert ended_s - begun_s < 0.05


def test_how_large_an_answer_may_be() -> None:
    head = encode_frame(
        kind=Kind.DISPATCH, num_rows=100, num_pairs=250, width=64, dtype=Dtype.BFLOAT16,
        reply_offset=1 << 14,
    )  # fmt: skip
    header = decode_header(memoryview(head))
    assert answer_bytes_max(header, 0) == HEADER_BYTES + 250 * 128
    summed = header._replace(flags=int(Flag.PRESUMMED))
    assert answer_bytes_max(summed, 0) == HEADER_BYTES + 100 * 128
    shared = header._replace(flags=int(Flag.ARENA))
    assert answer_bytes_max(shared, (1 << 14) + 250 * 128) == HEADER_BYTES + ERROR_TEXT_BYTES_MAX
    assert answer_bytes_max(shared, (1 << 14) + 250 * 128 - 1) == HEADER_BYTES + 250 * 128
    narrow = header._replace(num_pairs=9999, width=1)
    assert answer_bytes_max(narrow, 0) == HEADER_BYTES + 4 * 9999  # a NOT_MINE of all
