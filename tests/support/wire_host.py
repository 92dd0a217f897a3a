"""A program for a network namespace: an expert shard's socket loop, or a dense rank's dispatcher.

    wire_host.py shard IP               prints its endpoint, serves until standard input ends
    wire_host.py rank JSON              {"shards": [endpoint, ...], "native", "combine", ...}: asks
                                        them for layers, prints what was counted and expected

Experts are echoes; frames, sockets, handshakes, dispatch and counters are the product's own.
"""

import json
import sys
import threading
from typing import Any

import msgspec
import torch
from torch import Tensor

from remora.comm.accounting import expected_call_bytes
from remora.comm.dispatch import Dispatcher
from remora.comm.expert_protocol import ExpertCall, ExpertService
from remora.comm.peers import PeerSet
from remora.comm.server import FrameServer
from remora.comm.view import Endpoint, Member, View, contiguous_placement

TOKEN = b"a token of the tests, 32 bytes.."
NUM_EXPERTS, TOP_K, WIDTH, ROW_BYTES = 32, 4, 512, 1024


def echo(call: ExpertCall) -> Tensor:
    return call.out_MD.copy_(call.rows_ND) if call.presummed else call.rows_ND[call.pair_row_P]


def shard(ip: str) -> None:
    service = ExpertService(echo, incarnation=1)
    server = FrameServer(host_ip=ip, token=TOKEN, on_frame=service.on_frame, incarnation=1)
    server.start()
    print(msgspec.json.encode(server.endpoint(ip)).decode(), flush=True)
    sys.stdin.read()
    server.close()


def rank(task: dict[str, Any]) -> None:
    endpoints = [msgspec.convert(each, Endpoint) for each in task["shards"]]
    uids = tuple(f"shard-{i}" for i in range(len(endpoints)))
    members = tuple(
        Member(uid=uid, incarnation=1, role="shard", endpoint=end, actor_name=uid)
        for uid, end in zip(uids, endpoints, strict=True)
    )
    placement = contiguous_placement(num_experts=NUM_EXPERTS, moe_layers=(0,), shard_uids=uids)
    peers = PeerSet(token=TOKEN, self_host="rank")
    dispatcher = Dispatcher(
        view=View(epoch=1, members=members, placement=placement),
        peers=peers,
        combine=task["combine"],
        native=task["native"],
    )
    print("connected", flush=True)
    sys.stdin.readline()  # the link's counters have been read
    owner = torch.arange(NUM_EXPERTS) * len(uids) // NUM_EXPERTS
    expected = {uid: [0, 0] for uid in uids}
    torch.manual_seed(7)
    for layer in range(task["layers"]):
        num_rows = (1, 8, 33)[layer % 3]
        index_TK = torch.stack([torch.randperm(NUM_EXPERTS)[:TOP_K] for _ in range(num_rows)])
        dispatcher.moe(
            0,
            torch.randn(num_rows, WIDTH).bfloat16(),
            index_TK,
            torch.rand(num_rows, TOP_K),
            num_rows,
        )
        for number, uid in enumerate(uids):
            mine = owner[index_TK] == number
            if mine.any():
                out, back = expected_call_bytes(
                    num_rows=int(mine.any(1).sum()),
                    num_pairs=int(mine.sum()),
                    row_bytes=ROW_BYTES,
                    presummed=task["combine"] == "presummed",
                )
                expected[uid][0] += out
                expected[uid][1] += back
    counted = {
        uid: [link.sent_bytes, link.received_bytes]
        for uid, link in dispatcher.counters.links.items()
    }
    print(json.dumps({"counted": counted, "expected": expected}), flush=True)
    sys.stdin.read()
    peers.close()


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1] == "shard":
        shard(sys.argv[2])
    else:
        rank(json.loads(sys.argv[2]))
    assert threading.active_count() == 1, threading.enumerate()


if __name__ == "__main__":
    main()
