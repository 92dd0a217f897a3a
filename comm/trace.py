"""Routing traces: which experts real tokens chose, in a compact file (format: docs/traces.md).

    with TraceWriter(path, header) as writer:
        writer.append(rows)                      # as often as wanted; memory stays one block
    trace = read_trace(path)                     # arrays (comm/trace_reader.py)

A file is a header and then records, each with a checksum: blocks of tokens (zlib over columns),
labels that later blocks refer to, and an end. What a killed recorder leaves is read up to its last
whole block, and `is_whole` says so.

Shape suffixes: T tokens, L MoE layers, K top-k.
"""

import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from remora.comm.bundles import NO_EXPERT
from remora.comm.errors import TraceError

MAGIC: Final = b"RMTRACE\n"
VERSION: Final = 1
BLOCK_TOKENS: Final = 4096  # rows that a writer gathers before it compresses them
BLOCK_TOKENS_MAX: Final = 1 << 16
HEADER_BYTES_MAX: Final = 1 << 20
LABELS_MAX: Final = 1 << 15  # of one kind in one file: an int16 column names them
EXPERTS_MAX: Final = 1 << 15
RECORD_BYTES_MAX: Final = 1 << 30  # of one block, before compression
NO_LABEL: Final = -1
PREFILL: Final = 0
DECODE: Final = 1

PRELUDE: Final = struct.Struct("<8sHHII")  # magic, version, 0, header bytes, CRC of the header
RECORD: Final = struct.Struct("<4sIIII")  # tag, tokens, raw bytes, stored bytes, CRC of stored
_ZLIB_LEVEL: Final = 4
_COLUMNS: Final = (
    ("token_T", "<i4"),
    ("position_T", "<i4"),
    ("request_T", "<i4"),
    ("domain_T", "<i2"),
    ("source_T", "<i2"),
    ("phase_T", "u1"),
)


