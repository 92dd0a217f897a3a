"""The write-ahead log: what is acknowledged is there, a torn tail goes, damage is an error."""

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.operations import world_operations

from remora.cluster.operation import ScaleTo
from remora.cluster.wal import FILE, Wal, WalError, decode_records

RECORDS = [{"t": "base", "n": 0}, {"t": "begin", "text": "é" * 40}, {"t": "ended", "n": [1, 2]}]


def written(folder: Path) -> Path:
    wal, found = Wal.open(folder)
    assert found == []
    for record in RECORDS:
        wal.append(record)
    wal.close()
    return folder / FILE


def read(folder: Path) -> list[dict[str, object]]:
    wal, found = Wal.open(folder)
    wal.close()
    return found


def test_what_was_appended_is_there_in_order_and_canonical(tmp_path: Path) -> None:
    path = written(tmp_path)
    assert read(tmp_path) == RECORDS
    assert b'{"n":0,"t":"base"}' in path.read_bytes()
    wal, _ = Wal.open(tmp_path)
    wal.append({"t": "more"})
    wal.close()
    assert read(tmp_path) == [*RECORDS, {"t": "more"}]


def test_a_torn_tail_is_dropped_wherever_it_is_torn(tmp_path: Path) -> None:
    path = written(tmp_path)
    whole = path.read_bytes()
    lengths = [len(whole)]
    for cut in range(len(whole) - 1, 0, -1):
        path.write_bytes(whole[:cut])
        found = read(tmp_path)
        assert found == RECORDS[: len(found)] and len(found) < len(RECORDS)
        lengths.append(path.stat().st_size)
        wal, _ = Wal.open(tmp_path)
        wal.append({"t": "after"})
        wal.close()
        assert read(tmp_path) == [*found, {"t": "after"}]
    assert len(set(lengths)) == len(RECORDS) + 1, "it ends where a record ended"


@pytest.mark.parametrize("keep", [0, 1, 5, 11, 12, 20, 34])
def test_blocks_that_had_not_come_yet_are_a_torn_tail(tmp_path: Path, keep: int) -> None:
    path = written(tmp_path)
    whole = path.read_bytes()
    last = len(whole) - 12 - len(b'{"n":[1,2],"t":"ended"}')
    path.write_bytes(whole[: last + keep].ljust(len(whole), b"\0"))
    assert read(tmp_path) == RECORDS[:2]


def test_a_flipped_bit_is_an_error_that_names_the_record(tmp_path: Path) -> None:
    path = written(tmp_path)
    whole = path.read_bytes()
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        with pytest.raises(WalError, match=r"the record at byte \d+ is damaged"):
            Wal.open(tmp_path)
        assert path.read_bytes() == damaged, "nothing of it is touched"


def test_a_snapshot_takes_the_place_of_all(tmp_path: Path) -> None:
    path = written(tmp_path)
    wal, _ = Wal.open(tmp_path)
    before = wal.num_bytes
    wal.replace({"t": "base", "n": 7})
    assert wal.num_bytes == path.stat().st_size < before
    wal.append({"t": "begin"})
    wal.close()
    assert read(tmp_path) == [{"t": "base", "n": 7}, {"t": "begin"}]
    assert sorted(p.name for p in tmp_path.iterdir()) == [FILE, f"{FILE}.lock"]


def test_a_snapshot_that_may_not_last_is_the_log_and_takes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path)
    wal, _ = Wal.open(tmp_path)

    def failing(_: Path) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("remora.cluster.wal._sync_folder", failing)
        with pytest.raises(WalError, match="Input/output error"):
            wal.replace({"t": "base", "n": 7})
    with pytest.raises(WalError, match="a snapshot must succeed first"):
        wal.append({"t": "committed"})
    assert decode_records((tmp_path / FILE).read_bytes(), tmp_path)[0] == [{"t": "base", "n": 7}]
    wal.replace({"t": "base", "n": 8})
    wal.append({"t": "committed"})
    wal.close()
    assert read(tmp_path) == [{"t": "base", "n": 8}, {"t": "committed"}]


def test_a_volume_that_was_away_for_a_moment_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each operation failed from then on, restores too, until somebody ended the coordinator."""

    def away(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with world_operations(tmp_path) as operations, monkeypatch.context() as patch:
        for name in ("fdatasync", "ftruncate", "fsync"):
            patch.setattr(os, name, away)
        failed = operations.request("first", ScaleTo(3))
        assert failed["reason"].endswith("Input/output error")
        failed = operations.request("second", ScaleTo(3))
        assert "a snapshot must succeed first" in failed["reason"]
        patch.undo()
        operations.request("third", ScaleTo(3))  # upon its end a snapshot is tried
        operations.request("fourth", ScaleTo(3))
        assert operations.wait("fourth", 20)["outcome"] == "done"
    history = {r["operation"]["operation_id"]: r["t"] for r in read(tmp_path) if "operation" in r}
    assert history == {"fourth": "ended"}


def test_a_volume_that_does_not_answer_is_an_error_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With any other one Ray gave the coordinator up for good."""

    def away(*_: object) -> bytes:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    written(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(WalError, match="Stale file handle"):
        patch.setattr(Path, "read_bytes", away)
        Wal.open(tmp_path)
    Wal.open(tmp_path)[0].close()  # the lock is free


def test_one_writer_and_the_lock_goes_with_the_process(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib\n"
        "from remora.cluster.wal import Wal\n"
        "wal, _ = Wal.open(pathlib.Path(sys.argv[1]))\n"
        "print('open', flush=True)\n"
        "sys.stdin.read()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path,
    )  # fmt: skip
    assert other.stdout is not None and other.stdout.readline() == b"open\n"
    with pytest.raises(WalError, match="another coordinator writes it"):
        Wal.open(tmp_path)
    other.kill()
    other.wait()
    other.stdout.close()
    assert other.stdin is not None
    other.stdin.close()
    assert read(tmp_path) == []


@contextmanager
def full_disk(num_bytes: int) -> Iterator[None]:
    """No file of this process may grow beyond `num_bytes`: writes fail as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_costs_the_record_and_nothing_else(tmp_path: Path) -> None:
    path = written(tmp_path)
    wal, _ = Wal.open(tmp_path)
    size = path.stat().st_size
    with full_disk(size + 20):
        with pytest.raises(WalError, match=r"too large|No space"):
            wal.append({"t": "begin", "text": "x" * 100})
        with pytest.raises(WalError, match=r"too large|No space"):
            wal.replace({"t": "base", "text": "x" * 1000})
    assert path.stat().st_size == size
    wal.append({"t": "begin"})
    wal.close()
    assert read(tmp_path) == [*RECORDS, {"t": "begin"}]
    assert not (tmp_path / f".{FILE}.half").exists()


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WalError, match="Not a directory"):
        Wal.open(tmp_path / "file" / "under")


def test_nothing_is_left_of_a_log_that_is_removed(tmp_path: Path) -> None:
    wal, _ = Wal.open(tmp_path / "one")
    wal.append({"t": "base"})
    wal.remove()
    assert list(tmp_path.iterdir()) == []


def test_private(tmp_path: Path) -> None:
    assert os.stat(written(tmp_path / "new")).st_mode & 0o077 == 0
