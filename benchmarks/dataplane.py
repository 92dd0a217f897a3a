"""Dispatch and combine of one layer to echo shards, beside bare sockets with the same bytes.

    python benchmarks/dataplane.py [--quick] [--json PATH]

Echo shards (they answer the rows they got) in processes of their own, one requester: rows of 2 KiB
(1024 bfloat16), top-8 of 64 experts, spread evenly over the shards. Each case is measured three
times over, in alternating blocks: `native` (C++ at both ends), `python` (as where there is no
compiler) and `bare`: as many processes that read the bytes of a call and write those of its answer
over plain blocking sockets of the same kind, without frames, plan, checks or tensors. Microseconds
are medians of a round; spreads are over rounds.
"""

import argparse
import multiprocessing
import os
import socket
import statistics
import struct
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection as Pipe
from typing import Any

CONTEXT = multiprocessing.get_context("fork")
TOKEN = b"benchmark-token-of-32-bytes....."
NUM_SHARDS = 2
NUM_EXPERTS = 64
TOP_K = 8
WIDTH = 1024
ROW_BYTES = 2 * WIDTH
BLOCK = struct.Struct("<QQQ")  # bytes of a call, bytes of its answer, number of calls
Run = Callable[[], object]


def bare_echo(sock: socket.socket) -> None:
    """Blocks of calls, each announced: reads so many bytes, writes so many."""
    while announced := sock.recv(BLOCK.size, socket.MSG_WAITALL):
        call_bytes, answer_bytes, count = BLOCK.unpack(announced)
        buffer, answer = bytearray(call_bytes), bytes(answer_bytes)
        for _ in range(count):
            sock.recv_into(buffer, call_bytes, socket.MSG_WAITALL)
            sock.sendall(answer)


def echo_shard(pipe: Pipe, native: bool) -> None:
    """An expert shard's loop whose answer is the rows it got."""
    import torch

    torch.set_num_threads(1)
    from remora.comm.expert_protocol import ExpertCall, ExpertService
    from remora.comm.native_echo import native_echo
    from remora.comm.server import FrameServer
    from remora.comm.wire import Dtype

    def compute(call: ExpertCall) -> torch.Tensor:
        return call.out_MD.copy_(call.rows_ND) if call.presummed else call.rows_ND[call.pair_row_P]

    service = ExpertService(
        compute,
        incarnation=1,
        native=native_echo(WIDTH, int(Dtype.BFLOAT16)) if native else None,
    )
    server = FrameServer(
        host_ip="127.0.0.1",
        token=TOKEN,
        on_frame=service.on_frame,
        incarnation=1,
        pump=service.pump,
    )
    pipe.send(server.endpoint("here"))
    server.run()


def start_bare(kind: str, processes: list[Any]) -> list[socket.socket]:
    """Processes of the bare twin, and our ends of their sockets."""
    socks = []
    for _ in range(NUM_SHARDS):
        if kind == "unix":
            ours, theirs = socket.socketpair()
        else:
            listener = socket.create_server(("127.0.0.1", 0))
            ours = socket.create_connection(listener.getsockname())
            theirs, _ = listener.accept()
            listener.close()
            for sock in (ours, theirs):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        processes.append(CONTEXT.Process(target=bare_echo, args=(theirs,), daemon=True))
        processes[-1].start()
        theirs.close()
        socks.append(ours)
    return socks


def start_shards(native: bool, processes: list[Any]) -> list[Any]:
    """Endpoints of echo shards."""
    endpoints = []
    for _ in range(NUM_SHARDS):
        near, far = CONTEXT.Pipe()
        processes.append(CONTEXT.Process(target=echo_shard, args=(far, native), daemon=True))
        processes[-1].start()
        endpoints.append(near.recv())
    return endpoints


def call_bytes(num_rows: int, num_shards: int, presummed: bool) -> tuple[int, int]:
    """Of one shard's call and its answer, headers included."""
    from remora.comm.accounting import expected_call_bytes

    return expected_call_bytes(
        num_rows=num_rows,
        num_pairs=num_rows * TOP_K // num_shards,
        row_bytes=ROW_BYTES,
        presummed=presummed,
    )


def timed(run: Run, count: int) -> float:
    """Median microseconds of `count` calls."""
    times = []
    for _ in range(count):
        begin = time.perf_counter_ns()
        run()
        times.append(time.perf_counter_ns() - begin)
    return statistics.median(times) / 1e3


def bare_block(socks: list[socket.socket], sizes: tuple[int, int], count: int) -> float:
    """`timed` of the bare twin: everything out, then everything in."""
    out, back = sizes
    payload, inbox = bytes(out), bytearray(back)
    for sock in socks:
        sock.sendall(BLOCK.pack(out, back, count))

    def run() -> None:
        for sock in socks:
            sock.sendall(payload)
        for sock in socks:
            sock.recv_into(inbox, back, socket.MSG_WAITALL)

    return timed(run, count)