class TraceHeader(msgspec.Struct, frozen=True, kw_only=True):
    """What a whole file has in common. Raises TraceError (from `check`) when it contradicts."""

    model: str  # checkpoint directory or id, for people
    num_experts: int  # of one layer; ids are 0 .. num_experts - 1
    top_k: int
    moe_layers: tuple[int, ...]  # decoder-layer index of each recorded layer
    vocab_size: int = 0  # 0: token ids were not recorded
    has_weights: bool = False
    note: str = ""

    @property
    def id_dtype(self) -> str:
        """Of expert ids in the file; its largest value means none."""
        return "u1" if self.num_experts < 256 else "<u2"

    def row_bytes(self) -> int:
        """Bytes of one token before compression."""
        pairs = len(self.moe_layers) * self.top_k
        fixed = sum(np.dtype(kind).itemsize for _, kind in _COLUMNS)
        return fixed + pairs * (np.dtype(self.id_dtype).itemsize + 2 * self.has_weights)

    def check(self) -> None:
        """Raises TraceError when no token could be described by this."""
        if not (1 <= self.num_experts < EXPERTS_MAX and 1 <= self.top_k <= self.num_experts):
            raise TraceError(f"a trace of top {self.top_k} of {self.num_experts} experts")
        if not self.moe_layers or len(set(self.moe_layers)) != len(self.moe_layers):
            raise TraceError(f"a trace of MoE layers {self.moe_layers}")
        if self.row_bytes() > RECORD_BYTES_MAX // BLOCK_TOKENS:
            raise TraceError(f"a trace whose tokens take {self.row_bytes()} bytes each")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Tokens and what they chose. Rows of a request ascend in position; requests may interleave."""

    header: TraceHeader
    token_T: NDArray[np.int32]  # token id that was the layer's input
    position_T: NDArray[np.int32]  # of the token in its sequence
    request_T: NDArray[np.int32]  # number of the request in this file
    domain_T: NDArray[np.int16]  # index into `domains`, or NO_LABEL
    source_T: NDArray[np.int16]  # index into `sources` (who recorded it), or NO_LABEL
    phase_T: NDArray[np.uint8]  # PREFILL or DECODE
    experts_LTK: NDArray[np.int16]  # in the gate's order, NO_EXPERT where there are fewer
    weights_LTK: NDArray[np.float16] | None = None
    domains: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    is_whole: bool = True  # False: the file ends in the middle

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.token_T)

    def select(self, index_T: Any) -> "Trace":
        """The tokens of a boolean mask, a slice or an array of indices."""
        columns = {name: getattr(self, name)[index_T] for name, _ in _COLUMNS}
        weights = None if self.weights_LTK is None else self.weights_LTK[:, index_T]
        return replace(
            self, **columns, experts_LTK=self.experts_LTK[:, index_T], weights_LTK=weights
        )

    def domain_mask(self, *names: str) -> NDArray[np.bool_]:
        """Which tokens are of one of these domains. Raises TraceError for an unknown one."""
        for name in names:
            if name not in self.domains:
                raise TraceError(f"no domain {name!r} in this trace; it has {self.domains}")
        return np.isin(self.domain_T, [self.domains.index(name) for name in names])


def make_trace(
    header: TraceHeader,
    *,
    experts_LTK: NDArray[np.integer[Any]],
    request_T: NDArray[np.integer[Any]],
    token_T: NDArray[np.integer[Any]] | None = None,
    position_T: NDArray[np.integer[Any]] | None = None,
    domain: str | None = None,
    source: str | None = None,
    phase_T: NDArray[np.integer[Any]] | int = PREFILL,
    weights_LTK: NDArray[np.floating[Any]] | None = None,
) -> Trace:
    """A trace out of arrays of other types, of one domain and one source.

    Args:
        position_T: counted from 0 in each request when None (its rows must then be in order).

    Raises:
        TraceError: ids out of range, or shapes that do not agree with the header.
    """
    header.check()
    num_tokens = len(request_T)
    wanted = (len(header.moe_layers), num_tokens, header.top_k)
    if experts_LTK.shape != wanted:
        raise TraceError(f"expert ids {experts_LTK.shape}, the header says {wanted}")
    if experts_LTK.size and not (
        experts_LTK.min() >= NO_EXPERT and experts_LTK.max() < header.num_experts
    ):
        raise TraceError(
            f"expert ids {experts_LTK.min()} to {experts_LTK.max()} of {header.num_experts}"
        )
    if position_T is None:
        position_T = np.zeros(num_tokens, np.int32)
        for number in np.unique(request_T):
            rows = np.flatnonzero(request_T == number)
            position_T[rows] = np.arange(len(rows))
    label_T = np.zeros(num_tokens, np.int16)
    return Trace(
        header=header,
        token_T=np.zeros(num_tokens, np.int32) if token_T is None else token_T.astype(np.int32),
        position_T=position_T.astype(np.int32),
        request_T=request_T.astype(np.int32),
        domain_T=label_T + (NO_LABEL if domain is None else 0),
        source_T=label_T + (NO_LABEL if source is None else 0),
        phase_T=np.broadcast_to(phase_T, num_tokens).astype(np.uint8),
        experts_LTK=experts_LTK.astype(np.int16),
        weights_LTK=weights_LTK.astype(np.float16) if weights_LTK is not None else None,
        domains=() if domain is None else (domain,),
        sources=() if source is None else (source,),
    )


def join(traces: Sequence[Trace]) -> Trace:
    """One after another; domains and sources are brought together by name.

    Request numbers stay as they are. Raises TraceError for traces of different headers.
    """
    first = traces[0]
    for other in traces[1:]:
        if replace_note(other.header) != replace_note(first.header):
            raise TraceError(f"traces of different models: {first.header}, {other.header}")
    domains = tuple(dict.fromkeys(name for t in traces for name in t.domains))
    sources = tuple(dict.fromkeys(name for t in traces for name in t.sources))
    columns = {name: np.concatenate([getattr(t, name) for t in traces]) for name, _ in _COLUMNS}
    columns["domain_T"] = _renamed([(t.domain_T, t.domains) for t in traces], domains)
    columns["source_T"] = _renamed([(t.source_T, t.sources) for t in traces], sources)
    weights = [t.weights_LTK for t in traces if t.weights_LTK is not None]
    return Trace(
        header=first.header,
        **columns,
        experts_LTK=np.concatenate([t.experts_LTK for t in traces], axis=1),
        weights_LTK=np.concatenate(weights, axis=1) if len(weights) == len(traces) else None,
        domains=domains,
        sources=sources,
        is_whole=all(t.is_whole for t in traces),
    )


def replace_note(header: TraceHeader) -> TraceHeader:
    """The header without what is for people alone."""
    return msgspec.structs.replace(header, note="", model="")


def _renamed(
    parts: list[tuple[NDArray[np.int16], tuple[str, ...]]], names: tuple[str, ...]
) -> NDArray[np.int16]:
    """Labels of several traces as indices into `names`."""
    out = []
    for label_T, own in parts:
        table = np.array([*(names.index(name) for name in own), NO_LABEL], np.int16)
        out.append(table[label_T])
    return np.concatenate(out)


def encode_block(trace: Trace) -> bytes:
    """One "TOKS" record of these tokens; labels are the trace's own numbers."""
    header, num_tokens = trace.header, trace.num_tokens
    assert 0 < num_tokens <= BLOCK_TOKENS_MAX, f"a block of {num_tokens} tokens"
    parts = [getattr(trace, name).astype(kind).tobytes() for name, kind in _COLUMNS]
    ids = trace.experts_LTK.astype(header.id_dtype)  # NO_EXPERT wraps to the largest value
    parts.append(ids.tobytes())
    if header.has_weights:
        assert trace.weights_LTK is not None, "the header promises weights"
        parts.append(trace.weights_LTK.astype("<f2").tobytes())
    raw = b"".join(parts)
    return _record(b"TOKS", num_tokens, raw)


