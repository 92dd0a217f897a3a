"""Checkpoints that are sound, and every way we know in which they are not."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import make_checkpoint

from remora.actors.checkpoint_files import INDEX_NAME, Checkpoint
from remora.actors.dense_model import build_dense
from remora.actors.manifest import Manifest, digest_expert
from remora.actors.model_spec import ModelSpec, inspect_model
from remora.actors.shard_build import build_shard
from remora.comm.errors import WeightsError

EXPERT = "model.layers.0.mlp.experts.5.up_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelSpec]:
    """A qwen3_moe checkpoint in hub layout, and its spec."""
    path = make_checkpoint(tmp_path_factory.mktemp("sound"), "qwen3_moe")
    return path, inspect_model(path)


@pytest.fixture
def copy(sound: tuple[Path, ModelSpec], tmp_path: Path) -> Path:
    """One to damage."""
    return Path(shutil.copytree(sound[0], tmp_path / "copy"))


def load_all(path: Path, spec: ModelSpec) -> None:
    """What the processes of a cluster do with a checkpoint before anything serves."""
    build_dense(path, spec, dtype=torch.float32, exact=True)
    every = {layer: range(spec.num_experts) for layer in spec.moe_layers}
    build_shard(path, spec, every, dtype=torch.float32, exact=True)


def file_of(path: Path, tensor: str) -> Path:
    """The file of a tensor, by the index."""
    return path / str(json.loads((path / INDEX_NAME).read_bytes())["weight_map"][tensor])


def edit_tensors(path: Path, tensor: str, edit: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the file that holds `tensor`."""
    file = file_of(path, tensor)
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def edit_index(path: Path, edit: Callable[[dict[str, str]], None]) -> None:
    """Rewrite the weight map."""
    index = json.loads((path / INDEX_NAME).read_bytes())
    edit(index["weight_map"])
    (path / INDEX_NAME).write_text(json.dumps(index))


