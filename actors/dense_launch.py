"""What a dense rank is told at its start. Nothing heavy is imported here, as in `launch.py`."""

from typing import Literal

from remora.actors.launch import Launch

Wish = Literal["auto", "eager", "compiled"]
ShuffleWish = Literal["auto", "none", "exact", "speculative"]


class RankLaunch(Launch, frozen=True, kw_only=True):
    """What any rank of a dense group is told about it."""

    rank: int = 0
    num_ranks: int = 1
    token_shuffle: ShuffleWish = "none"
    start_timeout_s: float = 900.0
    exchange_timeout_s: float = 65.0  # a rank may wait for another one that waits for a shard


class DenseLaunch(RankLaunch, frozen=True, kw_only=True):
    """What a dense rank is told; the view comes when the shards are up."""

    executor: Wish
    num_kv_blocks: int
    max_num_seqs: int
    max_tokens_per_step: int
    max_model_len: int
    max_waiting: int
    prefix_caching: bool
    call_timeout_s: float  # one layer's dispatch and combine, retries included
    hold_s: float = 0.0  # requests wait so long for a view that has a lost expert again
    hang_s: float | None = None  # the coordinator may go without progress; None: nobody looks
    load_idle: bool = False  # load in time that nobody else wants: others serve beside it
