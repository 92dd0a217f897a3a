"""Text scenarios for the dense rank: commands, and under each what came of it.

    limits blocks=8 block_size=4 ...       first; fields of DenseLimits (eos=1,2 for the end tokens)
    arrive NAME prompt=1..6 max_tokens=3   also source=, priority=, says=7,8 (what it will sample)
                                           and every field of SamplingParams
    abort NAME [source=web]                lose SOURCE
    start | done | fail MESSAGE            plan a step; answer it; answer it with an error
    step [N]                               N times start and done
    run                                    until there is nothing to do
    state                                  queues and blocks

A file is a list of paragraphs: command lines, `----`, recorded output. `replay` gives the file as
it should be; a test compares it with what is there, or writes it (`pytest --record`). The state's
integrity is checked after every command.
"""

from collections.abc import Callable
from typing import Any

from support.fake_runner import FakeRunner

from remora.actors.dense_events import (
    AbortRequested,
    DenseLimits,
    Event,
    RequestArrived,
    SourceLost,
    StepDone,
    StepFailed,
    StepPlan,
)
from remora.actors.dense_state import DenseState
from remora.comm.messages import SamplingParams, SequenceOutput, Submit

_LIMIT_NAMES = {"blocks": "num_blocks", "eos": "eos_token_ids"}
_DEFAULT_LIMITS: dict[str, Any] = {
    "num_blocks": 8,
    "block_size": 4,
    "max_num_seqs": 4,
    "max_tokens_per_step": 16,
    "max_model_len": 64,
    "vocab_size": 100,
}


def parse_ids(text: str) -> tuple[int, ...]:
    """`1,2,7..9` -> (1, 2, 7, 8, 9)."""
    ids: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("..")
        ids.extend(range(int(first), int(last or first) + 1))
    return tuple(ids)


def _parse_value(name: str, text: str) -> Any:
    if name in ("prompt", "says", "stop_token_ids"):
        return parse_ids(text)
    if name == "eos_token_ids":
        return frozenset(parse_ids(text))
    if text in ("True", "False"):
        return text == "True"
    return int(text)


class Scenario:
    """One state machine, one fake runner and the story told so far."""

    def __init__(self) -> None:
        self._set_limits("")
        self._lines: list[str] = []

    def _set_limits(self, text: str) -> None:
        fields = dict(_DEFAULT_LIMITS)
        for word in text.split():
            name, _, value = word.partition("=")
            name = _LIMIT_NAMES.get(name, name)
            fields[name] = _parse_value(name, value)
        self.limits = DenseLimits(**fields)
        self.state = DenseState(self.limits)
        self.runner = FakeRunner(self.limits)

    def execute(self, command: str) -> list[str]:
        """Runs one command line; returns the lines that tell what happened."""
        self._lines = []
        verb, _, rest = command.partition(" ")
        verbs: dict[str, Callable[[str], None]] = {
            "limits": self._set_limits,
            "arrive": self._arrive,
            "abort": self._abort,
            "lose": lambda source: self._handle(SourceLost(source)),
            "start": lambda _: self._start(),
            "done": lambda _: self._done(),
            "fail": self._fail,
            "step": lambda count: self._steps(int(count or 1)),
            "run": lambda _: self._steps(1000),
            "state": lambda _: self._tell_state(),
        }
        verbs[verb](rest)
        self.state.check_integrity()
        return self._lines

    def _arrive(self, rest: str) -> None:
        name, *words = rest.split()
        fields: dict[str, Any] = {"max_tokens": 4}
        source = "web"
        for word in words:
            key, _, value = word.partition("=")
            if key == "source":
                source = value
            else:
                fields[key] = _parse_value(key, value)
        prompt_ids = list(fields.pop("prompt"))
        priority = fields.pop("priority", 0)
        self.runner.says[name] = list(fields.pop("says", ()))
        params = SamplingParams(**fields)
        submit = Submit(request_id=name, prompt_ids=prompt_ids, params=params, priority=priority)
        self._handle(RequestArrived(submit, source))

    def _abort(self, rest: str) -> None:
        name, _, source = rest.partition(" source=")
        self._handle(AbortRequested(name, source or "web"))

    def _start(self) -> None:
        plan = self.state.next_step()
        if plan is None:
            self._lines.append("nothing to do")
            return
        self._lines.append(f"step {plan.step_id}: {plan.num_tokens} tokens")
        for piece in plan.slices:
            end = piece.position
            what = f"{piece.start}" if end == piece.start + 1 else f"{piece.start}..{end - 1}"
            line = f"  {piece.request_id} computes {what} in {piece.block_table}"
            if piece.num_prompt_logprobs:
                line += f", {piece.num_prompt_logprobs} prompt logprobs"
            self._lines.append(line + (f", samples {end}" if piece.sample else ""))

    def _plan(self) -> StepPlan:
        plan = self.state.in_flight
        assert plan is not None, "no step is in flight: write `start` first"
        return plan

    def _done(self) -> None:
        plan = self._plan()
        self._handle(StepDone(plan.step_id, self.runner.run(plan)))

    def _fail(self, message: str) -> None:
        self._handle(StepFailed(self._plan().step_id, message))

    def _steps(self, count: int) -> None:
        for _ in range(count):
            self._start()
            if self.state.in_flight is None:
                return
            self._done()
            self.state.check_integrity()

    def _handle(self, event: Event) -> None:
        for instruction in self.state.handle(event):
            for output in instruction.outputs.outputs:
                self._lines.append(f"  -> {instruction.source}: {_tell_output(output)}")

    def _tell_state(self) -> None:
        stats = self.state.stats()
        self._lines.append(
            f"running {stats.num_running}, waiting {stats.num_waiting}, "
            f"blocks used {stats.kv_blocks_used} of {stats.kv_blocks_total}, "
            f"hits {stats.prefix_hit_tokens_total}, preemptions {stats.preemptions_total}"
        )


def _tell_output(output: SequenceOutput) -> str:
    parts = [output.request_id, *map(str, output.token_ids)]
    if output.num_cached_tokens:
        parts.append(f"(cached {output.num_cached_tokens})")
    if output.prompt_logprobs is not None:
        told = ",".join(f"{entry.token_id}:{entry.logprob}" for entry in output.prompt_logprobs)
        parts.append(f"(prompt logprobs {told})")
    parts.extend(f"(logprob {entry.logprob})" for entry in output.logprobs)
    if output.finish_reason is not None:
        parts.append(output.finish_reason)
    if output.stop_reason is not None:
        parts.append(f"by {output.stop_reason}")
    if output.error is not None:
        parts.append(f": {output.error}")
    return " ".join(parts)


def replay(text: str) -> str:
    """The scenario file `text` with the output its commands give now."""
    scenario = Scenario()
    paragraphs: list[str] = []
    for paragraph in text.strip().split("\n\n"):
        commands = paragraph.split("\n----")[0].strip().splitlines()
        output = [
            line
            for command in commands
            if not command.startswith("#")
            for line in scenario.execute(command.strip())
        ]
        paragraphs.append("\n".join([*commands, "----", *output]))
    return "\n\n".join(paragraphs) + "\n"
