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

    def routing(prompts: Prompts, num_new: int) -> dict[str, float]:
        """Distinct experts that a mean decode step of these prompts chooses, summed over layers."""
        distinct: list[int] = []

        def note(_: Any, args: tuple[Any, ...]) -> None:
            if args[0].shape[0] == len(prompts):  # one row a sequence: not the prompts' own pass
                distinct.append(args[1].unique().numel())

        found = [m for m in model.modules() if type(m).__name__.endswith("Experts")]
        hooks = [experts.register_forward_pre_hook(note) for experts in found]
        generate(prompts, num_new)
        for hook in hooks:
            hook.remove()
        return {"distinct": len(found) * sum(distinct) / len(distinct), "layers": len(found)}

    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    return versions | {"threads": torch.get_num_threads()}, {
        "generate": timed(generate),
        "routing": routing,
    }


if __name__ == "__main__":
    run_worker(load)
