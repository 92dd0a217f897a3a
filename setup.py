"""Builds the C++ kernels when torch and a compiler are there; everything else is in pyproject.toml.

Without a compiler the wheel is still complete: `remora.kernels` then serves through torch, slower.
"""

import glob
import hashlib
import os
import platform
import shutil

from setuptools import Extension, setup

CSRC = os.path.join("kernels", "csrc")


def source_hash() -> str:
    """Of the kernels' sources, for the numeric fingerprint; as `kernels/native.py` does it."""
    digest = hashlib.blake2b(digest_size=6)
    for name in sorted(os.listdir(CSRC)):
        if name.endswith((".cpp", ".h")):
            with open(os.path.join(CSRC, name), "rb") as file:
                digest.update(file.read())
    return digest.hexdigest()


def kernel_extensions() -> list[Extension]:
    """The one extension of the project, or nothing and a line saying why it cannot be built."""
    if os.environ.get("REMORA_NO_KERNELS") == "1":
        print("remora: REMORA_NO_KERNELS=1, building without C++ kernels")
        return []
    if shutil.which("c++") is None and shutil.which("g++") is None:
        print("remora: no C++ compiler found, building without C++ kernels (torch path)")
        return []
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        print("remora: torch is not importable here (use --no-build-isolation): no C++ kernels")
        return []
    library_dirs = cpp_extension.library_paths()
    # A header, not a flag: a changed kernel must not make the other files compile anew.
    generated = os.path.join("build", "generated")
    os.makedirs(generated, exist_ok=True)
    with open(os.path.join(generated, "source_hash.h"), "w") as file:
        file.write(f'#define REMORA_SOURCE_HASH "{source_hash()}"\n')
    return [
        Extension(
            "remora.kernels._C",
            sources=sorted(
                os.path.join("kernels", "csrc", name)
                for name in os.listdir(os.path.join(os.path.dirname(__file__), "kernels", "csrc"))
                if name.endswith(".cpp")
            ),
            depends=sorted(glob.glob(os.path.join("kernels", "csrc", "*.h"))),
            include_dirs=[generated, *cpp_extension.include_paths()],
            library_dirs=library_dirs,
            libraries=["c10", "torch", "torch_cpu"],
            extra_compile_args=[
                "-O3",
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


setup(ext_modules=kernel_extensions() if platform.system() == "Linux" else [])