def _record(tag: bytes, num_tokens: int, raw: bytes) -> bytes:
    stored = zlib.compress(raw, _ZLIB_LEVEL)
    return RECORD.pack(tag, num_tokens, len(raw), len(stored), zlib.crc32(stored)) + stored


def decode_block(header: TraceHeader, num_tokens: int, raw: bytes) -> Trace:
    """Inverse of `encode_block` for its uncompressed body, without names of labels.

    Raises:
        ValueError: an expert that the model does not have.
    """
    columns: dict[str, Any] = {}
    at = 0
    for name, kind in _COLUMNS:
        columns[name] = np.frombuffer(raw, kind, num_tokens, at).copy()
        at += columns[name].nbytes
    shape = (len(header.moe_layers), num_tokens, header.top_k)
    count = int(np.prod(shape))
    ids = np.frombuffer(raw, header.id_dtype, count, at).reshape(shape)
    at += ids.nbytes
    is_none = ids == np.iinfo(ids.dtype).max
    strange = ids[(ids >= header.num_experts) & ~is_none]
    if len(strange):
        raise ValueError(f"experts up to {strange.max()} of {header.num_experts}, from 0 on")
    experts = ids.astype(np.int16)
    experts[is_none] = NO_EXPERT
    weights = None
    if header.has_weights:
        weights = np.frombuffer(raw, "<f2", count, at).reshape(shape).copy()
    return Trace(header=header, **columns, experts_LTK=experts, weights_LTK=weights)


def unfinished(path: Path) -> Path:
    """Where a trace is written that is to replace the one at `path`."""
    return path.with_name(f"{path.name}.part")


