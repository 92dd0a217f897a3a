"""Which dense group takes a request. Pure: events in, answers out; time is an argument.

    ViewAdopted, LoadReported, HomesLearned --+
    RouteAsked -------------------------------+--> handle() -> list[Choice | None]

A group's cost for a prompt, in tokens to compute:

    SEQUENCE_TOKENS x sequences that it has, what was routed since its last report included
    + prompt tokens that are not in its prefix cache
    + COPY_TOKENS x remote copies that a token of the prompt is expected to make x prompt tokens

Prompts that are asked about together get the groups of least cost for all of them, one min-cost
flow (`homes.assign_admitted`), in which a group's load counts those that come to it before. Prompts
that begin alike are an exception: the first is given a group, then the others, which so see where
the beginning went.

The prefix index remembers where prompts went, not what a cache still holds: a wrong guess costs the
prefill that it hoped to save. Keys are a SHA-256 chain over blocks of 16 tokens, as the dense
groups' own (`blocks.py`). Everything is bounded.
"""

import hashlib
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from remora.comm.homes import assign_admitted
from remora.comm.view import View

BLOCK_TOKENS = 16
SEQUENCE_TOKENS = 256.0  # what a sequence that runs delays a new one by: chosen, not measured
SILENT_TOKENS = 1e9  # of a group that is asked last
FLOW_PROMPTS_MAX = 32  # of one flow; more are taken one lot after the other
COPY_TOKENS = 0.25  # one remote copy of a token in every layer: chosen, not measured
PREFIX_BLOCKS_MAX = 1 << 16
PREFIX_GROUPS_MAX = 4  # groups remembered of one block, the latest
KEY_BYTES = 12
SETTLE_S = 1.0  # a report counts what was routed longer ago than this
FORGET_S = 60.0  # a group that never reports: what was routed is taken to be over
SILENT_S = 30.0  # a group that reported and stopped is asked last, or after
SILENT_REPORTS = 4  # periods that it let pass, whichever is longer
REPORTS_S_MAX = 60.0  # `router_reporter.PERIOD_MAX_S`, which is beside what knows Ray
ROUTED_MAX = 1 << 14  # noted of one group between two reports


@dataclass(frozen=True, slots=True)
class ViewAdopted:
    """The coordinator committed a view; its dense members are the groups."""

    view: View
    now_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReported:
    """What a dense group has to do."""

    group: str
    incarnation: int
    num_running: int
    num_waiting: int
    now_s: float


