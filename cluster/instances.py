"""Which `remora serve` processes run on this machine, written down so that others find them.

Imports no Ray: how to authenticate with a Ray cluster must be in the environment before that.
"""

import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from remora.comm.errors import ConfigError

FOLDER_ENV = "REMORA_RUNTIME_DIR"
TOKEN_ENV = "RAY_AUTH_TOKEN"
MODE_ENV = "RAY_AUTH_MODE"
MISSING = 3  # exit status: there is no such deployment
NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,46}[a-z0-9])?")  # of a deployment


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """What is written down of a running `remora serve`, so that `status` and `stop` find it."""

    name: str
    pid: int  # of `remora serve`
    ray_address: str
    ray_token: str | None  # of a Ray cluster of our own; the file is readable by its user alone
    url: str | None  # None: not ready yet
    model: str
    session: str | None = None  # directory of a Ray cluster of our own


def instances_dir() -> Path:
    """Where running instances of this user are written down; private.

    Below `$REMORA_RUNTIME_DIR`, else the folder for temporary files. Not `$XDG_RUNTIME_DIR`: a
    service has none where the user's shell has one, and it goes when the user logs out.

    Raises:
        ConfigError: it cannot be made, or is somebody else's.
    """
    path = Path(os.environ.get(FOLDER_ENV) or tempfile.gettempdir()) / f"remora-{os.getuid()}"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}: set {FOLDER_ENV}") from error
    if path.stat().st_uid != os.getuid():
        raise ConfigError(f"{path} belongs to somebody else: set {FOLDER_ENV}")
    return path


def find_instance(name: str) -> Instance | None:
    """The running instance of that name; one whose process is gone is cleared away.

    Raises:
        ConfigError: that is no name.
    """
    if not NAME.fullmatch(name):  # else it may lead out of the folder
        raise ConfigError(f"{name!r} is no name of a deployment: allowed is {NAME.pattern}")
    path = instances_dir() / f"{name}.json"
    try:
        instance = Instance(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):  # of another version: whole it is, as it is moved into place
        return None
    if not _is_remora(instance.pid):
        _clear_away(instance, path)
        return None
    return instance


def instance_names() -> list[str]:
    """Names of the instances that run."""
    names = sorted(path.stem for path in instances_dir().glob("*.json"))
    return [name for name in names if NAME.fullmatch(name) and find_instance(name) is not None]


def which_instance(name: str | None) -> tuple[str | None, Instance | None]:
    """The instance of that name, or the only one; a name that is none of ours comes back alone.

    Raises:
        ConfigError: several run and none was named.
    """
    if name is None:
        names = instance_names()
        if len(names) > 1:
            raise ConfigError(f"several deployments run: {', '.join(names)}; say which")
        name = names[0] if names else None
    return name, find_instance(name) if name is not None else None


@contextmanager
def written_down(instance: Instance) -> Iterator[None]:
    """Keep an instance findable while the block runs."""
    write_down(instance)
    try:
        yield
    finally:
        (instances_dir() / f"{instance.name}.json").unlink(missing_ok=True)


def write_down(instance: Instance) -> None:
    """Write an instance down, over what was known of it: readers see the old or the new, whole."""
    path = instances_dir() / f"{instance.name}.json"
    half = path.with_suffix(f".{os.getpid()}")
    half.touch(mode=0o600)
    half.write_text(json.dumps(asdict(instance)))
    half.replace(path)


def use_token(instance: Instance) -> None:
    """Put an instance's Ray token into the environment. Before `ray` is imported: it looks once."""
    if instance.ray_token is not None:
        os.environ[TOKEN_ENV] = instance.ray_token
        os.environ[MODE_ENV] = "token"


def _clear_away(instance: Instance, path: Path) -> None:
    """Forget an instance that was killed. Its Ray ends by itself, but leaves its directory."""
    path.unlink(missing_ok=True)
    if instance.session is not None:
        shutil.rmtree(instance.session, ignore_errors=True)


def _is_remora(pid: int) -> bool:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"remora" in command


def missing(message: str, as_json: bool) -> int:
    """Say that there is no such deployment; returns the exit status."""
    if as_json:
        print(json.dumps({"error": {"type": "NotFound", "message": message}}))
    else:
        print(f"remora: {message}", file=sys.stderr)
    return MISSING
