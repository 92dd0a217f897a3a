"""Linear layers whose rows do not know each other.

Shapes: T rows (tokens), K inputs, O outputs. The C++ kernels accumulate every output element in
float32 over k in one fixed order, whatever the number of rows, the row's position and the number of
threads, so one set of kernels serves `fast` and `exact`. Without them torch serves; in `exact` it
then works on zero-padded tiles of exactly `ROW_TILE` rows, because BLAS results move with the row
count.
"""

from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from remora.kernels import native
from remora.kernels.memory import huge_zeros

ROW_TILE: Final = 64  # rows of a step are padded to a multiple of this in `exact`
PANEL: Final = 16  # output columns of one AVX-512 register of float32
GROUP: Final = 64  # output columns of one packed group: one sequential stream of memory
DTYPES: Final = (torch.bfloat16, torch.float32)
_AMX_INPUTS: Final = 32  # bfloat16 of one tile row of AMX
_SCALARS_PER_STEP: Final = {torch.bfloat16: 2, torch.float32: 1}


def in_row_tiles(function: Callable[[Tensor], Tensor], x_TK: Tensor) -> Tensor:
    """Applies a row-wise function to zero-padded tiles of exactly `ROW_TILE` rows (eager only)."""
    num_rows = x_TK.shape[0]
    if num_rows == 0:
        return function(x_TK)
    padded = F.pad(x_TK, (0, 0, 0, -num_rows % ROW_TILE)).contiguous()  # strides choose a BLAS path
    tiles = [function(tile) for tile in torch.split(padded, ROW_TILE)]
    return torch.cat(tiles)[:num_rows]


def torch_linear(x: Tensor, weight_OK: Tensor, bias_O: Tensor | None, *, exact: bool) -> Tensor:
    """`F.linear`; in `exact` on fixed row tiles. The path without C++ kernels.

    With other widths than multiples of 32, oneDNN's bfloat16 matmul on AMX reads beyond a row and
    multiplies what it finds by zero: a NaN in the next row becomes one of this row (torch 2.13.0,
    Intel Xeon). Zeros are appended then; the copy of the weight costs few models anything.
    """
    padding = -weight_OK.shape[1] % _AMX_INPUTS if weight_OK.dtype == torch.bfloat16 else 0
    if padding:
        x, weight_OK = F.pad(x, (0, padding)), F.pad(weight_OK, (0, padding))
    if not exact:
        return F.linear(x, weight_OK, bias_O)
    flat = x.reshape(-1, x.shape[-1])
    y = in_row_tiles(lambda tile: F.linear(tile, weight_OK, bias_O), flat)
    return y.reshape(*x.shape[:-1], weight_OK.shape[0])


def check_weight(weight_OK: Tensor, bias_O: Tensor | None) -> None:
    """Raises ValueError where a weight or a bias has a shape or a dtype that no kernel takes."""
    if weight_OK.ndim != 2 or 0 in weight_OK.shape:
        raise ValueError(f"weight must be [O, K] and not empty, got {list(weight_OK.shape)}")
    if weight_OK.dtype not in DTYPES:
        raise ValueError(f"weight must be bfloat16 or float32, got {weight_OK.dtype}")
    if bias_O is not None and bias_O.shape != weight_OK.shape[:1]:
        raise ValueError(f"bias {list(bias_O.shape)} does not fit weight {list(weight_OK.shape)}")


