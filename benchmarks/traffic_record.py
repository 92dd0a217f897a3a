"""Real routing of a small checkpoint over documents, recorded once and kept in a cache.

The demo model's traces have token ids, which those of DeepSeek-V2-Lite have not.
"""

import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from locations import DEMO_MODEL, HERE
from numpy.typing import NDArray
from traffic_data import Trace, texts
from transformers import AutoModelForCausalLM, AutoTokenizer

WINDOW = 256  # tokens of a document that are read
RECORDED = 48  # held-out documents of a domain
CACHE = Path(os.environ.get("REMORA_CACHE_DIR", Path.home() / ".cache/remora")) / "traffic"


def demo(documents: int, checkpoint: Path = DEMO_MODEL, name: str = "demo") -> Trace | None:
    """Routing of the demo model over all domains: `documents` held-out ones of each to judge on,
    twice as many of the other split to plan on. None where checkpoint or documents are missing.

    RECORDED documents are recorded once, in some minutes, and kept.
    """
    plan, heldout = texts("plan"), texts("heldout")
    if not (checkpoint / "config.json").exists() or not plan or plan.keys() != heldout.keys():
        return None
    path = CACHE / f"{name}-{_tag(checkpoint)}.npz"
    if not path.exists():
        chosen = {d: (plan[d][: 2 * RECORDED], heldout[d][:RECORDED]) for d in plan}
        _record(checkpoint, chosen, path)
    whole = _read(path, name)
    kept = []
    for domain in range(len(whole.domains)):
        for split, count in ((1, 2 * documents), (2, documents)):
            own = np.flatnonzero((whole.domain_Q == domain) & (whole.split_Q == split))
            kept.append(own[:count])
    return whole.of(np.concatenate(kept))


def second() -> Trace:
    """Routing of a model of another shape (6 layers, 64 experts, top-6), kept in the repository:
    trained with `../shared/models/recipe/train_moe.py` on the documents that are for planning
    (`--layers 6 --experts 64 --topk 6 --inter 32 --vocab 4096 --seed 1 --secs 750 --threads 1`),
    recorded by `demo(..., checkpoint)`, 10 held-out documents of a domain and 20 others kept."""
    return _read(HERE / "data/second_model.npz", "second")


def _read(path: Path, name: str) -> Trace:
    with np.load(path) as arrays:
        lengths = arrays["lengths"]
        return Trace(
            name=name,
            experts_TLK=arrays["experts"].astype(np.int16),
            sequence_T=np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
            domain_Q=arrays["domain"],
            split_Q=arrays["split"],
            domains=tuple(arrays["names"].tolist()),
            num_experts=int(arrays["num_experts"]),
            row_bytes=int(arrays["row_bytes"]),
            expert_bytes=int(arrays["expert_bytes"]),
            token_T=arrays["tokens"].astype(np.int32),
        )


def _tag(checkpoint: Path) -> str:
    """Of what is recorded, wherever it lies: every checkout has the demo model."""
    tag = hashlib.sha256(f"{RECORDED} {WINDOW}".encode())
    for path in sorted(p for p in checkpoint.iterdir() if p.suffix in (".json", ".safetensors")):
        tag.update(path.read_bytes())
    return tag.hexdigest()[:12]


def _record(
    checkpoint: Path, documents: dict[str, tuple[list[str], list[str]]], path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()
    tokens, experts = [], []
    domains, splits = [], []
    for number, domain in enumerate(sorted(documents)):
        for split, some in zip((1, 2), documents[domain], strict=True):
            for text in some:
                ids = tokenizer(text)["input_ids"][:WINDOW]
                tokens.append(np.asarray(ids, np.int32))
                experts.append(_chosen(model, ids))
                domains.append(number)
                splits.append(split)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.npz")
    np.savez_compressed(
        partial,
        experts=np.concatenate(experts).astype(np.uint8),
        tokens=np.concatenate(tokens),
        lengths=np.array([len(t) for t in tokens], np.int64),
        domain=np.array(domains, np.int32),
        split=np.array(splits, np.int8),
        names=np.array(sorted(documents)),
        num_experts=model.config.num_experts,
        row_bytes=model.config.hidden_size * 2,
        expert_bytes=3 * model.config.hidden_size * model.config.moe_intermediate_size * 2,
    )
    partial.rename(path)


@torch.inference_mode()
def _chosen(model: torch.nn.Module, ids: list[int]) -> NDArray[np.int64]:
    """`[T, L, K]` experts of one document, by the gate's own logits."""
    out = model(torch.tensor([ids]), output_router_logits=True, use_cache=False)
    top_k = model.config.num_experts_per_tok  # type: ignore[union-attr]
    return np.stack(
        [logits.float().topk(top_k, dim=-1).indices.numpy() for logits in out.router_logits], 1
    )
