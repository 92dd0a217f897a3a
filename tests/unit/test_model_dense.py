"""The dense side: exact whatever runs beside, faithful to `transformers`, one compilation."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import ARCHITECTURES, VOCAB, make_checkpoint
from support.local_engine import LocalEngine, reference_model
from torch import Tensor, nn

from remora.actors import row_linear_patch
from remora.actors.checkpoint_files import INDEX_NAME
from remora.actors.dense_model import DenseModel, build_dense, build_hollow
from remora.actors.model_spec import inspect_model
from remora.actors.step_context import StepContext, steps
from remora.kernels.attention import build_plan
from remora.kernels.linear import PackedLinear

TESTS = Path(__file__).parents[1]


def random_tokens(num_sequences: int, num_tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(3, VOCAB, (num_sequences, num_tokens), generator=generator)


def load_dense(path: Path, dtype: torch.dtype = torch.float32, **options: Any) -> DenseModel:
    return build_dense(path, inspect_model(path), dtype=dtype, exact=True, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_exact_rows_depend_on_their_request_alone(
    architecture: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Bitwise: alone and in a batch, whole and chunked, on 2 and on 4 shards."""
    path = make_checkpoint(tmp_path, architecture)
    engine = LocalEngine.load(path, dtype=dtype, num_shards=2)
    tokens = random_tokens(5, 45)
    together = engine.forced(tokens)
    assert torch.equal(engine.forced(tokens[3:4])[0], together[3])
    engine.reset(3, 45)
    first, second, third = tokens[:3].tolist()
    a = engine.step([(0, 0, first[:13]), (1, 0, second)])
    b = engine.step([(2, 0, third[:31]), (0, 13, first[13:14])])  # prefill beside a decode
    c = engine.step([(0, 14, first[14:]), (2, 31, third[31:])])
    assert torch.equal(torch.cat([a[:13], b[31:], c[:31]]), together[0])
    assert torch.equal(a[13:], together[1])
    assert torch.equal(torch.cat([b[:31], c[31:]]), together[2])
    other = LocalEngine.load(path, dtype=dtype, num_shards=4)
    assert torch.equal(other.forced(tokens), together)


def test_presummed_stays_near_ordered(tmp_path: Path) -> None:
    engine = LocalEngine.load(make_checkpoint(tmp_path, "qwen3_moe"), dtype=torch.float32)
    tokens = random_tokens(3, 20)
    ordered = engine.forced(tokens)
    engine.experts.mode = "presummed"
    torch.testing.assert_close(engine.forced(tokens), ordered, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["deepseek_v3", "ernie4_5_moe", "glm4_moe", "gpt_oss"])
def test_dtypes_and_buffers_are_those_of_transformers(architecture: str, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, architecture)
    theirs = reference_model(path, torch.bfloat16)
    dense = load_dense(path, torch.bfloat16)
    mine = {
        name.replace(".layer.", ".", 1): tensor  # the wrapper of a decoder layer
        for name, tensor in [*dense.model.named_parameters(), *dense.model.named_buffers()]
    }
    kept = 0
    for name, tensor in [*theirs.named_parameters(), *theirs.named_buffers()]:
        if name in mine:
            assert mine[name].dtype == tensor.dtype, name
            assert torch.equal(mine[name], tensor), name
            kept += tensor.dtype == torch.float32
    assert kept > 0, "rotary frequencies at least are float32"
    packed = dict(dense.model.named_modules())
    linears = {n: m for n, m in theirs.named_modules() if type(m) is nn.Linear}
    for name, linear in linears.items():
        twin = packed.get(name) or packed[_wrapped(name)]
        assert isinstance(twin, PackedLinear), name
        assert torch.equal(twin.unpacked_weight(), linear.weight), name


def _wrapped(name: str) -> str:
    head, layers, rest = name.partition("layers.")
    number, _, tail = rest.partition(".")
    return f"{head}{layers}{number}.layer.{tail}"


