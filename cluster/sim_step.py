"""A step of the simulator's dense rank, while it is computed."""

from remora.actors.dense_events import StepPlan


class SimStep:
    """Rows on their way through the layers; `begun` are those that it started with."""

    def __init__(self, plan: StepPlan, rows: list[int]) -> None:
        self.plan = plan
        self.begun = rows
        self.rows = list(rows)
        self.layer = -1  # index into LAYERS
        self.outputs: list[list[int]] = []
        self.waiting: dict[int, tuple[str, list[tuple[int, int, int]]]] = {}  # by call
        self.failed: list[tuple[int, int, int]] = []
        self.attempts = 0
        self.held_since_s: float | None = None
        self.held_s = 0.0  # in holds of this layer that are over
        self.error = ""  # of a call, the last one
        self.failure = ""  # of the step, once it is over
