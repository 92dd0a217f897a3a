"""The coordinator goes by what the first of its processes sees, and imports little for it."""

from support.imports import imported_at_once

from remora.cluster.config import RemoraConfig
from remora.cluster.launch import first_groups, first_shards

COSTLY = ("transformers", "numba", "scipy", "torch._inductor")


def test_who_brings_a_deployment_up_imports_none_of_what_serves_it() -> None:
    found = imported_at_once("remora.cluster.coordinator")
    assert "remora.cluster.elastic" in found and "torch" in found, "the walk sees what it can"
    assert not [name for name in sorted(found) if name.startswith(COSTLY)]
    others = imported_at_once("remora.actors.dense_actor")
    others |= imported_at_once("remora.actors.router_service")
    for costly in COSTLY:
        assert any(name.startswith(costly) for name in others), f"the walk would see {costly}"


def test_a_shard_has_no_use_for_numba() -> None:
    found = imported_at_once("remora.actors.expert_actor")
    assert "torch" in found, "the walk sees what it can"
    assert not [name for name in sorted(found) if name.startswith("numba")]


def test_who_a_deployment_starts_with() -> None:
    config = RemoraConfig.model_validate(
        {"model": "m", "dense": {"groups": 2}, "experts": {"shards": 3}}
    )
    assert first_groups(config) == ("dense-0", "dense-1")
    assert first_shards(config) == ("shard-0", "shard-1", "shard-2")
