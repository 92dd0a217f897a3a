"""Scenarios of the router's state machine as text: commands, `----`, what came of them."""

from support.router_rig import member

from remora.actors.router_state import (
    HomesLearned,
    LoadReported,
    Prompt,
    RouteAsked,
    RouterState,
    ViewAdopted,
)
from remora.comm.view import View, contiguous_placement


def replay(text: str) -> str:
    """The scenario with what the state machine answers now."""
    state = RouterState()
    parts = []
    for part in text.strip("\n").split("\n\n"):
        commands = part.split("\n----")[0]
        lines = [line for line in commands.splitlines() if line and not line.startswith("#")]
        answers = [answer for line in lines for answer in _run(state, line)]
        parts.append("\n".join([commands, "----", *answers]))
    return "\n\n".join(parts) + "\n"


def _run(state: RouterState, line: str) -> list[str]:
    command, *words = line.split()
    options = dict(word.split("=") for word in words if "=" in word)
    if command == "view":
        state.handle(ViewAdopted(_view(int(words[0]), words[1:]), 0.0))
        return [f"epoch {state.epoch}"]
    if command == "copies":
        state.handle(HomesLearned({host: float(value) for host, value in options.items()}))
        return []
    if command == "load":
        loads = state.loads(float(words[0]))
        return [", ".join(f"{uid} {count}" for uid, count in loads.items())]
    if command == "report":
        uid, _, life = words[1].partition("#")
        state.handle(
            LoadReported(
                group=uid,
                incarnation=int(life or 1),
                num_running=int(options["running"]),
                num_waiting=int(options["waiting"]),
                now_s=float(words[0]),
            )
        )
        return []
    assert command == "route", line
    first, last = (int(number) for number in words[1].split(".."))
    without = frozenset(options["without"].split(",")) if "without" in options else frozenset()
    prompt = Prompt(
        token_ids=tuple(range(first, last + 1)),
        num_tokens=int(options.get("of", last + 1 - first)),
        num_sequences=int(options.get("sequences", 1)),
        unreachable=without,
    )
    choices = state.handle(RouteAsked(prompts=(prompt,), now_s=float(words[0])))
    return [
        f"{words[1]} -> {c.group}, {c.prefix_tokens} cached"
        + (f", {c.expected_copies:g} copies" if c.expected_copies >= 0 else "")
        for c in choices
        if c is not None
    ] or [f"{words[1]} -> nobody"]


def _view(epoch: int, words: list[str]) -> View:
    """`dense-0@host#incarnation`."""
    members = []
    for word in words:
        uid, _, where = word.partition("@")
        host, _, life = where.partition("#")
        members.append(member(uid, host, int(life or 1)))
    placement = contiguous_placement(num_experts=1, moe_layers=(0,), shard_uids=("shard-0",))
    return View(epoch=epoch, members=tuple(members), placement=placement)
