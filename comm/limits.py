"""Bounds that several modules share, and that light processes ask for: nothing is imported here."""

from typing import Final

TOP_K_MAX: Final = 16  # experts a token; `csrc/choice.h` has it too
ROWS_PER_CALL_MAX: Final = 512  # of a dispatch; larger ones go out in slices
