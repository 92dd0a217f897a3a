"""Rank 0 of a tensor-parallel dense group: it schedules, tells the others every step, and samples.

    order to every rank -> the same forward everywhere, sums and gathers -> logits here

A step that fails anywhere fails everywhere: whoever fails aborts the group's exchanges, rank 0
has every rank leave the step (`Recover`), and the requests of the step end with an error that names
the rank. Where an expert has no replica that some rank can use they do not end: the step is held
(`tp_hold.py`) and run again from its beginning. A rank that is gone, or does not answer, ends the
group for good (`GroupLostError`): its requests go on elsewhere, and all ranks are started anew.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from remora.actors.dense_events import SliceResult, StepPlan
from remora.actors.dense_launch import RankLaunch, Wish
from remora.actors.dense_model import DenseModel
from remora.actors.dense_rank import DenseRank, step_inputs
from remora.actors.executor import Executor
from remora.actors.model_spec import ModelSpec
from remora.actors.step_context import ExpertsFn
from remora.actors.tp_group import Ranks
from remora.actors.tp_shuffle import TokenShuffle, settle_form, token_shuffle
from remora.comm.collectives import GlooGroup, SharedGroup
from remora.comm.errors import ClusterError, GroupLostError
from remora.comm.nccl_group import NcclGroup
from remora.comm.peer import PeerLimits
from remora.comm.rank_link import (
    Adopt,
    Broke,
    Compile,
    Done,
    Link,
    Loads,
    Look,
    Message,
    Order,
    Pairs,
    Recover,
    Sent,
    Shuffle,
    TakeSent,
    UseEager,
)
from remora.comm.shuffle import Form
from remora.comm.view import View
from remora.kernels.attention import KVPages

if TYPE_CHECKING:
    from remora.kernels.gpu_pages import GpuKVPages

logger = logging.getLogger(__name__)

SEQUENCE_STEP = 1 << 20  # exchanges that a failed step is away from the next
# A shard that does not answer keeps a rank so long: its socket, then its handshake. A rank dials
# one after the other, and who waits for it must not take it for gone meanwhile.
SHARD_DIAL_S = 2 * PeerLimits().connect_s
T = TypeVar("T")


class Leader:
    """Tells the other ranks what to do. Used from the engine's thread.

    Args:
        uid: of the dense group, for errors.
        ranks: the group.
        timeout_s: for an answer, where a rank need not dial shards.

    Attributes:
        epoch: of the view that all ranks have adopted.
        lacks_experts: some expert has no replica that another rank can use, as the last step that
            failed has found, or the last look.
    """

    def __init__(self, uid: str, ranks: Ranks, timeout_s: float) -> None:
        self.group = ranks.group
        self.hosts = ranks.hosts
        self._alike = len(set(ranks.kernels)) == 1
        self.epoch = 0
        self.lacks_experts = False
        self._uid = uid
        self._links = ranks.links
        self._timeout_s = timeout_s
        self._generation = 0
        self._broken: str | None = None
        self._shuffle: TokenShuffle | None = None

    def ask(self, message: Message, timeout_s: float | None = None) -> None:
        """Have every rank do something and wait until all have.

        Raises:
            ClusterError: naming the rank that failed or is gone.
        """
        self._check()
        self._tell(message)
        errors = self._errors(self._answers(self._timeout_s if timeout_s is None else timeout_s))
        if errors:
            raise ClusterError("; ".join(errors))

    def look(self) -> bool:
        """Have every other rank look for what it lacks; whether they have all experts again.

        Raises:
            GroupLostError: a rank is gone.
        """
        self._check()
        self._tell(Look())
        self._note_lacks(self._answers(self._timeout_s + SHARD_DIAL_S))
        return not self.lacks_experts

    def settle_form(self, launch: RankLaunch, spec: ModelSpec, dtype: torch.dtype) -> Form:
        """How rows are shuffled, told to every rank before any of them loads.

        Raises:
            ClusterError: a rank is gone.
        """
        scatters = not isinstance(self.group, NcclGroup)
        form = settle_form(
            launch.token_shuffle, spec, dtype, self.hosts, exact=launch.exact, scatters=scatters
        )
        self._tell(Shuffle(form=form, alike=self._alike))
        return form

    def token_shuffle(self, form: Form, model: DenseModel) -> TokenShuffle:
        """What this rank shuffles with, until `close`."""
        made = token_shuffle(form, self.group, model.spec, model.sliced, alike=self._alike)
        self._shuffle = made
        return made

    def adopt(self, view: View, or_none: bool) -> None:
        """Every rank connects to the shards of `view`. Raises ClusterError.

        Args:
            or_none: as `connect_shards`.
        """
        num_shards = sum(member.role == "shard" for member in view.members)
        adopt = Adopt(view=view, rank_hosts=self.hosts, or_none=or_none)
        self.ask(adopt, self._timeout_s + num_shards * SHARD_DIAL_S)
        self.epoch = view.epoch

    def take_sent(self, epoch: int) -> list[NDArray[np.int64]] | None:
        """int64 `[L, S]` of every other rank: pairs that it sent since the last call, under the
        view of `epoch`; between steps. None: they do not tell.

        That a rank is gone is the next step's to tell.
        """
        found: list[NDArray[np.int64]] = []
        with contextlib.suppress(GroupLostError):  # logged, and kept in `_broken`
            self._check()
            self._tell(TakeSent())
            for rank, link in self._links.items():
                answer = self._receive(rank, link, self._timeout_s)
                assert isinstance(answer, Sent), f"rank {rank} answered {type(answer).__name__}"
                if answer.epoch == epoch and answer.pairs is not None:
                    found.append(answer.pairs.array())
        return found if len(found) == len(self._links) else None

    def note_others(
        self,
        epoch: int,
        groups_LS: NDArray[np.int64] | None,
        ranks_LS: Sequence[NDArray[np.int64]] | None,
        top_k: int,
    ) -> None:
        """Every other rank prices shards by what others sent; between steps.

        Args:
            groups_LS: of other dense groups; None: nobody can tell.
            ranks_LS: for each other rank, what the ranks beside it sent; None: nobody has told.
        """
        if self._broken is not None:
            return
        groups = None if groups_LS is None else Pairs.of(groups_LS)
        with contextlib.suppress(GroupLostError):
            for index, (rank, link) in enumerate(self._links.items()):
                ranks = None if ranks_LS is None else Pairs.of(ranks_LS[index])
                self._send(rank, link, Loads(epoch=epoch, groups=groups, ranks=ranks, top_k=top_k))

    def step(self, order: Callable[[int, int], Order], run: Callable[[], T]) -> T:
        """Have every rank run the step of `order(epoch, sequence)`, this one by `run`.

        Raises:
            ClusterError: the step failed on some rank, which is named; all have left it.
        """
        self._check()
        sequence = self.group.sequence if isinstance(self.group, SharedGroup) else 0
        try:
            self._tell(order(self.epoch, sequence))
            return run()
        except Exception as failure:
            reason = self._leave_step(failure)
            if reason is None:
                raise
            raise ClusterError(reason) from failure

    def close(self) -> None:
        """Let the other ranks go: their loops end with the connections."""
        for link in self._links.values():
            link.close()
        if self._shuffle is not None:
            self._shuffle.close()
        self.group.close()

    def _check(self) -> None:
        if self._broken is not None:
            raise GroupLostError(self._broken)

    def _tell(self, message: Message) -> None:
        for rank, link in self._links.items():
            self._send(rank, link, message)

    def _send(self, rank: int, link: Link, message: Message) -> None:
        try:
            link.send(message)
        except ClusterError as error:
            raise self._break(rank, error) from error

    def _receive(self, rank: int, link: Link, timeout_s: float) -> Message:
        """Raises GroupLostError."""
        try:
            answer = link.receive(timeout_s)
            while isinstance(answer, Broke):  # of a step that all have left by now
                answer = link.receive(timeout_s)
        except ClusterError as error:
            raise self._break(rank, error) from error
        return answer

    def _answers(self, timeout_s: float) -> dict[int, Done]:
        """Of the other ranks. Raises GroupLostError: one is gone."""
        answers = {}
        for rank, link in self._links.items():
            answer = self._receive(rank, link, timeout_s)
            assert isinstance(answer, Done), f"rank {rank} answered {type(answer).__name__}"
            answers[rank] = answer
        return answers

    def _errors(self, answers: dict[int, Done]) -> list[str]:
        """What went wrong on them."""
        return [f"{self._name(rank)}: {a.error}" for rank, a in answers.items() if a.error]

    def _note_lacks(self, answers: dict[int, Done]) -> None:
        self.lacks_experts = any(answer.lacks_experts for answer in answers.values())

    def _leave_step(self, failure: Exception) -> str | None:
        """Every rank out of the step; why it failed, None where that is this rank's `failure`.

        Raises:
            ClusterError: a rank did not leave it.
        """
        self._check()
        own = self.group.failure() is None
        self.group.abort(f"rank 0: {failure}")
        told = self.group.failure() or str(failure)
        self._generation += 1
        unique_id = self.group.make_id() if isinstance(self.group, NcclGroup) else b""
        self._tell(Recover(generation=self._generation, unique_id=unique_id))
        self._check_links()  # who has gone is not waited for as long as an exchange may take
        try:
            if isinstance(self.group, GlooGroup):
                self.group.connect(self._generation)
            elif isinstance(self.group, NcclGroup):
                self.group.connect(unique_id)
        except ClusterError as error:
            self._check_links()
            raise self._end(f"its ranks do not meet again ({error})") from error
        answers = self._answers(self._timeout_s)
        self._note_lacks(answers)
        errors = self._errors(answers)
        if isinstance(self.group, SharedGroup):
            self.group.restart((self.group.sequence + SEQUENCE_STEP) % (1 << 31))
        if own:
            return None
        return errors[0] if errors else f"{self._uid}: {told}"

    def _check_links(self) -> None:
        """Raises GroupLostError: a rank has hung up."""
        for rank, link in self._links.items():
            try:
                link.peek()
            except ClusterError as error:
                raise self._break(rank, error) from error

    def _break(self, rank: int, error: Exception) -> ClusterError:
        return self._end(f"{self._name(rank)} is gone ({error})")

    def _end(self, why: str) -> ClusterError:
        self._broken = f"{why}: the tensor-parallel group cannot serve"
        self.group.abort(self._broken)
        logger.error("%s", self._broken)
        return GroupLostError(self._broken)

    def _name(self, rank: int) -> str:
        return f"{self._uid}.{rank}"


class LeaderRank(DenseRank):
    """Runs steps together with the other ranks.

    Args:
        hold: waits until a step that failed may be run again (`GroupHold.wait`), of which so many
            seconds were used before for the same step; False: it may not.
    """

    def __init__(
        self,
        *,
        leader: Leader,
        executor: Executor,
        model: DenseModel,
        pages: list["KVPages | GpuKVPages"],
        experts: ExpertsFn,
        exact: bool,
        shuffle: TokenShuffle,
        hold: Callable[[float], bool],
    ) -> None:
        super().__init__(model=model, pages=pages, experts=experts, exact=exact, shuffle=shuffle)
        self._leader = leader
        self._recover = shuffle.recover
        self._hold = hold
        self._executor = executor

    def run(self, plan: StepPlan) -> list[SliceResult]:
        """As `DenseRank.run`."""
        num_rows = self.num_rows(plan)
        inputs = step_inputs(plan, num_rows)

        def order(epoch: int, sequence: int) -> Order:
            return Order(
                epoch=epoch,
                sequence=sequence,
                is_compiled=self._executor.phase == "compiled",
                num_rows=num_rows,
                starts=[s.start for s in plan.slices],
                lengths=[s.num_tokens for s in plan.slices],
                block_tables=[list(s.block_table) for s in plan.slices],
                token_ids=inputs.input_ids_T.tolist(),
                logit_rows=inputs.rows_R.tolist(),
            )

        held_s = 0.0
        while True:
            try:
                return self._leader.step(order, lambda: super(LeaderRank, self).run(plan))
            except GroupLostError:
                raise
            except (ClusterError, RuntimeError):  # RuntimeError: of an exchange
                self._recover()
                begun_s = time.monotonic()
                if not self._hold(held_s):
                    raise
                held_s += time.monotonic() - begun_s
            except Exception:
                self._recover()
                raise


class LeaderExecutor(Executor):
    """Switches all ranks at once; one child of rank 0 compiles for all, their layers are alike."""

    def __init__(
        self, model: DenseModel, leader: Leader, *, wish: Wish, exact: bool, timeout_s: float
    ) -> None:
        self._leader = leader
        self._compile_timeout_s = timeout_s
        super().__init__(model, wish=wish, exact=exact)

    def _switch(self) -> None:
        """As `Executor._switch`; where one rank fails, all stay eager."""
        why: str | None = None
        try:
            self._leader.ask(Compile(), self._compile_timeout_s)
        except ClusterError as failure:
            why = str(failure)
        else:
            super()._switch()
        if why is not None or self.phase != "compiled":
            self._model.use_eager()
            self._stay_eager(why or self.why_eager or "rank 0 could not compile")
            self._leader.ask(UseEager())
