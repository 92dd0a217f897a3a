"""The native pump: what it takes, what it leaves to Python, and that nobody can tell them apart."""

import contextlib
import gc
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from support.comm_rig import (
    TOKEN,
    WAIT_S,
    as_native,
    at_home,
    close_enough,
    echo_body,
    everywhere,
    member,
    random_batch,
    serve,
    service,
    shards,
    toy_compute,
)
from support.pump_rig import (
    FLOAT32,
    WIDTH,
    ask,
    connected,
    echo_shard,
    frame,
    not_python,
    pump_of,
    raw,
    receive,
    rows_of,
)  # fmt: skip
from torch import Tensor

from remora.comm import native
from remora.comm.accounting import expected_call_bytes
from remora.comm.call import Call
from remora.comm.connection import Connection
from remora.comm.dispatch import Dispatcher
from remora.comm.errors import ClusterError, PeerLostError
from remora.comm.expert_protocol import ExpertCall, ExpertService, NotMineError
from remora.comm.limits import TOP_K_MAX
from remora.comm.native_pump import MERGE_ROWS_MAX, SKIPS_MAX
from remora.comm.peers import PeerSet
from remora.comm.server import ServerLimits
from remora.comm.view import Endpoint, View
from remora.comm.wire import (
    ErrorCode,
    Flag,
    Kind,
    encode_frame,
)

pytestmark = pytest.mark.skipif(native.native_extension() is None, reason="not built")
HOSTS = pytest.mark.parametrize("host", ["a", "b"], ids=["unix", "tcp"])


@HOSTS
def test_ordinary_calls_do_not_reach_python_and_count_alike(host: str) -> None:
    shard = echo_shard()
    shard.epoch = 7
    with serve(shard) as (server, _), connected(server.endpoint("a"), host) as peers:
        total_out = total_back = 0
        for num_rows in (1, 0, 3, 400, 1500):
            assert ask(peers, num_rows) == rows_of(num_rows)
            out, back = expected_call_bytes(
                num_rows=num_rows, num_pairs=num_rows, row_bytes=4 * WIDTH, presummed=True
            )
            total_out, total_back = total_out + out, total_back + back
        [far] = server.connections
        near = peers.counters.link("shard-0")
        assert (far.counters.received_bytes, far.counters.sent_bytes) == (total_out, total_back)
        assert far.counters.arena_bytes == near.arena_bytes > (0 if host == "a" else -1)
        assert far.counters.received_rows == near.sent_rows == near.received_rows
        assert pump_of(shard).calls_served == 5


def test_a_large_inline_call_makes_room_once() -> None:
    seen: list[int] = []

    def note(call: ExpertCall) -> Tensor:
        seen.append(call.rows_ND.shape[0])
        return call.rows_ND

    shard = echo_shard(note)
    with serve(shard) as (server, _), connected(server.endpoint("a"), "b") as peers:
        for _ in range(4):
            assert ask(peers, 9000) == rows_of(9000)
        assert ask(peers, 1) == rows_of(1)
    assert seen == [9000] and pump_of(shard).calls_served == 4


@HOSTS
def test_what_the_kernel_refuses_is_pythons_and_comes_back(host: str) -> None:
    """Another width, an expert that is not held, a kernel that fails: answered as ever."""
    heard: list[tuple[int, int]] = []

    def compute(call: ExpertCall) -> Tensor:
        heard.append((call.layer, call.rows_ND.shape[1]))
        if call.layer == 3:
            raise NotMineError([0])
        if call.layer == 4:
            raise RuntimeError("out of luck")
        return call.out_MD.copy_(call.rows_ND)

    shard = service(compute, width=WIDTH)
    with serve(shard) as (server, _), connected(server.endpoint("a"), host) as peers:
        assert ask(peers, 5) == rows_of(5) and heard == [(0, WIDTH)]
        assert ask(peers, 5, width=8) == rows_of(5, 8) and heard[1:] == [(0, 8)]
        assert ask(peers, 5, layer=3) == b"\0\0\0\0"  # NOT_MINE: expert 0
        with pytest.raises(ClusterError, match="RuntimeError: out of luck"):
            ask(peers, 5, layer=4)
        assert heard[2:] == [(3, WIDTH)] * 2 + [(4, WIDTH)] * 2  # the kernel first, then Python
        assert ask(peers, 5) == rows_of(5) and pump_of(shard).calls_served == 2


