"""How often members that died were brought back in vain, and when that is tried again. Pure."""

from collections.abc import Collection
from typing import Final

RESTORES_MAX: Final = 8  # tries to bring one member back, before somebody must look


class RestoreTries:
    """Of one life of the coordinator.

    All that is lost is restored together, so there is one time for the next try: what failed first
    is tried again after `retry_s`, then after twice as long, and so on. What fails at once (a full
    disk, a host without memory) has two minutes to get better with a `retry_s` of 1; a member that
    dies meanwhile does not wait for it.
    """

    def __init__(self, retry_s: float) -> None:
        self.due_s: float | None = None  # of the next try; None: at once
        self._retry_s = retry_s
        self._failed: dict[str, int] = {}  # in a row, by member

    def lost(self) -> None:
        """Another member has died."""
        self.due_s = None

    def over(self, uids: Collection[str], *, is_done: bool, now_s: float) -> list[str]:
        """A try is over; who of its members was given up with it."""
        self.due_s = None
        failed = {uid: self._failed.pop(uid, 0) + 1 for uid in uids}
        if is_done:
            return []
        self._failed |= failed
        self.due_s = now_s + self._retry_s * 2.0 ** (max(failed.values()) - 1)
        return [uid for uid in uids if failed[uid] == RESTORES_MAX]

    def is_hopeless(self, uid: str) -> bool:
        """Whether this member is given up."""
        return self._failed.get(uid, 0) >= RESTORES_MAX