def dispatchers(endpoints: dict[bool, list[Any]]) -> dict[tuple[bool, str, int, str], Any]:
    """By (native, link, shards, combine)."""
    import torch

    torch.set_num_threads(1)
    from remora.comm.dispatch import Dispatcher
    from remora.comm.peers import PeerSet
    from remora.comm.view import Member, View, contiguous_placement

    made = {}
    for native, ends in endpoints.items():
        for link in ("unix", "tcp"):
            for shards in (1, 2):
                for combine in ("presummed", "ordered"):
                    uids = tuple(f"shard-{i}" for i in range(shards))
                    members = tuple(
                        Member(uid=uid, incarnation=1, role="shard", endpoint=end, actor_name=uid)
                        for uid, end in zip(uids, ends, strict=False)
                    )
                    placement = contiguous_placement(
                        num_experts=NUM_EXPERTS, moe_layers=(0,), shard_uids=uids
                    )
                    host = "here" if link == "unix" else "elsewhere"
                    made[native, link, shards, combine] = Dispatcher(
                        view=View(epoch=1, members=members, placement=placement),
                        peers=PeerSet(token=TOKEN, self_host=host),
                        combine=combine,
                        native=native,
                    )
    return made


def routing(num_rows: int) -> tuple[Any, Any, Any]:
    """Rows, experts and weights; half of a row's experts in each half of the experts."""
    import torch

    torch.manual_seed(num_rows)
    half = NUM_EXPERTS // 2
    low = torch.stack([torch.randperm(half)[: TOP_K // 2] for _ in range(num_rows)])
    high = torch.stack([torch.randperm(half)[: TOP_K // 2] for _ in range(num_rows)]) + half
    index_TK = torch.cat([low, high], 1)[:, torch.randperm(TOP_K)].contiguous()
    hidden_TD = torch.randn(num_rows, WIDTH).bfloat16()
    return hidden_TD, index_TK, torch.rand(num_rows, TOP_K)


def measure(args: argparse.Namespace, processes: list[Any]) -> None:
    """Every case; prints and writes what `common.finish` does."""
    socks = {link: start_bare(link, processes) for link in ("unix", "tcp")}
    endpoints = {native: start_shards(native, processes) for native in (True, False)}

    import common  # after the forks: torch's threads do not survive one
    from engines_report import Bar, Spread

    rounds = 5 if args.quick else 21
    made = dispatchers(endpoints)
    rows: list[dict[str, Any]] = []
    ratio_of: dict[tuple[str, int, str, int], Spread] = {}
    for link in ("unix", "tcp"):
        for shards in (1, 2):
            for combine in ("presummed", "ordered"):
                for num_rows in (1, 8, 32, 512):
                    sizes = call_bytes(num_rows, shards, combine == "presummed")
                    batch = routing(num_rows)
                    us: dict[str, list[float]] = {"native": [], "python": [], "bare": []}
                    count = 12 if num_rows == 512 else 100
                    for _ in range(rounds):
                        for name in ("native", "python"):
                            moe = made[name == "native", link, shards, combine].moe
                            run = lambda moe=moe: moe(0, *batch, num_rows)  # noqa: E731, B023
                            us[name].append(timed(run, count))
                        us["bare"].append(bare_block(socks[link][:shards], sizes, count))
                    ratio = common.per_round(us["native"], us["bare"])
                    ratio_of[link, shards, combine, num_rows] = ratio
                    rows.append(
                        {"link": link, "shards": shards, "combine": combine, "rows": num_rows}
                        | {f"{name}_us": Spread.of(each) for name, each in us.items()}
                        | {"native/bare": ratio}
                        | {"python/bare": common.per_round(us["python"], us["bare"])}
                    )
    bar = Bar(
        name="dispatch_combine_vs_sockets",
        value=ratio_of["unix", 2, "presummed", 8],
        unit="x",
        op="<",
        target=1.3,
    )
    common.finish("dataplane", args, rows, [bar])


def main() -> None:
    if "MALLOC_TOP_PAD_" not in os.environ:  # how actors are started: no fresh pages for each layer
        from remora.actors.launch import thread_environment

        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | thread_environment(1))
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--json", help="write everything measured to this file")
    args = parser.parse_args()
    if args.json:
        from pathlib import Path

        args.json = Path(args.json)
    processes: list[Any] = []
    try:
        measure(args, processes)
    finally:
        for process in processes:
            process.terminate()
            process.join()


if __name__ == "__main__":
    main()