def test_more_pairs_than_rows_can_have_are_refused() -> None:
    """A kernel's memory goes by pairs: a frame of 64 MiB could ask for tens of GiB."""
    shard = echo_shard()
    row = rows_of(1)

    def of_one_row(sequence: int, num_pairs: int) -> bytes:
        pairs = bytes(8 * num_pairs) + np.ones(num_pairs, np.float32).tobytes()
        return frame(sequence, num_pairs=num_pairs, body=row + pairs)

    with serve(shard) as (server, _), raw(server) as sock:
        sock.sendall(of_one_row(1, TOP_K_MAX + 1))
        kind, _, code, text = receive(sock)
        assert (kind, code) == (Kind.ERROR, ErrorCode.BAD_CALL) and b"17 pairs of 1 row" in text
        sock.sendall(of_one_row(2, TOP_K_MAX))
        assert receive(sock) == (Kind.COMBINED, 2, 1, row)
    assert pump_of(shard).calls_served == 1


def test_python_computes_pairs_as_it_checked_them() -> None:
    """As the pump does: a requester can write into its arena meanwhile."""
    seen: list[list[list[float]]] = []
    asked: list[Call] = []

    def compute(call: ExpertCall) -> Tensor:
        asked.pop().body[4 * 4 * WIDTH :] = b"\x7f" * 48
        pairs = call.pair_row_P, call.pair_expert_P, call.pair_weight_P
        seen.append([column.tolist() for column in pairs])
        return call.out_MD.copy_(call.rows_ND)

    shard = ExpertService(compute, incarnation=1)
    with (
        serve(shard) as (server, _),
        connected(server.endpoint("a"), arena_bytes_min=1) as peers,
    ):
        body = echo_body(4, WIDTH)[1]
        call = peers.peer("shard-0").begin(len(body), 4 * 4 * WIDTH)
        assert call is not None
        asked.append(call)
        call.body[:] = body
        sizes = {"num_rows": 4, "num_pairs": 4, "width": WIDTH, "dtype": FLOAT32}
        peers.start(call, flags=Flag.PRESUMMED, **sizes)
        peers.exchange([call], WAIT_S)
        assert call.shared and seen == [[[0, 1, 2, 3], [0] * 4, [1.0] * 4]]


@HOSTS
def test_frames_in_any_pieces(host: str) -> None:
    """Several in one send; one byte by byte; a ping in between, which is Python's."""
    shard = echo_shard(lambda call: call.rows_ND)  # frames behind a ping are Python's, too
    with serve(shard) as (server, _), raw(server, unix=host == "a") as sock:
        sock.sendall(b"".join(frame(s, s) for s in range(1, 9)))
        for s in range(1, 9):
            assert receive(sock) == (Kind.COMBINED, s, s, rows_of(s))
        for byte in frame(9, 2):
            sock.sendall(bytes([byte]))
        assert receive(sock) == (Kind.COMBINED, 9, 2, rows_of(2))
        ping = encode_frame(b"?", kind=Kind.PING, sequence=5)
        sock.sendall(frame(10) + ping + frame(11) + frame(11) + ping + frame(12))
        kinds = [receive(sock)[:2] for _ in range(5)]
        assert kinds == [
            (Kind.COMBINED, 10), (Kind.PONG, 5), (Kind.COMBINED, 11), (Kind.PONG, 5),
            (Kind.COMBINED, 12),
        ]  # fmt: skip
        [far] = server.connections
        assert far.counters.stale_replies == 1