def edit_header(file: Path, edit: Callable[[str], str]) -> None:
    """Rewrite the JSON header of a safetensors file, data untouched."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = edit(data[8 : 8 + length].decode()).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


def truncate(path: Path) -> None:
    file = file_of(path, EXPERT)
    file.write_bytes(file.read_bytes()[:-100])


def lengthen(path: Path) -> None:
    with file_of(path, EXPERT).open("ab") as stream:
        stream.write(b"more")


def cut_to_nothing(path: Path) -> None:
    file_of(path, EXPERT).write_bytes(b"abc")


def claim_a_huge_header(path: Path) -> None:
    file = file_of(path, EXPERT)
    file.write_bytes((1 << 60).to_bytes(8, "little") + file.read_bytes()[8:])


def break_the_header(path: Path) -> None:
    edit_header(file_of(path, EXPERT), lambda text: text.replace(":", ";", 1))


def name_twice(path: Path) -> None:
    def twice(text: str) -> str:
        (first, *_), pairs = list(json.loads(text).items()), json.loads(text)
        name = next(n for n in pairs if n != "__metadata__") or first
        return text.rstrip()[:-1] + f", {json.dumps(name)}: {json.dumps(pairs[name])}" + "}"

    edit_header(file_of(path, EXPERT), twice)


def overlap(path: Path) -> None:
    def shift(text: str) -> str:
        header = json.loads(text)
        begin, end = header[EXPERT]["data_offsets"]
        header[EXPERT]["data_offsets"] = [begin + 4, end + 4]
        return json.dumps(header)

    edit_header(file_of(path, EXPERT), shift)


def lie_about_the_shape(path: Path) -> None:
    def wrong(text: str) -> str:
        header = json.loads(text)
        header[EXPERT]["shape"][0] += 1
        return json.dumps(header)

    edit_header(file_of(path, EXPERT), wrong)


def unknown_dtype(path: Path) -> None:
    edit_header(file_of(path, EXPERT), lambda text: text.replace('"F32"', '"F4"'))


def remove_the_file(path: Path) -> None:
    file_of(path, EXPERT).unlink()


def remove_from_file(path: Path) -> None:
    edit_tensors(path, EXPERT, lambda tensors: tensors.pop(EXPERT))


def remove_the_expert(path: Path) -> None:
    remove_from_file(path)
    edit_index(path, lambda weight_map: weight_map.pop(EXPERT))


def remove_the_norm(path: Path) -> None:
    edit_tensors(path, NORM, lambda tensors: tensors.pop(NORM))
    edit_index(path, lambda weight_map: weight_map.pop(NORM))


def remove_all_of_a_kind(path: Path) -> None:
    names = [f"model.layers.0.mlp.experts.{e}.up_proj.weight" for e in range(8)]
    for name in names:
        edit_tensors(path, name, lambda tensors, name=name: tensors.pop(name))  # type: ignore[misc]
    edit_index(path, lambda weight_map: [weight_map.pop(name) for name in names])


def reshape_the_expert(path: Path) -> None:
    edit_tensors(path, EXPERT, lambda t: t.update({EXPERT: t[EXPERT][:-1].contiguous()}))


def reshape_the_norm(path: Path) -> None:
    edit_tensors(path, NORM, lambda t: t.update({NORM: torch.zeros(7)}))


def quantise_the_expert(path: Path) -> None:
    edit_tensors(path, EXPERT, lambda t: t.update({EXPERT: t[EXPERT].to(torch.int8)}))


def leave_the_directory(path: Path) -> None:
    edit_index(path, lambda weight_map: weight_map.update({EXPERT: "../model.safetensors"}))


def break_the_index(path: Path) -> None:
    (path / INDEX_NAME).write_text('{"weight_map": 3}')


def only_pickle(path: Path) -> None:
    for file in path.glob("*.safetensors*"):
        file.unlink()
    (path / "pytorch_model.bin").write_bytes(b"\x80\x04")


def only_gguf(path: Path) -> None:
    for file in path.glob("*.safetensors*"):
        file.unlink()
    (path / "model.gguf").write_bytes(b"GGUF")


def nothing(path: Path) -> None:
    for file in path.glob("*.safetensors*"):
        file.unlink()


FILE = r"model-\d+-of-\d+\.safetensors"
DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (truncate, rf"{FILE}: truncated: tensor '.+'"),
    (lengthen, rf"{FILE}: 4 bytes follow"),
    (cut_to_nothing, rf"{FILE}: not a safetensors file, or truncated"),
    (claim_a_huge_header, rf"{FILE}: not a safetensors file, or truncated"),
    (break_the_header, rf"{FILE}: damaged header"),
    (name_twice, rf"{FILE}: damaged header: a name comes twice"),
    (overlap, rf"{FILE}: tensor '.+' begins at byte"),
    (lie_about_the_shape, rf"{FILE}: tensor '{re.escape(EXPERT)}': shape"),
    (unknown_dtype, rf"{FILE}: tensor '.+' has dtype 'F4'"),
    (remove_the_file, rf"{FILE}: cannot be read: No such file"),
    (remove_from_file, rf"{FILE}: no tensor '{re.escape(EXPERT)}', which"),
    (remove_the_expert, r"expert 5 of 8 is missing: no tensor 'mlp.experts.\*.up_proj.weight'"),
    (remove_the_norm, rf"nothing in the checkpoint gives '{re.escape(NORM)}'"),
    (remove_all_of_a_kind, r"no tensor 'mlp.experts.\*.up_proj.weight', which"),
    (reshape_the_expert, rf"{FILE}.*experts"),
    (reshape_the_norm, rf"{FILE}: tensor '{re.escape(NORM)}' has shape \(7,\)"),
    (quantise_the_expert, rf"{FILE}: tensor '{re.escape(EXPERT)}' has dtype torch.int8"),
    (leave_the_directory, rf"{INDEX_NAME}: tensor .* lies in '\.\./model.safetensors'"),
    (break_the_index, rf"{INDEX_NAME}: damaged index"),
    (only_pickle, r"pytorch_model.bin: pickle weights are refused"),
    (only_gguf, r"GGUF weights are not read"),
    (nothing, r"no weights: model.safetensors or"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=lambda v: getattr(v, "__name__", ""))
def test_damage_is_named(
    sound: tuple[Path, ModelSpec], copy: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(copy)
    with pytest.raises(WeightsError, match=message):
        load_all(copy, sound[1])


def test_a_file_that_shrinks_after_its_header_was_read(copy: Path) -> None:
    with Checkpoint.open(copy) as checkpoint:
        truncate(copy)
        last = max(
            (n for n, e in checkpoint.tensors.items() if e.file == file_of(copy, EXPERT)),
            key=lambda name: checkpoint.tensors[name].offset,
        )
        with pytest.raises(WeightsError, match=rf"{FILE}: truncated: tensor '{re.escape(last)}'"):
            checkpoint.read(last)


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no such checkpoint directory"):
        inspect_model(tmp_path / "absent")


def test_reading_gives_what_safetensors_gives(sound: tuple[Path, ModelSpec]) -> None:
    path, _ = sound
    with Checkpoint.open(path) as checkpoint:
        for file in path.glob("*.safetensors"):
            for name, tensor in load_file(file).items():
                assert torch.equal(checkpoint.read(name), tensor)
                assert torch.equal(checkpoint.read(name, row=len(tensor) - 1), tensor[-1:])
        with pytest.raises(WeightsError, match="has no row 64"):
            checkpoint.read("model.norm.weight", row=64)
        with pytest.raises(WeightsError, match="no tensor 'x'"):
            checkpoint.read("x")


def manifest_of(path: Path, num_shards: int, dtype: torch.dtype = torch.float32) -> Manifest:
    """Manifest of all experts, loaded by `num_shards` shards."""
    spec = inspect_model(path)
    parts = [
        build_shard(
            path,
            spec,
            {layer: range(i, spec.num_experts, num_shards) for layer in spec.moe_layers},
            dtype=dtype,
            exact=True,
        ).manifest
        for i in range(num_shards)
    ]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    return merged


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss", "granitemoe"])
def test_manifest_depends_on_the_experts_alone(architecture: str, tmp_path: Path) -> None:
    hub = make_checkpoint(tmp_path / "hub", architecture)
    fused = make_checkpoint(tmp_path / "fused", architecture, layout="fused")
    one = manifest_of(hub, 1)
    assert manifest_of(hub, 3) == manifest_of(fused, 2) == one
    assert Manifest.from_json(one.to_json()) == one
    assert len({entry.digest for entry in one.experts}) == len(one.experts)
    assert manifest_of(hub, 1, torch.bfloat16).experts[0].digest != one.experts[0].digest
    other = make_checkpoint(tmp_path / "other", architecture, seed=1)
    with pytest.raises(WeightsError, match="layer 0 expert 0: digests differ"):
        one.merge(manifest_of(other, 1))


def test_digest_covers_names_shapes_and_every_byte() -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    digests = [
        digest_expert(0, 0, {"down_proj": weight}).digest,
        digest_expert(0, 0, {"up_proj": weight}).digest,
        digest_expert(0, 0, {"down_proj": weight.reshape(3, 2)}).digest,
        digest_expert(0, 0, {"down_proj": weight + torch.eye(2, 3)}).digest,
    ]
    assert len(set(digests)) == len(digests)
    transposed = weight.t().contiguous().t()  # the same values in other strides
    assert digest_expert(0, 0, {"down_proj": transposed}).digest == digests[0]


def test_progress_counts_the_bytes_of_the_checkpoint(sound: tuple[Path, ModelSpec]) -> None:
    path, spec = sound
    seen: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        seen.append((done, total))

    build_dense(path, spec, dtype=torch.float32, exact=True, progress=progress)
    dense = seen[-1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    seen.clear()
    half = {layer: [0, 3, 5, 7] for layer in spec.moe_layers}
    build_shard(path, spec, half, dtype=torch.float32, exact=True, progress=progress)
    assert len(seen) == 4 * len(spec.moe_layers)
    with Checkpoint.open(path) as checkpoint:
        everything = sum(entry.nbytes for entry in checkpoint.tensors.values())
    assert dense[0] == dense[1]
    assert seen[-1][0] == seen[-1][1]
    assert dense[1] + 2 * seen[-1][1] == everything


PEAK_SCRIPT = """
import sys, torch
from pathlib import Path
from remora.actors.dense_model import build_dense
from remora.actors.model_spec import inspect_model
from remora.actors.shard_build import build_shard

