"""Dense ranks that do not leave an older view: shards refuse them until they have. Pure."""

from collections.abc import Iterable

from remora.cluster.coordinator_calls import CoordinatorCalls
from remora.cluster.operation import Adopt, Fence


class CoordinatorFences(CoordinatorCalls):
    """See `CoordinatorState`."""

    def _fence(self) -> None:
        """Dense ranks that do not leave the old epoch: no frame of theirs may count any more."""
        late = [task for task in self._open() if isinstance(task, Adopt)]
        silent = ", ".join(self._silent())
        self._forget_calls()
        self._until_s = self._now_s + self._limits.drain_s
        if not late:
            self._odd(f"{silent} did not answer in step drain")
            self._go_on()
            return
        self.fenced |= {task.uid for task in late}
        self._unsure.clear()  # shards are told all of it
        self._odd(f"{', '.join(sorted(self.fenced))} fenced: no answer to epoch {self.view.epoch}")
        self._ask_fenced(task.uid for task in late)  # whoever wakes up is let in again
        for task in self._fences():
            self._ask(task)
        self._go_on()

    def _let_in(self, uid: str) -> None:
        self.fenced.discard(uid)
        self._aside_all(self._fences())

    def _has_left_older_views(self, uid: str) -> None:
        """When all have, after a restart, shards hear whom they are to refuse."""
        if uid in self._unsure:
            self._unsure.discard(uid)
            if not self._unsure:
                self._aside_all(self._fences())

    def _ask_fenced(self, uids: Iterable[str]) -> None:
        """Ranks that shards refuse, so that they cannot connect: to leave what is older first."""
        self._aside_all(Adopt(uid=uid, view=self.view, or_none=True) for uid in uids)

    def _fences(self) -> list[Fence]:
        fenced = tuple(sorted(self.fenced))
        uids = {*self.view.placement.slots, *self._held} - self.lost
        return [Fence(uid=uid, fenced=fenced) for uid in sorted(uids)]
