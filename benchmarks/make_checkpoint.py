"""Writes the random-weight checkpoints that benchmarks compare engines on: `tiny` and `small`.

    .venv/bin/python benchmarks/make_checkpoint.py small            # benchmarks/out/small
    .venv/bin/python benchmarks/make_checkpoint.py tiny --out /tmp/tiny --seed 7

Qwen3-MoE, in the hub's layout (one tensor for each expert's projection), so that Remora,
transformers, vLLM and llama.cpp's converter all read the same directory; the configuration carries
the older keys that other engines want beside the newer ones of transformers 5. Every tensor is a
function of (seed, its name), whatever is written before it. One tensor is in memory at a time.

Shape suffixes: D model width, I expert width, V vocabulary.
"""

import argparse
import hashlib
import json
import math
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
TOKENIZER = HERE.parent / "examples" / "demo-model"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
FILE_BYTES_MAX = 1 << 30
DTYPES = {"bfloat16": (torch.bfloat16, "BF16"), "float32": (torch.float32, "F32")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a Qwen3-MoE model."""

    num_layers: int
    hidden_size: int
    num_experts: int
    top_k: int
    expert_width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int = 64
    vocab_size: int = 32000
    max_positions: int = 4096


SHAPES = {
    # 140 M parameters, 71 MB of weights touched by a token
    "tiny": Shape(
        num_layers=8,
        hidden_size=512,
        num_experts=32,
        top_k=4,
        expert_width=256,
        num_heads=8,
        num_kv_heads=4,
    ),
    # 1.32 B parameters, 453 MB of weights touched by a token
    "small": Shape(
        num_layers=16,
        hidden_size=1024,
        num_experts=64,
        top_k=8,
        expert_width=384,
        num_heads=16,
        num_kv_heads=4,
    ),
}


def config_of(shape: Shape, dtype: str) -> dict[str, object]:
    """`config.json`: what transformers 5 writes, and the older names of the same facts."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "decoder_sparse_step": 1,
        "dtype": dtype,
        "torch_dtype": dtype,
        "eos_token_id": 0,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": shape.expert_width * shape.top_k,
        "max_position_embeddings": shape.max_positions,
        "mlp_only_layers": [],
        "moe_intermediate_size": shape.expert_width,
        "norm_topk_prob": True,
        "num_attention_heads": shape.num_heads,
        "num_experts": shape.num_experts,
        "num_experts_per_tok": shape.top_k,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.num_kv_heads,
        "output_router_logits": False,
        "pad_token_id": 3,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": shape.vocab_size,
    }


def tensor_shapes(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every tensor in the order of the file; linears are [out, in]."""
    d, i = shape.hidden_size, shape.expert_width
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    yield "model.embed_tokens.weight", (shape.vocab_size, d)
    for layer in range(shape.num_layers):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", (d,)
        yield f"{at}.self_attn.q_proj.weight", (q, d)
        yield f"{at}.self_attn.k_proj.weight", (kv, d)
        yield f"{at}.self_attn.v_proj.weight", (kv, d)
        yield f"{at}.self_attn.o_proj.weight", (d, q)
        yield f"{at}.self_attn.q_norm.weight", (shape.head_dim,)
        yield f"{at}.self_attn.k_norm.weight", (shape.head_dim,)
        yield f"{at}.post_attention_layernorm.weight", (d,)
        yield f"{at}.mlp.gate.weight", (shape.num_experts, d)
        for expert in range(shape.num_experts):
            yield f"{at}.mlp.experts.{expert}.gate_proj.weight", (i, d)
            yield f"{at}.mlp.experts.{expert}.up_proj.weight", (i, d)
            yield f"{at}.mlp.experts.{expert}.down_proj.weight", (d, i)
    yield "model.norm.weight", (d,)
    yield "lm_head.weight", (shape.vocab_size, d)


def tensor_of(name: str, shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Norms are one; linears normal with variance 1 / fan-in, so that activations keep their size.

    (The usual 0.02 makes a random model of this width repeat one token, and hides errors.)
    """
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype)
    key = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
    deviation = 1.0 if name == "model.embed_tokens.weight" else 1.0 / math.sqrt(shape[1])
    return torch.empty(shape).normal_(0.0, deviation, generator=generator).to(dtype)