def status(key):
    text = Path("/proc/self/status").read_text()
    return int(text.split(key + ":")[1].split()[0]) * 1024

torch.set_num_threads(1)
small, big, role = sys.argv[1:]

def load(path):
    spec = inspect_model(path)
    if role == "dense":
        return build_dense(path, spec, dtype=torch.float32, exact=True)
    half = {layer: range(spec.num_experts // 2) for layer in spec.moe_layers}
    return build_shard(path, spec, half, dtype=torch.float32, exact=True)

load(small)  # what an empty process has: imports, thread pools, caches
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
loaded = load(big)
print(status("VmHWM") - before, loaded.nbytes)
"""


@pytest.mark.long
@pytest.mark.parametrize("role", ["dense", "shard"])
def test_peak_memory_is_what_is_owned_and_one_layer(
    sound: tuple[Path, ModelSpec], tmp_path: Path, role: str
) -> None:
    sizes = dict(hidden_size=256, vocab_size=20000, num_hidden_layers=6, mlp_only_layers=[])
    experts = dict(num_experts=16, moe_intermediate_size=256, intermediate_size=256)
    big = make_checkpoint(
        tmp_path, "qwen3_moe", max_shard_size="40MB", num_attention_heads=8, **sizes, **experts
    )
    result = subprocess.run(
        [sys.executable, "-c", PEAK_SCRIPT, str(sound[0]), str(big), role],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    growth, owned = map(int, result.stdout.split())
    # the largest unit: one layer's experts of this shard, or the embedding of the dense side
    layer = 20000 * 256 * 4 if role == "dense" else 8 * 3 * 256 * 256 * 4
    slack = 8 << 20
    whole = sum(file.stat().st_size for file in big.glob("*.safetensors"))
    assert owned + layer + slack < whole, "the model is too small to prove anything"
    assert growth <= owned + layer + slack, f"{growth} > {owned} + {layer} + {slack}"
