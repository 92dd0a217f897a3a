"""The native client of a dispatcher: an ordinary layer in one call, the rest as Python found it.

`csrc/client.cpp` chooses, packs, sends, waits and sums while everything is as it should be: every
chosen peer connected and settled, a credit for every call, answers that are just what is expected.
It begins nothing that it sees it cannot finish. What turns out otherwise under way (an error, a
stale frame, a lost peer, a deadline) is *handed over*: the calls become those of `comm/peer.py`,
bytes received and not understood go into the peer's receive memory, and `dispatch.py` goes on.

Shape suffixes: T tokens (padding included), K top-k, D model width, C calls, S shards.
"""

import ctypes
import time
from typing import Any, Final

import torch
from torch import Tensor

from remora.comm.arena import DTYPE_CODES
from remora.comm.call import Call
from remora.comm.call_deadline import CallDeadline
from remora.comm.dispatch_handle import Dispatch
from remora.comm.native import native_extension, park_address, wake_address
from remora.comm.peer import Peer
from remora.comm.peers import PeerSet
from remora.comm.routes import Routes
from remora.comm.view import View
from remora.comm.wire import HEADER_BYTES, Header, decode_header

_DONE: Final = 0
_NOT_NATIVE: Final = 1
REGIONS_MAX: Final = 256  # a frame names its region in one byte


