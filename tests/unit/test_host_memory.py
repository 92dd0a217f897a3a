"""What a host has left, by files as kernels write them; and what shards may join then."""

from pathlib import Path

import pytest

from remora.actors.host_memory import free_memory
from remora.cluster.operation import Drain, ScaleTo
from remora.cluster.operation_plan import PROCESS_BYTES, FreeMemory, Situation, plan_target
from remora.comm.errors import ConfigError
from remora.comm.view import Endpoint, Member, Placement, View

MIB = 1 << 20


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def roots(tmp_path: Path) -> tuple[Path, Path]:
    """8 GiB available, no control groups."""
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    write(proc / "meminfo", f"MemTotal: {16 << 20} kB\nMemAvailable:   {8 << 20} kB\n")
    write(proc / "self" / "cgroup", "0::/\n")
    return proc, cgroups


def test_the_machine_bounds_it_where_nothing_else_does(roots: tuple[Path, Path]) -> None:
    assert free_memory(*roots) == 8 << 30
    assert free_memory() > 0, "this machine's own files can be read"


def test_a_group_above_bounds_it_too(roots: tuple[Path, Path]) -> None:
    proc, cgroups = roots
    write(proc / "self" / "cgroup", "0::/pods/one\n")
    write(cgroups / "pods/one/memory.max", "max\n")
    write(cgroups / "pods/one/memory.current", f"{7 << 30}\n")
    assert free_memory(proc, cgroups) == 8 << 30
    write(cgroups / "pods/memory.max", f"{4 << 30}\n")
    write(cgroups / "pods/memory.current", f"{3 << 30}\n")
    assert free_memory(proc, cgroups) == 1 << 30
    write(cgroups / "pods/memory.stat", f"anon 5\ninactive_file {512 * MIB}\n")
    assert free_memory(proc, cgroups) == (1 << 30) + 512 * MIB


def test_version_1_and_a_container_that_sees_its_group_as_the_root(
    roots: tuple[Path, Path],
) -> None:
    proc, cgroups = roots
    write(proc / "self" / "cgroup", "4:memory:/docker/abc\n1:cpu:/\n")
    write(cgroups / "memory/memory.limit_in_bytes", f"{2 << 30}\n")
    write(cgroups / "memory/memory.usage_in_bytes", f"{3 << 30}\n")
    assert free_memory(proc, cgroups) == 0, "over its bound"


def situation(memory: FreeMemory | None) -> Situation:
    """Two shards of four slots on two hosts, two MoE layers of four experts."""
    slots = {"shard-0": ((0, 1), (0, 1)), "shard-1": ((2, 3), (2, 3))}
    members = tuple(
        Member(
            uid=uid, incarnation=1, role="shard", actor_name=uid,
            endpoint=Endpoint(host=f"host-{uid[-1]}", tcp_address="127.0.0.1:1"),
        )
        for uid in slots
    )  # fmt: skip
    placement = Placement(num_experts=4, moe_layers=(1, 3), slots=slots)
    return Situation(
        view=View(epoch=1, members=members, placement=placement),
        room=dict.fromkeys(slots, (4, 4)),
        lost=frozenset(),
        incarnations=dict.fromkeys(slots, 1),
        replicas=1,
        slots_of_joiners=1,
        memory=memory,
    )


def free(*hosts: int, others: int = 0) -> FreeMemory:
    by_host = {f"host-{n}": size for n, size in enumerate(hosts)}
    return FreeMemory(slot_bytes=25 * MIB, by_host=by_host, others=others)


def test_shards_that_do_not_fit_are_refused_before_anything_starts() -> None:
    each = 4 * 25 * MIB + PROCESS_BYTES
    assert len(plan_target(ScaleTo(4), situation(free(each, each))).joiners) == 2
    assert len(plan_target(ScaleTo(4), situation(free(2 * each, 0))).joiners) == 2
    with pytest.raises(ConfigError, match=f"2 more shards: each takes {each:,} bytes"):
        plan_target(ScaleTo(4), situation(free(each, each - 1)))
    assert plan_target(ScaleTo(3), situation(free(each, each - 1))).joiners == {"shard-2": 1}


def test_nothing_is_refused_that_may_fit_elsewhere_or_frees_memory() -> None:
    for memory in (None, free(0, 0, others=1)):
        assert len(plan_target(ScaleTo(4), situation(memory)).joiners) == 2
    assert plan_target(ScaleTo(1), situation(free(0, 0))).retirees == ("shard-1",)
    assert plan_target(Drain(("shard-0",)), situation(free(0, 0))).retirees == ("shard-0",)
