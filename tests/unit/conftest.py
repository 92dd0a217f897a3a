"""Fixtures of the kernel and comm tests: which path computes, and with how many threads."""

from collections.abc import Iterator

import pytest
import torch

from remora.comm import native as comm_native
from remora.kernels import native


@pytest.fixture(params=["native", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both paths: C++ kernels, and torch as where there is no compiler."""
    name: str = request.param
    if name == "native" and not native.native_available():
        pytest.skip("C++ kernels not built")
    if name == "torch":
        monkeypatch.setattr(native, "native_available", lambda: False)
    return name


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """One and two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["native", "python"])
def plane(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both data planes: C++ at both ends, and Python as where there is no compiler."""
    name: str = request.param
    if name == "native" and comm_native.native_extension() is None:
        pytest.skip("native data plane not built")
    with pytest.MonkeyPatch.context() as patch:
        if name == "python":
            patch.setattr(comm_native, "_EXTENSION", None)
        yield name
