"""Dispatch and combine: a layer's rows out to the shards that their tokens chose, and back.

    rows = dispatcher.moe(layer, hidden_TD, index_TK, weights_TK, num_tokens)
    # or, to compute something (shared experts) while the shards do:
    sent = dispatcher.dispatch(layer, hidden_TD, index_TK, weights_TK, num_tokens)
    rows = dispatcher.combine(sent)

Every (token, expert) pair goes to one replica (`choice.choose`), a token's row to each shard once.
A shard that does not hold an expert, is lost or is late costs a retry of its pairs on what the
refreshed view says: calls are stateless and replicas bitwise equal, so the result is the same.

An ordinary layer is one native call (`native_dispatch.py`); without the extension, and whenever
something is not ordinary, `python_dispatch.py` serves, with the same bits and the same counters.

Shape suffixes: T tokens (padding included), K top-k, D model width.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from remora.comm.accounting import TrafficCounters
from remora.comm.call_deadline import CallDeadline
from remora.comm.dispatch_handle import Dispatch
from remora.comm.limits import ROWS_PER_CALL_MAX, TOP_K_MAX
from remora.comm.native import native_extension
from remora.comm.native_dispatch import NativeLayers
from remora.comm.peers import PeerSet
from remora.comm.python_dispatch import PythonLayers
from remora.comm.routes import Hold, Routes
from remora.comm.view import View

Combine = Literal["ordered", "presummed"]
PHASES = ("pack_ns", "wait_ns", "combine_ns", "experts_compute_ns")


class Dispatcher:
    """Routes the MoE layers of one dense rank; used from the thread that owns `peers`.

    Args:
        view: placement and members; its shards are connected to at once.
        peers: connections; the dispatcher applies views to it.
        combine: "ordered" (one row back per pair, summed here in top-k order: `exact`) or
            "presummed" (one row back per token and shard: `fast`).
        deadline_s: of one attempt, at most (`call_deadline.py`); a shard over it is a suspect until
            it has answered after all, or until the next epoch.
        refresh_view: called with the epoch that disappointed; returns the newest view (it may
            block to fetch it). None keeps the view for good.
        hold: called when an expert has no live replica; waits for what `routes.Hold` says. None:
            such a layer fails at once.
        rows_per_call_max: larger dispatches go out in slices, so that other ranks' decode goes
            between them.
        native: False keeps to Python where the extension is there, to compare with it.

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
        hold: Hold | None = None,
        rows_per_call_max: int = ROWS_PER_CALL_MAX,
        native: bool = True,
    ) -> None:
        if combine not in ("ordered", "presummed"):
            raise ValueError(f"combine is {combine!r}, must be 'ordered' or 'presummed'")
        self._peers = peers
        presummed = combine == "presummed"
        self._routes = Routes(view, peers, refresh_view, hold)
        deadline = CallDeadline(deadline_s)
        settings = (peers, self._routes, presummed, deadline, rows_per_call_max)
        self._python = PythonLayers(*settings)
        native = native and native_extension() is not None
        self._native = NativeLayers(*settings) if native else None

    @property
    def counters(self) -> TrafficCounters:
        """Bytes, rows and pairs per peer."""
        return self._peers.counters

    @property
    def view(self) -> View:
        """The view in force."""
        return self._routes.view

    @property
    def suspects(self) -> set[str]:
        """Shards that were late or of another life, under the view in force."""
        return self._routes.suspects

    @property
    def is_complete(self) -> bool:
        """Whether every expert of the view has a replica that can be used, as far as is known."""
        return self._routes.is_complete

    def look_again(self) -> bool:
        """Takes late answers and dials lost shards; `is_complete` then. Between dispatches only."""
        self._routes.look_again()
        return self.is_complete

    def phases(self) -> dict[str, int]:
        """Where the layers' time went so far: `layers`, and nanoseconds of `pack_ns` (choice,
        layout, packing, sending), `wait_ns`, `combine_ns`, and `experts_compute_ns`: how long the
        slowest shard of each layer was in its kernels, which is a part of the first two."""
        totals = self._python.phases()
        if self._native is not None:
            totals = [a + b for a, b in zip(totals, self._native.phases(), strict=True)]
        return dict(zip(("layers", *PHASES), totals, strict=True))

    def take_sent(self) -> NDArray[np.int64]:
        """`[L, S]` pairs sent since the last call (`Routes.take_sent`); between dispatches only."""
        return self._routes.take_sent()

    def note_others(
        self,
        pairs_LS: NDArray[np.integer] | None,
        top_k: int,
        ranks_LS: NDArray[np.integer] | None = None,
    ) -> None:
        """Pairs that other dense groups sent, and other ranks of this one (`Routes.note_others`);
        between dispatches only."""
        self._routes.note_others(pairs_LS, top_k, ranks_LS)

    def moe(
        self,
        layer: int,
        hidden_TD: Tensor,
        index_TK: Tensor,
        weights_TK: Tensor,
        num_tokens: int,
    ) -> Tensor:
        """`combine(dispatch(...))`, in one native call when nothing stands against it."""
        _check(hidden_TD, index_TK, weights_TK, num_tokens)
        if self._native is None or not _is_plain(hidden_TD, index_TK, weights_TK):
            return self.combine(self.dispatch(layer, hidden_TD, index_TK, weights_TK, num_tokens))
        done = self._native.layer(layer, hidden_TD, index_TK, weights_TK, num_tokens)
        if isinstance(done, Tensor):
            return done
        return self.combine(
            done or self.dispatch(layer, hidden_TD, index_TK, weights_TK, num_tokens)
        )

    def step_experts(self) -> int:
        """Address of a `RemoraStepExperts` that answers layers of the next step as `moe` does, in
        the thread that runs it; 0: ask `moe`. Asked anew for every step, between dispatches."""
        return 0 if self._native is None else self._native.step_experts()

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
        _check(hidden_TD, index_TK, weights_TK, num_tokens)
        sent = Dispatch.of(self.view.epoch, layer, hidden_TD, index_TK, weights_TK, num_tokens)
        if self._native is None or not self._native.begin(sent):
            self._python.begin(sent)
        return sent

    def combine(self, sent: Dispatch) -> Tensor:
        """Waits for the answers and sums them: `[T, D]` of the rows' dtype, zeros from
        `num_tokens` on. Consumes `sent`.

        Raises:
            DeadlineError, PeerLostError: naming the peer, after retries; ClusterError: a shard
                failed on a call. Nothing of `sent` is under way any more.
        """
        try:
            out_TD = self._native.finish(sent) if self._native is not None else None
            return out_TD if out_TD is not None else self._python.finish(sent)
        finally:
            sent.release()


def _check(hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor, num_tokens: int) -> None:
    assert index_TK.shape == weights_TK.shape and index_TK.shape[1] <= TOP_K_MAX, (
        f"index {tuple(index_TK.shape)}, weights {tuple(weights_TK.shape)}, k <= {TOP_K_MAX}"
    )
    assert 0 <= num_tokens <= index_TK.shape[0] == hidden_TD.shape[0], (
        f"{num_tokens} tokens of {index_TK.shape[0]} indices and {hidden_TD.shape[0]} rows"
    )


def _is_plain(hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> bool:
    """Whether the native client can read these where they lie."""
    return (
        hidden_TD.is_contiguous()
        and index_TK.is_contiguous()
        and weights_TK.is_contiguous()
        and weights_TK.dtype in (torch.float32, torch.bfloat16)
    )
