"""Servers, members and toy experts for the tests of `remora.comm`: real sockets, real threads."""

import contextlib
import dataclasses
import queue
import socket
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from remora.comm import plan
from remora.comm.connection import Connection, Frame
from remora.comm.dispatch import Combine
from remora.comm.expert_protocol import ExpertCall, ExpertService
from remora.comm.server import FrameServer
from remora.comm.view import Endpoint, Member, Placement, View, contiguous_placement
from remora.comm.wire import dispatch_bytes

TOKEN = b"a token of the tests, 32 bytes.."
WAIT_S = 20.0  # until a test gives up; nothing waits this long when it works


@contextlib.contextmanager
def serving(
    on_frame: Callable[[Connection, Frame], None], **options: Any
) -> Iterator[tuple[FrameServer, "queue.Queue[Connection]"]]:
    """A server in a thread of its own, and a queue of the connections that it lost."""
    lost: queue.Queue[Connection] = queue.Queue()
    options.setdefault("token", TOKEN)
    server = FrameServer(host_ip="127.0.0.1", on_frame=on_frame, on_lost=lost.put, **options)
    server.start()
    try:
        yield server, lost
    finally:
        server.close()


def member(endpoint: Endpoint, uid: str = "shard-0", incarnation: int = 1) -> Member:
    return Member(uid=uid, incarnation=incarnation, role="shard", endpoint=endpoint, actor_name=uid)


def expert_output(rows_PD: Tensor, expert_P: Tensor, layer: int = 0) -> Tensor:
    """A toy expert whose output says which expert and layer made it."""
    scale_P = 0.25 + expert_P.float() * 0.03125 + layer * 0.5
    return (rows_PD.float() * scale_P[:, None]).to(rows_PD.dtype)


def toy_compute(call: ExpertCall) -> Tensor:
    """What an honest shard answers; the slow, obvious way."""
    row_P = call.pair_row_P.long()
    rows_PD = expert_output(call.rows_ND[row_P], call.pair_expert_P, call.layer)
    if not call.presummed:
        return rows_PD
    sum_ND = torch.zeros(call.rows_ND.shape)
    sum_ND.index_add_(0, row_P, rows_PD.float() * call.pair_weight_P[:, None])
    return sum_ND.to(rows_PD.dtype)


@dataclasses.dataclass
class Shards:
    """Toy shards of one view, one server each."""

    servers: dict[str, FrameServer]
    services: dict[str, ExpertService]
    view: View


@contextlib.contextmanager
def shards(
    *,
    num_shards: int = 2,
    num_experts: int = 16,
    moe_layers: tuple[int, ...] = (0, 2),
    hosts: str = "aa",
    placement: Placement | None = None,
    compute: Callable[[str], Callable[[ExpertCall], Tensor]] = lambda uid: toy_compute,
    **options: Any,
) -> Iterator[Shards]:
    uids = tuple(f"shard-{i}" for i in range(num_shards))
    with contextlib.ExitStack() as stack:
        services = {uid: ExpertService(compute(uid), incarnation=1) for uid in uids}
        servers = {
            uid: stack.enter_context(serving(services[uid].on_frame, incarnation=1, **options))[0]
            for uid in uids
        }
        view = View(
            epoch=1,
            members=tuple(
                member(servers[uid].endpoint(hosts[i % len(hosts)]), uid)
                for i, uid in enumerate(uids)
            ),
            placement=placement
            or contiguous_placement(
                num_experts=num_experts, moe_layers=moe_layers, shard_uids=uids
            ),
        )
        yield Shards(servers, services, view)


def random_batch(
    num_rows: int, *, num_experts: int = 16, top_k: int = 4, width: int = 64,
    dtype: torch.dtype = torch.float32, seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """hidden_TD, index_TK, weights_TK."""
    generator = torch.Generator().manual_seed(seed)
    hidden_TD = torch.randn(num_rows, width, generator=generator).to(dtype)
    index_TK = torch.rand(num_rows, num_experts, generator=generator).argsort(1)[:, :top_k]
    weights_TK = torch.rand(num_rows, top_k, generator=generator)
    return hidden_TD, index_TK.contiguous(), weights_TK


def echo_body(num_rows: int, width: int) -> tuple[Tensor, bytes]:
    """float32 rows and a DISPATCH body that sends each of them to expert 0 once."""
    rows_ND = torch.arange(num_rows * width, dtype=torch.float32).view(num_rows, width)
    pairs = torch.arange(num_rows, dtype=torch.int32)
    body = rows_ND.numpy().tobytes() + pairs.numpy().tobytes()
    body += bytes(4 * num_rows) + torch.ones(num_rows).numpy().tobytes()
    assert len(body) == dispatch_bytes(num_rows, num_rows, 4 * width)
    return rows_ND, body


def raw_socket(endpoint: Endpoint, *, unix: bool) -> socket.socket:
    """A blocking, unauthenticated connection."""
    if unix:
        assert endpoint.unix_path is not None
        sock = socket.socket(socket.AF_UNIX)
        sock.connect("\0" + endpoint.unix_path[1:])
    else:
        ip, port = endpoint.tcp_address.rsplit(":", 1)
        sock = socket.create_connection((ip, int(port)))
    sock.settimeout(WAIT_S)
    return sock


def at_end(sock: socket.socket) -> bool:
    """Reads until the peer closes; True when it did (a reset is a close too)."""
    try:
        while sock.recv(1 << 16):
            pass
    except ConnectionResetError:
        pass
    return True


EVERYTHING = tuple(range(16))


def at_home(
    hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor, num_tokens: int, layer: int
) -> Tensor:
    """What `moe` must give: every expert computed here, summed in top-k order."""
    rows_TKD = torch.stack(
        [expert_output(hidden_TD, index_TK[:, k], layer) for k in range(index_TK.shape[1])], 1
    )
    weights_TK = weights_TK.float() * (index_TK >= 0)
    out_TD = plan.combine_naive(rows_TKD, weights_TK)
    out_TD[num_tokens:] = 0
    return out_TD


def everywhere(*uids: str) -> Placement:
    """Every shard holds every expert."""
    return Placement(
        num_experts=16, moe_layers=(0, 2), slots={uid: (EVERYTHING,) * 2 for uid in uids}
    )


def close_enough(got: Tensor, expected: Tensor, mode: Combine) -> bool:
    """Ordered is equal to the last bit. Presummed rounds once per shard and once at the end."""
    if mode == "ordered":
        return torch.equal(got, expected)
    step = 2.0**-7 if got.dtype is torch.bfloat16 else 2.0**-22
    return torch.allclose(got.float(), expected.float(), rtol=step, atol=step * 4)
