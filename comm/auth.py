"""Mutual authentication with the cluster's token, before any frame is parsed. Sans I/O.

    client                                   server
      | -- hello: wishes, nonce_c  ------------> |
      | <-- challenge: grants, nonce_s --------- |
      | -- HMAC(token, "client" | hello | challenge) -> |
      | <-- status, HMAC(token, "server" | hello | challenge | client proof) |

The status is *accepted*, *refused* (the proof is wrong), or *fenced* (it is right, and nobody of
that name is wanted now: the caller may come again).

Every message has one fixed size, so an unauthenticated peer can make us hold 80 bytes and no more.
The side that dialled proves first: anybody can dial, so nobody who merely dials gets anything keyed
with the token to work on. Both nonces are under both proofs (no replay), the two proofs have
different labels (no reflection), compares are constant-time. What the two sides grant each other
(arena, bounds, incarnation) is under the proofs too. The stream itself is neither encrypted nor
sealed: networks that need that get it below us.
"""

import hmac
import secrets
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from remora.comm.errors import AuthError, FencedError

TOKEN_BYTES_MIN: Final = 16
NONCE_BYTES: Final = 32
NAME_BYTES_MAX: Final = 32
REGION_BYTES_MIN: Final = 4096  # an arena of smaller regions is not worth its mapping
MAGIC: Final = b"REMORA/1"

_HELLO = struct.Struct(f"<8sHHI{NAME_BYTES_MAX}s{NONCE_BYTES}s")
_CHALLENGE = struct.Struct(f"<8sHHIIQ{NONCE_BYTES}s")
HELLO_BYTES: Final = _HELLO.size
CHALLENGE_BYTES: Final = _CHALLENGE.size
PROOF_BYTES: Final = 32
VERDICT_BYTES: Final = 1 + 32
ATTACH: Final = b"RM-ARENA"  # carries the arena's descriptor, after the verdict

_CLIENT_LABEL: Final = b"remora transport v1: client proof\0"
_SERVER_LABEL: Final = b"remora transport v1: server proof\0"
_WANT_ARENA: Final = 1
_ACCEPTED: Final = b"\x01"
_REFUSED: Final = b"\x00"
_FENCED: Final = b"\x02"


@dataclass(frozen=True, slots=True, kw_only=True)
class Grants:
    """What the two ends agreed on; both use the server's answer."""

    arena: bool  # bodies may lie in shared memory
    num_regions: int  # credits: calls of one connection under way at a time
    region_bytes: int  # of each region
    frame_bytes_max: int  # header and body, both directions
    incarnation: int  # of the server; 0 = it has none


def check_token(token: bytes) -> bytes:
    """Returns `token`. Raises ValueError when it is shorter than 16 bytes."""
    if len(token) < TOKEN_BYTES_MIN:
        raise ValueError(f"cluster token of {len(token)} bytes: at least {TOKEN_BYTES_MIN} needed")
    return token


def _proof(token: bytes, label: bytes, *parts: bytes) -> bytes:
    return hmac.digest(token, label + b"".join(parts), "sha256")


class ClientHandshake:
    """The side that dialled: send `hello`, feed the challenge, send its proof, feed the verdict."""

    def __init__(
        self,
        token: bytes,
        *,
        name: str = "",
        arena: bool = False,
        num_regions: int = 1,
        region_bytes: int = 0,
    ) -> None:
        self._token = check_token(token)
        self.hello = _HELLO.pack(
            MAGIC,
            _WANT_ARENA if arena else 0,
            num_regions,
            region_bytes,
            name.encode()[:NAME_BYTES_MAX],
            secrets.token_bytes(NONCE_BYTES),
        )
        self._wants = (arena, num_regions, region_bytes)
        self._challenge = b""
        self._client_proof = b""

    def on_challenge(self, challenge: bytes) -> bytes:
        """Takes the 64-byte challenge and returns our proof. Raises AuthError."""
        if len(challenge) != CHALLENGE_BYTES or challenge[:8] != MAGIC:
            raise AuthError(f"peer answered {bytes(challenge[:8])!r}, no Remora transport")
        self._challenge = bytes(challenge)
        self._client_proof = _proof(self._token, _CLIENT_LABEL, self.hello, self._challenge)
        return self._client_proof

    def on_verdict(self, verdict: bytes) -> Grants:
        """Takes the 33-byte verdict and returns what was granted. Raises AuthError, FencedError."""
        if verdict[:1] == _FENCED:
            raise FencedError("peer lets nobody of our name in: it is fenced")
        if verdict[:1] != _ACCEPTED:
            raise AuthError("peer refused our proof: the cluster tokens differ")
        expected = _proof(
            self._token, _SERVER_LABEL, self.hello, self._challenge, self._client_proof
        )
        if not hmac.compare_digest(verdict[1:], expected):
            raise AuthError("peer could not prove that it knows the cluster token")
        grants = _read_grants(self._challenge)
        arena, num_regions, region_bytes = self._wants
        if (
            grants.num_regions > num_regions
            or grants.region_bytes > region_bytes
            or (grants.arena and not arena)
        ):
            raise AuthError(f"peer granted more than was asked: {grants}, asked {self._wants}")
        return grants


