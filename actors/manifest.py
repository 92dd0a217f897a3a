"""Digests of experts: what proves that a copy is the expert of the checkpoint, bit for bit.

A digest covers the canonical in-memory form of one expert in the served dtype: its tensors in
sorted order of name, each with name, dtype and shape, then its contiguous bytes. It does not
depend on the number of shards, on the checkpoint's layout or on how kernels pack the weights.
Experts held in int8 or int4 are digested as they are held, quantised weights and scales: a copy is
made of those and must match them, and quantising is a function of the checkpoint alone.
"""

from collections.abc import Mapping
from typing import Self

import msgspec
import torch
from blake3 import blake3
from torch import Tensor

from remora.actors.expert_state import ExpertDigest
from remora.comm.errors import WeightsError


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Digests of a set of experts in one dtype, sorted by layer, then expert."""

    dtype: str  # "float32", "bfloat16", "int8" or "int4"
    experts: tuple[ExpertDigest, ...]

    @classmethod
    def of(cls, dtype: str, experts: Mapping[tuple[int, int], ExpertDigest]) -> Self:
        """From digests by (layer, expert)."""
        ordered = tuple(experts[key] for key in sorted(experts))
        return cls(dtype=dtype, experts=ordered)

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Inverse of `to_json`. Raises `msgspec.DecodeError`."""
        return msgspec.json.decode(data, type=cls)

    def to_json(self) -> bytes:
        """Deterministic JSON, one expert a line."""
        return msgspec.json.format(msgspec.json.encode(self, order="deterministic"), indent=1)

    def by_expert(self) -> dict[tuple[int, int], ExpertDigest]:
        """Entries by (layer, expert)."""
        return {(entry.layer, entry.expert): entry for entry in self.experts}

    def merge(self, other: "Manifest") -> "Manifest":
        """Both sets together; an expert in both must have one digest.

        Raises:
            WeightsError: different dtypes, or different digests of one expert.
        """
        if self.dtype != other.dtype:
            raise WeightsError(f"manifests of different dtypes: {self.dtype} and {other.dtype}")
        mine, theirs = self.by_expert(), other.by_expert()
        for key in sorted(mine.keys() & theirs.keys()):
            if mine[key] != theirs[key]:
                raise WeightsError(
                    f"layer {key[0]} expert {key[1]}: digests differ: "
                    f"{mine[key].digest} and {theirs[key].digest}"
                )
        both = mine | theirs
        return Manifest(dtype=self.dtype, experts=tuple(both[key] for key in sorted(both)))


def digest_expert(layer: int, expert: int, tensors: Mapping[str, Tensor]) -> ExpertDigest:
    """Digest of one expert's tensors (CPU, any strides), named as the experts class names them."""
    hasher = blake3()
    nbytes = 0
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        hasher.update(tensor.view(-1).view(torch.uint8).numpy().data)
        nbytes += tensor.nbytes
    return ExpertDigest(layer=layer, expert=expert, digest=hasher.hexdigest(), nbytes=nbytes)
