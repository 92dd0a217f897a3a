"""Who of the members has stopped making progress. Pure: beats and times in, verdicts out.

A beat is an answer that only a member which gets on can give: a shard's comes from the thread that
serves, between two calls; a dense group's tells its steps and what waits for one. So a process that
is stopped, or blocked, is found, whatever its sockets and its parent say.
"""

from collections.abc import Set as AbstractSet
from typing import Final

import msgspec

Life = tuple[str, int]  # uid, incarnation

ENDING_S: Final = 10.0  # for Ray to end a process that is stopped (measured: 5 s), and to tell
PAUSE_SHARE: Final = 0.5  # of `hang_s`: who has not looked for so long was stopped himself


class Beat(msgspec.Struct, frozen=True):
    """What a member answers. `waiting` counts work that should move `progress`."""

    progress: int = 0
    waiting: int = 0


class _Watched:
    def __init__(self, now_s: float) -> None:
        self.asked_s: float | None = None  # and not answered
        self.progress = -1
        self.moved_s = now_s


class HealthState:
    """Of one deployment.

    Args:
        hang_s: longest wait for a beat.
        stall_s: longest time in which work waits and `progress` stays.
    """

    def __init__(self, *, hang_s: float, stall_s: float) -> None:
        self._hang_s, self._stall_s = hang_s, stall_s
        self._watched: dict[Life, _Watched] = {}
        self._ending: dict[Life, float] = {}  # that hung, and when it was said
        self._looked_s: float | None = None

    def watch(self, lives: set[Life], now_s: float) -> None:
        """These are watched from now on, and no others."""
        known = self._watched
        self._watched = {life: known.get(life) or _Watched(now_s) for life in sorted(lives)}

    def also(self, lives: AbstractSet[Life], now_s: float) -> None:
        """These too, which others start again when they end: afresh, where they are not watched
        already; one that hung once its next life can be there."""
        self._ending = {life: at for life, at in self._ending.items() if now_s - at < ENDING_S}
        for life in sorted(lives - self._watched.keys() - self._ending.keys()):
            self._watched[life] = _Watched(now_s)

    def forget(self, life: Life) -> None:
        """This one is over, and not because it hung."""
        self._watched.pop(life, None)

    def look(self, now_s: float) -> list[tuple[Life, str]]:
        """Who hangs, and why; said once. Then `to_ask`."""
        if self._looked_s is not None and now_s - self._looked_s > PAUSE_SHARE * self._hang_s:
            for each in self._watched.values():  # answers may wait for us
                each.moved_s = now_s
                each.asked_s = now_s if each.asked_s is not None else None
        self._looked_s = now_s
        found = []
        for life, each in list(self._watched.items()):
            why = self._why(each, now_s)
            if why is not None:
                found.append((life, why))
                del self._watched[life]
                self._ending[life] = now_s
        return found

    def to_ask(self, now_s: float) -> list[Life]:
        """Who is to be asked for a beat now."""
        lives = [life for life, each in self._watched.items() if each.asked_s is None]
        for life in lives:
            self._watched[life].asked_s = now_s
        return lives

    def answered(self, life: Life, beat: Beat | None, now_s: float) -> None:
        """A beat; None: the call failed, which says nothing of progress."""
        each = self._watched.get(life)
        if each is None:
            return
        each.asked_s = None
        if beat is not None and (beat.progress != each.progress or beat.waiting == 0):
            each.progress, each.moved_s = beat.progress, now_s

    def _why(self, each: _Watched, now_s: float) -> str | None:
        if each.asked_s is not None and now_s - each.asked_s > self._hang_s:
            return f"it has given no sign of progress for {now_s - each.asked_s:.1f} s"
        if now_s - each.moved_s > self._stall_s:
            return f"work waits and nothing has moved for {now_s - each.moved_s:.1f} s"
        return None
