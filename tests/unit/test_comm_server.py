"""`FrameServer`: what comes after the handshake, over Unix sockets and TCP alike."""

import logging
import os
import queue
import socket
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.comm_rig import TOKEN, WAIT_S, at_end, echo_body, member, raw_socket, serving

from remora.comm.auth import ATTACH, CHALLENGE_BYTES, VERDICT_BYTES, ClientHandshake
from remora.comm.connection import Connection, Frame
from remora.comm.errors import FrameError, PeerLostError
from remora.comm.native_pump import SKIPS_MAX
from remora.comm.peer import Peer, PeerLimits
from remora.comm.peers import PeerSet
from remora.comm.server import FrameServer, ServerLimits
from remora.comm.transport import receive_exactly
from remora.comm.wire import (
    HEADER_BYTES,
    Dtype,
    Flag,
    Kind,
    decode_header,
    encode_frame,
    pack_header,
)

HOSTS = pytest.mark.parametrize("host", ["a", "b"], ids=["unix", "tcp"])


def echo(connection: Connection, frame: Frame) -> None:
    """Answers DISPATCH with its rows, inline."""
    header = frame.header
    rows = bytes(frame.body[: header.num_rows * header.width * 4])
    connection.outstanding -= 1
    connection.send(
        Kind.COMBINED,
        rows,
        num_rows=header.num_rows,
        sequence=header.sequence,
        incarnation=header.incarnation,
    )


def connect(server: FrameServer, host: str, **options: int) -> tuple[PeerSet, Peer]:
    peers = PeerSet(token=TOKEN, self_host=host, limits=PeerLimits(**options))
    return peers, peers.connect(member(server.endpoint("a")))


def ask(peers: PeerSet, peer: Peer, num_rows: int = 3, width: int = 8) -> None:
    """One echo call, checked."""
    rows_ND, body = echo_body(num_rows, width)
    call = peer.begin(len(body), rows_ND.nbytes)
    assert call is not None
    call.body[:] = body
    peers.start(call, num_rows=num_rows, num_pairs=num_rows, width=width, dtype=Dtype.FLOAT32)
    peers.exchange([call], WAIT_S)
    assert bytes(call.reply_body) == rows_ND.numpy().tobytes()
    call.release()


def only_connection(server: FrameServer) -> Connection:
    """The server's end of what `authenticated` returned; asked behind its handshake."""
    found: queue.Queue[list[Connection]] = queue.Queue()
    server.call_soon(lambda: found.put(server.connections))
    [connection] = found.get(timeout=WAIT_S)
    return connection


def authenticated(server: FrameServer, *, unix: bool = True, arena: bool = False) -> socket.socket:
    """A blocking socket past the verdict (the arena is not sent)."""
    sock = raw_socket(server.endpoint("a"), unix=unix)
    handshake = ClientHandshake(TOKEN, arena=arena, num_regions=2, region_bytes=1 << 16)
    sock.sendall(handshake.hello)
    sock.sendall(handshake.on_challenge(receive_exactly(sock, CHALLENGE_BYTES)))
    handshake.on_verdict(receive_exactly(sock, VERDICT_BYTES))
    return sock


def receive_frame(sock: socket.socket) -> tuple[int, bytes]:
    header = decode_header(memoryview(receive_exactly(sock, HEADER_BYTES)))
    return header.kind, receive_exactly(sock, header.inline_bytes)


@HOSTS
def test_unix_on_the_same_host_and_tcp_elsewhere(host: str) -> None:
    """The label decides, not what the filesystem would allow."""
    with serving(echo) as (server, _):
        peers, peer = connect(server, host)
        assert (peer.sock.family == socket.AF_UNIX) == (host == "a") == peer.grants.arena
        for num_rows in (0, 1, 100, 5000):
            ask(peers, peer, num_rows)
        peers.close()


@HOSTS
@settings(max_examples=30)
@given(data=st.binary(min_size=1, max_size=300))
def test_garbage_after_the_handshake_closes_that_connection_only(host: str, data: bytes) -> None:
    with serving(echo) as (server, lost):
        peers, honest = connect(server, host)
        with authenticated(server, unix=host == "a") as sock:
            sock.sendall(b"\xff" + data + bytes(HEADER_BYTES))
            assert at_end(sock)
        assert "magic" in str(lost.get(timeout=WAIT_S).close_reason)
        ask(peers, honest)
        peers.close()


