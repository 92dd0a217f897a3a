"""`AsyncConnection`: the ingress's end."""

import asyncio

import pytest
from support.comm_rig import TOKEN, WAIT_S, serving

from remora.comm.aio import connect_async
from remora.comm.connection import Connection, Frame
from remora.comm.errors import AuthError, FencedError, FrameError, PeerLostError
from remora.comm.faulty import Faults, FaultyLink
from remora.comm.messages import EngineStats as Stats
from remora.comm.messages import Ping, Pong, decode_to_engine, decode_to_ingress, encode
from remora.comm.server import ServerLimits
from remora.comm.view import Endpoint
from remora.comm.wire import Kind

HOSTS = pytest.mark.parametrize("host", ["a", "b"], ids=["unix", "tcp"])


def pong(connection: Connection, frame: Frame) -> None:
    message = decode_to_engine(frame.body)
    assert isinstance(message, Ping)
    connection.send_control(encode(Pong(nonce=message.nonce, stats=Stats())))


@HOSTS
def test_messages_both_ways(host: str) -> None:
    async def talk(endpoint: Endpoint) -> list[int]:
        stream = await connect_async(endpoint, TOKEN, host, name="ingress", incarnation=4)
        for nonce in range(200):
            stream.send(encode(Ping(nonce)))
        nonces: list[int] = []
        async for payload in stream:
            message = decode_to_ingress(payload)
            assert isinstance(message, Pong)
            nonces.append(message.nonce)
            if len(nonces) == 200:
                break
        await stream.close()
        await stream.close()
        with pytest.raises(PeerLostError):
            stream.send(b"")
        return nonces

    with serving(pong, incarnation=4) as (server, lost):
        assert asyncio.run(talk(server.endpoint("a"))) == list(range(200))
        assert lost.get(timeout=WAIT_S).peer_name == "ingress"


@HOSTS
def test_large_payloads_and_the_bound(host: str) -> None:
    async def talk(endpoint: Endpoint) -> None:
        stream = await connect_async(endpoint, TOKEN, host)
        stream.send(b"x" * 3_000_000)
        async for payload in stream:
            assert payload == b"x" * 3_000_000
            break
        with pytest.raises(FrameError, match="allowed are"):
            stream.send(bytes(4 << 20))
        await stream.close()

    def echo(connection: Connection, frame: Frame) -> None:
        connection.send_control(bytes(frame.body))

    with serving(echo, limits=ServerLimits(frame_bytes_max=4 << 20)) as (server, _):
        asyncio.run(talk(server.endpoint("a")))


def test_connecting_fails_with_the_reason() -> None:
    async def fail(endpoint: Endpoint, token: bytes, incarnation: int) -> None:
        await connect_async(endpoint, token, "b", incarnation=incarnation)

    with serving(pong, incarnation=4) as (server, _):
        with pytest.raises(AuthError, match="tokens differ"):
            asyncio.run(fail(server.endpoint("a"), b"another token of a cluster", 4))
        with pytest.raises(FencedError, match="incarnation 4 answers, the view says 3"):
            asyncio.run(fail(server.endpoint("a"), TOKEN, 3))
        endpoint = server.endpoint("a")
    with pytest.raises(PeerLostError, match="cannot connect"):
        asyncio.run(fail(endpoint, TOKEN, 4))


@HOSTS
def test_a_lost_engine_ends_the_stream_with_an_error(host: str) -> None:
    async def listen(endpoint: Endpoint) -> None:
        stream = await connect_async(endpoint, TOKEN, host)
        await asyncio.to_thread(server.stop)
        with pytest.raises(PeerLostError, match="control stream ended"):
            async for _ in stream:
                raise AssertionError("a payload")
        await stream.close()

    with serving(pong) as (server, _):
        asyncio.run(listen(server.endpoint("a")))


def test_a_fenced_engine_says_so() -> None:
    async def listen(endpoint: Endpoint) -> None:
        stream = await connect_async(endpoint, TOKEN, "a")
        stream.send(b"-")
        with pytest.raises(FencedError, match="superseded"):
            async for _ in stream:
                pass
        await stream.close()

    def fenced(connection: Connection, frame: Frame) -> None:
        connection.send(Kind.ERROR, b"superseded", num_rows=2)

    with serving(fenced) as (server, _):
        asyncio.run(listen(server.endpoint("a")))


@pytest.mark.parametrize(
    ("faults", "errors"),
    [
        (Faults(drop=1.0, skip_frames=3), None),
        (Faults(drop=0.3, skip_frames=1), FrameError),
        (Faults(flip=0.3), (FrameError, PeerLostError)),
        (Faults(cut=0.3), PeerLostError),
        (Faults(duplicate=0.5, delay=0.1, delay_ms=1.0), None),
    ],
    ids=["silence", "gaps", "flips", "cuts", "duplicates"],
)
def test_faults_never_show_as_wrong_payloads(
    faults: Faults, errors: type[Exception] | tuple[type[Exception], ...] | None
) -> None:
    async def talk(endpoint: Endpoint) -> int:
        stream = await connect_async(endpoint, TOKEN, "b")
        for nonce in range(60):
            stream.send(encode(Ping(nonce)))
        count = 0
        try:
            async with asyncio.timeout(0.3 if faults.drop == 1.0 else WAIT_S):
                async for payload in stream:
                    message = decode_to_ingress(payload)
                    assert isinstance(message, Pong) and message.nonce == count
                    count += 1
                    if count == 60:
                        break
        except TimeoutError:
            assert faults.drop == 1.0 and count == 3
        finally:
            await stream.close()
        return count

    with serving(pong) as (server, _):
        link = FaultyLink(server.endpoint("a"), self_host="b", seed=11, to_client=faults)
        try:
            if errors is None:
                assert asyncio.run(talk(link.endpoint("a"))) in (3, 60)
            else:
                with pytest.raises(errors):
                    asyncio.run(talk(link.endpoint("a")))
            assert link.counts
        finally:
            link.close()
