"""Ranks on processors of two kinds: a gate's last bits differ, and now and then what it chooses."""

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import VOCAB, make_checkpoint
from support.local_cluster import Ask, LocalCluster
from support.tp_engine import gloo_groups, groups_of, nccl_groups, together

from remora.actors import tp_group
from remora.actors.tp_shuffle import TokenShuffle
from remora.comm.collectives import part_of
from remora.comm.messages import SamplingParams
from remora.comm.shuffle import copy_prices

KINDS = {"one host": groups_of, "gloo": gloo_groups, "nccl": nccl_groups}


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_that_gate_differently_agree_on_slices(kind: str) -> None:
    groups, hosts = KINDS[kind](2), ["a", "b"]
    table = (np.arange(4) % 2).astype(np.int16)[:, None]
    index_TK = torch.tensor([[1, 3], [1, 3], [0, 2], [0, 2], [0, 1]])

    def order(group: Any) -> list[int]:
        shuffle = TokenShuffle(group, form="exact", alike=False)
        shuffle.set_prices(copy_prices(hosts, hosts), {0: table})
        own_TK = index_TK.clone()
        own_TK[2] = torch.tensor([[0, 2], [1, 3]])[group.rank]  # as good as equal
        found = shuffle.exact_order(0, own_TK, *part_of(group.rank, 2, 5))
        assert found is not None
        return found.tolist()

    orders = together([functools.partial(order, group) for group in groups])
    assert orders == [[2, 3, 4, 0, 1]] * 2, "row 2 was the first rank's, which says what it needs"
    for group in groups:
        group.close()


def test_gpus_of_two_kinds_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    names = iter(["H100", "A100", "A100"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: next(names))
    gpu: Any = SimpleNamespace(device=torch.device("cuda", 0))
    first, second, third = (tp_group.kernels_of(gpu) for _ in range(3))
    assert first != second == third


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    path: Path = make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3_moe")
    cluster = LocalCluster(path, num_shards=2, dtype="float32", exact=True)
    yield cluster
    cluster.close()


def test_ranks_tell_each_other_what_they_compute_with(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = (*range(3, 9), VOCAB - 1)
    ask = Ask(prompt, SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True))
    tokens, calls = [], []
    for kernels in (itertools.repeat("isa=amx"), itertools.cycle(["isa=amx", "isa=avx2"])):
        monkeypatch.setattr(tp_group, "kernel_fingerprint", functools.partial(next, kernels))
        with cluster.dense(num_ranks=2, token_shuffle="exact") as dense:
            tokens.append(dense.ask([ask])[0].token_ids)
            status = [dense.actor.status(), dense.others[0].status()]
        moved = [s["token_shuffle"]["group_bytes"]["gather_slices"]["calls"] for s in status]
        assert moved[0] == moved[1]
        calls.append(moved[0])
    assert tokens[0] == tokens[1]
    assert calls[1] == 2 * calls[0] > 0, "bundles, before the rows"
    assert "kernels that differ" in caplog.text
