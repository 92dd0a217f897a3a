"""What memory allows a decode step: the bytes of weights it touches over the cores' bandwidth.

A step reads every dense weight once and the weights of the distinct experts that its tokens chose.
How many those are is counted while transformers generates from prompts of the same kind (the
"routing" operation of its worker), so it belongs to the checkpoint and not to any engine. Keys and
values are left out: at these contexts they are a hundredth of it. The bandwidth is that of
`remora::stream_read` over a buffer far beyond the caches, by as many threads as there are cores, in
a process of its own (`workers/stream_worker.py`), taken in every round beside the decode it limits.
"""

import json
import math
import random
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from common import Row
from engines_report import Bar, Spread, small_only

STREAM_BYTES = 1 << 30
WANTED = {1: 0.60, 8: 0.70, 32: 0.75}  # of the limit, by batch size
_EXPERT = re.compile(r"\.layers\.(\d+)\..*\bexperts\.(\d+)\.")
_DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1, "I8": 1}


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes of a checkpoint, by what a decode step does with them."""

    dense_bytes: int  # read once in a step: all but experts and the embedding table
    expert_bytes: int  # of one expert of one layer
    total_bytes: int

    def touched(self, num_distinct: float) -> float:
        """Bytes of a step whose tokens chose so many distinct experts, summed over layers."""
        return self.dense_bytes + num_distinct * self.expert_bytes


def weights_of(model: Path) -> Weights:
    """Read from the headers of a checkpoint with one tensor for each expert's projection.

    Raises:
        ValueError: experts of different sizes, or none.
    """
    dense = total = 0
    experts: dict[tuple[str, str], int] = {}
    for name, size in _tensors(model):
        total += size
        found = _EXPERT.search(name)
        if found:
            key = (found[1], found[2])
            experts[key] = experts.get(key, 0) + size
        elif "embed_tokens" not in name:  # a row for each token
            dense += size
    sizes = set(experts.values())
    if len(sizes) != 1:
        raise ValueError(f"{model}: experts of {sorted(sizes)} bytes, one size is needed")
    return Weights(dense, sizes.pop(), total)


def _tensors(model: Path) -> Iterator[tuple[str, int]]:
    """(name, bytes) of every tensor."""
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                yield name, math.prod(entry["shape"]) * _DTYPE_BYTES[entry["dtype"]]


def limit_bar(
    label: str,
    batch: int,
    tokens_per_s: Sequence[float],
    bandwidths: Sequence[float],
    step_bytes: float,
) -> Bar:
    """`{label}_decode_b{batch}_of_limit`: tokens/s over batch x bandwidth / bytes, round by round.

    Args:
        tokens_per_s: of Remora, one for each round.
        bandwidths: bytes/s of the same rounds.
        step_bytes: of `Weights.touched`.
    """
    shares = [
        rate * step_bytes / (batch * bandwidth)
        for rate, bandwidth in zip(tokens_per_s, bandwidths, strict=True)
    ]
    wanted = WANTED.get(batch)
    bar = Bar(
        name=f"{label}_decode_b{batch}_of_limit",
        value=Spread.of(shares),
        unit="ratio",
        op=None if wanted is None else ">=",
        target=wanted,
    )
    return small_only(bar, label)


def limit_row(
    label: str, batch: int, distinct: float, step_bytes: float, bandwidths: Sequence[float]
) -> Row:
    """What the limit of one batch size was made of."""
    bandwidth = Spread.of(bandwidths)
    return {
        "checkpoint": label,
        "batch": batch,
        "distinct_experts": round(distinct, 1),
        "step_mib": round(step_bytes / 2**20, 1),
        "bandwidth_gb_per_s": round(bandwidth.median / 1e9, 1),
        "limit_tokens_per_s": round(batch * bandwidth.median / step_bytes, 1),
    }


def routing_seed(label: str, batch: int) -> random.Random:
    """Of the prompts whose routing is counted."""
    return random.Random(f"{label} routing {batch}")
