"""Memory that a new process of this host may still take, by the kernel's own accounts."""

from pathlib import Path
from typing import Final

import msgspec

PROC: Final = Path("/proc")
CGROUPS: Final = Path("/sys/fs/cgroup")
# (folder of the hierarchy, limit, usage, clean page cache in memory.stat): versions 2 and 1
_VERSIONS: Final = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


class HostMemory(msgspec.Struct, frozen=True, kw_only=True):
    """What a shard that joins needs to know of the host of one that is there; bytes."""

    host: str  # label
    free: int  # that a new process may take
    slot: int  # of one slot of every MoE layer of this shard; 0: it loads
    copies: int  # of this shard's second copies, which a new one may take, too


def free_memory(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """Bytes: what the machine has available, or less where a control group is bounded.

    A group's own page cache that nobody has used lately counts as free.
    """
    free = _available(proc)
    for folder in _folders(proc):
        for part, limit, usage, cache in _VERSIONS:
            bound = _number(cgroups / part / folder / limit)
            used = _number(cgroups / part / folder / usage)
            if bound is not None and used is not None:
                clean = _fields(cgroups / part / folder / "memory.stat").get(cache, 0)
                free = min(free, max(0, bound - used + clean))
    return free


def _available(proc: Path) -> int:
    for line in (proc / "meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"{proc}/meminfo has no MemAvailable")


def _folders(proc: Path) -> set[Path]:
    """Of this process' memory groups and all above them, relative to a hierarchy; the root is what
    a container sees of its own."""
    found = {Path()}
    for line in (proc / "self" / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            group = Path(path.lstrip("/"))
            found |= {group, *group.parents}
    return found


def _number(path: Path) -> int | None:
    """None: no such file, or no bound."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _fields(path: Path) -> dict[str, int]:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    return {name: int(value) for name, _, value in (line.partition(" ") for line in lines)}