class NativeLayers:
    """Used by one `Dispatcher`, from its thread; arguments as that one's."""

    def __init__(
        self,
        peers: PeerSet,
        routes: Routes,
        presummed: bool,
        deadline: CallDeadline,
        rows_per_call_max: int,
    ) -> None:
        self._peers = peers
        self._routes = routes
        self._presummed, self._rows_per_call_max = int(presummed), rows_per_call_max
        self._deadline = deadline
        self._deadline_s = 0.0  # that the client is configured for
        self._client: Any = native_extension().Client()
        self._open: Dispatch | None = None  # begun and not finished
        self._view: View | None = None  # that the client is configured for
        self._linked: list[Peer | None] = []  # as the client knows them

    def phases(self) -> tuple[int, int, int, int, int]:
        """Layers; nanoseconds of packing, waiting, combining, and of the experts' kernels."""
        totals: tuple[int, int, int, int, int] = self._client.phases()
        return totals

    def layer(
        self, layer: int, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor, num_tokens: int
    ) -> Tensor | Dispatch | None:
        """A whole layer; arguments as `Dispatcher.dispatch`, contiguous.

        Returns:
            `[T, D]`; or a dispatch handed over; or None: nothing was begun.
        """
        if self._client.is_open and self._open is None:  # begun by way of `step_experts`
            return self._handed_over(layer, hidden_TD, index_TK, weights_TK, num_tokens)
        if not self._ready():
            return None
        num_rows, width = hidden_TD.shape
        out_TD = torch.empty_like(hidden_TD)
        begun_s = time.perf_counter()
        status = self._client.layer(
            layer, num_tokens, num_rows, index_TK.shape[1], width, DTYPE_CODES[hidden_TD.dtype],
            weights_TK.dtype is torch.bfloat16, hidden_TD.data_ptr(), index_TK.data_ptr(),
            weights_TK.data_ptr(), out_TD.data_ptr(),
        )  # fmt: skip
        if status == _DONE:
            self._deadline.note(time.perf_counter() - begun_s)
            return out_TD
        if status == _NOT_NATIVE:
            return None
        return self._handed_over(layer, hidden_TD, index_TK, weights_TK, num_tokens)

    def step_experts(self) -> int:
        """Address of a `RemoraStepExperts` (`kernels/csrc/step_experts.h`) for the layers of the
        next step, 0 when something stands against it now.

        A layer that it does not answer is to be asked for by `layer`, and so are those behind it.
        """
        layers, slowest_s = self._client.take_asked()
        if layers:
            self._deadline.note(slowest_s, layers)
        return int(self._client.step_experts()) if self._ready() else 0

    def begin(self, sent: Dispatch) -> bool:
        """Packs and sends; False: nothing was begun."""
        if not self._ready():
            return False
        num_rows, top_k = sent.index_TK.shape
        status = self._client.begin(
            sent.layer, sent.num_tokens, num_rows, top_k, sent.width,
            DTYPE_CODES[sent.hidden_TD.dtype], False, sent.hidden_TD.data_ptr(),
            sent.index_TK.ctypes.data, sent.weight_TK.ctypes.data,
        )  # fmt: skip
        if status != _DONE:
            return False
        self._open = sent
        return True

    def finish(self, sent: Dispatch) -> Tensor | None:
        """Waits and sums; None: `sent` was handed over, now or before."""
        if self._open is not sent:
            return None
        out_TD = torch.empty_like(sent.hidden_TD)
        if self._client.finish(out_TD.data_ptr()) == _DONE:
            self._open = None
            return out_TD
        self._open = None
        self._hand_over(sent)
        return None

    # -- inside ------------------------------------------------------------------------------

    def _handed_over(
        self, layer: int, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor, num_tokens: int
    ) -> Dispatch:
        """The layer that the client began and gives up, as Python goes on with it."""
        sent = Dispatch.of(
            self._routes.view.epoch, layer, hidden_TD, index_TK, weights_TK, num_tokens
        )
        self._hand_over(sent)
        return sent

    def _ready(self) -> bool:
        """Whether the client may begin a layer."""
        if self._open is not None:
            sent, self._open = self._open, None  # both go on in Python
            self._hand_over(sent)
            sent.until_s = None  # nobody waits for it yet
            return False
        deadline_s = self._deadline.seconds(is_redundant=self._routes.is_redundant)
        if deadline_s != self._deadline_s:
            self._deadline_s, self._view = deadline_s, None  # the client is to be told
            self._peers.settled = False
        return self._peers.settled or self._link()

    def _link(self) -> bool:
        """Tells the client of the connections as they are; False when one is not settled."""
        self._routes.forgive()
        if self._view is not self._routes.view:
            self._configure()
        live = set(self._peers.live_uids)
        for shard, uid in enumerate(self._routes.uids):
            if uid not in live:
                self._linked[shard] = None
                self._client.unlink(shard)
                continue
            peer = self._peers.peer(uid)
            if not peer.is_settled or peer.grants.num_regions > REGIONS_MAX:
                return False
            if self._linked[shard] is not peer:
                self._describe(shard, peer)
        self._peers.settled = True
        return True

    def _configure(self) -> None:
        routes = self._routes
        self._view = routes.view
        self._linked = [None] * len(routes.uids)
        tables = [
            (
                layer,
                t.ctypes.data,
                *t.shape,
                routes.load[layer].ctypes.data,
                routes.sent[layer].ctypes.data,
            )
            for layer, t in routes.tables.items()
        ]
        self._client.configure(
            routes.view.epoch, self._presummed, self._deadline_s, self._rows_per_call_max,
            self._peers.limits.region_bytes,
            routes.host_S.ctypes.data, routes.own_host, routes.usable_S.ctypes.data,
            routes.gain.ctypes.data, len(routes.uids), self._peers.settled_address,
            park_address(), wake_address(), tables,
        )  # fmt: skip

    def _describe(self, shard: int, peer: Peer) -> None:
        grants = peer.grants
        self._linked[shard] = peer
        self._client.link(
            shard, peer.fd, ctypes.addressof(peer.cell), ctypes.addressof(peer.counters),
            peer.memory.address, grants.region_bytes, grants.frame_bytes_max,
            peer.limits.arena_bytes_min, peer.member.incarnation, grants.arena, peer.checked,
            peer.free_regions,
        )  # fmt: skip

    def _hand_over(self, sent: Dispatch) -> None:
        """Makes `sent` what `Dispatcher._send` would have left, answers that came included."""
        client = self._client
        rows = client.calls()
        client.plan(sent.call_TK.ctypes.data, sent.row_TK.ctypes.data, sent.pos_TK.ctypes.data)
        sent.reserve_calls(len(rows))
        sent.num_calls = sent.num_sent = len(rows)
        sent.until_s = client.until_s
        unsent: dict[int, bytearray] = {}
        partial: dict[int, tuple[Call, Header, int]] = {}
        for c, row in enumerate(rows):
            (shard, num_rows, num_pairs, region, body, reply, sequence, shared,
             frame_bytes, left, counted, received, answered) = row  # fmt: skip
            peer = self._linked[shard]
            assert peer is not None, f"call {c} went to shard {shard}, which is not linked"
            call = peer.adopt(region, body, reply, sequence, bool(shared))
            sent.call_shard_C[c] = shard
            sent.call_rows_C[c] = num_rows
            sent.call_pairs_C[c] = num_pairs
            rest = unsent.setdefault(shard, bytearray())
            rest += call.memory.view[call.start + left : call.start + frame_bytes]
            if answered:
                call.reply = decode_header(memoryview(client.head(c)))
                del peer.in_flight[sequence]
                sent.reply_address_C[c] = call.reply_address
                sent.answered.append((c, call))
                continue
            sent.waiting.append((c, call))
            if counted:
                header = decode_header(memoryview(client.head(c)))
                partial[shard] = (call, header, received - HEADER_BYTES)
        for shard, rest in unsent.items():
            peer = self._linked[shard]
            assert peer is not None
            unread, damaged = client.unread(shard)
            self._peers.resume(peer, bytes(rest), partial.get(shard), unread, bool(damaged))
        client.close()
