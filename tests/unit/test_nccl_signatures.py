"""The fake NCCL and our protocols against cupy's wheel: names, parameters, constants, refusals.

The wheel has 137 MB (293 unpacked) and its module wants NCCL's library, 350 MB more, so neither is
installed for the tests. `support/cupy_nccl.json` is what `support/read_cupy_nccl.py` read from the
wheel; where cupy is installed it is read again and must be the same.
"""

import importlib.metadata
import inspect
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fake_nccl import FakeNccl, NcclCommunicator, NcclError, World

from remora.comm import nccl_api
from remora.comm.errors import ConfigError

SUPPORT = Path(__file__).parents[1] / "support"
WHEEL: dict[str, Any] = json.loads((SUPPORT / "cupy_nccl.json").read_text())

METHODS = ("send", "recv", "commSplit", "check_async_error", "abort", "rank_id", "size")
FUNCTIONS = ("get_unique_id", "get_version", "groupStart", "groupEnd", "NcclCommunicator")


def of_wheel(signature: str) -> list[tuple[str, str]]:
    """`f(self, int a, X b=None)` -> [("a", ""), ("b", "None")]."""
    inside = signature[signature.index("(") + 1 : signature.rindex(")")]
    parameters = []
    for text in filter(None, inside.split(", ")):
        declared, _, default = text.partition("=")
        if declared != "self":
            parameters.append((declared.split(" ")[-1], default))
    return parameters


def of_python(function: Callable[..., Any]) -> list[tuple[str, str]]:
    """The same of a Python function."""
    return [
        (p.name, "" if p.default is p.empty else repr(p.default))
        for p in inspect.signature(function).parameters.values()
        if p.name != "self"
    ]


@pytest.mark.parametrize("name", METHODS)
def test_methods(name: str) -> None:
    expected = of_wheel(WHEEL["signatures"][f"NcclCommunicator.{name}"])
    assert of_python(getattr(NcclCommunicator, name)) == expected
    assert of_python(getattr(nccl_api.Communicator, name)) == expected


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str) -> None:
    expected = of_wheel(WHEEL["signatures"][name])
    assert of_python(getattr(FakeNccl, name)) == expected
    assert of_python(getattr(nccl_api.Nccl, name)) == expected


def test_protocols_say_nothing_else() -> None:
    """What we use is what is compared above: a method added to a protocol must be added there."""
    methods = {n for n in vars(nccl_api.Communicator) if n[0] != "_"}
    functions = {n for n, f in vars(nccl_api.Nccl).items() if n[0] != "_" and inspect.isfunction(f)}
    constants = {n for n in nccl_api.Nccl.__annotations__ if n.startswith("NCCL_")}
    assert methods == set(METHODS) and functions == set(FUNCTIONS)
    assert constants == set(WHEEL["constants"])


def test_constants_and_statuses() -> None:
    for name, value in WHEEL["constants"].items():
        assert getattr(FakeNccl, name) == value
    nccl = FakeNccl(World(), "a")
    for dtype, name in (
        (torch.int32, "NCCL_INT32"),
        (torch.float32, "NCCL_FLOAT32"),
        (torch.float16, "NCCL_FLOAT16"),
        (torch.bfloat16, "NCCL_BFLOAT16"),
    ):
        assert nccl_api.datatype(nccl, dtype) == WHEEL["constants"][name]
    with pytest.raises(ValueError, match=r"torch.int64 is not sent, allowed are torch.int32"):
        nccl_api.datatype(nccl, torch.int64)
    for status, text in WHEEL["statuses"].items():
        error = NcclError(int(status))
        assert error.status == int(status) and str(error).startswith(text + ":")
    assert WHEEL["configuration"] == ["split_share"]  # no `blocking`: see docs/nccl.md


def test_refusals_are_of_the_same_kind() -> None:
    nccl = FakeNccl(World(), "a")
    one = nccl.get_unique_id()
    assert len(one) == WHEEL["id_bytes"]
    alone: Any = nccl.NcclCommunicator(1, one, 0)
    calls: dict[str, Callable[[], Any]] = {
        "status_7": lambda: NcclError(7),
        "id_tuple": lambda: nccl.NcclCommunicator(2, (0,) * 128, 0),  # type: ignore[arg-type]
        "id_short": lambda: nccl.NcclCommunicator(2, b"short", 0),
        "count_negative": lambda: alone.send(1, -1, 2, 0, 0),
        "stream_none": lambda: alone.send(1, 1, 2, 0, None),
    }
    assert calls.keys() == WHEEL["refusals"].keys()
    for name, call in calls.items():
        with pytest.raises(Exception) as caught:
            call()
        assert type(caught.value).__name__ == WHEEL["refusals"][name], name


def test_calls_arrive_in_c_as_they_were_meant() -> None:
    """Parameters have the order of NCCL's own functions: count before type, peer before stream."""
    calls = WHEEL["calls"]
    start = calls.index("group")
    assert calls[start : calls.index("end") + 1] == [
        "group",
        f"send at=4096 count=10 type={FakeNccl.NCCL_BFLOAT16} peer=0 comm=101 stream=5",
        f"recv at=8192 count=7 type={FakeNccl.NCCL_INT32} peer=2 comm=101 stream=5",
        "end",
    ]
    assert calls.count("abort comm=101") == 1 and "destroy comm=101" not in calls


def test_the_installed_wheel_is_the_one_that_was_read() -> None:
    try:
        version = importlib.metadata.version("cupy-cuda12x")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("cupy-cuda12x (137 MB) is not installed; see docs/nccl.md to run this")
    if shutil.which("cc") is None:
        pytest.skip("no C compiler: the wheel's module cannot be imported over a stub")
    done = subprocess.run(
        [sys.executable, "-P", str(SUPPORT / "read_cupy_nccl.py")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout) == WHEEL, f"cupy {version}: read it again, review the difference"


def test_without_cupy_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ConfigError, match=r"install remora\[gpu\]"):
        nccl_api.load_nccl()
