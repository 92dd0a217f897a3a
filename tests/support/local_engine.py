"""Remora's dense side and expert shards in one process: no sockets, no scheduler, no Ray.

The tiny driver runs the real dense model on flattened rows with KV pages, and real shards behind
the experts interface, so that a difference from `transformers` is a difference of the model code.
Legend: T token rows, M rows that one shard gets, N pairs, K top-k, D model width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from remora.actors import row_linear_patch
from remora.actors.dense_model import DenseModel, build_dense
from remora.actors.dense_rank import allocate_pages
from remora.actors.model_spec import ModelSpec, inspect_model
from remora.actors.shard_build import build_shard
from remora.actors.shard_model import CombineMode, ShardExperts
from remora.actors.step_context import ExpertsFn, StepContext
from remora.actors.tp_shuffle import TokenShuffle
from remora.comm.view import contiguous_placement
from remora.kernels.attention import BLOCK_SIZE, build_plan
from remora.kernels.device import CPU
from remora.kernels.experts_dtype import ExpertsDtype
from remora.kernels.linear import ROW_TILE
from remora.kernels.routing import combine_ordered


@dataclass(slots=True)
class LocalExperts:
    """The experts callable of a step over shards of this process. Layer -> expert -> shard."""

    shards: Sequence[ShardExperts]
    mode: CombineMode = "ordered"

    def __call__(
        self, layer: int, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor, num_tokens: int
    ) -> Tensor:
        """As `step_context.ExpertsFn`."""
        out_TD = torch.zeros(hidden_TD.shape, dtype=torch.float32)
        rows: list[Tensor] = []
        place_TK = torch.full(index_TK.shape, -1, dtype=torch.int64)
        start = 0
        for shard in self.shards:
            held = torch.tensor(shard.state.experts_of(layer), dtype=torch.int64)
            mine_TK = torch.isin(index_TK, held)
            mine_TK[num_tokens:] = False
            token_N, k_N = mine_TK.nonzero(as_tuple=True)
            token_M, row_N = torch.unique(token_N, return_inverse=True)
            answer = shard.forward(
                layer,
                hidden_TD[token_M],
                row_N,
                index_TK[token_N, k_N],
                weights_TK[token_N, k_N],
                self.mode,
            )
            if self.mode == "presummed":
                out_TD[token_M] += answer.float()
            else:
                place_TK[token_N, k_N] = torch.arange(start, start + token_N.numel())
                rows.append(answer)
                start += token_N.numel()
        if self.mode == "presummed":
            return out_TD.to(hidden_TD.dtype)
        return combine_ordered(torch.cat(rows), place_TK, weights_TK)


@dataclass(slots=True)
class LocalEngine:
    """Runs sequences greedily, one block table each."""

    spec: ModelSpec
    dense: DenseModel
    experts: ExpertsFn
    exact: bool
    pages: list[Any] = field(default_factory=list)

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        dtype: torch.dtype,
        num_shards: int = 2,
        mode: CombineMode = "ordered",
        exact: bool = True,
        max_positions: int | None = None,
        experts_dtype: ExpertsDtype = "auto",
        device: torch.device = CPU,
    ) -> "LocalEngine":
        """Inspect and load a checkpoint, experts in equal contiguous runs over the shards."""
        spec = inspect_model(path)
        dense = build_dense(
            path, spec, dtype=dtype, exact=exact, max_positions=max_positions, device=device
        )
        uids = tuple(f"shard-{i}" for i in range(num_shards))
        placement = contiguous_placement(
            num_experts=spec.num_experts, moe_layers=spec.moe_layers, shard_uids=uids
        )
        shards = [
            build_shard(
                path,
                spec,
                dict(zip(spec.moe_layers, placement.slots[uid], strict=True)),
                dtype=dtype,
                exact=exact,
                experts_dtype=experts_dtype,
                device=device,
            )
            for uid in uids
        ]
        return cls(spec, dense, LocalExperts(shards, mode), exact)

    def reset(self, num_sequences: int, num_tokens: int) -> None:
        """Fresh pages for `num_sequences` sequences of up to `num_tokens` tokens each."""
        self._blocks_each = -(-num_tokens // BLOCK_SIZE)
        self.pages = allocate_pages(self.dense, num_sequences * self._blocks_each)

    _blocks_each: int = 0
    shuffle: TokenShuffle | None = None

    def step(self, parts: Sequence[tuple[int, int, Sequence[int]]]) -> Tensor:
        """Run (sequence, start position, token ids) parts in one step -> logits of every row.

        Returns:
            float32 [sum of tokens, V].
        """
        tokens = [token for _, _, ids in parts for token in ids]
        slices = self.dense.num_slices
        quantum = ROW_TILE if self.exact else slices
        num_rows = max(2 * slices, -(-len(tokens) // quantum) * quantum)
        table = [range(s * self._blocks_each, (s + 1) * self._blocks_each) for s, _, _ in parts]
        plan = build_plan(
            [start for _, start, _ in parts],
            [len(ids) for _, _, ids in parts],
            [list(blocks) for blocks in table],
            num_rows,
        )
        context = StepContext(
            plan=plan,
            pages=self.pages,
            experts=self.experts,
            shuffle=self.shuffle,
            exact=self.exact,
            device=self.dense.device,
        )
        ids_T = torch.tensor(tokens + [0] * (num_rows - len(tokens)))
        if self.shuffle is not None:
            self.shuffle.begin_step(ids_T, len(tokens))
        return self.dense.run(context, ids_T, torch.arange(len(tokens)))

    def greedy(self, prompts: Tensor, num_new: int) -> Tensor:
        """Continue every row of `prompts` [B, P] by `num_new` greedy tokens -> int64 [B, new]."""
        size = prompts.shape[1]
        self.reset(len(prompts), size + num_new)
        last = self._last_rows(self.step([(i, 0, p.tolist()) for i, p in enumerate(prompts)]), size)
        made = [last]
        for position in range(size, size + num_new - 1):
            logits = self.step([(i, position, [int(t)]) for i, t in enumerate(made[-1])])
            made.append(logits.argmax(-1))
        return torch.stack(made, dim=1)

    def forced(self, sequences: Tensor) -> Tensor:
        """Logits of every position of `sequences` [B, L] -> float32 [B, L, V]."""
        self.reset(len(sequences), sequences.shape[1])
        logits = self.step([(i, 0, row.tolist()) for i, row in enumerate(sequences)])
        return logits.unflatten(0, sequences.shape)

    @staticmethod
    def _last_rows(logits: Tensor, size: int) -> Tensor:
        return logits.unflatten(0, (-1, size))[:, -1].argmax(-1)


def reference_model(path: Path, dtype: torch.dtype) -> Any:
    """`transformers`' own model of a checkpoint: eager attention, eager experts, torch's linear.

    Use it before a dense model is built in this process, which diverts `F.linear` from then on.
    """
    from transformers import AutoModelForCausalLM

    row_linear_patch.uninstall()
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    ).eval()
