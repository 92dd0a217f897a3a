"""The handshake: mutual, bounded, bound to its transcript, and first of all."""

import hmac
import queue
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.comm_rig import TOKEN, WAIT_S, at_end, member, raw_socket, serving

from remora.comm.auth import (
    CHALLENGE_BYTES,
    HELLO_BYTES,
    VERDICT_BYTES,
    ClientHandshake,
    ServerHandshake,
)
from remora.comm.errors import AuthError, FencedError, PeerLostError
from remora.comm.peers import PeerSet
from remora.comm.server import FrameServer, ServerLimits
from remora.comm.transport import listen_tcp, listen_unix, receive_exactly
from remora.comm.view import Endpoint
from remora.comm.wire import Kind, encode_frame

OTHER = b"another token, of the same bytes"


def server_side(token: bytes = TOKEN) -> ServerHandshake:
    return ServerHandshake(
        token,
        allow_arena=True,
        num_regions_max=4,
        region_bytes_max=1 << 20,
        frame_bytes_max=1 << 24,
        incarnation=7,
    )


def refuse(*_: object) -> None:
    raise AssertionError("a frame reached the handler")


def test_both_sides_agree_on_the_lesser() -> None:
    client = ClientHandshake(TOKEN, name="dense-0", arena=True, num_regions=9, region_bytes=1 << 30)
    server = server_side()
    grants = client.on_verdict(server.feed(client.on_challenge(server.feed(client.hello))))
    assert server.accepted and server.grants == grants and server.peer_name == "dense-0"
    assert (grants.num_regions, grants.region_bytes, grants.incarnation) == (4, 1 << 20, 7)
    assert grants.arena and grants.frame_bytes_max == 1 << 24


def test_wrong_client_token_gets_nothing_keyed() -> None:
    client, server = ClientHandshake(OTHER), server_side()
    verdict = server.feed(client.on_challenge(server.feed(client.hello)))
    assert not server.accepted and verdict == bytes(VERDICT_BYTES)
    with pytest.raises(AuthError, match="tokens differ"):
        client.on_verdict(verdict)


def test_a_server_without_the_token_cannot_say_yes() -> None:
    client, server = ClientHandshake(TOKEN), server_side(OTHER)
    proof = client.on_challenge(server.feed(client.hello))
    server.feed(proof)
    for forged in (
        b"\x01" + bytes(32),
        b"\x01" + proof,
        b"\x01" + hmac.digest(OTHER, b"", "sha256"),
    ):
        with pytest.raises(AuthError, match="could not prove"):
            client.on_verdict(forged)


def test_reflection_and_replay_fail() -> None:
    """Our own proof sent back is no server proof, and an old proof is none in a new handshake."""
    client, server = ClientHandshake(TOKEN), server_side()
    challenge = server.feed(client.hello)
    proof = client.on_challenge(challenge)
    with pytest.raises(AuthError):
        client.on_verdict(b"\x01" + proof)
    again = server_side()
    again.feed(client.hello)
    again.feed(proof)
    assert not again.accepted


