"""Placement at start-up: contiguous runs with replicas, placement files, what does not fit."""

import json
import tracemalloc
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support.checkpoints import make_checkpoint

from remora.actors.model_spec import inspect_model
from remora.actors.shard_build import build_shard
from remora.cluster.cli import main
from remora.cluster.config import load_config, parse_config
from remora.cluster.launch import placement_of, shard_launch
from remora.cluster.memory_plan import plan_deployment, row_copies
from remora.cluster.placement_file import read_placement, write_placement
from remora.comm.errors import ConfigError
from remora.comm.topology import held_of
from remora.comm.view import Placement, contiguous_placement

TWO = Placement(
    num_experts=4,
    moe_layers=(1, 2),
    slots={"shard-0": ((0, 1), (0, 3)), "shard-1": ((2, 3), (1, 2, 3))},
)


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 60))
@example(shards=7, more=17, slots=7)  # what came half-way round left the last expert with one
def test_contiguous_placements_fill_their_slots(shards: int, more: int, slots: int) -> None:
    num_experts = shards + more - 1
    uids = tuple(f"shard-{i}" for i in range(shards))
    if slots * shards < num_experts:
        with pytest.raises(ValueError, match="at least"):
            contiguous_placement(
                num_experts=num_experts, moe_layers=(0,), shard_uids=uids, slots=slots
            )
        return
    found = contiguous_placement(
        num_experts=num_experts, moe_layers=(0, 3), shard_uids=uids, slots=slots
    )
    found.check()
    plain = contiguous_placement(num_experts=num_experts, moe_layers=(0, 3), shard_uids=uids)
    for uid, (first, second) in found.slots.items():
        assert first == second and len(first) == min(slots, num_experts)
        own = plain.slots[uid][0]
        assert first[: len(own)] == own
    counts_E = held_of(found, uids)[0].sum(axis=0)
    if slots * shards >= 2 * num_experts and shards > 1:
        assert counts_E.min() >= 2, "coverage before a third replica"


@pytest.mark.parametrize("name", ["p.yaml", "p.json"])
def test_a_file_gives_the_placement_back(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith("json"):
        path.write_bytes(msgspec.json.encode(TWO))
    else:
        write_placement(path, TWO)
    assert read_placement(path) == TWO
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"slots": {"a": ((0, 1), (0, 3)), "b": ((2, 3), (1, 2))}, "num_experts": 5}, r"\b4\b"),
        ({"slots": {"a": ((0, 1, 2), (0, 1, 2, 3))}}, r"layer 1: no shard holds experts 3"),
        ({"slots": {"a": ((0, 1, 2, 3),)}}, r"a: 1 lists of experts for 2 MoE layers"),
        ({"slots": {"a": ((0, 1, 2, 3, 3), (0, 1, 2, 3))}}, r"a layer 1: .* twice"),
        ({"slots": {"a": ((0, 1, 2, 3), (0, 1, 2, 9))}}, r"a layer 2: experts 9 are not in 0..3"),
        ({"moe_layers": (2, 1)}, "must ascend"),
        ({"slots": {}}, "at least one"),
        ({"slots": {"a": ((0, "x"),)}}, r"int.*\$.slots"),
        ({"comment": "hello"}, "comment"),
    ],
)
def test_what_is_no_placement_is_refused(
    tmp_path: Path, change: dict[str, object], complaint: str
) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps(msgspec.to_builtins(TWO) | change))
    with pytest.raises(ConfigError, match=complaint) as caught:
        read_placement(path)
    assert str(path) in str(caught.value)


