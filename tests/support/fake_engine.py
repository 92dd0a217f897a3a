"""A dense group without a model: the real state machine behind the real socket.

Everything an ingress sees is real (frames, authentication, scheduling, prefix cache, aborts, one
message a step); only the token that a step samples comes from a rule instead of a network.
"""

import queue
import threading
import zlib
from collections.abc import Sequence

from remora.actors.dense_events import (
    AbortRequested,
    DenseLimits,
    Event,
    RequestArrived,
    Slice,
    SliceResult,
    SourceLost,
    StatusChanged,
    StepDone,
)
from remora.actors.dense_state import DenseState
from remora.comm.connection import Connection, Frame
from remora.comm.messages import Abort, Pong, Submit, TokenLogprobs, decode_to_engine, encode
from remora.comm.server import FrameServer
from remora.comm.view import Member

HOST = "test-host"
TOKEN = b"0123456789abcdef0123456789abcdef"


class FakeEngine:
    """Samples `story[k]` as the k-th token, the seed choosing where in the story to begin.

    Greedy requests (temperature 0) begin at 0. A token biased by 100 is always taken. The story
    ends in `eos_id`. `pace_s` is the length of a step; `hold` stops between steps until `release`.
    """

    def __init__(
        self,
        story: Sequence[int],
        *,
        eos_id: int,
        vocab_size: int,
        max_model_len: int = 256,
        pace_s: float = 0.0,
        uid: str = "dense-0",
    ) -> None:
        self.story = list(story)
        self.eos_id = eos_id
        self.pace_s = pace_s
        self.uid = uid
        self.state = DenseState(
            DenseLimits(
                num_blocks=64 * (max_model_len // 16 + 1),
                max_model_len=max_model_len,
                vocab_size=vocab_size,
                eos_token_ids=frozenset({eos_id}),
                max_num_seqs=64,
                max_tokens_per_step=512,
            )
        )
        self.submitted: list[Submit] = []
        self.aborted: list[str] = []
        self.serving = True
        self.retires = False
        self.pongs = 0
        self.closed = False
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._go = threading.Event()
        self._go.set()
        self._connections: dict[int, Connection] = {}
        self._stopping = threading.Event()
        self._server = FrameServer(
            host_ip="127.0.0.1", token=TOKEN, on_frame=self._on_frame, on_lost=self._on_lost
        )
        self._thread = threading.Thread(target=self._run, name="fake-engine", daemon=True)

    def __enter__(self) -> "FakeEngine":
        self._server.start()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends both threads and every connection."""
        self.closed = True
        self._stopping.set()
        self._go.set()
        self._events.put(None)
        self._thread.join()
        self._server.close()

    def hold(self) -> None:
        """No further step until `release`."""
        self._go.clear()

    def release(self) -> None:
        """Steps go on."""
        self._go.set()

    def adopt(self, epoch: int) -> None:
        """Tell of a newer view."""
        self._events.put(StatusChanged(executor="eager", epoch=epoch))

    def member(self) -> Member:
        """How a view names this engine."""
        return Member(
            uid=self.uid,
            incarnation=0,
            role="dense",
            endpoint=self._server.endpoint(HOST),
            actor_name=self.uid,
        )

    def _on_frame(self, connection: Connection, frame: Frame) -> None:
        self._connections[connection.id] = connection
        message = decode_to_engine(bytes(frame.body))
        if isinstance(message, Submit):
            self.submitted.append(message)
            self._events.put(RequestArrived(message, connection.id))
        elif isinstance(message, Abort):
            self.aborted.append(message.request_id)
            self._events.put(AbortRequested(message.request_id, connection.id))
        else:
            stats = self.state.stats()
            why = None if self.serving else "shard-1 does not answer"
            pong = Pong(
                nonce=message.nonce,
                stats=stats,
                serving=self.serving and not self.retires,
                why_not=why,
                retires=self.retires,
            )
            connection.send_control(encode(pong))
            self.pongs += 1

    def _on_lost(self, connection: Connection) -> None:
        self._connections.pop(connection.id, None)
        self._events.put(SourceLost(connection.id))

    def _run(self) -> None:
        while not self._stopping.is_set():
            if not self.state.has_work:
                self._handle(self._events.get())
            while not self._events.empty():
                self._handle(self._events.get())
            self._go.wait()
            plan = self.state.next_step() if self.state.has_work else None
            if plan is not None:
                if self.pace_s:
                    self._stopping.wait(self.pace_s)
                results = [self._sample(piece) for piece in plan.slices]
                self._handle(StepDone(plan.step_id, results))
                self.state.check_integrity()

    def _handle(self, event: Event | None) -> None:
        if event is None:
            return
        for instruction in self.state.handle(event):
            connection = self._connections.get(int(instruction.source))
            if connection is not None:
                connection.send_control(encode(instruction.outputs))

    def _sample(self, piece: Slice) -> SliceResult:
        params = piece.params
        prompt = []
        first = piece.start + 1
        for token_id in piece.prompt_ids[first : first + piece.num_prompt_logprobs]:
            prompt.append(_logprobs(token_id, params.prompt_logprobs or 0))
        if not piece.sample:
            return SliceResult(prompt_logprobs=prompt)
        token_id = self._token(piece)
        wanted = params.logprobs
        return SliceResult(
            token_id=token_id,
            logprobs=None if wanted is None else _logprobs(token_id, wanted),
            prompt_logprobs=prompt,
        )

    def _token(self, piece: Slice) -> int:
        params = piece.params
        forced = [token_id for token_id, bias in params.logit_bias.items() if bias >= 100]
        if forced:
            return forced[0]
        begin = 0 if params.temperature == 0 else params.seed % len(self.story)
        index = begin + piece.num_outputs
        if index >= len(self.story) and not params.ignore_eos:
            if piece.num_outputs >= params.min_tokens:
                return self.eos_id
        return self.story[index % len(self.story)]


def _logprobs(token_id: int, num_top: int) -> TokenLogprobs:
    """A fixed distribution: the token itself first, then its neighbours."""
    first = -0.25 - (zlib.crc32(token_id.to_bytes(4, "little")) % 100) / 100
    return TokenLogprobs(
        token_id=token_id,
        logprob=first,
        rank=1,
        top_ids=[token_id + i for i in range(num_top)],
        top_logprobs=[first - i for i in range(num_top)],
    )