class TraceWriter:
    """Writes a trace; a context manager. Not thread-safe.

    Args:
        path: must not exist, unless `overwrite`. What is there is kept until the new one is whole:
            that is written beside it, as `unfinished(path)`.

    Raises:
        TraceError: it exists, or cannot be written (disk full, no such directory); from every
            method. What was written before stays readable. Where that is no token, no file stays.
    """

    def __init__(self, path: Path, header: TraceHeader, *, overwrite: bool = False) -> None:
        header.check()
        self.header = header
        self.num_tokens = 0  # given so far
        self._path = Path(os.path.realpath(path))  # it is not a link that is replaced
        is_device = os.path.exists(path) and not os.path.isfile(path)
        self._is_beside = overwrite and not is_device
        self._half = unfinished(self._path) if self._is_beside else self._path
        self._labels: dict[str, list[str]] = {"domains": [], "sources": []}
        self._said = 0  # labels in the file
        self._waiting: list[Trace] = []
        self._num_waiting = 0
        self._is_empty = True  # no token is in the file
        body = msgspec.msgpack.encode(header)
        try:
            self._file: FileIO = self._half.open("wb" if overwrite else "xb", buffering=0)
        except FileExistsError:
            raise TraceError(f"{path} exists already; choose another, or --force") from None
        except OSError as error:
            raise self._cannot(error) from error
        try:
            self._put(PRELUDE.pack(MAGIC, VERSION, 0, len(body), zlib.crc32(body)) + body)
        except TraceError:
            self._drop()
            raise

    def append(self, rows: Trace) -> None:
        """Add tokens; they reach the file when a block of them is full, or at the end."""
        if replace_note(rows.header) != replace_note(self.header):
            raise TraceError(f"rows of {rows.header} for a trace of {self.header}")
        rows = replace(
            rows,
            header=self.header,
            domain_T=self._number("domains", rows.domain_T, rows.domains),
            source_T=self._number("sources", rows.source_T, rows.sources),
            domains=tuple(self._labels["domains"]),
            sources=tuple(self._labels["sources"]),
        )
        self.num_tokens += rows.num_tokens
        for begin in range(0, rows.num_tokens, BLOCK_TOKENS):
            part = rows.select(slice(begin, begin + BLOCK_TOKENS))
            if self._num_waiting + part.num_tokens > BLOCK_TOKENS:
                self.flush()
            self._waiting.append(part)
            self._num_waiting += part.num_tokens

    def flush(self) -> None:
        """Write what waits, as a block."""
        names = [*self._labels["domains"], *self._labels["sources"]]
        if len(names) > self._said:
            self._said = len(names)
            self._put(_record(b"LABL", 0, msgspec.msgpack.encode(self._labels)))
        if self._waiting:
            block = join(self._waiting) if len(self._waiting) > 1 else self._waiting[0]
            self._waiting, self._num_waiting = [], 0
            self._put(encode_block(block))
            self._is_empty = False

    def close(self) -> None:
        """Write what waits and the end; the file is whole then, and in its place."""
        if self._file.closed:
            return
        try:
            self.flush()
            self._put(_record(b"DONE", 0, msgspec.msgpack.encode(self.num_tokens)))
        except TraceError:
            self._drop()
            raise
        self._file.close()
        if self._is_beside:
            try:
                self._half.replace(self._path)
            except OSError as error:
                raise self._cannot(error) from error

    def __enter__(self) -> "TraceWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> Literal[False]:
        if error is None:
            self.close()
        else:
            self._drop()
        return False

    def _drop(self) -> None:
        self._file.close()  # without an end: the file says that it is not whole
        if self._is_empty and os.path.isfile(self._half):
            self._half.unlink()  # nothing is in it, and the next try would find it there

    def _number(
        self, kind: str, label_T: NDArray[np.int16], names: tuple[str, ...]
    ) -> NDArray[np.int16]:
        """Labels as numbers of this file."""
        known = self._labels[kind]
        new = [name for name in names if name not in known]
        if len(known) + len(new) > LABELS_MAX:
            raise TraceError(f"{len(known) + len(new)} {kind} in a trace, at most {LABELS_MAX}")
        known.extend(new)
        return _renamed([(label_T, names)], tuple(known))

    def _put(self, data: bytes) -> None:
        if self._file.closed:
            raise TraceError(f"{self._half} is closed")
        try:
            left = memoryview(data)
            while left:  # unbuffered: what has been written is what a reader finds
                left = left[self._file.write(left) :]
        except OSError as error:
            self._file.close()
            raise self._cannot(error) from error

    def _cannot(self, error: OSError) -> TraceError:
        return TraceError(
            f"{self._half}: cannot be written: {error.strerror} (after {self.num_tokens} tokens)"
        )
