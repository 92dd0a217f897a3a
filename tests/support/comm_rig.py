"""Servers, members and toy experts for the tests of `remora.comm`: real sockets, real threads."""

import contextlib
import ctypes
import dataclasses
import queue
import socket
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from remora.comm import plan
from remora.comm.accounting import COUNTER_NAMES, LinkCounters
from remora.comm.connection import Connection, Frame
from remora.comm.dispatch import Combine
from remora.comm.expert_protocol import ExpertCall, ExpertService
from remora.comm.native_pump import NativeCompute
from remora.comm.server import FrameServer
from remora.comm.view import Endpoint, Member, Placement, View, contiguous_placement
from remora.comm.wire import Dtype, Flag, Kind, dispatch_bytes, encode_frame

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


class CCall(ctypes.Structure):
    """`RemoraExpertCall` of kernels/csrc/expert_call.h."""

    _fields_ = [
        ("rows", ctypes.c_void_p), ("num_rows", ctypes.c_int64), ("pair_row", ctypes.c_void_p),
        ("pair_expert", ctypes.c_void_p), ("pair_weight", ctypes.c_void_p),
        ("num_pairs", ctypes.c_int64), ("out", ctypes.c_void_p), ("presummed", ctypes.c_int32),
    ]  # fmt: skip


_entries: list[Any] = []  # the interpreter must not free what a pump may still call


def as_native(
    compute: Callable[[ExpertCall], Tensor],
    *,
    width: int = 64,
    dtype: torch.dtype = torch.float32,
    on_batch: Callable[[int], None] = lambda num_calls: None,
) -> NativeCompute:
    """`compute` behind the C interface, for rows of `random_batch`; what it raises is refused.

    `on_batch` hears how many calls came together.
    """

    def tensor(address: int, count: int, of: torch.dtype) -> Tensor:
        if count == 0:
            return torch.empty(0, dtype=of)
        return torch.frombuffer(
            (ctypes.c_char * (count * of.itemsize)).from_address(address), dtype=of
        )

    def one(layer: int, c: Any) -> None:
        back = c.num_rows if c.presummed else c.num_pairs
        out_MD = tensor(c.out, back * width, dtype).view(back, width)
        call = ExpertCall(
            0, layer, bool(c.presummed), tensor(c.rows, c.num_rows * width, dtype).view(-1, width),
            tensor(c.pair_row, c.num_pairs, torch.int32),
            tensor(c.pair_expert, c.num_pairs, torch.int32),
            tensor(c.pair_weight, c.num_pairs, torch.float32), out_MD, 0, "native",
        )  # fmt: skip
        out_MD.copy_(compute(call))

    def entry(shard: Any, layer: int, calls: Any, num_calls: int) -> int:
        try:
            for i in range(num_calls):
                one(layer, calls[i])
        except Exception:  # the Python path meets it again, and answers it
            return 1
        on_batch(num_calls)
        return 0

    prototype = ctypes.CFUNCTYPE(
        ctypes.c_int, ctypes.c_void_p, ctypes.c_int32, ctypes.POINTER(CCall), ctypes.c_int32
    )
    _entries.append(prototype(entry))
    address = ctypes.cast(_entries[-1], ctypes.c_void_p).value
    assert address is not None
    code = Dtype.BFLOAT16 if dtype is torch.bfloat16 else Dtype.FLOAT32
    return NativeCompute(address, 0, width, int(code))


def service(compute: Callable[[ExpertCall], Tensor], **native: Any) -> ExpertService:
    """A shard's handler of incarnation 1; rows of `random_batch` never reach it where there is a
    native data plane. `native` as in `as_native`."""
    return ExpertService(compute, incarnation=1, native=as_native(compute, **native))


def serve(
    service: ExpertService, **options: Any
) -> "contextlib.AbstractContextManager[tuple[FrameServer, queue.Queue[Connection]]]":
    """`serving` for a shard."""
    return serving(service.on_frame, incarnation=1, pump=service.pump, **options)


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
        services = {uid: service(compute(uid)) for uid in uids}
        servers = {uid: stack.enter_context(serve(services[uid], **options))[0] for uid in uids}
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


def counted(link: LinkCounters) -> dict[str, int]:
    """Every counter of a link by name."""
    return {name: getattr(link, name) for name in COUNTER_NAMES}


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


def answer(frame: Frame, **changes: Any) -> bytes:
    """COMBINED with ones, to a presummed call of 64 float32 a row."""
    header = frame.header
    body = np.ones((header.num_rows, header.width), np.float32).tobytes()
    fields: dict[str, Any] = {
        "kind": int(Kind.COMBINED), "num_rows": header.num_rows, "incarnation": 1,
        "sequence": header.sequence, "checked": bool(header.flags & Flag.CHECKED),
    }  # fmt: skip
    return encode_frame(changes.pop("body", body), **(fields | changes))