@given(st.integers(0, 8 * CHALLENGE_BYTES - 1))
def test_a_changed_challenge_fails(bit: int) -> None:
    """What is granted (arena, bounds, incarnation) is under the proofs."""
    client = ClientHandshake(TOKEN, arena=True, num_regions=4, region_bytes=1 << 20)
    server = server_side()
    challenge = bytearray(server.feed(client.hello))
    challenge[bit // 8] ^= 1 << bit % 8
    with pytest.raises(AuthError):
        client.on_verdict(server.feed(client.on_challenge(bytes(challenge))))


def test_short_token_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 16"):
        ClientHandshake(b"short")


@pytest.mark.parametrize("host", ["a", "b"])
def test_wrong_token_over_sockets(host: str) -> None:
    with serving(refuse) as (server, lost):
        peers = PeerSet(token=OTHER, self_host=host)
        with pytest.raises(AuthError, match="tokens differ"):
            peers.connect(member(server.endpoint("a")))
        peers.close()
        assert not server.connections and lost.empty()


@pytest.mark.parametrize("unix", [True, False])
def test_impostor_server(unix: bool) -> None:
    """A listener without the token is found out before anything but the hello and proof is sent."""
    listener, path = listen_unix() if unix else (listen_tcp("127.0.0.1"), None)
    listener.setblocking(True)
    heard: queue.Queue[bytes] = queue.Queue()

    def impostor() -> None:
        sock, _ = listener.accept()
        server = server_side(OTHER)
        with sock:
            sock.sendall(server.feed(receive_exactly(sock, HELLO_BYTES)))
            server.feed(receive_exactly(sock, 32))
            sock.sendall(b"\x01" + bytes(32))
            heard.put(sock.recv(1))

    thread = threading.Thread(target=impostor)
    thread.start()
    port = 1 if unix else listener.getsockname()[1]
    endpoint = Endpoint(host="a", tcp_address=f"127.0.0.1:{port}", unix_path=path)
    peers = PeerSet(token=TOKEN, self_host="a")
    with pytest.raises(AuthError, match="could not prove"):
        peers.connect(member(endpoint))
    assert heard.get(timeout=WAIT_S) == b""  # no arena, no frame
    thread.join()
    listener.close()
    peers.close()


@pytest.mark.parametrize("unix", [True, False])
@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 4,
        bytes(HELLO_BYTES),
        encode_frame(b"x" * 100, kind=Kind.CONTROL),
    ],
    ids=["http", "zeros", "frame"],
)
def test_garbage_before_the_handshake_is_never_parsed(unix: bool, data: bytes) -> None:
    with serving(refuse) as (server, lost):
        sock = raw_socket(server.endpoint("a"), unix=unix)
        with sock:
            sock.sendall(data)
            assert at_end(sock)
        assert lost.empty()


def test_a_silent_peer_is_closed_in_time() -> None:
    with serving(refuse, limits=ServerLimits(handshake_s=0.05)) as (server, _):
        with raw_socket(server.endpoint("a"), unix=False) as sock:
            sock.sendall(b"REM")  # a trickle does not buy time
            assert at_end(sock)


def test_pending_handshakes_are_bounded_and_the_oldest_goes() -> None:
    with serving(refuse, limits=ServerLimits(handshakes_max=3)) as (server, _):
        socks = [raw_socket(server.endpoint("a"), unix=True) for _ in range(4)]
        assert at_end(socks[0])
        peers = PeerSet(token=TOKEN, self_host="a")
        peers.connect(member(server.endpoint("a")))  # a flood does not keep an honest peer out
        peers.close()
        for sock in socks:
            sock.close()


def test_connections_are_bounded() -> None:
    with serving(refuse, limits=ServerLimits(connections_max=1)) as (server, _):
        peers = PeerSet(token=TOKEN, self_host="a")
        peers.connect(member(server.endpoint("a"), "shard-0"))
        with pytest.raises(PeerLostError):
            peers.connect(member(server.endpoint("a"), "shard-1"))
        peers.close()


def test_another_incarnation_is_fenced_at_connect() -> None:
    with serving(refuse, incarnation=8) as (server, _):
        peers = PeerSet(token=TOKEN, self_host="a")
        with pytest.raises(FencedError, match="incarnation 8, the view says 7"):
            peers.connect(member(server.endpoint("a"), incarnation=7))
        peers.close()


def test_a_fenced_name_is_told_so_in_the_handshake_and_let_in_again() -> None:
    """It must not believe that it is connected: every frame would be lost."""

    def fence(*names: str) -> None:
        done = threading.Event()
        server.call_soon(lambda: server.fence(frozenset(names)))
        server.call_soon(done.set)
        assert done.wait(WAIT_S)

    with serving(refuse) as (server, _):
        peers = PeerSet(token=TOKEN, self_host="a", name="dense-0")
        other = PeerSet(token=TOKEN, self_host="a", name="dense-1")
        fence("dense-0")
        with pytest.raises(FencedError, match="it is fenced"):
            peers.connect(member(server.endpoint("a")))
        other.connect(member(server.endpoint("a")))
        fence()
        peers.connect(member(server.endpoint("a")))
        peers.close()
        other.close()


def test_wildcard_needs_an_address_to_publish() -> None:
    with pytest.raises(ValueError, match="advertise_ip"):
        FrameServer(host_ip="0.0.0.0", token=TOKEN, on_frame=refuse)
    server = FrameServer(host_ip="0.0.0.0", advertise_ip="10.0.0.9", token=TOKEN, on_frame=refuse)
    assert server.endpoint("a").tcp_address.startswith("10.0.0.9:")
    server.close()
