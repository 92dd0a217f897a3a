"""Reads what `comm/trace.py` writes, block by block, and trusts nothing in it.

    reader = TraceReader(path)
    for block in reader.blocks():        # one block in memory at a time
        ...
    reader.is_whole                      # after the last: False when the file ends in the middle

Shape suffixes as there.
"""

import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, TypeVar

import msgspec
import numpy as np

from remora.comm.errors import TraceError
from remora.comm.trace import (
    BLOCK_TOKENS_MAX,
    HEADER_BYTES_MAX,
    LABELS_MAX,
    MAGIC,
    PRELUDE,
    RECORD,
    RECORD_BYTES_MAX,
    VERSION,
    Trace,
    TraceHeader,
    decode_block,
    join,
    make_trace,
)

_T = TypeVar("_T")


class _Labels(msgspec.Struct, frozen=True):
    domains: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()


class TraceReader:
    """One file of routing traces.

    Raises:
        TraceError: no such file, no trace, another version, or damaged; from `blocks` too.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_whole = False
        with self._open() as file:
            self.header = self._header(file)

    def blocks(self) -> Iterator[Trace]:
        """The tokens in order, at most BLOCK_TOKENS_MAX at once, each block with the labels known
        so far. A file that ends in the middle of a record, or without an end, is read up to there;
        `is_whole` tells afterwards."""
        self.is_whole = False
        labels, num_tokens = _Labels(), 0
        with self._open() as file:
            self._header(file)
            while (record := self._record(file)) is not None:
                tag, count, raw = record
                if tag == b"TOKS":
                    num_tokens += count
                    yield self._block(labels, count, raw)
                elif tag == b"LABL":
                    labels = self._decode(raw, _Labels)
                    if max(len(labels.domains), len(labels.sources)) > LABELS_MAX:
                        raise TraceError(f"{self.path}: more than {LABELS_MAX} labels")
                elif tag == b"DONE":
                    if (said := self._decode(raw, int)) != num_tokens:
                        raise TraceError(f"{self.path}: {num_tokens} tokens, its end says {said}")
                    self.is_whole = True
                    return
                else:
                    raise TraceError(f"{self.path}: damaged: a record of kind {tag!r}")

    # -- inside -------------------------------------------------------------------------------

    def _open(self) -> BinaryIO:
        try:
            return self.path.open("rb")
        except OSError as error:
            raise TraceError(f"{self.path}: cannot be read: {error.strerror}") from error

    def _header(self, file: BinaryIO) -> TraceHeader:
        prelude = file.read(PRELUDE.size)
        if len(prelude) < PRELUDE.size or prelude[: len(MAGIC)] != MAGIC:
            raise TraceError(f"{self.path}: not a routing trace")
        _, version, _, size, crc = PRELUDE.unpack(prelude)
        if version != VERSION:
            raise TraceError(f"{self.path}: a trace of version {version}; {VERSION} can be read")
        if size > HEADER_BYTES_MAX:
            raise TraceError(f"{self.path}: damaged: a header of {size} bytes")
        body = file.read(size)
        if len(body) < size or zlib.crc32(body) != crc:
            raise TraceError(f"{self.path}: damaged: its header does not match its checksum")
        header = self._decode(body, TraceHeader)
        header.check()
        return header

    def _record(self, file: BinaryIO) -> tuple[bytes, int, bytes] | None:
        """Tag, tokens and body of the next record; None where the file ends too early."""
        head = file.read(RECORD.size)
        if len(head) < RECORD.size:
            return None
        tag, count, raw_bytes, stored_bytes, crc = RECORD.unpack(head)
        sizes = (raw_bytes, stored_bytes)
        if count > BLOCK_TOKENS_MAX or min(sizes) < 1 or max(sizes) > RECORD_BYTES_MAX:
            raise TraceError(f"{self.path}: damaged: a block of {count} tokens, {raw_bytes} bytes")
        if tag == b"TOKS" and (count < 1 or raw_bytes != count * self.header.row_bytes()):
            raise TraceError(f"{self.path}: damaged: {count} tokens in {raw_bytes} bytes")
        stored = file.read(stored_bytes)
        if len(stored) < stored_bytes:
            return None
        if zlib.crc32(stored) != crc:
            raise TraceError(f"{self.path}: damaged: a block does not match its checksum")
        try:
            raw = inflated(stored, raw_bytes)
        except ValueError as error:
            raise TraceError(f"{self.path}: damaged: {error}") from error
        return tag, count, raw

    def _block(self, labels: _Labels, count: int, raw: bytes) -> Trace:
        try:
            block = decode_block(self.header, count, raw)
        except ValueError as error:
            raise TraceError(f"{self.path}: damaged: {error}") from error
        for label_T, names in ((block.domain_T, labels.domains), (block.source_T, labels.sources)):
            if label_T.min() < -1 or label_T.max() >= len(names):
                raise TraceError(f"{self.path}: damaged: a label that the file does not name")
        return replace(block, domains=labels.domains, sources=labels.sources)

    def _decode(self, data: bytes, kind: type[_T]) -> _T:
        try:
            return msgspec.msgpack.decode(data, type=kind)
        except msgspec.DecodeError as error:
            raise TraceError(f"{self.path}: damaged: {error}") from error


def inflated(stored: bytes, raw_bytes: int) -> bytes:
    """A zlib stream of exactly `raw_bytes` bytes. Raises ValueError for any other."""
    inflate = zlib.decompressobj()
    try:
        raw = inflate.decompress(stored, raw_bytes)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if len(raw) != raw_bytes or inflate.unconsumed_tail:
        raise ValueError("a block is not of the size that it says")
    return raw


def decode_record(header: TraceHeader, data: bytes) -> Trace:
    """Inverse of `trace.encode_block`: one whole record, from a process of ours."""
    tag, count, raw_bytes, stored_bytes, crc = RECORD.unpack_from(data)
    stored = data[RECORD.size :]
    assert tag == b"TOKS" and len(stored) == stored_bytes, f"{tag!r}, {len(stored)} bytes"
    assert zlib.crc32(stored) == crc, "a block that does not match its checksum"
    return decode_block(header, count, inflated(stored, raw_bytes))


def read_trace(path: Path, *, tokens_max: int | None = None) -> Trace:
    """A whole file in memory.

    Args:
        tokens_max: only the first so many tokens; `is_whole` is then False if more follow.

    Raises:
        TraceError: as `TraceReader`.
    """
    reader = TraceReader(path)
    parts: list[Trace] = []
    num_tokens = 0
    for block in reader.blocks():
        if tokens_max is not None and num_tokens + block.num_tokens > tokens_max:
            parts.append(block.select(slice(0, tokens_max - num_tokens)))
            break
        parts.append(block)
        num_tokens += block.num_tokens
    if not parts:
        header = reader.header
        none = np.zeros((len(header.moe_layers), 0, header.top_k), np.int16)
        weights = none.astype(np.float16) if header.has_weights else None
        parts = [make_trace(header, experts_LTK=none, request_T=none[0, :, 0], weights_LTK=weights)]
    return replace(join(parts), is_whole=reader.is_whole)
