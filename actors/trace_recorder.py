"""Records a dense rank's real routing, beside the counting, until enough is recorded.

Rows come from the thread that counts (`routing_tap.py`), never from a step. They wait here as
compressed blocks until somebody takes them; over `BUFFER_BYTES_MAX` they are left out and counted.

Shape suffixes: L MoE layers, T rows, K top-k.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from remora.actors.launch import Launch
from remora.comm.trace import TraceHeader, encode_block, make_trace

if TYPE_CHECKING:  # torch and numba: whoever is given a `Recorded` imports this
    from remora.actors.model_spec import ModelSpec
    from remora.comm.routing_counter import Run

BUFFER_BYTES_MAX: Final = 32 << 20


def header_of(launch: Launch, spec: "ModelSpec") -> TraceHeader:
    """Of the traces of a deployment's ranks."""
    return TraceHeader(
        model=launch.model,
        num_experts=spec.num_experts,
        top_k=spec.top_k,
        moe_layers=spec.moe_layers,
        vocab_size=spec.vocab_size,
        note=f"deployment {launch.deployment}",
    )


class Recorded(msgspec.Struct, frozen=True, kw_only=True):
    """What one dense rank recorded since it was last asked."""

    blocks: list[bytes]  # "TOKS" records of `comm/trace.py`, without labels
    tokens_left_out: int  # so far: nobody took them in time, or the step was not looked at
    tokens_left: int  # that will still be recorded


class TraceRecorder:
    """Not thread-safe: the tap calls it under its own lock.

    Args:
        tokens_max: recorded at most.
        name: of who asked.
    """

    def __init__(self, header: TraceHeader, tokens_max: int, name: str) -> None:
        header.check()
        self.name = name
        self._header = header
        self._tokens_left = tokens_max
        self._left_out = 0
        self._blocks: list[bytes] = []

    def note(self, ids_LTK: NDArray[np.int64], runs: "Sequence[Run]") -> None:
        """Keep rows; those of runs without token ids (computed before recording began) go."""
        if any(not run.token_ids for run in runs):
            known_T = np.repeat([bool(r.token_ids) for r in runs], [r.num_tokens for r in runs])
            ids_LTK = ids_LTK[:, known_T]
            runs = [run for run in runs if run.token_ids]
        num_tokens = min(ids_LTK.shape[1], self._tokens_left)
        if not num_tokens:
            return
        self._tokens_left -= num_tokens
        if sum(map(len, self._blocks)) > BUFFER_BYTES_MAX:
            self._left_out += num_tokens
            return
        counts = [run.num_tokens for run in runs]
        trace = make_trace(
            self._header,
            experts_LTK=ids_LTK,
            request_T=np.repeat([run.request for run in runs], counts),
            token_T=np.concatenate([run.token_ids for run in runs]),
            position_T=np.concatenate([run.start + np.arange(run.num_tokens) for run in runs]),
            phase_T=np.repeat([run.phase for run in runs], counts),
        )
        self._blocks.append(encode_block(trace.select(slice(0, num_tokens))))

    def skip(self, num_tokens: int) -> None:
        """So many were routed and not looked at."""
        self._left_out += num_tokens

    def take(self) -> Recorded:
        """What waits."""
        blocks, self._blocks = self._blocks, []
        return Recorded(
            blocks=blocks, tokens_left_out=self._left_out, tokens_left=self._tokens_left
        )