def packed_numel(num_outputs: int, num_inputs: int, dtype: torch.dtype) -> int:
    """Elements of the packed form of a weight [O, K], zero padding included.

    The layout (kernels/csrc/panel.h): groups of 64 output columns, the last one narrower, a
    multiple of 16; inside a group [K][column] for float32 and [K/2][column][2] for bfloat16, pairs
    along k as `vdpbf16ps` and AMX want them.
    """
    num_steps = -(-num_inputs // _SCALARS_PER_STEP[dtype])
    return -(-num_outputs // PANEL) * PANEL * num_steps * _SCALARS_PER_STEP[dtype]


def pack_into(packed: Tensor, weight_OK: Tensor) -> None:
    """Writes the packed form of `weight_OK` into `packed` ([packed_numel]), bit for bit."""
    torch.ops.remora.pack_weight(packed, weight_OK.contiguous())


def unpack(packed: Tensor, num_outputs: int, num_inputs: int) -> Tensor:
    """The [O, K] weight that was packed, bit for bit (a new tensor)."""
    weight_OK: Tensor = torch.ops.remora.unpack_weight(packed, num_outputs, num_inputs)
    return weight_OK


def packed_equals(packed: Tensor, weight_OK: Tensor) -> bool:
    """Whether `packed` is the packed form of `weight_OK`, bit for bit; its padding is not read."""
    return bool(torch.ops.remora.packed_equals(packed, weight_OK.contiguous()))


class PackedLinear(nn.Module):
    """y = x W^T + b with weights packed once; float32 accumulation, result rounded once.

    Build it with `PackedLinear.pack`. `packed` and `bias` are buffers, so modules of equal sizes
    share one compilation.
    """

    packed: Tensor
    bias: Tensor | None

    def __init__(
        self,
        packed: Tensor,
        bias_O: Tensor | None,
        *,
        in_features: int,
        out_features: int,
        is_native: bool,
        exact: bool,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.is_native = is_native
        self.exact = exact
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("bias", bias_O, persistent=False)

    @classmethod
    def pack(
        cls, weight_OK: Tensor, bias_O: Tensor | None = None, *, exact: bool = False
    ) -> "PackedLinear":
        """Packs a weight [O, K] (bfloat16 or float32) and an optional bias [O]; copies both.

        Args:
            weight_OK: as `nn.Linear.weight`; may be any view.
            bias_O: as `nn.Linear.bias`.
            exact: only matters without C++ kernels: work on fixed row tiles then.

        Raises:
            ValueError: wrong shape or dtype.
        """
        linear = cls.zeros(weight_OK, bias_O, exact=exact)
        if linear.is_native:
            pack_into(linear.packed, weight_OK.detach())
        else:
            linear.packed.copy_(weight_OK.detach())
        if linear.bias is not None and bias_O is not None:
            linear.bias.copy_(bias_O.detach())
        return linear

    @classmethod
    def zeros(
        cls, weight_OK: Tensor, bias_O: Tensor | None = None, *, exact: bool = False
    ) -> "PackedLinear":
        """As `pack`, of zeros in the place of these values: no memory until they are written."""
        check_weight(weight_OK, bias_O)
        num_outputs, num_inputs = weight_OK.shape
        dtype, is_native = weight_OK.dtype, native.native_available()
        return cls(
            huge_zeros(packed_numel(num_outputs, num_inputs, dtype), dtype=dtype)
            if is_native
            else torch.zeros(num_outputs, num_inputs, dtype=dtype),
            None if bias_O is None else torch.zeros(num_outputs, dtype=dtype),
            in_features=num_inputs,
            out_features=num_outputs,
            is_native=is_native,
            exact=exact,
        )

    @property
    def weight_nbytes(self) -> int:
        """Bytes that one pass streams from memory: packed weight and bias."""
        return self.packed.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def unpacked_weight(self) -> Tensor:
        """The weight [O, K] as it was given, bit for bit (a new tensor)."""
        if not self.is_native:
            return self.packed.clone()
        return unpack(self.packed, self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., O], in the dtype of x, which is that of the weight."""
        if self.is_native:
            y: Tensor = torch.ops.remora.packed_linear(x, self.packed, self.bias, self.out_features)
            return y
        return torch_linear(x, self.packed, self.bias, exact=self.exact)

    def extra_repr(self) -> str:
        """Sizes and dtype, for `print(module)`."""
        return f"{self.in_features} -> {self.out_features}, {self.packed.dtype}"


def row_linear(
    x: Tensor, weight_OK: Tensor, bias_O: Tensor | None = None, *, exact: bool = False
) -> Tensor:
    """y = x W^T + b with an ordinary weight: a router's `F.linear`, rows independent of each other.

    Args:
        x: [..., K], bfloat16 or float32.
        weight_OK: [O, K], dtype of x. For small O; large weights belong into a `PackedLinear`.
        bias_O: [O], dtype of x.
        exact: only matters without C++ kernels: work on fixed row tiles then.

    Returns:
        [..., O] in the dtype of x.
    """
    if native.native_available():
        y: Tensor = torch.ops.remora.row_linear(x, weight_OK, bias_O)
        return y
    return torch_linear(x, weight_OK, bias_O, exact=exact)


def _fake_pack_weight(packed: Tensor, weight: Tensor) -> None:
    return None


def _fake_packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None, num_outputs: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], num_outputs))


def _fake_packed_linears(x: Tensor, *weights: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty((*x.shape[:-1], size)) for size in weights[2::3])


def _fake_row_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


if native.native_available():
    torch.library.register_fake("remora::pack_weight", _fake_pack_weight)
    torch.library.register_fake("remora::packed_linear", _fake_packed_linear)
    torch.library.register_fake("remora::packed_linear_2", _fake_packed_linears)
    torch.library.register_fake("remora::packed_linear_3", _fake_packed_linears)
    torch.library.register_fake("remora::row_linear", _fake_row_linear)
