"""Token shuffle at run time: one rank's view of which rows of a step are whose.

    exact         every rank has all rows and their true bundles: slices are chosen from those
    speculative   slices are chosen before the gate, from scores (`comm/shuffle_scores.py`)

All ranks of a group compute the same orders from the same steps; the exchanges fail where they do
not. Shape suffixes: T token rows of the step, R ranks, S shards, K top-k.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from remora.actors.dense_launch import ShuffleWish
from remora.actors.model_spec import ModelSpec
from remora.comm import shuffle, shuffle_scores
from remora.comm.accounting import CollectiveBytes
from remora.comm.collectives import Group
from remora.comm.replicas import replica_tables
from remora.comm.shuffle_cost import GroupFacts, choose_form
from remora.comm.shuffle_scores import LAYERS_BEFORE, OnlineScores, RowScores
from remora.comm.slices import gather_slices
from remora.comm.view import View

log = logging.getLogger(__name__)

NoteFn = Callable[[int, Tensor], None]  # decoder layer, int64 [T, K]


class TokenShuffle:
    """Used from the engine's thread.

    Args:
        group: the ranks.
        scores: predicts what rows will want; None where no layer is divided before its gate.
        sliced: decoder layers that are.
        form: "none": all other layers take runs of rows as they come; else true bundles decide.
        alike: every rank finds the same true bundles. Ranks of other kernels (another processor)
            need not: a gate whose last bits differ may choose another expert.
        layers: which layers use what, for people.
    """

    def __init__(
        self,
        group: Group,
        *,
        form: shuffle.Form,
        sliced: Sequence[int] = (),
        scores: RowScores | None = None,
        layers: str = "",
        alike: bool = True,
    ) -> None:
        self.layers = layers
        self.form = form
        self._alike = alike
        self.group = group
        self._scores = scores
        self._sliced = {layer: index for index, layer in enumerate(sliced)}
        self._price_RS: NDArray[np.int64] | None = None  # None: a rank is as good as another
        self._tables: dict[int, NDArray[np.int16]] = {}
        self._token_ids_T: NDArray[np.int64] = np.empty(0, np.int64)
        self._before: list[NDArray[np.int64]] = []  # bundles of the MoE layers before, newest first
        self._order_T: Tensor | None = None  # of the layer that is open
        self._index_CK: Tensor | None = None  # what its gate chose for our slice
        self._layer = -1
        self._note: NoteFn | None = None
        self.copies_far = 0  # of our rows, by `copy_prices`; what the shuffle is to keep down
        self.copies_all = 0
        self._group_bytes: CollectiveBytes | None = None  # of a group that is closed

    def adopt(self, view: View, rank_hosts: Sequence[str]) -> None:
        """Prices of the shards of a view from the next step on."""
        uids = sorted(view.placement.slots)
        hosts = {member.uid: member.endpoint.host for member in view.members}
        price_RS = shuffle.copy_prices(rank_hosts, [hosts[uid] for uid in uids])
        self.set_prices(price_RS, replica_tables(view, uids))

    def set_prices(self, price_RS: NDArray[np.int64], tables: dict[int, NDArray[np.int16]]) -> None:
        """As `shuffle.copy_costs` takes them, by decoder layer; what was learned is forgotten."""
        self._price_RS = price_RS if shuffle.prices_differ(price_RS) else None
        self._tables = tables
        self.recover()

    def recover(self) -> None:
        """After a failed step: ranks may have learned different rows of it."""
        self._order_T = None
        if self._scores is not None:
            self._scores.forget()

    def begin_step(self, token_ids_T: Tensor, num_tokens: int, note: NoteFn | None = None) -> None:
        """A step of `num_tokens` real rows begins; int64 ids, padding behind.

        Args:
            note: told what all real rows chose where the gate saw a slice (`RoutingTap`).
        """
        self._note = note
        self._token_ids_T = token_ids_T[:num_tokens].numpy()
        self._before = []
        self._order_T = None
        self._layer = -1

    # -- slices from true bundles -------------------------------------------------------------

    def exact_order(self, layer: int, index_TK: Tensor, begin: int, end: int) -> Tensor | None:
        """Order of the real rows, int64; None: runs as they come do as well.

        Args:
            index_TK: int64, true bundles of all real rows.
            begin, end: places of this rank's slice, in whatever order comes out.
        """
        if self._price_RS is None or len(index_TK) == 0:
            return None
        if self.form == "none":
            self._count(layer, index_TK[begin:end].cpu().numpy())
            return None
        if not self._alike:
            index_TK = self._gathered(index_TK[begin:end], torch.arange(len(index_TK)))
        found_TK = index_TK.cpu().numpy()
        self._before = [found_TK, *self._before[: LAYERS_BEFORE - 1]]
        order_T = shuffle.slice_order(-self._costs(layer, found_TK))
        self._count(layer, found_TK[order_T[begin:end]])
        return torch.from_numpy(order_T)

    # -- slices from scores -------------------------------------------------------------------

    def predicted_order(self, layer: int, num_rows: int) -> Tensor:
        """Order of all rows of a layer that is divided before its gate, int64 [T]; opens it."""
        if self._order_T is not None and self._layer == layer:
            return self._order_T
        num_real = len(self._token_ids_T)
        score_TR = np.zeros((num_real, self.group.size), np.int64)
        if self._scores is not None and self._price_RS is not None:
            score_TR = self._scores.scores(self._sliced[layer], self._token_ids_T, self._before)
        self._layer = layer
        self._index_CK = None
        self._order_T = torch.from_numpy(shuffle.slice_order(score_TR, num_rows))
        return self._order_T

    @property
    def is_open(self) -> bool:
        """Whether the rows of the layer that runs are a slice."""
        return self._order_T is not None

    def note_slice(self, index_CK: Tensor) -> int:
        """What the gate chose for this rank's slice; returns how many of its rows are real."""
        self._index_CK = index_CK
        return shuffle.real_rows(self.group.rank, self.group.size, len(self._token_ids_T))

    def close_layer(self) -> None:
        """The rows of the open layer are back in their order: learn from what it chose."""
        order_T, index_CK, layer = self._order_T, self._index_CK, self._layer
        self._order_T = self._index_CK = None
        if index_CK is None or self._scores is None or self._price_RS is None or order_T is None:
            return
        num_real = len(self._token_ids_T)
        whole_TK = self._gathered(index_CK, order_T)[:num_real].cpu()
        if self._note is not None:
            self._note(layer, whole_TK)
        index_TK = whole_TK.numpy()
        cost_TR = self._costs(layer, index_TK)
        own = shuffle.real_rows(self.group.rank, self.group.size, num_real)
        self._count(layer, index_CK[:own].cpu().numpy())
        self._scores.learn(self._sliced[layer], self._token_ids_T, self._before, cost_TR)
        self._before = [index_TK, *self._before[: LAYERS_BEFORE - 1]]

    def _gathered(self, index_CK: Tensor, order_T: Tensor) -> Tensor:
        """int64 [T, K]: bundles of all rows, each as the rank has it whose slice the row is in."""
        rows = gather_slices(index_CK.to(torch.int16), order_T, len(order_T), self.group)
        self.group.settle()  # they are read next: a peer that has gone must not be waited for
        return rows.to(torch.int64)

    def _costs(self, layer: int, index_TK: NDArray[np.int64]) -> NDArray[np.int64]:
        assert self._price_RS is not None
        cost_TR = np.empty((len(index_TK), self.group.size), np.int64)
        shuffle.copy_costs(index_TK, self._tables[layer], self._price_RS, cost_TR)
        return cost_TR

    def _count(self, layer: int, index_TK: NDArray[np.int64]) -> None:
        assert self._price_RS is not None
        num_rows = len(index_TK)
        flat_RS = np.stack([self._price_RS[self.group.rank] != 0, self._price_RS[0] >= 0])
        cost_T2 = np.empty((num_rows, 2), np.int64)
        shuffle.copy_costs(index_TK, self._tables[layer], flat_RS.astype(np.int64), cost_T2)
        self.copies_far += int(cost_T2[:, 0].sum())
        self.copies_all += int(cost_T2[:, 1].sum())

    def close(self) -> None:
        """The group is about to be closed: `status` tells what it had exchanged."""
        self._group_bytes = self.group.counters()

    def status(self) -> dict[str, object]:
        """For `remora status` and phases."""
        closed = self._group_bytes
        return {
            "form": self.form,
            "layers": self.layers,
            "prices_differ": self._price_RS is not None,
            "copies": self.copies_all,
            "far_copies": self.copies_far,
            "group_bytes": closed if closed is not None else self.group.counters(),
        }


