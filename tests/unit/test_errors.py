"""Errors travel through Ray: pickled in an actor, raised again where its answer is awaited."""

import pickle
from collections.abc import Iterator

import pytest

from remora.comm.errors import OverloadedError, RemoraError, RequestError, first_line


def tree(root: type[RemoraError]) -> Iterator[type[RemoraError]]:
    yield root
    for child in root.__subclasses__():
        if child.__module__ == RemoraError.__module__:
            yield from tree(child)


@pytest.mark.parametrize("kind", list(tree(RemoraError)))
def test_every_error_survives_pickling(kind: type[RemoraError]) -> None:
    error = pickle.loads(pickle.dumps(kind("what was wrong")))
    assert type(error) is kind and str(error) == "what was wrong"


def test_fields_survive_too() -> None:
    refused = RequestError("no", status=404, param="model", code="model_not_found", type="t")
    full = OverloadedError("full", retry_after_s=7)
    for error in (refused, full):
        assert vars(pickle.loads(pickle.dumps(error))) == vars(error)


def test_the_first_line_of_an_error() -> None:
    """One without a text ended whoever told of it with an IndexError."""
    assert first_line(ValueError("no memory\nand a traceback")) == "no memory"
    assert first_line(TimeoutError()) == "TimeoutError"