def test_tied_embeddings_that_differ_are_not_tied(tmp_path: Path) -> None:
    """The config says tied, the checkpoint holds both: the checkpoint is right, as upstream."""
    path = make_checkpoint(tmp_path, "mixtral", max_shard_size="5GB")
    config = json.loads((path / "config.json").read_text()) | {"tie_word_embeddings": True}
    (path / "config.json").write_text(json.dumps(config))
    tokens = random_tokens(2, 12)
    reference = reference_model(path, torch.float32)
    with torch.no_grad():
        logits = reference(tokens).logits
    mine = LocalEngine.load(path, dtype=torch.float32).forced(tokens)
    torch.testing.assert_close(mine, logits, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("only", ["model.embed_tokens.weight", "lm_head.weight"])
def test_tied_embeddings_stored_once(only: str, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "ernie4_5_moe", max_shard_size="5GB")
    assert not (path / INDEX_NAME).exists()
    tensors = load_file(path / "model.safetensors")
    weight = tensors.pop("model.embed_tokens.weight")
    assert "lm_head.weight" not in tensors
    save_file(tensors | {only: weight}, path / "model.safetensors", metadata={"format": "pt"})
    tokens = random_tokens(2, 12)
    with torch.no_grad():
        logits = reference_model(path, torch.float32)(tokens).logits
    mine = LocalEngine.load(path, dtype=torch.float32).forced(tokens)
    torch.testing.assert_close(mine, logits, atol=1e-3, rtol=1e-3)


LONGROPE = dict(
    rope_type="longrope",
    rope_theta=10000.0,
    short_factor=[1.0] * 8,
    long_factor=[4.0] * 8,
    short_mscale=1.1,
    long_mscale=1.3,
    original_max_position_embeddings=32,
)
DYNAMIC = dict(rope_type="dynamic", rope_theta=10000.0, factor=2.0)


@pytest.mark.parametrize(
    ("architecture", "rope"), [("phimoe", LONGROPE), ("mixtral", LONGROPE), ("mixtral", DYNAMIC)]
)
def test_rotary_that_looks_at_the_batch_is_pinned(
    architecture: str, rope: dict[str, Any], tmp_path: Path
) -> None:
    """A long neighbour changes nothing; short contexts give what `transformers` gives."""
    options = dict(rope_parameters=rope, max_position_embeddings=64, head_dim=16)
    path = make_checkpoint(tmp_path, architecture, **options)
    tokens = random_tokens(2, 64).tolist()
    short = tokens[0][:20]
    with torch.no_grad():
        theirs = reference_model(path, torch.float32)(torch.tensor([short])).logits[0]
    for max_positions in (32, 64):
        engine = LocalEngine.load(path, dtype=torch.float32, max_positions=max_positions)
        engine.reset(2, 64)
        alone = engine.step([(0, 0, short)])
        beside = engine.step([(0, 0, short), (1, 0, tokens[1][:max_positions])])[: len(short)]
        assert torch.equal(alone, beside)
        if max_positions == 32:
            torch.testing.assert_close(alone, theirs, atol=1e-3, rtol=1e-3)


def test_linear_is_diverted_and_given_back(tmp_path: Path) -> None:
    original = row_linear_patch.torch_linear
    assert torch.nn.functional.linear is original
    load_dense(make_checkpoint(tmp_path, "olmoe"))
    diverted = torch.nn.functional.linear
    assert diverted is not original
    x, weight, bias = torch.randn(2, 3, 8), torch.randn(5, 8), torch.randn(5)
    torch.testing.assert_close(diverted(x, weight, bias), original(x, weight, bias))
    double = x.double()
    assert torch.equal(diverted(double, weight.double()), original(double, weight.double()))
    row_linear_patch.uninstall()
    assert torch.nn.functional.linear is original


def test_ops_outside_a_step_say_so(tmp_path: Path) -> None:
    engine = LocalEngine.load(make_checkpoint(tmp_path, "olmoe"), dtype=torch.float32)
    with pytest.raises(AssertionError, match="is in no step"):
        engine.dense.hidden(torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
    engine.reset(1, 16)
    plan = build_plan([0], [1], [[0]], 64)
    context = StepContext(plan=plan, pages=engine.pages, experts=engine.experts)
    steps.enter(engine.dense.engine_id, context)
    with pytest.raises(AssertionError, match="already in a step"):
        steps.enter(engine.dense.engine_id, context)
    steps.leave(engine.dense.engine_id)


def test_two_engines_live_side_by_side(tmp_path: Path) -> None:
    paths = [make_checkpoint(tmp_path / a, a) for a in ("olmoe", "gpt_oss")]
    tokens = random_tokens(2, 20)
    engines = [LocalEngine.load(path, dtype=torch.float32) for path in paths]
    alone = [engine.forced(tokens) for engine in engines]
    again = [LocalEngine.load(path, dtype=torch.float32).forced(tokens) for path in paths]
    for one, other in zip(alone, again, strict=True):
        assert torch.equal(one, other)
    assert engines[0].dense.engine_id != engines[1].dense.engine_id


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_one_compilation_serves_all_layers_and_sizes(tmp_path: Path) -> None:
    from torch._dynamo.utils import counters

    path = make_checkpoint(tmp_path, "qwen3_moe", num_hidden_layers=4, mlp_only_layers=[])
    engine = LocalEngine.load(path, dtype=torch.float32, exact=False)
    tokens = random_tokens(4, 37)
    eager = engine.forced(tokens)
    torch._dynamo.reset()
    counters.clear()
    engine.dense.compile()
    compiled = engine.forced(tokens)
    for rows in itertools.chain(range(1, 4), (11, 64, 65)):
        engine.forced(tokens[:1, :rows])
    engine.greedy(tokens[:, :8], 3)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    torch.testing.assert_close(compiled, eager, atol=1e-3, rtol=1e-3)
    engine.dense.use_eager()
    assert torch.equal(engine.forced(tokens), eager)


@pytest.mark.parametrize("architecture", ["ernie4_5_moe", "gpt_oss"])
def test_hollow_model_is_like_the_loaded_one_in_all_but_values(
    tmp_path: Path, architecture: str
) -> None:
    """Or what a child compiles of it is of no use to the engine: head and biases included."""
    path = make_checkpoint(tmp_path, architecture)
    spec = inspect_model(path)

    def shape_of(dense: DenseModel) -> dict[str, tuple[object, ...]]:
        tensors = [*dense.model.named_parameters(), *dense.model.named_buffers()]
        kinds = {name: (type(m).__name__,) for name, m in dense.model.named_modules()}
        return kinds | {
            f"{name} (values)": (tuple(t.shape), t.dtype, t.stride(), t.requires_grad, t.is_meta)
            for name, t in tensors
        }

    hollow = shape_of(build_hollow(spec, dtype=torch.float32, exact=True))
    assert hollow == shape_of(build_dense(path, spec, dtype=torch.float32, exact=True))
    assert not any("Linear" in kinds for kinds in hollow.values()), "all that run are packed"


@pytest.mark.long
def test_torch_path_is_exact_too(tmp_path: Path) -> None:
    """Without the C++ kernels: the same tests, in a process of their own."""
    name = "test_exact_rows_depend_on_their_request_alone"
    picked = [
        f"{__file__}::{name}[{a}-{d}]" for a, d in (("gpt_oss", "float32"), ("olmoe", "bfloat16"))
    ]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *picked],
        env=os.environ | {"REMORA_NO_KERNELS": "1"},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 passed" in result.stdout
