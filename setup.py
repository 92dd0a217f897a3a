"""Builds the C++ extensions when there is a compiler, and the modules of the gRPC services.

`remora.kernels._C` needs torch too, `remora.comm._C` does not. Without a compiler the wheel is
still complete: `remora.kernels` then serves through torch, `remora.comm` through Python; slower.

`comm/*.proto` become `remora.comm.*_pb2`: into the wheel, or (editable) beside the .proto files,
where git ignores them. Everything else is in pyproject.toml.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

KERNELS = os.path.join("kernels", "csrc")
COMM = os.path.join("comm", "csrc")
GENERATED = os.path.join("build", "generated")
OBJECTS = os.path.join("build", "objects")
OBJECTS_MAX = 200  # kept; those used last


def sources(folder: str, *endings: str) -> list[str]:
    """Files of `folder` with one of these endings, sorted."""
    names = sorted(os.listdir(os.path.join(os.path.dirname(__file__), folder)))
    return [os.path.join(folder, name) for name in names if name.endswith(endings)]


def write_source_hash(header: str, macro: str, paths: list[str]) -> None:
    """Of the sources, as `native.py` of the room does it: an older build is told from a newer.

    A header, not a flag: a changed source must not make the other files compile anew.
    """
    digest = hashlib.blake2b(digest_size=6)
    for path in paths:
        digest.update(read_bytes(path))
    os.makedirs(GENERATED, exist_ok=True)
    with open(os.path.join(GENERATED, header), "w") as file:
        file.write(f'#define {macro} "{digest.hexdigest()}"\n')


def extensions() -> list[Extension]:
    """What can be built here; a line says why where that is not everything."""
    if os.environ.get("REMORA_NO_KERNELS") == "1":
        print("remora: REMORA_NO_KERNELS=1, building without C++")
        return []
    if shutil.which("c++") is None and shutil.which("g++") is None:
        print("remora: no C++ compiler found, building without C++ (torch and Python paths)")
        return []
    return [*kernel_extensions(), comm_extension()]


def comm_extension() -> Extension:
    """The native data plane: plain CPython, no torch, and of the kernels two headers of plain C."""
    shared = [os.path.join(KERNELS, name) for name in ("expert_call.h", "step_experts.h")]
    hashed = [*sources(COMM, ".cpp", ".h"), *shared]
    write_source_hash("source_hash_comm.h", "REMORA_COMM_SOURCE_HASH", hashed)
    return Extension(
        "remora.comm._C",
        sources=sources(COMM, ".cpp"),
        depends=[*sources(COMM, ".h"), *shared],
        include_dirs=[GENERATED, KERNELS],
        extra_compile_args=["-O3", "-std=c++20", "-fno-math-errno", "-ffp-contract=off"],
        language="c++",
        optional=True,  # the Python data plane serves
    )


def kernel_extensions() -> list[Extension]:
    """The kernels, or nothing where torch is not importable."""
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        print("remora: torch is not importable here (use --no-build-isolation): no C++ kernels")
        return []
    library_dirs = cpp_extension.library_paths()
    write_source_hash("source_hash.h", "REMORA_SOURCE_HASH", sources(KERNELS, ".cpp", ".h"))
    return [
        Extension(
            "remora.kernels._C",
            sources=sources(KERNELS, ".cpp"),
            depends=sources(KERNELS, ".h"),
            include_dirs=[GENERATED, *cpp_extension.include_paths()],
            library_dirs=library_dirs,
            libraries=["c10", "torch", "torch_cpu"],
            extra_compile_args=[
                "-O3",
                "-g0",  # Python's own flags ask for debug information: a fifth of the time, 30 MB
                "-std=c++20",
                "-fopenmp",
                "-fno-math-errno",
                "-ffp-contract=off",  # a compiler may not decide where a product is rounded
                "-Wno-psabi",
                f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
                "-DTORCH_EXTENSION_NAME=_C",
            ],
            extra_link_args=["-fopenmp", *(f"-Wl,-rpath,{d}" for d in library_dirs)],
            language="c++",
            optional=True,  # a failing compile must not fail the install: the torch path serves
        )
    ]


class BuildTogether(build_ext):
    """`build_ext` that compiles several files of an extension at once, one a core, 8 at most, and
    none that it compiled before: objects are kept in build/objects by what they were made of."""

    def build_extensions(self) -> None:
        """Build all extensions."""
        compile_some = self.compiler.compile
        command = list(self.compiler.compiler_so)
        found = shutil.which(command[0])  # none: compiling says so, and is optional
        version = subprocess.run([found, "--version"], capture_output=True).stdout if found else b""
        cxx = repr(command).encode() + version

        def compile_one(path: str, options: dict[str, Any]) -> list[str]:
            (built,) = self.compiler.object_filenames([path], output_dir=options["output_dir"])
            kept = os.path.join(OBJECTS, object_key(path, cxx, options) + ".o")
            if os.path.exists(kept):
                os.makedirs(os.path.dirname(built), exist_ok=True)
                shutil.copyfile(kept, built)
                os.utime(kept)
                return [built]
            compile_some([path], **options)
            with tempfile.NamedTemporaryFile(dir=OBJECTS, delete=False) as whole:
                whole.write(read_bytes(built))
            os.replace(whole.name, kept)
            return [built]

        def compile_all(sources: list[str], **options: Any) -> list[str]:
            os.makedirs(OBJECTS, exist_ok=True)
            with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
                built = list(pool.map(lambda path: compile_one(path, options), sources))
            return [path for paths in built for path in paths]

        self.compiler.compile = compile_all
        super().build_extensions()
        kept = sorted(os.scandir(OBJECTS), key=lambda entry: entry.stat().st_mtime)
        for entry in kept[:-OBJECTS_MAX]:
            os.unlink(entry)


def object_key(path: str, cxx: bytes, options: dict[str, Any]) -> str:
    """Of everything that an object depends on: source, headers, compiler and its options."""
    source = read_bytes(path)
    digest = hashlib.blake2b(digest_size=16)
    settings = [options.get(key) for key in ("macros", "include_dirs", "extra_postargs")]
    digest.update(repr([path, settings]).encode() + cxx)
    for part in [source, *map(read_bytes, sorted(options["depends"]))]:
        digest.update(b"%d " % len(part) + part)
    if b"source_hash" in source:  # the headers that are written here
        for name in sorted(os.listdir(GENERATED)):
            digest.update(read_bytes(os.path.join(GENERATED, name)))
    return digest.hexdigest()


def read_bytes(path: str) -> bytes:
    """The whole file."""
    with open(path, "rb") as file:
        return file.read()


class BuildWithMessages(build_py):
    """`build_py` that also compiles `comm/*.proto`."""

    def run(self) -> None:
        """Build; fails where a module could not be made: what is missing would show at run time."""
        super().run()
        root = os.path.dirname(os.path.abspath(__file__))
        target = os.path.join(root if self.editable_mode else self.build_lib + "/remora", "comm")
        compile_protos(os.path.join(root, "comm"), target)


class Protos(Command):
    """`python setup.py protos`: the modules of `comm/*.proto` and nothing else, in a second."""

    user_options: ClassVar[list[tuple[str, str, str]]] = []

    def initialize_options(self) -> None:
        """There are none."""

    def finalize_options(self) -> None:
        """There are none."""

    def run(self) -> None:
        """Compile."""
        folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), "comm")
        compile_protos(folder, folder)


def compile_protos(folder: str, target: str) -> None:
    """`folder`/*.proto to Python modules and their types in `target`.

    protoc sees the files as remora/comm/*.proto, so that the modules import each other by the names
    under which they are installed.
    """
    from grpc_tools import protoc

    with tempfile.TemporaryDirectory() as scratch:
        seen = os.path.join(scratch, "remora", "comm")
        made = os.path.join(scratch, "out")
        os.makedirs(seen)
        os.makedirs(made)
        names = sorted(name for name in os.listdir(folder) if name.endswith(".proto"))
        for name in names:
            shutil.copy(os.path.join(folder, name), seen)
        options = [f"-I{scratch}", f"--python_out={made}", f"--pyi_out={made}"]
        files = [os.path.join(seen, name) for name in names]
        if protoc.main(["protoc", *options, *files]) != 0:
            raise SystemExit(f"remora: protoc failed on {names}")
        os.makedirs(target, exist_ok=True)
        for name in os.listdir(os.path.join(made, "remora", "comm")):
            shutil.copy(os.path.join(made, "remora", "comm", name), target)


setup(
    ext_modules=extensions() if platform.system() == "Linux" else [],
    cmdclass={"build_ext": BuildTogether, "build_py": BuildWithMessages, "protos": Protos},
)
