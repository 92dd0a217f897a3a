"""What a dense rank is told at its start."""

from remora.actors.executor import Wish
from remora.actors.tp_group import RankLaunch


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