def _read_grants(challenge: bytes) -> Grants:
    _, flags, num_regions, region_bytes, frame_bytes_max, incarnation, _ = _CHALLENGE.unpack(
        challenge
    )
    return Grants(
        arena=bool(flags & _WANT_ARENA),
        num_regions=num_regions,
        region_bytes=region_bytes,
        frame_bytes_max=frame_bytes_max,
        incarnation=incarnation,
    )


class ServerHandshake:
    """The side that listens. `needed` says how many bytes the next `feed` takes.

    Args:
        refuses: whether a peer of this name, which has proved itself, is fenced.
    """

    def __init__(
        self,
        token: bytes,
        *,
        allow_arena: bool,
        num_regions_max: int,
        region_bytes_max: int,
        frame_bytes_max: int,
        incarnation: int,
        refuses: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self._token = check_token(token)
        self._refuses = refuses
        self._allow_arena = allow_arena
        self._num_regions_max = num_regions_max
        self._region_bytes_max = region_bytes_max
        self._frame_bytes_max = frame_bytes_max
        self._incarnation = incarnation
        self._hello = b""
        self._challenge = b""
        self.needed = HELLO_BYTES
        self.accepted = False
        self.fenced = False
        self.peer_name = "?"

    @property
    def grants(self) -> Grants:
        """What the challenge granted; valid once `accepted`."""
        assert self.accepted, "handshake is not over"
        return _read_grants(self._challenge)

    def feed(self, data: bytes) -> bytes:
        """Takes `needed` bytes and returns the bytes to send.

        Raises:
            AuthError: no Remora peer (nothing is to be sent).
        """
        if not self._challenge:
            return self._on_hello(data)
        return self._on_proof(data)

    def _on_hello(self, hello: bytes) -> bytes:
        if len(hello) != HELLO_BYTES or hello[:8] != MAGIC:
            raise AuthError(f"handshake opens with {bytes(hello[:8])!r}, must be {MAGIC!r}")
        _, flags, num_regions, region_bytes, name, _ = _HELLO.unpack(hello)
        self._hello = bytes(hello)
        region_bytes = min(region_bytes, self._region_bytes_max) & ~63
        arena = self._allow_arena and flags & _WANT_ARENA and region_bytes >= REGION_BYTES_MIN
        self.peer_name = name.rstrip(b"\0").decode("ascii", errors="replace")
        self._challenge = _CHALLENGE.pack(
            MAGIC,
            _WANT_ARENA if arena else 0,
            max(1, min(num_regions, self._num_regions_max)),
            region_bytes,
            self._frame_bytes_max,
            self._incarnation,
            secrets.token_bytes(NONCE_BYTES),
        )
        self.needed = PROOF_BYTES
        return self._challenge

    def _on_proof(self, proof: bytes) -> bytes:
        self.needed = 0
        expected = _proof(self._token, _CLIENT_LABEL, self._hello, self._challenge)
        if not hmac.compare_digest(bytes(proof), expected):
            return _REFUSED + bytes(PROOF_BYTES)
        self.fenced = self._refuses(self.peer_name)
        if self.fenced:
            return _FENCED + bytes(PROOF_BYTES)
        self.accepted = True
        return _ACCEPTED + _proof(
            self._token, _SERVER_LABEL, self._hello, self._challenge, bytes(proof)
        )
