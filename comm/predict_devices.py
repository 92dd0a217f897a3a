"""The device-level two-layer table: which devices a token goes to next, by those it came from.

As in *Semantic Parallelism* (arXiv 2503.04398): a table from the devices that the previous MoE
layer used to those of the next one. It knows nothing of tokens, is small (2**D rows a layer), and
must be learned anew when experts move.

Shape suffixes: T tokens, K top-k, L MoE layers, D devices.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from remora.comm.predict import SCALE

DEVICES_MAX: Final = 12
PRIOR: Final = 4.0  # tokens that the layer's mean counts for


class TwoLayerTable:
    """Counts and scores. Not thread-safe.

    Args:
        num_devices: at most DEVICES_MAX.
    """

    def __init__(self, *, num_layers: int, num_devices: int) -> None:
        assert 1 <= num_devices <= DEVICES_MAX, f"{num_devices} devices, at most {DEVICES_MAX}"
        self.num_devices = num_devices
        self._pairs_LMD = np.zeros((num_layers, 1 << num_devices, num_devices))
        self._seen_LM = np.zeros((num_layers, 1 << num_devices))

    def learn(self, device_LTK: NDArray[np.int64]) -> None:
        """Count tokens by the device of each of their experts; negative: none."""
        for layer in range(1, len(device_LTK)):
            mask_T = device_masks(device_LTK[layer - 1])
            np.add.at(self._seen_LM[layer], mask_T, 1.0)
            for k in range(device_LTK.shape[2]):
                device_T = device_LTK[layer, :, k]
                known_T = device_T >= 0
                where = (mask_T[known_T], device_T[known_T])
                np.add.at(self._pairs_LMD[layer], where, 1.0)

    def scores(self, layer: int, previous_TK: NDArray[np.int64]) -> NDArray[np.int64]:
        """[T, D]: pairs that a token is expected to have on each device, times SCALE.

        Args:
            layer: counted from 0; the first has no previous one and scores zeros.
            previous_TK: devices of the layer before.
        """
        pairs_MD, seen_M = self._pairs_LMD[layer], self._seen_LM[layer]
        mean_D = pairs_MD.sum(axis=0) / max(1.0, float(seen_M.sum()))
        mask_T = device_masks(previous_TK)
        total_T1 = seen_M[mask_T][:, None] + PRIOR
        score_TD = (pairs_MD[mask_T] + PRIOR * mean_D) / total_T1
        rounded_TD: NDArray[np.int64] = np.rint(score_TD * SCALE).astype(np.int64)
        return rounded_TD


def device_masks(device_TK: NDArray[np.int64]) -> NDArray[np.int64]:
    """[T]: one bit for each device that a token uses."""
    bits_TK = np.where(device_TK >= 0, np.left_shift(1, np.maximum(device_TK, 0)), 0)
    mask_T: NDArray[np.int64] = np.bitwise_or.reduce(bits_TK, axis=1)
    return mask_T