def write_safetensors(
    path: Path, tensors: list[tuple[str, tuple[int, ...]]], seed: int, dtype: str
) -> int:
    """Writes one safetensors file tensor by tensor; returns the bytes of its tensors.

    The format: header length (u64, little endian), JSON header, then the tensors' bytes.
    """
    torch_dtype, tag = DTYPES[dtype]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors:
        begin, end = end, end + math.prod(shape) * torch_dtype.itemsize
        header[name] = {"dtype": tag, "shape": shape, "data_offsets": [begin, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for name, shape in tensors:
            tensor = tensor_of(name, shape, seed, torch_dtype)
            file.write(tensor.view(torch.uint8).numpy().data)
    return end


def split(shape: Shape, dtype: str) -> list[list[tuple[str, tuple[int, ...]]]]:
    """The tensors in files of at most `FILE_BYTES_MAX`."""
    files: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for name, dims in tensor_shapes(shape):
        num_bytes = math.prod(dims) * DTYPES[dtype][0].itemsize
        if size + num_bytes > FILE_BYTES_MAX and files[-1]:
            files.append([])
            size = 0
        files[-1].append((name, dims))
        size += num_bytes
    return files


def write_checkpoint(out: Path, shape: Shape, *, seed: int, dtype: str = "bfloat16") -> Path:
    """Writes a checkpoint directory, or leaves the equal one that is there.

    Args:
        out: the directory; it appears whole or not at all.
        shape: sizes.
        seed: of the weights.
        dtype: "bfloat16" or "float32".

    Returns:
        `out`.

    Raises:
        FileExistsError: `out` holds something else.
    """
    recipe = {"shape": {name: getattr(shape, name) for name in Shape.__slots__}}
    recipe |= {"seed": seed, "dtype": dtype, "version": 1}
    mark = out / "recipe.json"
    if out.exists():
        if mark.exists() and json.loads(mark.read_text()) == recipe:
            return out
        raise FileExistsError(f"{out} exists and is no checkpoint of {recipe}")
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    files = split(shape, dtype)
    weight_map: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(files, 1):
        whole = len(files) == 1
        name = "model" if whole else f"model-{number:05d}-of-{len(files):05d}"
        total += write_safetensors(part / f"{name}.safetensors", tensors, seed, dtype)
        weight_map |= {tensor: f"{name}.safetensors" for tensor, _ in tensors}
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (part / "model.safetensors.index.json").write_text(json.dumps(index))
    (part / "config.json").write_text(json.dumps(config_of(shape, dtype), indent=2))
    generation = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 3}
    (part / "generation_config.json").write_text(json.dumps(generation))
    copy_tokenizer(part, shape.vocab_size)
    (part / "recipe.json").write_text(json.dumps(recipe))
    part.rename(out)
    return out


def copy_tokenizer(out: Path, vocab_size: int) -> None:
    """The demo model's byte-level tokenizer where its ids fit, with made-up words for those above.

    Every id has text, so that a stream of random tokens sends as many pieces as a real one.
    """
    tokenizer = json.loads((TOKENIZER / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    taken = {*vocab.values(), *(token["id"] for token in tokenizer["added_tokens"])}
    if max(taken) >= vocab_size:
        return
    vocab |= {f"\u0120word{i}": i for i in range(vocab_size) if i not in taken}  # \u0120: space
    for name in TOKENIZER_FILES:
        shutil.copyfile(TOKENIZER / name, out / name)
    (out / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("--out", type=Path, help="directory (default: benchmarks/out/SHAPE)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    args = parser.parse_args()
    torch.set_num_threads(1)
    out = args.out or HERE / "out" / args.shape
    print(write_checkpoint(out, SHAPES[args.shape], seed=args.seed, dtype=args.dtype))


if __name__ == "__main__":
    main()
