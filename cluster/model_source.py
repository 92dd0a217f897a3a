"""Where a checkpoint is: a directory, or a hub id that is fetched where the network allows it."""

import re
from pathlib import Path

from remora.comm.errors import ConfigError, first_line

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]  # no pickles, no code


def local_checkpoint(model: str) -> str:
    """The directory of a checkpoint, absolute; a hub id is downloaded into the hub's own cache.

    Raises:
        ConfigError: neither a directory nor a hub id that can be fetched.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return str(path.resolve())
    if path.exists():
        raise ConfigError(f"model {model!r} is a file: a checkpoint directory is needed")
    if not _HUB_ID.fullmatch(model):
        raise ConfigError(
            f"model {model!r}: there is no such directory, and it is no hub id (owner/name)"
        )
    from huggingface_hub import snapshot_download  # only where something is to be fetched
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return str(snapshot_download(model, allow_patterns=_PATTERNS))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ConfigError(
            f"model {model!r}: there is no such directory, and the hub does not give it:"
            f" {first_line(error)}"
        ) from error