def test_a_slow_reader_gets_everything_in_order_or_is_closed() -> None:
    shard = echo_shard(lambda call: call.rows_ND)  # while answers wait, calls are Python's
    with serve(shard) as (server, _), raw(server) as sock:
        sizes = [1000 + s for s in range(1, 60)]  # 4 MB of answers: more than a socket holds
        sender = threading.Thread(
            target=lambda: [sock.sendall(frame(s, n)) for s, n in enumerate(sizes, 1)]
        )
        sender.start()
        for s, n in enumerate(sizes, 1):
            assert receive(sock) == (Kind.COMBINED, s, n, rows_of(n))
        sender.join()
    limits = ServerLimits(queue_bytes_max=1 << 20, stall_s=0.2)
    with (
        serve(echo_shard(lambda c: c.rows_ND), limits=limits) as (server, lost),
        raw(server) as sock,
    ):
        with contextlib.suppress(ConnectionError):
            for s, n in enumerate(sizes, 1):
                sock.sendall(frame(s, n))
        assert "slow peer" in str(lost.get(timeout=WAIT_S).close_reason)


def mapped_arenas() -> int:
    gc.collect()
    return Path("/proc/self/maps").read_text().count("remora-arena")


class Gate:
    """A kernel that stops in its first batch until it is opened; notes batches as it goes."""

    def __init__(self) -> None:
        self.entered, self.open = threading.Event(), threading.Event()
        self.batches: list[int] = []
        self.rows: list[int] = []

    def compute(self, call: ExpertCall) -> Tensor:
        self.rows.append(call.rows_ND.shape[0])
        self.entered.set()
        assert self.open.wait(WAIT_S)
        return toy_compute(call)


def test_waiting_calls_of_one_layer_are_computed_together() -> None:
    gate = Gate()
    shard = ExpertService(
        not_python, incarnation=1,
        native=as_native(gate.compute, width=WIDTH, on_batch=gate.batches.append),
    )  # fmt: skip
    with serve(shard) as (server, _):
        large = MERGE_ROWS_MAX - 5
        calls = [(2, 0), (3, 0), (5, 0), (4, 1), (large, 0), (1, 0)]
        with contextlib.ExitStack() as stack:
            socks = [stack.enter_context(raw(server)) for _ in calls]
            for sock, (num_rows, layer) in zip(socks, calls, strict=True):
                sock.sendall(frame(1, num_rows, layer=layer))
                assert gate.entered.wait(WAIT_S)  # the first one; the others wait for it
            gate.open.set()
            assert [receive(sock)[0] for sock in socks] == [Kind.COMBINED] * len(calls)
    assert gate.batches[0] == 1 and sorted(gate.batches[1:]) == [1, 1, 3]
    assert gate.rows == [2, 1, 3, 5, 4, large]  # smallest first; the large one did not fit in
    assert pump_of(shard).num_batches == 4 and pump_of(shard).calls_served == 6


def test_small_calls_go_first_and_large_ones_do_not_starve() -> None:
    gate = Gate()
    shard = ExpertService(not_python, incarnation=1, native=as_native(gate.compute, width=WIDTH))
    with serve(shard) as (server, _), raw(server) as small, raw(server) as large:
        small.sendall(frame(1, 2))
        assert gate.entered.wait(WAIT_S)
        large.sendall(frame(1, 500, layer=1))
        small.sendall(b"".join(frame(s, 1, layer=s % 2) for s in range(2, SKIPS_MAX + 4)))
        gate.open.set()
        assert receive(large)[2] == 500
        for _ in range(SKIPS_MAX + 3):
            receive(small)
    assert gate.rows == [2] + [1] * SKIPS_MAX + [500, 1, 1]


