"""What a dense rank may do at once, from what it was told and what its model is."""

from typing import Final

from remora.actors.dense_events import DenseLimits
from remora.actors.dense_launch import DenseLaunch
from remora.actors.dense_model import DenseModel

STATUS_STATS: Final = (  # that `remora status` shows
    "num_running", "num_waiting", "kv_blocks_used", "kv_blocks_total", "steps_total",
    "preemptions_total", "executor",
)  # fmt: skip


def limits_of(model: DenseModel, launch: DenseLaunch) -> DenseLimits:
    """The limits of its state machine."""
    return DenseLimits(
        num_blocks=launch.num_kv_blocks,
        max_model_len=launch.max_model_len,
        vocab_size=model.spec.vocab_size,
        eos_token_ids=frozenset(model.spec.eos_token_ids),
        max_num_seqs=launch.max_num_seqs,
        max_tokens_per_step=launch.max_tokens_per_step,
        max_waiting=launch.max_waiting,
        prefix_caching=launch.prefix_caching,
    )
