"""What every benchmark program does alike: flags, the machine, alternating timing, bars, output.

    parser = common.parser(__doc__)
    ...
    common.finish("exact_cost", args, rows, bars)

prints a table of the rows and one of the bars, and writes
`{"benchmark", "commit", "hardware", "rows", "bars"}` to `--json PATH`.
"""

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from engines_report import Bar, Spread

HERE = Path(__file__).resolve().parent
Row = Mapping[str, str | int | float | bool | Spread]


def parser(doc: str | None) -> argparse.ArgumentParser:
    """`--json PATH` and `--quick`; the first line of the program's docstring describes it."""
    result = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    result.add_argument("--quick", action="store_true", help="fewer rounds, smaller sizes")
    result.add_argument("--json", type=Path, help="write everything measured to this file")
    return result


def commit() -> str:
    """The checkout's commit, with `-dirty` where files differ; empty outside a checkout."""
    described = subprocess.run(
        ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip()


def hardware() -> str:
    """CPU, cores, what of its instructions the kernels care for, torch, load: one line."""
    facts: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    flags = set(facts.get("flags", "").split())
    seen = [name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if name in flags]
    return (
        f"{facts.get('model name', platform.machine())} family {facts.get('cpu family', '?')}, "
        f"{os.cpu_count()} cores, {' '.join(seen)}; torch {torch.__version__}; "
        f"load {os.getloadavg()[0]:.1f}"
    )


def available_bytes() -> int:
    """Memory that a new process can have, page cache included."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable")


def clock() -> Callable[[], float]:
    """Seconds: CPU time of this thread where torch has one, else wall-clock time.

    With one thread all work is done by the caller, and its CPU time does not count what other
    processes of a busy machine take away.
    """
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def alternate(
    cases: Mapping[str, Callable[[], object]], *, rounds: int, sample_s: float
) -> dict[str, list[float]]:
    """Seconds per call of each case, one figure a round, cases in turn within a round.

    Args:
        cases: what to call, by name; each is called once before anything is timed.
        rounds: figures of each case.
        sample_s: about how long one figure's calls take.
    """
    now = clock()
    calls: dict[str, int] = {}
    for name, case in cases.items():
        case()
        begin = now()
        case()
        calls[name] = max(1, round(sample_s / max(now() - begin, 1e-7)))
    figures: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            begin = now()
            for _ in range(calls[name]):
                case()
            figures[name].append((now() - begin) / calls[name])
    return figures


def per_round(above: Sequence[float], below: Sequence[float], minus: float = 0.0) -> Spread:
    """above / below - minus, taken within each round."""
    return Spread.of([a / b - minus for a, b in zip(above, below, strict=True)])


def table(rows: Sequence[Row]) -> str:
    """Runs of rows of equal keys as aligned columns, one table a run."""
    runs = groupby(rows, key=lambda row: tuple(row))
    return "\n\n".join(_table(list(run)) for _, run in runs)


def _table(rows: Sequence[Row]) -> str:
    head = list(rows[0])
    cells = [head, *([str(row[key]) for key in head] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def finish(
    benchmark: str, args: argparse.Namespace, rows: Sequence[Row], bars: Sequence[Bar]
) -> None:
    """Prints the table and the bars; writes the JSON file where one is asked for."""
    print(table(rows))
    for bar in bars:
        verdict = {True: "holds", False: "MISSED", None: ""}[bar.holds]
        target = f"{bar.op} {bar.target:g}" if bar.target is not None else "no bar"
        print(f"{bar.name:<40} {bar.value!s:<28} {bar.unit:<6} {target:<8} {verdict}")
    if args.json:
        result: dict[str, Any] = {
            "benchmark": benchmark,
            "commit": commit(),
            "hardware": hardware(),
            "rows": [{k: _plain(v) for k, v in row.items()} for row in rows],
            "bars": [bar.as_json() for bar in bars],
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def _plain(value: object) -> object:
    if isinstance(value, Spread):
        return {"median": value.median, "min": value.min, "max": value.max}
    return value