def test_two_dense_ranks_share_the_shards() -> None:
    """Their calls meet in one kernel call or not; each gets its own rows, to the last bit."""
    failed: queue.Queue[BaseException] = queue.Queue()
    with contextlib.ExitStack() as stack:
        rig = stack.enter_context(shards(compute=lambda uid: toy_compute))

        def rank(seed: int) -> None:
            try:
                peers = PeerSet(token=TOKEN, self_host="ab"[seed % 2])
                dispatcher = Dispatcher(view=rig.view, peers=peers, combine="ordered")
                for step in range(40):
                    batch = random_batch(1 + (seed + step) % 5, seed=100 * seed + step)
                    count = batch[0].shape[0]
                    got = dispatcher.moe(2 * (step % 2), *batch, count)
                    assert torch.equal(got, at_home(*batch, count, 2 * (step % 2)))
                peers.close()
            except BaseException as error:
                failed.put(error)
                raise

        threads = [threading.Thread(target=rank, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        served = [pump_of(s).calls_served for s in rig.services.values()]
    assert failed.empty()
    assert sum(served) >= 4 * 40  # hardly a token has all its experts on one shard


CHILD = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from support.comm_rig import TOKEN, as_native, member, random_batch
from remora.comm.dispatch import Dispatcher
from remora.comm.expert_protocol import ExpertService
from remora.comm.peers import PeerSet
from remora.comm.server import FrameServer
from remora.comm.view import Endpoint, View, contiguous_placement

def die(call):
    os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[1] == "shard":
    service = ExpertService(die, incarnation=1, native=as_native(die))
    server = FrameServer(host_ip="127.0.0.1", token=TOKEN, on_frame=service.on_frame,
                         incarnation=1, pump=service.pump)
    endpoint = server.endpoint("a")
    print(endpoint.tcp_address, endpoint.unix_path, flush=True)
    server.run()
else:
    end = Endpoint(host="a", tcp_address="-", unix_path=sys.argv[1])
    placement = contiguous_placement(num_experts=16, moe_layers=(0,), shard_uids=("shard-0",))
    view = View(epoch=1, members=(member(end),), placement=placement)
    dispatcher = Dispatcher(view=view, peers=PeerSet(token=TOKEN, self_host="a"),
                            combine="presummed")
    dispatcher.moe(0, *random_batch(300), 300)
"""


def child(*arguments: str) -> "subprocess.Popen[str]":
    code = CHILD.format(tests=str(Path(__file__).parents[1]))
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True, cwd="/"
    )


def test_a_shard_killed_in_its_kernel() -> None:
    with child("shard") as process:
        assert process.stdout is not None
        tcp, unix = process.stdout.readline().split()
        end = Endpoint(host="a", tcp_address=tcp, unix_path=unix)
        view = View(epoch=1, members=(member(end),), placement=everywhere("shard-0"))
        peers = PeerSet(token=TOKEN, self_host="a")
        dispatcher = Dispatcher(view=view, peers=peers, combine="ordered")
        with pytest.raises(PeerLostError, match="shard-0"):
            dispatcher.moe(0, *random_batch(40), 40)
        assert process.wait(WAIT_S) == -signal.SIGKILL
        assert peers.counters.link("shard-0").losses == 1
        peers.close()


def test_a_requester_killed_while_its_call_is_computed() -> None:
    gate = Gate()
    shard = service(gate.compute)
    before = mapped_arenas()
    with serve(shard) as (server, lost):
        with child(str(server.endpoint("a").unix_path)) as process:
            assert gate.entered.wait(WAIT_S)
            process.send_signal(signal.SIGKILL)
            process.wait(WAIT_S)
        gate.open.set()
        connection: Connection = lost.get(timeout=WAIT_S)
        assert not connection.send_control(b"anybody?")
        with connected(server.endpoint("a")) as peers:  # and it serves the next one
            assert len(ask(peers, 2, width=64)) == 2 * 64 * 4
        assert mapped_arenas() <= before + 2  # of the new connection, at both ends


@HOSTS
def test_dispatch_over_native_shards_is_right(host: str) -> None:
    with shards(hosts=host) as rig:
        peers = PeerSet(token=TOKEN, self_host="a")
        dispatcher = Dispatcher(view=rig.view, peers=peers, combine="presummed")
        batch = random_batch(50)
        assert close_enough(dispatcher.moe(0, *batch, 50), at_home(*batch, 50, 0), "presummed")
        assert all(pump_of(s).calls_served == 1 for s in rig.services.values())
        peers.close()