def test_a_number_of_experts_takes_no_memory(tmp_path: Path) -> None:
    """A few more digits than were meant must not be the end of whoever reads the file."""
    path = tmp_path / "p.json"
    path.write_text(json.dumps(msgspec.to_builtins(TWO) | {"num_experts": 4_000_000}))
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError, match=r"no shard holds experts 4, 5, .* 3999988 more"):
            read_placement(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_placement(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("slots: [")
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        read_placement(tmp_path / "bad.yaml")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_placement(tmp_path / "no" / "such.yaml", TWO)


def test_a_file_must_fit_model_shards_and_slots(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", "qwen3_moe")
    spec = inspect_model(model)
    path = tmp_path / "p.yaml"

    def placed(placement: Placement, **experts: object) -> Placement:
        write_placement(path, placement)
        data = {"model": str(model), "experts": {"placement": str(path), **experts}}
        return placement_of(parse_config(data), spec)

    whole = contiguous_placement(
        num_experts=spec.num_experts, moe_layers=spec.moe_layers, shard_uids=("shard-0", "shard-1")
    )
    assert placed(whole) == whole
    wider = placed(whole, shards=3)
    assert wider.slots["shard-2"] == ((),) * len(spec.moe_layers), "it holds nothing, and may"
    with pytest.raises(ConfigError, match=r"no such shards: shard-1; .*experts\.shards = 1"):
        placed(whole, shards=1)
    room = len(whole.slots["shard-0"][0])
    with pytest.raises(ConfigError, match=rf"shard-0 layer \d: {room} experts, but experts.slots"):
        placed(whole, slots=room - 1)
    with pytest.raises(ConfigError, match=r"num_experts = 4: the model has"):
        placed(TWO)
    other = msgspec.structs.replace(whole, moe_layers=tuple(i + 1 for i in spec.moe_layers))
    with pytest.raises(ConfigError, match="the model's MoE layers are"):
        placed(other)


def test_too_few_slots_or_too_many_shards_are_refused(tmp_path: Path) -> None:
    spec = inspect_model(make_checkpoint(tmp_path, "qwen3_moe"))
    config = parse_config({"model": str(tmp_path), "experts": {"slots": 1}})
    with pytest.raises(ConfigError, match=r"experts\.slots = 1: 2 shards x 1 slots = 2 for"):
        placement_of(config, spec)
    config = parse_config({"model": str(tmp_path), "experts": {"shards": 100}})
    with pytest.raises(ConfigError, match=r"experts\.shards = 100: the model has"):
        placement_of(config, spec)


def test_paths_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(overrides={"model": "m", "experts.placement": "p.yaml"})
    assert config.experts.placement == tmp_path / "p.yaml"
    assert parse_config(config.to_args()) == config
    plain = load_config(overrides={"model": "m"})
    assert plain.experts.placement == "contiguous" and parse_config(plain.to_args()) == plain


def test_a_shard_holds_what_it_is_told_layer_by_layer(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "qwen3_moe")
    spec = inspect_model(path)
    first, *others = spec.moe_layers
    told = {first: (3, 0), **{layer: () for layer in others}}
    common = {"dtype": torch.float32, "exact": True}
    shard = build_shard(path, spec, told, **common)
    assert shard.state.experts_of(first) == (3, 0) and shard.state.layers == (first,)
    assert shard.state.not_mine(others[0], torch.tensor([1])) == [1]
    roomy = build_shard(path, spec, told, num_slots=4, **common)
    assert roomy.state.layers == spec.moe_layers and roomy.manifest == shard.manifest
    assert roomy.nbytes == 2 * len(spec.moe_layers) * shard.nbytes
    rows = torch.randn(5, spec.hidden_size)
    pairs = (torch.arange(5), torch.tensor([0, 3, 3, 0, 0]), torch.ones(5))
    one = shard.forward(first, rows, *pairs, "ordered")
    assert torch.equal(one, roomy.forward(first, rows, *pairs, "ordered"))
    assert build_shard(path, spec, dict.fromkeys(spec.moe_layers, ()), **common).nbytes == 0


def test_the_plan_counts_slots_and_replicas(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "qwen3_moe")
    spec = inspect_model(path)
    plain = plan_deployment(parse_config({"model": str(path)}))
    room = -(-spec.num_experts * 3 // 4)
    config = parse_config({"model": str(path), "experts": {"slots": room}})
    plan = plan_deployment(config)
    for uid, shard in plan["shards"].items():
        assert shard["slots_per_layer"] == [room, room]
        one = plain["shards"][uid]
        ratio = room / one["slots_per_layer"][0]
        assert shard["weights_bytes"] == one["weights_bytes"] * ratio
    assert plan["replicas"]["most"] == 2
    assert plan["replicas"]["beyond_the_first"] == len(spec.moe_layers) * (
        2 * room - spec.num_experts
    )
    before, after = (p["decode_step"][0]["row_copies_per_token_and_layer"] for p in (plain, plan))
    assert 1 <= after < before
    launch = shard_launch(config, "shard-0", placement_of(config, spec), b"t" * 32)
    assert launch.num_slots == room


def test_sampled_copies_agree_with_the_formula() -> None:
    """A second replica of an expert that nobody draws twice a token changes little."""
    uids = tuple(f"shard-{i}" for i in range(4))
    exact = row_copies(
        contiguous_placement(num_experts=64, moe_layers=(0,), shard_uids=uids), top_k=6
    )
    slots = {f"shard-{s}": (tuple(range(16 * s, 16 * s + 16)),) for s in range(4)}
    slots["shard-0"] = ((*slots["shard-0"][0], 63),)
    sampled = row_copies(Placement(num_experts=64, moe_layers=(0,), slots=slots), top_k=6)
    assert exact - 0.15 < sampled < exact + 0.02
    everywhere = {uid: (tuple(range(64)),) for uid in uids}
    whole = Placement(num_experts=64, moe_layers=(0,), slots=everywhere)
    assert np.isclose(row_copies(whole, top_k=6), 1.0)


def test_the_command_checks_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "p.yaml"
    write_placement(path, TWO)
    assert main(["placement", "check", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["slots_used"] == [2, 3] and facts["replicas"]["most"] == 2
    assert main(["placement", "check", str(path)]) == 0
    assert "4 experts of 2 MoE layers on 2 shards" in capsys.readouterr().out
    assert main(["placement", "check", str(path), "--slots", "2"]) == 2
    assert "shard-1 layer 2: 3 experts" in capsys.readouterr().err
    assert main(["placement", "check", str(path), "--shards", "1"]) == 2
    assert "no such shards: shard-1" in capsys.readouterr().err