@HOSTS
def test_oversize_is_refused_before_it_is_stored(host: str) -> None:
    with serving(echo, limits=ServerLimits(frame_bytes_max=1 << 16)) as (server, lost):
        with authenticated(server, unix=host == "a") as sock:
            head = bytearray(HEADER_BYTES)
            pack_header(head, 0, kind=Kind.CONTROL, length=1 << 16)
            sock.sendall(head)
            assert at_end(sock)
        assert "allowed are 65536" in str(lost.get(timeout=WAIT_S).close_reason)
        peers, peer = connect(server, host)
        with pytest.raises(FrameError, match="allowed are 65536"):
            peer.begin(1 << 16, 0)
        peers.close()


def test_a_slow_reader_is_closed_and_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    limits = ServerLimits(queue_bytes_max=4 << 20)
    caplog.set_level(logging.INFO)
    with serving(echo, limits=limits) as (server, lost):
        with authenticated(server) as sock:  # reads nothing
            slow = only_connection(server)
            sent = 0
            while slow.send_control(bytes(1 << 20)):  # never blocks
                sent += 1
                assert sent < 50
            assert lost.get(timeout=WAIT_S) is slow
            assert "slow peer" in str(slow.close_reason) and "slow peer" in caplog.text
            assert not slow.send_control(b"") and slow.queued_bytes == 0
            assert at_end(sock)
        peers, peer = connect(server, "a")
        ask(peers, peer)
        peers.close()


@HOSTS
def test_a_reader_that_catches_up_gets_everything_in_order(host: str) -> None:
    with serving(echo) as (server, lost):
        with authenticated(server, unix=host == "a") as sock:
            connection = only_connection(server)
            payloads = [bytes([i]) * (300_000 + i) for i in range(40)]
            assert all(connection.send_control(p) for p in payloads)
            assert connection.queued_bytes > 0
            for payload in payloads:
                assert receive_frame(sock) == (Kind.CONTROL, payload)
        lost.get(timeout=WAIT_S)


@HOSTS
def test_sends_from_many_threads_are_whole_and_numbered(host: str) -> None:
    with serving(echo) as (server, _):
        with authenticated(server, unix=host == "a") as sock:
            connection = only_connection(server)

            def send(thread: int) -> None:
                for i in range(100):
                    assert connection.send_control(bytes([thread]) * (1 + 997 * i))

            threads = [threading.Thread(target=send, args=(n,)) for n in range(4)]
            for thread in threads:
                thread.start()
            seen: dict[int, int] = {n: 0 for n in range(4)}
            for sequence in range(1, 401):
                header = decode_header(memoryview(receive_exactly(sock, HEADER_BYTES)))
                body = receive_exactly(sock, header.length)
                assert header.sequence == sequence and set(body) == {body[0]}
                assert len(body) == 1 + 997 * seen[body[0]]  # each thread's own order
                seen[body[0]] += 1
            for thread in threads:
                thread.join()
            assert set(seen.values()) == {100}


