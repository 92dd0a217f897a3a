"""Traffic with a pattern, and the sketches that a dense group would send of it."""

import numpy as np
from numpy.typing import NDArray

from remora.comm.bundles import count_bundles
from remora.comm.sketch import Cell, DomainSketch, RoutingSketch, encode_sketch, feature_layers


def paired_tokens(
    num_layers: int, num_tokens: int, *, num_experts: int = 8, seed: int = 0, shift: int = 0
) -> NDArray[np.int64]:
    """[L, T, 2]: experts come in pairs (e, e + half), which contiguous runs tear apart.

    `shift` pairs them otherwise: (e, e + half + shift).
    """
    rng = np.random.default_rng(seed)
    half = num_experts // 2
    first = rng.integers(0, half, (num_layers, num_tokens))
    return np.stack([first, half + (first + shift) % half], axis=2)


def sketch_of(
    ids_LTK: NDArray[np.int64], *, source: str, moe_layers: tuple[int, ...], num_experts: int = 8
) -> RoutingSketch:
    """What an exact counter would send of prompts."""
    num_layers, num_tokens, top_k = ids_LTK.shape
    loads = [np.bincount(ids.reshape(-1), minlength=num_experts).astype("<f4") for ids in ids_LTK]
    cells = []
    for layer, ids_TK in enumerate(ids_LTK):
        unique = count_bundles(ids_TK, np.zeros(num_tokens, int))
        cells.append(
            Cell(
                layer=layer,
                phase=0,
                experts=unique.experts_BK.astype("<u2").tobytes(),
                weights=unique.weight_B.astype("<f4").tobytes(),
                load=loads[layer].tobytes(),
            )
        )
    histogram = np.stack([loads[layer] for layer in feature_layers(num_layers)])
    return RoutingSketch(
        source=source,
        num_experts=num_experts,
        top_k=top_k,
        moe_layers=moe_layers,
        tokens_seen=(num_tokens, 0.0),
        tokens_counted=(num_tokens, 0.0),
        domains=[DomainSketch(tokens=num_tokens, histogram=histogram.tobytes(), cells=cells)],
    )


def encoded(ids_LTK: NDArray[np.int64], source: str, moe_layers: tuple[int, ...]) -> bytes:
    """`sketch_of`, as it travels."""
    return encode_sketch(sketch_of(ids_LTK, source=source, moe_layers=moe_layers))
