"""One error tree for the whole of Remora.

    RemoraError
     |- UserError                 what somebody asked for cannot be; the text says what is allowed
     |   |- ConfigError           a configuration key or value (CLI: exit status 2)
     |   |   '- OperationIdTakenError  an operation of that id is known, and is another one
     |   |- UnsupportedModelError an architecture that cannot be served, and why
     |   |- WeightsError          a checkpoint file or tensor that is missing, damaged or unsafe
     |   |- TraceError            a file of routing traces or statistics: damaged, or not writable
     |   |- PlannerError          a planner of somebody's own returned what is no placement
     |   '- RequestError          an HTTP request (status, param and code of the error body)
     |       '- OverloadedError   429: the bounded queue is full; carries `retry_after_s`
     '- ClusterError              a process or a link of the cluster
         |- AuthError             a peer that does not know the cluster's token
         |- FrameError            bytes that are no frame, or one over its bound
         |- PeerLostError         a connection closed or refused under a call
         |- DeadlineError         a peer did not answer within its deadline
         |- OperationRunsError    another operation runs, and there is one at a time
         |- UnknownOperationError no operation of that id is known
         |- GroupLostError        a rank of a tensor-parallel group is gone, and so is the group
         '- FencedError           an answer or a call of an older incarnation or epoch

All of them survive pickling, fields included: Ray carries them from actors to callers. Pickle makes
one from its message alone and then restores its fields, so every other argument has a default.

Broken invariants are not in the tree: they `assert` and print the equation with its numbers.
"""


class RemoraError(Exception):
    """Root of the tree."""


class UserError(RemoraError):
    """What somebody asked for cannot be done; the text says what was wrong and what is allowed."""


class ConfigError(UserError):
    """A configuration key or value is wrong."""


class OperationIdTakenError(ConfigError):
    """An operation of that id is known, and had another target."""


class UnsupportedModelError(UserError):
    """The checkpoint's architecture cannot be served; the text says why."""


class WeightsError(UserError):
    """A checkpoint file or tensor is missing, damaged or unsafe; the text names both."""


class TraceError(UserError):
    """A file of routing traces or statistics is damaged, of another kind, or cannot be written."""


class PlannerError(UserError):
    """A planner (`plan_layer`) returned what is no placement; the text says what is wrong."""


class RequestError(UserError):
    """An HTTP request is refused.

    Args:
        message: what was wrong, the value, and what is allowed.
        status: HTTP status code.
        param: the field of the request at fault, if one is.
        code: machine-readable code of the error body (`model_not_found`, ...).
        type: error type of the error body.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        type: str = "invalid_request_error",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
        self.code = code
        self.type = type


class OverloadedError(RequestError):
    """The bounded queue is full: 429 with `Retry-After`."""

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message, status=429, code="overloaded", type="overloaded_error")
        self.retry_after_s = retry_after_s


class ClusterError(RemoraError):
    """A process or a link of the cluster failed."""


class AuthError(ClusterError):
    """A peer did not prove that it knows the cluster's token."""


class FrameError(ClusterError):
    """Bytes that are no frame, or a frame over its bound."""


class PeerLostError(ClusterError):
    """A connection was closed or refused."""


class DeadlineError(ClusterError):
    """A peer did not answer within its deadline."""


class OperationRunsError(ClusterError):
    """Another operation runs; there is one at a time."""


class UnknownOperationError(ClusterError):
    """No operation of that id is known."""


class GroupLostError(ClusterError):
    """A rank of a tensor-parallel group is gone: the group must be started anew."""


class FencedError(ClusterError):
    """A frame of an older incarnation or epoch was refused."""


def first_line(error: BaseException) -> str:
    """What an error says, without the traceback that Ray's and torch's have in their text."""
    return next(iter(str(error).splitlines()), type(error).__name__)
