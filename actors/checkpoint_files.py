"""Safetensors files of a checkpoint directory: headers checked up front, tensors read one by one.

Only safetensors is read: a pickle runs code. Every error names the file and, where there is one,
the tensor. Tensors are read with plain reads into memory of exactly their size (no mapping), so
that a process holds what it asked for and nothing else.

Format: https://github.com/huggingface/safetensors#format (8 bytes header length, JSON, data).
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from remora.comm.errors import WeightsError

HEADER_BYTES_MAX = 100_000_000  # the format's own bound
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """Where one tensor lies."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file
    nbytes: int


class Checkpoint:
    """The tensors of one checkpoint directory. Close it (or use it as a context) when done."""

    def __init__(self, directory: Path, tensors: Mapping[str, TensorEntry]) -> None:
        self.directory = directory
        self.tensors = tensors
        self._descriptors: dict[Path, int] = {}

    @classmethod
    def open(cls, directory: str | Path) -> Self:
        """Read the index and the headers of every file, and check them against the file sizes.

        Raises:
            WeightsError: a missing, truncated, damaged or pickle file, or a tensor that the index
                names and its file does not hold.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise WeightsError(f"{directory}: no such checkpoint directory")
        if (directory / INDEX_NAME).exists():
            return cls(directory, _read_indexed(directory))
        if (directory / SINGLE_NAME).exists():
            return cls(directory, read_header(directory / SINGLE_NAME))
        raise WeightsError(_why_no_weights(directory))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files. Reading afterwards opens them again."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def read(self, name: str, row: int | None = None, num_rows: int = 1) -> Tensor:
        """One tensor, or `num_rows` rows of its first dimension from `row`, in the file's dtype.

        Raises:
            WeightsError: no such tensor, or a file that ended early or cannot be read.
        """
        entry = self.tensors.get(name)
        if entry is None:
            raise WeightsError(f"{self.directory}: no tensor {name!r}")
        shape, offset, nbytes = entry.shape, entry.offset, entry.nbytes
        if row is not None:
            if not shape or not 0 <= row < row + num_rows <= shape[0]:
                raise WeightsError(
                    f"{entry.file}: tensor {name!r} of shape {shape} has no row {row}"
                )
            row_nbytes = nbytes // shape[0]
            offset, nbytes = offset + row * row_nbytes, num_rows * row_nbytes
            shape = (num_rows, *shape[1:])
        tensor = torch.empty(shape, dtype=entry.dtype)
        if nbytes:
            self._read_into(tensor, name, entry.file, offset, nbytes)
        return tensor

    def _read_into(self, tensor: Tensor, name: str, file: Path, offset: int, nbytes: int) -> None:
        view = tensor.view(-1).view(torch.uint8).numpy().data
        done = 0
        while done < nbytes:
            try:
                count = os.preadv(self._descriptor(file), [view[done:]], offset + done)
            except OSError as error:
                raise WeightsError(f"{file}: tensor {name!r} cannot be read: {error}") from error
            if count == 0:
                raise WeightsError(
                    f"{file}: truncated: tensor {name!r} needs {nbytes} bytes at {offset}, "
                    f"the file ends after {done} of them"
                )
            done += count

    def _descriptor(self, file: Path) -> int:
        if file not in self._descriptors:
            self._descriptors[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        return self._descriptors[file]


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Tensors of one safetensors file, offsets checked against its size.

    Raises:
        WeightsError: naming the file and what is wrong with it.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little") if size >= 8 else -1
            if not 2 <= length <= min(HEADER_BYTES_MAX, size - 8):
                raise WeightsError(
                    f"{file}: not a safetensors file, or truncated: header of {length} bytes "
                    f"in a file of {size}"
                )
            raw = json.loads(stream.read(length), object_pairs_hook=_unique_pairs)
    except OSError as error:
        raise WeightsError(f"{file}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # JSON, its text encoding, or a name that comes twice
        raise WeightsError(f"{file}: damaged header: {error}") from error
    if not isinstance(raw, dict):
        raise WeightsError(f"{file}: damaged header: not an object")
    data_start = 8 + length
    entries = {
        name: _parse_entry(file, name, value, data_start)
        for name, value in raw.items()
        if name != "__metadata__"
    }
    _check_layout(file, entries, data_start, size)
    return entries


def _parse_entry(file: Path, name: str, value: Any, data_start: int) -> TensorEntry:
    try:
        dtype = DTYPES.get(value["dtype"])
        shape = tuple(int(size) for size in value["shape"])
        begin, end = (int(offset) for offset in value["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{file}: tensor {name!r}: damaged header entry {value!r}") from error
    if dtype is None:
        raise WeightsError(f"{file}: tensor {name!r} has dtype {value['dtype']!r}: not supported")
    nbytes = dtype.itemsize * torch.Size(shape).numel()
    if min((*shape, begin), default=0) < 0 or end - begin != nbytes:
        raise WeightsError(
            f"{file}: tensor {name!r}: shape {shape} {dtype} takes {nbytes} bytes, "
            f"its offsets {begin}..{end} hold {end - begin}"
        )
    return TensorEntry(
        file=file, dtype=dtype, shape=shape, offset=data_start + begin, nbytes=nbytes
    )


def _check_layout(file: Path, entries: Mapping[str, TensorEntry], start: int, size: int) -> None:
    """Data must follow the header without holes or overlaps, and end where the file ends."""
    position = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != position:
            raise WeightsError(
                f"{file}: tensor {name!r} begins at byte {entry.offset}, expected {position}"
            )
        position += entry.nbytes
        if position > size:
            raise WeightsError(
                f"{file}: truncated: tensor {name!r} ends at byte {position} of a file of {size}"
            )
    if position != size:
        raise WeightsError(f"{file}: {size - position} bytes follow the last tensor")


def _read_indexed(directory: Path) -> dict[str, TensorEntry]:
    index = directory / INDEX_NAME
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        pairs = [(str(name), str(file)) for name, file in weight_map.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index}: damaged index: {error!r}") from error
    headers: dict[str, dict[str, TensorEntry]] = {}
    for name, file in pairs:
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise WeightsError(
                f"{index}: tensor {name!r} lies in {file!r}: only .safetensors files beside the "
                f"index are read"
            )
        if file not in headers:
            headers[file] = read_header(directory / file)
        if name not in headers[file]:
            raise WeightsError(f"{directory / file}: no tensor {name!r}, which {INDEX_NAME} names")
    return {name: headers[file][name] for name, file in pairs}


def _why_no_weights(directory: Path) -> str:
    names = sorted(path.name for path in directory.iterdir())
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    wanted = f"{SINGLE_NAME} or {INDEX_NAME}"
    if pickles:
        return (
            f"{directory / pickles[0]}: pickle weights are refused, they can run code; convert "
            f"the checkpoint to safetensors ({wanted})"
        )
    if any(name.endswith(".gguf") for name in names):
        return f"{directory}: GGUF weights are not read; {wanted} is needed"
    return f"{directory}: no weights: {wanted} is needed, found {names or 'nothing'}"


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        raise ValueError("a name comes twice")
    return unique