@dataclass(frozen=True, slots=True)
class HomesLearned:
    """Remote copies of a token, per layer, by host of its dense group."""

    copies: Mapping[str, float]  # of all traffic
    of_prompt: Callable[[Sequence[int]], Mapping[str, float]] | None = None  # by its token ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt of a request."""

    token_ids: tuple[int, ...]  # at least the beginning
    num_tokens: int  # of all of it
    num_sequences: int = 1
    unreachable: frozenset[str] = frozenset()  # groups that whoever asks cannot reach


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteAsked:
    """Where these prompts go, of one request or of several that came at once."""

    prompts: tuple[Prompt, ...]
    now_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Where one prompt goes."""

    group: str
    prefix_tokens: int
    expected_copies: float  # negative: unknown


Event = ViewAdopted | LoadReported | HomesLearned | RouteAsked


@dataclass(slots=True)
class _Group:
    host: str
    incarnation: int
    reported: int = 0  # sequences at the last report
    reported_s: float | None = None
    routed: deque[tuple[float, int]] = field(default_factory=deque)  # since its last report
    num_routed: int = 0  # sequences in `routed`

    def sequences(self, now_s: float) -> int:
        """That it has, as far as is known."""
        self.settle(now_s, FORGET_S)
        return self.reported + self.num_routed

    def told(self, now_s: float) -> int:
        """The same for a thread that only looks: nothing is changed."""
        routed = tuple(self.routed)  # a copy that no other thread gets in the way of
        return self.reported + sum(n for at_s, n in routed if now_s - at_s <= FORGET_S)

    def take(self, count: int, now_s: float) -> None:
        """It is being sent that many more."""
        self.routed.append((now_s, count))
        self.num_routed += count
        if len(self.routed) > ROUTED_MAX:
            self.num_routed -= self.routed.popleft()[1]

    def settle(self, now_s: float, age_s: float) -> None:
        """What was routed longer ago than `age_s` counts no more."""
        while self.routed and now_s - self.routed[0][0] > age_s:
            self.num_routed -= self.routed.popleft()[1]

    def is_silent(self, now_s: float, silent_s: float) -> bool:
        """It reported once, and stopped."""
        return self.reported_s is not None and now_s - self.reported_s > silent_s


@dataclass(frozen=True, slots=True)
class _Asked:
    prompt: Prompt
    keys: list[bytes]

    @classmethod
    def of(cls, prompt: Prompt) -> "_Asked":
        return cls(prompt, block_keys(prompt.token_ids))


class RouterState:
    """See the head of this file.

    Args:
        report_every_s: between two reports of a group, which takes `REPORTS_S_MAX` at most.
    """

    def __init__(self, report_every_s: float = 2.0) -> None:
        self._silent_s = max(SILENT_S, SILENT_REPORTS * min(report_every_s, REPORTS_S_MAX))
        self.view: View | None = None
        self._groups: dict[str, _Group] = {}
        self._homes = HomesLearned({})
        self._prefixes: OrderedDict[bytes, tuple[str, ...]] = OrderedDict()

    @property
    def epoch(self) -> int:
        """Of the view in force; 0 before the first."""
        return self.view.epoch if self.view is not None else 0

    def handle(self, event: Event) -> list[Choice | None]:
        """Take an event in; a choice for each prompt of `RouteAsked`, none for other events.

        None where no group can be used: the caller decides alone then.
        """
        if isinstance(event, RouteAsked):
            return self._route(event)
        if isinstance(event, ViewAdopted):
            self._adopt(event.view)
        elif isinstance(event, LoadReported):
            self._note_load(event)
        else:
            self._homes = event
        return []

    def loads(self, now_s: float) -> dict[str, int]:
        """Sequences of each group as they are counted now. Any thread."""
        return {uid: group.told(now_s) for uid, group in self._groups.items()}

    def _adopt(self, view: View) -> None:
        if self.view is not None and view.epoch < self.view.epoch:
            return
        self.view = view
        groups = {}
        for member in view.members:
            if member.role != "dense":
                continue
            known = self._groups.get(member.uid)
            if known is not None and known.incarnation == member.incarnation:
                groups[member.uid] = known
            else:  # a new life has an empty cache
                self._forget_prefixes(member.uid)
                groups[member.uid] = _Group(member.endpoint.host, member.incarnation)
        for uid in self._groups.keys() - groups.keys():
            self._forget_prefixes(uid)
        self._groups = groups

    def _note_load(self, event: LoadReported) -> None:
        group = self._groups.get(event.group)
        if group is None or group.incarnation != event.incarnation:
            return  # of a life that is over, or of a view to come
        group.reported = event.num_running + event.num_waiting
        group.reported_s = event.now_s
        group.settle(event.now_s, SETTLE_S)

    def _route(self, event: RouteAsked) -> list[Choice | None]:
        asked = [_Asked.of(prompt) for prompt in event.prompts]
        choices: dict[int, Choice] = {}
        waiting = [
            number
            for number, prompt in enumerate(event.prompts)
            if self._groups.keys() - prompt.unreachable
        ]
        while waiting:
            begun: set[bytes] = set()
            now: list[int] = []
            for number in waiting:
                first = asked[number].keys[:1]
                if len(now) < FLOW_PROMPTS_MAX and not begun.intersection(first):
                    now.append(number)
                    begun.update(key for key in first if key not in self._prefixes)
            for number, choice in zip(
                now, self._flow([asked[number] for number in now], event.now_s), strict=True
            ):
                choices[number] = choice
            waiting = [number for number in waiting if number not in choices]
        return [choices.get(number) for number in range(len(event.prompts))]

    def _flow(self, asked: Sequence["_Asked"], now_s: float) -> list[Choice]:
        """Groups for prompts that each have one."""
        groups = sorted(self._groups)
        cost_QG = np.full((len(asked), len(groups)), np.inf)
        cached_Q = [self._cached(one.keys) for one in asked]
        copies_Q = [self._expected_copies(one.prompt.token_ids) for one in asked]
        for q, one in enumerate(asked):
            for g, uid in enumerate(groups):
                if uid not in one.prompt.unreachable:
                    cached = cached_Q[q].get(uid, 0) * BLOCK_TOKENS
                    cost_QG[q, g] = self._cost(self._groups[uid], one.prompt, cached, copies_Q[q])
        silent_G = [self._groups[uid].is_silent(now_s, self._silent_s) for uid in groups]
        cost_QG += SILENT_TOKENS * np.array(silent_G)
        counts = [max(1, one.prompt.num_sequences) for one in asked]
        chosen_Q = assign_admitted(
            cost_QG,
            np.array([float(self._groups[uid].sequences(now_s)) for uid in groups]),
            size=sum(counts) / len(counts),
            price=SEQUENCE_TOKENS,
        )
        choices = []
        for q, one in enumerate(asked):
            uid = groups[int(chosen_Q[q])]
            self._groups[uid].take(counts[q], now_s)
            self._remember(one.keys, uid)
            choices.append(
                Choice(
                    group=uid,
                    prefix_tokens=cached_Q[q].get(uid, 0) * BLOCK_TOKENS,
                    expected_copies=copies_Q[q].get(self._groups[uid].host, -1.0),
                )
            )
        return choices

    def _expected_copies(self, token_ids: tuple[int, ...]) -> Mapping[str, float]:
        if self._homes.of_prompt is None or not token_ids:
            return self._homes.copies
        return self._homes.of_prompt(token_ids)

    @staticmethod
    def _cost(group: _Group, prompt: Prompt, cached: int, copies: Mapping[str, float]) -> float:
        """Without load."""
        fresh = max(0, prompt.num_tokens - cached)
        return fresh + COPY_TOKENS * copies.get(group.host, 0.0) * prompt.num_tokens

    def _cached(self, keys: list[bytes]) -> dict[str, int]:
        """Blocks from the beginning that each group has been sent before."""
        found: dict[str, int] = {}
        for number, key in enumerate(keys, 1):
            groups = self._prefixes.get(key)
            if groups is None:
                break
            for uid in groups:
                if found.get(uid, 0) == number - 1:
                    found[uid] = number
        return found

    def _remember(self, keys: list[bytes], uid: str) -> None:
        for key in reversed(keys):  # the end of a prefix is forgotten before its beginning
            others = tuple(g for g in self._prefixes.pop(key, ()) if g != uid)
            self._prefixes[key] = (uid, *others[: PREFIX_GROUPS_MAX - 1])
        while len(self._prefixes) > PREFIX_BLOCKS_MAX:
            self._prefixes.popitem(last=False)

    def _forget_prefixes(self, uid: str) -> None:
        for key, groups in list(self._prefixes.items()):
            if uid in groups:
                left = tuple(g for g in groups if g != uid)
                if left:
                    self._prefixes[key] = left
                else:
                    del self._prefixes[key]


def block_keys(token_ids: tuple[int, ...]) -> list[bytes]:
    """A key for each whole block of the prompt, over all tokens up to its end.

    The last token is left out: its row is always computed, for its logits.
    """
    keys = []
    chain = hashlib.sha256()
    for begin in range(0, max(0, len(token_ids) - 1) // BLOCK_TOKENS * BLOCK_TOKENS, BLOCK_TOKENS):
        block = token_ids[begin : begin + BLOCK_TOKENS]
        chain.update(b"".join(token.to_bytes(4, "little") for token in block))
        keys.append(chain.copy().digest()[:KEY_BYTES])
    return keys
