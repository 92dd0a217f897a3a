"""Dispatch and combine in Python, with what can happen under way: no credit, errors, late answers.

Shape suffixes: T tokens (padding included), K top-k, D model width, E experts, R replicas, C calls.
"""

import logging
import time
from typing import Final

import numpy as np
import torch
from torch import Tensor

from remora.comm import choice, plan
from remora.comm.arena import DTYPE_CODES, Memory
from remora.comm.call import Call
from remora.comm.call_deadline import CallDeadline
from remora.comm.dispatch_handle import Dispatch
from remora.comm.errors import (
    ClusterError,
    DeadlineError,
    FencedError,
    FrameError,
    PeerLostError,
)
from remora.comm.peers import PeerSet
from remora.comm.replicas import remove_replica
from remora.comm.routes import Routes
from remora.comm.wire import HEADER_BYTES, PAIR_BYTES, Flag, Kind, dispatch_bytes

log = logging.getLogger(__name__)

RETRIES_MAX: Final = 3
_DISPATCH: Final = int(Kind.DISPATCH)
_NOT_MINE: Final = int(Kind.NOT_MINE)
_PRESUMMED: Final = int(Flag.PRESUMMED)


class PythonLayers:
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
        self._presummed = presummed
        self._deadline = deadline
        self._rows_per_call_max = rows_per_call_max
        self._num_layers = 0
        self._pack_ns = self._wait_ns = self._combine_ns = self._experts_compute_ns = 0
        plan.warm()

    def phases(self) -> list[int]:
        """Layers; nanoseconds of packing, waiting, combining, and of the experts' kernels."""
        phases_ns = [self._pack_ns, self._wait_ns, self._combine_ns, self._experts_compute_ns]
        return [self._num_layers, *phases_ns]

    def begin(self, sent: Dispatch) -> None:
        """Chooses, packs and sends. Raises PeerLostError as `Dispatcher.dispatch`."""
        begun_ns = time.perf_counter_ns()
        self._routes.forgive()
        if sent.num_tokens:
            try:
                self._plan(sent)
                self._send(sent)
            except BaseException:
                sent.release()
                raise
        self._pack_ns += time.perf_counter_ns() - begun_ns

    def finish(self, sent: Dispatch) -> Tensor:
        """Waits and sums: `[T, D]`. Raises as `Dispatcher.combine`."""
        self._collect(sent)
        begun_ns = time.perf_counter_ns()
        out_TD = torch.empty_like(sent.hidden_TD)
        plan.combine(
            sent.weight_TK, sent.num_tokens, out_TD.shape[1],
            out_TD.dtype is torch.bfloat16, self._presummed,
            sent.call_TK, sent.row_TK, sent.pos_TK, sent.reply_address_C,
            out_TD.data_ptr(), out_TD.shape[0],
        )  # fmt: skip
        self._num_layers += 1
        self._combine_ns += time.perf_counter_ns() - begun_ns
        return out_TD

    # -- inside ------------------------------------------------------------------------------

    def _plan(self, sent: Dispatch) -> None:
        """Chooses a shard for each PENDING pair and lays out calls from `num_calls` on."""
        shard_TK = np.empty(sent.call_TK.shape, np.int32)
        attempt = 0
        while True:
            routes = self._routes
            table_ER = routes.tables[sent.layer]
            missing = choice.choose(
                sent.index_TK, sent.num_tokens, table_ER, routes.host_S, routes.own_host,
                routes.usable_S, routes.load[sent.layer], int(routes.gain[0]), shard_TK,
                sent.call_TK,
            )  # fmt: skip
            if missing < 0:
                pending_TK = sent.call_TK[: sent.num_tokens] == choice.PENDING
                routes.count_sent(sent.layer, shard_TK[: sent.num_tokens][pending_TK])
                break
            assert missing < table_ER.shape[0], f"expert {missing} of {table_ER.shape[0]}"
            attempt += 1
            if attempt <= RETRIES_MAX and routes.refresh():
                continue
            attempt = 0
            if not self._hold(sent):
                raise sent.error or PeerLostError(
                    f"expert {missing} of layer {sent.layer} has no live replica in view "
                    f"{self._routes.view.epoch}; live shards: {self._peers.live_uids}"
                )
        rows_max = self._rows_max(sent)
        num_shards = len(routes.uids)
        bound = sent.num_calls + num_shards + sent.call_TK.size // rows_max
        sent.reserve_calls(bound)
        num_calls: int = plan.lay_out(
            sent.index_TK, sent.num_tokens, table_ER.shape[0], num_shards, rows_max,
            sent.num_calls, shard_TK, sent.call_TK, sent.row_TK, sent.pos_TK,
            sent.call_shard_C, sent.call_rows_C, sent.call_pairs_C,
        )  # fmt: skip
        sent.num_calls = num_calls
        sent.epoch = self._routes.view.epoch

    def _hold(self, sent: Dispatch) -> bool:
        """Waits for replicas, in all dispatches of these rows together as long as allowed."""
        begun_s = time.monotonic()
        found = self._routes.wait_for_replicas(sent.held_s)
        sent.held_s += time.monotonic() - begun_s
        return found

    def _rows_max(self, sent: Dispatch) -> int:
        """Rows of a call: at most `rows_per_call_max`, request and answer fit a region together,
        and each of them a frame."""
        row_bytes, top_k = sent.row_bytes, sent.call_TK.shape[1]
        out = row_bytes + PAIR_BYTES * top_k
        back = row_bytes * (1 if self._presummed else top_k)
        in_region: int = (self._peers.limits.region_bytes - 4 * HEADER_BYTES) // (out + back)
        in_frame: int = (self._peers.frame_bytes_max - 2 * HEADER_BYTES) // max(out, back)
        return max(1, min(self._rows_per_call_max, in_region, in_frame))

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
                call = self._peers.peer(self._routes.uids[shard]).begin(
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
                call, _DISPATCH, flags, self._deadline_s(), sent.epoch, sent.layer,
                num_rows, num_pairs, width, dtype,
            )  # fmt: skip

    def _collect(self, sent: Dispatch) -> None:
        """Until every pair has an answer: wait, send what had no credit, retry what failed."""
        attempt = 0
        while True:
            if sent.waiting:
                self._wait(sent)
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
            sent.call_TK[np.isin(sent.call_TK, sent.failed)] = choice.PENDING
            sent.failed.clear()
            self._routes.refresh()
            held_s = sent.held_s
            self._plan(sent)
            if sent.held_s > held_s:  # that bounds it; each wait may end with a shard that fails
                attempt = 0
            self._send(sent)

    def _wait(self, sent: Dispatch) -> None:
        """Until every waiting call has an answer or an error."""
        begun_ns = time.perf_counter_ns()
        calls = [call for _, call in sent.waiting]
        self._peers.finish(calls, self._deadline_s(), until_s=sent.until_s)
        took_ns = time.perf_counter_ns() - begun_ns
        if sent.until_s is None and all(call.error is None for call in calls):
            self._deadline.note(took_ns / 1e9)
        sent.until_s = None
        self._wait_ns += took_ns
        compute_us = max(call.reply.deadline_us if call.reply else 0 for call in calls)
        self._experts_compute_ns += compute_us * 1000

    def _deadline_s(self) -> float:
        return self._deadline.seconds(is_redundant=self._routes.is_redundant)

    def _regain_credits(self, sent: Dispatch) -> None:
        """The next call's peer has no credit although we hold none: late answers may give some
        back; else the connection is dropped, and a new one starts with all of them."""
        uid = self._routes.uids[sent.call_shard_C[sent.num_sent]]
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
                remove_replica(self._routes.tables[sent.layer], expert, shard)
            self._routes.note_redundant()
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
        self._routes.avoid(shard, error)
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
