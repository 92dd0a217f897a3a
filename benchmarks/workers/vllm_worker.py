"""vLLM's CPU build, offline `LLM`, behind the workers' protocol. Runs in vLLM's own environment."""

import os
from typing import Any

from protocol import Loaded, Prompts, run_worker, timed


def load(options: dict[str, Any]) -> Loaded:
    """Options: model (directory), threads, tensor_parallel, model_len. Greedy, prefix caching off.

    With one process the engine runs inside this one: its better run, no message between engine and
    caller. Compiled, as vLLM is by default.
    """
    ranks = options["tensor_parallel"]
    per_rank = options["threads"] // ranks
    cores = [f"{rank * per_rank}-{(rank + 1) * per_rank - 1}" for rank in range(ranks)]
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(cores),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if ranks == 1 else "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    import torch
    import vllm

    engine = vllm.LLM(
        model=options["model"],
        dtype="bfloat16",
        skip_tokenizer_init=True,
        tensor_parallel_size=ranks,
        max_model_len=options["model_len"],
        max_num_seqs=64,
        enable_prefix_caching=False,
        enforce_eager=options.get("eager", False),
        disable_log_stats=True,
    )

    def generate(prompts: Prompts, num_new: int) -> int:
        params = vllm.SamplingParams(
            temperature=0.0, max_tokens=num_new, ignore_eos=True, detokenize=False
        )
        made = engine.generate(
            [vllm.TokensPrompt(prompt_token_ids=ids) for ids in prompts], params, use_tqdm=False
        )
        return sum(len(request.outputs[0].token_ids) for request in made)

    info = {"vllm": vllm.__version__, "torch": torch.__version__, "tensor_parallel": ranks}
    return info, {"generate": timed(generate)}


if __name__ == "__main__":
    run_worker(load)
