"""transformers' own `generate` behind the workers' protocol: grouped_mm experts, sdpa attention."""

from typing import Any

from protocol import Loaded, Prompts, run_worker, timed


def load(options: dict[str, Any]) -> Loaded:
    """Options: model (directory), threads. bfloat16, greedy, no end-of-sequence token."""
    import torch
    import transformers

    torch.set_num_threads(options["threads"])
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        options["model"],
        dtype=torch.bfloat16,
        attn_implementation="sdpa",
        experts_implementation=options.get("experts", "grouped_mm"),
    )
    model.train(False)
    model.generation_config.eos_token_id = None

    @torch.inference_mode()
    def generate(prompts: Prompts, num_new: int) -> int:
        ids = torch.tensor(prompts)
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_new,
            do_sample=False,
            pad_token_id=0,
        )
        return int(made.numel() - ids.numel())

    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    return versions | {"threads": torch.get_num_threads()}, {"generate": timed(generate)}


if __name__ == "__main__":
    run_worker(load)
