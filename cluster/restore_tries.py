"""How often members that died were brought back in vain, and when each is tried again. Pure.

In vain is also what comes back and dies again within `settled_s`: a member that its first requests
kill would else come and go for ever, and disturb all streams each time.
"""

import math
from collections.abc import Collection
from typing import Final

RESTORES_MAX: Final = 8  # tries to bring one member back, before somebody must look


class RestoreTries:
    """Of one life of the coordinator; each member by itself, so that one that finds no place keeps
    no other waiting.

    Who has just died is due at once. What failed is due after `retry_s`, then after twice as long,
    and so on: what fails at once (a full disk, a host without memory) has two minutes to get better
    with a `retry_s` of 1.
    """

    def __init__(self, retry_s: float, settled_s: float) -> None:
        self._retry_s = retry_s
        self._settled_s = settled_s
        self._back_s: dict[str, float] = {}  # when each came back
        self._failed: dict[str, int] = {}  # in a row
        self._due_s: dict[str, float] = {}  # of those that failed

    def back(self, uids: Collection[str], now_s: float) -> None:
        """These are there again."""
        for uid in uids:
            self._due_s.pop(uid, None)
            self._back_s[uid] = now_s

    def died(self, uid: str, now_s: float) -> bool:
        """A member that was there has died; whether it is given up with it."""
        if now_s - self._back_s.pop(uid, -math.inf) < self._settled_s:
            return self.failed(uid, now_s)
        self._failed.pop(uid, None)
        self._due_s.pop(uid, None)
        return False

    def forget_all(self) -> None:
        """Somebody has looked: all are tried as if for the first time."""
        self._failed.clear()
        self._due_s.clear()
        self._back_s.clear()

    def failed(self, uid: str, now_s: float) -> bool:
        """A try has failed; whether this member is given up with it."""
        count = self._failed[uid] = self._failed.get(uid, 0) + 1
        self._due_s[uid] = now_s + self._retry_s * 2.0 ** (count - 1)
        return count == RESTORES_MAX

    def due(self, uids: Collection[str], now_s: float) -> list[str]:
        """Who of `uids` is to be tried now."""
        return [u for u in self.hopeful(uids) if self._due_s.get(u, now_s) <= now_s]

    def next_s(self, uids: Collection[str], now_s: float) -> float | None:
        """When the first of `uids` is due; None: none ever will be."""
        return min((self._due_s.get(u, now_s) for u in self.hopeful(uids)), default=None)

    def hopeful(self, uids: Collection[str]) -> list[str]:
        """Who of `uids` is not given up."""
        return sorted(uid for uid in uids if self._failed.get(uid, 0) < RESTORES_MAX)
