"""Operations that are undone because nobody wants them any more. Pure.

What is not committed is undone at once. Between two rounds of one that has several it is undone as
soon as it may be, also by the next life of the coordinator: views that are committed stay.
"""

import msgspec

from remora.cluster.coordinator_restores import MemberRestores
from remora.cluster.operation import BEFORE_COMMIT, Effect, Restore, TakeOver
from remora.cluster.operation_plan import same_slots
from remora.comm.errors import ConfigError

CANCELLED = "it was cancelled"


class Cancellations(MemberRestores):
    """A part of `CoordinatorState`."""

    def give_up(self, operation_id: str, reason: str, now_s: float) -> list[Effect]:
        """Undo an operation that waits for who joins; any other is left as it is."""
        self._now_s = now_s
        running = self.operation.operation_id if self.operation is not None else None
        if running == operation_id and self._is_preparing():
            self._abort(reason)
        return self._taken()

    def cancel(self, operation_id: str, now_s: float) -> list[Effect]:
        """Undo an operation as far as it is not committed; one that is over stays as it is.

        Raises:
            UnknownOperationError: there is none of that id.
            ConfigError: it brings back members that died; or all of it is committed.
        """
        self._now_s = now_s
        operation = self.known(operation_id)
        if operation.outcome != "running" or operation.is_unwanted:
            return []
        if isinstance(operation.target, Restore | TakeOver):
            raise ConfigError(
                f"{operation_id!r} brings back members that died: it is the coordinator's own, and"
                " gives way to what is asked for as long as it finds no place"
            )
        is_last = same_slots(self.view.placement.slots, operation.slots)
        if operation.step in ("drain", "free") and is_last:
            raise ConfigError(
                f"{operation_id!r} is committed and all but over (step {operation.step}): ask for"
                " what was by another one"
            )
        operation.is_unwanted = True  # also where that cannot be logged: the next life then goes on
        entry = msgspec.to_builtins(operation)
        self._log("unwanted", lambda: None, lambda _: None, operation=entry)
        return self._taken()

    def _heed(self) -> None:
        """Undo what is not wanted, once it may be."""
        operation = self.operation
        if operation is None or not operation.is_unwanted:
            return
        if operation.step in BEFORE_COMMIT and self._logging is None:
            self._abort(CANCELLED, ())
