"""Dispatch and combine: a layer's rows out to the shards that their tokens chose, and back.

    rows = dispatcher.moe(layer, hidden_TD, index_TK, weights_TK, num_tokens)
    # or, to compute something (shared experts) while the shards do:
    sent = dispatcher.dispatch(layer, hidden_TD, index_TK, weights_TK, num_tokens)
    rows = dispatcher.combine(sent)

Every (token, expert) pair goes to one replica (`plan.choose`), a token's row to each shard once.
A shard that does not hold an expert, is lost or is late costs a retry of its pairs on what the
refreshed view says: calls are stateless and replicas bitwise equal, so the result is the same.

Shape suffixes: T tokens (padding included), K top-k, D model width, E experts, R replicas,
S shards, C calls.
"""

import logging
from collections.abc import Callable
from typing import Final, Literal

import numpy as np
import torch
from torch import Tensor

from remora.comm import plan
from remora.comm.accounting import TrafficCounters
from remora.comm.arena import DTYPE_CODES, Memory
from remora.comm.call import Call
from remora.comm.dispatch_handle import Dispatch
from remora.comm.errors import (
    ClusterError,
    DeadlineError,
    FencedError,
    FrameError,
    PeerLostError,
)
from remora.comm.peers import PeerSet
from remora.comm.replicas import remove_replica, replica_tables
from remora.comm.view import View
from remora.comm.wire import (
    HEADER_BYTES,
    PAIR_BYTES,
    Flag,
    Kind,
    dispatch_bytes,
)

log = logging.getLogger(__name__)

RETRIES_MAX: Final = 3
_DISPATCH: Final = int(Kind.DISPATCH)
_NOT_MINE: Final = int(Kind.NOT_MINE)
_PRESUMMED: Final = int(Flag.PRESUMMED)
Combine = Literal["ordered", "presummed"]


