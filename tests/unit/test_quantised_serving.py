"""int4 experts behind real sockets: the tokens of a bfloat16 model with those very weights."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import VOCAB, make_checkpoint
from support.local_cluster import Ask, LocalCluster

from remora.actors.checkpoint_files import INDEX_NAME
from remora.actors.model_spec import inspect_model
from remora.actors.shard_build import build_shard
from remora.comm.errors import WeightsError
from remora.comm.messages import SamplingParams
from remora.kernels import int4
from remora.kernels.experts_dtype import ExpertsDtype

EXPERT = "model.layers.0.mlp.experts.3.down_proj.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3_moe")


def rounded(model: Path, target: Path) -> Path:
    """The checkpoint with the experts that int4 holds of it."""
    shutil.copytree(model, target)
    num_rounded = 0
    for path in target.glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors:
            if ".experts." in name:
                tensors[name] = int4.dequantize(*int4.quantize(tensors[name].bfloat16()))
                num_rounded += 1
        save_file(tensors, path, metadata={"format": "pt"})
    assert num_rounded > 0
    return target


def answers(model: Path, *, exact: bool, experts_dtype: ExpertsDtype) -> Iterator[list[int]]:
    asks = [
        Ask(
            tuple((i * 97 + j * j * 13 + j) % VOCAB for j in range(5 + i * 7)),
            SamplingParams(
                max_tokens=20, temperature=0.9 if i % 2 else 0.0, seed=i, ignore_eos=True
            ),
        )
        for i in range(6)
    ]
    cluster = LocalCluster(
        model, num_shards=2, dtype="bfloat16", exact=exact, experts_dtype=experts_dtype
    )
    try:
        with cluster.dense() as dense:
            yield from (answer.token_ids for answer in dense.ask(asks))
            # in exact numerics, a request alone gives what it gave among others
            if exact:
                yield dense.ask(asks[3:4])[0].token_ids
    finally:
        cluster.close()


@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
def test_int4_serves_the_tokens_of_its_weights(model: Path, exact: bool, tmp_path: Path) -> None:
    served = list(answers(model, exact=exact, experts_dtype="int4"))
    held = rounded(model, tmp_path / "rounded")
    assert served == list(answers(held, exact=exact, experts_dtype="auto"))
    assert all(len(tokens) == 20 for tokens in served)
    assert served != list(answers(model, exact=exact, experts_dtype="auto")), "nothing was rounded"
    if exact:
        assert served[6] == served[3]


def test_weights_that_int4_cannot_hold_are_refused_by_name(model: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(model, damaged)
    file = json.loads((damaged / INDEX_NAME).read_text())["weight_map"][EXPERT]
    tensors = load_file(damaged / file)
    tensors[EXPERT][0, 0] = torch.inf
    save_file(tensors, damaged / file, metadata={"format": "pt"})
    spec = inspect_model(damaged)
    with pytest.raises(
        WeightsError, match=r"layer 0 expert 3: int4 holds weights up to .* got inf"
    ):
        build_shard(
            damaged, spec, {0: [2, 3]}, dtype=torch.bfloat16, exact=False, experts_dtype="int4"
        )