@dataclass(slots=True)
class Sliced:
    """Which MoE layers divide their rows before their gate, and why others do not."""

    layers: list[int] = field(default_factory=list)
    others: dict[int, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """For people, at the start."""
        parts = [f"speculative in layers {_runs(self.layers)}"] if self.layers else []
        for reason in dict.fromkeys(self.others.values()):
            which = [layer for layer, why in self.others.items() if why == reason]
            parts.append(f"exact in layers {_runs(which)} ({reason})")
        return ", ".join(parts) or "no layer"


def token_shuffle(
    form: shuffle.Form, group: Group, spec: ModelSpec, sliced: Sliced, *, alike: bool = True
) -> TokenShuffle:
    """What a rank of a group shuffles with.

    Args:
        form: of the deployment.
        sliced: of this rank's model; its other MoE layers are served by "exact" where `form` is
            "speculative".
        alike: as `TokenShuffle`.
    """
    scores = None
    shuffle.warm(group.size)  # not in the first requests' time, also where copies are only counted
    if sliced.layers:
        shuffle_scores.warm()
        scores = OnlineScores(
            num_layers=len(sliced.layers),
            num_experts=spec.num_experts,
            num_ranks=group.size,
            vocab_size=spec.vocab_size,
        )
    layers = str(sliced) if form == "speculative" else f"{form} in all layers"
    log.info("rank %d of %d, token shuffle: %s", group.rank, group.size, layers)
    return TokenShuffle(
        group, form=form, sliced=sliced.layers, scores=scores, layers=layers, alike=alike
    )


def settle_form(
    wish: ShuffleWish,
    spec: ModelSpec,
    dtype: torch.dtype,
    rank_hosts: Sequence[str],
    *,
    exact: bool,
    scatters: bool,
) -> shuffle.Form:
    """The form of a deployment; "auto" is what costs least (`comm/shuffle_cost.py`).

    It is settled before weights are loaded, hence before the shards are known: they are taken to be
    where the ranks are, one for each. On CPUs a copy inside one host costs nothing.

    Args:
        exact: numerics.
        scatters: of the ranks' group, as in `GroupFacts`.
    """
    if wish != "auto":
        return wish
    facts = GroupFacts(
        rank_hosts=rank_hosts,
        shard_hosts=rank_hosts,
        num_experts=spec.num_experts,
        top_k=spec.top_k,
        row_bytes=spec.hidden_size * dtype.itemsize,
        replies_per_copy=spec.top_k / 2 if exact else 1.0,
        device_price=0,
        scatters=scatters,
    )
    return choose_form(facts)


def _runs(layers: Sequence[int]) -> str:
    """[1, 2, 3, 5] -> "1-3, 5"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
