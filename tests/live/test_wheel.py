"""The wheel holds all a user needs: it is built, installed outside the checkout, and used there.

No Ray cluster is needed, but a compile of the kernels is, so it stands among the live tests. The
build works on a copy of the sources, so that nothing left in `build/` by an earlier one gets in but
objects, which are named by all that they were made of.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "demo-model"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ROOMS = sorted(PYPROJECT["tool"]["setuptools"]["package-dir"].values())
PIP = str(Path(sys.executable).with_name("pip"))
RUN_S_MAX = 120


def run(*command: str | Path, cwd: Path, timeout: float = RUN_S_MAX) -> str:
    """Standard output of a command that must succeed; nothing of the checkout is on its paths."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"{command} -> {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the wheel is built from."""
    source = tmp_path_factory.mktemp("source")
    built = shutil.ignore_patterns("__pycache__", "*.so", "*_pb2.py*")
    for room in ROOMS:
        shutil.copytree(ROOT / room, source / room, ignore=built)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    objects = ROOT / "build" / "objects"
    objects.mkdir(parents=True, exist_ok=True)
    (source / "build").mkdir()
    (source / "build" / "objects").symlink_to(objects)
    return source


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without isolation against the torch that is installed."""
    out = tmp_path_factory.mktemp("dist")
    options = ("--quiet", "--no-build-isolation", "--no-deps", "--wheel-dir", out)
    run(PIP, "wheel", *options, source, cwd=out, timeout=500)
    (path,) = out.glob("remora-*.whl")
    return path


@pytest.fixture(scope="module")
def home(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel; all else comes from the environment of the tests.

    That one is added by a path file, whose own path files Python does not read: its editable
    install of the checkout is therefore out of sight.
    """
    where = tmp_path_factory.mktemp("home") / "venv"
    venv.create(where, with_pip=False, symlinks=True)
    python = where / "bin" / "python"
    run(PIP, "--python", python, "install", "--quiet", "--no-deps", wheel, cwd=where)
    outer = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    inner = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=where)
    (Path(inner.strip()) / "outer.pth").write_text("\n".join(sorted(outer)) + "\n")
    return where


def test_wheel_holds_the_rooms(source: Path, wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    kinds = {".py", ".yaml", ".json", ".html", ".js", ".css", ".proto"}
    paths = [path for room in ROOMS for path in (source / room).rglob("*")]
    wanted = {
        f"remora/{path.relative_to(source).as_posix()}"
        for path in paths
        if path.suffix in kinds or path.name == "py.typed"
    }
    protos = [path for path in paths if path.suffix == ".proto"]
    assert protos, "the services of the router are described somewhere"
    wanted |= {f"remora/comm/{path.stem}_pb2.{kind}" for path in protos for kind in ("py", "pyi")}
    assert not wanted - names, f"missing from the wheel: {sorted(wanted - names)}"
    assert any(name.endswith("licenses/LICENSE") for name in names)
    tops = {name.split("/")[0] for name in names}
    assert tops == {"remora", f"remora-{PYPROJECT['project']['version']}.dist-info"}


def test_imports_are_the_wheels(home: Path) -> None:
    """Presets are read, every room imports, and the kernels are those of the tests' own build."""
    program = (
        "import importlib\n"
        "from remora.cluster.config import load_config, preset_names\n"
        f"for room in {ROOMS!r}:\n"
        "    module = importlib.import_module(f'remora.{room}')\n"
        f"    assert module.__file__.startswith({str(home)!r}), module.__file__\n"
        "for name in preset_names():\n"
        "    load_config(preset=name, overrides={'model': 'any'})\n"
        "from remora.comm.router_grpc import METHODS\n"
        "assert len(METHODS) == 5\n"
        "from remora.comm.native import native_extension\n"
        "from remora.kernels.native import native_available\n"
        "plane = native_extension() is not None\n"
        "print(len(preset_names()), native_available(), plane)\n"
    )
    from remora.cluster.config import preset_names
    from remora.comm.native import native_extension
    from remora.kernels.native import native_available

    presets, native, plane = run(home / "bin" / "python", "-c", program, cwd=home).split()
    assert int(presets) == len(preset_names()) >= 1
    assert native == str(native_available())
    assert plane == str(native_extension() is not None)
    # A failed compile only costs speed, and nobody would see it: here it is a fault.
    built = native_available() and native_extension() is not None
    assert built or shutil.which("c++") is None or "REMORA_NO_KERNELS" in os.environ


def test_command_line_works(home: Path) -> None:
    text = run(home / "bin" / "remora", "--help", cwd=home)
    assert all(command in text for command in ("serve", "status", "stop", "plan", "rebalance")), (
        text
    )
    plan = run(home / "bin" / "remora", "plan", MODEL, "--preset", "tiny_cpu", cwd=home)
    assert "shard-0" in plan and "shard-1" in plan, plan
