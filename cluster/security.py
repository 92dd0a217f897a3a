"""Bearer keys: read from files or the environment, compared in constant time, never logged."""

import hashlib
import hmac
import os
from collections.abc import Iterable
from pathlib import Path

from remora.comm.errors import ConfigError, RequestError

API_KEYS_ENV = "REMORA_API_KEYS"
ADMIN_KEYS_ENV = "REMORA_ADMIN_KEYS"
KEYS_MAX = 10_000


class KeyRing:
    """A set of accepted keys, held as digests. An empty ring lets everybody in.

    Comparing digests of equal length takes the same time for every key, and looking through all of
    them always takes as long as the ring is large.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = sorted({_digest(key) for key in keys})

    @property
    def is_open(self) -> bool:
        """Whether no key is needed."""
        return not self._digests

    def accepts(self, key: str) -> bool:
        """Whether the key is one of the ring's."""
        digest = _digest(key)
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(known, digest)
        return found

    def check(self, authorization: str | None) -> None:
        """Check an `Authorization` header.

        Raises:
            RequestError: 401, without the rejected value.
        """
        if self.is_open:
            return
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise RequestError(
                "an API key is needed: send 'Authorization: Bearer <key>'",
                status=401,
                type="authentication_error",
                code="missing_api_key",
            )
        if not self.accepts(key.strip()):
            raise RequestError(
                "this API key is not accepted",
                status=401,
                type="authentication_error",
                code="invalid_api_key",
            )


def load_keys(path: Path | None, variable: str) -> KeyRing:
    """Keys of a file (one a line, `#` comments) and of an environment variable (commas).

    Raises:
        ConfigError: the file cannot be read, or one of both is there and holds no key: what was
            meant to close the door must not open it.
    """
    keys = [part.strip() for part in os.environ.get(variable, "").split(",") if part.strip()]
    if variable in os.environ and not keys:
        raise ConfigError(f"${variable} holds no key; commas stand between them, or unset it")
    if path is not None:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"keys file {path}: {type(error).__name__}") from None
        found = [line for each in lines if (line := each.strip()) and not line.startswith("#")]
        if not found:
            raise ConfigError(f"keys file {path}: holds no key; one a line is expected")
        keys += found
    if len(keys) > KEYS_MAX:
        raise ConfigError(f"{len(keys)} keys: at most {KEYS_MAX} are allowed")
    return KeyRing(keys)


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=32).digest()
