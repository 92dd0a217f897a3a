"""Reads what the installed cupy wheel's `cupy.cuda.nccl` is, without a GPU and without NCCL.

    python -P tests/support/read_cupy_nccl.py > tests/support/cupy_nccl.json

The wheel's module is linked to libnccl.so.2 and cannot be imported where there is none; NCCL's own
wheel has 350 MB. So a stub of that library is compiled (every function succeeds and is written
down), loaded first, and the real module imported over it. Signatures are those that Cython wrote
into the docstrings. The run at the end drives the real module through `nccl_link`'s own way of
calling, and what arrived in C is part of the answer.
"""

import ctypes
import importlib
import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

STUB = r"""
#include <stdio.h>
#include <stddef.h>
#include <string.h>
typedef struct { char internal[128]; } Id;
static char text[1 << 16]; static size_t used;
#define NOTE(...) (used += snprintf(text + used, sizeof text - used, __VA_ARGS__), 0)
const char* stub_text(void) { return text; }
const char* ncclGetErrorString(int status) { return "stub"; }
int ncclGetVersion(int* version) { *version = 22501; return 0; }
int ncclGetUniqueId(Id* id) { memset(id, 7, sizeof *id); return 0; }
int ncclCommInitRankConfig(long* comm, int size, Id id, int rank, void* config)
{ *comm = 100 + rank; return NOTE("init size=%d id=%d rank=%d\n", size, id.internal[127], rank); }
int ncclCommSplit(long comm, int color, int key, long* child, void* config)
{ *child = color < 0 ? 0 : 200 + key; return NOTE("split color=%d key=%d\n", color, key); }
int ncclSend(void* b, size_t count, int type, int peer, long comm, long stream)
{ return NOTE("send at=%ld count=%zu type=%d peer=%d comm=%ld stream=%ld\n",
              (long)b, count, type, peer, comm, stream); }
int ncclRecv(void* b, size_t count, int type, int peer, long comm, long stream)
{ return NOTE("recv at=%ld count=%zu type=%d peer=%d comm=%ld stream=%ld\n",
              (long)b, count, type, peer, comm, stream); }
int ncclGroupStart(void) { return NOTE("group\n"); }
int ncclGroupEnd(void) { return NOTE("end\n"); }
int ncclCommAbort(long comm) { return NOTE("abort comm=%ld\n", comm); }
int ncclCommDestroy(long comm) { return NOTE("destroy comm=%ld\n", comm); }
int ncclCommGetAsyncError(long comm, int* status) { *status = 0; return 0; }
int ncclCommCount(long comm, int* count) { *count = 3; return 0; }
int ncclCommUserRank(long comm, int* rank) { *rank = comm - 100; return 0; }
"""


def build_stub(module: Path, folder: Path) -> ctypes.CDLL:
    """A library with every nccl function that `module` wants; those not written above do nothing.

    Raises:
        OSError, CalledProcessError: there is no C compiler.
    """
    wanted = set(re.findall(rb"\0(nccl[A-Z]\w+)\0", module.read_bytes()))
    missing = [n.decode() for n in sorted(wanted) if n.decode() + "(" not in STUB]
    source, library = folder / "stub.c", folder / "libnccl.so.2"
    source.write_text(STUB + "".join(f"int {name}(void) {{ return 0; }}\n" for name in missing))
    soname = "-Wl,-soname,libnccl.so.2"
    command = ["cc", "-w", "-shared", "-fPIC", soname, "-o", str(library), str(source)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def signatures(module: Any) -> dict[str, str]:
    """First line of each docstring: `NcclCommunicator.send(self, intptr_t sendbuf, ...)`."""
    found = {}
    for name in ("get_unique_id", "get_version", "groupStart", "groupEnd", "NcclCommunicator"):
        found[name] = getattr(module, name).__doc__.split("\n")[0]
    for name in sorted(vars(module.NcclCommunicator)):
        doc = getattr(module.NcclCommunicator, name).__doc__ or ""
        if not name.startswith("_") and doc.startswith("NcclCommunicator."):
            found[f"NcclCommunicator.{name}"] = doc.split("\n")[0]
    return found


def refusal(call: Any) -> str:
    """The kind of exception that `call` raises."""
    try:
        call()
    except Exception as error:
        return type(error).__name__
    return "none"


def drive(module: Any, stub: ctypes.CDLL) -> list[str]:
    """Calls as `nccl_api` calls; returns what the library was asked."""
    comm = module.NcclCommunicator(3, module.get_unique_id(), 1)
    module.groupStart()
    comm.send(4096, 10, module.NCCL_BFLOAT16, 0, 5)
    comm.recv(8192, 7, module.NCCL_INT32, 2, 5)
    module.groupEnd()
    comm.check_async_error()
    child = comm.commSplit(0, 1)
    assert comm.commSplit(-1, 1) is None, "a rank without a colour gets no communicator"
    child.destroy()
    comm.abort()
    comm.abort()
    comm.destroy()
    stub.stub_text.restype = ctypes.c_char_p
    return list(stub.stub_text().decode().splitlines())


def read() -> dict[str, Any]:
    """All of it."""
    distribution = importlib.metadata.distribution("cupy-cuda12x")
    files = distribution.files or []
    (path,) = (f for f in files if re.search(r"cuda/libs/nccl\..*\.so$", str(f)))
    with tempfile.TemporaryDirectory() as folder:
        stub = build_stub(Path(str(path.locate())), Path(folder))
        importlib.import_module("cupy")
        module: Any = importlib.import_module("cupy_backends.cuda.libs.nccl")
        calls = drive(module, stub)
        id_bytes = module.get_unique_id()
        return {
            "cupy": distribution.version,
            "nccl_build": module.get_build_version(),
            "signatures": signatures(module),
            "constants": {
                name: getattr(module, name)
                for name in ("NCCL_INT32", "NCCL_FLOAT16", "NCCL_FLOAT32", "NCCL_BFLOAT16")
            },
            "statuses": {
                str(status): str(module.NcclError(status)).split(":")[0] for status in range(7)
            },
            "refusals": {
                "status_7": refusal(lambda: module.NcclError(7)),
                "id_tuple": refusal(lambda: module.NcclCommunicator(2, (0,) * 128, 0)),
                "id_short": refusal(lambda: module.NcclCommunicator(2, b"short", 0)),
                "count_negative": refusal(
                    lambda: module.NcclCommunicator(2, id_bytes, 0).send(1, -1, 2, 0, 0)
                ),
                "stream_none": refusal(
                    lambda: module.NcclCommunicator(2, id_bytes, 0).send(1, 1, 2, 0, None)
                ),
            },
            "id_bytes": len(id_bytes),
            "configuration": sorted(n for n in dir(module.NcclConfig) if n[0] != "_"),
            "calls": calls,
        }


if __name__ == "__main__":
    json.dump(read(), sys.stdout, indent=1)
    print()
