"""What one layer's dispatch and combine costs beside bare Unix sockets, in one run.

    python benchmarks/comm_roundtrip.py [--rounds 3000]

Two echo shards in processes of their own (they answer the rows they got), one requester: `--tokens`
rows of `--width` bfloat16, top-8 of 64 experts, half of them on each shard. The bare twin sends the
same rows to two processes over Unix sockets with one send and one receive each: no frames, no
plan, no tensors. Alternating blocks; medians in microseconds.
"""

import argparse
import json
import multiprocessing
import os
import select
import socket
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection as Pipe
from typing import Any

CONTEXT = multiprocessing.get_context("fork")
TOKEN = b"benchmark-token-of-32-bytes....."


def bare_echo(sock: socket.socket, num_bytes: int) -> None:
    """Answers every `num_bytes` with as many."""
    buffer = bytearray(num_bytes)
    view = memoryview(buffer)
    while True:
        got = 0
        while got < num_bytes:
            received = sock.recv_into(view[got:])
            if received == 0:
                return
            got += received
        sock.sendall(buffer)


def echo_shard(pipe: Pipe, unix: bool) -> None:
    """An `ExpertService` whose answer is the rows it got."""
    import torch

    torch.set_num_threads(1)
    from remora.comm.expert_protocol import ExpertCall, ExpertService
    from remora.comm.server import FrameServer

    def compute(call: ExpertCall) -> torch.Tensor:
        return call.out_MD.copy_(call.rows_ND) if call.presummed else call.rows_ND[call.pair_row_P]

    service = ExpertService(compute, incarnation=1)
    server = FrameServer(
        host_ip="127.0.0.1", token=TOKEN, on_frame=service.on_frame, incarnation=1, unix=unix
    )
    pipe.send(server.endpoint("here"))
    server.run()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3000)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--ordered", action="store_true")
    parser.add_argument("--tcp", action="store_true")
    parser.add_argument("--arena-bytes-min", type=int, default=16 << 10)
    parser.add_argument("--spin-us", type=float, default=0.0)
    parser.add_argument("--quick", action="store_true")
    return parser.parse_args()


def start_bare(count: int, num_bytes: int, processes: list[Any]) -> Callable[[], None]:
    """Starts the bare twin and returns one round of it."""
    bare: dict[int, socket.socket] = {}
    poller = select.epoll()
    for _ in range(count):
        ours, theirs = socket.socketpair()
        processes.append(CONTEXT.Process(target=bare_echo, args=(theirs, num_bytes), daemon=True))
        processes[-1].start()
        theirs.close()
        bare[ours.fileno()] = ours
        poller.register(ours.fileno(), select.EPOLLIN)
    payload = bytes(num_bytes)
    inbox = memoryview(bytearray(num_bytes))

    def run() -> None:
        for sock in bare.values():
            sock.sendall(payload)
        pending = len(bare) * num_bytes
        while pending:
            for fd, _ in poller.poll():
                pending -= bare[fd].recv_into(inbox)

    return run


def start_ours(arguments: argparse.Namespace, processes: list[Any]) -> Callable[[], None]:
    """Starts the echo shards and returns one round of dispatch and combine over them."""
    endpoints = []
    for _ in range(arguments.shards):
        near, far = CONTEXT.Pipe()
        processes.append(
            CONTEXT.Process(target=echo_shard, args=(far, not arguments.tcp), daemon=True)
        )
        processes[-1].start()
        endpoints.append(near.recv())

    import torch  # after the forks: torch's threads do not survive one

    torch.set_num_threads(1)
    from remora.comm.dispatch import Dispatcher
    from remora.comm.peer import PeerLimits
    from remora.comm.peers import PeerSet
    from remora.comm.view import Member, View, contiguous_placement

    uids = tuple(f"shard-{i}" for i in range(arguments.shards))
    members = tuple(
        Member(uid=uid, incarnation=1, role="shard", endpoint=endpoint, actor_name=uid)
        for uid, endpoint in zip(uids, endpoints, strict=True)
    )
    placement = contiguous_placement(num_experts=64, moe_layers=(0,), shard_uids=uids)
    peers = PeerSet(
        token=TOKEN,
        self_host="here",
        limits=PeerLimits(arena_bytes_min=arguments.arena_bytes_min),
        spin_s=arguments.spin_us * 1e-6,
    )
    dispatcher = Dispatcher(
        view=View(epoch=1, members=members, placement=placement),
        peers=peers,
        combine="ordered" if arguments.ordered else "presummed",
    )
    torch.manual_seed(0)
    hidden_TD = torch.randn(arguments.tokens, arguments.width).bfloat16()
    index_TK = torch.stack([torch.randperm(64)[:8] for _ in range(arguments.tokens)])
    weights_TK = torch.rand(arguments.tokens, 8)

    def run() -> None:
        dispatcher.moe(0, hidden_TD, index_TK, weights_TK, arguments.tokens)

    return run


def main() -> None:
    arguments = parse_arguments()
    rounds = 300 if arguments.quick else arguments.rounds
    processes: list[Any] = []
    runs = {
        "bare": start_bare(arguments.shards, arguments.tokens * arguments.width * 2, processes),
        "ours": start_ours(arguments, processes),
    }
    figures: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(10):
        for name, run in runs.items():
            for _ in range(rounds // 10):
                start = time.perf_counter()
                run()
                figures[name].append((time.perf_counter() - start) * 1e6)
    result = {
        f"{name}_{label}_us": round(value, 1)
        for name, times in figures.items()
        for label, value in (
            ("median", statistics.median(times)),
            ("p10", statistics.quantiles(times, n=10)[0]),
            ("p90", statistics.quantiles(times, n=10)[8]),
        )
    }
    result["load"] = round(os.getloadavg()[0], 1)
    print(json.dumps(vars(arguments) | result))
    for process in processes:
        process.terminate()
        process.join()


if __name__ == "__main__":
    main()