def test_several_requesters_on_one_server() -> None:
    errors: queue.Queue[BaseException] = queue.Queue()
    with serving(echo) as (server, _):

        def request(host: str, seed: int) -> None:
            try:
                peers, peer = connect(server, host)
                for i in range(60):
                    ask(peers, peer, (seed * 31 + i * 7) % 90, width=1 + seed)
                peers.close()
            except BaseException as error:
                errors.put(error)
                raise

        threads = [threading.Thread(target=request, args=("ab"[n % 2], n)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert errors.empty()


def test_small_frames_go_first_and_large_ones_do_not_starve() -> None:
    handled: list[int] = []

    def note(connection: Connection, frame: Frame) -> None:
        handled.append(frame.header.num_rows)
        if len(handled) == SKIPS_MAX + 3:
            all_handled.set()

    gate, all_handled = threading.Event(), threading.Event()
    with serving(note) as (server, _):
        socks = [authenticated(server) for _ in range(2)]
        server.call_soon(gate.wait)  # both speak before the loop looks
        fields = {"kind": int(Kind.ERROR)}
        socks[0].sendall(encode_frame(num_rows=900, **fields))
        socks[1].sendall(b"".join(encode_frame(num_rows=1, **fields) for _ in range(SKIPS_MAX + 2)))
        gate.set()
        assert all_handled.wait(WAIT_S)
        for sock in socks:
            sock.close()
    assert handled == [1] * SKIPS_MAX + [900, 1, 1]


def test_fenced_error_names_the_incarnation() -> None:
    with serving(echo, incarnation=3) as (server, _), authenticated(server) as sock:
        sock.sendall(encode_frame(kind=Kind.CONTROL, sequence=1, incarnation=2))
        kind, body = receive_frame(sock)
        assert kind == Kind.ERROR and body == b"this is incarnation 3"


def test_control_frames_may_not_be_lost_and_duplicates_are_dropped() -> None:
    heard: queue.Queue[bytes] = queue.Queue()
    with serving(lambda c, f: heard.put(bytes(f.body))) as (server, lost):
        with authenticated(server) as sock:
            first = encode_frame(b"1", kind=Kind.CONTROL, sequence=1)
            sock.sendall(first + first + encode_frame(b"2", kind=Kind.CONTROL, sequence=2))
            assert [heard.get(timeout=WAIT_S), heard.get(timeout=WAIT_S)] == [b"1", b"2"]
            sock.sendall(encode_frame(b"4", kind=Kind.CONTROL, sequence=4))
            assert at_end(sock)
        connection = lost.get(timeout=WAIT_S)
        assert connection.close_reason == "control frame 4 follows 2"
        assert connection.counters.stale_replies == 1 and heard.empty()


def test_ping_is_answered_by_the_transport() -> None:
    with serving(echo) as (server, _), authenticated(server) as sock:
        sock.sendall(encode_frame(b"are you there", kind=Kind.PING, sequence=5))
        assert receive_frame(sock) == (Kind.PONG, b"are you there")


def test_credits_are_enforced() -> None:
    """A requester of ours cannot go over its credits; one that does is closed."""
    with serving(lambda c, f: None) as (server, lost):
        peers, peer = connect(server, "a", num_regions=2)
        assert [peer.begin(8, 8) is None for _ in range(3)] == [False, False, True]
        peer.sock.sendall(
            b"".join(encode_frame(kind=Kind.DISPATCH, sequence=i) for i in (1, 1, 2, 3))
        )
        connection = lost.get(timeout=WAIT_S)
        assert connection.outstanding == 2 and connection.counters.stale_replies == 1
        assert connection.close_reason == "2 calls under way: credits used up"
        peers.close()


def test_a_failing_handler_costs_its_connection_only(caplog: pytest.LogCaptureFixture) -> None:
    def handler(connection: Connection, frame: Frame) -> None:
        if frame.header.kind == Kind.CONTROL:
            raise RuntimeError("a bug")
        echo(connection, frame)

    with serving(handler) as (server, lost):
        peers, peer = connect(server, "a")
        with authenticated(server) as sock:
            sock.sendall(encode_frame(kind=Kind.CONTROL, sequence=1))
            assert at_end(sock)
        assert lost.get(timeout=WAIT_S).close_reason == "the handler failed"
        assert "RuntimeError: a bug" in caplog.text
        ask(peers, peer)
        peers.close()


@pytest.mark.parametrize("case", ["unsealed", "short", "pipe", "none", "wrong words"])
def test_an_arena_that_was_not_agreed_is_refused(case: str) -> None:
    """An unsealed memfd could be truncated under the shard's feet: SIGBUS."""
    with serving(echo) as (server, lost):
        with authenticated(server, arena=True) as sock:
            descriptors = list(os.pipe()) if case == "pipe" else [os.memfd_create("x")]
            if case == "unsealed":
                os.ftruncate(descriptors[0], 2 << 16)
            if case in ("none", "wrong words"):
                sock.sendall(ATTACH if case == "none" else b"12345678")
            else:
                socket.send_fds(sock, [ATTACH], descriptors)
            for descriptor in descriptors:
                os.close(descriptor)
            assert at_end(sock)
        assert not server.connections and lost.empty()


@pytest.mark.parametrize(
    "fields",
    [
        {"region": 4},
        {"length": 1 << 20},
        {"reply_offset": (1 << 20) + 64},
        {"reply_offset": 65},
    ],
    ids=str,
)
def test_frames_may_not_point_outside_the_arena(fields: dict[str, int]) -> None:
    with serving(echo) as (server, lost):
        peers, peer = connect(server, "a", region_bytes=1 << 20)
        head = bytearray(HEADER_BYTES)
        pack_header(head, 0, **({"kind": int(Kind.DISPATCH), "flags": int(Flag.ARENA)} | fields))
        peer.sock.sendall(head)
        assert "the arena has 4 regions" in str(lost.get(timeout=WAIT_S).close_reason)
        peers.close()


def test_an_arena_frame_without_an_arena() -> None:
    with serving(echo) as (server, lost), authenticated(server) as sock:
        sock.sendall(encode_frame(kind=Kind.DISPATCH, flags=int(Flag.ARENA)))
        assert "this connection has none" in str(lost.get(timeout=WAIT_S).close_reason)


def test_run_in_the_callers_thread_and_stop_from_another() -> None:
    server = FrameServer(host_ip="127.0.0.1", token=TOKEN, on_frame=echo)
    server.call_soon(server.stop)
    server.run()
    server.close()
    server.close()
    with pytest.raises(PeerLostError):
        connect(server, "a")