class Dispatcher:
    """Routes the MoE layers of one dense rank; used from the thread that owns `peers`.

    Args:
        view: placement and members; its shards are connected to at once.
        peers: connections; the dispatcher applies views to it.
        combine: "ordered" (one row back per pair, summed here in top-k order: `exact`) or
            "presummed" (one row back per token and shard: `fast`).
        deadline_s: of one attempt; a shard over it is a suspect until the next epoch.
        refresh_view: called with the epoch that disappointed; returns the newest view (it may
            block to fetch it). None keeps the view for good.
        rows_per_call_max: larger dispatches go out in slices, so that other ranks' decode goes
            between them.

    Raises:
        PeerLostError: an expert of the view has no shard that could be reached.
    """

    def __init__(
        self,
        *,
        view: View,
        peers: PeerSet,
        combine: Combine,
        deadline_s: float = 30.0,
        refresh_view: Callable[[int], View] | None = None,
        rows_per_call_max: int = 512,
    ) -> None:
        if combine not in ("ordered", "presummed"):
            raise ValueError(f"combine is {combine!r}, must be 'ordered' or 'presummed'")
        self._peers = peers
        self._presummed = combine == "presummed"
        self._deadline_s = deadline_s
        self._refresh_view = refresh_view
        self._rows_per_call_max = rows_per_call_max
        plan.warm()
        self.set_view(view)

    @property
    def counters(self) -> TrafficCounters:
        """Bytes, rows and pairs per peer."""
        return self._peers.counters

    @property
    def view(self) -> View:
        """The view in force."""
        return self._view

    def set_view(self, view: View) -> None:
        """Routes by `view` from the next dispatch on; between dispatches only."""
        failed = self._peers.apply_view(view)
        for uid, error in failed.items():
            log.warning("%s cannot be reached: %s", uid, error)
        self._view = view
        self._uids = sorted(view.placement.slots)
        hosts = {m.uid: m.endpoint.host for m in view.members}
        own = self._peers.self_host
        self._local_S = np.array([hosts.get(uid) == own for uid in self._uids], np.uint8)
        self.suspects: set[str] = set()  # late, or of another life: until the next view
        self._note_usable()
        self._tables = replica_tables(view, self._uids)

    def moe(
        self,
        layer: int,
        hidden_TD: Tensor,
        index_TK: Tensor,
        weights_TK: Tensor,
        num_tokens: int,
    ) -> Tensor:
        """`combine(dispatch(...))`."""
        return self.combine(self.dispatch(layer, hidden_TD, index_TK, weights_TK, num_tokens))

    def dispatch(
        self,
        layer: int,
        hidden_TD: Tensor,
        index_TK: Tensor,
        weights_TK: Tensor,
        num_tokens: int,
    ) -> Dispatch:
        """Sends the rows of the first `num_tokens` tokens to their shards, without waiting.

        Args:
            layer: decoder-layer index, one of the placement's `moe_layers`.
            hidden_TD: bfloat16 or float32 rows on the CPU; must not change until `combine`.
            index_TK: int64 logical experts, K <= 16; negative = none.
            weights_TK: any float dtype.
            num_tokens: rows that are real, <= T.

        Raises:
            PeerLostError: an expert without a live replica, after refreshing the view.
        """
        assert index_TK.shape == weights_TK.shape and index_TK.shape[1] <= plan.TOP_K_MAX, (
            f"index {tuple(index_TK.shape)}, weights {tuple(weights_TK.shape)}, k <= 16"
        )
        assert 0 <= num_tokens <= index_TK.shape[0] == hidden_TD.shape[0], (
            f"{num_tokens} tokens of {index_TK.shape[0]} indices and {hidden_TD.shape[0]} rows"
        )
        if weights_TK.dtype is not torch.float32:
            weights_TK = weights_TK.float()
        plan_3TK = np.empty((3, *index_TK.shape), np.int32)
        plan_3TK[0] = plan.PENDING
        sent = Dispatch(
            epoch=self._view.epoch,
            layer=layer,
            num_tokens=num_tokens,
            hidden_TD=hidden_TD.contiguous(),
            width=hidden_TD.shape[1],
            row_bytes=hidden_TD.shape[1] * hidden_TD.element_size(),
            index_TK=index_TK.contiguous().numpy(),
            weight_TK=weights_TK.contiguous().numpy(),
            plan_3TK=plan_3TK,
        )
        if num_tokens:
            try:
                self._plan(sent)
                self._send(sent)
            except BaseException:
                sent.release()
                raise
        return sent

    def combine(self, sent: Dispatch) -> Tensor:
        """Waits for the answers and sums them: `[T, D]` of the rows' dtype, zeros from
        `num_tokens` on. Consumes `sent`.

        Raises:
            DeadlineError, PeerLostError: naming the peer, after retries; ClusterError: a shard
                failed on a call. Nothing of `sent` is under way any more.
        """
        try:
            self._collect(sent)
            out_TD = torch.empty_like(sent.hidden_TD)
            plan.combine(
                sent.weight_TK, sent.num_tokens, out_TD.shape[1],
                out_TD.dtype is torch.bfloat16, self._presummed,
                sent.call_TK, sent.row_TK, sent.pos_TK, sent.reply_address_C,
                out_TD.data_ptr(), out_TD.shape[0],
            )  # fmt: skip
            return out_TD
        finally:
            sent.release()

    # -- inside ------------------------------------------------------------------------------

    def _plan(self, sent: Dispatch) -> None:
        """Chooses a shard for each PENDING pair and lays out calls from `num_calls` on."""
        shard_TK = np.empty(sent.call_TK.shape, np.int32)
        attempt = 0
        while True:
            table_ER = self._tables[sent.layer]
            missing = plan.choose(
                sent.index_TK, sent.num_tokens, table_ER, self._local_S, self._usable_S,
                shard_TK, sent.call_TK,
            )  # fmt: skip
            if missing < 0:
                break
            assert missing < table_ER.shape[0], f"expert {missing} of {table_ER.shape[0]}"
            attempt += 1
            if attempt > RETRIES_MAX or not self._refresh():
                raise sent.error or PeerLostError(
                    f"expert {missing} of layer {sent.layer} has no live replica in view "
                    f"{self._view.epoch}; live shards: {self._peers.live_uids}"
                )
        rows_max = self._rows_max(sent)
        num_shards = len(self._uids)
        bound = sent.num_calls + num_shards + sent.call_TK.size // rows_max
        sent.reserve_calls(bound)
        num_calls: int = plan.lay_out(
            sent.index_TK, sent.num_tokens, table_ER.shape[0], num_shards, rows_max,
            sent.num_calls, shard_TK, sent.call_TK, sent.row_TK, sent.pos_TK,
            sent.call_shard_C, sent.call_rows_C, sent.call_pairs_C,
        )  # fmt: skip
        sent.num_calls = num_calls
        sent.epoch = self._view.epoch

    def _rows_max(self, sent: Dispatch) -> int:
        """Rows of a call: at most `rows_per_call_max`, and request and answer fit a region."""
        row_bytes, top_k = sent.row_bytes, sent.call_TK.shape[1]
        back = 1 if self._presummed else top_k
        per_row = row_bytes * (1 + back) + PAIR_BYTES * top_k
        fitting: int = (self._peers.limits.region_bytes - 4 * HEADER_BYTES) // per_row
        return max(1, min(self._rows_per_call_max, fitting))

    def _send(self, sent: Dispatch) -> None:
        """Packs and sends calls from `num_sent` on, as far as the peers' credits go."""
        first = sent.num_sent
        hidden_TD = sent.hidden_TD
        width, row_bytes = sent.width, sent.row_bytes
        shards = sent.call_shard_C[first : sent.num_calls].tolist()
        rows = sent.call_rows_C[first : sent.num_calls].tolist()
        pairs = sent.call_pairs_C[first : sent.num_calls].tolist()
        body_address_C = np.zeros(sent.num_calls, np.int64)
        begun: list[tuple[Call, int, int]] = []
        for c, (shard, num_rows, num_pairs) in enumerate(
            zip(shards, rows, pairs, strict=True), first
        ):
            num_back = num_rows if self._presummed else num_pairs
            try:
                call = self._peers.peer(self._uids[shard]).begin(
                    dispatch_bytes(num_rows, num_pairs, row_bytes),
                    max(num_back * row_bytes, 4 * num_pairs),  # a NOT_MINE must fit too
                )
            except PeerLostError as error:
                self._fail(sent, c, error)
                continue
            if call is None:
                sent.num_sent = c
                break
            body_address_C[c] = call.body_address
            begun.append((call, num_rows, num_pairs))
            sent.waiting.append((c, call))
        else:
            sent.num_sent = sent.num_calls
        if not begun:
            return
        plan.pack(
            sent.index_TK, sent.weight_TK, sent.num_tokens, hidden_TD.data_ptr(), row_bytes,
            first, sent.num_sent, sent.call_TK, sent.row_TK, sent.pos_TK,
            sent.call_rows_C, sent.call_pairs_C, body_address_C,
        )  # fmt: skip
        flags = _PRESUMMED if self._presummed else 0
        dtype = DTYPE_CODES[hidden_TD.dtype]
        for call, num_rows, num_pairs in begun:
            self._peers.start(
                call, _DISPATCH, flags, self._deadline_s, sent.epoch, sent.layer,
                num_rows, num_pairs, width, dtype,
            )  # fmt: skip

    def _collect(self, sent: Dispatch) -> None:
        """Until every pair has an answer: wait, send what had no credit, retry what failed."""
        attempt = 0
        while True:
            if sent.waiting:
                self._peers.finish([call for _, call in sent.waiting], self._deadline_s)
                for c, call in sent.waiting:
                    self._take(sent, c, call)
                sent.waiting.clear()
            if sent.num_sent < sent.num_calls:
                self._spill(sent)
                self._send(sent)
                if not sent.waiting and sent.num_sent < sent.num_calls:
                    self._regain_credits(sent)
                continue
            if not sent.failed:
                return
            attempt += 1
            if attempt > RETRIES_MAX:
                assert sent.error is not None, f"calls {sent.failed} failed without an error"
                raise sent.error
            sent.call_TK[np.isin(sent.call_TK, sent.failed)] = plan.PENDING
            sent.failed.clear()
            self._refresh()
            self._plan(sent)
            self._send(sent)

    def _regain_credits(self, sent: Dispatch) -> None:
        """The next call's peer has no credit although we hold none: late answers may give some
        back; else the connection is dropped, and a new one starts with all of them."""
        uid = self._uids[sent.call_shard_C[sent.num_sent]]
        self._peers.drain()
        if uid not in self._peers.live_uids or self._peers.peer(uid).has_credit:
            return
        if self._peers.peer(uid).has_live_calls:  # of another `Dispatch`: ours to wait for
            self._fail(sent, sent.num_sent, DeadlineError(f"{uid}: another dispatch has it all"))
            sent.num_sent += 1
            return
        log.warning("%s: every credit is with calls given up; connecting again", uid)
        self._peers.disconnect(uid)

    def _take(self, sent: Dispatch, c: int, call: Call) -> None:
        """Books the outcome of one call. Raises ClusterError when the shard failed on it."""
        if call.error is not None:
            call.release()
            if not isinstance(call.error, PeerLostError | DeadlineError | FencedError):
                raise call.error
            self._fail(sent, c, call.error)
            return
        reply = call.reply
        assert reply is not None, f"call {c} has neither answer nor error"
        if reply.kind == _NOT_MINE:
            call.peer.counters.not_mine += 1
            experts = np.frombuffer(call.reply_body, "<i4").tolist()
            call.release()
            shard = int(sent.call_shard_C[c])
            for expert in experts:
                remove_replica(self._tables[sent.layer], expert, shard)
            sent.failed.append(c)
            sent.error = PeerLostError(
                f"{call.peer.uid} does not hold experts {experts[:16]} of layer {sent.layer}, "
                f"view {sent.epoch} says it does"
            )
            return
        num_back = int((sent.call_rows_C if self._presummed else sent.call_pairs_C)[c])
        num_bytes = num_back * sent.row_bytes
        if (reply.num_rows, reply.length) != (num_back, num_bytes):
            call.release()
            raise FrameError(
                f"{call.peer.uid} answered {reply.num_rows} rows in {reply.length} bytes, "
                f"expected are {num_back} in {num_bytes}"
            )
        sent.reply_address_C[c] = call.reply_address
        sent.answered.append((c, call))

    def _fail(self, sent: Dispatch, c: int, error: ClusterError) -> None:
        """Call `c` needs another shard; its own is not asked again before a view says so."""
        shard = int(sent.call_shard_C[c])
        self._usable_S[shard] = 0
        if not isinstance(error, PeerLostError):
            self.suspects.add(self._uids[shard])
        sent.failed.append(c)
        sent.error = error
        log.warning("layer %d: %s", sent.layer, error)

    def _spill(self, sent: Dispatch) -> None:
        """Copies answers out of their regions, so that their credits can be used again."""
        for c, call in sent.answered:
            assert call.reply is not None
            copy = Memory.anonymous(call.reply.length)
            copy.view[: call.reply.length] = call.reply_body
            sent.reply_address_C[c] = copy.address
            sent.spilled.append(copy)
            call.release()
        sent.answered.clear()

    def _refresh(self) -> bool:
        """Asks for a newer view and reconnects what was lost; True when anything changed."""
        view = self._view
        if self._refresh_view is not None:
            view = self._refresh_view(self._view.epoch)
        if view.epoch > self._view.epoch:
            self.set_view(view)
            return True
        self._peers.apply_view(self._view)
        before = self._usable_S
        self._note_usable()
        return bool((self._usable_S != before).any())

    def _note_usable(self) -> None:
        live = set(self._peers.live_uids) - self.suspects
        self._usable_S = np.array([uid in live for uid in self._uids], np.uint8)
