"""Stop strings over text that arrives in pieces: nothing is sent that a stop may yet swallow.

`StopScanner.push` gives the text that may go out now. It holds back the longest end of the text
that begins a stop string, at most `STOP_CHARS_MAX - 1` characters, so a piece costs the same at any
length of the answer. `naive_stop` is the slow twin: the whole text at once.
"""

from collections.abc import Sequence


class StopScanner:
    """Looks for the first of several stop strings in a stream of text."""

    __slots__ = ("_held", "_longest", "_stops", "matched", "num_sent")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max((len(stop) for stop in self._stops), default=0)
        self._held = ""
        self.matched: str | None = None  # the stop string that ended the text
        self.num_sent = 0  # characters given out

    def push(self, text: str, *, may_stop: bool = True) -> str:
        """Text that can be sent now.

        Args:
            text: what the model just said.
            may_stop: False while `min_tokens` forbids an end; a stop string then is plain text.
        """
        if self._stops:
            text = self._held + text
            cut, stop = _first_stop(text, self._stops) if may_stop else (0, None)
            if stop is not None:
                self.matched, self._held = stop, ""
            else:
                cut = len(text) - self._num_held(text)
                self._held = text[cut:]
            text = text[:cut]
        self.num_sent += len(text)
        return text

    def finish(self) -> str:
        """The held text: the answer ended, no stop string can follow."""
        text, self._held = self._held, ""
        self.num_sent += len(text)
        return text

    def _num_held(self, text: str) -> int:
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) and length < len(stop) for stop in self._stops):
                return length
        return 0


def naive_stop(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """Slow twin: the text up to the stop string that is complete first, and which one it is."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


def _first_stop(text: str, stops: Sequence[str]) -> tuple[int, str | None]:
    """Where the stop string that is complete first begins, and it; of two the longer.

    By the end and not by the beginning, so that the answer does not depend on how the text was
    cut into pieces.
    """
    best: tuple[int, int, str] | None = None
    for stop in stops:
        at = text.find(stop)
        if at >= 0 and (best is None or (at + len(stop), at) < best[:2]):
            best = (at + len(stop), at, stop)
    return (len(text), None) if best is None else (best[1], best[2])
