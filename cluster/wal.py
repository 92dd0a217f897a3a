"""A write-ahead log: decisions are on the disk before anything follows from them.

A record is 12 bytes (length, CRC-32 of the body, CRC-32 of the first eight; little-endian) and a
body of canonical JSON (sorted keys, no spaces). `append` returns when the record is durable. What a
crash left half written at the end is dropped when the log is opened again; anything else that is
not as it was written is an error that names the place. One process writes: a lock beside the log
says so, and goes with the process.
"""

import contextlib
import fcntl
import os
import struct
from pathlib import Path
from typing import Any, Final, Protocol, Self
from zlib import crc32

import msgspec

from remora.comm.errors import ClusterError

FILE: Final = "coordinator.wal"
RECORD_BYTES_MAX: Final = 256 << 20
_HEAD = struct.Struct("<III")


class WalError(ClusterError):
    """A log that is damaged, in use, or cannot be written."""


class RecordLog(Protocol):
    """What an operation is written to before anything follows from it; methods as `Wal`'s."""

    num_bytes: int

    @property
    def is_broken(self) -> bool:
        """See `Wal.is_broken`."""

    def append(self, record: dict[str, Any]) -> None:
        """See `Wal.append`."""

    def replace(self, record: dict[str, Any]) -> None:
        """See `Wal.replace`."""


class Wal:
    """The log in one folder, open for writing. `open` makes it."""

    def __init__(self, path: Path, descriptor: int, lock: int, num_bytes: int) -> None:
        self.path = path
        self.num_bytes = num_bytes
        self._fd = descriptor
        self._lock = lock
        self._broken: str | None = None

    @classmethod
    def open(cls, folder: Path) -> tuple[Self, list[dict[str, Any]]]:
        """The log in `folder` (made if need be), and its records.

        Raises:
            WalError: another process writes it, a record is damaged, or the folder cannot be used.
        """
        path = folder / FILE
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(folder / f"{FILE}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as failed:
            raise WalError(f"{path}: {failed.strerror}") from failed
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as failed:
            os.close(lock)
            busy = isinstance(failed, BlockingIOError)
            reason = "another coordinator writes it" if busy else failed.strerror
            raise WalError(f"{path}: {reason}") from failed
        try:
            records, end = decode_records(path.read_bytes(), path)
            os.ftruncate(descriptor, end)
            os.lseek(descriptor, end, os.SEEK_SET)
        except BaseException as failed:
            os.close(descriptor)
            os.close(lock)
            if isinstance(failed, OSError):
                raise WalError(f"{path}: {failed.strerror}") from failed
            raise
        return cls(path, descriptor, lock, end), records

    @property
    def is_broken(self) -> bool:
        """Whether it takes nothing until `replace` succeeds."""
        return self._broken is not None

    def append(self, record: dict[str, Any]) -> None:
        """Make one record durable.

        Raises:
            WalError: it is not; the log is as it was before.
        """
        if self._broken is not None:
            raise WalError(f"{self.path}: {self._broken}")
        frame = encode_record(record)
        try:
            _write_all(self._fd, frame)
            os.fdatasync(self._fd)
        except OSError as failed:
            self._take_back(failed)
            raise WalError(f"{self.path}: {failed.strerror}") from failed
        self.num_bytes += len(frame)

    def replace(self, record: dict[str, Any]) -> None:
        """One record instead of all that there are: a snapshot.

        Raises:
            WalError: it could not be written: the log is as it was; or it may not last: the log
                takes nothing until a later one does.
        """
        half = self.path.with_name(f".{FILE}.half")
        frame = encode_record(record)
        try:
            descriptor = os.open(half, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                _write_all(descriptor, frame)
                os.fsync(descriptor)
                half.replace(self.path)
            except BaseException:
                os.close(descriptor)
                raise
        except OSError as failed:
            half.unlink(missing_ok=True)
            raise WalError(f"{self.path}: {failed.strerror}") from failed
        os.close(self._fd)  # from here on, the new file is the log
        self._fd, self.num_bytes, self._broken = descriptor, len(frame), None
        try:
            _sync_folder(self.path.parent)
        except OSError as failed:  # after a power cut it might be the old one again
            self._broken = f"its folder: {failed.strerror}; a snapshot must succeed first"
            raise WalError(f"{self.path}: {self._broken}") from failed

    def remove(self) -> None:
        """Delete the log, and its folder if that is empty: there is nothing left to remember."""
        forget(self.path.parent)
        self.close()

    def close(self) -> None:
        """Let another process write. Idempotent."""
        for descriptor in (self._fd, self._lock):
            if descriptor >= 0:
                os.close(descriptor)
        self._fd = self._lock = -1

    def _take_back(self, failed: OSError) -> None:
        """Cut off what may have been written of a record that did not succeed."""
        try:
            os.ftruncate(self._fd, self.num_bytes)
            os.lseek(self._fd, self.num_bytes, os.SEEK_SET)
            os.fsync(self._fd)
        except OSError as worse:
            why = f"{failed.strerror}, then {worse.strerror}"
            self._broken = f"{why}; a snapshot must succeed first"


def encode_record(record: dict[str, Any]) -> bytes:
    """A record as it lies in the log. Raises WalError: it is too large."""
    body = msgspec.json.encode(record, order="sorted")
    if len(body) > RECORD_BYTES_MAX:
        raise WalError(f"a record of {len(body)} bytes; {RECORD_BYTES_MAX} are allowed")
    head = struct.pack("<II", len(body), crc32(body))
    return head + struct.pack("<I", crc32(head)) + body


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def decode_records(data: bytes, path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records of a log (at `path`), and where the last whole one ends.

    A crash in the middle of a write leaves a part of a record, or zeros where bytes had not come
    yet; a JSON object does not end in a zero.

    Raises:
        WalError: a record is damaged.
    """
    records: list[dict[str, Any]] = []
    at = 0
    while at < len(data):
        rest = data[at:]
        if len(rest) < _HEAD.size or not any(rest[_HEAD.size - 1 :]):
            break
        length, crc, head_crc = _HEAD.unpack_from(rest)
        if crc32(rest[:8]) != head_crc:
            raise WalError(f"{path}: the record at byte {at} is damaged (its head)")
        end = _HEAD.size + length
        body = rest[_HEAD.size : end]
        if len(body) < length:
            break
        if crc32(body) != crc:
            if len(rest) == end and body.endswith(b"\0"):
                break
            raise WalError(f"{path}: the record at byte {at} is damaged (its body)")
        try:
            records.append(msgspec.json.decode(body, type=dict[str, Any]))
        except msgspec.DecodeError as wrong:
            raise WalError(f"{path}: the record at byte {at} is no JSON object") from wrong
        at += end
    return records, at


def forget(folder: Path) -> None:
    """Delete the log in a folder, and the folder if that leaves it empty; nobody writes it now."""
    for name in (FILE, f"{FILE}.lock"):
        (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it holds something else, or is not there
        folder.rmdir()
