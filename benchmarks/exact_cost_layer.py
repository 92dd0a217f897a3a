"""A Qwen3-MoE-shaped dense layer around opaque ops, for exact_cost.py.

Attention and expert dispatch are stand-ins that cost next to nothing: what is left is what an
executor is chosen for, norms, rotary embedding, residuals, router, and the calls themselves.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from remora.kernels.linear import PackedLinear, row_linear

HIDDEN, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, NUM_EXPERTS, TOP_K = 1024, 16, 4, 64, 64, 8


@torch.library.custom_op("remora_bench::attention", mutates_args=())
def attention(q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
    """Stands for the paged attention op: reads all three, returns [T, H, d]."""
    return q_THd + (k_TGd + v_TGd)[:, :1]


@attention.register_fake
def _(q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
    return torch.empty_like(q_THd, memory_format=torch.contiguous_format)


@torch.library.custom_op("remora_bench::experts", mutates_args=())
def experts(hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Stands for dispatch and combine: [T, D] -> [T, D]."""
    return torch.mul(hidden_TD, weights_TK[:, :1])


@experts.register_fake
def _(hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
    return torch.empty_like(hidden_TD)


def random_weight(num_outputs: int, num_inputs: int, *, seed: int) -> Tensor:
    """A bfloat16 weight that keeps the scale of its input."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_outputs, num_inputs, generator=generator)
    return weight.div(num_inputs**0.5).bfloat16()


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """As Qwen3's: float32 inside, the weight applied after rounding."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * wide.to(x.dtype)


def rotate(x_THd: Tensor, cos_Td: Tensor, sin_Td: Tensor) -> Tensor:
    """Rotary embedding, halves rotated."""
    low, high = x_THd.chunk(2, dim=-1)
    turned = torch.cat([-high, low], dim=-1)
    return x_THd * cos_Td[:, None] + turned * sin_Td[:, None]


class DenseLayer(nn.Module):
    """Norm, q/k/v, q and k norms, rotary, attention, o, norm, router, experts; two residuals."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        kv_size = NUM_KV_HEADS * HEAD_DIM
        self.q = PackedLinear.pack(random_weight(HIDDEN, HIDDEN, seed=seed))
        self.k = PackedLinear.pack(random_weight(kv_size, HIDDEN, seed=seed + 100))
        self.v = PackedLinear.pack(random_weight(kv_size, HIDDEN, seed=seed + 200))
        self.o = PackedLinear.pack(random_weight(HIDDEN, HIDDEN, seed=seed + 300))
        self.router = nn.Buffer(random_weight(NUM_EXPERTS, HIDDEN, seed=seed + 400))
        self.in_norm = nn.Buffer(torch.rand(HIDDEN).bfloat16() + 0.5)
        self.post_norm = nn.Buffer(torch.rand(HIDDEN).bfloat16() + 0.5)
        self.q_norm = nn.Buffer(torch.rand(HEAD_DIM).bfloat16() + 0.5)
        self.k_norm = nn.Buffer(torch.rand(HEAD_DIM).bfloat16() + 0.5)
        self.frequency = nn.Buffer(1e4 ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM))

    def forward(self, x_TD: Tensor, positions_T: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        angle_Td = (positions_T[:, None].float() * self.frequency[None]).repeat(1, 2)
        cos_Td, sin_Td = angle_Td.cos().bfloat16(), angle_Td.sin().bfloat16()
        h_TD = rms_norm(x_TD, self.in_norm)
        q_THd = rms_norm(self.q(h_TD).view(-1, NUM_HEADS, HEAD_DIM), self.q_norm)
        k_TGd = rms_norm(self.k(h_TD).view(-1, NUM_KV_HEADS, HEAD_DIM), self.k_norm)
        v_TGd = self.v(h_TD).view(-1, NUM_KV_HEADS, HEAD_DIM)
        mixed_THd = attention(rotate(q_THd, cos_Td, sin_Td), rotate(k_TGd, cos_Td, sin_Td), v_TGd)
        x_TD = x_TD + self.o(mixed_THd.reshape(-1, HIDDEN))
        h_TD = rms_norm(x_TD, self.post_norm)
        scores_TE = F.softmax(row_linear(h_TD, self.router).float(), dim=-1)
        weights_TK, index_TK = scores_TE.topk(TOP_K, dim=-1)
        weights_TK = (weights_TK / weights_TK.sum(-1, keepdim=True)).to(x_TD.dtype)
        return torch.add(x_TD, experts(h_TD, index_TK, weights_TK))


def row_bits_hold(layer: DenseLayer, forward: Callable[..., Tensor], num_rows: int) -> bool:
    """Whether rows computed among `num_rows` others, unpadded, have the bits they have alone."""
    x = torch.randn(200, HIDDEN, generator=torch.Generator().manual_seed(2)).bfloat16()
    positions = torch.arange(200)
    whole = forward(layer, x, positions)
    for start in range(0, 200 - min(num_rows, 199), max(1, num_rows // 2)):
        rows = slice(start, start + num_rows)
        if not torch.equal(forward(layer, x[rows], positions[rows]), whole[rows]):
            return False
    return True
