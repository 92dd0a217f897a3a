"""Clients in the simulator: requests all the while, and a check of every token that comes back.

A request whose dense group dies is asked again of another one, prompt and tokens so far, as the
emit log allows.
"""

from functools import partial
from typing import TYPE_CHECKING, Final

from remora.cluster.sim_model import NOTHING, VOCABULARY, Cell, advanced, token_of
from remora.cluster.sim_network import Violation
from remora.cluster.sim_rank import STEP_S, SimRank
from remora.comm.messages import SamplingParams, SequenceOutput, Submit

if TYPE_CHECKING:
    from remora.cluster.sim_deployment import Deployment

EVERY_S: Final = 1.2  # on average
PROMPT_TOKENS: Final = (2, 6)
NEW_TOKENS: Final = (2, 14)
RUNNING_MAX: Final = 6  # what comes beyond that is refused, and does not come again
RETRY_S: Final = 0.2
# What a stream waits that goes on elsewhere because its dense group has retired, beyond what any
# request waits for its first token: the step that its group had begun (and does not end), and the
# time until it is asked again. Then it is a request like another, with a longer prompt.
MOVED_S: Final = STEP_S + RETRY_S
PROCESS: Final = "ingress#1"


class _Request:
    """One stream: what was asked, and what is to come next."""

    def __init__(
        self, number: int, prompt: list[int], max_tokens: int, now_s: float, hopeless_s: float
    ) -> None:
        self.number = number
        self.prompt = prompt
        self.max_tokens = max_tokens
        self.tokens: list[int] = []
        self.attempt = 0
        self.owner = ""  # process
        self.last_s = now_s
        self.longest_gap_s = 0.0
        self.longest_wait_s = 0.0  # as that, without MOVED_S where it was moved, or want of room
        self.is_moved = False  # since the last token
        self.hopeless_s = hopeless_s  # of `SimPlaces`, then
        self.finished: str | None = None
        self.cell: Cell = NOTHING
        for token_id in prompt:
            self.cell = advanced(self.cell, token_id)

    @property
    def name(self) -> str:
        return f"{self.number}.{self.attempt}"


class SimIngress:
    """Sends requests until `close`, and holds invariants 1, 2, 3."""

    def __init__(self, world: "Deployment") -> None:
        self.requests: list[_Request] = []
        self.num_tokens = 0
        self.num_errors = 0
        self._world = world
        self._running: dict[str, _Request] = {}  # by name
        self._unplaced: list[_Request] = []  # as long as there is no dense group
        self._open = True
        world.network.start(PROCESS)
        world.network.on_death.append(self._on_death)

    @property
    def num_running(self) -> int:
        """Requests that are not finished."""
        return len(self._running) + len(self._unplaced)

    @property
    def longest_gap_s(self) -> float:
        """Longest time without a token of any request that ran."""
        return max((r.longest_gap_s for r in self.requests), default=0.0)

    @property
    def longest_wait_s(self) -> float:
        """As `longest_gap_s`, without what it takes to leave a dense group that retires, and the
        time in which there was no room for what was needed."""
        return max((r.longest_wait_s for r in self.requests), default=0.0)

    def begin(self) -> None:
        """Requests come from now on."""
        self._arrive()

    def close(self) -> None:
        """No more requests; those that run go on."""
        self._open = False

    def tell(self, rank: SimRank, source: str, output: SequenceOutput) -> None:
        """What a step of a dense group gave."""
        request = self._running.get(output.request_id)
        if request is None or request.owner != rank.process:
            raise Violation(f"{source}: {output} of {rank.process} is for nobody")
        for token_id in output.token_ids:
            self._token(rank, request, token_id)
        if output.finish_reason is not None:
            del self._running[output.request_id]
            self._finish(rank, request, output)

    # -- inside -------------------------------------------------------------------------------

    def _arrive(self) -> None:
        chance = self._world.chance
        if not self._open:
            return
        prompt = [chance.randrange(VOCABULARY) for _ in range(chance.randint(*PROMPT_TOKENS))]
        number, now_s = len(self.requests), self._world.clock.now_s
        hopeless_s = self._world.places.hopeless_s
        request = _Request(number, prompt, chance.randint(*NEW_TOKENS), now_s, hopeless_s)
        if self.num_running < RUNNING_MAX:
            self.requests.append(request)
            self._submit(request)
        self._world.clock.after(EVERY_S * 2 * chance.random(), self._arrive)

    def _submit(self, request: _Request) -> None:
        ranks = self._world.ranks_by_load()
        if not ranks:  # until one is back
            if not self._unplaced:
                self._world.clock.after(RETRY_S, self._submit_all)
            self._unplaced.append(request)
            return
        rank = ranks[0]
        request.attempt += 1
        request.owner = rank.process
        self._running[request.name] = request
        submit = Submit(
            request_id=request.name,
            prompt_ids=[*request.prompt, *request.tokens],
            params=SamplingParams(
                max_tokens=request.max_tokens - len(request.tokens), ignore_eos=True
            ),
        )
        deliver = partial(rank.submit, submit, PROCESS)
        self._world.network.send(PROCESS, rank.process, deliver)

    def _submit_all(self) -> None:
        """Those for which there was no dense group."""
        requests, self._unplaced = self._unplaced, []
        for request in requests:
            self._submit(request)

    def _token(self, rank: SimRank, request: _Request, token_id: int) -> None:
        expected = token_of(request.cell)
        if token_id != expected:
            raise Violation(
                f"1: token {len(request.tokens)} of request {request.number} is {token_id} and not"
                f" {expected} ({rank.process}, epoch {rank.routes.epoch})"
            )
        now_s = self._world.clock.now_s
        gap_s = now_s - request.last_s
        request.longest_gap_s = max(request.longest_gap_s, gap_s)
        wait_s = gap_s - MOVED_S if request.is_moved else gap_s
        hopeless_s = self._world.places.hopeless_s
        wait_s -= hopeless_s - request.hopeless_s
        request.hopeless_s = hopeless_s
        request.longest_wait_s = max(request.longest_wait_s, wait_s)
        request.is_moved = False
        request.last_s = now_s
        request.tokens.append(token_id)
        request.cell = advanced(request.cell, token_id)
        self.num_tokens += 1

    def _finish(self, rank: SimRank, request: _Request, output: SequenceOutput) -> None:
        request.finished = output.finish_reason
        if output.finish_reason == "error":
            self.num_errors += 1
            self._world.trace(f"request {request.number} fails: {output.error}")
            self._world.on_error(rank, request.number, output.error or "")
        elif len(request.tokens) != request.max_tokens:
            raise Violation(
                f"2: request {request.number} ends ({output.finish_reason}) after"
                f" {len(request.tokens)} of {request.max_tokens} tokens"
            )

    def _on_death(self, process: str) -> None:
        rank = self._world.ranks.get(process)
        is_planned = rank is not None and rank.retires
        for name, request in list(self._running.items()):
            if request.owner == process:
                del self._running[name]
                request.is_moved = is_planned and not self._world.faults.struck
                self._world.clock.after(RETRY_S, partial(self._submit, request))
